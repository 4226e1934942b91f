//! From what a process writes to the lines of a CRI log, as a pure function of the bytes and the time.
//!
//! ```text
//!   2026-01-02T03:04:05.123456789Z stdout F text          a line
//!   2026-01-02T03:04:05.123456790Z stdout P text          a piece of one: longer than allowed, or never ended
//! ```
//!
//! Invariants: what lines come out does not depend on how the bytes were divided on their way; of a batch, times only
//! grow, since readers of logs take lines with one time and one text for the same. A carriage return before a line's
//! end belongs to the end, as in containerd. Nothing is kept but the line that has not ended, at most `max` + 1 bytes.

use std::io::BufRead;
use std::time::{Duration, SystemTime};

use shim_api::logs::Stream;

/// Output is handed on when there is so much of it.
pub(super) const BATCH: usize = 64 * 1024;

pub(super) struct Lines {
    max: usize,
    stamp: Stamp,
    /// The line that has not ended, for each stream.
    open: [Vec<u8>; 2],
}

impl Lines {
    pub(super) fn new(max: u64) -> Self {
        let max = usize::try_from(max).unwrap_or(usize::MAX).max(1);
        Self { max, stamp: Stamp::default(), open: [Vec::new(), Vec::new()] }
    }

    /// Lines from here on are of this time.
    pub(super) fn at(&mut self, time: SystemTime) {
        self.stamp.set(time);
    }

    /// Takes data until `out` holds a batch; how much it took.
    pub(super) fn push(&mut self, stream: Stream, data: &[u8], out: &mut Vec<u8>) -> usize {
        let mut rest = data;
        while !rest.is_empty() && out.len() < BATCH {
            let mut after = rest;
            // A slice cannot fail to be read.
            let length = after.skip_until(b'\n').unwrap_or(rest.len());
            let (line, ended) = match rest[..length].strip_suffix(b"\n") {
                Some(line) => (line, true),
                None => (&rest[..length], false),
            };
            let mut open = std::mem::take(&mut self.open[index(stream)]);
            if open.is_empty() && ended {
                self.cut(stream, line, true, out);
            } else {
                open.extend_from_slice(line);
                let used = self.cut(stream, &open, ended, out);
                open.drain(..used);
            }
            self.open[index(stream)] = open;
            rest = after;
        }
        data.len() - rest.len()
    }

    /// Writes down what has not ended and never will.
    pub(super) fn end(&mut self, stream: Stream, out: &mut Vec<u8>) {
        let open = std::mem::take(&mut self.open[index(stream)]);
        for piece in open.chunks(self.max) {
            self.line(stream, b'P', piece, out);
        }
    }

    /// A line of our own, to stand before others, whose time it gets.
    pub(super) fn note(&mut self, text: &str, before: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        self.line(Stream::Stderr, b'F', text.as_bytes(), &mut out);
        if let Some(time) = before.first_chunk::<30>() {
            out[..30].copy_from_slice(time);
        }
        out
    }

    /// Gives up memory that is not in use.
    pub(super) fn shrink(&mut self) {
        self.open.iter_mut().for_each(Vec::shrink_to_fit);
    }

    /// Writes what can be written of a line; how many bytes of it that used.
    fn cut(&mut self, stream: Stream, content: &[u8], ended: bool, out: &mut Vec<u8>) -> usize {
        let mut rest = content;
        if ended {
            rest = rest.strip_suffix(b"\r").unwrap_or(rest);
        }
        // It may turn out to belong to the line's end.
        let held = usize::from(!ended && rest.ends_with(b"\r"));
        while rest.len() > self.max + held {
            let (piece, more) = rest.split_at(self.max);
            self.line(stream, b'P', piece, out);
            rest = more;
        }
        if ended {
            self.line(stream, b'F', rest, out);
            return content.len();
        }
        content.len() - rest.len()
    }

    fn line(&mut self, stream: Stream, tag: u8, text: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(self.stamp.next());
        out.extend_from_slice(match stream {
            Stream::Stdout => b" stdout ",
            Stream::Stderr => b" stderr ",
        });
        out.extend_from_slice(&[tag, b' ']);
        out.extend_from_slice(text);
        out.push(b'\n');
    }
}

fn index(stream: Stream) -> usize {
    match stream {
        Stream::Stdout => 0,
        Stream::Stderr => 1,
    }
}

/// Times as text; the date is made anew only where it differs from the one before.
struct Stamp {
    /// Of the next line, since 1970.
    next: Duration,
    /// What `text` says.
    second: u64,
    text: [u8; 30],
}

impl Default for Stamp {
    fn default() -> Self {
        Self { next: Duration::ZERO, second: 0, text: *b"1970-01-01T00:00:00.000000000Z" }
    }
}

impl Stamp {
    fn set(&mut self, time: SystemTime) {
        let time = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // The clock may be coarse, or a little back.
        if time > self.next || self.next - time > Duration::from_millis(1) {
            self.next = time;
        }
    }

    fn next(&mut self) -> &[u8] {
        let second = self.next.as_secs();
        if second != self.second {
            self.second = second;
            let seconds = i64::try_from(second).unwrap_or(i64::MAX);
            let text = prost_types::Timestamp { seconds, nanos: 0 }.to_string();
            if let Some(date) = text.as_bytes().first_chunk::<19>() {
                self.text[..19].copy_from_slice(date);
            }
        }
        let mut left = self.next.subsec_nanos();
        for digit in self.text[20..29].iter_mut().rev() {
            *digit = b'0' + (left % 10) as u8;
            left /= 10;
        }
        self.next += Duration::from_nanos(1);
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The lines without their times, which are checked to grow.
    fn texts(out: &[u8]) -> Vec<String> {
        let mut last = Vec::new();
        let lines = out.split_inclusive(|byte| *byte == b'\n');
        lines
            .map(|line| {
                let line = line.strip_suffix(b"\n").unwrap();
                let (time, rest) = line.split_at(31);
                assert!(time > last.as_slice(), "{:?} after {last:?}", String::from_utf8_lossy(time));
                last = time.to_vec();
                rest.iter().map(|byte| char::from(*byte)).collect()
            })
            .collect()
    }

    fn all(max: u64, chunks: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::new(max);
        let mut out = Vec::new();
        for chunk in chunks {
            lines.at(SystemTime::now());
            let mut chunk = *chunk;
            while !chunk.is_empty() {
                let mut part = Vec::new();
                chunk = &chunk[lines.push(Stream::Stdout, chunk, &mut part)..];
                out.append(&mut part);
            }
            assert!(lines.open[0].len() as u64 <= max + 1);
        }
        lines.end(Stream::Stdout, &mut out);
        texts(&out)
    }

    #[test]
    fn times_are_as_the_format_wants_them() {
        let mut lines = Lines::new(9);
        let mut out = Vec::new();
        let time = |second, nanos| SystemTime::UNIX_EPOCH + Duration::new(second, nanos);
        lines.at(time(1_767_323_045, 999_999_999));
        lines.push(Stream::Stdout, b"one\ntwo\n", &mut out);
        lines.at(time(1_767_323_046, 0));
        lines.push(Stream::Stderr, b"three\n", &mut out);
        // Back by more than a coarse clock could be.
        lines.at(time(951_782_400, 5));
        lines.push(Stream::Stdout, b"\n", &mut out);
        let expected = "2026-01-02T03:04:05.999999999Z stdout F one\n\
                        2026-01-02T03:04:06.000000000Z stdout F two\n\
                        2026-01-02T03:04:06.000000001Z stderr F three\n\
                        2000-02-29T00:00:00.000000005Z stdout F \n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn a_note_has_the_time_of_what_it_stands_before() {
        let mut lines = Lines::new(9);
        let mut out = Vec::new();
        lines.at(SystemTime::UNIX_EPOCH + Duration::from_secs(60));
        lines.push(Stream::Stdout, b"one\ntwo\n", &mut out);
        let expected = "1970-01-01T00:01:00.000000000Z stderr F text\n";
        assert_eq!(String::from_utf8(lines.note("text", &out)).unwrap(), expected);
        assert_eq!(texts(&lines.note("more", b"")), ["stderr F more"]);
    }

    #[test]
    fn lines_are_cut_where_they_are_too_long_and_where_the_process_ends() {
        assert_eq!(all(4, &[b"1234\n"]), ["stdout F 1234"]);
        assert_eq!(all(4, &[b"12345\n"]), ["stdout P 1234", "stdout F 5"]);
        assert_eq!(all(4, &[b"12345678\n"]), ["stdout P 1234", "stdout F 5678"]);
        assert_eq!(all(4, &[b"1234", b"\n"]), ["stdout F 1234"]);
        assert_eq!(all(4, &[b"1234"]), ["stdout P 1234"]);
        assert_eq!(all(4, &[b"123456"]), ["stdout P 1234", "stdout P 56"]);
        assert_eq!(all(4, &[b"\n\n"]), ["stdout F ", "stdout F "]);
        assert_eq!(all(4, &[]), [""; 0]);
        assert_eq!(all(1, &[b"ab\n"]), ["stdout P a", "stdout F b"]);
    }

    #[test]
    fn a_carriage_return_belongs_to_the_line_end_behind_it() {
        assert_eq!(all(4, &[b"1234\r\n"]), ["stdout F 1234"]);
        assert_eq!(all(4, &[b"1234\r", b"\n"]), ["stdout F 1234"]);
        assert_eq!(all(4, &[b"1234\r", b"5\n"]), ["stdout P 1234", "stdout F \r5"]);
        assert_eq!(all(4, &[b"1234\r"]), ["stdout P 1234", "stdout P \r"]);
        assert_eq!(all(4, &[b"\r\n"]), ["stdout F "]);
        assert_eq!(all(4, &[b"\r\r\n"]), ["stdout F \r"]);
    }

    #[test]
    fn bytes_that_are_no_text_stay_as_they_are() {
        let mut bytes: Vec<u8> = (0..=255).filter(|byte| *byte != b'\n').collect();
        bytes.push(b'\n');
        let expected: String = bytes[..255].iter().map(|byte| char::from(*byte)).collect();
        assert_eq!(all(1000, &[&bytes]), [format!("stdout F {expected}")]);
    }

    #[test]
    fn a_batch_is_handed_on_before_it_grows() {
        let mut lines = Lines::new(16384);
        let input = vec![b'\n'; 1 << 16];
        let (mut taken, mut batches) = (0, 0);
        while taken < input.len() {
            let mut out = Vec::new();
            taken += lines.push(Stream::Stdout, &input[taken..], &mut out);
            assert!(out.len() <= BATCH + 64, "{}", out.len());
            batches += 1;
        }
        assert!(batches > 30, "{batches}");
    }

    #[test]
    fn streams_do_not_mix_within_a_line() {
        let mut lines = Lines::new(100);
        let mut out = Vec::new();
        lines.push(Stream::Stdout, b"o1 ", &mut out);
        lines.push(Stream::Stderr, b"e1\ne", &mut out);
        lines.push(Stream::Stdout, b"o2\n", &mut out);
        lines.end(Stream::Stderr, &mut out);
        assert_eq!(texts(&out), ["stderr F e1", "stdout F o1 o2", "stderr P e"]);
    }

    proptest! {
        #[test]
        fn how_the_bytes_were_divided_makes_no_difference(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), any::<u8>()], 0..600),
            cuts in proptest::collection::vec(0_usize..600, 0..40),
            max in 1_u64..50,
        ) {
            let whole = all(max, &[&bytes]);
            let mut places: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            places.extend([0, bytes.len()]);
            places.sort_unstable();
            let chunks: Vec<&[u8]> = places.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).collect();
            prop_assert_eq!(&all(max, &chunks), &whole);

            // And nothing is lost: the pieces joined are what was written.
            let mut joined = String::new();
            for line in &whole {
                prop_assert!(line.len() <= 2 * max as usize + 9);
                joined.push_str(&line[9..]);
                if line.starts_with("stdout F") {
                    joined.push('\n');
                }
            }
            let written: String = bytes.iter().map(|byte| char::from(*byte)).collect();
            prop_assert_eq!(joined, written.replace("\r\n", "\n"));
        }
    }
}
