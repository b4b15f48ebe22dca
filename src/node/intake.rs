//! How the ledger's thread takes in what it has to do, and when a commit waits for more.

use std::time::{Duration, Instant};

use super::input::{Input, Queues, Work};
use super::quiet::Quiet;
use super::rush::Rush;
use crate::limits::{BETWEEN_COMMITS, MAX_EVENTS_PER_COMMIT};

/// The ledger's end of the queues, and how busy it is with them.
pub(super) struct Intake {
    queues: Queues,
    rush: Rush,
    quiet: Quiet,
    last_commit: Instant,
}

impl Intake {
    pub(super) fn new(queues: Queues, now: Instant) -> Self {
        Self { queues, rush: Rush::default(), quiet: Quiet::new(now), last_commit: now }
    }

    /// The next commit's beginning: lets more gather if there is a rush, then as [`Self::wait`].
    pub(super) fn gather(&mut self, patience: Duration) -> Vec<Work> {
        let now = Instant::now();
        if self.rush.is_on(now) {
            std::thread::sleep(BETWEEN_COMMITS.saturating_sub(now.duration_since(self.last_commit)));
        }
        self.wait(patience)
    }

    /// Waits for something to do, if there is nothing, but not longer than this; then takes all
    /// that is there, up to a commit's worth.
    pub(super) fn wait(&mut self, patience: Duration) -> Vec<Work> {
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
        work.extend(more.take(MAX_EVENTS_PER_COMMIT - work.len()));
        work
    }

    /// A commit begins that takes in so many payments.
    pub(super) fn begin_commit(&mut self, payments: usize, now: Instant) {
        self.rush.note(payments, now);
        self.last_commit = now;
    }

    /// Whether it has little to do.
    pub(super) fn is_quiet(&mut self, now: Instant) -> bool {
        self.quiet.is_quiet(now)
    }
}
