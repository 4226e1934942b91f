//! A content store of another process, for the bytes of blobs.
//!
//! ```text
//!  here: records, ingests, digests checked        there: whole blobs, in a namespace that is this engine's alone
//!
//!  ingest/HEX/data --sync, pin--> Write there --> [the record commits] --> ingest/HEX removed
//!  [no record names it] --leaves--> Delete there --> it has left; who would put it again has waited for that
//! ```
//!
//! An ingest stays here until its blob is whole: what clients write does not depend on the other end, and when that is away it
//! is the commit alone that fails, which can be tried again. A blob that a file is wanted of is fetched to one without a name,
//! its digest checked.
//!
//! Invariants: nothing here is asked within a commit of records, which must not wait for another process. Each answer has a
//! limit. A blob is not put while it is being deleted.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, TryStreamExt as _};
use oci::Digest;
use parking_lot::{Condvar, Mutex};
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::content::v1::{
    AbortRequest, DeleteContentRequest, InfoRequest, ListContentRequest, ReadContentRequest, WriteAction,
    WriteContentRequest, WriteContentResponse,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::context::{NAMESPACE_HEADER, Namespace};
use crate::error::{Error, Result};
use crate::proxy::Proxy;

/// How long an answer may take, and each piece of a blob.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes in one message to it.
const PIECE: u64 = 1 << 20;
/// The largest message from it: the default of other engines.
const MESSAGE: usize = 16 << 20;
/// What every blob is labelled with: where the other end is an engine, it has a collector of its own, which is not to collect
/// what this one holds.
const KEPT: &str = "containerd.io/gc.root";

/// A content store in another process, as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    /// What it is called.
    pub name: String,
    /// Its socket.
    pub address: PathBuf,
    /// The namespace there that is this engine's: what is in it and has no record here is garbage.
    pub namespace: Namespace,
}

/// The store behind a socket.
pub(super) struct Remote {
    name: String,
    namespace: MetadataValue<Ascii>,
    proxy: Proxy,
    /// The blobs that are being deleted.
    leaving: Mutex<HashSet<Digest>>,
    left: Condvar,
    fetched: AtomicU64,
}

/// A blob that nobody needs, about to be deleted; until this is dropped, nobody puts it again.
pub(super) struct Leaving {
    remote: Arc<Remote>,
    digest: Digest,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.remote.leaving.lock().remove(&self.digest);
        self.remote.left.notify_all();
    }
}

impl Leaving {
    /// Deletes it. Blocks.
    pub(super) fn delete(self) -> Result<()> {
        let remote = &self.remote;
        let message = DeleteContentRequest { digest: self.digest.to_string() };
        let mut client = remote.client();
        match remote.proxy.ask_blocking(client.delete(remote.request(message))) {
            Err(status) if status.code() != Code::NotFound => Err(remote.failure(&self.digest, &status)),
            _ => Ok(()),
        }
    }
}

impl Remote {
    /// To be called within the runtime. Nothing is connected yet.
    pub(super) fn new(plugin: &Plugin) -> Result<Self> {
        let namespace = plugin.namespace.as_str().parse().map_err(|_| {
            Error::invalid_argument(format!("namespace {} does not fit a header", plugin.namespace))
        })?;
        Ok(Remote {
            name: plugin.name.clone(),
            namespace,
            proxy: Proxy::new(plugin.address.clone()).within(LIMIT),
            leaving: Mutex::default(),
            left: Condvar::new(),
            fetched: AtomicU64::new(0),
        })
    }

    fn client(&self) -> ContentClient<Channel> {
        ContentClient::new(self.proxy.channel()).max_decoding_message_size(MESSAGE)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(NAMESPACE_HEADER, self.namespace.clone());
        request
    }

    /// The store's words in the engine's classes.
    fn failure(&self, what: impl std::fmt::Display, status: &Status) -> Error {
        let message = format!("content store {}: {what}: {}", self.name, status.message());
        match status.code() {
            Code::NotFound => Error::not_found(message),
            Code::AlreadyExists => Error::already_exists(message),
            Code::FailedPrecondition => Error::failed_precondition(message),
            Code::ResourceExhausted => Error::resource_exhausted(message),
            Code::DataLoss => Error::data_loss(message),
            Code::Unavailable | Code::DeadlineExceeded => Error::unavailable(message),
            _ => Error::unknown(message),
        }
    }

    /// Marks a blob that nobody needs; None when it is marked already. Does not block.
    pub(super) fn leave(self: &Arc<Self>, digest: &Digest) -> Option<Leaving> {
        let first = self.leaving.lock().insert(digest.clone());
        first.then(|| Leaving { remote: self.clone(), digest: digest.clone() })
    }

    /// Its size; None when it is not there. Blocks.
    pub(super) fn size(&self, digest: &Digest) -> Result<Option<u64>> {
        let mut client = self.client();
        let message = InfoRequest { digest: digest.to_string() };
        match self.proxy.ask_blocking(client.info(self.request(message))) {
            Ok(answer) => Ok(Some(answer.info.and_then(|info| info.size.try_into().ok()).unwrap_or(0))),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failure(digest, &status)),
        }
    }

    /// All blobs. Blocks.
    pub(super) fn blobs(&self) -> Result<HashSet<Digest>> {
        let failed = |status: Status| self.failure("list its blobs", &status);
        let mut client = self.client();
        let list = client.list(self.request(ListContentRequest::default()));
        let mut pages = self.proxy.ask_blocking(list).map_err(failed)?;
        let mut blobs = HashSet::new();
        while let Some(page) = self.proxy.block_on(self.next(&mut pages)).map_err(failed)? {
            blobs.extend(page.info.iter().filter_map(|info| info.digest.parse::<Digest>().ok()));
        }
        Ok(blobs)
    }

    /// The next message of a stream, within the limit.
    async fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
        self.proxy.ask(async { stream.message().await.map(tonic::Response::new) }).await
    }

    /// A blob's bytes from `from` to `end`, with their offsets.
    pub(super) async fn read(
        self: Arc<Self>,
        digest: Digest,
        from: u64,
        end: u64,
    ) -> Result<impl Stream<Item = Result<(u64, Bytes)>> + Send + 'static> {
        let stream = if from == end {
            None
        } else {
            let message = ReadContentRequest {
                digest: digest.to_string(),
                offset: signed(from),
                size: signed(end - from),
            };
            let mut client = self.client();
            let opened = self.proxy.ask(client.read(self.request(message))).await;
            Some(opened.map_err(|status| self.failure(&digest, &status))?)
        };
        Ok(futures::stream::try_unfold((self, digest, stream, from), move |state| async move {
            let (remote, digest, mut stream, at) = state;
            let Some(pieces) = stream.as_mut().filter(|_| at < end) else { return Ok(None) };
            let piece = loop {
                match remote.next(pieces).await.map_err(|status| remote.failure(&digest, &status))? {
                    Some(answer) if answer.data.is_empty() => {}
                    Some(answer) => break Some(answer.data),
                    None => break None,
                }
            };
            let fits = |piece: &Bytes| at + piece.len() as u64 <= end;
            let Some(piece) = piece.filter(fits) else {
                return Err(Error::data_loss(format!(
                    "content store {}: blob {digest} has another size there than its record says; delete it and fetch \
                     it again",
                    remote.name
                )));
            };
            let next = at + piece.len() as u64;
            Ok(Some(((at, piece), (remote, digest, stream, next))))
        }))
    }

    /// A blob in a file without a name, of this size and with its digest. Blocks.
    pub(super) fn fetch(self: &Arc<Self>, digest: &Digest, size: u64, folder: &Path) -> Result<File> {
        let path = folder.join(format!("fetched-{}", self.fetched.fetch_add(1, Ordering::Relaxed)));
        let failed = |error: std::io::Error| Error::io("fetch a blob to", &path, &error);
        let opened = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let mut file = opened.map_err(failed)?;
        std::fs::remove_file(&path).map_err(failed)?;
        let mut hasher = digest.algorithm().hasher();
        self.proxy.block_on(async {
            let mut pieces = std::pin::pin!(self.clone().read(digest.clone(), 0, size).await?);
            while let Some((_, piece)) = pieces.try_next().await? {
                hasher.update(&piece);
                file.write_all(&piece).map_err(failed)?;
            }
            Ok::<_, Error>(())
        })?;
        let found = hasher.finish();
        if found != *digest {
            return Err(Error::data_loss(format!(
                "content store {}: blob {digest} is damaged: its bytes have the digest {found}; delete it and fetch it \
                 again",
                self.name
            )));
        }
        file.rewind().map_err(failed)?;
        Ok(file)
    }

    /// Puts a blob of these bytes, unless it is there. Going on with what an earlier try of the same `reference` has put.
    /// Blocks.
    pub(super) fn put(&self, reference: &str, digest: &Digest, size: u64, data: &File) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        let mut leaving = self.leaving.lock();
        while leaving.contains(digest) {
            if self.left.wait_until(&mut leaving, deadline).timed_out() {
                return Err(Error::unavailable(format!(
                    "content store {}: blob {digest} is still being deleted; try again",
                    self.name
                )));
            }
        }
        drop(leaving);
        match self.proxy.block_on(self.write(reference, digest, size, data)) {
            Err(Error::AlreadyExists(_)) => match self.size(digest)? {
                Some(there) if there == size => Ok(()),
                Some(there) => Err(Error::data_loss(format!(
                    "content store {}: blob {digest} has {there} bytes there and should have {size}; delete it there",
                    self.name
                ))),
                None => Err(Error::unavailable(format!(
                    "content store {}: blob {digest} was removed there meanwhile; try again",
                    self.name
                ))),
            },
            Err(error @ Error::Unavailable(_)) => Err(error),
            Err(error) => {
                // What it has of it is of no use.
                let mut client = self.client();
                let abort = AbortRequest { r#ref: reference.to_owned() };
                let _ = self.proxy.ask_blocking(client.abort(self.request(abort)));
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    async fn write(&self, reference: &str, digest: &Digest, size: u64, data: &File) -> Result<()> {
        let message = |action: WriteAction, offset: u64, data: Bytes| WriteContentRequest {
            action: action.into(),
            r#ref: reference.to_owned(),
            total: signed(size),
            expected: digest.to_string(),
            offset: signed(offset),
            data,
            labels: Default::default(),
        };
        let failed = |status: Status| self.failure(digest, &status);
        let ended =
            || Error::unavailable(format!("content store {}: {digest}: it ended the write", self.name));
        let (sender, requests) = tokio::sync::mpsc::channel(1);
        // Some open the stream with their first answer, so that there must be something to answer.
        sender.try_send(message(WriteAction::Stat, 0, Bytes::new())).map_err(|_| ended())?;
        let mut client = self.client();
        let write = client.write(self.request(ReceiverStream::new(requests)));
        let mut answers = self.proxy.ask(write).await.map_err(failed)?;
        let mut answer = async |request: Option<WriteContentRequest>| -> Result<WriteContentResponse> {
            if let Some(request) = request {
                // It has ended the stream, and its answer says why.
                let _ = sender.send(request).await;
            }
            self.next(&mut answers).await.map_err(failed)?.ok_or_else(ended)
        };
        let stat = answer(None).await?;
        let mut offset = u64::try_from(stat.offset).ok().filter(|offset| *offset <= size).unwrap_or(0);
        while offset < size {
            let mut piece = vec![0; usize::try_from(PIECE.min(size - offset)).unwrap_or(0)];
            data.read_exact_at(&mut piece, offset)
                .map_err(|error| Error::unknown(format!("read the data of {digest}: {error}")))?;
            let next = offset + piece.len() as u64;
            answer(Some(message(WriteAction::Write, offset, piece.into()))).await?;
            offset = next;
        }
        let mut commit = message(WriteAction::Commit, size, Bytes::new());
        commit.labels.insert(KEPT.to_owned(), "another engine's".to_owned());
        answer(Some(commit)).await.map(drop)
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn one_that_never_answers_or_is_not_there_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let silent = folder.path().join("silent");
        // Connections are made, and nobody takes them.
        let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
        for (address, words) in
            [(silent, "did not answer"), (folder.path().join("none"), "cannot be reached")]
        {
            let namespace = Namespace::new("gantry").unwrap();
            let mut remote = Remote::new(&Plugin { name: "far".into(), address, namespace }).unwrap();
            remote.proxy = remote.proxy.within(Duration::from_millis(200));
            let (remote, path) = (Arc::new(remote), folder.path().to_owned());
            let failed = tokio::task::spawn_blocking(move || {
                let digest = Digest::sha256_of(b"x");
                let data = File::open("/dev/null").unwrap();
                let leaving = remote.leave(&digest).unwrap();
                assert!(remote.leave(&digest).is_none());
                [
                    remote.size(&digest).unwrap_err(),
                    remote.blobs().unwrap_err(),
                    remote.fetch(&digest, 1, &path).unwrap_err(),
                    leaving.delete().unwrap_err(),
                    // It has left, whatever came of that.
                    remote.put("ref", &digest, 1, &data).unwrap_err(),
                ]
            });
            for error in failed.await.unwrap() {
                assert!(matches!(&error, Error::Unavailable(text) if text.contains(words)), "{error}");
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
