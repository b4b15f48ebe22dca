//! When a commit waits for more.
//!
//! Each commit costs the same whatever is in it: two syncs, a signature, a message to each
//! member that has to check it. A payment that comes alone never waits. When payments come
//! faster than they can be finished one by one, commits are kept a little apart, so that each
//! takes more of them along and something is left of the machine for whoever asks.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::limits::{BETWEEN_COMMITS, RUSH_PAYMENTS, RUSH_TIME};

/// The last payments that were taken in, and when the last commit began.
#[derive(Debug, Default)]
pub(super) struct Rush {
    payments: VecDeque<Instant>,
    began: Option<Instant>,
}

impl Rush {
    /// A commit begins that takes in so many payments.
    pub(super) fn begin(&mut self, payments: usize, now: Instant) {
        self.began = Some(now);
        self.payments.extend(std::iter::repeat_n(now, payments.min(RUSH_PAYMENTS)));
        while self.payments.len() > RUSH_PAYMENTS {
            self.payments.pop_front();
        }
    }

    /// How long the next commit should wait.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        let first = self.payments.front().filter(|_| self.payments.len() >= RUSH_PAYMENTS);
        let rush = first.is_some_and(|first| now.duration_since(*first) < RUSH_TIME);
        match self.began.filter(|_| rush) {
            Some(began) => BETWEEN_COMMITS.saturating_sub(now.duration_since(began)),
            None => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_after_the_other_never_waits_and_many_at_once_do() {
        let (mut rush, mut now) = (Rush::default(), Instant::now());
        assert_eq!(rush.wait(now), Duration::ZERO);
        for _ in 0..20 {
            rush.begin(1, now);
            now += RUSH_TIME / u32::try_from(RUSH_PAYMENTS - 1).unwrap();
            assert_eq!(rush.wait(now), Duration::ZERO, "as fast as one alone can be");
        }
        rush.begin(10 * RUSH_PAYMENTS, now);
        assert_eq!(rush.wait(now), BETWEEN_COMMITS);
        assert_eq!(rush.wait(now + BETWEEN_COMMITS / 2), BETWEEN_COMMITS / 2);
        assert_eq!(rush.wait(now + BETWEEN_COMMITS), Duration::ZERO);
        // Commits of votes alone do not end it, time does.
        rush.begin(0, now + BETWEEN_COMMITS);
        assert!(rush.wait(now + BETWEEN_COMMITS) > Duration::ZERO);
        rush.begin(0, now + RUSH_TIME);
        assert_eq!(rush.wait(now + RUSH_TIME), Duration::ZERO);
    }
}
