//! Bytes of blobs and manifests.
//!
//! ```text
//!  fetch --> open at each host in turn --> Body --chunk--> ... --> end
//!                ^                           |
//!                +--- Range from where it broke: after a wait here, then at the next host, and so on
//! ```
//!
//! Invariants: a body gives no byte more than was asked for and the descriptor has, however much the host sends. A body that
//! ends early is taken up again; that fails after [`Limits::resumptions`](super::Limits) without a byte in between. What the
//! bytes hash to is for those to check who store them.

use bytes::Bytes;
use http::Method;
use http::header::{ACCEPT, CONTENT_ENCODING, CONTENT_RANGE, RANGE};
use oci::image::{Descriptor, media_type};
use reqwest::{Response, StatusCode, Url};
use tokio::sync::OwnedSemaphorePermit;

use super::Repository;
use super::hosts::Host;
use super::request::{Answer, Ask, Failure, Kind, To, all_failed, is_html, shown};
use super::retry::{jitter, wait};
use crate::error::{Error, Result};

/// Bytes on their way.
pub struct Body {
    repository: Repository,
    wanted: Descriptor,
    hosts: Vec<(Host, bool)>,
    /// Which of the hosts the bytes come from.
    host: usize,
    source: Option<Source>,
    offset: u64,
    /// Where the next byte is from.
    position: u64,
    end: u64,
    ranged: bool,
    /// Resumptions since the last byte.
    failed: u32,
    permit: Option<OwnedSemaphorePermit>,
}

/// An answer whose bytes are being read.
struct Source {
    response: Response,
    /// Bytes before the position, of a host that begins at 0.
    skip: u64,
}

/// Which part of an answer's bytes is the one asked for.
#[derive(Debug, PartialEq, Eq)]
enum Begin {
    Here,
    /// The host ignores ranges.
    AtZero,
}

impl Repository {
    /// A blob or manifest from `offset` on, up to `length` bytes or, for None, to its end. A connection that breaks is taken up
    /// again where it broke, here or at the next host that has it, as long as that makes sense.
    pub async fn fetch(&self, wanted: &Descriptor, offset: u64, length: Option<u64>) -> Result<Body> {
        let what = || format!("fetch {} of {}", wanted.digest, self.reference().name());
        if offset > wanted.size {
            return Err(Error::out_of_range(format!("{}: {offset} of {} bytes", what(), wanted.size)));
        }
        let end =
            length.and_then(|length| offset.checked_add(length)).unwrap_or(wanted.size).min(wanted.size);
        let hosts = self.inner.hosts(|host| host.capabilities.pull, "fetch").await?;
        let mut body = Body {
            repository: self.clone(),
            wanted: wanted.clone(),
            hosts,
            host: 0,
            source: None,
            offset,
            position: offset,
            end,
            ranged: true,
            failed: 0,
            permit: None,
        };
        if offset == end {
            return Ok(body);
        }
        let mut failures = Vec::new();
        let count = body.hosts.len();
        for at in 0..count {
            match body.open(at, at + 1 == count).await {
                Ok((response, begin)) => {
                    body.host = at;
                    if begin == Begin::AtZero {
                        (body.offset, body.position) = (0, 0);
                        body.ranged = false;
                    }
                    body.source = Some(Source { response, skip: 0 });
                    return Ok(body);
                }
                Err(failure) => {
                    // The right to be under way is for this host.
                    body.permit = None;
                    tracing::debug!(error = %failure.error, "a host does not give a blob");
                    failures.push((failure, body.hosts[at].1));
                }
            }
        }
        // What no host has may be elsewhere; nobody there is shown anything.
        let elsewhere = if self.inner.shared.settings.foreign_layers { &wanted.urls[..] } else { &[] };
        for url in elsewhere {
            match body.open_elsewhere(url).await {
                Ok(response) => {
                    body.ranged = false;
                    (body.offset, body.position) = (0, 0);
                    body.source = Some(Source { response, skip: 0 });
                    body.hosts.clear();
                    return Ok(body);
                }
                Err(failure) => failures.push((failure, false)),
            }
        }
        Err(all_failed(&what(), failures))
    }
}

impl Body {
    /// Where they begin: what was asked for, or 0 of a host that cannot begin elsewhere.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the host gives parts of blobs. When it does not, further requests for parts would each fetch all before them.
    pub fn is_ranged(&self) -> bool {
        self.ranged
    }

    /// The next of them; None at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>> {
        let idle = self.repository.inner.shared.settings.limits.idle;
        loop {
            if self.position >= self.end {
                // Read to its end, so that the connection can be used again; what else the host sends is not ours.
                self.source = None;
                self.permit = None;
                return Ok(None);
            }
            let why = match &mut self.source {
                None => "the connection is gone".to_owned(),
                Some(source) => match tokio::time::timeout(idle, source.response.chunk()).await {
                    Ok(Ok(Some(mut bytes))) => {
                        let skipped = source.skip.min(bytes.len() as u64);
                        source.skip -= skipped;
                        bytes = bytes.slice(skipped as usize..);
                        if bytes.is_empty() {
                            continue;
                        }
                        let room = self.end - self.position;
                        if bytes.len() as u64 > room {
                            bytes.truncate(room as usize);
                        }
                        self.position += bytes.len() as u64;
                        self.failed = 0;
                        return Ok(Some(bytes));
                    }
                    Ok(Ok(None)) => "the answer ended early".to_owned(),
                    Ok(Err(error)) => format!("the connection broke: {}", error.without_url()),
                    Err(_) => format!("the host sent nothing for {idle:?}"),
                },
            };
            self.source = None;
            self.resume(why).await?;
        }
    }

    /// Goes on where it broke.
    async fn resume(&mut self, why: String) -> Result<()> {
        let what = format!(
            "fetch {} of {}: {} of {} bytes came",
            self.wanted.digest,
            self.repository.reference().name(),
            self.position,
            self.wanted.size
        );
        if self.hosts.is_empty() {
            return Err(Error::unavailable(format!("{what}, then {why}")));
        }
        let limits = self.repository.inner.shared.settings.limits.clone();
        tracing::debug!(digest = %self.wanted.digest, position = self.position, why, "taking up a blob again");
        let mut failures: Vec<(Failure, bool)> = Vec::new();
        let mut why = why;
        loop {
            if self.failed >= limits.resumptions {
                let said =
                    failures.pop().map(|(failure, _)| format!("; {}", failure.error)).unwrap_or_default();
                return Err(Error::unavailable(format!(
                    "{what}, then {why}, {} times without a further byte{said}",
                    self.failed
                )));
            }
            self.failed += 1;
            if self.failed > 1 || self.hosts.len() == 1 {
                tokio::time::sleep(wait(&limits, self.failed, None, jitter())).await;
            }
            // The same host once more, then the next.
            if self.failed > 1 && self.hosts.len() > 1 {
                let origin = self.hosts[self.host].0.origin();
                self.repository.inner.shared.failed(&origin);
                self.host = (self.host + 1) % self.hosts.len();
            }
            match self.open(self.host, false).await {
                Ok((response, begin)) => {
                    let skip = if begin == Begin::AtZero { self.position } else { 0 };
                    self.source = Some(Source { response, skip });
                    return Ok(());
                }
                Err(failure) => {
                    let hopeless = failure.kind != Kind::Broken
                        && !matches!(failure.kind, Kind::Status(status) if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS);
                    why = failure.error.to_string();
                    if hopeless {
                        self.hosts.remove(self.host);
                        if self.hosts.is_empty() {
                            return Err(failure.error.context(what));
                        }
                        self.host %= self.hosts.len();
                    }
                    failures.push((failure, false));
                }
            }
        }
    }

    /// Asks a host for the bytes from the position on.
    async fn open(&mut self, at: usize, last: bool) -> Result<(Response, Begin), Failure> {
        let inner = self.repository.inner.clone();
        let host = self.hosts[at].0.clone();
        let kind = self.wanted.media_type.as_str();
        let is_document = media_type::is_index(kind) || media_type::is_manifest(kind);
        let folder = if is_document { "manifests" } else { "blobs" };
        let accept = if kind.is_empty() { "*/*".to_owned() } else { format!("{kind}, */*") };
        let path = format!("{folder}/{}", self.wanted.digest);
        let mut ask = Ask::new(Method::GET, path, vec![self.repository.scope(false)]).header(ACCEPT, &accept);
        if let Some(range) = range(self.position, self.end, self.wanted.size) {
            ask = ask.header(RANGE, &range);
        }
        let answer = match self.permit.take() {
            // Under way already: others that wait for their turn may wait for these bytes.
            Some(permit) => match inner.once(&host, &ask).await {
                Ok(response) => Answer { response, permit },
                Err(failure) => {
                    self.permit = Some(permit);
                    return Err(failure);
                }
            },
            None => inner.ask(&host, &ask, last).await?,
        };
        // Kept whatever comes: a body that is taken up again does not wait for its turn behind those that wait for it.
        let Answer { response, permit } = answer;
        self.permit = Some(permit);
        let begin = match response.status() {
            StatusCode::OK => check_whole(&response, self.wanted.size).map(|()| {
                if self.position == 0 && !ask.headers.contains_key(RANGE) {
                    Begin::Here
                } else {
                    Begin::AtZero
                }
            }),
            StatusCode::PARTIAL_CONTENT => {
                let value = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                check_range(value, self.position, self.end, self.wanted.size).map(|()| Begin::Here)
            }
            _ => return Err(inner.fault(&host, &ask, response).await),
        };
        let begin = begin.and_then(|begin| check_kind(&response).map(|()| begin));
        let begin = begin.map_err(|why| inner.nonsense(&host, &ask, &why))?;
        Ok((response, begin))
    }

    /// Asks an address that a descriptor names.
    async fn open_elsewhere(&mut self, url: &str) -> Result<Response, Failure> {
        let inner = self.repository.inner.clone();
        let url: Url = url
            .parse()
            .ok()
            .filter(|url: &Url| matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| Failure::wrong(format!("{url:?} is no address of http or https")))?;
        let mut host = self.hosts[0].0.clone();
        // Not one of the registry's: no settings, no credentials.
        host.tls = super::client::Tls::default();
        let ask = Ask {
            to: To::Url(url.clone()),
            stranger: true,
            ..Ask::new(Method::GET, String::new(), Vec::new())
        };
        let response = inner.once(&host, &ask).await?;
        if response.status() != StatusCode::OK {
            let status = response.status();
            return Err(Failure {
                kind: Kind::Status(status),
                error: Error::unknown(format!("GET {} answered {status}", shown(&url))),
            });
        }
        check_whole(&response, self.wanted.size)
            .and_then(|()| check_kind(&response))
            .map_err(|why| inner.nonsense(&host, &ask, &why))?;
        Ok(response)
    }
}

/// The value of Range for a part; None for the whole.
fn range(position: u64, end: u64, size: u64) -> Option<String> {
    match (position, end) {
        (0, end) if end == size => None,
        (position, end) => Some(format!("bytes={position}-{}", end - 1)),
    }
}

/// An answer with the whole of a blob says no other length than the blob's.
fn check_whole(response: &Response, size: u64) -> Result<(), String> {
    match response.content_length() {
        Some(length) if length != size => Err(format!("would send {length} bytes of a blob of {size}")),
        _ => Ok(()),
    }
}

/// An answer with a part of a blob has the part that was asked for.
fn check_range(value: Option<&str>, position: u64, end: u64, size: u64) -> Result<(), String> {
    let wrong = || format!("was asked for bytes {position} to {end} and sends {:?}", value.unwrap_or("some"));
    let (range, total) = value
        .and_then(|value| value.trim().strip_prefix("bytes "))
        .and_then(|value| value.split_once('/'))
        .ok_or_else(wrong)?;
    let (first, after) = range.split_once('-').ok_or_else(wrong)?;
    let first: u64 = first.trim().parse().map_err(|_| wrong())?;
    let after: u64 = after.trim().parse().map_err(|_| wrong())?;
    let total_fits = total.trim() == "*" || total.trim().parse() == Ok(size);
    // Less than was asked for is allowed: the rest is asked for when it is over.
    if first != position || after < first || after >= end || !total_fits {
        return Err(wrong());
    }
    Ok(())
}

fn check_kind(response: &Response) -> Result<(), String> {
    if is_html(response.headers()) {
        return Err("answered with an HTML page: is this the address of a registry?".into());
    }
    let encoding = response.headers().get(CONTENT_ENCODING).and_then(|value| value.to_str().ok());
    match encoding.unwrap_or("identity") {
        "identity" | "" => Ok(()),
        other => Err(format!("packs its answer as {other:?}, which it was not asked for")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_asked_for_only_where_a_part_is_wanted() {
        assert_eq!(range(0, 10, 10), None);
        assert_eq!(range(0, 5, 10).as_deref(), Some("bytes=0-4"));
        assert_eq!(range(9, 10, 10).as_deref(), Some("bytes=9-9"));
    }

    #[test]
    fn a_part_must_be_the_one_asked_for() {
        assert!(check_range(Some("bytes 5-9/10"), 5, 10, 10).is_ok());
        assert!(check_range(Some("bytes 5-7/*"), 5, 10, 10).is_ok(), "less is allowed");
        for wrong in [
            None,
            Some(""),
            Some("bytes"),
            Some("bytes 4-9/10"),
            Some("bytes 5-10/10"),
            Some("bytes 5-9/11"),
            Some("5-9/10"),
            Some("bytes 5-4/10"),
            Some("bytes */10"),
        ] {
            assert!(check_range(wrong, 5, 10, 10).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_asked_for_is_what_is_accepted(size in 1_u64..1000, a in 0_u64..1000, b in 0_u64..1000) {
            let (position, end) = (a.min(b) % size, (a.max(b) % size).max(a.min(b) % size) + 1);
            if let Some(range) = range(position, end, size) {
                let answer = format!("bytes {}/{size}", range.strip_prefix("bytes=").unwrap());
                prop_assert!(check_range(Some(&answer), position, end, size).is_ok());
                prop_assert!(check_range(Some(&answer), position + 1, end + 1, size).is_err());
            }
        }

        #[test]
        fn no_header_upsets_the_check(value in ".{0,40}") {
            let _ = check_range(Some(&value), 1, 2, 3);
        }
    }
}
