//! What an address that was given out stands for, until it is asked for: once, and soon.
//!
//! Invariants: a token is good once, for [`VALID`]. No more than [`MAX`] are in hand at a time. Who knows none cannot guess one: a token
//! has 128 random bits.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::random::random;

/// How long a token is good.
const VALID: Duration = Duration::from_secs(60);
/// The most tokens in hand.
const MAX: usize = 1000;

/// Tokens, each for a `T`.
pub(super) struct Tokens<T>(Mutex<Hand<T>>);

struct Hand<T> {
    of: HashMap<String, T>,
    /// When they end, the first of them first; those that were taken are still here.
    ends: VecDeque<(Instant, String)>,
}

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Tokens(Mutex::new(Hand { of: HashMap::new(), ends: VecDeque::new() }))
    }
}

impl<T> Tokens<T> {
    /// A token for this; ResourceExhausted when there are too many.
    pub(super) fn give(&self, of: T, now: Instant) -> Result<String> {
        let token = URL_SAFE_NO_PAD.encode(random::<16>()?);
        let mut hand = self.0.lock();
        hand.forget(now);
        if hand.of.len() >= MAX {
            return Err(Error::resource_exhausted(format!(
                "{MAX} streams were asked for within a minute and not opened; try again in a minute"
            )));
        }
        hand.of.insert(token.clone(), of);
        hand.ends.push_back((now + VALID, token.clone()));
        Ok(token)
    }

    /// What a token is for, if it is good; it is not any more.
    pub(super) fn take(&self, token: &str, now: Instant) -> Option<T> {
        let mut hand = self.0.lock();
        hand.forget(now);
        hand.of.remove(token)
    }
}

impl<T> Hand<T> {
    fn forget(&mut self, now: Instant) {
        while let Some((end, token)) = self.ends.front()
            && (*end <= now || !self.of.contains_key(token))
        {
            self.of.remove(token);
            self.ends.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_once_and_for_a_minute() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        let (first, second) = (tokens.give(1, now).unwrap(), tokens.give(2, now).unwrap());
        assert_eq!(first.len(), 22);
        assert_ne!(first, second);
        assert_eq!(tokens.take(&first, now + VALID - Duration::from_millis(1)), Some(1));
        assert_eq!(tokens.take(&first, now), None);
        assert_eq!(tokens.take(&second, now + VALID), None);
        assert_eq!(tokens.take("", now), None);
    }

    #[test]
    fn tokens_are_bounded_and_taken_ones_do_not_count() {
        let (tokens, now) = (Tokens::default(), Instant::now());
        let given: Vec<_> = (0..MAX).map(|of| tokens.give(of, now).unwrap()).collect();
        assert!(matches!(tokens.give(0, now), Err(Error::ResourceExhausted(_))));
        assert_eq!(tokens.take(&given[MAX / 2], now), Some(MAX / 2));
        tokens.give(0, now).unwrap();
        assert!(tokens.give(0, now).is_err());
        tokens.give(0, now + VALID).unwrap();
        assert_eq!(tokens.0.lock().ends.len(), 1);
    }
}
