//! Whether the ledger has time for its own house.

use std::time::{Duration, Instant};

/// How long it is watched before that is said, and how often it is said anew.
const WATCHED: Duration = Duration::from_secs(2);

/// How much of its time the ledger's thread waits for something to do.
#[derive(Debug)]
pub(super) struct Quiet {
    since: Instant,
    waited: Duration,
    quiet: bool,
}

impl Quiet {
    pub(super) const fn new(now: Instant) -> Self {
        Self { since: now, waited: Duration::ZERO, quiet: false }
    }

    /// It has waited so long for something to do.
    pub(super) fn waited(&mut self, time: Duration) {
        self.waited += time;
    }

    /// Whether it lately waited three quarters of its time or more.
    pub(super) fn is_quiet(&mut self, now: Instant) -> bool {
        let watched = now.duration_since(self.since);
        if watched >= WATCHED {
            let quiet = self.waited * 4 >= watched * 3;
            *self = Self { quiet, ..Self::new(now) };
        }
        self.quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_quiet_when_it_has_waited_for_most_of_the_last_time() {
        let mut now = Instant::now();
        let mut quiet = Quiet::new(now);
        assert!(!quiet.is_quiet(now), "nothing is known yet");
        for (waited, expected) in [(75, true), (100, true), (74, false), (0, false), (80, true)] {
            quiet.waited(WATCHED * waited / 100);
            now += WATCHED;
            assert_eq!(quiet.is_quiet(now), expected, "{waited} %");
            assert_eq!(quiet.is_quiet(now + WATCHED / 2), expected, "until the next look");
        }
    }
}
