//! Which streams a connection has, and which halves of them are open: no I/O.
//!
//! ```text
//!               client ends            we end
//!  open ---> both ------> ours alone ---------> (gone)
//!              \  we end                client ends
//!               `-------> client's alone -----> (gone)
//!  either side resets: (gone)
//! ```
//!
//! Invariants: there are never more than [`MAX`] streams. A number is used once; the client's are odd and grow.

use std::collections::BTreeMap;

use super::frame::{Reset, Violation};

/// The most streams at a time.
pub(super) const MAX: usize = 1024;

/// The streams of a connection, each with a `T`.
#[derive(Debug)]
pub(super) struct Session<T> {
    streams: BTreeMap<u32, Halves<T>>,
    last: u32,
    leaving: bool,
}

#[derive(Debug)]
struct Halves<T> {
    client: bool,
    ours: bool,
    of: T,
}

/// What becomes of what the client says of a stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict<T> {
    /// It is heeded.
    Good(T),
    /// It is late: the stream is gone.
    Late,
    /// The client is told that it cannot be.
    Bad(Reset),
}

impl<T> Default for Session<T> {
    fn default() -> Self {
        Session { streams: BTreeMap::new(), last: 0, leaving: false }
    }
}

impl<T: Clone> Session<T> {
    /// The client opens a stream; `fin`: it will not write; `unidirectional`: nobody else will.
    pub(super) fn open(
        &mut self,
        stream: u32,
        fin: bool,
        unidirectional: bool,
        make: impl FnOnce() -> T,
    ) -> Result<Verdict<T>, Violation> {
        if stream.is_multiple_of(2) || stream <= self.last {
            return Err(Violation("a stream with a number that is not the client's, or used"));
        }
        self.last = stream;
        if self.leaving || self.streams.len() >= MAX {
            return Ok(Verdict::Bad(Reset::Refused));
        }
        let of = make();
        if !(fin && unidirectional) {
            self.streams.insert(stream, Halves { client: !fin, ours: !unidirectional, of: of.clone() });
        }
        Ok(Verdict::Good(of))
    }

    /// The client writes into a stream; `fin`: for the last time.
    pub(super) fn receive(&mut self, stream: u32, fin: bool) -> Verdict<T> {
        match self.streams.get_mut(&stream) {
            None if stream <= self.last && !stream.is_multiple_of(2) => Verdict::Late,
            None => Verdict::Bad(Reset::InvalidStream),
            Some(halves) if !halves.client => Verdict::Bad(Reset::InvalidStream),
            Some(halves) => {
                let of = halves.of.clone();
                halves.client = !fin;
                if fin && !halves.ours {
                    self.streams.remove(&stream);
                }
                Verdict::Good(of)
            }
        }
    }

    /// Whether we may still write into a stream; `fin`: for the last time.
    pub(super) fn send(&mut self, stream: u32, fin: bool) -> bool {
        match self.streams.get_mut(&stream) {
            Some(halves) if halves.ours => {
                halves.ours = !fin;
                if fin && !halves.client {
                    self.streams.remove(&stream);
                }
                true
            }
            _ => false,
        }
    }

    /// Either side resets a stream; None when it is gone already.
    pub(super) fn reset(&mut self, stream: u32) -> Option<T> {
        self.streams.remove(&stream).map(|halves| halves.of)
    }

    /// What a stream has; None when it is gone.
    pub(super) fn of(&self, stream: u32) -> Option<T> {
        self.streams.get(&stream).map(|halves| halves.of.clone())
    }

    /// The client will open no more.
    pub(super) fn leave(&mut self) {
        self.leaving = true;
    }

    /// The streams that are there.
    pub(super) fn all(&self) -> Vec<(u32, T)> {
        self.streams.iter().map(|(stream, halves)| (*stream, halves.of.clone())).collect()
    }

    /// The last stream that was opened.
    pub(super) fn last(&self) -> u32 {
        self.last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stream_is_gone_when_both_sides_have_ended_it() {
        for ours_first in [true, false] {
            let mut session = Session::default();
            assert_eq!(session.open(1, false, false, || 'a'), Ok(Verdict::Good('a')));
            assert_eq!(session.receive(1, false), Verdict::Good('a'));
            for ours in [ours_first, !ours_first] {
                assert_eq!(session.of(1), Some('a'));
                match ours {
                    true => assert!(session.send(1, true) && !session.send(1, false)),
                    false => assert_eq!(session.receive(1, true), Verdict::Good('a')),
                }
            }
            assert_eq!((session.of(1), session.receive(1, false)), (None, Verdict::Late));
        }
    }

    #[test]
    fn what_a_client_may_not_do_is_told_from_what_comes_late() {
        let mut session = Session::default();
        for bad in [0, 2] {
            assert!(session.open(bad, false, false, || ()).is_err());
        }
        assert_eq!(session.open(5, true, false, || ()), Ok(Verdict::Good(())));
        assert!(
            session.open(5, false, false, || ()).is_err() && session.open(3, false, false, || ()).is_err()
        );
        assert_eq!(session.receive(5, false), Verdict::Bad(Reset::InvalidStream));
        assert_eq!(session.receive(7, false), Verdict::Bad(Reset::InvalidStream));
        assert_eq!((session.reset(5), session.reset(5)), (Some(()), None));
        assert_eq!(session.open(7, true, true, || ()), Ok(Verdict::Good(())));
        assert!(session.all().is_empty() && !session.send(7, true));
        session.leave();
        assert_eq!(session.open(9, false, false, || ()), Ok(Verdict::Bad(Reset::Refused)));
        assert_eq!(session.last(), 9);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Open(bool, bool),
        Receive(u32, bool),
        Send(u32, bool),
        Reset(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => any::<(bool, bool)>().prop_map(|(fin, one_way)| Step::Open(fin, one_way)),
            1 => (0..3000_u32, any::<bool>()).prop_map(|(stream, fin)| Step::Receive(stream, fin)),
            1 => (0..3000_u32, any::<bool>()).prop_map(|(stream, fin)| Step::Send(stream, fin)),
            1 => (0..3000_u32).prop_map(Step::Reset),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn streams_are_bounded_and_gone_ones_stay_gone(steps in prop::collection::vec(step(), 0..1600)) {
            let (mut session, mut next) = (Session::default(), 1);
            for step in steps {
                match step {
                    Step::Open(fin, one_way) => {
                        let _ = session.open(next, fin, one_way, || next).unwrap();
                        next += 2;
                    }
                    Step::Receive(stream, fin) => {
                        if let Verdict::Good(of) = session.receive(stream, fin) {
                            prop_assert_eq!(of, stream);
                            prop_assert!(!fin || !matches!(session.receive(stream, false), Verdict::Good(_)));
                        }
                    }
                    Step::Send(stream, fin) => {
                        let sent = session.send(stream, fin);
                        prop_assert!(!(sent && fin && session.send(stream, false)));
                    }
                    Step::Reset(stream) => {
                        session.reset(stream);
                        prop_assert_eq!(session.of(stream), None);
                        prop_assert!(!session.send(stream, false));
                    }
                }
                prop_assert!(session.streams.len() <= MAX);
            }
        }
    }
}
