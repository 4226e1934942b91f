//! What a transfer does, shown while it does it: bars on a terminal, a line for each change otherwise.
//!
//! ```text
//!  events of the engine --Board::apply--> lines, each by its name --Board::draw--> as many rows as the terminal has
//! ```
//!
//! Bars go to stderr, lines to stdout, unless the archive goes there. Events may come late, twice or not at all: a line never
//! goes back. Nothing of what an engine says of itself reaches the terminal but printable characters.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use proto::containerd::types::transfer::Progress as Event;

use crate::output;
use crate::progress::short;

/// Between two drawings.
const REDRAW: Duration = Duration::from_millis(100);
/// Columns of a name, where there is room.
const NAME: usize = 34;
/// Columns of what happens to it.
const EVENT: usize = 14;
/// Columns of a bar.
const BAR: usize = 24;
/// Lines that are kept at most; an engine tells of more than that only when it is broken.
const LINES: usize = 20_000;

/// One blob or image.
#[derive(Debug, Clone, Default)]
struct Line {
    name: String,
    /// On its way to or from somewhere, and, of layers, onto a snapshot: the two go on at the same time.
    copied: Step,
    unpacked: Step,
}

/// How far one of the two is.
#[derive(Debug, Clone, Default, PartialEq)]
struct Step {
    event: String,
    progress: u64,
    total: u64,
    /// What was there before: nobody waits for it.
    before: u64,
}

/// How far an event is on the way; later ones are not undone by earlier ones that come late.
fn rank(event: &str) -> u8 {
    match event {
        "" => 0,
        "waiting" | "resolving" => 1,
        "complete" | "already exists" | "extracted" | "saved" | "done" | "pushed content" => 3,
        _ => 2,
    }
}

fn is_unpack(event: &str) -> bool {
    matches!(event, "extracting" | "extracted" | "unpacking" | "unpacked")
}

impl Step {
    /// Whether the event changes what happens, and not only how far it is.
    fn apply(&mut self, event: &Event) -> bool {
        let (progress, total) =
            (u64::try_from(event.progress).unwrap_or(0), u64::try_from(event.total).unwrap_or(0));
        if rank(&event.event) < rank(&self.event) {
            return false;
        }
        let changed = self.event != event.event;
        if changed {
            self.event.clone_from(&event.event);
        }
        if event.event == "already exists" {
            self.before = progress.max(total);
        }
        self.total = self.total.max(total);
        self.progress = self.progress.max(progress);
        changed
    }

    fn is_over(&self) -> bool {
        rank(&self.event) == 3
    }
}

impl Line {
    fn is_over(&self) -> bool {
        self.copied.is_over() && (self.unpacked.event.is_empty() || self.unpacked.is_over())
            || self.copied.event.is_empty() && self.unpacked.is_over()
    }

    fn is_active(&self) -> bool {
        rank(&self.copied.event) == 2 || rank(&self.unpacked.event) == 2
    }

    /// What is shown: the copying until it is over, then the unpacking.
    fn shown(&self) -> &Step {
        match self.unpacked.event.is_empty() || rank(&self.copied.event) == 2 {
            true => &self.copied,
            false => &self.unpacked,
        }
    }

    fn draw(&self, width: usize) -> String {
        let step = self.shown();
        let mut event = step.event.clone();
        if std::ptr::eq(step, &raw const self.copied) && rank(&self.unpacked.event) == 2 {
            event.push('+');
        }
        // In a row, the kind of digest says less than the room it takes.
        let wide = NAME.min((width * 2 / 5).max(8));
        let name = fit(&self.name.replacen("sha256:", "", 1), wide);
        let mut text = format!("{name:wide$} {event:EVENT$}");
        if step.total > 0 && rank(&step.event) >= 2 {
            let done = if step.is_over() { step.total } else { step.progress.min(step.total) };
            // With little room the numbers are worth more than the bar.
            if width >= NAME + EVENT + BAR + 28 {
                text.push_str(&format!(" [{}]", bar(done, step.total, BAR)));
            }
            if step.is_over() {
                let _ = write!(text, " {}", size(step.total));
            } else {
                let _ = write!(text, " {}/{}", size(done), size(step.total));
            }
        } else if step.progress > 0 {
            let _ = write!(text, " {}", size(step.progress));
        }
        fit(&text, width)
    }
}

/// All that a transfer has told. Pure.
#[derive(Debug, Default)]
struct Board {
    lines: Vec<Line>,
    known: HashMap<String, usize>,
    /// Of the transfer as a whole.
    status: String,
}

impl Board {
    /// Takes an event in; the line to be printed, if something new happens.
    fn apply(&mut self, event: &Event) -> Option<String> {
        let text = clean(&event.event);
        if event.name.is_empty() {
            if self.status == text || text.is_empty() {
                return None;
            }
            self.status.clone_from(&text);
            return Some(text);
        }
        let event = Event { event: text, ..event.clone() };
        let at = match self.known.get(&event.name) {
            Some(at) => *at,
            None if self.lines.len() >= LINES => return None,
            None => {
                self.known.insert(event.name.clone(), self.lines.len());
                self.lines.push(Line { name: shown_name(&event.name), ..Line::default() });
                self.lines.len() - 1
            }
        };
        let line = &mut self.lines[at];
        let step = if is_unpack(&event.event) { &mut line.unpacked } else { &mut line.copied };
        let changed = step.apply(&event);
        // The image's name is the result, and told as such.
        if !changed || event.event == "saved" || event.event == "waiting" {
            return None;
        }
        let mut text = format!("{}: {}", line.name, event.event);
        if step.total > 0 {
            let _ = write!(text, " ({})", size(step.total));
        }
        Some(text)
    }

    /// Bytes copied since the beginning, and bytes to be copied in all.
    fn totals(&self) -> (u64, u64) {
        self.lines.iter().map(|line| &line.copied).fold((0, 0), |(done, total), step| {
            let whole = step.total.max(step.progress);
            let now = if step.is_over() { whole } else { step.progress };
            (
                done.saturating_add(now.saturating_sub(step.before)),
                total.saturating_add(whole.saturating_sub(step.before)),
            )
        })
    }

    /// How much, how fast and how long.
    fn summary(&self, elapsed: Duration) -> String {
        let (done, total) = self.totals();
        let seconds = elapsed.as_secs_f64();
        let mut text = format!("elapsed: {seconds:.1}s");
        if total > 0 {
            let speed = (done as f64 / seconds.max(0.001)) as u64;
            let of = if done == total { String::new() } else { format!(" of {}", size(total)) };
            let _ = write!(text, "  total: {}{of} ({}/s)", size(done), size(speed));
        }
        text
    }

    /// The rows of a terminal of this size. What goes on has the first claim, then what waits, then what is over.
    fn draw(&self, width: usize, height: usize, elapsed: Duration) -> Vec<String> {
        // The last column stays free: some terminals go to the next row when it is written.
        let width = width.saturating_sub(1).max(8);
        let room = height.saturating_sub(3).max(1);
        let mut shown: Vec<usize> = (0..self.lines.len()).collect();
        if shown.len() > room {
            shown.sort_by_key(|at| {
                let line = &self.lines[*at];
                match () {
                    () if line.is_active() => (0, *at),
                    () if !line.is_over() => (1, *at),
                    () => (2, usize::MAX - *at),
                }
            });
            shown.truncate(room);
            shown.sort_unstable();
        }
        let mut rows: Vec<String> = shown.iter().map(|at| self.lines[*at].draw(width)).collect();
        let hidden = self.lines.len() - shown.len();
        if hidden > 0 {
            let over = self.lines.iter().filter(|line| line.is_over()).count();
            rows.push(fit(&format!("... and {hidden} more; {over} of {} are done", self.lines.len()), width));
        }
        rows.push(fit(&format!("{}  {}", self.summary(elapsed), self.status), width));
        rows
    }
}

/// A size without blanks, as `1.5MiB`.
fn size(bytes: u64) -> String {
    output::bytes(i64::try_from(bytes).unwrap_or(i64::MAX)).replace(' ', "")
}

fn bar(done: u64, total: u64, width: usize) -> String {
    let filled = ((done as f64 / total.max(1) as f64) * width as f64) as usize;
    let filled = filled.min(width);
    let head = if filled == width || filled == 0 { "" } else { ">" };
    format!("{}{head}{}", "=".repeat(filled - head.len()), " ".repeat(width - filled))
}

/// Cuts a text to so many columns.
fn fit(text: &str, width: usize) -> String {
    text.chars().take(width).collect::<String>().trim_end().to_owned()
}

/// A text without what a terminal would take for an order.
fn clean(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '?' } else { char }).collect()
}

/// `layer-sha256:…` as `layer sha256:` and twelve digits; a name that is no digest as it is.
fn shown_name(name: &str) -> String {
    let name = clean(name);
    for kind in ["layer", "config", "manifest", "index", "unknown"] {
        let rest = name.strip_prefix(kind).and_then(|rest| rest.strip_prefix('-'));
        // What stands before an at sign is the image's name, which has a line of its own.
        let digest = rest.map(|rest| rest.rsplit_once('@').map_or(rest, |(_, digest)| digest));
        if let Some(digest) = digest.filter(|digest| oci::Digest::parse(digest).is_ok()) {
            return format!("{kind} {}", short(digest));
        }
    }
    name
}

/// How a transfer is shown. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Display(Arc<Mutex<Shown>>);

struct Shown {
    board: Board,
    began: Instant,
    way: Way,
    drawn: Option<Instant>,
}

enum Way {
    Quiet,
    /// A line for each change, to stdout or, for true, to stderr.
    Lines(bool),
    Bars(MultiProgress, Vec<ProgressBar>),
}

impl Display {
    /// With `data_on_stdout`, nothing else goes there.
    pub(crate) fn new(quiet: bool, data_on_stdout: bool) -> Display {
        let terminal = std::io::stderr().is_terminal() && (data_on_stdout || std::io::stdout().is_terminal());
        let way = match () {
            () if quiet => Way::Quiet,
            () if terminal => {
                Way::Bars(MultiProgress::with_draw_target(ProgressDrawTarget::stderr()), Vec::new())
            }
            () => Way::Lines(data_on_stdout),
        };
        let shown = Shown { board: Board::default(), began: Instant::now(), way, drawn: None };
        Display(Arc::new(Mutex::new(shown)))
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an event in.
    pub(crate) fn apply(&self, event: &Event) {
        let mut shown = self.lock();
        let line = shown.board.apply(event);
        match (&shown.way, line) {
            (Way::Lines(false), Some(line)) => println_or_not(&line),
            (Way::Lines(true), Some(line)) => eprintln!("{line}"),
            _ => {}
        }
        shown.redraw(false);
    }

    /// Counts bytes of something that ctr itself sends or receives.
    pub(crate) fn count(&self, name: &str, event: &str, progress: u64, total: u64) {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.apply(&Event {
            event: event.to_owned(),
            name: name.to_owned(),
            progress: number(progress),
            total: number(total),
            ..Event::default()
        });
    }

    /// Draws anew while `work` goes on, for the clock's sake, and a last time when it is done.
    pub(crate) async fn during<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let mut tick = tokio::time::interval(REDRAW);
        tokio::pin!(work);
        let done = loop {
            tokio::select! {
                done = &mut work => break done,
                _ = tick.tick() => self.lock().redraw(true),
            }
        };
        let mut shown = self.lock();
        shown.drawn = None;
        shown.redraw(true);
        let elapsed = shown.began.elapsed();
        let summary = shown.board.summary(elapsed);
        match &shown.way {
            Way::Lines(to_stderr) if done.is_ok() => match to_stderr {
                true => eprintln!("{summary}"),
                false => println_or_not(&summary),
            },
            _ => {}
        }
        done
    }
}

/// A reader that has gone (`| head`) does not stop the transfer.
fn println_or_not(line: &str) {
    let _ = output::line(line);
}

impl Drop for Shown {
    /// The last picture stays.
    fn drop(&mut self) {
        if let Way::Bars(_, bars) = &self.way {
            bars.iter().for_each(ProgressBar::abandon);
        }
    }
}

impl Shown {
    fn redraw(&mut self, due: bool) {
        let recent = self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW);
        let Way::Bars(all, bars) = &mut self.way else { return };
        if recent && !due || self.board.lines.is_empty() && self.board.status.is_empty() {
            return;
        }
        let (width, height) = size_of_terminal();
        let rows = self.board.draw(width, height, self.began.elapsed());
        while bars.len() > rows.len() {
            if let Some(bar) = bars.pop() {
                all.remove(&bar);
            }
        }
        while bars.len() < rows.len() {
            let bar = all.add(ProgressBar::no_length());
            if let Ok(style) = ProgressStyle::with_template("{msg}") {
                bar.set_style(style);
            }
            bars.push(bar);
        }
        for (bar, row) in bars.iter().zip(rows) {
            if bar.message() != row {
                bar.set_message(row);
            }
        }
        self.drawn = Some(Instant::now());
    }
}

/// Columns and rows of the terminal on stderr, or usual ones.
fn size_of_terminal() -> (usize, usize) {
    match sys::pty::size(std::io::stderr()) {
        Ok((columns, rows)) if columns > 0 && rows > 0 => (columns.into(), rows.into()),
        _ => (80, 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(name: &str, event: &str, progress: i64, total: i64) -> Event {
        Event { event: event.into(), name: name.into(), progress, total, ..Event::default() }
    }

    fn layer(number: usize) -> String {
        format!("layer-sha256:{number:064}")
    }

    #[test]
    fn a_line_never_goes_back() {
        let mut board = Board::default();
        let name = layer(7);
        assert_eq!(board.apply(&event(&name, "waiting", 0, 100)), None);
        let line = board.apply(&event(&name, "downloading", 10, 100)).unwrap();
        assert_eq!(line, "layer sha256:000000000000: downloading (100.0B)");
        assert_eq!(board.apply(&event(&name, "downloading", 60, 100)), None);
        assert!(board.apply(&event(&name, "extracting", 5, 100)).unwrap().contains("extracting"));
        assert!(board.lines[0].draw(120).contains("downloading+"), "both go on");
        assert!(board.apply(&event(&name, "complete", 100, 100)).unwrap().contains("complete"));
        for late in ["downloading", "waiting"] {
            assert_eq!(board.apply(&event(&name, late, 3, 100)), None);
        }
        assert!(!board.lines[0].is_over(), "it is still unpacked");
        assert!(board.lines[0].draw(120).contains("extracting"), "{}", board.lines[0].draw(120));
        board.apply(&event(&name, "extracted", 100, 100));
        assert!(board.lines[0].is_over());
        assert_eq!(board.totals(), (100, 100));
        // What was there is not told as fetched.
        board.apply(&event("x", "already exists", 900, 900));
        assert_eq!(board.totals(), (100, 100));
        assert_eq!(board.apply(&event("", "pulled", 0, 0)).unwrap(), "pulled");
        assert!(board.summary(Duration::from_secs(2)).contains("total: 100.0B (50.0B/s)"));
    }

    #[test]
    fn hundreds_of_layers_fit_a_small_terminal() {
        let mut board = Board::default();
        for number in 0..500 {
            let what = match number {
                0..300 => "complete",
                300..303 => "downloading",
                _ => "waiting",
            };
            // Twelve digits are shown.
            board.apply(&event(&format!("layer-sha256:{number:012}{number:052}"), what, 1 << 20, 4 << 20));
        }
        let rows = board.draw(60, 10, Duration::from_secs(1));
        assert_eq!(rows.len(), 9);
        assert!(rows.iter().all(|row| row.chars().count() < 60), "{rows:?}");
        assert_eq!(rows.iter().filter(|row| row.contains("downloading")).count(), 3, "{rows:#?}");
        assert_eq!(rows[7], "... and 493 more; 300 of 500 are done");
        assert!(rows[8].contains("elapsed: 1.0s"), "{rows:?}");
    }

    #[test]
    fn bars_grow() {
        assert_eq!(bar(0, 10, 10), "          ");
        assert_eq!(bar(5, 10, 10), "====>     ");
        assert_eq!(bar(10, 10, 10), "==========");
        assert_eq!(bar(99, 10, 10), "==========");
        let digest = oci::Digest::sha256_of(b"x").to_string();
        let shown = format!("manifest {}", &digest[..19]);
        assert_eq!(shown_name(&format!("manifest-{digest}")), shown);
        assert_eq!(shown_name(&format!("manifest-r.example:5000/x:1@{digest}")), shown);
        assert_eq!(shown_name("r.example:5000/a/rather/long:name"), "r.example:5000/a/rather/long:name");
        assert_eq!(shown_name("layer-of-paint"), "layer-of-paint");
        assert_eq!(shown_name("docker.io/library/x:1\x1b[2J"), "docker.io/library/x:1?[2J");
    }

    proptest! {
        /// Whatever an engine tells, in whatever order, on whatever terminal.
        #[test]
        fn nothing_breaks_the_picture(
            events in prop::collection::vec(
                ("[a-zé\u{1b}:-]{0,8}", prop::sample::select(vec![
                    "waiting", "downloading", "uploading", "complete", "extracting", "extracted", "already exists",
                    "saved", "odd\u{7}", "",
                ]), any::<i64>(), any::<i64>()),
                0..60,
            ),
            width in 0usize..200,
            height in 0usize..40,
        ) {
            let mut board = Board::default();
            for (name, what, progress, total) in events {
                let progress = progress >> 8;
                let total = total >> 8;
                if let Some(line) = board.apply(&event(&name, what, progress, total)) {
                    prop_assert!(!line.chars().any(char::is_control));
                }
                let rows = board.draw(width, height, Duration::from_millis(1));
                prop_assert!(rows.len() <= height.max(4));
                prop_assert!(rows.iter().all(|row| row.chars().count() < width.max(9)));
                prop_assert!(!rows.iter().any(|row| row.chars().any(char::is_control)));
            }
        }
    }
}
