//! What the rows lie on: sled's files, or a disk in memory ([`MemoryDisk`]) that can lose power.
//!
//! The rest of the room sees ordered maps of bytes ([`Tree`]) and one writer ([`Engine`])
//! that applies a batch of rows to all of them at once and then makes it durable. The disk
//! in memory is for simulations: it runs the very same commit, recovery, verification and
//! repair as the files do, and forgets what was not synced when it is told to crash.

use std::fs::File;
use std::ops::Bound;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use parking_lot::{FairMutex, FairMutexGuard};
use sled::transaction::{ConflictableTransactionError, TransactionError, TransactionalTree};
use sled::{IVec, Transactional};

use super::DatabaseError;
use super::ahead::Ahead;
use super::codec::RowChange;
use super::guard::{Guard, Stamp};
use super::held::{Held, Nudge, broken};
use super::memory::MemoryDisk;
use super::renew::Copying;
use super::schema::TreeId;
use super::threads::{self, Writer};

/// One tree, for reading. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) enum Tree {
    /// Of files that are only looked at.
    Sled(Held<sled::Tree>),
    /// Of the files that are in place at the moment.
    InPlace(InPlace, TreeId),
    Memory(MemoryDisk, TreeId),
}

/// sled's trees, in the order of [`TreeId`], for reading. A compact copy of the database may take
/// their place at any time ([`super::renew`]): it has the same rows. Whoever walks through the
/// old ones then sees no later commit, and goes on undisturbed. Clones are the same place.
#[derive(Debug, Clone)]
pub(super) struct InPlace(Arc<Place>);

#[derive(Debug)]
struct Place {
    trees: RwLock<Vec<Held<sled::Tree>>>,
    /// How often others have taken the place.
    generation: AtomicU64,
    /// sled has panicked under a reader.
    came_apart: AtomicBool,
}

impl InPlace {
    pub(super) fn new(trees: Vec<Held<sled::Tree>>) -> Self {
        let (generation, came_apart) = (AtomicU64::new(0), AtomicBool::new(false));
        Self(Arc::new(Place { trees: RwLock::new(trees), generation, came_apart }))
    }

    fn tree(&self, id: TreeId) -> Held<sled::Tree> {
        self.0.trees.read().unwrap_or_else(PoisonError::into_inner)[id as usize].clone()
    }

    fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::SeqCst)
    }

    fn replace(&self, trees: Vec<Held<sled::Tree>>) {
        let old = std::mem::replace(&mut *self.0.trees.write().unwrap_or_else(PoisonError::into_inner), trees);
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        drop(old);
    }

    /// A reader's call of sled's. Whatever becomes of the panic, that there was one is known: sled
    /// may have been in the middle of a change, for its readers make some too.
    fn reading<T>(&self, call: impl FnOnce() -> T) -> T {
        struct Alarm<'a>(&'a AtomicBool);
        impl Drop for Alarm<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.store(true, Ordering::SeqCst);
                }
            }
        }
        let _alarm = Alarm(&self.0.came_apart);
        call()
    }

    /// An error if it has come apart under a reader.
    fn is_whole(&self) -> Result<(), DatabaseError> {
        if !self.0.came_apart.load(Ordering::SeqCst) {
            return Ok(());
        }
        let source = std::io::Error::other("the storage engine came apart");
        Err(DatabaseError::Io { what: "reading the database", source })
    }
}

/// Rows in order of key, up to the first that cannot be read.
pub(super) type RowIter = Box<dyn DoubleEndedIterator<Item = Result<(IVec, IVec), DatabaseError>> + Send>;

impl Tree {
    pub(super) fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<IVec>, DatabaseError> {
        match self {
            Self::Sled(tree) => Ok(tree.get(key)?),
            // Of a handle of its own: sled may wait in there, and nobody who replaces them for that.
            Self::InPlace(trees, id) => Ok(trees.reading(|| trees.tree(*id).get(key))?),
            Self::Memory(disk, id) => Ok(disk.get(*id, key.as_ref())),
        }
    }

    /// The rows whose keys are within these bounds.
    pub(super) fn range(&self, from: Bound<Vec<u8>>, to: Bound<Vec<u8>>) -> RowIter {
        match self {
            Self::Sled(tree) => Box::new(UntilError::of(tree.range::<Vec<u8>, _>((from, to)))),
            Self::InPlace(trees, id) => {
                let rows = UntilError::of(trees.tree(*id).range::<Vec<u8>, _>((from, to)));
                Box::new(InPlaceRows { rows, trees: trees.clone() })
            }
            Self::Memory(disk, id) => Box::new(disk.range(*id, from, to)),
        }
    }

    /// The rows from this key on.
    pub(super) fn range_from(&self, key: &[u8]) -> RowIter {
        self.range(Bound::Included(key.to_vec()), Bound::Unbounded)
    }

    pub(super) fn iter(&self) -> RowIter {
        self.range(Bound::Unbounded, Bound::Unbounded)
    }

    /// The rows whose keys begin with `prefix`.
    pub(super) fn scan_prefix(&self, prefix: &[u8]) -> RowIter {
        let mut end = prefix.to_vec();
        while let Some(last) = end.pop() {
            if let Some(next) = last.checked_add(1) {
                end.push(next);
                return self.range(Bound::Included(prefix.to_vec()), Bound::Excluded(end));
            }
        }
        self.range_from(prefix)
    }

    /// Whether the rows before and at `end`, `most` of them, are the same forwards and backwards.
    ///
    /// Damage can put a page of sled's back to what it was before it was split: then each row is
    /// found by its key, and whoever walks forwards comes to an end there, or passes over rows.
    pub(super) fn is_linked(&self, end: Bound<Vec<u8>>, most: usize) -> Result<bool, DatabaseError> {
        let back = self.range(Bound::Unbounded, end.clone()).rev().take(most);
        let back = back.map(|row| row.map(|(key, _)| key)).collect::<Result<Vec<_>, _>>()?;
        let Some(first) = back.last() else { return Ok(true) };
        let mut forward = self.range(Bound::Included(first.to_vec()), end);
        for key in back.iter().rev() {
            if forward.next().transpose()?.is_none_or(|(met, _)| met != key) {
                return Ok(false);
            }
        }
        Ok(forward.next().transpose()?.is_none())
    }

    pub(super) fn first(&self) -> Result<Option<(IVec, IVec)>, DatabaseError> {
        self.iter().next().transpose()
    }

    /// The number of rows; walks through all of them.
    pub(super) fn count(&self) -> Result<u64, DatabaseError> {
        self.iter().try_fold(0, |n, row| row.map(|_| n + 1))
    }

    /// sled's subscriber on this tree; what nobody writes to, and a disk in memory, have none.
    pub(super) fn watch(&self) -> Option<Watch> {
        match self {
            Self::InPlace(trees, id) => Some(Watch::of(trees.clone(), *id)),
            Self::Sled(_) | Self::Memory(..) => None,
        }
    }
}

/// sled's subscriber on the tree that is in place.
pub(super) struct Watch {
    subscriber: sled::Subscriber,
    generation: u64,
    trees: InPlace,
    id: TreeId,
}

impl Watch {
    fn of(trees: InPlace, id: TreeId) -> Self {
        // The number first: if others take the place in between, that is seen and done again.
        let generation = trees.generation();
        Self { subscriber: trees.tree(id).watch_prefix(Vec::new()), generation, trees, id }
    }

    /// Waits for an event: whether one came, or may have come, or `None` if there will never be another.
    pub(super) fn wait(&mut self, most: Duration) -> Option<bool> {
        let event = self.subscriber.next_timeout(most);
        if self.generation != self.trees.generation() {
            *self = Self::of(self.trees.clone(), self.id);
            return Some(true);
        }
        match event {
            Ok(_) => Some(true),
            Err(RecvTimeoutError::Timeout) => Some(false),
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }
}

/// sled's rows up to the first that cannot be read: sled itself would give that error for ever.
struct UntilError(Option<Held<sled::Iter>>);

impl UntilError {
    const fn of(rows: sled::Iter) -> Self {
        Self(Some(Held::new(rows)))
    }

    fn take(&mut self, row: Option<sled::Result<(IVec, IVec)>>) -> Option<Result<(IVec, IVec), DatabaseError>> {
        if matches!(row, None | Some(Err(_))) {
            self.0 = None;
        }
        row.map(|row| row.map_err(DatabaseError::from))
    }
}

impl Iterator for UntilError {
    type Item = Result<(IVec, IVec), DatabaseError>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = self.0.as_mut()?.next();
        self.take(row)
    }
}

impl DoubleEndedIterator for UntilError {
    fn next_back(&mut self) -> Option<Self::Item> {
        let row = self.0.as_mut()?.next_back();
        self.take(row)
    }
}

/// The same of what is in place.
struct InPlaceRows {
    rows: UntilError,
    trees: InPlace,
}

impl Iterator for InPlaceRows {
    type Item = Result<(IVec, IVec), DatabaseError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.trees.reading(|| self.rows.next())
    }
}

impl DoubleEndedIterator for InPlaceRows {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.trees.reading(|| self.rows.next_back())
    }
}

/// The writer's side. There is one.
#[derive(Debug)]
pub(super) enum Engine {
    Sled {
        files: Files,
        readable: InPlace,
        guard: Guard,
        /// Hears of each batch of rows, while a compact copy is made.
        copying: Option<Copying>,
    },
    /// Opened to be looked at: no row can be written.
    Sealed(OpenFiles),
    Memory(MemoryDisk),
}

/// sled's files, open. Also where no row is changed sled's readers write: they split and merge its
/// nodes.
#[derive(Debug)]
pub(super) struct OpenFiles {
    /// Before what it looks after.
    nudge: Nudge,
    db: Arc<Held<sled::Db>>,
    /// Our own descriptor of sled's file.
    file: File,
}

impl OpenFiles {
    pub(super) fn new(db: sled::Db, path: &Path) -> Result<Self, DatabaseError> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(DatabaseError::io("opening the database's file"))?;
        let db = Arc::new(Held::new(db));
        let nudge = Nudge::start(&db).map_err(DatabaseError::io("starting a thread"))?;
        Ok(Self { nudge, db, file })
    }

    fn flush(&self) -> Result<(), DatabaseError> {
        self.nudge.during(|| self.db.flush())?;
        Ok(())
    }

    /// The sync that sled leaves out.
    fn sync_file(&self) -> Result<(), DatabaseError> {
        self.file.sync_data().map_err(DatabaseError::io("syncing the database"))
    }
}

/// sled's files, open for writing.
#[derive(Debug)]
pub(super) struct Files {
    opened: OpenFiles,
    trees: Held<Vec<sled::Tree>>,
    ahead: Ahead,
    turns: Turns,
    _writer: Writer,
}

/// Whose turn it is of several writers, each with files of its own. All of sled's databases in a
/// process share one lock: a transaction waits in it for a flush of another one to end, and
/// while it waits, nobody comes in who could flush in its stead when a write has failed ([`Nudge`]).
/// So they wait here, outside, and whoever has waited longest is next.
#[derive(Debug, Clone, Default)]
pub(super) struct Turns(Arc<FairMutex<()>>);

impl Turns {
    fn take(&self) -> FairMutexGuard<'_, ()> {
        self.0.lock()
    }
}

impl Files {
    /// What was opened by this writer, with its trees in the order of [`TreeId`], and its file in `path`.
    pub(super) fn new(
        db: sled::Db,
        trees: Vec<sled::Tree>,
        path: &Path,
        writer: Writer,
    ) -> Result<Self, DatabaseError> {
        let ahead = Ahead::of(path, Instant::now()).map_err(DatabaseError::io("opening the database's file"))?;
        let (opened, trees) = (OpenFiles::new(db, path)?, Held::new(trees));
        Ok(Self { opened, trees, ahead, turns: Turns::default(), _writer: writer })
    }

    /// Lets those of sled's threads sleep that nobody needs, while nothing is being written. Fails
    /// if sled has failed in what a reader made it write.
    fn settle(&self) -> Result<(), DatabaseError> {
        threads::settle(&self.opened.db);
        Ok(broken(&self.opened.db)?)
    }

    /// Makes the file longer than it has to be.
    fn write_ahead(&mut self) -> Result<(), DatabaseError> {
        self.ahead.tend(Instant::now()).map_err(DatabaseError::io("making the database's file longer"))
    }

    /// Handles of the trees for readers.
    pub(super) fn readable(&self) -> Vec<Held<sled::Tree>> {
        self.trees.iter().map(|tree| Held::new(tree.clone())).collect()
    }

    fn apply(&self, rows: &[RowChange]) -> Result<(), DatabaseError> {
        let write = |views: &Vec<TransactionalTree>| {
            for row in rows {
                let view = &views[row.tree as usize];
                let key = row.key.as_slice();
                match &row.value {
                    Some(value) => view.insert(key, value.as_slice())?,
                    None => view.remove(key)?,
                };
            }
            Ok::<(), ConflictableTransactionError<()>>(())
        };
        let _turn = self.turns.take();
        let transaction = || self.trees.as_slice().transaction(write);
        let result: Result<(), TransactionError<()>> = self.opened.nudge.during(transaction);
        result.map_err(|error| match error {
            TransactionError::Storage(error) => DatabaseError::Sled(error),
            TransactionError::Abort(()) => DatabaseError::corrupt("any", "the transaction was aborted"),
        })
    }

    pub(super) fn sync(&self) -> Result<(), DatabaseError> {
        let turn = self.turns.take();
        self.opened.flush()?;
        drop(turn);
        self.opened.sync_file()
    }
}

fn sealed<T>() -> Result<T, DatabaseError> {
    let source = std::io::Error::other("the database was opened to be looked at");
    Err(DatabaseError::Io { what: "writing", source })
}

impl Engine {
    /// Applies rows to all trees in one transaction, in memory. Nothing is read inside it.
    pub(super) fn apply(&self, rows: &[RowChange]) -> Result<(), DatabaseError> {
        match self {
            Self::Sled { files, copying, .. } => {
                files.apply(rows)?;
                if let Some(copying) = copying {
                    copying.follow(rows);
                }
                Ok(())
            }
            Self::Sealed(_) => sealed(),
            Self::Memory(disk) => disk.apply(rows),
        }
    }

    /// Puts what was applied on the platter: sled's flush, and the sync that it leaves out.
    pub(super) fn sync(&self) -> Result<(), DatabaseError> {
        match self {
            Self::Sled { files, .. } => files.sync(),
            Self::Sealed(looked) => looked.flush().and_then(|()| looked.sync_file()),
            Self::Memory(disk) => disk.sync(),
        }
    }

    /// Writes down, durably, which commit was the last.
    pub(super) fn write_guard(&self, stamp: Stamp) -> Result<(), DatabaseError> {
        match self {
            Self::Sled { guard, .. } => guard.write(stamp),
            Self::Sealed(_) => sealed(),
            Self::Memory(disk) => disk.write_guard(stamp),
        }
    }

    /// Called between two commits: makes itself at home where it is the only one that writes.
    /// Fails if it has failed under a reader.
    pub(super) fn settle(&self) -> Result<(), DatabaseError> {
        match self {
            Self::Sled { files, readable, .. } => files.settle().and_then(|()| readable.is_whole()),
            Self::Sealed(_) | Self::Memory(_) => Ok(()),
        }
    }

    /// Called between two commits, when there is time: the next ones find a longer file.
    pub(super) fn write_ahead(&mut self) -> Result<(), DatabaseError> {
        match self {
            Self::Sled { files, .. } => files.write_ahead(),
            Self::Sealed(_) | Self::Memory(_) => Ok(()),
        }
    }

    /// At most so many bytes of the file are not in use yet.
    pub(super) const fn bytes_ahead(&self) -> u64 {
        match self {
            Self::Sled { files, .. } => files.ahead.bytes(),
            Self::Sealed(_) | Self::Memory(_) => 0,
        }
    }

    /// The compact copy that is being made, if this is what one can be made of.
    pub(super) const fn copying(&mut self) -> Option<&mut Option<Copying>> {
        match self {
            Self::Sled { copying, .. } => Some(copying),
            Self::Sealed(_) | Self::Memory(_) => None,
        }
    }

    /// Whose turn it is to write, where there are files.
    pub(super) fn turns(&self) -> Turns {
        match self {
            Self::Sled { files, .. } => files.turns.clone(),
            Self::Sealed(_) | Self::Memory(_) => Turns::default(),
        }
    }

    /// From now on it writes by turns with others.
    pub(super) fn take_turns(&mut self, turns: Turns) {
        if let Self::Sled { files, .. } = self {
            files.turns = turns;
        }
    }

    /// The files.
    pub(super) fn into_files(self) -> Option<Files> {
        match self {
            Self::Sled { files, .. } => Some(files),
            Self::Sealed(_) | Self::Memory(_) => None,
        }
    }

    /// Puts other files, which hold the same rows, in the place of these. Gives the old ones.
    pub(super) fn replace(&mut self, new: Files) -> Option<Files> {
        match self {
            Self::Sled { files, readable, .. } => {
                readable.replace(new.readable());
                Some(std::mem::replace(files, new))
            }
            Self::Sealed(_) | Self::Memory(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::breakable::BreakableFile;
    use crate::db::open::{DATABASE_DIR, Storage, open_patiently};
    use crate::db::samples::{ROWS_GONE_BACK, gone_back};

    fn row(key: &[u8], value: Option<&[u8]>) -> RowChange {
        RowChange { tree: TreeId::Utxos, key: key.to_vec(), value: value.map(<[u8]>::to_vec) }
    }

    fn keys(rows: impl Iterator<Item = Result<(IVec, IVec), DatabaseError>>) -> Vec<Vec<u8>> {
        rows.map(|row| row.unwrap().0.to_vec()).collect()
    }

    #[test]
    fn a_disk_in_memory_reads_like_sled() {
        let db = sled::Config::new().temporary(true).open().unwrap();
        let sled_tree = db.open_tree("t").unwrap();
        let disk = MemoryDisk::new();
        let rows = [b"a".as_slice(), b"ab", b"b", b"b\xff", b"b\xff\xff", b"c"];
        for key in rows {
            sled_tree.insert(key, b"v").unwrap();
        }
        disk.apply(&rows.map(|key| row(key, Some(b"v")))).unwrap();
        let trees = [Tree::Sled(Held::new(sled_tree)), Tree::Memory(disk, TreeId::Utxos)];
        let [sled, memory] = &trees;
        let bounds = [Bound::Unbounded, Bound::Included(b"ab".to_vec()), Bound::Excluded(b"b".to_vec())];
        for from in &bounds {
            for to in &bounds {
                let both = trees.each_ref().map(|tree| keys(tree.range(from.clone(), to.clone())));
                assert_eq!(both[0], both[1], "{from:?} {to:?}");
                let both = trees.each_ref().map(|tree| keys(tree.range(from.clone(), to.clone()).rev()));
                assert_eq!(both[0], both[1], "{from:?} {to:?} backwards");
            }
        }
        for prefix in [b"".as_slice(), b"b", b"b\xff", b"z"] {
            assert_eq!(keys(sled.scan_prefix(prefix)), keys(memory.scan_prefix(prefix)), "{prefix:?}");
        }
        assert_eq!(sled.first().unwrap(), memory.first().unwrap());
        assert_eq!((sled.count().unwrap(), memory.count().unwrap()), (6, 6));
    }

    /// sled gives an error for a page that it cannot read, and the same one for ever.
    #[test]
    fn a_walk_ends_with_the_first_row_that_cannot_be_read() {
        const ROWS: u64 = 40_000;
        let dir = tempfile::tempdir().unwrap();
        let config = sled::Config::new().path(dir.path()).cache_capacity(1 << 20).flush_every_ms(None);
        let open = || open_patiently(&config, dir.path()).unwrap();
        let db = open();
        let mut batch = sled::Batch::default();
        (0..ROWS).for_each(|n| batch.insert(&n.to_be_bytes(), vec![5; 200]));
        db.apply_batch(batch).unwrap();
        db.flush().unwrap();
        drop(db);
        // It writes down where its pages are when it is opened.
        drop(open());
        let file = dir.path().join("db");
        let mut bytes = std::fs::read(&file).unwrap();
        // In the middle of each segment: not all of these places are in use.
        for segment in bytes.chunks_exact_mut(512 * 1024) {
            segment[256 * 1024..][..64].iter_mut().for_each(|byte| *byte = !*byte);
        }
        std::fs::write(&file, bytes).unwrap();
        let db = open();
        let tree = Tree::Sled(Held::new((*db).clone()));
        for rows in [Box::new(tree.iter()) as Box<dyn Iterator<Item = _>>, Box::new(tree.iter().rev())] {
            let (good, bad): (Vec<_>, Vec<_>) = rows.take(2 * ROWS as usize).partition(Result::is_ok);
            assert_eq!(bad.len(), 1, "after {} rows", good.len());
            assert!((good.len() as u64) < ROWS);
        }
    }

    #[test]
    fn a_page_that_went_back_is_noticed() {
        for data_dir in gone_back() {
            let Storage { trees, .. } = Storage::look(data_dir.path(), 1 << 20).unwrap();
            let tree = trees.get(TreeId::Changes);
            assert!((0..ROWS_GONE_BACK).all(|n| tree.get(n.to_be_bytes()).unwrap().is_some()), "by key all are there");
            assert!(tree.count().unwrap() < ROWS_GONE_BACK);
            assert!(!tree.is_linked(Bound::Unbounded, usize::MAX).unwrap());
        }
    }

    /// Writes while all of sled's threads sleep.
    fn while_all_sleep(write: impl FnOnce(&Files) + Send + 'static) {
        let dir = tempfile::tempdir().unwrap();
        let (done, outcome) = std::sync::mpsc::channel();
        let path = dir.path().to_path_buf();
        std::thread::spawn(move || {
            let Storage { engine, .. } = Storage::open(&path, 1 << 20).unwrap();
            let files = engine.into_files().unwrap();
            threads::put_all_to_sleep(&files.opened.db);
            write(&files);
            done.send(files.trees[TreeId::Utxos as usize].get(b"key").unwrap()).unwrap();
        });
        let written = outcome.recv_timeout(Duration::from_secs(60)).expect("it goes on");
        assert_eq!(written.as_deref(), Some(b"value".as_slice()));
    }

    #[test]
    fn a_write_that_takes_long_wakes_the_threads_that_sleep() {
        while_all_sleep(|files| {
            files.apply(&[row(b"key", Some(b"value"))]).unwrap();
            files.sync().unwrap();
        });
    }

    /// As a reader who splits a node: his calls are not looked after.
    #[test]
    fn whoever_waits_for_a_thread_gets_one() {
        while_all_sleep(|files| {
            files.trees[TreeId::Utxos as usize].insert(b"key", b"value").unwrap();
            files.opened.db.flush().unwrap();
        });
    }

    /// As a reader's write, who splits a node: nobody has to commit for it to be known.
    #[test]
    fn what_fails_between_two_commits_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let file = BreakableFile::for_sled(&dir.path().join(DATABASE_DIR));
        let Storage { engine, trees, .. } = Storage::open(dir.path(), 1 << 20).unwrap();
        let rows: Vec<_> =
            (0..5_000_u32).map(|n| row(&n.wrapping_mul(0x9E37_79B1).to_be_bytes(), Some(&[7; 500]))).collect();
        engine.apply(&rows).unwrap();
        engine.sync().unwrap();
        engine.settle().unwrap();
        file.break_it();
        let Engine::Sled { files, .. } = &engine else { panic!("files") };
        assert!(trees.get(TreeId::Utxos).count().is_err() || files.opened.db.flush().is_err());
        assert!(engine.settle().is_err());
    }

    /// sled's readers change its pages too. Here it is the call that panics.
    #[test]
    fn it_is_known_that_sled_came_apart_under_a_reader() {
        let dir = tempfile::tempdir().unwrap();
        let Storage { engine, trees, .. } = Storage::open(dir.path(), 1 << 20).unwrap();
        let Engine::Sled { readable, .. } = &engine else { panic!("files") };
        assert_eq!(trees.get(TreeId::Utxos).count().unwrap(), 0);
        engine.settle().unwrap();
        let reading = readable.clone();
        assert!(std::thread::spawn(move || reading.reading(|| panic!("it comes apart"))).join().is_err());
        assert!(engine.settle().is_err());
    }

    #[test]
    fn what_was_not_synced_is_lost_with_the_power() {
        let disk = MemoryDisk::new();
        let tree = Tree::Memory(disk.clone(), TreeId::Utxos);
        let engine = Engine::Memory(disk.clone());
        engine.apply(&[row(b"a", Some(b"1"))]).unwrap();
        engine.sync().unwrap();
        engine.apply(&[row(b"a", Some(b"2")), row(b"b", Some(b"2"))]).unwrap();
        engine.apply(&[row(b"a", None), row(b"b", Some(b"3"))]).unwrap();
        let image = disk.image();
        disk.lose_power(false);
        assert_eq!(tree.get(b"a").unwrap().unwrap(), b"1");
        assert_eq!(tree.get(b"b").unwrap(), None);
        disk.put_back(&image, true);
        disk.lose_power(true);
        assert_eq!(tree.get(b"a").unwrap(), None);
        assert_eq!(tree.get(b"b").unwrap().unwrap(), b"3");
        disk.fail_after(1);
        engine.apply(&[row(b"c", Some(b"4"))]).unwrap();
        assert!(engine.sync().is_err());
        assert!(engine.write_guard(Stamp { commit: 1, digest: [0; 32] }).is_err());
        disk.lose_power(false);
        assert_eq!((tree.get(b"c").unwrap(), disk.guard()), (None, None));
    }
}
