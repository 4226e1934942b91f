//! Signals by name, and passing on those that ctr receives.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Names and numbers on Linux (x86-64, arm64, riscv64).
const SIGNALS: &[(&str, u32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// The realtime signals that glibc leaves to programs.
const REALTIME: (u32, u32) = (34, 64);

/// Parses `SIGTERM`, `TERM`, `term`, `15`, `RTMIN+3` or `RTMAX-1`.
pub(crate) fn parse(text: &str) -> Result<u32, String> {
    let fail = || format!("{text:?} is not a signal; use a name such as SIGTERM, or a number from 1 to 64");
    if let Ok(number) = text.parse::<u32>() {
        return if (1..=REALTIME.1).contains(&number) { Ok(number) } else { Err(fail()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<u32>().ok(),
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        offset(rest, '+').and_then(|offset| REALTIME.0.checked_add(offset))
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        offset(rest, '-').and_then(|offset| REALTIME.1.checked_sub(offset))
    } else {
        None
    };
    number.filter(|number| (REALTIME.0..=REALTIME.1).contains(number)).ok_or_else(fail)
}

/// Those that are passed on to the process: what a user or a service manager sends to ctr.
const FORWARDED: &[u32] = &[1, 2, 3, 10, 12, 14, 15, 18];

/// The signals sent to ctr, one at a time. While this lives they do not end ctr.
pub(crate) struct Received {
    receiver: tokio::sync::mpsc::Receiver<u32>,
}

impl Received {
    /// Begins to catch.
    pub(crate) fn listen() -> anyhow::Result<Received> {
        let (sender, receiver) = tokio::sync::mpsc::channel(32);
        for &number in FORWARDED {
            let mut stream: Signal = signal(SignalKind::from_raw(number as i32))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if sender.send(number).await.is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Received { receiver })
    }

    /// The next one's number.
    pub(crate) async fn next(&mut self) -> u32 {
        match self.receiver.recv().await {
            Some(number) => number,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_parse() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("sigkill", 9),
            ("RTMIN+3", 37),
            ("SIGRTMAX", 64),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for bad in ["", "0", "65", "-1", "SIGNOPE", "RTMIN+99", "RTMAX-40", "SIG"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
