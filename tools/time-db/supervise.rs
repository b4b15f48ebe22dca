//! Keeps a damaged database from hanging or tearing down the program.
//!
//! The work is done in a thread of its own. Opening may not take for ever: sled can loop
//! over damaged files, and a thread cannot be stopped, so the process ends around it. A
//! panic inside sled is no bug of the caller's but what damage looks like; it becomes a
//! message, and no backtrace.

use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All is well, or done.
    Sound,
    /// Something was found, or nothing where something was looked for.
    Findings,
}

/// Why a command did not end well.
#[derive(Debug, thiserror::Error)]
pub enum Supervised {
    /// Opening did not come to an end.
    #[error("the database is damaged: it was still being opened after {0} seconds")]
    OpenTimeout(u64),
    /// sled came apart.
    #[error("the database is damaged: reading it failed inside the storage engine ({0})")]
    Engine(String),
    /// This program came apart.
    #[error("time-db has failed in a way that it should not ({0})")]
    Bug(String),
}

enum Sign {
    Opening,
    Opened,
    Done(Result<Outcome, anyhow::Error>),
}

/// Told by the work when it begins and ends to open a database.
#[derive(Debug)]
pub struct Watchdog {
    signs: Sender<Sign>,
}

impl Watchdog {
    /// Something is being opened; from now on that has its time.
    pub fn opening(&self) {
        self.sign(Sign::Opening);
    }

    /// It is open.
    pub fn opened(&self) {
        self.sign(Sign::Opened);
    }

    /// Whoever listens ends with the process only.
    fn sign(&self, sign: Sign) {
        self.signs.send(sign).unwrap_or_default();
    }
}

struct Panic {
    text: String,
    inside_engine: bool,
}

static LAST_PANIC: Mutex<Option<Panic>> = Mutex::new(None);

fn remember_panics_quietly() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
        let place = info.location().map(|place| (place.file().to_owned(), place.line()));
        let (file, line) = place.unwrap_or_default();
        let inside_engine = file.split(['/', '\\']).any(|part| part.starts_with("sled-"));
        let file = file.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
        let panic = Panic { text: format!("{text}, {file}:{line}"), inside_engine };
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }));
}

/// Does the work and gives how it ended, whatever happens inside.
pub fn supervise<F>(open_timeout: Duration, work: F) -> Result<Outcome, anyhow::Error>
where
    F: FnOnce(&Watchdog) -> Result<Outcome, anyhow::Error> + Send + 'static,
{
    remember_panics_quietly();
    let (signs, seen) = mpsc::channel();
    let done = signs.clone();
    let worker = std::thread::Builder::new().name("work".into()).spawn(move || {
        let watchdog = Watchdog { signs };
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| work(&watchdog)));
        let outcome = outcome.unwrap_or_else(|_| Err(last_panic().into()));
        done.send(Sign::Done(outcome)).unwrap_or_default();
    })?;
    let outcome = watch(&seen, open_timeout);
    drop(worker);
    outcome
}

fn watch(seen: &Receiver<Sign>, open_timeout: Duration) -> Result<Outcome, anyhow::Error> {
    let mut deadline: Option<Instant> = None;
    loop {
        let sign = match deadline {
            Some(deadline) => seen.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            None => seen.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match sign {
            Ok(Sign::Opening) => deadline = Some(Instant::now() + open_timeout),
            Ok(Sign::Opened) => deadline = None,
            Ok(Sign::Done(outcome)) => return outcome,
            Err(RecvTimeoutError::Timeout) => return Err(Supervised::OpenTimeout(open_timeout.as_secs()).into()),
            Err(RecvTimeoutError::Disconnected) => return Err(last_panic().into()),
        }
    }
}

fn last_panic() -> Supervised {
    let panic = LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    match panic {
        Some(Panic { text, inside_engine: true }) => Supervised::Engine(text),
        Some(Panic { text, .. }) => Supervised::Bug(text),
        None => Supervised::Bug("its work ended without a word".into()),
    }
}
