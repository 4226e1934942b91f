//! Signals by name, as Linux has them.

/// The realtime signals that glibc leaves to programs, the first and the last.
pub const REALTIME: (u32, u32) = (34, 64);

/// Linux' signals by name, SIG taken off. Of several names of a number the first is the one it is reported by.
#[cfg(not(any(target_arch = "mips", target_arch = "mips64", target_arch = "sparc64")))]
pub const NAMES: &[(&str, u32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
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
    ("CLD", 17),
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
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// Reads `SIGTERM`, `TERM`, `term`, `15`, `RTMIN+3` or `RTMAX-1`; None for what is no signal.
pub fn parse(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=REALTIME.1).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<u32>().ok(),
    };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => REALTIME.0.checked_add(offset(rest, '+')?),
        (_, Some(rest)) => REALTIME.1.checked_sub(offset(rest, '-')?),
        _ => None,
    };
    number.filter(|number| (REALTIME.0..=REALTIME.1).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_read_in_every_spelling() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("sigkill", 9),
            ("sigquit", 3),
            ("37", 37),
            ("RTMIN+3", 37),
            ("RTMIN+15", 49),
            ("SIGRTMAX", 64),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse(text), Some(number), "{text}");
        }
        let bad =
            ["", "0", "65", "-1", "SIG", "SIGNOPE", "RTMIN+99", "SIGRTMIN+31", "SIGRTMIN-1", "RTMAX-40"];
        for bad in bad {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
