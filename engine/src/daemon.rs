//! The engine, wired by hand from top to bottom: each part is built from those above it, and the compiler checks that.
//!
//! ```text
//! build:  folders -> metadata -> events -> content, snapshots, diff, tasks -> sockets
//! run:    shims may publish -> tasks restored -> clients served -> told to stop -> drained -> sockets removed
//! ```
//!
//! Containers do not notice the end of the engine: their shims carry on, and the next start finds them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use proto::containerd::services as api;
use proto::containerd::services::introspection::v1::Plugin;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::api::{
    containers, content, diff, events, gc, images, introspection, leases, namespaces, sandboxes, shim_events,
    snapshots, tasks, version,
};
use crate::config::Config;
use crate::containers::Containers;
use crate::content::Content;
use crate::diff::Diff;
use crate::events::Exchange;
use crate::gc::{Gc, Scheduler};
use crate::images::Images;
use crate::introspection::{Introspection, plugin, skipped};
use crate::leases::Leases;
use crate::metadata::Metadata;
use crate::metrics::Metrics;
use crate::namespaces::Namespaces;
use crate::restart::Restart;
use crate::sandboxes::Sandboxes;
use crate::serving::{self, Observe};
use crate::snapshots::Snapshots;
use crate::tasks::{Tasks, TasksOptions};

/// The folder of the metadata beneath the root.
pub const METADATA_FOLDER: &str = "metadata";
/// How long calls in flight may take after the engine was told to stop. Waits and subscriptions do not end by
/// themselves, and what a mutation has begun goes on without its caller.
const DRAIN: Duration = Duration::from_secs(2);
/// How long subscribers of an earlier engine have to come back for what happened while they could not listen.
const HOLD: Duration = Duration::from_secs(10);
/// The most streams that one client may have open on one connection.
const STREAMS_MAX: u32 = 4096;

/// The engine, built and listening, not yet serving.
pub struct Daemon {
    config: Config,
    grpc: UnixListener,
    ttrpc: UnixListener,
    metrics: Metrics,
    events: Exchange,
    containers: Containers,
    content: Content,
    diff: Diff,
    gc: Gc,
    images: Images,
    introspection: Introspection,
    leases: Leases,
    namespaces: Namespaces,
    restart: Restart,
    sandboxes: Sandboxes,
    scheduler: Scheduler,
    snapshots: Snapshots,
    tasks: Tasks,
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
            .ok();
        let opened = config.clone();
        // Opening reads and syncs: not on the reactor.
        tokio::task::spawn_blocking(move || {
            let metadata = Metadata::open(&opened.root.join(METADATA_FOLDER))?;
            // Only now: the lock on the metadata says that no other engine serves this root.
            let events = Exchange::default();
            events.hold();
            let content_root = opened.root.join("io.containerd.content.v1.content");
            let content = Content::open(&content_root, metadata.clone(), events.clone())?;
            let snapshots = Snapshots::open(&opened.root, metadata.clone(), events.clone())?;
            let diff = Diff::open(content.clone(), opened.root.join("mounts"))?;
            let tasks = Tasks::open(
                TasksOptions {
                    root: opened.root.clone(),
                    state: opened.state.clone(),
                    grpc_address: opened.grpc.path.clone(),
                    ttrpc_address: opened.ttrpc.path.clone(),
                    shim_dirs: shim_dirs(),
                    descriptors,
                },
                metadata.clone(),
                events.clone(),
            )?;
            let introspection =
                Introspection::open(&opened.root, plugins(&opened, &content_root, &snapshots))?;
            Ok::<_, anyhow::Error>((metadata, events, content, snapshots, diff, tasks, introspection))
        })
        .await?
        .and_then(|(metadata, events, content, snapshots, diff, tasks, introspection)| {
            let (gc, scheduler) = Gc::new(
                config.gc.clone(),
                metadata.clone(),
                events.clone(),
                content.clone(),
                snapshots.clone(),
            );
            let containers = Containers::new(metadata.clone(), events.clone());
            let restart = Restart::new(
                metadata.clone(),
                events.clone(),
                containers.clone(),
                snapshots.clone(),
                tasks.clone(),
            );
            Ok(Daemon {
                config: config.clone(),
                grpc: serving::bind(&config.grpc)?,
                ttrpc: serving::bind(&config.ttrpc)?,
                metrics: Metrics::default(),
                containers,
                images: Images::new(metadata.clone(), events.clone()),
                leases: Leases::new(metadata.clone()),
                sandboxes: Sandboxes::new(metadata.clone()),
                namespaces: Namespaces::new(metadata, events.clone()),
                events,
                content,
                diff,
                gc,
                introspection,
                restart,
                scheduler,
                snapshots,
                tasks,
            })
        })
    }

    /// Serves until SIGTERM or SIGINT. At SIGHUP it calls `reload`, which reads the configuration again and applies what can
    /// change while the engine runs.
    pub async fn run(self, reload: &dyn Fn() -> anyhow::Result<Config>) -> anyhow::Result<()> {
        let mut hang_up = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
        let sockets = [self.config.grpc.path.clone(), self.config.ttrpc.path.clone()];

        let shims = tokio::spawn(shim_events::serve(self.ttrpc, self.tasks.clone()));
        // Before clients are served, so that none sees a container whose task is not there yet.
        self.tasks.restore().await;
        let scheduler = tokio::spawn(self.scheduler.run());
        let restart = tokio::spawn(self.restart.run());
        if let Some(address) = self.config.metrics {
            serve_metrics(address, self.metrics.clone()).await?;
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
        let held = self.events.clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = Server::builder()
            .layer(Observe(self.metrics.clone()))
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
            .add_service(sized!(api::diff::v1::diff_server::DiffServer::new(diff::Service {
                diff: self.diff
            })))
            .add_service(sized!(api::events::v1::events_server::EventsServer::new(events::Service {
                events: self.events,
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
            .add_service(sized!(proto::gantry::gc::v1::gc_server::GcServer::new(gc::Service { gc: self.gc })))
            .add_service(sized!(api::namespaces::v1::namespaces_server::NamespacesServer::new(
                namespaces::Service { namespaces: self.namespaces }
            )))
            .add_service(sized!(api::sandbox::v1::store_server::StoreServer::new(sandboxes::Store {
                sandboxes: self.sandboxes
            })))
            .add_service(sized!(api::snapshots::v1::snapshots_server::SnapshotsServer::new(
                snapshots::Service { snapshots: self.snapshots }
            )))
            .add_service(sized!(api::tasks::v1::tasks_server::TasksServer::new(tasks::Service {
                tasks: self.tasks
            })))
            .add_service(api::version::v1::version_server::VersionServer::new(version::Service))
            .serve_with_incoming_shutdown(UnixListenerStream::new(self.grpc), async {
                let _ = stopped.await;
            });
        let mut server = tokio::spawn(server);
        tokio::spawn(async move {
            tokio::time::sleep(HOLD).await;
            held.release();
        });

        tracing::info!(address = %sockets[0].display(), "gantryd {} serves", crate::VERSION);
        // Where systemd waits for it; nothing happens elsewhere.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

        let watchdog = tokio::spawn(feed_watchdog());
        let outcome = loop {
            tokio::select! {
                _ = terminate.recv() => break Ok(()),
                _ = interrupt.recv() => break Ok(()),
                _ = hang_up.recv() => report_reload(&self.config, reload()),
                ended = &mut server => break Err(match ended {
                    Ok(Ok(())) => anyhow::anyhow!("the gRPC server ended by itself"),
                    Ok(Err(error)) => anyhow::Error::new(error).context("the gRPC server failed"),
                    Err(error) => anyhow::Error::new(error).context("the gRPC server failed"),
                }),
            }
        };
        watchdog.abort();
        if outcome.is_ok() {
            tracing::info!("stopping; containers go on");
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
            let _ = stop.send(());
            let _ = tokio::time::timeout(DRAIN, &mut server).await;
            server.abort();
        }
        shims.abort();
        // In the middle of a collection, too: what it leaves undone is done by the next one.
        scheduler.abort();
        restart.abort();
        for socket in &sockets {
            let _ = std::fs::remove_file(socket);
        }
        outcome
    }
}

/// Says what a reload came to. A file that cannot be read, or with a mistake, changes nothing.
fn report_reload(old: &Config, reloaded: anyhow::Result<Config>) {
    match reloaded {
        Ok(new) => {
            let rest = Config { log_level: old.log_level, ..new.clone() };
            tracing::info!(log_level = %new.log_level, "configuration read again");
            if rest != *old {
                tracing::warn!(
                    "settings other than the log level have changed; they take effect at the next start"
                );
            }
        }
        Err(error) => tracing::error!("configuration not read again, all stays as it is: {error:#}"),
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
    Ok(())
}

/// Where shims are looked for before PATH: beside this program, and where packages put what only it runs.
fn shim_dirs() -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let Some(folder) = program.parent() else { return Vec::new() };
    vec![folder.join("../libexec/gantry"), folder.to_owned()]
}

/// What the engine has, under the names that containerd's clients look for.
fn plugins(config: &Config, content_root: &Path, snapshots: &Snapshots) -> Vec<Plugin> {
    let mut plugins =
        vec![plugin("io.containerd.content.v1", "content", &[("root", content_root.to_owned())], &[])];
    for (name, root) in snapshots.roots() {
        plugins.push(plugin("io.containerd.snapshotter.v1", name, &[("root", root.to_owned())], &[]));
    }
    for (name, why) in snapshots.failed() {
        plugins.push(skipped("io.containerd.snapshotter.v1", name, why));
    }
    let metadata = config.root.join(METADATA_FOLDER);
    plugins.push(plugin("io.containerd.metadata.v1", "sled", &[("root", metadata)], &[]));
    plugins.push(plugin("io.containerd.event.v1", "exchange", &[], &[]));
    plugins.push(plugin("io.containerd.gc.v1", "scheduler", &[], &[]));
    let policies = ["no", "always", "on-failure", "unless-stopped"];
    plugins.push(plugin("io.containerd.monitor.container.v1", "restart", &[], &policies));
    plugins.push(plugin("io.containerd.differ.v1", "walking", &[], &[]));
    let tasks = config.state.join("io.containerd.runtime.v2.task");
    plugins.push(plugin("io.containerd.runtime.v2", "task", &[("state", tasks)], &[]));
    for service in [
        "containers",
        "content",
        "diff",
        "events",
        "healthcheck",
        "images",
        "introspection",
        "leases",
        "namespaces",
        "sandboxes",
        "snapshots",
        "tasks",
        "version",
    ] {
        plugins.push(plugin("io.containerd.grpc.v1", service, &[], &[]));
    }
    plugins
}

async fn serve_metrics(address: std::net::SocketAddr, metrics: Metrics) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address} for metrics (metrics.address in the configuration)")
    })?;
    let answer = move || {
        let text = metrics.text();
        async move {
            (
                [(http::header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")],
                text,
            )
        }
    };
    let router = axum::Router::new().route("/v1/metrics", axum::routing::get(answer));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "metrics are no longer served");
        }
    });
    Ok(())
}
