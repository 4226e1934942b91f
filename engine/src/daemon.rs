//! The engine, wired by hand from top to bottom: each part is built from those above it, and the compiler checks that.
//!
//! ```text
//! build:  folders -> metadata -> events -> content, snapshots, diff, tasks -> sockets
//! run:    shims may publish -> tasks restored -> clients served -> told to stop -> drained -> sockets removed
//! ```
//!
//! Containers do not notice the end of the engine: their shims carry on, and the next start finds them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use proto::containerd::services as api;
use proto::containerd::services::introspection::v1::Plugin;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Server;

use crate::api::{
    containers, content, cri_images, cri_runtime, diff, events, gc, images, introspection, journal, leases,
    mounts, namespaces, registry, sandboxes, shim_events, snapshots, streaming, tasks, transfer, upkeep,
    version,
};
use crate::config::{Config, MetricsAddress};
use crate::containers::Containers;
use crate::content::Content;
use crate::cri;
use crate::diff::Diff;
use crate::events::Exchange;
use crate::gc::{Gc, Scheduler};
use crate::http;
use crate::images::Images;
use crate::introspection::{Introspection, plugin, skipped};
use crate::leases::Leases;
use crate::metadata::Metadata;
use crate::metrics::Metrics;
use crate::mounts::Mounts;
use crate::namespaces::Namespaces;
use crate::remotes::Remotes;
use crate::restart::Restart;
use crate::sandboxes::Sandboxes;
use crate::serving::{Activated, Listening, Observe, TRACES_FOLDER, incoming};
use crate::snapshots::Snapshots;
use crate::streaming::Streams;
use crate::tasks::{Tasks, TasksOptions};
use crate::transfer::Transfers;
use crate::transfer::verifier::Verifiers;
use crate::upkeep::{Folders, Upkeep};

/// The folder of the metadata beneath the root.
pub const METADATA_FOLDER: &str = "metadata";
/// How long calls in flight may take after the engine was told to stop. Waits and subscriptions do not end by
/// themselves, and what a mutation has begun goes on without its caller.
const DRAIN: Duration = Duration::from_secs(2);
/// How long subscribers of an earlier engine have to come back for what happened while they could not listen.
const HOLD: Duration = Duration::from_secs(10);
/// How long nothing is asked before memory is given back, and how long it is not while there are calls: a kubelet calls every second.
const QUIET: Duration = Duration::from_secs(2);
const BUSY: Duration = Duration::from_secs(60);
/// The most streams that one client may have open on one connection.
const STREAMS_MAX: u32 = 4096;

/// What the program around the engine does for it.
pub struct Control<'a> {
    /// Reads the configuration again, and applies its log level.
    pub reload: &'a dyn Fn() -> anyhow::Result<Config>,
    /// Sets the log level alone.
    pub set_level: http::SetLevel,
    /// The configuration, as a file.
    pub config: String,
}

/// The engine, built and listening, not yet serving.
pub struct Daemon {
    config: Config,
    grpc: Listening,
    ttrpc: Listening,
    debug: Option<Listening>,
    metrics: Metrics,
    events: Exchange,
    containers: Containers,
    content: Content,
    diff: Diff,
    gc: Gc,
    images: Images,
    introspection: Introspection,
    leases: Leases,
    metadata: Metadata,
    mounts: Mounts,
    namespaces: Namespaces,
    remotes: Remotes,
    verifiers: Verifiers,
    restart: Restart,
    sandboxes: Sandboxes,
    scheduler: Scheduler,
    snapshots: Snapshots,
    streams: Streams,
    tasks: Tasks,
    /// The tasks of an earlier engine come back.
    restoring: JoinHandle<()>,
}

impl Daemon {
    /// Makes the folders, takes the root for this process, opens everything in it, and binds the sockets.
    pub async fn build(config: &Config) -> anyhow::Result<Self> {
        for ignored in &config.ignored {
            tracing::warn!(setting = %ignored, "this setting of containerd has no effect here");
        }
        make_folders(config)?;
        if config.oom_score != 0
            && let Err(error) = std::fs::write("/proc/self/oom_score_adj", config.oom_score.to_string())
        {
            tracing::warn!(score = config.oom_score, %error, "cannot set the engine's own oom_score_adj");
        }
        // Each container takes some; what shims and containers get stays as it was.
        let descriptors = sys::process::raise_descriptor_limit()
            .inspect_err(|error| tracing::warn!(%error, "cannot raise the limit of open descriptors"))
            .ok()
            .flatten();
        let mut activated = Activated::take()?;
        let opened = config.clone();
        // Opening reads and syncs: not on the reactor.
        tokio::task::spawn_blocking(move || {
            let metadata = Metadata::open(&opened.root.join(METADATA_FOLDER))?;
            // Only now: the lock on the metadata says that no other engine serves this root.
            let events = Exchange::open(&opened.root, opened.events_retention, &metadata)?;
            events.hold();
            let content_root = opened.root.join("io.containerd.content.v1.content");
            let plugin = opened.content.as_ref();
            let content = Content::open_with(&content_root, metadata.clone(), events.clone(), plugin)?;
            let diff = Diff::open(content.clone(), opened.root.join("mounts"))?.with(
                opened.processors.clone(),
                &opened.differ_order,
                &opened.differs,
            );
            let tasks = Tasks::open(
                TasksOptions {
                    root: opened.root.clone(),
                    state: opened.state.clone(),
                    grpc_address: opened.grpc.path.clone(),
                    ttrpc_address: opened.ttrpc.path.clone(),
                    shim_dirs: shim_dirs(),
                    descriptors,
                    hooks: opened.hooks.clone(),
                },
                metadata.clone(),
                events.clone(),
                diff.clone(),
            )?;
            // Beside the rest: it waits for the shims, which wait for nothing of it.
            let restoring = {
                let tasks = tasks.clone();
                tokio::spawn(async move { tasks.restore().await })
            };
            let snapshots =
                Snapshots::open(&opened.root, metadata.clone(), events.clone(), &opened.snapshotters)?;
            let mounts = Mounts::open(&opened.root, &opened.state, metadata.clone())?;
            let introspection =
                Introspection::open(&opened.root, plugins(&opened, &content_root, &snapshots))?;
            Ok::<_, anyhow::Error>((
                (metadata, events, content, diff, tasks, restoring),
                (snapshots, mounts, introspection),
            ))
        })
        .await?
        .and_then(|(first, (snapshots, mounts, introspection))| {
            let (metadata, events, content, diff, tasks, restoring) = first;
            let (gc, scheduler) = Gc::new(
                config.gc.clone(),
                metadata.clone(),
                events.clone(),
                content.clone(),
                snapshots.clone(),
                mounts.clone(),
            );
            let containers = Containers::new(metadata.clone(), events.clone());
            let restart = Restart::new(
                metadata.clone(),
                events.clone(),
                containers.clone(),
                snapshots.clone(),
                tasks.clone(),
            );
            let grpc = activated.bind(&config.grpc)?;
            let ttrpc = activated.bind(&config.ttrpc)?;
            let debug = config.debug.as_ref().map(|socket| activated.bind(socket)).transpose()?;
            activated.report_rest();
            Ok(Daemon {
                config: config.clone(),
                grpc,
                ttrpc,
                debug,
                metrics: Metrics::default(),
                containers,
                images: Images::new(metadata.clone(), events.clone()),
                leases: Leases::new(metadata.clone()),
                sandboxes: Sandboxes::new(metadata.clone()),
                namespaces: Namespaces::new(metadata.clone(), events.clone()),
                metadata,
                events,
                content,
                diff,
                gc,
                introspection,
                remotes: Remotes::new(config.registries.clone())?,
                verifiers: config.verifiers.clone(),
                restart,
                mounts,
                scheduler,
                snapshots,
                streams: Streams::default(),
                tasks,
                restoring,
            })
        })
    }

    /// Serves until SIGTERM or SIGINT. At SIGHUP the configuration is read again, and what can change while the engine runs is
    /// applied: the log level, and when garbage is collected.
    pub async fn run(self, control: Control<'_>) -> anyhow::Result<()> {
        let mut hang_up = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let (grpc, ttrpc) = (self.grpc, self.ttrpc);
        let mut sockets = vec![grpc.ours, ttrpc.ours];

        let shims = tokio::spawn(shim_events::serve(ttrpc.listener, self.tasks.clone()));
        // Before clients are served, so that none sees a container whose task is not there yet.
        self.restoring.await.context("the tasks of an earlier engine were not brought back")?;
        let collector = self.gc.clone();
        let transfers = Transfers::new(
            self.content.clone(),
            self.diff.clone(),
            self.images.clone(),
            self.leases.clone(),
            self.remotes.clone(),
            self.snapshots.clone(),
            self.streams.clone(),
        )
        .with_verifiers(self.verifiers);
        let kubelets = cri::images::Images::new(
            self.images.clone(),
            self.content.clone(),
            self.snapshots.clone(),
            transfers.clone(),
            self.gc.clone(),
            (&self.config.cri).into(),
        );
        let pods = {
            let parts = cri::runtime::Parts {
                containers: self.containers.clone(),
                events: self.events.clone(),
                images: kubelets.clone(),
                metadata: self.metadata.clone(),
                sandboxes: self.sandboxes.clone(),
                snapshots: self.snapshots.clone(),
                tasks: self.tasks.clone(),
            };
            let config = self.config.clone();
            let identity = self.introspection.server()?.uuid;
            crate::error::blocking(move || {
                cri::runtime::Runtime::open(config.cri, &config.root, &config.state, &identity, parts)
            })
            .await?
        };
        pods.recover().await;
        let execs = {
            let options = cri::exec::Options {
                folder: self.config.state.join("cri/execs"),
                drain: pods.settings().drain_exec_sync,
                limits: pods.settings().execs,
            };
            let (store, tasks, containers) =
                (pods.store().clone(), self.tasks.clone(), self.containers.clone());
            crate::error::blocking(move || {
                let execs = cri::exec::Execs::new(options, store, tasks, containers)?;
                // What cannot be looked after is not to keep the engine from starting.
                if let Err(error) = execs.restore() {
                    tracing::warn!(%error, "commands that an earlier engine ran in containers could not be looked after");
                }
                Ok(execs)
            })
            .await?
        };
        let streamer = cri::streaming::Server::start(pods.settings().streaming(), execs.clone()).await?;
        let watching = tokio::spawn(pods.clone().watch());
        let stats = cri::stats::Stats::new(
            pods.store().clone(),
            self.tasks.clone(),
            self.containers.clone(),
            self.snapshots.clone(),
        );
        if let Err(error) = self.mounts.restore().await {
            tracing::error!(%error, "mounts kept for clients could not be looked at");
        }
        let scheduler = tokio::spawn(self.scheduler.run());
        let restart = tokio::spawn(self.restart.run());
        if let Some(address) = &self.config.metrics {
            http::serve_metrics(address, self.metrics.clone()).await?;
            if let MetricsAddress::Unix(socket) = address {
                sockets.push(Some(socket.path.clone()));
            }
        }
        let level = Arc::new(Mutex::new(self.config.log_level));
        if let Some(Listening { listener, ours }) = self.debug {
            let debug = http::Debug {
                config: control.config.as_str().into(),
                level: level.clone(),
                set_level: control.set_level.clone(),
            };
            http::serve_debug(listener, self.metrics.clone(), debug);
            sockets.push(ours);
        }

        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status("", tonic_health::ServingStatus::Serving).await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
            .build_v1()
            .context("cannot build the reflection service")?;

        // Both limits hold for every service that has messages of any size.
        macro_rules! sized {
            ($server:expr) => {
                $server
                    .max_decoding_message_size(self.config.max_receive)
                    .max_encoding_message_size(self.config.max_send)
            };
        }
        let (held, settled) = (self.events.clone(), self.events.clone());
        let upkeep = Upkeep {
            folders: Folders { root: self.config.root.clone(), state: self.config.state.clone() },
            content: self.content.clone(),
            events: self.events.clone(),
            gc: self.gc.clone(),
            images: self.images.clone(),
            leases: self.leases.clone(),
            metadata: self.metadata,
            remotes: self.remotes,
            snapshots: self.snapshots.clone(),
            transfers: transfers.clone(),
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = Server::builder()
            .layer(Observe(self.metrics.clone(), self.config.state.join(TRACES_FOLDER).into()))
            .max_concurrent_streams(STREAMS_MAX)
            // A client that cancels many calls at once is not an attack here, and keeps its connection.
            .http2_max_pending_accept_reset_streams(Some(STREAMS_MAX as usize))
            .add_service(health_service)
            .add_service(reflection)
            .add_service(sized!(api::containers::v1::containers_server::ContainersServer::new(
                containers::Service { containers: self.containers }
            )))
            .add_service(sized!(api::content::v1::content_server::ContentServer::new(content::Service {
                content: self.content
            })))
            .add_service(sized!(proto::runtime::v1::image_service_server::ImageServiceServer::new(
                cri_images::Service { images: kubelets }
            )))
            .add_service(sized!(proto::runtime::v1::runtime_service_server::RuntimeServiceServer::new(
                cri_runtime::Service { runtime: pods, stats, execs, server: streamer }
            )))
            .add_service(sized!(api::diff::v1::diff_server::DiffServer::new(diff::Service {
                diff: self.diff
            })))
            .add_service(sized!(api::events::v1::events_server::EventsServer::new(events::Service {
                events: self.events.clone(),
                tasks: self.tasks.clone(),
            })))
            .add_service(sized!(api::images::v1::images_server::ImagesServer::new(images::Service {
                images: self.images,
                gc: self.gc.clone(),
            })))
            .add_service(sized!(api::introspection::v1::introspection_server::IntrospectionServer::new(
                introspection::Service { introspection: self.introspection }
            )))
            .add_service(sized!(api::leases::v1::leases_server::LeasesServer::new(leases::Service {
                leases: self.leases,
                gc: self.gc.clone(),
            })))
            .add_service(sized!(proto::gantry::events::v1::events_server::EventsServer::new(
                journal::Service { events: self.events }
            )))
            .add_service(sized!(proto::gantry::gc::v1::gc_server::GcServer::new(gc::Service { gc: self.gc })))
            .add_service(sized!(proto::gantry::images::v1::images_server::ImagesServer::new(
                upkeep::Service { upkeep }
            )))
            .add_service(sized!(proto::gantry::registry::v1::registry_server::RegistryServer::new(
                registry::Service { transfers: transfers.clone() }
            )))
            .add_service(sized!(api::mounts::v1::mounts_server::MountsServer::new(mounts::Service {
                mounts: self.mounts,
            })))
            .add_service(sized!(api::namespaces::v1::namespaces_server::NamespacesServer::new(
                namespaces::Service { namespaces: self.namespaces }
            )))
            .add_service(sized!(api::sandbox::v1::store_server::StoreServer::new(sandboxes::Store {
                sandboxes: self.sandboxes
            })))
            .add_service(sized!(api::sandbox::v1::controller_server::ControllerServer::new(
                sandboxes::Controller { tasks: self.tasks.clone() }
            )))
            .add_service(sized!(api::snapshots::v1::snapshots_server::SnapshotsServer::new(
                snapshots::Service { snapshots: self.snapshots }
            )))
            .add_service(sized!(api::streaming::v1::streaming_server::StreamingServer::new(
                streaming::Service { streams: self.streams }
            )))
            .add_service(sized!(api::tasks::v1::tasks_server::TasksServer::new(tasks::Service {
                tasks: self.tasks
            })))
            .add_service(sized!(api::transfer::v1::transfer_server::TransferServer::new(transfer::Service {
                transfers
            })))
            .add_service(api::version::v1::version_server::VersionServer::new(version::Service))
            .serve_with_incoming_shutdown(incoming(grpc.listener), async {
                let _ = stopped.await;
            });
        let mut server = tokio::spawn(server);
        tokio::spawn(async move {
            tokio::time::sleep(HOLD).await;
            held.release();
        });

        tracing::info!(address = %self.config.grpc.path.display(), "gantryd {} serves", crate::VERSION);
        // Where systemd waits for it; nothing happens elsewhere.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

        let watchdog = tokio::spawn(feed_watchdog());
        let quiet = tokio::spawn(give_back_memory(self.metrics.begun()));
        let outcome = loop {
            tokio::select! {
                _ = terminate.recv() => break Ok(()),
                _ = interrupt.recv() => break Ok(()),
                _ = hang_up.recv() => {
                    if let Some(new) = report_reload(&self.config, (control.reload)()) {
                        *level.lock().unwrap_or_else(PoisonError::into_inner) = new.log_level;
                        collector.set(new.gc);
                    }
                }
                ended = &mut server => break Err(match ended {
                    Ok(Ok(())) => anyhow::anyhow!("the gRPC server ended by itself"),
                    Ok(Err(error)) => anyhow::Error::new(error).context("the gRPC server failed"),
                    Err(error) => anyhow::Error::new(error).context("the gRPC server failed"),
                }),
            }
        };
        watchdog.abort();
        quiet.abort();
        if outcome.is_ok() {
            tracing::info!("stopping; containers go on");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
            let _ = stop.send(());
            let _ = tokio::time::timeout(DRAIN, &mut server).await;
            server.abort();
            let _ = tokio::time::timeout(DRAIN, settled.settled()).await;
        }
        shims.abort();
        // In the middle of a collection, too: what it leaves undone is done by the next one.
        scheduler.abort();
        restart.abort();
        watching.abort();
        for socket in sockets.iter().flatten() {
            let _ = std::fs::remove_file(socket);
        }
        outcome
    }
}

/// Says what a reload came to. A file that cannot be read, or with a mistake, changes nothing.
fn report_reload(old: &Config, reloaded: anyhow::Result<Config>) -> Option<Config> {
    match reloaded {
        Ok(new) => {
            let rest = Config { log_level: old.log_level, gc: old.gc.clone(), ..new.clone() };
            tracing::info!(log_level = %new.log_level, "configuration read again");
            if rest != *old {
                tracing::warn!(
                    "settings other than the log level and those of the garbage collector have changed; they take \
                     effect at the next start"
                );
            }
            Some(new)
        }
        Err(error) => {
            tracing::error!("configuration not read again, all stays as it is: {error:#}");
            None
        }
    }
}

/// Whenever nothing was asked for a while, and now and then when calls never end, gives back what only the work before that needed:
/// docs/decisions/0013-idle-memory.md.
/// An engine that is not called does not wake up for it.
async fn give_back_memory(mut calls: watch::Receiver<()>) {
    let mut last = Instant::now();
    loop {
        calls.mark_unchanged();
        tokio::time::sleep(QUIET).await;
        if calls.has_changed().unwrap_or(false) && last.elapsed() < BUSY {
            continue;
        }
        last = Instant::now();
        let given = tokio::task::spawn_blocking(|| {
            sys::process::trim_memory();
            sys::process::unmap_program();
        });
        if given.await.is_err() || calls.changed().await.is_err() {
            return;
        }
    }
}

/// Tells systemd, where it asks for it, that the engine is alive: twice in the time it allows, and only while the
/// runtime gets to it.
async fn feed_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut interval = tokio::time::interval(limit / 2);
    loop {
        interval.tick().await;
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]) {
            tracing::warn!(%error, "cannot reach systemd's watchdog");
        }
    }
}

fn make_folders(config: &Config) -> anyhow::Result<()> {
    // The modes are containerd's: nothing in the root is for others; the state is passed through on the way to sockets.
    for (folder, mode) in [(&config.root, 0o700), (&config.state, 0o711)] {
        sys::fs::create_dir_all(folder, mode)
            .with_context(|| format!("cannot create the folder {}", folder.display()))?;
    }
    // What a client that was killed left in it is of no use to anybody.
    let traces = config.state.join(TRACES_FOLDER);
    sys::fs::remove_tree(&traces)
        .and_then(|()| sys::fs::create_dir(&traces, 0o700))
        .with_context(|| format!("cannot empty the folder {}", traces.display()))
}

/// Where shims are looked for before PATH: beside this program, and where packages put what only it runs.
fn shim_dirs() -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let Some(folder) = program.parent() else { return Vec::new() };
    vec![folder.join("../libexec/gantry"), folder.to_owned()]
}

/// What the engine has, under the names that containerd's clients look for.
fn plugins(config: &Config, content_root: &Path, snapshots: &Snapshots) -> Vec<Plugin> {
    let (content, exports) = match &config.content {
        None => ("content", vec![("root", content_root.to_owned())]),
        Some(plugin) => (plugin.name.as_str(), Vec::new()),
    };
    let mut plugins = vec![plugin("io.containerd.content.v1", content, &exports, &[])];
    for (name, root, capabilities) in snapshots.opened() {
        let exports = [("root", root.to_owned())];
        plugins.push(plugin("io.containerd.snapshotter.v1", name, &exports, capabilities));
    }
    for (name, why) in snapshots.failed() {
        plugins.push(skipped("io.containerd.snapshotter.v1", name, why));
    }
    let metadata = config.root.join(METADATA_FOLDER);
    plugins.push(plugin("io.containerd.metadata.v1", "sled", &[("root", metadata)], &[]));
    let journal = config.root.join(crate::events::FOLDER);
    plugins.push(plugin("io.containerd.event.v1", "exchange", &[("root", journal)], &[]));
    plugins.push(plugin("io.containerd.gc.v1", "scheduler", &[], &[]));
    let policies = ["no", "always", "on-failure", "unless-stopped"];
    plugins.push(plugin("io.containerd.monitor.container.v1", "restart", &[], &policies));
    plugins.push(plugin("io.containerd.sandbox.controller.v1", "shim", &[], &[]));
    let mounts = config.state.join("io.containerd.mount-manager.v1.gantry");
    plugins.push(plugin("io.containerd.mount-manager.v1", "gantry", &[("state", mounts)], &[]));
    plugins.push(plugin("io.containerd.mount-handler.v1", "loop", &[], &[]));
    for differ in &config.differ_order {
        plugins.push(plugin("io.containerd.differ.v1", differ, &[], &[]));
    }
    plugins.push(plugin("io.containerd.streaming.v1", "manager", &[], &[]));
    plugins.push(plugin("io.containerd.transfer.v1", "local", &[], &[]));
    let tasks = config.state.join("io.containerd.runtime.v2.task");
    let traces = config.state.join(TRACES_FOLDER);
    plugins.push(plugin("io.containerd.runtime.v2", "task", &[("state", tasks), ("traces", traces)], &[]));
    for service in [
        "containers",
        "content",
        "cri",
        "diff",
        "events",
        "healthcheck",
        "images",
        "introspection",
        "leases",
        "mounts",
        "namespaces",
        "sandbox-controllers",
        "sandboxes",
        "snapshots",
        "streaming",
        "tasks",
        "transfer",
        "version",
    ] {
        plugins.push(plugin("io.containerd.grpc.v1", service, &[], &[]));
    }
    plugins
}
