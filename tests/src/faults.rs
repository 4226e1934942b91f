//! A proxy in front of a registry that does what bad registries and networks do, and counts what passes.
//!
//! It speaks HTTP/1.1, one request to a connection, and can answer by itself what has been planted in it, so that what no
//! registry would take can be pulled. Bytes of bodies pass through one gate, which stops all of them at an exact number.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use oci::Digest;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::image::Image;
use crate::registry::{Background, Registry};
use crate::wait_for;

/// What is done to an answer.
#[derive(Debug, Clone)]
pub enum Fault {
    /// No answer, ever.
    Stall,
    /// No more of the body after so many bytes, ever.
    StallAfter(u64),
    /// The connection is closed after so many bytes of the body.
    CutAfter(u64),
    /// The connection is reset after so many bytes of the body.
    ResetAfter(u64),
    /// The body comes in chunks, without a length; the connection is closed behind the first, of so many bytes.
    CutChunk(u64),
    /// The length is said to be so much more.
    Claim(i64),
    /// The byte at this place of the blob is another.
    Flip(u64),
    /// The client is sent elsewhere: the place, behind which the path comes if it ends with `*`.
    Redirect(String),
    /// These bytes are the whole answer, then the connection is closed.
    Raw(Bytes),
    /// A wanted range is not heeded: the whole comes.
    IgnoreRange,
    /// A wanted range comes under another's name.
    WrongRange,
    /// Few bytes at a time.
    Trickle,
    /// A header of the answer is this.
    Header(String, String),
}

impl Fault {
    /// An answer with this status, these headers (each with its line end) and a body.
    pub fn status(status: &str, headers: &str, body: &[u8]) -> Fault {
        let mut answer = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n",
            body.len()
        )
        .into_bytes();
        answer.extend_from_slice(body);
        Fault::Raw(answer.into())
    }

    /// A page that says well, as captive portals do.
    pub fn page() -> Fault {
        let body = b"<!DOCTYPE html><html><body>Please log in to the guests' network.</body></html>";
        Fault::status("200 OK", "Content-Type: text/html; charset=utf-8\r\n", body)
    }
}

struct Rule {
    pattern: String,
    fault: Fault,
    times: Option<u32>,
}

/// A request that came.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// `GET`, `HEAD`, `POST`, `PATCH`, `PUT`, `DELETE`.
    pub method: String,
    /// The path, with its query.
    pub target: String,
    /// The headers, their names in lower case.
    pub headers: Vec<(String, String)>,
    /// The status of the answer, as it came or would have come; 0 without one.
    pub status: u16,
    /// Bytes of the request's body that were passed on.
    pub sent: u64,
}

impl Seen {
    /// A header of the request.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

/// What passed, and what may.
#[derive(Debug, Clone, Copy, Default)]
struct Gate {
    passed: u64,
    limit: Option<u64>,
    /// How often the network was cut: what began before is closed.
    cuts: u64,
    down: bool,
}

struct Shared {
    upstream: Option<SocketAddr>,
    gate: watch::Sender<Gate>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    planted: BTreeMap<String, (String, Bytes)>,
    seen: Vec<Seen>,
    /// By digest, the pieces of it that were delivered: first byte and length.
    delivered: BTreeMap<String, Vec<(u64, u64)>>,
}

/// A running proxy.
pub struct Proxy {
    /// Where it serves, by plain http.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _background: Background,
}

impl Proxy {
    /// In front of a registry that speaks plain http.
    pub fn of(registry: &Registry) -> Self {
        Proxy::start(Some(registry.address))
    }

    /// In front of nothing: what is planted is all it has.
    pub fn alone() -> Self {
        Proxy::start(None)
    }

    fn start(upstream: Option<SocketAddr>) -> Self {
        let background = Background::new();
        let listener = background.runtime().block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            upstream,
            gate: watch::Sender::new(Gate::default()),
            state: Mutex::new(State::default()),
        });
        let serving = shared.clone();
        background.runtime().spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let shared = serving.clone();
                // A connection that breaks ends its task: that is what a proxy does.
                tokio::spawn(async move {
                    let _ = shared.connection(client).await;
                });
            }
        });
        Proxy { address, shared, _background: background }
    }

    /// The name of an image there: `REPOSITORY:TAG` or `REPOSITORY@DIGEST`, behind the address.
    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.address)
    }

    /// From now on, what matches the pattern (a part of `METHOD /path?query`) gets the fault. The first rule that matches counts.
    pub fn fault(&self, pattern: &str, fault: Fault) {
        self.add(pattern, fault, None);
    }

    /// As [`Self::fault`], so many times.
    pub fn fault_times(&self, times: u32, pattern: &str, fault: Fault) {
        self.add(pattern, fault, Some(times));
    }

    fn add(&self, pattern: &str, fault: Fault, times: Option<u32>) {
        self.shared.state.lock().unwrap().rules.push(Rule { pattern: pattern.to_owned(), fault, times });
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        self.shared.state.lock().unwrap().rules.clear();
    }

    /// Answers GET and HEAD of a path with these bytes.
    pub fn plant(&self, path: &str, media_type: &str, bytes: impl Into<Bytes>) {
        let planted = (media_type.to_owned(), bytes.into());
        self.shared.state.lock().unwrap().planted.insert(path.to_owned(), planted);
    }

    /// Serves an image, under this tag: the first that its index names.
    pub fn plant_image(&self, repository: &str, tag: &str, image: &Image) {
        for (digest, bytes) in &image.blobs {
            self.plant(
                &format!("/v2/{repository}/blobs/{digest}"),
                "application/octet-stream",
                bytes.clone(),
            );
            self.plant_manifest(repository, digest.as_str(), bytes);
        }
        let index: Value = serde_json::from_slice(&image.index).unwrap();
        let top = index["manifests"][0]["digest"].as_str().unwrap();
        let (_, bytes) = image.blobs.iter().find(|(digest, _)| digest.as_str() == top).unwrap();
        self.plant_manifest(repository, tag, bytes);
    }

    /// Serves a manifest or index under a tag or digest; nothing when the bytes are neither.
    pub fn plant_manifest(&self, repository: &str, tag: &str, bytes: &[u8]) {
        // Few blobs are documents, and those begin like one.
        let document: Option<Value> =
            bytes.starts_with(b"{").then(|| serde_json::from_slice(bytes).ok()).flatten();
        if let Some(kind) = document.as_ref().and_then(|document| document["mediaType"].as_str()) {
            self.plant(&format!("/v2/{repository}/manifests/{tag}"), kind, bytes.to_owned());
        }
    }

    /// The requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state.lock().unwrap().seen.clone()
    }

    /// How many requests matched a pattern, as in [`Self::fault`].
    pub fn count(&self, pattern: &str) -> usize {
        let state = self.shared.state.lock().unwrap();
        state.seen.iter().filter(|seen| format!("{} {}", seen.method, seen.target).contains(pattern)).count()
    }

    /// How many bytes of a blob were sent to clients, over all requests for it.
    pub fn delivered(&self, digest: &str) -> u64 {
        self.pieces(digest).iter().map(|(_, length)| length).sum()
    }

    /// The pieces of a blob that were sent to clients, in that order: the first byte and the length of each.
    pub fn pieces(&self, digest: &str) -> Vec<(u64, u64)> {
        self.shared.state.lock().unwrap().delivered.get(digest).cloned().unwrap_or_default()
    }

    /// All bytes of bodies that passed, either way.
    pub fn passed(&self) -> u64 {
        self.shared.gate.borrow().passed
    }

    /// Lets so many bytes more pass, then holds all there is, until [`Self::release`] or a cut.
    pub fn hold_after(&self, more: u64) {
        self.shared.gate.send_modify(|gate| gate.limit = Some(gate.passed + more));
    }

    /// Whether the limit of [`Self::hold_after`] has been reached.
    pub fn holds(&self) -> bool {
        let gate = *self.shared.gate.borrow();
        gate.limit == Some(gate.passed)
    }

    /// Waits for [`Self::holds`].
    pub fn wait_held(&self) {
        wait_for("the proxy to hold what passes", || self.holds());
    }

    /// Lets everything pass.
    pub fn release(&self) {
        self.shared.gate.send_modify(|gate| gate.limit = None);
    }

    /// Closes all connections; with `down`, new ones, too, until [`Self::mend`].
    pub fn cut(&self, down: bool) {
        self.shared.gate.send_modify(|gate| {
            gate.cuts += 1;
            gate.down = down;
            gate.limit = None;
        });
    }

    /// Ends what [`Self::cut`] began.
    pub fn mend(&self) {
        self.shared.gate.send_modify(|gate| gate.down = false);
    }

    /// The digests that were uploaded to their ends, each as often as that was done, with the bytes of the upload.
    pub fn uploads(&self) -> Vec<(String, u64)> {
        let seen = self.seen();
        let session = |target: &str| target.split('?').next().unwrap().to_owned();
        let ends = seen.iter().filter(|seen| seen.method == "PUT" && seen.status == 201);
        ends.filter_map(|end| {
            let digest = end.target.split(['?', '&']).find_map(|field| field.strip_prefix("digest="))?;
            let parts = seen.iter().filter(|part| session(&part.target) == session(&end.target));
            Some((digest.replace("%3A", ":"), parts.map(|part| part.sent).sum()))
        })
        .collect()
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

type Io<T> = std::io::Result<T>;

fn closed<T>() -> Io<T> {
    Err(std::io::ErrorKind::ConnectionAborted.into())
}

/// The first line and the headers of a message, and what came behind them.
struct Head {
    first: String,
    headers: Vec<(String, String)>,
    rest: Vec<u8>,
}

impl Head {
    async fn read(from: &mut OwnedReadHalf, mut bytes: Vec<u8>) -> Io<Head> {
        let end = loop {
            if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break end;
            }
            if from.read_buf(&mut bytes).await? == 0 {
                return closed();
            }
        };
        let rest = bytes.split_off(end + 4);
        let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let mut lines = text.split("\r\n");
        let first = lines.next().unwrap_or_default().to_owned();
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()))
            .collect();
        Ok(Head { first, headers, rest })
    }

    fn text(&self) -> String {
        let mut text = format!("{}\r\n", self.first);
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        text
    }

    fn set(&mut self, name: &str, value: &str) {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name.to_owned(), value.to_owned()));
    }

    fn status(&self) -> u16 {
        self.first.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }
}

/// Where a body comes from.
enum Body {
    Planted(Bytes),
    Upstream(Vec<u8>, OwnedReadHalf),
}

impl Body {
    async fn next(&mut self, most: usize) -> Io<Bytes> {
        match self {
            Body::Planted(bytes) => Ok(bytes.split_to(most.min(bytes.len()))),
            Body::Upstream(before, stream) => {
                if before.is_empty() {
                    before.resize(most, 0);
                    let read = stream.read(before).await?;
                    before.truncate(read);
                }
                let take = most.min(before.len());
                Ok(Bytes::from(before.drain(..take).collect::<Vec<u8>>()))
            }
        }
    }
}

/// The most of a body that passes at once.
const PIECE: usize = 16 << 10;

impl Shared {
    /// Waits until bytes may pass, up to these; how many.
    async fn pass(&self, want: u64, cuts: u64) -> Io<u64> {
        let mut watching = self.gate.subscribe();
        loop {
            let mut taken = None;
            // Others that wait need not hear of it: what they wait for is a higher limit.
            self.gate.send_if_modified(|gate| {
                if gate.cuts != cuts || gate.down {
                    taken = Some(None);
                    return false;
                }
                let may = want.min(gate.limit.map_or(u64::MAX, |limit| limit.saturating_sub(gate.passed)));
                if may > 0 {
                    gate.passed += may;
                    taken = Some(Some(may));
                }
                false
            });
            match taken {
                Some(Some(may)) => return Ok(may),
                Some(None) => return closed(),
                None => watching.changed().await.map_err(|_| std::io::ErrorKind::ConnectionAborted)?,
            }
        }
    }

    async fn cut(&self, cuts: u64) {
        let mut watching = self.gate.subscribe();
        let _ = watching.wait_for(|gate| gate.cuts != cuts || gate.down).await;
    }

    async fn connection(&self, client: TcpStream) -> Io<()> {
        let Gate { cuts, down, .. } = *self.gate.borrow();
        if down {
            return reset(&client);
        }
        client.set_nodelay(true)?;
        tokio::select! {
            ended = self.exchange(client, cuts) => ended,
            () = self.cut(cuts) => closed(),
        }
    }

    /// Takes one request, and answers it.
    async fn exchange(&self, client: TcpStream, cuts: u64) -> Io<()> {
        let (mut from, to) = client.into_split();
        let mut request = Head::read(&mut from, Vec::new()).await?;
        let mut words = request.first.split(' ').map(str::to_owned);
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let what = format!("{method} {target}");
        let (number, fault, planted) = {
            let mut state = self.state.lock().unwrap();
            state.seen.push(Seen {
                method: method.clone(),
                target: target.clone(),
                headers: request.headers.clone(),
                ..Seen::default()
            });
            let rule = state
                .rules
                .iter_mut()
                .find(|rule| rule.times != Some(0) && what.contains(rule.pattern.as_str()));
            let fault = rule.map(|rule| {
                rule.times = rule.times.map(|times| times - 1);
                rule.fault.clone()
            });
            let path = target.split('?').next().unwrap_or_default();
            (state.seen.len() - 1, fault, state.planted.get(path).cloned())
        };
        match &fault {
            Some(Fault::Stall) => std::future::pending().await,
            Some(Fault::Raw(bytes)) => return answer_raw(from, to, bytes).await,
            Some(Fault::Redirect(place)) => {
                let place = match place.strip_suffix('*') {
                    Some(place) => format!("{place}{target}"),
                    None => place.clone(),
                };
                let Fault::Raw(bytes) =
                    Fault::status("307 Temporary Redirect", &format!("Location: {place}\r\n"), b"")
                else {
                    unreachable!()
                };
                return answer_raw(from, to, &bytes).await;
            }
            Some(Fault::IgnoreRange) => request.headers.retain(|(name, _)| name != "range"),
            _ => {}
        }
        if let Some((media_type, bytes)) = planted {
            let (head, body) = planted_answer(&request, &media_type, &bytes);
            return self.answer(number, head, Body::Planted(body), to, fault, cuts).await;
        }
        let Some(upstream) = self.upstream else {
            let error = br#"{"errors":[{"code":"NAME_UNKNOWN","message":"nothing is planted there"}]}"#;
            self.state.lock().unwrap().seen[number].status = 404;
            let Fault::Raw(bytes) =
                Fault::status("404 Not Found", "Content-Type: application/json\r\n", error)
            else {
                unreachable!()
            };
            return answer_raw(from, to, &bytes).await;
        };
        request.set("connection", "close");
        let (mut above, mut up) = TcpStream::connect(upstream).await?.into_split();
        up.write_all(request.text().as_bytes()).await?;
        let sending = async {
            let mut body = Body::Upstream(std::mem::take(&mut request.rest), from);
            loop {
                let mut piece = body.next(PIECE).await?;
                if piece.is_empty() {
                    // The client has closed its side; what it asked for may still come.
                    return std::future::pending::<Io<Head>>().await;
                }
                while !piece.is_empty() {
                    let may = self.pass(piece.len() as u64, cuts).await?;
                    up.write_all(&piece.split_to(may as usize)).await?;
                    self.state.lock().unwrap().seen[number].sent += may;
                }
            }
        };
        let head = async {
            let mut head = Head::read(&mut above, Vec::new()).await?;
            while head.status() == 100 {
                head = Head::read(&mut above, head.rest).await?;
            }
            Io::Ok(head)
        };
        let mut head = tokio::select! { head = head => head?, head = sending => head? };
        let rest = std::mem::take(&mut head.rest);
        self.answer(number, head, Body::Upstream(rest, above), to, fault, cuts).await
    }

    async fn answer(
        &self,
        number: usize,
        mut head: Head,
        mut body: Body,
        mut to: OwnedWriteHalf,
        fault: Option<Fault>,
        cuts: u64,
    ) -> Io<()> {
        let status = head.status();
        let (target, no_body) = {
            let seen = &mut self.state.lock().unwrap().seen[number];
            seen.status = status;
            (seen.target.clone(), seen.method == "HEAD" || status == 204 || status == 304)
        };
        let range = header(&head.headers, "content-range").and_then(|range| {
            let range = range.strip_prefix("bytes ")?;
            range.split('-').next()?.parse::<u64>().ok()
        });
        let mut at = range.unwrap_or(0);
        head.set("connection", "close");
        let mut end = None;
        match &fault {
            Some(Fault::Claim(more)) => {
                let length: i64 = header(&head.headers, "content-length").unwrap_or("0").parse().unwrap();
                head.set("content-length", &(length + more).to_string());
            }
            Some(Fault::WrongRange) if let Some(first) = range => {
                let said = header(&head.headers, "content-range").unwrap().to_owned();
                let (ends, total) = said.strip_prefix("bytes ").unwrap().split_once('/').unwrap();
                let last: u64 = ends.split_once('-').unwrap().1.parse().unwrap();
                head.set("content-range", &format!("bytes {}-{}/{total}", first + 1, last + 1));
            }
            Some(Fault::Header(name, value)) => head.set(name, value),
            Some(Fault::CutChunk(_)) => {
                head.headers.retain(|(name, _)| name != "content-length");
                head.set("transfer-encoding", "chunked");
            }
            _ => {}
        }
        if let Some(
            Fault::StallAfter(most) | Fault::CutAfter(most) | Fault::ResetAfter(most) | Fault::CutChunk(most),
        ) = fault
        {
            end = Some(at + most);
        }
        to.write_all(head.text().as_bytes()).await?;
        if no_body {
            return to.shutdown().await;
        }
        // Of the blob that is at the end of the path, if it is one.
        let path = target.split('?').next().unwrap_or_default();
        let digest = path.rsplit_once("/blobs/").map(|(_, digest)| digest).filter(|_| status < 300);
        let most = if matches!(fault, Some(Fault::Trickle)) { 97 } else { PIECE };
        loop {
            let left = end.map_or(u64::MAX, |end| end.saturating_sub(at));
            if left == 0 {
                match fault {
                    Some(Fault::StallAfter(_)) => std::future::pending().await,
                    Some(Fault::ResetAfter(_)) => return reset(to.as_ref()),
                    _ => return to.shutdown().await,
                }
            }
            let mut piece = body.next(most.min(usize::try_from(left).unwrap_or(usize::MAX))).await?;
            if piece.is_empty() {
                if matches!(fault, Some(Fault::CutChunk(_))) {
                    to.write_all(b"0\r\n\r\n").await?;
                }
                return to.shutdown().await;
            }
            if matches!(fault, Some(Fault::Trickle)) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            while !piece.is_empty() {
                let may = self.pass(piece.len() as u64, cuts).await?;
                let mut part = piece.split_to(may as usize);
                if let Some(digest) = digest {
                    let mut state = self.state.lock().unwrap();
                    let pieces = state.delivered.entry(digest.to_owned()).or_default();
                    match pieces.last_mut() {
                        Some((first, length)) if *first + *length == at => *length += may,
                        _ => pieces.push((at, may)),
                    }
                }
                if let Some(Fault::Flip(place)) = fault
                    && (at..at + may).contains(&place)
                {
                    let mut bytes = part.to_vec();
                    bytes[(place - at) as usize] ^= 0xff;
                    part = bytes.into();
                }
                if matches!(fault, Some(Fault::CutChunk(_))) {
                    to.write_all(format!("{may:x}\r\n").as_bytes()).await?;
                }
                to.write_all(&part).await?;
                if matches!(fault, Some(Fault::CutChunk(_))) {
                    to.write_all(b"\r\n").await?;
                }
                at += may;
            }
        }
    }
}

fn reset(stream: &TcpStream) -> Io<()> {
    // Closed without lingering, a connection is reset.
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?;
    Ok(())
}

/// Answers, and reads what the client still sends, lest the answer be lost to a reset.
async fn answer_raw(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, bytes: &[u8]) -> Io<()> {
    let sending = async {
        to.write_all(bytes).await?;
        to.shutdown().await
    };
    let mut nowhere = tokio::io::sink();
    let (sent, _) = tokio::join!(sending, tokio::io::copy(&mut from, &mut nowhere));
    sent
}

/// The answer for what is planted, and the bytes of it that are wanted.
fn planted_answer(request: &Head, media_type: &str, bytes: &Bytes) -> (Head, Bytes) {
    let whole = bytes.len();
    let wanted = header(&request.headers, "range").and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        let first: usize = first.parse().ok()?;
        let last = last.parse().map_or(whole, |last: usize| (last + 1).min(whole));
        (first < last).then_some((first, last))
    });
    let mut headers = vec![
        ("content-type".to_owned(), media_type.to_owned()),
        ("docker-distribution-api-version".to_owned(), "registry/2.0".to_owned()),
        ("accept-ranges".to_owned(), "bytes".to_owned()),
    ];
    if !media_type.ends_with("octet-stream") {
        headers.push(("docker-content-digest".to_owned(), Digest::sha256_of(bytes).to_string()));
    }
    let (first, body) = match wanted {
        Some((first, last)) => {
            headers.push(("content-range".to_owned(), format!("bytes {first}-{}/{whole}", last - 1)));
            ("HTTP/1.1 206 Partial Content", bytes.slice(first..last))
        }
        None => ("HTTP/1.1 200 OK", bytes.clone()),
    };
    headers.push(("content-length".to_owned(), body.len().to_string()));
    (Head { first: first.to_owned(), headers, rest: Vec::new() }, body)
}
