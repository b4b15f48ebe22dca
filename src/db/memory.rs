//! A disk in memory that can lose power: what simulations run on in the place of sled's files.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sled::IVec;

use super::DatabaseError;
use super::codec::RowChange;
use super::guard::Stamp;
use super::schema::TreeId;

/// A disk in memory, for simulations. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct MemoryDisk(Arc<Mutex<Platter>>);

/// All that a disk held at some moment.
#[derive(Debug, Clone)]
pub struct DiskImage(Platter);

#[derive(Debug, Clone, Default)]
struct Platter {
    trees: BTreeMap<TreeId, BTreeMap<Vec<u8>, Vec<u8>>>,
    /// What the rows of unsynced batches were before, newest last.
    unsynced: Vec<(TreeId, Vec<u8>, Option<Vec<u8>>)>,
    guard: Option<Stamp>,
    /// Writes until the power goes.
    writes_left: Option<u64>,
}

impl MemoryDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Platter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets so many more writes (a batch, its sync and its guard are three) succeed; the
    /// next one, and all after it, fail.
    pub fn fail_after(&self, writes: u64) {
        self.lock().writes_left = Some(writes);
    }

    /// The power goes, and comes back. What was applied and not synced is lost, or (`keep`)
    /// happened to reach the platter all the same.
    pub fn lose_power(&self, keep: bool) {
        let mut platter = self.lock();
        platter.writes_left = None;
        let unsynced = std::mem::take(&mut platter.unsynced);
        for (tree, key, before) in unsynced.into_iter().rev().filter(|_| !keep) {
            platter.put(tree, key, before);
        }
    }

    /// What it holds now, synced or not.
    pub fn image(&self) -> DiskImage {
        DiskImage(self.lock().clone())
    }

    /// Puts an earlier image back, as a damaged database or a restored directory does;
    /// without `with_guard` the guard stays what it is.
    pub fn put_back(&self, image: &DiskImage, with_guard: bool) {
        let mut platter = self.lock();
        let guard = platter.guard;
        *platter = image.0.clone();
        platter.writes_left = None;
        if !with_guard {
            platter.guard = guard;
        }
    }

    /// The rows of a tree as they lie there, in order of key. `None` if there is no such tree.
    pub fn raw_rows(&self, tree: &str) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
        let id = TreeId::named(tree)?;
        Some(self.lock().tree(id).iter().map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    /// Puts or (`None`) removes a row as damage does: nothing is checked, and no guard hears
    /// of it. Does nothing if there is no such tree.
    pub fn damage(&self, tree: &str, key: Vec<u8>, value: Option<Vec<u8>>) {
        if let Some(id) = TreeId::named(tree) {
            self.lock().put(id, key, value);
        }
    }

    pub(super) fn guard(&self) -> Option<Stamp> {
        self.lock().guard
    }

    pub(super) fn get(&self, id: TreeId, key: &[u8]) -> Option<IVec> {
        self.lock().tree(id).get(key).map(|value| IVec::from(value.as_slice()))
    }

    /// The rows whose keys are within these bounds; each step looks at the tree as it is then.
    pub(super) fn range(&self, id: TreeId, from: Bound<Vec<u8>>, to: Bound<Vec<u8>>) -> MemoryRange {
        MemoryRange { disk: self.clone(), id, from, to }
    }

    pub(super) fn apply(&self, rows: &[RowChange]) -> Result<(), DatabaseError> {
        self.lock().apply(rows)
    }

    pub(super) fn sync(&self) -> Result<(), DatabaseError> {
        self.lock().sync()
    }

    pub(super) fn write_guard(&self, stamp: Stamp) -> Result<(), DatabaseError> {
        self.lock().write_guard(stamp)
    }
}

impl Platter {
    fn tree(&self, id: TreeId) -> &BTreeMap<Vec<u8>, Vec<u8>> {
        static EMPTY: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        self.trees.get(&id).unwrap_or(&EMPTY)
    }

    fn put(&mut self, tree: TreeId, key: Vec<u8>, value: Option<Vec<u8>>) -> Option<Vec<u8>> {
        let tree = self.trees.entry(tree).or_default();
        match value {
            Some(value) => tree.insert(key, value),
            None => tree.remove(&key),
        }
    }

    fn write(&mut self) -> Result<(), DatabaseError> {
        match &mut self.writes_left {
            None => Ok(()),
            Some(0) => {
                let source = std::io::Error::other("the disk has no power");
                Err(DatabaseError::Io { what: "writing", source })
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    fn apply(&mut self, rows: &[RowChange]) -> Result<(), DatabaseError> {
        self.write()?;
        for row in rows {
            let before = self.put(row.tree, row.key.clone(), row.value.clone());
            self.unsynced.push((row.tree, row.key.clone(), before));
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), DatabaseError> {
        self.write()?;
        self.unsynced.clear();
        Ok(())
    }

    fn write_guard(&mut self, stamp: Stamp) -> Result<(), DatabaseError> {
        self.write()?;
        self.guard = Some(stamp);
        Ok(())
    }
}

/// A walk through a tree in memory.
pub(super) struct MemoryRange {
    disk: MemoryDisk,
    id: TreeId,
    from: Bound<Vec<u8>>,
    to: Bound<Vec<u8>>,
}

impl MemoryRange {
    /// The first or the last row that is left; none once the ends have met.
    fn end(&self, back: bool) -> Option<(Vec<u8>, IVec)> {
        let empty = match (&self.from, &self.to) {
            (Bound::Included(from), Bound::Included(to)) => from > to,
            (Bound::Included(from) | Bound::Excluded(from), Bound::Included(to) | Bound::Excluded(to)) => from >= to,
            _ => false,
        };
        if empty {
            return None;
        }
        let platter = self.disk.lock();
        let mut range = platter.tree(self.id).range((self.from.clone(), self.to.clone()));
        let row = if back { range.next_back() } else { range.next() };
        row.map(|(key, value)| (key.clone(), IVec::from(value.as_slice())))
    }
}

impl Iterator for MemoryRange {
    type Item = Result<(IVec, IVec), DatabaseError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (key, value) = self.end(false)?;
        self.from = Bound::Excluded(key.clone());
        Some(Ok((IVec::from(key), value)))
    }
}

impl DoubleEndedIterator for MemoryRange {
    fn next_back(&mut self) -> Option<Self::Item> {
        let (key, value) = self.end(true)?;
        self.to = Bound::Excluded(key.clone());
        Some(Ok((IVec::from(key), value)))
    }
}
