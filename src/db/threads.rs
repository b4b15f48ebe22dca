//! How many of sled's threads wait for something to write.
//!
//! sled 0.34 writes on threads of its own, seven for the whole process, and each piece of its
//! log wakes all of them, for one to write it: six wake-ups out of seven, and a commit has two
//! pieces or more, are for nothing. Where only one database is written, one thread is enough,
//! and [`settle`] keeps the others asleep.
//!
//! sled has no setting for it. But whatever its threads do in the background ends there with
//! the [`Wake`] of whoever waits for it, and a [`Bed`] lets its thread go only when it is told
//! to. Nothing of the database is held meanwhile.
//!
//! One is not enough for ever: who writes can wait, with a lock that this one needs, for the
//! end of the file to be cut off, which is a thread's work too. If that is the writer, his call
//! takes long, and the [`Nudge`](super::held::Nudge) wakes all of them. It may be a reader as
//! well, who splits a node, and the writer may wait for him where nobody looks. So nobody sleeps
//! for longer than a second, and whoever still is not needed is put to sleep again.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

/// All but one of sled's seven.
const SPARE: usize = 6;
/// A thread is asleep long before, if it comes at all.
const PATIENCE: Duration = Duration::from_secs(1);
/// For how long all stay awake when one was not enough for the first time in a while.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// For how long one sleeps at most.
const SLEEP: Duration = Duration::from_secs(1);
/// How often something may be done already before it could be waited for.
const ATTEMPTS: usize = 64;

/// Where threads sleep.
#[derive(Debug, Default)]
struct Bed {
    sleepers: Mutex<Sleepers>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Sleepers {
    asleep: usize,
    woken: bool,
}

impl Bed {
    fn lock(&self) -> MutexGuard<'_, Sleepers> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts so many threads of sled's to sleep, or fewer if they do not come. Called between two
    /// commits, when only readers may be writing (they split nodes).
    fn fill(self: &Arc<Self>, db: &sled::Db, threads: usize) {
        let waker = Waker::from(Arc::clone(self));
        for _ in 0..ATTEMPTS {
            let before = self.lock().asleep;
            if before >= threads {
                return;
            }
            // There is next to nothing to flush, so this costs little. Its end finds the bed.
            match pin!(db.flush_async()).poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => return,
                Poll::Pending => {
                    let awaited = |sleepers: &mut Sleepers| sleepers.asleep == before && !sleepers.woken;
                    let waited = self.moved.wait_timeout_while(self.lock(), PATIENCE, awaited);
                    if waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
                        return;
                    }
                }
            }
        }
    }

    fn wake_all(&self) {
        self.lock().woken = true;
        self.moved.notify_all();
    }
}

impl Wake for Bed {
    /// Runs on a thread of sled's.
    fn wake(self: Arc<Self>) {
        let mut sleepers = self.lock();
        sleepers.asleep += 1;
        self.moved.notify_all();
        let mut sleepers =
            self.moved.wait_while(sleepers, |sleepers| !sleepers.woken).unwrap_or_else(PoisonError::into_inner);
        sleepers.asleep -= 1;
        self.moved.notify_all();
    }
}

/// When one thread was not enough, and for how long all stay awake then: twice as long each time,
/// until one has been enough for longer than that.
#[derive(Debug)]
struct Awake {
    until: Option<Instant>,
    /// The next time.
    pause: Duration,
}

impl Awake {
    const fn new() -> Self {
        Self { until: None, pause: FIRST_PAUSE }
    }

    fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    fn begin(&mut self, now: Instant) {
        if self.until.is_some_and(|until| now.saturating_duration_since(until) > self.pause) {
            self.pause = FIRST_PAUSE;
        }
        self.until = now.checked_add(self.pause);
        self.pause = self.pause.saturating_mul(2);
    }
}

/// The databases that this process writes, and sled's threads, which serve all of them.
#[derive(Debug)]
struct Writers {
    open: usize,
    /// Where they sleep, and since when.
    asleep: Option<(Arc<Bed>, Instant)>,
    awake: Awake,
}

static WRITERS: Mutex<Writers> = Mutex::new(Writers { open: 0, asleep: None, awake: Awake::new() });

fn writers() -> MutexGuard<'static, Writers> {
    WRITERS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writers {
    fn wake(&mut self) {
        if let Some((bed, _)) = self.asleep.take() {
            bed.wake_all();
        }
    }
}

/// A database that is open to be written. While there is any other number of them than one, all
/// threads are awake.
#[derive(Debug)]
pub(super) struct Writer(());

impl Writer {
    pub(super) fn enter() -> Self {
        let mut writers = writers();
        writers.open += 1;
        writers.wake();
        Self(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut writers = writers();
        writers.open -= 1;
        writers.wake();
    }
}

/// Puts the spare threads to sleep, if this database is the only one that is written. Called by
/// its writer, between two commits.
pub(super) fn settle(db: &sled::Db) {
    let mut writers = writers();
    if writers.open == 1 && writers.asleep.is_none() && writers.awake.is_over(Instant::now()) {
        let bed = Arc::default();
        Bed::fill(&bed, db, SPARE);
        writers.asleep = Some((bed, Instant::now()));
    }
}

/// Wakes those who have slept for long. To be called often, by somebody who never waits for sled.
pub(super) fn wake_the_rested() {
    let mut writers = writers();
    if writers.asleep.as_ref().is_some_and(|(_, since)| since.elapsed() >= SLEEP) {
        writers.wake();
    }
}

/// A write takes long: wakes all of them, and lets them stay awake for a while.
pub(super) fn wake_all() {
    let mut writers = writers();
    if writers.asleep.is_some() {
        writers.awake.begin(Instant::now());
        tracing::debug!(awake = ?writers.awake, "a write takes long: all of the storage engine's threads wake up");
        writers.wake();
    }
}

/// For tests: as if none of them were needed, however many write.
#[cfg(test)]
pub(super) fn put_all_to_sleep(db: &sled::Db) {
    let mut writers = writers();
    writers.wake();
    let bed = Arc::default();
    Bed::fill(&bed, db, SPARE + 1);
    writers.asleep = Some((bed, Instant::now()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_stay_awake_for_longer_each_time_until_one_has_been_enough() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut awake = Awake::new();
        assert!(awake.is_over(at(0)));
        // When one is not enough again, and until when all are awake then.
        for (again, until) in [(10, 11), (11, 13), (15, 19), (25, 33), (50, 51), (53, 55), (56, 60)] {
            awake.begin(at(again));
            assert!(!awake.is_over(at(until - 1)), "at {again}");
            assert!(awake.is_over(at(until)), "at {again}");
        }
    }

    fn asleep_in(bed: &Bed) -> usize {
        bed.lock().asleep
    }

    #[test]
    fn threads_sleep_until_they_are_woken() {
        let dir = tempfile::tempdir().unwrap();
        let db = sled::Config::new().path(dir.path()).flush_every_ms(None).open().unwrap();
        let bed = Arc::default();
        // Another test may have its own asleep for a while.
        let fill = |threads| {
            let began = Instant::now();
            while asleep_in(&bed) < threads {
                Bed::fill(&bed, &db, threads);
                assert!(began.elapsed() < Duration::from_secs(60), "{} of {threads} sleep", asleep_in(&bed));
            }
            assert_eq!(asleep_in(&bed), threads);
        };
        fill(2);
        // The others go on writing.
        db.insert(b"key", b"value").unwrap();
        db.flush().unwrap();
        fill(3);
        bed.wake_all();
        let all_up = bed.moved.wait_timeout_while(bed.lock(), Duration::from_secs(60), |sleepers| sleepers.asleep > 0);
        assert!(!all_up.unwrap().1.timed_out());
    }
}
