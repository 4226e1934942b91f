//! Checkpoints as images, in the form of containerd's clients: an index that names what a container was.
//!
//! ```text
//!  index     annotations: the name of its image, its runtime, its snapshotter
//!    runtime.options      of its runtime, as an Any
//!    the image            if wanted, and a layer with what the container changed
//!    criu.checkpoint      its processes, if wanted                             \ these two are the engine's
//!    checkpoint.config    its spec, as an Any: without it none can be restored /
//!    checkpoint.options   how its processes were saved, as an Any
//! ```
//!
//! Invariants: a lease holds all of it until it has a name; from then on the index's labels do. A task that runs stands still
//! while its checkpoint is made, and goes on whatever comes of that. A restored container that cannot be made is not there.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use oci::image::{CONFIG_LIMIT, Descriptor, Index, MANIFEST_LIMIT, media_type};
use oci::platform::Matcher;
use oci::{Digest, Platform};
use prost::Message as _;
use prost_types::Any;
use proto::any;
use proto::containerd::runc::v1::CheckpointOptions;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::containers::v1::container::Runtime;
use proto::containerd::services::diff::v1::{ApplyRequest, DiffRequest};
use proto::containerd::services::images::v1::{CreateImageRequest, Image};
use proto::containerd::services::snapshots::v1::PrepareSnapshotRequest;
use proto::containerd::services::tasks::v1::{
    CheckpointTaskRequest, GetRequest, PauseTaskRequest, ResumeTaskRequest,
};
use proto::containerd::v1::types::Status;
use tokio::runtime::Handle;
use tonic::Code;

use crate::client::{Client, Failure, Tried};
use crate::lease::{Interruption, unique};
use crate::progress::Progress;
use crate::{container, content, difference, image, unpack};

const STATE: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
const CONFIG: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";
const OPTIONS: &str = "application/vnd.containerd.container.checkpoint.options.v1+proto";
const RUNTIME_OPTIONS: &str = "application/vnd.containerd.container.checkpoint.runtime.options+proto";

const IMAGE_NAME: &str = "org.opencontainers.image.ref.name";
const RUNTIME_NAME: &str = "io.containerd.checkpoint.runtime";
const SNAPSHOTTER_NAME: &str = "io.containerd.checkpoint.snapshotter";

/// What of a container is saved, besides its spec.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub(crate) image: bool,
    /// What it changed of its image's files.
    pub(crate) rw: bool,
    /// Its processes, in this way.
    pub(crate) task: Option<CheckpointOptions>,
}

/// What its image is to be.
#[derive(Debug, Default)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// Beside those that say what is needed to restore it.
    pub(crate) annotations: BTreeMap<String, String>,
}

/// Does `work` while the task of a container stands still, if it runs; `ends` says that the work ends the task.
pub(crate) async fn while_paused<T>(
    client: &Client,
    id: &str,
    ends: bool,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    // From here on a signal does not end ctr before the task goes on.
    let _signals = Interruption::listen()?;
    if status(client, id).await? != Some(Status::Running) {
        return work.await;
    }
    let pause = PauseTaskRequest { container_id: id.to_owned() };
    let mut paused = Paused(Some((client, id)));
    client.tasks().pause(pause).await.tried(|| format!("pause task {id}"))?;
    let done = work.await;
    paused.0 = None;
    if ends && done.is_ok() {
        return done;
    }
    match (done, resume(client, id).await) {
        (done, Ok(())) => done,
        (Ok(_), Err(error)) => Err(error),
        (Err(first), Err(error)) => {
            eprintln!("ctr: {error:#}");
            Err(first)
        }
    }
}

/// A task that goes on when this is dropped, as it is when a `--timeout` is over.
struct Paused<'a>(Option<(&'a Client, &'a str)>);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let Some((client, id)) = self.0 else { return };
        let resumed = tokio::task::block_in_place(|| Handle::current().block_on(resume(client, id)));
        if let Err(error) = resumed {
            eprintln!("ctr: {error:#}");
        }
    }
}

/// Lets a task go on, if it is there and paused.
async fn resume(client: &Client, id: &str) -> anyhow::Result<()> {
    if status(client, id).await? != Some(Status::Paused) {
        return Ok(());
    }
    let request = ResumeTaskRequest { container_id: id.to_owned() };
    client.tasks().resume(request).await.map(drop).map_err(|status| {
        let remedy = format!("it stands still until `ctr tasks resume {id}`");
        Failure::new(format!("resume task {id}"), status).with_remedy(remedy).into()
    })
}

/// How a container's task is; None where there is none.
async fn status(client: &Client, id: &str) -> anyhow::Result<Option<Status>> {
    let request = GetRequest { container_id: id.to_owned(), exec_id: String::new() };
    match client.tasks().get(request).await {
        Ok(answer) => Ok(answer.into_inner().process.map(|process| process.status())),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(Failure::new(format!("look up the task of {id}"), status).into()),
    }
}

/// Saves a container, and gives that a name. To be called under a lease, with the task standing still.
pub(crate) async fn make(
    client: &Client,
    container: &Container,
    parts: Parts,
    named: Named,
) -> anyhow::Result<()> {
    let id = &container.id;
    let runtime = container.runtime.clone().unwrap_or_default();
    let mut manifests = Vec::new();
    if let Some(options) = &runtime.options {
        manifests.push(blob(client, RUNTIME_OPTIONS, options.encode_to_vec()).await?);
    }
    if parts.image {
        manifests.push(image::target(&image::get(client, &container.image).await?)?);
    }
    if parts.rw {
        ensure!(!container.snapshot_key.is_empty(), "container {id} has no snapshot that could be saved");
        let request = DiffRequest {
            media_type: media_type::OCI_LAYER_GZIP.to_owned(),
            r#ref: unique(&format!("checkpoint-rw-{}", container.snapshot_key)),
            ..DiffRequest::default()
        };
        let key = &container.snapshot_key;
        let layer = difference::compare(client, &container.snapshotter, None, key, request).await?;
        manifests.push(placed(image::descriptor(&layer).context("the saved layer has no usable name")?));
    }
    match parts.task {
        Some(options) => {
            let options = any::pack(&options);
            let request = CheckpointTaskRequest {
                container_id: id.clone(),
                options: Some(options.clone()),
                ..CheckpointTaskRequest::default()
            };
            let saved = client.tasks().checkpoint(request).await.tried(|| format!("checkpoint task {id}"))?;
            for saved in &saved.descriptors {
                let saved = image::descriptor(saved).context("the saved task has no usable name")?;
                manifests.push(placed(saved));
            }
            manifests.push(blob(client, OPTIONS, options.encode_to_vec()).await?);
        }
        None => {
            let spec = container.spec.clone().unwrap_or_default();
            manifests.push(blob(client, CONFIG, spec.encode_to_vec()).await?);
        }
    }
    let mut annotations = named.annotations;
    let needed = [
        (IMAGE_NAME, &container.image),
        (RUNTIME_NAME, &runtime.name),
        (SNAPSHOTTER_NAME, &container.snapshotter),
    ];
    annotations.extend(needed.map(|(key, value)| (key.to_owned(), value.clone())));
    annotations.retain(|_, value| !value.is_empty());
    let refers = |(number, blob): (usize, &Descriptor)| {
        (format!("containerd.io/gc.ref.content.{number}"), blob.digest.to_string())
    };
    let labels = manifests.iter().enumerate().map(refers).collect();
    let media_type = Some(media_type::OCI_INDEX.to_owned());
    let index = serde_json::to_vec(&Index { schema_version: 2, media_type, manifests, annotations })?;
    let target = Descriptor::of(media_type::OCI_INDEX, &index);
    content::write_bytes(client, index, labels).await?;
    let name = named.name;
    let image = Image {
        name: name.clone(),
        labels: named.labels,
        target: Some(image::wire(&target)),
        ..Image::default()
    };
    let request = CreateImageRequest { image: Some(image), ..CreateImageRequest::default() };
    client.images().create(request).await.tried(|| format!("name the checkpoint {name}"))?;
    Ok(())
}

/// Stores bytes as a part of a checkpoint.
async fn blob(client: &Client, media_type: &str, bytes: Vec<u8>) -> anyhow::Result<Descriptor> {
    let descriptor = Descriptor::of(media_type, &bytes);
    content::write_bytes(client, bytes, BTreeMap::new()).await?;
    Ok(placed(descriptor))
}

/// For this machine's platform, which is how clients that walk an index know that they want it.
fn placed(descriptor: Descriptor) -> Descriptor {
    Descriptor { platform: Some(Platform::host()), ..descriptor }
}

/// A checkpoint that is there.
pub(crate) struct Checkpoint {
    name: String,
    index: Index,
}

impl Checkpoint {
    /// Reads what the image of this name says that it has.
    pub(crate) async fn read(client: &Client, name: &str) -> anyhow::Result<Checkpoint> {
        let target = image::target(&image::get(client, name).await?)?;
        let bytes = content::read(client, &target.digest, MANIFEST_LIMIT).await?;
        let index = Index::parse(&bytes).with_context(|| format!("{name} is no checkpoint"))?;
        Ok(Checkpoint { name: name.to_owned(), index })
    }

    /// The processes.
    pub(crate) fn state(&self) -> anyhow::Result<&Descriptor> {
        self.part(STATE).with_context(|| {
            format!("checkpoint {} has no processes; restore it without --live, which starts anew", self.name)
        })
    }

    fn part(&self, media_type: &str) -> Option<&Descriptor> {
        self.index.manifests.iter().find(|part| part.media_type == media_type)
    }

    fn annotation(&self, key: &str) -> anyhow::Result<&str> {
        let value = self.index.annotations.get(key).filter(|value| !value.is_empty());
        let value = value.with_context(|| {
            format!("{} is no checkpoint of a container from an image: its index has no {key}", self.name)
        })?;
        Ok(value)
    }

    async fn any(&self, client: &Client, digest: &Digest) -> anyhow::Result<Any> {
        let bytes = content::read(client, digest, CONFIG_LIMIT).await?;
        Any::decode(&bytes[..])
            .with_context(|| format!("{digest} of checkpoint {} cannot be decoded", self.name))
    }

    /// Makes the container `id` as the checkpoint has it; with `rw`, also its files. To be called under a lease.
    pub(crate) async fn container(&self, client: &Client, id: &str, rw: bool) -> anyhow::Result<Container> {
        let snapshotter = self.annotation(SNAPSHOTTER_NAME)?.to_owned();
        let Some(spec) = self.part(CONFIG) else {
            bail!("checkpoint {} has no spec, without which nothing can be restored", self.name)
        };
        let options = match self.part(RUNTIME_OPTIONS) {
            Some(options) => Some(self.any(client, &options.digest).await?),
            None => None,
        };
        let layer = self.index.manifests.iter().find(|part| media_type::is_layer(&part.media_type));
        ensure!(!rw || layer.is_some(), "checkpoint {} has no files; it was made without --rw", self.name);
        let image = image::get(client, self.annotation(IMAGE_NAME)?).await?;
        let container = Container {
            id: id.to_owned(),
            image: image.name.clone(),
            runtime: Some(Runtime { name: self.annotation(RUNTIME_NAME)?.to_owned(), options }),
            spec: Some(self.any(client, &spec.digest).await?),
            snapshotter: snapshotter.clone(),
            snapshot_key: id.to_owned(),
            ..Container::default()
        };
        let platform = Platform::host();
        let matcher = Matcher::only(&platform);
        let resolved = image::resolve(client, &image::target(&image)?, &matcher, &platform).await?;
        let parent = unpack::unpack(client, &resolved, &snapshotter, false, &Progress::new()).await?;
        let prepare = PrepareSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: id.to_owned(),
            parent,
            ..PrepareSnapshotRequest::default()
        };
        let prepared =
            client.snapshots().prepare(prepare).await.tried(|| format!("prepare snapshot {id}"))?;
        let made = async {
            if let Some(layer) = layer.filter(|_| rw) {
                let diff = Some(image::wire(layer));
                let request = ApplyRequest { diff, mounts: prepared.mounts, ..ApplyRequest::default() };
                client.diff().apply(request).await.tried(|| format!("apply layer {}", layer.digest))?;
            }
            container::put(client, container).await
        }
        .await;
        if made.is_err() {
            container::remove_snapshot(client, &snapshotter, id).await?;
        }
        made
    }
}
