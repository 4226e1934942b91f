//! What a tag or digest names.
//!
//! ```text
//!  tag      HEAD manifests/TAG     at hosts that may resolve; the digest is theirs to say
//!  digest   HEAD manifests/DIGEST, then, if no host has that, HEAD blobs/DIGEST
//!  GET, where HEAD is refused or does not say digest, size and type: then all three come from the bytes
//! ```

use http::Method;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use oci::Digest;
use oci::image::{Descriptor, Kind as Document, MANIFEST_LIMIT, kind_of, media_type};
use reqwest::{Response, StatusCode};

use super::Repository;
use super::hosts::Host;
use super::request::{Answer, Ask, Failure, all_failed, is_html, read_limited};
use crate::error::{Error, Result};

/// What is understood, best first; and whatever else there is.
const ACCEPTED: [&str; 5] = [
    media_type::DOCKER_MANIFEST,
    media_type::DOCKER_LIST,
    media_type::OCI_MANIFEST,
    media_type::OCI_INDEX,
    "*/*",
];
/// The header with what an answer's bytes hash to.
pub(super) const DIGEST: &str = "docker-content-digest";
/// The type of blobs without one.
const BYTES: &str = "application/octet-stream";

impl Repository {
    /// What the reference names, by its tag or digest: type, digest and size of an index or a manifest. NotFound when no
    /// host has it.
    pub async fn resolve(&self) -> Result<Descriptor> {
        let reference = self.reference();
        let what = format!("resolve {reference}");
        match (reference.digest(), reference.tag()) {
            (Some(digest), _) => self.describe(digest, &["manifests", "blobs"]).await,
            (None, Some(tag)) => self.look_up(&what, vec![format!("manifests/{tag}")], None).await,
            (None, None) => {
                Err(Error::invalid_argument(format!("{what}: it has neither a tag nor a digest; add one")))
            }
        }
    }

    /// What has this digest in the repository, in one of these folders: `manifests`, `blobs`.
    pub async fn describe(&self, digest: &Digest, folders: &[&str]) -> Result<Descriptor> {
        let paths = folders.iter().map(|folder| format!("{folder}/{digest}")).collect();
        self.look_up(&format!("resolve {}@{digest}", self.reference().name()), paths, Some(digest)).await
    }

    async fn look_up(&self, what: &str, paths: Vec<String>, digest: Option<&Digest>) -> Result<Descriptor> {
        let able = |host: &Host| host.capabilities.pull && (digest.is_some() || host.capabilities.resolve);
        let mut failures = Vec::new();
        for path in paths {
            let hosts = self.inner.hosts(able, "resolve").await?;
            let count = hosts.len();
            failures = Vec::new();
            for (at, (host, trusted)) in hosts.into_iter().enumerate() {
                match self.resolve_at(&host, &path, digest, at + 1 == count).await {
                    Ok(descriptor) => return Ok(descriptor),
                    Err(failure) => {
                        tracing::debug!(error = %failure.error, "a host does not resolve");
                        failures.push((failure, trusted));
                    }
                }
            }
            // Another path only when the host is sure that this one has nothing.
            if !failures.iter().all(|(failure, _)| failure.is_missing()) {
                break;
            }
        }
        Err(all_failed(what, failures))
    }

    async fn resolve_at(
        &self,
        host: &Host,
        path: &str,
        wanted: Option<&Digest>,
        last: bool,
    ) -> Result<Descriptor, Failure> {
        let ask = |method| {
            Ask::new(method, path.to_owned(), vec![self.scope(false)]).header(ACCEPT, &ACCEPTED.join(", "))
        };
        let head = ask(Method::HEAD);
        let answer = self.inner.ask(host, &head, last).await?;
        let status = answer.response.status();
        match status {
            status if status.is_success() => {
                if let Some(descriptor) = described(&answer.response, wanted)
                    .map_err(|why| self.inner.nonsense(host, &head, &why))?
                {
                    if !path.starts_with("manifests/") || is_document(&descriptor.media_type) {
                        return Ok(descriptor);
                    }
                    return self.read_document(host, &ask(Method::GET), wanted, last).await;
                }
                if path.starts_with("blobs/") {
                    return Err(self.inner.nonsense(host, &head, "does not tell the size of a blob"));
                }
            }
            StatusCode::NOT_FOUND => {
                let missing = format!("{} has no {path} of {}", host.origin(), self.reference().name());
                return Err(Failure {
                    kind: super::request::Kind::Status(status),
                    error: Error::not_found(missing),
                });
            }
            StatusCode::UNAUTHORIZED | StatusCode::TOO_MANY_REQUESTS => {
                return Err(self.inner.fault(host, &head, answer.response).await);
            }
            status if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => {
                return Err(self.inner.fault(host, &head, answer.response).await);
            }
            // HEAD is refused, or has no room for the reason.
            _ => {}
        }
        drop(answer);
        self.read_document(host, &ask(Method::GET), wanted, last).await
    }

    /// The whole of a manifest, to say what it is.
    async fn read_document(
        &self,
        host: &Host,
        ask: &Ask,
        wanted: Option<&Digest>,
        last: bool,
    ) -> Result<Descriptor, Failure> {
        let mut answer: Answer = self.inner.ask(host, ask, last).await?;
        if !answer.response.status().is_success() {
            return Err(self.inner.fault(host, ask, answer.response).await);
        }
        let wrong = |why: &str| self.inner.nonsense(host, ask, why);
        let said = described_digest(&answer.response).map_err(|why| wrong(&why))?;
        let kind = content_type(&answer.response).map_err(|why| wrong(&why))?;
        let idle = self.inner.shared.settings.limits.idle;
        let bytes = match read_limited(&mut answer.response, MANIFEST_LIMIT as usize, idle).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(wrong(&format!("a manifest of more than {MANIFEST_LIMIT} bytes"))),
            Err(why) => return Err(Failure::broken(format!("GET {}: {why}", self.inner.name(host, ask)))),
        };
        let expected = wanted.or(said.as_ref());
        let algorithm = expected.map_or(oci::Algorithm::Sha256, Digest::algorithm);
        let mut hasher = algorithm.hasher();
        hasher.update(&bytes);
        let digest = hasher.finish();
        if let Some(expected) = expected.filter(|expected| **expected != digest) {
            return Err(wrong(&format!("the bytes have the digest {digest}, not {expected}")));
        }
        let kind = if is_document(&kind) { kind } else { sniff(&bytes).map_err(|why| wrong(&why))? };
        Ok(Descriptor::new(&kind, digest, bytes.len() as u64))
    }
}

fn is_document(kind: &str) -> bool {
    media_type::is_index(kind) || media_type::is_manifest(kind)
}

/// What the document says that it is, where the header does not.
fn sniff(bytes: &[u8]) -> Result<String, String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Outline {
        #[serde(default)]
        media_type: String,
    }
    let kind = kind_of(bytes).map_err(|error| error.to_string())?;
    let outline: Outline = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    Ok(match (outline.media_type, kind) {
        (named, _) if is_document(&named) => named,
        (_, Document::Index) => media_type::OCI_INDEX.to_owned(),
        (_, Document::Manifest) => media_type::OCI_MANIFEST.to_owned(),
    })
}

fn described_digest(response: &Response) -> Result<Option<Digest>, String> {
    let Some(value) = response.headers().get(DIGEST) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    Digest::parse(text).map(Some).map_err(|error| format!("Docker-Content-Digest: {error}"))
}

/// The type that the answer has, without parameters.
fn content_type(response: &Response) -> Result<String, String> {
    if is_html(response.headers()) {
        return Err("answered with an HTML page: is this the address of a registry?".into());
    }
    let value = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or(BYTES);
    let kind = value.split(';').next().unwrap_or_default().trim();
    if kind.starts_with("application/vnd.docker.distribution.manifest.v1") {
        return Err(
            "a manifest of schema version 1, which is not supported: push the image again with a current tool".into()
        );
    }
    Ok(kind.to_owned())
}

/// What the head of an answer describes; None when it does not say all.
fn described(response: &Response, wanted: Option<&Digest>) -> Result<Option<Descriptor>, String> {
    let kind = content_type(response)?;
    let said = described_digest(response)?;
    if let (Some(said), Some(wanted)) = (&said, wanted)
        && said.algorithm() == wanted.algorithm()
        && said != wanted
    {
        return Err(format!("was asked for {wanted} and says that it has {said}"));
    }
    // The answer to HEAD has no body, whose length the client would tell.
    let size =
        response.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let (Some(digest), Some(size)) = (wanted.cloned().or(said), size) else { return Ok(None) };
    if is_document(&kind) && size > MANIFEST_LIMIT {
        return Err(format!("a manifest of {size} bytes, which is more than {MANIFEST_LIMIT}"));
    }
    Ok(Some(Descriptor::new(&kind, digest, size)))
}
