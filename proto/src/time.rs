//! Points in time between the wire (`google.protobuf.Timestamp`) and the standard library.
//!
//! Go peers write their zero time, 1 January of the year 1, where there is no time (the exit of a process that
//! still runs). Reading treats it as absent; writing absence means leaving the field out, which Go reads as
//! the Unix epoch, or writing [`GO_ZERO`] where a client tells the two apart.

use std::time::SystemTime;

use prost_types::Timestamp;

/// Go's zero `time.Time`: "no time".
pub const GO_ZERO: Timestamp = Timestamp { seconds: -62_135_596_800, nanos: 0 };

/// The last second that a `Timestamp` may name: the end of the year 9999.
const LAST_SECOND: i64 = 253_402_300_799;

/// To the wire, at nanosecond resolution.
pub fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

/// From the wire; `None` where the field is missing, [`GO_ZERO`], or out of protobuf's range.
pub fn system_time(timestamp: Option<&Timestamp>) -> Option<SystemTime> {
    let timestamp = timestamp.filter(|timestamp| **timestamp != GO_ZERO)?;
    // A peer may write any number; beyond these, formatting as RFC 3339 would fail.
    (GO_ZERO.seconds..=LAST_SECOND).contains(&timestamp.seconds).then_some(())?;
    SystemTime::try_from(*timestamp).ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn nanoseconds_survive_on_both_sides_of_the_epoch() {
        for time in [
            UNIX_EPOCH,
            UNIX_EPOCH + Duration::new(1_764_000_000, 123_456_789),
            UNIX_EPOCH - Duration::new(1, 999_999_999),
        ] {
            assert_eq!(system_time(Some(&timestamp(time))), Some(time));
        }
    }

    #[test]
    fn no_time_is_none() {
        assert_eq!(system_time(None), None);
        assert_eq!(system_time(Some(&GO_ZERO)), None);
        assert_eq!(system_time(Some(&Timestamp { seconds: i64::MAX, nanos: i32::MAX })), None);
    }
}
