//! SPDY/3.1 as a server speaks it: a connection of streams that the client opens.
//!
//! ```text
//!  bytes --frame--> Frame --headers--> session: which streams there are
//!                             |  opened, data, ended, reset
//!                             v
//!                        link: Stream { input, output }
//! ```
//!
//! Invariants: one task reads and writes a connection; when either cannot go on, the connection is over, and all of its streams
//! with it. A client that does not speak the protocol is told so, once, and hung up on.

pub(super) mod frame;
pub(super) mod headers;
mod session;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::frame::{Decoder, Frame, Reset, Violation};
use self::headers::{Deflater, Headers, Inflater};
use self::session::{Session, Verdict};
use super::link::{
    self, Activity, Connection, Driver, Feeder, INITIAL_WINDOW, Maker, Outgoing, Stream, Window,
};

/// The reason of a GOAWAY for a client that does not speak the protocol.
const PROTOCOL_ERROR: u32 = 1;
/// How long such a client may take to hear of it.
const LAST_WORD: Duration = Duration::from_secs(1);
/// How much is written at a time.
const BATCH: usize = 64 << 10;

/// What the two ways of a connection know together.
struct Shared {
    session: Mutex<Session<Handle>>,
}

/// What is known of a stream.
#[derive(Clone)]
struct Handle {
    window: Arc<Window>,
    /// To be cancelled when the client resets it.
    gone: CancellationToken,
}

/// Serves a connection whose bytes come from here, until it is over.
pub(super) fn serve(io: impl AsyncRead + AsyncWrite + Send + 'static, idle: Duration) -> Connection {
    let (connection, driver) = link::connection(idle);
    tokio::spawn(drive(io, driver));
    connection
}

async fn drive(io: impl AsyncRead + AsyncWrite + Send, driver: Driver) {
    let Driver { opened, outgoing, credits, maker, cut } = driver;
    let (read_half, write_half) = tokio::io::split(io);
    let (queue, over, activity) = (maker.queue.clone(), maker.over.clone(), maker.activity.clone());
    let shared = Shared { session: Mutex::default() };
    let violation = {
        let reader =
            Reader { shared: &shared, maker, opened, feeders: HashMap::new(), window: INITIAL_WINDOW };
        let reading = reader.read(read_half, &activity);
        let writing = write(&shared, write_half, outgoing, credits, &activity);
        tokio::pin!(reading, writing);
        let violation = tokio::select! {
            end = &mut reading => end.err(),
            () = &mut writing => None,
            () = activity.idle() => {
                tracing::debug!("a streaming connection was idle for too long");
                None
            }
            () = cut.cancelled() => None,
        };
        if violation.is_some() {
            // Whoever has something to write fails from here on, so that there is room for the last word.
            over.cancel();
            let last = async {
                let _ = queue.send(Outgoing::GoAway(PROTOCOL_ERROR)).await;
                std::future::pending::<()>().await;
            };
            let said = async {
                tokio::select! {
                    () = &mut writing => {}
                    () = last => {}
                }
            };
            let _ = tokio::time::timeout(LAST_WORD, said).await;
        }
        violation
    };
    over.cancel();
    if let Some(error) = violation {
        tracing::debug!(%error, "a client does not speak SPDY");
    }
}

struct Reader<'a> {
    shared: &'a Shared,
    maker: Maker,
    opened: mpsc::Sender<Stream>,
    feeders: HashMap<u32, Feeder>,
    /// What the window of a new stream has.
    window: i64,
}

impl Reader<'_> {
    /// Reads until the client has gone.
    async fn read(mut self, mut io: impl AsyncRead + Unpin, activity: &Activity) -> Result<(), Violation> {
        let mut buffer = BytesMut::new();
        let (mut decoder, mut inflater) = (Decoder::default(), Inflater::new());
        loop {
            while let Some(frame) = decoder.decode(&mut buffer)? {
                self.receive(frame, &mut inflater).await?;
            }
            buffer.reserve(link::PIECE);
            match io.read_buf(&mut buffer).await {
                Ok(1..) => activity.touch(),
                Ok(0) | Err(_) => return Ok(()),
            }
        }
    }

    async fn receive(&mut self, frame: Frame, inflater: &mut Inflater) -> Result<(), Violation> {
        match frame {
            Frame::SynStream { stream, fin, unidirectional, headers } => {
                let headers = inflater.inflate(&headers)?;
                self.open(stream, fin, unidirectional, headers).await?;
            }
            Frame::Data { stream, fin, bytes } => self.data(stream, fin, bytes).await,
            Frame::Headers { stream, fin, headers } => {
                // What they say is of no use, but the next ones build upon them.
                inflater.inflate(&headers)?;
                self.data(stream, fin, Bytes::new()).await;
            }
            Frame::SynReply { headers, .. } => {
                inflater.inflate(&headers)?;
            }
            Frame::RstStream { stream, .. } => {
                if let Some(handle) = self.shared.session.lock().reset(stream) {
                    handle.gone.cancel();
                }
                self.feeders.remove(&stream);
            }
            // Even ones answer pings of ours, of which there are none.
            Frame::Ping { id } if !id.is_multiple_of(2) => self.say(Outgoing::Pong(id)).await,
            Frame::GoAway { .. } => self.shared.session.lock().leave(),
            Frame::WindowUpdate { stream, delta } => self.more_room(stream, delta).await?,
            Frame::Settings { initial_window: Some(value) } => self.new_window(value)?,
            Frame::Settings { .. } | Frame::Ping { .. } | Frame::Unknown => {}
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, fin: bool, one_way: bool, headers: Headers) -> Result<(), Violation> {
        let handle =
            || Handle { window: Arc::new(Window::new(self.window)), gone: self.maker.over.child_token() };
        let verdict = self.shared.session.lock().open(id, fin, one_way, handle)?;
        match verdict {
            Verdict::Good(handle) => {
                let (stream, feeder) = self.maker.stream(id, headers, handle.window, handle.gone);
                if !fin {
                    self.feeders.insert(id, feeder);
                }
                if let Err(unwanted) = self.opened.send(stream).await {
                    drop(unwanted);
                    self.say(Outgoing::Reset(id, Reset::Refused as u32)).await;
                }
            }
            Verdict::Late => {}
            Verdict::Bad(why) => self.say(Outgoing::Reset(id, why as u32)).await,
        }
        Ok(())
    }

    async fn data(&mut self, stream: u32, fin: bool, bytes: Bytes) {
        let verdict = self.shared.session.lock().receive(stream, fin);
        match verdict {
            Verdict::Good(_) => {
                if let Some(feeder) = self.feeders.get(&stream) {
                    feeder.feed(bytes).await;
                }
                if fin {
                    self.feeders.remove(&stream);
                }
            }
            Verdict::Late => {}
            Verdict::Bad(why) => self.say(Outgoing::Reset(stream, why as u32)).await,
        }
    }

    async fn more_room(&mut self, stream: u32, delta: u32) -> Result<(), Violation> {
        let windows = self.maker.windows.clone();
        windows.keep();
        if stream == 0 {
            return match windows.connection().add(delta.into()) {
                true => Ok(()),
                false => Err(Violation("a window of more than 2 GiB")),
            };
        }
        let handle = self.shared.session.lock().of(stream);
        if let Some(handle) = handle
            && !handle.window.add(delta.into())
        {
            self.say(Outgoing::Reset(stream, Reset::FlowControl as u32)).await;
        }
        Ok(())
    }

    fn new_window(&mut self, value: u32) -> Result<(), Violation> {
        let value = i64::from(value);
        if value > i64::from(i32::MAX) {
            return Err(Violation("a window of more than 2 GiB"));
        }
        self.maker.windows.keep();
        let delta = value - std::mem::replace(&mut self.window, value);
        for (_, handle) in self.shared.session.lock().all() {
            handle.window.add(delta);
        }
        Ok(())
    }

    async fn say(&self, what: Outgoing) {
        // It fails when the writer has ended, and the connection with it.
        let _ = self.maker.queue.send(what).await;
    }
}

/// Writes until a GOAWAY is written, or nothing more can be.
async fn write(
    shared: &Shared,
    mut io: impl AsyncWrite + Unpin,
    mut outgoing: mpsc::Receiver<Outgoing>,
    mut credits: mpsc::UnboundedReceiver<(u32, u32)>,
    activity: &Activity,
) {
    let mut deflater = Deflater::new();
    let mut batch = BytesMut::new();
    loop {
        let mut last = tokio::select! {
            next = outgoing.recv() => match next {
                Some(next) => encode(shared, next, &mut deflater, &mut batch),
                None => return,
            },
            Some((stream, delta)) = credits.recv() => {
                for stream in [stream, 0] {
                    Frame::WindowUpdate { stream, delta }.encode(&mut batch);
                }
                false
            }
        };
        while !last && batch.len() < BATCH {
            match outgoing.try_recv() {
                Ok(next) => last = encode(shared, next, &mut deflater, &mut batch),
                Err(_) => break,
            }
        }
        if io.write_all(&batch).await.is_err() || io.flush().await.is_err() {
            return;
        }
        batch.clear();
        activity.touch();
        if last {
            let _ = io.shutdown().await;
            // It is the client's turn to go.
            return std::future::pending().await;
        }
    }
}

/// Appends the frames of what is to be said; true when it is the last word.
fn encode(shared: &Shared, outgoing: Outgoing, deflater: &mut Deflater, batch: &mut BytesMut) -> bool {
    let mut session = shared.session.lock();
    match outgoing {
        Outgoing::Accept(stream) => {
            if session.send(stream, false) {
                let headers = deflater.deflate(&Headers::new());
                Frame::SynReply { stream, fin: false, headers }.encode(batch);
            }
        }
        Outgoing::Data(stream, bytes) => {
            if session.send(stream, false) {
                Frame::Data { stream, fin: false, bytes }.encode(batch);
            }
        }
        Outgoing::End(stream) => {
            if session.send(stream, true) {
                Frame::Data { stream, fin: true, bytes: Bytes::new() }.encode(batch);
            }
        }
        Outgoing::Reset(stream, status) => {
            session.reset(stream);
            Frame::RstStream { stream, status }.encode(batch);
        }
        Outgoing::Leave(stream) => {
            if session.reset(stream).is_some() {
                Frame::RstStream { stream, status: Reset::Cancel as u32 }.encode(batch);
            }
        }
        Outgoing::Pong(id) => Frame::Ping { id }.encode(batch),
        Outgoing::ResetAll => {
            for (stream, _) in session.all() {
                session.reset(stream);
                Frame::RstStream { stream, status: Reset::Cancel as u32 }.encode(batch);
            }
        }
        Outgoing::GoAway(status) => {
            Frame::GoAway { last: session.last(), status }.encode(batch);
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests;
