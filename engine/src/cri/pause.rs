//! Pods that a pause container holds: where an image for it is configured, or the handler's shim has no sandboxes.
//!
//! The container has its pod's id, so that the shim is found by the group of the pod's containers, and everything of it is taken
//! down by that id.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use oci::user::Accounts;
use proto::containerd::services::containers::v1::{Container as Record, container::Runtime as RuntimeOf};
use proto::containerd::services::tasks::v1::CreateTaskRequest;
use proto::containerd::v1::types::Status;
use proto::runtime::v1::{ImageSpec, PodSandboxConfig};
use snapshotter::Kind;

use super::containers::as_message;
use super::pods::{labels, namespaces_of};
use super::runtime::{Runtime, context, gone_is_fine, now};
use super::settings::Handler;
use super::spec;
use super::store::Pod;
use crate::error::{Error, Result, blocking};
use crate::snapshots::New;

impl Runtime {
    /// Makes and starts a pod's pause container: its pid, what the pod's containers join, the image.
    pub(super) async fn make_pause(
        &self,
        pod: &Arc<Pod>,
        handler: &Handler,
        config: &PodSandboxConfig,
        image: String,
    ) -> Result<(u32, BTreeMap<String, String>, String)> {
        let (context, record, id) = (context()?, pod.record(), pod.id.as_str());
        let found = match self.parts.images.local(&image).await? {
            Some(found) => found,
            None => {
                let runtime_handler = record.handler.clone();
                let wanted = ImageSpec { image: image.clone(), runtime_handler, ..ImageSpec::default() };
                let pulled = self.parts.images.pull(Some(wanted), None, None).await;
                let pulled = pulled.map_err(|error| error.context("pull the sandbox image"))?;
                self.image(&pulled).await?
            }
        };
        let users = spec::Users::of_pod(config)?;
        let held = [("containerd.io/gc.root".to_owned(), now().to_string())];
        let snapshot = New {
            key: id.to_owned(),
            parent: found.chain.as_ref().map(ToString::to_string).unwrap_or_default(),
            labels: held.into_iter().chain(users.iter().flat_map(spec::Users::labels)).collect(),
            kind: Kind::Active,
        };
        let mounts = self.snapshot(&context, &handler.snapshotter, snapshot, &found.id).await?;
        let accounts = self.accounts_of(&found, &mounts).await?;
        let options = self.spec_options(&record.handler).await?;
        let mut options = spec::Options::clone(&options);
        options.sandbox_image.clone_from(&image);
        let (files, seccomp) = {
            let (this, config, options, folder) =
                (self.clone(), config.clone(), options.clone(), self.places.pod(id));
            blocking(move || {
                let profile = spec::Facts::seccomp_profile(&config, &this.host, &options)?;
                Ok((spec::SandboxFiles::find(&folder), profile))
            })
            .await?
        };
        let userns = users.map(|_| self.places.userns(id));
        let wanted = spec::WantedPod {
            id,
            config,
            netns: Some(Path::new(&record.netns)).filter(|path| !path.as_os_str().is_empty()),
            userns: userns.as_deref(),
            files: &files,
            host: &self.host,
            options: &options,
            seccomp: seccomp.as_ref(),
        };
        let accounts = Accounts { passwd: accounts.0.as_bytes(), group: accounts.1.as_bytes() };
        let spec = spec::pause(&wanted, &found.defaults, accounts)?;
        let container = Record {
            id: id.to_owned(),
            labels: labels(&config.labels, "sandbox"),
            image: found.name.clone(),
            runtime: Some(RuntimeOf { name: handler.runtime.clone(), options: handler.options.clone() }),
            spec: Some(proto::any::wrap(proto::any::SPEC, spec::encode(&spec)?)),
            snapshotter: handler.snapshotter.clone(),
            snapshot_key: id.to_owned(),
            ..Record::default()
        };
        self.parts.containers.create(&context, container).await?;
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: mounts.into_iter().map(as_message).collect(),
            options: handler.options.clone(),
            ..CreateTaskRequest::default()
        };
        let pid = self.parts.tasks.create(&context, request).await?;
        self.parts.tasks.start(&context, id, "").await?;
        let mut namespaces = namespaces_of(pid, config);
        namespaces.extend(self.made_before(pod, config)?);
        Ok((pid, namespaces, image))
    }

    /// Ends a pod's pause container, if it has one.
    pub(super) async fn end_pause(&self, pod: &Arc<Pod>) -> Result<()> {
        let (context, id) = (context()?, pod.id.as_str());
        let snapshotter = match self.parts.containers.get(&context, id) {
            Ok(container) => container.snapshotter,
            // It may not have come so far.
            Err(Error::NotFound(_)) => match self.handler(&pod.record().handler) {
                Ok((_, handler)) => handler.snapshotter.clone(),
                Err(_) => return Ok(()),
            },
            Err(error) => return Err(error),
        };
        self.end_task(id).await?;
        gone_is_fine(self.parts.containers.delete(&context, id.to_owned()).await)?;
        gone_is_fine(self.parts.snapshots.remove(&context, &snapshotter, id.to_owned()).await)
    }

    /// Whether a pod's pause container runs.
    pub(super) async fn is_pause_alive(&self, pod: &Arc<Pod>) -> Result<bool> {
        match self.parts.tasks.get(&context()?, &pod.id, "").await {
            Ok(process) => Ok(matches!(process.status(), Status::Running | Status::Paused | Status::Pausing)),
            Err(Error::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
