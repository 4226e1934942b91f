//! Blobs: reading them with a limit, and writing them in chunks with their digest checked on the way.

use std::collections::BTreeMap;
use std::io::Read;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use oci::Digest;
use proto::containerd::services::content::v1::{
    AbortRequest, Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction, WriteContentRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::client::{Client, Failure, Tried};
use crate::lease::unique;

/// How much one message of a write carries. Engines take 4 MiB at least.
pub(crate) const CHUNK: usize = 1 << 20;

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

/// How a write ended.
pub(crate) struct Written {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// The store had the blob already.
    pub(crate) existed: bool,
}

/// Streams `source` into the store and commits it. Blocks: call it off the runtime's own threads.
///
/// A blob that turns out wrong in size or digest is not committed, and its ingest is aborted.
pub(crate) fn write(
    client: &Client,
    source: &mut dyn Read,
    wanted: &Wanted,
    mut advance: impl FnMut(u64),
) -> anyhow::Result<Written> {
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
                Ok(Some(answer)) if answer.action == WriteAction::Commit as i32 => {
                    Ok(Written { digest, size, existed: false })
                }
                Err(status) if status.code() == Code::AlreadyExists => {
                    Ok(Written { digest, size, existed: true })
                }
                Ok(_) => {
                    Err(anyhow::anyhow!("cannot write content {what}: the engine hung up before the commit"))
                }
                Err(status) => Err(Failure::new(format!("write content {what}"), status).into()),
            }
        }
        Err(error) => {
            answers.abort();
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
