//! How the ledger's thread takes in what it has to do, and when a commit waits for more.

use std::time::{Duration, Instant};

use super::input::{Input, Queues, Work};
use super::quiet::Quiet;
use super::rush::Rush;
use crate::limits::{BETWEEN_COMMITS, MAX_EVENTS_PER_COMMIT, UNAWAITED_COMMIT};

/// The ledger's end of the queues, and how busy it is with them.
pub(super) struct Intake {
    queues: Queues,
    rush: Rush,
    quiet: Quiet,
    last_commit: Instant,
    /// Until when the batch at hand may wait for more, and how much more.
    until: Instant,
    left: usize,
}

impl Intake {
    pub(super) fn new(queues: Queues, now: Instant) -> Self {
        Self { queues, rush: Rush::default(), quiet: Quiet::new(now), last_commit: now, until: now, left: 0 }
    }

    /// A new batch: lets some gather if there is a rush, waits for something to do if there is
    /// nothing, but not longer than this, and takes all that is there, up to a commit's worth.
    pub(super) fn gather(&mut self, patience: Duration) -> Vec<Work> {
        std::thread::sleep(self.apart(Instant::now()));
        self.left = MAX_EVENTS_PER_COMMIT;
        let work = self.wait(patience);
        self.until = Instant::now() + UNAWAITED_COMMIT;
        work
    }

    /// More for the same batch, of which nobody would be told. Nothing if none comes soon, or the
    /// batch has waited long enough or is a commit's worth.
    pub(super) fn gather_more(&mut self, now: Instant) -> Vec<Work> {
        let patience = self.until.saturating_duration_since(now);
        if patience.is_zero() || self.left == 0 {
            return Vec::new();
        }
        self.wait(patience)
    }

    fn wait(&mut self, patience: Duration) -> Vec<Work> {
        let mut work = Vec::new();
        if !patience.is_zero() {
            let began = Instant::now();
            let stop = || Work { input: Input::Stop, place: None };
            crossbeam_channel::select_biased! {
                recv(self.queues.agreement) -> first => work.push(first.unwrap_or_else(|_| stop())),
                recv(self.queues.members) -> first => work.push(first.unwrap_or_else(|_| stop())),
                recv(self.queues.wallets) -> first => work.push(first.unwrap_or_else(|_| stop())),
                default(patience) => {}
            }
            self.quiet.waited(began.elapsed());
        }
        let payments = self.queues.members.try_iter().chain(self.queues.wallets.try_iter());
        let more = self.queues.agreement.try_iter().chain(payments);
        work.extend(more.take(self.left.saturating_sub(work.len())));
        self.left = self.left.saturating_sub(work.len());
        work
    }

    /// A commit begins that takes in so many payments.
    pub(super) fn begin_commit(&mut self, payments: usize, now: Instant) {
        self.rush.note(payments, now);
        self.last_commit = now;
    }

    /// How long the next commit should wait.
    fn apart(&self, now: Instant) -> Duration {
        if self.rush.is_on(now) {
            BETWEEN_COMMITS.saturating_sub(now.saturating_duration_since(self.last_commit))
        } else {
            Duration::ZERO
        }
    }

    /// Whether payments rush in.
    pub(super) fn is_rush(&self, now: Instant) -> bool {
        self.rush.is_on(now)
    }

    /// Whether it has little to do.
    pub(super) fn is_quiet(&mut self, now: Instant) -> bool {
        self.quiet.is_quiet(now)
    }
}

#[cfg(test)]
mod tests {
    use super::super::input::queues;
    use super::*;
    use crate::consensus::Event;
    use crate::limits::{RUSH_PAYMENTS, RUSH_TIME};

    fn tick() -> Work {
        Work { input: Input::Event(Event::Tick), place: None }
    }

    #[test]
    fn a_batch_that_nobody_waits_for_ends_though_more_keeps_coming() {
        let (inputs, queues) = queues();
        let mut intake = Intake::new(queues, Instant::now());
        let send = |n: usize| (0..n).for_each(|_| inputs.members.send(tick()).unwrap());
        send(1);
        assert_eq!(intake.gather(Duration::ZERO).len(), 1);
        send(2);
        let until = intake.until;
        assert_eq!(intake.gather_more(until - UNAWAITED_COMMIT).len(), 2);
        send(3);
        assert_eq!(intake.gather_more(until).len(), 0, "it has waited long enough");
        assert_eq!(intake.gather(Duration::ZERO).len(), 3, "they are in the next one");

        send(MAX_EVENTS_PER_COMMIT + 5);
        let until = intake.until;
        assert_eq!(intake.gather_more(until - UNAWAITED_COMMIT).len(), MAX_EVENTS_PER_COMMIT - 3);
        assert_eq!(intake.gather_more(until - UNAWAITED_COMMIT).len(), 0, "it is a commit's worth");
        assert_eq!(intake.gather(Duration::ZERO).len(), 8);
    }

    #[test]
    fn commits_are_apart_while_payments_rush_in() {
        let (_inputs, queues) = queues();
        let mut now = Instant::now();
        let mut intake = Intake::new(queues, now);
        for _ in 0..20 {
            intake.begin_commit(1, now);
            now += RUSH_TIME / u32::try_from(RUSH_PAYMENTS - 1).unwrap();
            assert_eq!(intake.apart(now), Duration::ZERO, "as fast as one alone can be");
        }
        intake.begin_commit(10 * RUSH_PAYMENTS, now);
        assert_eq!(intake.apart(now), BETWEEN_COMMITS);
        assert_eq!(intake.apart(now + BETWEEN_COMMITS / 2), BETWEEN_COMMITS / 2);
        assert_eq!(intake.apart(now + BETWEEN_COMMITS), Duration::ZERO);
        // Commits of votes alone do not end it, time does.
        intake.begin_commit(0, now + BETWEEN_COMMITS);
        assert!(intake.apart(now + BETWEEN_COMMITS) > Duration::ZERO);
        intake.begin_commit(0, now + RUSH_TIME);
        assert_eq!(intake.apart(now + RUSH_TIME), Duration::ZERO);
    }
}
