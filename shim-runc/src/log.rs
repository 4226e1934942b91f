//! The shim's log, written to the fifo `log` in its bundle, which the engine reads and copies to its own.
//!
//! Lines look as logrus writes them, for engines that parse them:
//! `time="2026-11-21T06:00:00Z" level=info msg="..." key=value`. A subscriber of this size costs next to nothing;
//! the general ones cost more memory than the rest of the shim.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

struct Log {
    output: File,
    level: Level,
}

/// Starts logging to the bundle's fifo. Without one it logs nothing.
pub(crate) fn start(bundle: &Path, debug: bool) {
    // Both ends and non-blocking: the reader may be away, and a full pipe must never stop the shim.
    let non_blocking = 0o4000;
    let path = bundle.join("log");
    if !sys::fifo::is_fifo(&path) {
        return;
    }
    if let Ok(output) = OpenOptions::new().read(true).write(true).custom_flags(non_blocking).open(&path) {
        let level = if debug { Level::DEBUG } else { Level::INFO };
        let _ = tracing::subscriber::set_global_default(Log { output, level });
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line { message: String::new(), fields: String::new() };
        event.record(&mut line);
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG | Level::TRACE => "debug",
        };
        let time = prost_types::Timestamp::from(SystemTime::now());
        let text = format!("time=\"{time}\" level={level} msg={:?}{}\n", line.message, line.fields);
        // One write: lines of several shims do not mix within PIPE_BUF.
        let _ = (&self.output).write_all(text.as_bytes());
    }
}

struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            let text = format!("{value:?}");
            let quoted = text.starts_with('"') || !text.contains([' ', '"', '\n']);
            let _ = if quoted {
                write!(self.fields, " {}={text}", field.name())
            } else {
                write!(self.fields, " {}={text:?}", field.name())
            };
        }
    }
}
