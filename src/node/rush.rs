//! Whether payments rush in: faster than they can be finished one by one.
//!
//! Whatever is done for one payment at a time costs nearly the same for many: a commit with its two
//! syncs, a signature, a message to each member, a thread that wakes up. A payment that comes
//! alone never waits. In a rush things are kept a little apart, so that each takes more of them
//! along and something is left of the machine for whoever asks.

use std::collections::VecDeque;
use std::time::Instant;

use crate::limits::{RUSH_PAYMENTS, RUSH_TIME};

/// The last payments, as far as they matter.
#[derive(Debug, Default)]
pub(super) struct Rush {
    payments: VecDeque<Instant>,
}

impl Rush {
    /// So many payments come now.
    pub(super) fn note(&mut self, payments: usize, now: Instant) {
        self.payments.extend(std::iter::repeat_n(now, payments.min(RUSH_PAYMENTS)));
        while self.payments.len() > RUSH_PAYMENTS {
            self.payments.pop_front();
        }
    }

    /// Whether there is one.
    pub(super) fn is_on(&self, now: Instant) -> bool {
        let first = self.payments.front().filter(|_| self.payments.len() >= RUSH_PAYMENTS);
        first.is_some_and(|first| now.duration_since(*first) < RUSH_TIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_after_the_other_is_no_rush_and_many_at_once_are() {
        let (mut rush, mut now) = (Rush::default(), Instant::now());
        assert!(!rush.is_on(now));
        for _ in 0..20 {
            rush.note(1, now);
            now += RUSH_TIME / u32::try_from(RUSH_PAYMENTS - 1).unwrap();
            assert!(!rush.is_on(now), "as fast as one alone can be");
        }
        rush.note(10 * RUSH_PAYMENTS, now);
        assert!(rush.is_on(now));
        // None at all does not end it, time does.
        rush.note(0, now);
        assert!(rush.is_on(now + RUSH_TIME / 2));
        assert!(!rush.is_on(now + RUSH_TIME));
    }
}
