//! A compact copy takes the database's place while the node runs.
//!
//! sled gives a segment of its file back only when nothing in it is of use any more, and its own
//! cleaning does not keep up: after some time a file is many times as long as what is in it
//! (docs/PERFORMANCE.md). [`mod@super::compact`] mends that for a node that is stopped; this is
//! the same for one that runs and has little to do:
//!
//! 1. A thread of its own copies all rows into a new database beside the old one. Each batch of
//!    rows that the writer applies meanwhile is handed to it ([`Copying::follow`]) after it was
//!    applied, and it applies them in the same order. So a row that was copied and has changed
//!    since is overtaken by its change, whichever of the two came first.
//! 2. It opens the copy anew, as a start would, and compares both with each other, backwards, for who
//!    walks forwards through a damaged page may pass over rows; and makes it durable.
//! 3. The writer stops between two commits. The last rows are applied and synced; what changed
//!    while it was compared is compared once more; the directories are exchanged in one step, which
//!    is made durable; and readers and the writer go on with the new files
//!    ([`super::engine::Engine::replace`]).
//!
//! Both databases hold every durable commit when they are exchanged, and the guard is
//! beside them. So whichever is in place after a crash is the right one, and what the other
//! has left goes at the next start ([`super::switch::remove_unfinished`]). The copy is given
//! up as soon as the node has more to do, and begun anew later.

use std::ops::{Bound, Deref};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};

use super::DatabaseError;
use super::codec::RowChange;
use super::engine::{Files, Turns};
use super::open::{Storage, compact_size, size_on_disk};
use super::schema::TreeId;
use super::store::{Database, Trees};
use super::switch::{Building, NotExchanged};
use crate::limits::MAX_ROW_BYTES;

/// The copy's cache until it takes the place, beside the other's.
const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// Bytes of rows, about, that are copied or compared at once.
const BYTES_AT_ONCE: usize = 32 * 1024;
/// How many bytes are copied until they are synced, so that no sync takes long.
const BYTES_BETWEEN_SYNCS: usize = 1024 * 1024;
/// Bytes that wait to be applied to the copy; when there are more, it is given up.
const MAX_BYTES_BEHIND: usize = 64 * 1024 * 1024;
/// Rows that changed while they were compared, and are compared once more while the writer waits.
const MAX_DOUBTFUL: usize = 65_536;
/// How much longer a file is when it is renewed than it was after the last time.
const GROWTH: u64 = 2;
/// How often it is looked whether it is time.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long it takes until a copy is tried again that was given up; twice as long each time.
const AFTER_GIVEN_UP: Duration = Duration::from_secs(20);
const MOST_AFTER_GIVEN_UP: Duration = Duration::from_secs(3600);
/// And one that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(600);

/// What the writer tells the thread.
#[derive(Debug)]
enum Word {
    /// These were applied.
    Rows(Vec<RowChange>),
    /// Nothing more is, until the copy is in place.
    Finish,
    /// The files that were in place before.
    Old(Files),
}

/// Where a row stands.
type Place = (TreeId, Vec<u8>);

/// Why a copy does not come to its end.
#[derive(Debug)]
enum Ended {
    /// The writer wants none any more.
    GivenUp,
    Failed(DatabaseError),
}

impl From<DatabaseError> for Ended {
    fn from(error: DatabaseError) -> Self {
        Self::Failed(error)
    }
}

/// A copy that is being made, as the writer sees it. It is given up when this is dropped,
/// which waits for the thread.
#[derive(Debug)]
pub(super) struct Copying {
    words: Option<Sender<Word>>,
    /// Bytes that were said and not taken yet.
    behind: Arc<AtomicUsize>,
    /// Rows were left out because too many were waiting.
    overrun: AtomicBool,
    ready: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    made: Receiver<Result<Files, NotExchanged>>,
    thread: Option<JoinHandle<()>>,
    began: Instant,
}

impl Copying {
    fn begin(data_dir: &Path, cache_bytes: u64, old: Trees, turns: Turns) -> std::io::Result<Self> {
        let (words, said) = crossbeam_channel::unbounded();
        let (tell, made) = crossbeam_channel::bounded(1);
        let (behind, ready, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default(), Arc::default());
        let copier = Copier {
            old,
            turns,
            said,
            behind: Arc::clone(&behind),
            ready: Arc::clone(&ready),
            stop: Arc::clone(&stop),
            made: tell,
        };
        let data_dir = data_dir.to_path_buf();
        let run = move || copier.run(&data_dir, cache_bytes);
        let thread = Some(std::thread::Builder::new().name("renew".into()).spawn(run)?);
        let overrun = AtomicBool::new(false);
        Ok(Self { words: Some(words), behind, overrun, ready, stop, made, thread, began: Instant::now() })
    }

    fn say(&self, word: Word) {
        if let Some(words) = &self.words {
            // A thread that has ended has told why.
            let _heard = words.send(word).is_ok();
        }
    }

    /// These rows were just applied.
    pub(super) fn follow(&self, rows: &[RowChange]) {
        let bytes = rows.iter().map(bytes_of).sum();
        if self.behind.fetch_add(bytes, Ordering::SeqCst) > MAX_BYTES_BEHIND {
            self.overrun.store(true, Ordering::SeqCst);
        }
        if !self.is_overrun() {
            self.say(Word::Rows(rows.to_vec()));
        }
    }

    fn is_overrun(&self) -> bool {
        self.overrun.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until the copy is in place. Where the thread ends without a word, it may be.
    fn finish(&self) -> Result<Files, NotExchanged> {
        self.say(Word::Finish);
        self.made.recv().unwrap_or_else(|_| Err(NotExchanged::InPlace(ended_without_a_word())))
    }

    /// Why the thread has ended before it was told to.
    fn failure(&self) -> DatabaseError {
        match self.made.recv() {
            Ok(Err(NotExchanged::Kept(error) | NotExchanged::InPlace(error))) => error,
            Ok(Ok(_)) | Err(_) => ended_without_a_word(),
        }
    }

    /// Lets the thread end by itself.
    fn give_up(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.words = None;
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.give_up();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that makes a compact copy has panicked");
        }
    }
}

fn ended_without_a_word() -> DatabaseError {
    let source = std::io::Error::other("it ended without a word");
    DatabaseError::Io { what: "making a compact copy", source }
}

fn bytes_of(row: &RowChange) -> usize {
    row.key.len() + row.value.as_ref().map_or(0, Vec::len)
}

/// The thread.
struct Copier {
    old: Trees,
    turns: Turns,
    said: Receiver<Word>,
    behind: Arc<AtomicUsize>,
    ready: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    made: Sender<Result<Files, NotExchanged>>,
}

/// The copy, open for writing. When it is closed, nothing is left to write: sled would wait for that
/// without anybody to look after it.
struct Written(Option<Storage>);

impl Written {
    fn into_storage(mut self) -> Option<Storage> {
        self.0.take()
    }
}

impl Deref for Written {
    type Target = Storage;

    fn deref(&self) -> &Storage {
        self.0.as_ref().expect("it is taken only when it is done with")
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.as_ref().map(|new| new.engine.sync()) {
            tracing::warn!(%error, "a compact copy could not be synced");
        }
    }
}

impl Copier {
    fn run(self, data_dir: &Path, cache_bytes: u64) {
        if let Err(Ended::Failed(error)) = self.make(data_dir, cache_bytes) {
            self.tell(Err(NotExchanged::Kept(error)));
        }
    }

    fn tell(&self, outcome: Result<Files, NotExchanged>) {
        // Who does not listen any more has given it up.
        let _told = self.made.send(outcome).is_ok();
    }

    fn make(&self, data_dir: &Path, cache_bytes: u64) -> Result<(), Ended> {
        let building = Building::beside_open(data_dir)?;
        building.can_exchange()?;
        let open = |cache_bytes| -> Result<Written, Ended> {
            self.is_wanted()?;
            let mut new = Storage::open(building.path(), cache_bytes)?;
            new.engine.take_turns(self.turns.clone());
            Ok(Written(Some(new)))
        };
        let new = open(CACHE_BYTES)?;
        self.copy(&new)?;
        // What a start will find, not what this process remembers.
        drop(new);
        let new = open(CACHE_BYTES)?;
        let doubtful = self.compare(&new)?;
        drop(new);
        let new = open(cache_bytes)?;
        self.catch_up(&new)?;
        // Most of what changed meanwhile is the same by now, and the writer need not wait for it.
        let doubtful = self.differing(&new, doubtful)?;
        new.engine.sync()?;
        self.ready.store(true, Ordering::SeqCst);
        loop {
            match self.said.recv() {
                Ok(Word::Rows(rows)) => self.take_in(&new, &rows)?,
                Ok(Word::Finish) => break,
                Ok(Word::Old(_)) | Err(_) => return Err(Ended::GivenUp),
            }
        }
        // The writer waits: it is told before anything is closed or removed.
        let is_same = new.engine.sync().and_then(|()| self.compare_again(&new, doubtful));
        if let Err(not) = is_same.map_err(NotExchanged::Kept).and_then(|()| building.exchange()) {
            self.tell(Err(not));
            return Err(Ended::GivenUp);
        }
        let not_files = || DatabaseError::Unsound("the copy does not consist of files".into());
        let files = new.into_storage().and_then(|new| new.engine.into_files()).ok_or_else(not_files);
        self.tell(files.map_err(NotExchanged::InPlace));
        if let Ok(Word::Old(files)) = self.said.recv() {
            // Nothing is left to write when sled closes them, wherever their last reader is.
            if let Err(error) = files.sync() {
                tracing::warn!(%error, "the files that were replaced could not be synced");
            }
        }
        Ok(())
    }

    fn is_wanted(&self) -> Result<(), Ended> {
        if self.stop.load(Ordering::SeqCst) { Err(Ended::GivenUp) } else { Ok(()) }
    }

    /// Applies to the copy what was applied to the old database.
    fn take_in(&self, new: &Storage, rows: &[RowChange]) -> Result<(), DatabaseError> {
        new.engine.apply(rows)?;
        self.behind.fetch_sub(rows.iter().map(bytes_of).sum(), Ordering::SeqCst);
        Ok(())
    }

    /// The same with all that has been said so far.
    fn catch_up(&self, new: &Storage) -> Result<(), Ended> {
        loop {
            self.is_wanted()?;
            match self.said.try_recv() {
                Ok(Word::Rows(rows)) => self.take_in(new, &rows)?,
                Err(TryRecvError::Empty) => return Ok(()),
                Ok(Word::Finish | Word::Old(_)) | Err(TryRecvError::Disconnected) => return Err(Ended::GivenUp),
            }
        }
    }

    /// Leaves the machine to others for as long as this has used it since `began`.
    fn rest(&self, new: &Storage, began: Instant) -> Result<(), Ended> {
        let until = Instant::now() + began.elapsed();
        loop {
            self.is_wanted()?;
            match self.said.recv_deadline(until) {
                Ok(Word::Rows(rows)) => self.take_in(new, &rows)?,
                Err(RecvTimeoutError::Timeout) => return Ok(()),
                Ok(Word::Finish | Word::Old(_)) | Err(RecvTimeoutError::Disconnected) => return Err(Ended::GivenUp),
            }
        }
    }

    fn copy(&self, new: &Storage) -> Result<(), Ended> {
        let mut unsynced = 0;
        for tree in TreeId::ALL {
            let mut from = Bound::Unbounded;
            loop {
                let began = Instant::now();
                let (rows, bytes) = some_rows(tree, self.old.get(tree).range(from, Bound::Unbounded))?;
                let Some(last) = rows.last() else { break };
                from = Bound::Excluded(last.key.clone());
                new.engine.apply(&rows)?;
                // Only after that: what was said has been applied later than it was read.
                self.catch_up(new)?;
                unsynced += bytes;
                if unsynced >= BYTES_BETWEEN_SYNCS {
                    new.engine.sync()?;
                    unsynced = 0;
                }
                self.rest(new, began)?;
            }
        }
        Ok(())
    }

    /// Gives the places of rows that are not the same: they may have changed since they were read.
    fn compare(&self, new: &Storage) -> Result<Vec<Place>, Ended> {
        let mut doubtful = Vec::new();
        // What the copy lacks, then what only the copy has.
        for (one, other) in [(&self.old, &new.trees), (&new.trees, &self.old)] {
            for tree in TreeId::ALL {
                let mut to = Bound::Unbounded;
                loop {
                    let began = Instant::now();
                    let (rows, _) = some_rows(tree, one.get(tree).range(Bound::Unbounded, to).rev())?;
                    let Some(first) = rows.last() else { break };
                    to = Bound::Excluded(first.key.clone());
                    self.catch_up(new)?;
                    for row in rows {
                        if other.get(tree).get(&row.key)?.as_deref() != row.value.as_deref() {
                            doubtful.push((tree, row.key));
                        }
                    }
                    if doubtful.len() > MAX_DOUBTFUL {
                        let source = std::io::Error::other("it changes faster than it is compared");
                        return Err(Ended::Failed(DatabaseError::Io { what: "comparing a compact copy", source }));
                    }
                    self.rest(new, began)?;
                }
            }
        }
        Ok(doubtful)
    }

    /// Those of these places whose rows are not the same now.
    fn differing(&self, new: &Storage, mut places: Vec<Place>) -> Result<Vec<Place>, DatabaseError> {
        let mut outcome = Ok(());
        places.retain(|(tree, key)| {
            let differs = || Ok(self.old.get(*tree).get(key)? != new.trees.get(*tree).get(key)?);
            differs().unwrap_or_else(|error| {
                outcome = Err(error);
                true
            })
        });
        outcome.map(|()| places)
    }

    /// The writer waits, so this time they have to be the same.
    fn compare_again(&self, new: &Storage, doubtful: Vec<Place>) -> Result<(), DatabaseError> {
        match self.differing(new, doubtful)?.first() {
            Some((tree, _)) => {
                Err(DatabaseError::Unsound(format!("a compact copy of {} is not the same", tree.name())))
            }
            None => Ok(()),
        }
    }
}

/// The next rows of a walk through a tree, and their bytes.
fn some_rows(
    tree: TreeId,
    walk: impl Iterator<Item = Result<(sled::IVec, sled::IVec), DatabaseError>>,
) -> Result<(Vec<RowChange>, usize), DatabaseError> {
    let (mut rows, mut bytes) = (Vec::new(), 0);
    for row in walk {
        let (key, value) = row?;
        let row = RowChange { tree, key: key.to_vec(), value: Some(value.to_vec()) };
        bytes += bytes_of(&row);
        rows.push(row);
        if bytes + MAX_ROW_BYTES > BYTES_AT_ONCE {
            break;
        }
    }
    Ok((rows, bytes))
}

/// When a database is renewed.
#[derive(Debug)]
pub(super) struct Renewal {
    data_dir: PathBuf,
    cache_bytes: u64,
    /// Bytes on disk below which it is not worth while.
    above: u64,
    /// Bytes on disk from which on it is time.
    due_at: u64,
    look_at: Instant,
    /// How long it waits when a copy is given up.
    pause: Duration,
    /// What has ended, or is about to.
    ending: Option<Copying>,
    state: RenewalState,
}

/// What has been done about the size of the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RenewalState {
    /// How often a compact copy has taken the database's place.
    pub renewed: u64,
    /// Whether it is time that one does.
    pub due: bool,
}

impl Database {
    /// Has a compact copy take the place of the files in `data_dir`, of which this is the
    /// database, when they are larger than `above` bytes and twice what they were when they were
    /// last compact; [`Self::tend`] does it. The copy's cache has `cache_bytes`.
    pub fn renew_above(&mut self, data_dir: &Path, above: u64, cache_bytes: u64) {
        self.renewal = Some(Renewal {
            data_dir: data_dir.to_path_buf(),
            cache_bytes,
            above,
            due_at: due_at(data_dir, above),
            look_at: Instant::now(),
            pause: AFTER_GIVEN_UP,
            ending: None,
            state: RenewalState::default(),
        });
    }

    /// What has been done about the size of the file.
    pub fn renewal_state(&self) -> RenewalState {
        self.renewal.as_ref().map_or_else(RenewalState::default, |renewal| renewal.state)
    }

    /// Makes the file longer than it has to be, so that the next commits need not. To be called
    /// between commits, when there is time.
    ///
    /// # Errors
    /// As of any write: the database is unusable.
    pub fn write_ahead(&mut self) -> Result<(), DatabaseError> {
        self.engine.write_ahead()
    }

    /// Begins a compact copy when it is time and the node is `quiet`, gives it up when it is not
    /// quiet any more, and puts it in place when it is ready. To be called between commits,
    /// often: it is cheap.
    ///
    /// # Errors
    /// The database is unusable: the copy may be in place after a crash, or may not, or something
    /// was not written that a reader has made the storage engine rearrange. A copy that merely
    /// fails is told in the log, and the old files stay.
    pub fn tend(&mut self, quiet: bool) -> Result<(), DatabaseError> {
        self.engine.settle()?;
        let (turns, ahead) = (self.engine.turns(), self.engine.bytes_ahead());
        let (Some(renewal), Some(copying)) = (&mut self.renewal, self.engine.copying()) else { return Ok(()) };
        renewal.ending.take_if(|ending| ending.is_over());
        match copying.take() {
            None => *copying = renewal.begin_if_due(quiet, ahead, &self.shared.trees, turns),
            Some(made) if made.is_over() => renewal.failed(made),
            Some(made) if made.is_overrun() => renewal.give_up(made),
            Some(made) if made.ready.load(Ordering::SeqCst) => match made.finish() {
                Ok(files) => {
                    if let Some(old) = self.engine.replace(files) {
                        made.say(Word::Old(old));
                    }
                    renewal.succeeded(made);
                }
                Err(NotExchanged::Kept(error)) => {
                    tracing::warn!(%error, "a compact copy of the database did not take its place");
                    renewal.rest(made, AFTER_FAILURE);
                }
                Err(NotExchanged::InPlace(error)) => return Err(error),
            },
            Some(made) if !quiet => renewal.give_up(made),
            working => *copying = working,
        }
        Ok(())
    }
}

impl Renewal {
    fn begin_if_due(&mut self, quiet: bool, ahead: u64, trees: &Trees, turns: Turns) -> Option<Copying> {
        if Instant::now() < self.look_at || self.ending.is_some() {
            return None;
        }
        self.look_at = Instant::now() + LOOK_EVERY;
        let bytes = size_on_disk(&self.data_dir).saturating_sub(ahead);
        self.state.due = bytes >= self.due_at;
        if !self.state.due || !quiet {
            return None;
        }
        match free_bytes(&self.data_dir) {
            Ok(free) if free > bytes => {}
            free => {
                tracing::warn!(?free, bytes, "no room for a compact copy of the database");
                self.look_at = Instant::now() + AFTER_FAILURE;
                return None;
            }
        }
        let begun = Copying::begin(&self.data_dir, self.cache_bytes, trees.clone(), turns);
        tracing::info!(bytes, "making a compact copy of the database");
        begun.inspect_err(|error| tracing::warn!(%error, "cannot make a compact copy of the database")).ok()
    }

    /// Nothing more until the thread has ended, and for some time.
    fn rest(&mut self, mut copying: Copying, time: Duration) {
        copying.give_up();
        self.look_at = Instant::now() + time;
        self.ending = Some(copying);
    }

    fn give_up(&mut self, copying: Copying) {
        tracing::info!("a compact copy of the database was given up: there is more to do");
        self.rest(copying, self.pause);
        self.pause = (2 * self.pause).min(MOST_AFTER_GIVEN_UP);
    }

    /// The thread has ended before it was told to.
    fn failed(&mut self, copying: Copying) {
        let error = copying.failure();
        tracing::warn!(%error, "a compact copy of the database could not be made");
        self.rest(copying, AFTER_FAILURE);
    }

    fn succeeded(&mut self, copying: Copying) {
        let bytes = size_on_disk(&self.data_dir);
        self.due_at = due_at(&self.data_dir, self.above);
        tracing::info!(bytes, took = ?copying.began.elapsed(), "a compact copy took the database's place");
        self.state = RenewalState { renewed: self.state.renewed + 1, due: false };
        self.look_at = Instant::now() + LOOK_EVERY;
        self.pause = AFTER_GIVEN_UP;
        // It still has the old files to remove, and ends by itself.
        self.ending = Some(copying);
    }
}

/// The size from which on a database is renewed.
fn due_at(data_dir: &Path, above: u64) -> u64 {
    compact_size(data_dir).map_or(above, |bytes| above.max(bytes.saturating_mul(GROWTH)))
}

fn free_bytes(path: &Path) -> std::io::Result<u64> {
    let system = rustix::fs::statvfs(path)?;
    Ok(system.f_bavail.saturating_mul(system.f_frsize))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::db::samples::{ROWS_GONE_BACK, genesis, gone_back, key};
    use crate::db::{CommitBatch, Opened, Owner, Subscription, SubscriptionKey, VerifyOptions, verify_data_dir};
    use crate::types::Genesis;

    const CACHE: u64 = 1 << 20;

    /// A database that is changed by each commit in known places.
    struct Changing {
        data_dir: PathBuf,
        genesis: Genesis,
        database: Database,
        expected: BTreeMap<SubscriptionKey, Subscription>,
        commits: u64,
    }

    impl Changing {
        fn open(data_dir: &Path) -> Self {
            let (genesis, data_dir) = (genesis(), data_dir.to_path_buf());
            let mut database = open(&data_dir, &genesis).database;
            database.renew_above(&data_dir, 1, CACHE);
            Self { data_dir, genesis, database, expected: BTreeMap::new(), commits: 0 }
        }

        /// Makes, changes and removes subscriptions, some of them in many rows.
        fn commit(&mut self) {
            let name = |n: u64| format!("wallet {n}");
            let mut subscriptions = BTreeMap::new();
            for n in [self.commits, self.commits / 2, self.commits / 3, self.commits % 7] {
                let subscription = Subscription {
                    subscriber_id: name(n),
                    token_hash: [7; 32],
                    outpoints: Vec::new(),
                    addresses: vec![crate::db::samples::address(); 1 + (self.commits % 900) as usize],
                    last_used: i64::try_from(self.commits).unwrap(),
                };
                let keep = !(self.commits + n).is_multiple_of(5);
                subscriptions.insert(SubscriptionKey::of(&name(n)), keep.then_some(subscription));
            }
            for (key, subscription) in &subscriptions {
                match subscription {
                    Some(subscription) => self.expected.insert(*key, subscription.clone()),
                    None => self.expected.remove(key),
                };
            }
            self.commits += 1;
            let _durable = self.database.commit(CommitBatch { subscriptions, ..CommitBatch::default() }, ()).unwrap();
        }

        fn assert_as_expected(&self) {
            let found = self.database.reader().subscriptions().map(Result::unwrap);
            let found: BTreeMap<_, _> = found.map(|s| (SubscriptionKey::of(&s.subscriber_id), s)).collect();
            assert!(found == self.expected, "these are not the subscriptions that were committed");
        }

        fn copying(&mut self) -> &mut Option<Copying> {
            self.database.engine.copying().unwrap()
        }

        /// Commits while a compact copy is made, and just before it takes the place. No more
        /// commits than a copy can follow on a machine that has other things to do.
        fn renew(&mut self) {
            let before = self.database.renewal_state().renewed;
            let renewal = self.database.renewal.as_mut().unwrap();
            (renewal.due_at, renewal.look_at) = (1, Instant::now());
            let began = Instant::now();
            while self.copying().is_none() {
                self.database.tend(true).unwrap();
                assert!(began.elapsed() < Duration::from_secs(60), "none is begun; is there room on the disk?");
            }
            let last = self.commits + 150;
            while let Some(copying) = self.copying() {
                if copying.ready.load(Ordering::SeqCst) || self.commits < last {
                    self.commit();
                } else {
                    std::thread::sleep(Duration::from_millis(1));
                }
                self.database.tend(true).unwrap();
            }
            assert_eq!(self.database.renewal_state().renewed, before + 1, "the copy did not take the place");
        }

        /// Closes it, and looks at what a start will find.
        fn reopen(self) -> Self {
            let Self { data_dir, genesis, database, expected, commits } = self;
            let head = database.reader().durable_head();
            drop(database);
            let options = VerifyOptions { genesis: Some(&genesis), full: true, progress: &|_, _| {} };
            let report = verify_data_dir(&data_dir, CACHE, options).unwrap();
            assert_eq!(report.findings().count(), 0);
            let reopened = Self { expected, commits, ..Self::open(&data_dir) };
            assert_eq!(reopened.database.reader().durable_head(), head);
            reopened.assert_as_expected();
            assert!(!data_dir.join("unfinished").exists());
            reopened
        }
    }

    fn open(data_dir: &Path, genesis: &Genesis) -> Opened {
        let owner = Owner { genesis, public_key: Some(key().public_key()), first_start: true };
        Database::open(data_dir, owner, CACHE).unwrap()
    }

    fn inode(data_dir: &Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(super::super::open::sled_file(data_dir)).unwrap().ino()
    }

    #[test]
    fn the_copy_holds_what_was_committed_while_it_was_made_and_after() {
        let dir = tempfile::tempdir().unwrap();
        let mut changing = Changing::open(dir.path());
        for _ in 0..300 {
            changing.commit();
        }
        for _ in 0..3 {
            let before = inode(dir.path());
            changing.renew();
            assert_ne!(inode(dir.path()), before, "other files are in place");
            changing.assert_as_expected();
            for _ in 0..20 {
                changing.commit();
            }
            changing.assert_as_expected();
            changing = changing.reopen();
            changing.database.tend(true).unwrap();
            assert!(changing.copying().is_none(), "it is compact, as it was before it was opened again");
        }
    }

    #[test]
    fn readers_go_on_in_the_files_that_take_the_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut changing = Changing::open(dir.path());
        (0..50).for_each(|_| changing.commit());
        let reader = changing.database.reader();
        let mut walk = reader.subscriptions();
        walk.next().unwrap().unwrap();
        let mut watch = changing.database.shared.trees.get(TreeId::Subscriptions).watch().unwrap();
        // The writer waits for who does not take its events, so a thread takes them.
        let done = Arc::new(AtomicBool::new(false));
        let is_done = Arc::clone(&done);
        let taking = std::thread::spawn(move || {
            while !is_done.load(Ordering::SeqCst) {
                watch.wait(Duration::from_millis(10));
            }
            watch
        });
        changing.renew();
        done.store(true, Ordering::SeqCst);
        let mut watch = taking.join().unwrap();
        walk.for_each(|subscription| drop(subscription.unwrap()));
        while watch.wait(Duration::from_millis(100)) == Some(true) {}
        changing.commit();
        assert_eq!(watch.wait(Duration::from_secs(60)), Some(true), "the new tree is watched");
        assert_eq!(reader.durable_head(), changing.database.reader().durable_head());
        changing.assert_as_expected();
    }

    #[test]
    fn a_copy_is_given_up_when_there_is_more_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let mut changing = Changing::open(dir.path());
        (0..300).for_each(|_| changing.commit());
        changing.database.tend(false).unwrap();
        assert!(changing.copying().is_none() && changing.database.renewal_state().due, "it waits for a quiet time");
        // One that is ready by then is put in place all the same.
        let (mut before, mut renewed) = (0, u64::MAX);
        let began = Instant::now();
        while changing.database.renewal_state().renewed != renewed {
            (before, renewed) = (inode(dir.path()), changing.database.renewal_state().renewed);
            while changing.copying().is_none() {
                let renewal = changing.database.renewal.as_mut().unwrap();
                (renewal.due_at, renewal.look_at) = (1, Instant::now());
                changing.database.tend(true).unwrap();
                assert!(began.elapsed() < Duration::from_secs(60), "none is begun; is there room on the disk?");
            }
            changing.database.tend(false).unwrap();
            assert!(changing.copying().is_none());
        }
        changing.commit();
        while changing.database.renewal.as_ref().unwrap().ending.is_some() {
            changing.database.tend(true).unwrap();
        }
        assert!(!dir.path().join("unfinished").exists());
        assert_eq!((inode(dir.path()), changing.database.renewal_state().renewed), (before, renewed));
        changing.reopen();
    }

    #[test]
    fn a_copy_that_is_too_far_behind_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut changing = Changing::open(dir.path());
        changing.database.tend(true).unwrap();
        let copying = changing.copying().as_ref().unwrap();
        let row = RowChange { tree: TreeId::Meta, key: vec![], value: Some(vec![0; MAX_BYTES_BEHIND]) };
        copying.behind.fetch_add(MAX_BYTES_BEHIND + 1, Ordering::SeqCst);
        copying.follow(&[row]);
        assert!(copying.is_overrun());
        // Also when they have been taken in the end.
        copying.behind.store(0, Ordering::SeqCst);
        changing.database.tend(true).unwrap();
        assert!(changing.copying().is_none());
        changing.reopen();
    }

    #[test]
    fn a_database_that_is_closed_meanwhile_is_free_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut changing = Changing::open(dir.path());
        for _ in 0..5 {
            (0..50).for_each(|_| changing.commit());
            changing.database.tend(true).unwrap();
            assert!(changing.copying().is_some());
            changing = changing.reopen();
        }
    }

    #[test]
    fn what_the_copy_lacks_is_missed() {
        for data_dir in gone_back() {
            let old = Storage::look(data_dir.path(), CACHE).unwrap();
            let copy = tempfile::tempdir().unwrap();
            let new = Storage::open(copy.path(), CACHE).unwrap();
            let (_words, said) = crossbeam_channel::unbounded();
            let (made, _) = crossbeam_channel::bounded(1);
            let (behind, ready, stop) = (Arc::default(), Arc::default(), Arc::default());
            let copier = Copier { old: old.trees, turns: Turns::default(), said, behind, ready, stop, made };
            copier.copy(&new).unwrap();
            let doubtful = copier.compare(&new).unwrap();
            // It seeks its place by key again and again, and so may find them all.
            let there = |n: &u64| new.trees.get(TreeId::Changes).get(n.to_be_bytes()).unwrap().is_some();
            assert_eq!((0..ROWS_GONE_BACK).filter(|n| !there(n)).count(), doubtful.len());
            assert_eq!(copier.compare_again(&new, doubtful.clone()).is_err(), !doubtful.is_empty());
            // One is missing, one is different, and one is only there.
            for (n, value) in [(77, None), (77, Some(vec![6; 300])), (ROWS_GONE_BACK + 7, Some(vec![5; 300]))] {
                let row = RowChange { tree: TreeId::Changes, key: n.to_be_bytes().to_vec(), value };
                new.engine.apply(std::slice::from_ref(&row)).unwrap();
                let doubtful = copier.compare(&new).unwrap();
                assert!(doubtful.contains(&(row.tree, row.key)));
                assert!(matches!(copier.compare_again(&new, doubtful), Err(DatabaseError::Unsound(_))));
            }
        }
    }
}
