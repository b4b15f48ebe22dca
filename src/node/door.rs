//! The door for wallets' payments. Whoever cannot be served soon is told so at once, before
//! anything is spent on it: a payment that waits for seconds only makes the others wait.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;

use crate::limits::{LEDGER_QUEUE, LEDGER_QUEUE_WHEN_FULL, LONG_WAIT};

/// A place in the queues, kept until the commit that handles what is in it is durable.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    /// When it came, if that is a wallet's.
    came: Option<Instant>,
}

impl Place {
    pub(super) const fn of_member(permit: OwnedSemaphorePermit) -> Self {
        Self { _permit: permit, came: None }
    }

    pub(super) fn of_wallet(permit: OwnedSemaphorePermit) -> Self {
        Self { _permit: permit, came: Some(Instant::now()) }
    }
}

/// What the ledger's thread last said about how wallets are served.
#[derive(Debug)]
pub(super) struct Door {
    opened: Instant,
    /// How many payments may wait.
    room: AtomicUsize,
    /// When wallets were served last, or had nothing waiting, in milliseconds since the start.
    served_at: AtomicU64,
    /// How long the last one had waited then, in milliseconds.
    waited: AtomicU64,
}

impl Door {
    pub(super) fn new(now: Instant) -> Self {
        let room = AtomicUsize::new(LEDGER_QUEUE);
        Self { opened: now, room, served_at: AtomicU64::new(0), waited: AtomicU64::new(0) }
    }

    /// So many payments may wait; these places are given back.
    pub(super) fn serve(&self, room: usize, places: &[Place], now: Instant) {
        self.room.store(room, Ordering::Relaxed);
        if let Some(came) = places.iter().rev().find_map(|place| place.came) {
            self.served(now.saturating_duration_since(came), now);
        }
    }

    /// Nobody waits.
    pub(super) fn rest(&self, now: Instant) {
        self.served(Duration::ZERO, now);
    }

    fn served(&self, waited: Duration, now: Instant) {
        self.waited.store(millis(waited), Ordering::Relaxed);
        self.served_at.store(self.since_opened(now), Ordering::Relaxed);
    }

    fn since_opened(&self, now: Instant) -> u64 {
        millis(now.saturating_duration_since(self.opened))
    }

    /// Whether one more may come in, where so many wait. A few always may: what they bring may be in
    /// flight already, and then they only ask for the answer.
    pub(super) fn lets_in(&self, waiting: usize, now: Instant) -> bool {
        let since = self.since_opened(now).saturating_sub(self.served_at.load(Ordering::Relaxed));
        let is_slow = self.waited.load(Ordering::Relaxed).max(since) > millis(LONG_WAIT);
        waiting < LEDGER_QUEUE_WHEN_FULL || (waiting < self.room.load(Ordering::Relaxed) && !is_slow)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    #[test]
    fn it_is_open_to_a_burst_and_narrow_while_payments_wait_long() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let long = millis(LONG_WAIT);
        let places = Arc::new(Semaphore::new(LEDGER_QUEUE));
        let came = |ms| Place { _permit: Arc::clone(&places).try_acquire_owned().unwrap(), came: Some(at(ms)) };
        let door = Door::new(start);

        // The first for an hour, and many behind it at once.
        let hour = 3_600_000;
        door.rest(at(hour));
        assert!(door.lets_in(LEDGER_QUEUE - 1, at(hour + 1)));
        assert!(!door.lets_in(LEDGER_QUEUE, at(hour + 1)), "there is no more room than that");
        // Nobody is served for long.
        assert!(door.lets_in(LEDGER_QUEUE_WHEN_FULL, at(hour + long)));
        assert!(!door.lets_in(LEDGER_QUEUE_WHEN_FULL, at(hour + long + 1)));
        assert!(door.lets_in(LEDGER_QUEUE_WHEN_FULL - 1, at(hour + long + 1)), "a few always may");
        // They are served, but had waited long, until one had not.
        let mut now = hour + 2 * long;
        door.serve(LEDGER_QUEUE, &[came(now), came(hour)], at(now));
        assert!(!door.lets_in(LEDGER_QUEUE_WHEN_FULL, at(now)), "the last of them counts");
        now += long;
        door.serve(LEDGER_QUEUE, &[came(now - 1)], at(now));
        assert!(door.lets_in(LEDGER_QUEUE_WHEN_FULL, at(now)));
        // Members are served: that says nothing of wallets.
        let of_member = Place::of_member(Arc::clone(&places).try_acquire_owned().unwrap());
        door.serve(LEDGER_QUEUE, &[of_member], at(now + long + 1));
        assert!(!door.lets_in(LEDGER_QUEUE_WHEN_FULL, at(now + long + 1)));
        // There is no room in flight.
        door.serve(0, &[came(now)], at(now));
        assert!(!door.lets_in(LEDGER_QUEUE_WHEN_FULL, at(now)));
        assert!(door.lets_in(LEDGER_QUEUE_WHEN_FULL - 1, at(now)));
    }
}
