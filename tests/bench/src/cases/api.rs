//! What the cases over the API have in common: a connected client, and containers made by its calls.
//!
//! All of a client runs on the thread that measures, so that its processor time is counted.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use harness::client::{channel, in_namespace};
use oci::runtime::Spec;
use proto::containerd::services::containers::v1::containers_client::ContainersClient;
use proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, container::Runtime as ContainerRuntime,
};
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::services::snapshots::v1::{
    Info, Kind, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use proto::containerd::services::tasks::v1::{
    CreateTaskRequest, DeleteProcessRequest, DeleteTaskRequest, ExecProcessRequest, KillRequest,
    ListTasksRequest, StartRequest, WaitRequest,
};
use proto::containerd::types::Mount;
use proto::containerd::v1::types::Status;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use crate::peers::Engine;

/// Which snapshotter is used: the default of both.
pub(super) const SNAPSHOTTER: &str = "overlayfs";

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A runtime on which a client's calls are made.
pub(super) fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// A client of an engine that has the image of busybox.
#[derive(Clone)]
pub(super) struct Api {
    pub(super) channel: Channel,
    pub(super) namespace: String,
    /// The image's topmost snapshot.
    pub(super) top: String,
}

impl Api {
    /// Imports the image with the engine's own client, and connects.
    pub(super) async fn with_image(engine: &Engine) -> Result<Self> {
        let archive = engine.folder.join("busybox.tar");
        harness::image::busybox().write(&archive)?;
        engine.ctr(&["images", "import", archive.to_str().unwrap_or_default()])?;
        let mut api = Self::connect(engine).await;
        api.top = api.topmost().await?;
        Ok(api)
    }

    /// Connects to an engine that need not have anything.
    pub(super) async fn connect(engine: &Engine) -> Self {
        let channel = channel(&engine.address()).await;
        Api { channel, namespace: engine.namespace.clone(), top: String::new() }
    }

    /// The same, by another connection.
    pub(super) async fn again(&self, engine: &Engine) -> Self {
        Api { channel: channel(&engine.address()).await, ..self.clone() }
    }

    pub(super) fn request<T>(&self, message: T) -> tonic::Request<T> {
        in_namespace(&self.namespace, message)
    }

    pub(super) fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    pub(super) fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// The committed snapshot on which no other stands.
    async fn topmost(&self) -> Result<String> {
        let request = ListSnapshotsRequest { snapshotter: SNAPSHOTTER.into(), filters: Vec::new() };
        let mut list = self.snapshots().list(self.request(request)).await?.into_inner();
        let mut all: Vec<Info> = Vec::new();
        while let Some(part) = list.message().await? {
            all.extend(part.info);
        }
        let stands_on = |name: &str| all.iter().any(|info| info.parent == name);
        let found = all.iter().find(|info| info.kind == Kind::Committed as i32 && !stands_on(&info.name));
        Ok(found.context("the image was not unpacked")?.name.clone())
    }

    /// Prepares a container's snapshot; its mounts.
    pub(super) async fn prepare(&self, key: &str) -> Result<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.into(),
            key: key.to_owned(),
            parent: self.top.clone(),
            // No lease holds it until its container is recorded, and collections run meanwhile.
            labels: [("containerd.io/gc.root".to_owned(), "bench".to_owned())].into(),
        };
        Ok(self.snapshots().prepare(self.request(request)).await?.into_inner().mounts)
    }

    /// Makes a container that sleeps; the mounts of its root file system.
    pub(super) async fn container(&self, id: &str) -> Result<Vec<Mount>> {
        let mounts = self.prepare(id).await?;
        let mut spec = Spec::linux(&self.namespace, id);
        spec.allow_default_devices().set_args(&["/bin/sleep", "1000000"].map(str::to_owned));
        let container = Container {
            id: id.to_owned(),
            image: harness::image::NAME.into(),
            runtime: Some(ContainerRuntime { name: "io.containerd.runc.v2".into(), options: None }),
            spec: Some(proto::any::wrap(proto::any::SPEC, serde_json::to_vec(&spec)?)),
            snapshotter: SNAPSHOTTER.into(),
            snapshot_key: id.to_owned(),
            ..Container::default()
        };
        let request = CreateContainerRequest { container: Some(container) };
        ContainersClient::new(self.channel.clone()).create(self.request(request)).await?;
        Ok(mounts)
    }

    /// Creates a container's task, without streams, and starts it.
    pub(super) async fn start(&self, id: &str, rootfs: Vec<Mount>) -> Result<()> {
        let request =
            CreateTaskRequest { container_id: id.to_owned(), rootfs, ..CreateTaskRequest::default() };
        self.tasks().create(self.request(request)).await?;
        let request = StartRequest { container_id: id.to_owned(), exec_id: String::new() };
        self.tasks().start(self.request(request)).await?;
        Ok(())
    }

    /// Kills a container's process, waits for its end and deletes the task.
    pub(super) async fn end(&self, id: &str) -> Result<()> {
        let request = WaitRequest { container_id: id.to_owned(), exec_id: String::new() };
        let (mut tasks, request) = (self.tasks(), self.request(request));
        let waiting = tokio::spawn(async move { tasks.wait(request).await });
        let kill = KillRequest { container_id: id.to_owned(), signal: 9, ..KillRequest::default() };
        self.tasks().kill(self.request(kill)).await?;
        tokio::time::timeout(LIMIT, waiting).await.context("a killed process does not end")???;
        let request = DeleteTaskRequest { container_id: id.to_owned() };
        self.tasks().delete(self.request(request)).await?;
        Ok(())
    }

    /// Removes a container and its snapshot.
    pub(super) async fn remove(&self, id: &str) -> Result<()> {
        let request = DeleteContainerRequest { id: id.to_owned() };
        ContainersClient::new(self.channel.clone()).delete(self.request(request)).await?;
        let request = RemoveSnapshotRequest { snapshotter: SNAPSHOTTER.into(), key: id.to_owned() };
        self.snapshots().remove(self.request(request)).await?;
        Ok(())
    }

    /// All of it: a container, and its task, which runs.
    pub(super) async fn run(&self, id: &str) -> Result<()> {
        let mounts = self.container(id).await?;
        self.start(id, mounts).await
    }

    /// How many tasks are listed as running.
    pub(super) async fn running(&self) -> Result<usize> {
        let tasks = self.tasks().list(self.request(ListTasksRequest::default())).await?.into_inner().tasks;
        Ok(tasks.iter().filter(|task| task.status == Status::Running as i32).count())
    }

    /// Runs `true` in a container.
    pub(super) async fn exec(&self, id: &str, exec_id: &str) -> Result<()> {
        let process = serde_json::json!({
            "args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
        });
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            spec: Some(proto::any::wrap(
                "types.containerd.io/opencontainers/runtime-spec/1/Process",
                serde_json::to_vec(&process)?,
            )),
            ..ExecProcessRequest::default()
        };
        self.tasks().exec(self.request(request)).await?;
        let (container_id, exec_id) = (id.to_owned(), exec_id.to_owned());
        let request = WaitRequest { container_id: container_id.clone(), exec_id: exec_id.clone() };
        let (mut tasks, request) = (self.tasks(), self.request(request));
        let waiting = tokio::spawn(async move { tasks.wait(request).await });
        let request = StartRequest { container_id: container_id.clone(), exec_id: exec_id.clone() };
        self.tasks().start(self.request(request)).await?;
        let ended = tokio::time::timeout(LIMIT, waiting).await.context("an exec does not end")???;
        let request = DeleteProcessRequest { container_id, exec_id };
        self.tasks().delete_process(self.request(request)).await?;
        match ended.into_inner().exit_status {
            0 => Ok(()),
            code => bail!("`true` ended with {code}"),
        }
    }
}
