//! Blobs: reading them with a limit, and writing them in chunks with their digest checked on the way.

use std::collections::BTreeMap;
use std::io::Read;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use oci::Digest;
use oci::image::Descriptor;
use proto::containerd::services::content::v1::{
    AbortRequest, Info, InfoRequest, ListContentRequest, ReadContentRequest, ReadContentResponse,
    UpdateRequest, WriteAction, WriteContentRequest,
};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::client::{Client, Failure, Tried};
use crate::lease::unique;

/// How much one message of a write carries. Engines take 4 MiB at least.
pub(crate) const CHUNK: usize = 1 << 20;
/// How long the engine may take to end a write that was given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reads a whole blob of at most `limit` bytes, and checks its digest.
pub(crate) async fn read(client: &Client, digest: &Digest, limit: u64) -> anyhow::Result<Vec<u8>> {
    let request = ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 };
    let mut stream = client.content().read(request).await.tried(|| format!("read content {digest}"))?;
    let mut bytes = Vec::new();
    while let Some(part) =
        stream.message().await.map_err(|status| Failure::new(format!("read content {digest}"), status))?
    {
        ensure!(
            (bytes.len() + part.data.len()) as u64 <= limit,
            "content {digest} is larger than the limit of {limit} bytes for its kind"
        );
        bytes.extend_from_slice(&part.data);
    }
    let mut hasher = digest.algorithm().hasher();
    hasher.update(&bytes);
    let found = hasher.finish();
    ensure!(found == *digest, "content {digest} is damaged in the store: its bytes have digest {found}");
    Ok(bytes)
}

/// What the store knows of a blob, or `None`.
pub(crate) async fn info(client: &Client, digest: &Digest) -> anyhow::Result<Option<Info>> {
    match client.content().info(InfoRequest { digest: digest.to_string() }).await {
        Ok(response) => Ok(Some(response.into_inner().info.unwrap_or_default())),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(Failure::new(format!("look up content {digest}"), status).into()),
    }
}

/// What the store knows of all blobs that match a filter.
pub(crate) async fn list(client: &Client, filters: Vec<String>) -> anyhow::Result<Vec<Info>> {
    let mut stream = client.content().list(ListContentRequest { filters }).await.tried(|| "list content")?;
    let mut blobs = Vec::new();
    while let Some(part) = stream.message().await.map_err(|status| Failure::new("list content", status))? {
        blobs.extend(part.info);
    }
    Ok(blobs)
}

/// Copies a blob to stdout.
pub(crate) async fn to_stdout(client: &Client, digest: &str) -> anyhow::Result<()> {
    use std::io::Write;
    let what = || format!("read content {digest}");
    let request = ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 };
    let mut stream = client.content().read(request).await.tried(what)?;
    while let Some(part) = stream.message().await.map_err(|status| Failure::new(what(), status))? {
        std::io::stdout().write_all(&part.data)?;
    }
    std::io::stdout().flush()?;
    Ok(())
}

/// Sets labels of a blob, leaving others as they are.
pub(crate) async fn set_labels(
    client: &Client,
    digest: &Digest,
    labels: BTreeMap<String, String>,
) -> anyhow::Result<BTreeMap<String, String>> {
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let request = UpdateRequest {
        info: Some(Info { digest: digest.to_string(), labels, ..Info::default() }),
        update_mask: Some(prost_types::FieldMask { paths }),
    };
    let updated = client.content().update(request).await.tried(|| format!("label content {digest}"))?;
    Ok(updated.info.unwrap_or_default().labels)
}

/// Takes the labels off a blob by which it keeps layers; their names.
pub(crate) async fn release_layers(client: &Client, digest: &Digest) -> anyhow::Result<Vec<String>> {
    let labels = info(client, digest).await?.unwrap_or_default().labels;
    let keeping: Vec<String> = labels.into_keys().filter(|key| keeps_layer(key)).collect();
    if !keeping.is_empty() {
        let cleared = keeping.iter().map(|key| (key.clone(), String::new())).collect();
        set_labels(client, digest, cleared).await?;
    }
    Ok(keeping)
}

/// Whether a label of this key keeps a layer: `l.N`, and the bare numbers of before (0 was the config).
pub(crate) fn keeps_layer(key: &str) -> bool {
    let Some(rest) = key.strip_prefix("containerd.io/gc.ref.content.") else { return false };
    rest.starts_with("l.")
        || rest != "0" && rest.bytes().all(|byte| byte.is_ascii_digit()) && !rest.is_empty()
}

/// Writes bytes that are in memory.
pub(crate) async fn write_bytes(
    client: &Client,
    bytes: Vec<u8>,
    labels: BTreeMap<String, String>,
) -> anyhow::Result<Digest> {
    let digest = Digest::sha256_of(&bytes);
    let size = bytes.len() as u64;
    let (client, expected) = (client.clone(), digest.clone());
    tokio::task::spawn_blocking(move || {
        let wanted = Wanted { size: Some(size), digest: Some(expected), labels, ..Wanted::default() };
        write(&client, &mut &bytes[..], &wanted, |_| {})
    })
    .await??;
    Ok(digest)
}

/// What a blob must turn out to be.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// Name of the ingest; made up when `None`.
    pub(crate) reference: Option<String>,
    /// What messages call it while its digest is not known.
    pub(crate) name: Option<String>,
    /// Exact size in bytes.
    pub(crate) size: Option<u64>,
    /// Exact digest.
    pub(crate) digest: Option<Digest>,
    /// Labels the blob gets with its commit.
    pub(crate) labels: BTreeMap<String, String>,
}

/// Streams `source` into the store and commits it. Blocks: call it off the runtime's own threads.
///
/// A blob that turns out wrong in size or digest is not committed, and its ingest is aborted.
pub(crate) fn write(
    client: &Client,
    source: &mut dyn Read,
    wanted: &Wanted,
    mut advance: impl FnMut(u64),
) -> anyhow::Result<Digest> {
    let runtime = tokio::runtime::Handle::current();
    let reference = wanted.reference.clone().unwrap_or_else(|| unique("ctr-ingest"));
    let what = wanted.digest.as_ref().map(Digest::to_string);
    let what = what.or_else(|| wanted.name.clone()).unwrap_or_else(|| reference.clone());
    let expected = wanted.digest.as_ref().map(Digest::to_string).unwrap_or_default();
    let total = wanted.size.map_or(0, |size| size as i64);
    let (sender, receiver) = mpsc::channel(2);
    let mut service = client.content();
    let answers = runtime.spawn(async move {
        let mut stream = service.write(ReceiverStream::new(receiver)).await?.into_inner();
        let mut last = None;
        while let Some(answer) = stream.message().await? {
            last = Some(answer);
        }
        Ok::<_, Status>(last)
    });
    let message = |action: WriteAction, offset: u64, data: Bytes| WriteContentRequest {
        action: action as i32,
        r#ref: reference.clone(),
        total,
        expected: expected.clone(),
        offset: offset as i64,
        data,
        labels: Default::default(),
    };
    let algorithm = wanted.digest.as_ref().map_or(oci::Algorithm::Sha256, Digest::algorithm);
    let mut hasher = algorithm.hasher();
    let mut size = 0;
    // An engine that has the blob answers the first message with AlreadyExists; the source is read to its
    // end nevertheless, both to check it and because a tar goes on behind it.
    let mut open = sender.blocking_send(message(WriteAction::Stat, 0, Bytes::new())).is_ok();
    let read = (|| -> anyhow::Result<()> {
        loop {
            let mut chunk = vec![0; CHUNK];
            let filled =
                fill(source, &mut chunk).with_context(|| format!("cannot read the bytes of {what}"))?;
            if filled == 0 {
                break;
            }
            chunk.truncate(filled);
            hasher.update(&chunk);
            if wanted.size.is_some_and(|wanted| size + filled as u64 > wanted) {
                bail!("{what} is longer than its {} bytes", wanted.size.unwrap_or_default());
            }
            open = open && sender.blocking_send(message(WriteAction::Write, size, chunk.into())).is_ok();
            size += filled as u64;
            advance(filled as u64);
        }
        if let Some(wanted) = wanted.size {
            ensure!(size == wanted, "{what} is cut short: {size} of {wanted} bytes");
        }
        Ok(())
    })();
    let digest = hasher.finish();
    let checked = read.and_then(|()| match &wanted.digest {
        Some(wanted) if *wanted != digest => bail!("the bytes named {wanted} have digest {digest}"),
        _ => Ok(()),
    });
    let result = match checked {
        Ok(()) => {
            if open {
                let mut commit = message(WriteAction::Commit, size, Bytes::new());
                commit.total = size as i64;
                commit.expected = digest.to_string();
                commit.labels = wanted.labels.clone();
                // Fails only when the engine has hung up, and then its answer says why.
                let _ = sender.blocking_send(commit);
            }
            drop(sender);
            match runtime.block_on(answers)? {
                Ok(Some(answer)) if answer.action == WriteAction::Commit as i32 => Ok(digest),
                Err(status) if status.code() == Code::AlreadyExists => Ok(digest),
                Ok(_) => {
                    Err(anyhow::anyhow!("cannot write content {what}: the engine hung up before the commit"))
                }
                Err(status) => Err(Failure::new(format!("write content {what}"), status).into()),
            }
        }
        Err(error) => {
            // The engine sees the end of the write before the abort: an ingest that it makes later would stay.
            drop(sender);
            let _ = runtime.block_on(async { tokio::time::timeout(PATIENCE, answers).await });
            Err(error)
        }
    };
    if result.is_err() {
        // Best effort: an ingest that is left would expire by itself.
        let _ = runtime.block_on(client.content().abort(AbortRequest { r#ref: reference }));
    }
    result
}

/// Reads until `buffer` is full or the source ends.
fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A blob as it comes from the engine, checked at its end. Blocks: to be read off the runtime's own threads.
pub(crate) struct Blob {
    stream: tonic::Streaming<ReadContentResponse>,
    pending: Bytes,
    descriptor: Descriptor,
    /// Until the end.
    hasher: Option<oci::Hasher>,
}

impl Blob {
    /// Begins to read.
    pub(crate) fn open(client: &Client, descriptor: &Descriptor) -> anyhow::Result<Blob> {
        let request = ReadContentRequest { digest: descriptor.digest.to_string(), offset: 0, size: 0 };
        let stream = Handle::current()
            .block_on(client.content().read(request))
            .map_err(|status| Failure::new(format!("read content {}", descriptor.digest), status))?
            .into_inner();
        let hasher = descriptor.digest.algorithm().hasher();
        Ok(Blob { stream, pending: Bytes::new(), descriptor: descriptor.clone(), hasher: Some(hasher) })
    }

    /// Whether what was read, which is all there is, is the blob.
    fn check(&mut self) -> std::io::Result<usize> {
        let wanted = &self.descriptor.digest;
        match self.hasher.take().map(oci::Hasher::finish) {
            Some(found) if found != *wanted => Err(std::io::Error::other(format!(
                "content {wanted} is damaged in the store: its bytes have digest {found}"
            ))),
            _ => Ok(0),
        }
    }
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.pending.is_empty() {
            match Handle::current().block_on(self.stream.message()) {
                Ok(Some(part)) => self.pending = part.data,
                Ok(None) => return self.check(),
                Err(status) => return Err(std::io::Error::other(status.message().to_owned())),
            }
        }
        let count = buffer.len().min(self.pending.len());
        let part = self.pending.split_to(count);
        buffer[..count].copy_from_slice(&part);
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&part);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_keep_layers_are_known() {
        for (rest, keeps) in [
            ("l.0", true),
            ("l.12", true),
            ("3", true),
            ("0", false),
            ("", false),
            ("config", false),
            ("m.0", false),
        ] {
            assert_eq!(keeps_layer(&format!("containerd.io/gc.ref.content.{rest}")), keeps, "{rest}");
        }
        assert!(!keeps_layer("containerd.io/uncompressed"));
    }
}
