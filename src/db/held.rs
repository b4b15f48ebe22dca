//! What of sled would bring others down with it when it fails.
//!
//! Three faults of sled 0.34 are met here. When the last of its handles goes, sled syncs its
//! file, and panics if that fails: with [`Held`] that panic ends where it began. When
//! one of its threads fails to write, whoever waits for that write is not always woken, and
//! would wait for ever: a [`Nudge`] wakes all once sled has noted the error, and lets somebody
//! else flush where it has not, who finds it. And sled can come to wait for itself, or for a
//! thread of its own that has panicked: then the nudge ends the process, which a node is made for.

use std::ops::{Deref, DerefMut};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::threads;

/// How often it is looked whether a write has begun long ago.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A call in which nothing was written from one look to the next so many times never ends: two
/// minutes, not counting those in which the whole process was stopped.
const FOR_EVER: u32 = 1_200;

/// A handle of sled's that may be let go of anywhere.
#[derive(Debug, Clone)]
pub(super) struct Held<T>(Option<T>);

impl<T> Held<T> {
    pub(super) const fn new(handle: T) -> Self {
        Self(Some(handle))
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("it is taken only when it is dropped")
    }
}

impl<T> DerefMut for Held<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("it is taken only when it is dropped")
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        let handle = self.0.take();
        if std::panic::catch_unwind(AssertUnwindSafe(|| drop(handle))).is_err() {
            tracing::error!("the storage engine came apart while it was closed");
        }
    }
}

/// Looks after whoever writes to a database, from a thread of its own.
#[derive(Debug)]
pub(super) struct Nudge {
    /// Goes up by one when a call begins and when it ends, so it is odd while one lasts.
    calls: Arc<AtomicU64>,
    /// The thread ends when this is dropped.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Nudge {
    /// Looks after the writer of this database.
    pub(super) fn start(db: &Arc<Held<sled::Db>>) -> std::io::Result<Self> {
        let calls = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let (seen, db) = (Arc::clone(&calls), Arc::downgrade(db));
        let thread =
            std::thread::Builder::new().name("nudge".into()).spawn(move || look_after(&seen, &db, &stopped))?;
        Ok(Self { calls, stop: Some(stop), thread: Some(thread) })
    }

    /// A call that is looked after.
    pub(super) fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let outcome = call();
        self.calls.fetch_add(1, Ordering::SeqCst);
        outcome
    }
}

impl Drop for Nudge {
    /// Returns when the thread has ended.
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("what looks after the storage engine has panicked");
        }
    }
}

/// The error after which sled writes nothing any more, if there has been one. Then whoever waits
/// for a write is woken: where it was left to a thread by the last of several who wrote into the
/// same piece of the log, a reader perhaps, sled notes the error and wakes nobody. A flush would,
/// but it may have to wait for them, in sled's lock.
pub(super) fn broken(db: &sled::Db) -> sled::Result<()> {
    db.context.global_error().inspect_err(|_| {
        // It fails at once, and wakes them first.
        let _failed = db.context.pagecache.log.make_stable(sled::Lsn::MAX).is_err();
    })
}

/// How far sled has written, and for how many looks no further.
#[derive(Default)]
struct Standstill {
    stable: sled::Lsn,
    looks: u32,
}

impl Standstill {
    fn lasts(&mut self, stable: sled::Lsn) -> u32 {
        self.looks = if stable == self.stable { self.looks + 1 } else { 0 };
        self.stable = stable;
        self.looks
    }
}

fn look_after(calls: &AtomicU64, db: &Weak<Held<sled::Db>>, stopped: &Receiver<()>) {
    let (mut last, mut looks) = (0, 0_u32);
    let mut standstill = Standstill::default();
    while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        threads::wake_the_rested();
        let Some(db) = db.upgrade() else { return };
        if let Err(error) = broken(&db) {
            tracing::debug!(%error, "the storage engine has failed");
        }
        let now = calls.load(Ordering::SeqCst);
        if now.is_multiple_of(2) || now != last {
            (last, looks, standstill) = (now, 0, Standstill::default());
            continue;
        }
        looks += 1;
        threads::wake_all();
        if standstill.lasts(db.context.pagecache.log.stable_offset()) >= FOR_EVER {
            tracing::error!("the storage engine waits for itself: the process ends; restart the node to recover");
            std::process::abort();
        }
        // On a disk that is only slow each of these waits as well, so they become fewer.
        if looks.is_power_of_two() {
            let flush = move || {
                if let Err(error) = db.flush() {
                    tracing::warn!(%error, "a write of the storage engine has failed");
                }
            };
            if let Err(error) = std::thread::Builder::new().name("flush".into()).spawn(flush) {
                tracing::warn!(%error, "cannot look after a write that takes long");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::breakable::BreakableFile;
    use super::*;

    #[test]
    fn a_handle_that_panics_when_it_goes_harms_nobody() {
        struct Fragile;
        impl Drop for Fragile {
            fn drop(&mut self) {
                panic!("it goes");
            }
        }
        drop(Held::new(Fragile));
    }

    #[test]
    fn the_thread_ends_with_its_writer() {
        let db = sled::Config::new().temporary(true).open().unwrap();
        let db = Arc::new(Held::new(db));
        let nudge = Nudge::start(&db).unwrap();
        assert!(nudge.during(|| db.flush().is_ok()));
        let calls = Arc::downgrade(&nudge.calls);
        drop(nudge);
        assert!(calls.upgrade().is_none());
    }

    #[test]
    fn a_standstill_ends_with_each_thing_that_is_written() {
        let mut standstill = Standstill::default();
        let looks = [10, 10, 10, 11, 11, 12, 12, 12].map(|stable| standstill.lasts(stable));
        assert_eq!(looks, [0, 1, 2, 0, 1, 0, 1, 2]);
    }

    /// Somebody, a reader who splits a node perhaps, writes into the same piece of the log as the
    /// writer, and is done with it when the writer waits for it already: then it is for him to
    /// have it written, and that fails.
    #[test]
    fn whoever_waits_for_a_write_that_has_failed_is_woken() {
        let dir = tempfile::tempdir().unwrap();
        let file = BreakableFile::for_sled(dir.path());
        let db = sled::Config::new().path(dir.path()).flush_every_ms(None).open().unwrap();
        let db = Arc::new(Held::new(db));
        let _nudge = Nudge::start(&db).unwrap();
        db.insert(b"key", b"value").unwrap();
        let guard = sled::pin();
        let log = &db.context.pagecache.log;
        let reserved = log.reserve(sled::LogKind::Link, 1_000, &sled::IVec::from(b"a piece"), &guard).unwrap();
        let (flushed, outcome) = crossbeam_channel::bounded(1);
        let flushing = Arc::clone(&db);
        let flushing = std::thread::spawn(move || flushed.send(flushing.flush()));
        while !format!("{reserved:?}").contains("sealed: true") {
            std::thread::yield_now();
        }
        assert!(broken(&db).is_ok());
        file.break_it();
        drop(reserved);
        assert!(outcome.recv_timeout(Duration::from_secs(60)).expect("it is woken").is_err());
        flushing.join().unwrap().unwrap();
        assert!(broken(&db).is_err());
    }
}
