//! Blobs and manifests, to the host of a registry that takes them.
//!
//! ```text
//!  blob      HEAD --200--> there already
//!             \--> POST uploads, mount=DIGEST&from=REPOSITORY --201--> mounted
//!                    \--202, Location--> PUT, all of it                             small ones
//!                                    \--> PATCH, PATCH, ... PUT without bytes       large ones
//!                                           ^    | broken
//!                                           +----+ GET Location: Range says what has come
//!  manifest  HEAD --the same digest--> there already
//!             \--> PUT
//! ```
//!
//! Invariants: a blob is read from its file as it is sent. What a host says it has stored must be what was sent. An upload that
//! breaks is taken up again, or begun anew, within limits. An upload that goes to another host is not shown who we are.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use http::{HeaderMap, Method};
use oci::Digest;
use oci::image::Descriptor;
use reqwest::{StatusCode, Url};

use super::Repository;
use super::hosts::Host;
use super::request::{Answer, Ask, Failure, Kind, Part, Payload, To, is_html, redirect};
use super::resolver::DIGEST;
use super::retry::{jitter, wait};
use crate::error::{Error, Result};

/// The least that a host wants in each part of an upload.
const LEAST_CHUNK: &str = "oci-chunk-min-length";

/// How a registry came to have something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pushed {
    /// It had it already.
    Exists,
    /// It took it from another of its repositories.
    Mounted(String),
    /// It was sent.
    Uploaded,
}

/// A blob's bytes.
#[derive(Clone)]
pub struct Source {
    /// The file, which is the blob.
    pub file: Arc<File>,
    /// How many of the bytes have gone out.
    pub sent: Arc<AtomicU64>,
}

/// An upload that a host has begun.
struct Upload {
    location: Url,
    /// How large parts are.
    chunk: u64,
}

impl Repository {
    /// Pushes a blob; `from` names other repositories of the registry that may have it, best first.
    pub async fn push_blob(&self, blob: &Descriptor, source: &Source, from: &[String]) -> Result<Pushed> {
        let what = || format!("push {} to {}", blob.digest, self.reference().name());
        let host = self.push_host().await?;
        if self.has_blob(&host, blob).await.map_err(|failure| failure.error.context(what()))? {
            return Ok(Pushed::Exists);
        }
        let limits = &self.inner.shared.settings.limits;
        let mut in_parts = blob.size > self.inner.shared.settings.upload_chunk;
        let mut number = 1;
        loop {
            source.sent.store(0, Ordering::Relaxed);
            let failure = match self.upload(&host, blob, source, from, in_parts).await {
                Ok(pushed) => return Ok(pushed),
                Err(failure) => failure,
            };
            let again = match failure.kind {
                Kind::Broken => true,
                // The upload is not known any more, or parts are not.
                Kind::Status(
                    StatusCode::NOT_FOUND
                    | StatusCode::METHOD_NOT_ALLOWED
                    | StatusCode::RANGE_NOT_SATISFIABLE
                    | StatusCode::BAD_REQUEST,
                ) if in_parts => {
                    in_parts = false;
                    true
                }
                Kind::Status(status) => status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS,
                Kind::Denied | Kind::Wrong => false,
            };
            if !again || number >= limits.attempts {
                return Err(failure.error.context(what()));
            }
            tracing::debug!(error = %failure.error, "beginning an upload anew");
            tokio::time::sleep(wait(limits, number, None, jitter())).await;
            number += 1;
        }
    }

    /// Pushes a manifest or an index, whose children the registry has. `by_tag` gives it the reference's tag.
    pub async fn push_manifest(&self, manifest: &Descriptor, bytes: Bytes, by_tag: bool) -> Result<Pushed> {
        let what = || format!("push {} to {}", manifest.digest, self.reference());
        let host = self.push_host().await?;
        let tag = self.reference().tag().filter(|_| by_tag);
        let name = tag.map_or_else(|| manifest.digest.to_string(), str::to_owned);
        let path = format!("manifests/{name}");
        let accept = format!("{}, */*", manifest.media_type);
        let head = Ask::new(Method::HEAD, path.clone(), self.push_scopes(None)).header(ACCEPT, &accept);
        match self.inner.ask(&host, &head, true).await {
            Ok(answer) if answer.response.status() == StatusCode::OK => {
                let said = said(answer.response.headers());
                if said.as_ref() == Some(&manifest.digest) || (said.is_none() && tag.is_none()) {
                    return Ok(Pushed::Exists);
                }
            }
            // The reason comes along with the PUT, if it stands in its way.
            Ok(_) => {}
            Err(failure) => return Err(failure.error.context(what())),
        }
        let put = Ask {
            body: Payload::Bytes(bytes),
            patience: Some(self.inner.shared.settings.limits.upload),
            ..Ask::new(Method::PUT, path, self.push_scopes(None)).header(CONTENT_TYPE, &manifest.media_type)
        };
        let answer =
            self.inner.ask(&host, &put, true).await.map_err(|failure| failure.error.context(what()))?;
        self.stored(&host, &put, answer, &manifest.digest)
            .await
            .map_err(|failure| failure.error.context(what()))?;
        Ok(Pushed::Uploaded)
    }

    /// The one that takes what is pushed: the first that may.
    async fn push_host(&self) -> Result<Host> {
        let hosts = self.inner.able_hosts(|host| host.capabilities.push, "push to").await?;
        let first = hosts.into_iter().next();
        first.ok_or_else(|| Error::internal("a repository without hosts"))
    }

    fn push_scopes(&self, from: Option<&str>) -> Vec<String> {
        let other = from.map(|from| format!("repository:{from}:pull"));
        std::iter::once(self.scope(true)).chain(other).collect()
    }

    async fn has_blob(&self, host: &Host, blob: &Descriptor) -> Result<bool, Failure> {
        let head = Ask::new(Method::HEAD, format!("blobs/{}", blob.digest), self.push_scopes(None))
            .header(ACCEPT, "*/*");
        let answer = self.inner.ask(host, &head, true).await?;
        match answer.response.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            // Who may not look may still push.
            StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED => Ok(false),
            _ => Err(self.inner.fault(host, &head, answer.response).await),
        }
    }

    async fn upload(
        &self,
        host: &Host,
        blob: &Descriptor,
        source: &Source,
        from: &[String],
        in_parts: bool,
    ) -> Result<Pushed, Failure> {
        let upload = match self.begin(host, blob, from).await? {
            Begun::Mounted(from) => return Ok(Pushed::Mounted(from)),
            Begun::Upload(upload) => upload,
        };
        if in_parts {
            self.send_parts(host, blob, source, upload).await?;
        } else {
            let part =
                Part { file: source.file.clone(), offset: 0, length: blob.size, sent: source.sent.clone() };
            self.finish(host, blob, upload.location, Payload::File(part)).await?;
        }
        source.sent.store(blob.size, Ordering::Relaxed);
        Ok(Pushed::Uploaded)
    }

    async fn begin(&self, host: &Host, blob: &Descriptor, from: &[String]) -> Result<Begun, Failure> {
        if let Some(from) = from.first() {
            let path = format!("blobs/uploads/?mount={}&from={}", blob.digest, escaped(from));
            let post = Ask::new(Method::POST, path, self.push_scopes(Some(from)));
            match self.inner.ask(host, &post, true).await {
                Ok(answer) if answer.response.status() == StatusCode::CREATED => {
                    return Ok(Begun::Mounted(from.clone()));
                }
                Ok(answer) if answer.response.status() == StatusCode::ACCEPTED => {
                    return self.begun(host, &post, &answer).map(Begun::Upload);
                }
                // Without the other repository's leave it is sent.
                Ok(_) => {}
                Err(failure) if failure.kind == Kind::Denied => {}
                Err(failure) => return Err(failure),
            }
        }
        let post = Ask::new(Method::POST, "blobs/uploads/".to_owned(), self.push_scopes(None));
        let answer = self.inner.ask(host, &post, true).await?;
        match answer.response.status() {
            StatusCode::OK | StatusCode::ACCEPTED | StatusCode::NO_CONTENT => {
                self.begun(host, &post, &answer).map(Begun::Upload)
            }
            _ => Err(self.inner.fault(host, &post, answer.response).await),
        }
    }

    fn begun(&self, host: &Host, ask: &Ask, answer: &Answer) -> Result<Upload, Failure> {
        let location = self.location(host, ask, answer)?;
        let least = header(answer.response.headers(), LEAST_CHUNK).and_then(|value| value.parse().ok());
        let chunk = self.inner.shared.settings.upload_chunk.max(1).max(least.unwrap_or(0));
        Ok(Upload { location, chunk })
    }

    /// Where an answer says that the upload goes on.
    fn location(&self, host: &Host, ask: &Ask, answer: &Answer) -> Result<Url, Failure> {
        let wrong = |why: &str| self.inner.nonsense(host, ask, why);
        let text = header(answer.response.headers(), LOCATION.as_str())
            .ok_or_else(|| wrong("begins an upload and does not say where"))?;
        let from = answer.response.url();
        // A registry behind a proxy that ends TLS may not know that it is reached by https.
        let text = match from.join(text) {
            Ok(mut url)
                if from.scheme() == "https"
                    && url.scheme() == "http"
                    && url.host_str() == from.host_str() =>
            {
                let _ = url.set_scheme("https");
                let _ = url.set_port(from.port());
                url.to_string()
            }
            _ => text.to_owned(),
        };
        redirect(from, &text).map_err(|why| wrong(&why.replace("redirects", "sends the upload")))
    }

    /// The last step of an upload: its digest, and whatever bytes are left.
    async fn finish(
        &self,
        host: &Host,
        blob: &Descriptor,
        mut location: Url,
        body: Payload,
    ) -> Result<(), Failure> {
        location.query_pairs_mut().append_pair("digest", blob.digest.as_str());
        let put = Ask {
            to: To::Url(location),
            body,
            patience: Some(self.inner.shared.settings.limits.upload),
            ..Ask::new(Method::PUT, String::new(), self.push_scopes(None))
                .header(CONTENT_TYPE, "application/octet-stream")
        };
        let answer = self.inner.ask_once(host, &put).await?;
        self.stored(host, &put, answer, &blob.digest).await
    }

    /// Checks what a host says that it has stored.
    async fn stored(&self, host: &Host, ask: &Ask, answer: Answer, digest: &Digest) -> Result<(), Failure> {
        if !answer.response.status().is_success() {
            return Err(self.inner.fault(host, ask, answer.response).await);
        }
        // Whoever answers 200 with a page has stored nothing: a portal, or a server of something else.
        if is_html(answer.response.headers()) {
            let why = "answered with an HTML page: is this the address of a registry?";
            return Err(self.inner.nonsense(host, ask, why));
        }
        match said(answer.response.headers()) {
            Some(said) if said.algorithm() == digest.algorithm() && said != *digest => Err(self
                .inner
                .nonsense(host, ask, &format!("was sent {digest} and says that it stored {said}"))),
            None if answer.response.status() != StatusCode::CREATED => {
                let why = format!("answered {} and does not say what it stored", answer.response.status());
                Err(self.inner.nonsense(host, ask, &why))
            }
            _ => Ok(()),
        }
    }

    /// Sends a blob part by part, each of which may break without what came before being lost.
    async fn send_parts(
        &self,
        host: &Host,
        blob: &Descriptor,
        source: &Source,
        upload: Upload,
    ) -> Result<(), Failure> {
        let limits = &self.inner.shared.settings.limits;
        let (mut location, mut position, mut failed) = (upload.location, 0, 0);
        while position < blob.size {
            let length = upload.chunk.min(blob.size - position);
            let part =
                Part { file: source.file.clone(), offset: position, length, sent: source.sent.clone() };
            let patch = Ask {
                to: To::Url(location.clone()),
                body: Payload::File(part),
                patience: Some(limits.upload),
                ..Ask::new(Method::PATCH, String::new(), self.push_scopes(None))
                    .header(CONTENT_TYPE, "application/octet-stream")
                    .header(CONTENT_RANGE, &format!("{position}-{}", position + length - 1))
            };
            let failure = match self.inner.ask_once(host, &patch).await {
                Ok(answer) if answer.response.status().is_success() => {
                    let has = received(answer.response.headers()).unwrap_or(position + length);
                    if has <= position || has > position + length {
                        let why = format!("was sent bytes {position} on and says that it has {has}");
                        return Err(self.inner.nonsense(host, &patch, &why));
                    }
                    location = self.location(host, &patch, &answer)?;
                    position = has;
                    failed = 0;
                    source.sent.store(position, Ordering::Relaxed);
                    continue;
                }
                Ok(answer) => self.inner.fault(host, &patch, answer.response).await,
                Err(failure) => failure,
            };
            let trouble = matches!(failure.kind, Kind::Status(status) if status.is_server_error()
                || status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::RANGE_NOT_SATISFIABLE);
            if failed >= limits.attempts || !(failure.kind == Kind::Broken || trouble) {
                return Err(failure);
            }
            failed += 1;
            tokio::time::sleep(wait(limits, failed, None, jitter())).await;
            let status = Ask {
                to: To::Url(location.clone()),
                ..Ask::new(Method::GET, String::new(), self.push_scopes(None))
            };
            let answer = self.inner.ask(host, &status, true).await?;
            let has = received(answer.response.headers());
            let known = answer.response.status().is_success();
            let (true, Some(has)) = (known, has.filter(|has| *has <= blob.size)) else { return Err(failure) };
            location = self.location(host, &status, &answer).unwrap_or(location);
            position = has;
            source.sent.store(position, Ordering::Relaxed);
        }
        self.finish(host, blob, location, Payload::Nothing).await
    }
}

enum Begun {
    Mounted(String),
    Upload(Upload),
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn said(headers: &HeaderMap) -> Option<Digest> {
    Digest::parse(header(headers, DIGEST)?).ok()
}

/// How many bytes an upload has, by the Range of an answer: `0-9` is ten.
fn received(headers: &HeaderMap) -> Option<u64> {
    let value = header(headers, RANGE.as_str())?;
    let (first, last) = value.trim().trim_start_matches("bytes=").split_once('-')?;
    let last: u64 = last.trim().parse().ok()?;
    match (first.trim(), last) {
        // No byte, as the reference registry writes it; one byte is sent again, which does no harm.
        ("0", 0) => Some(0),
        ("0", last) => last.checked_add(1),
        _ => None,
    }
}

/// A repository's name in a query.
fn escaped(name: &str) -> String {
    name.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'/' => (byte as char).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_upload_has_is_read_from_its_range() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, value.parse().unwrap());
            received(&headers)
        };
        assert_eq!(of("0-9"), Some(10));
        assert_eq!(of("bytes=0-9"), Some(10));
        assert_eq!(of("0-0"), Some(0));
        for wrong in ["", "5", "1-9", "0-x", "0-18446744073709551615"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
        assert_eq!(received(&HeaderMap::new()), None);
    }
}
