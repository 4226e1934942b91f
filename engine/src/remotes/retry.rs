//! Whether, and when, something is tried again. Pure, but for the jitter.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::{Duration, SystemTime};

use reqwest::StatusCode;

use super::Limits;

/// What an answer asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advice {
    /// It is final, good or bad.
    Final,
    /// The host is busy: again, here, after what it says.
    Busy,
    /// The host is in trouble: another host, or again.
    Trouble,
}

/// What a status asks for.
pub(super) fn advice(status: StatusCode) -> Advice {
    match status.as_u16() {
        408 | 429 => Advice::Busy,
        500 | 502..=504 => Advice::Trouble,
        _ => Advice::Final,
    }
}

/// The wait before attempt `number` (1 is the first repetition). `asked` is the host's Retry-After, `jitter` of 0 to 1
/// spreads those who failed together.
pub(super) fn wait(limits: &Limits, number: u32, asked: Option<Duration>, jitter: f64) -> Duration {
    let doubled = limits.backoff.saturating_mul(1 << number.saturating_sub(1).min(16));
    let own = doubled.min(limits.longest).mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0));
    match asked {
        // Never before the host's time, unless that is longer than anyone waits; and not all at the same moment.
        Some(asked) => asked.min(limits.longest) + own.min(Duration::from_secs(1)),
        None => own,
    }
}

/// The value of Retry-After: seconds, or a date.
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let form = time::macros::format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    let date = time::PrimitiveDateTime::parse(value, form).ok()?.assume_utc();
    let left = date - time::OffsetDateTime::from(now);
    Some(Duration::try_from(left).unwrap_or(Duration::ZERO))
}

/// A number from 0 to 1, another at each call.
pub(super) fn jitter() -> f64 {
    // The keys of each RandomState differ.
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn busy_hosts_are_told_from_final_answers() {
        for (status, wanted) in [
            (200, Advice::Final),
            (404, Advice::Final),
            (401, Advice::Final),
            (501, Advice::Final),
            (408, Advice::Busy),
            (429, Advice::Busy),
            (500, Advice::Trouble),
            (503, Advice::Trouble),
        ] {
            assert_eq!(advice(StatusCode::from_u16(status).unwrap()), wanted, "{status}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(retry_after(" 7 ", now), Some(Duration::from_secs(7)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:47 GMT", now), Some(Duration::from_secs(10)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:00:00 GMT", now), Some(Duration::ZERO), "is over");
        for wrong in ["", "-1", "soon", "1.5"] {
            assert_eq!(retry_after(wrong, now), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn waits_grow_within_their_bounds(number in 1_u32..100, jitter in 0.0..1.0, asked in prop::option::of(0_u64..10_000)) {
            let limits = Limits::default();
            let asked = asked.map(Duration::from_secs);
            let wait = wait(&limits, number, asked, jitter);
            prop_assert!(wait <= limits.longest + Duration::from_secs(1));
            prop_assert!(wait >= limits.backoff / 2);
            if let Some(asked) = asked {
                prop_assert!(wait >= asked.min(limits.longest));
            }
        }

        #[test]
        fn jitter_stays_between_nothing_and_one(_ in 0..50) {
            prop_assert!((0.0..1.0).contains(&jitter()));
        }

        #[test]
        fn no_header_upsets_the_parser(value in ".{0,60}") {
            let _ = retry_after(&value, SystemTime::now());
        }
    }
}
