//! A compact copy in the place of a stopped node's database: the same rows and the same guard.
//!
//! sled writes pieces of a page wherever there is room, and gives a segment of its file back
//! only when nothing in it is of use any more; after some time most of the file is of no use.
//! In a new file the rows take what they need. Nothing that the node has said is lost by that,
//! so, unlike what is restored or imported, the copy needs no fence and its change log keeps
//! its name. It is opened again and compared row by row before it takes its place
//! ([`super::switch`]); what was there before is set aside.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::DatabaseError;
use super::codec::RowChange;
use super::guard::Agreement;
use super::inspect::Condition;
use super::open::{Storage, is_migrated, note_compact_size, size_on_disk};
use super::schema::TreeId;
use super::store::Trees;
use super::switch::{Building, will_be_there};
use super::watcher::{Watcher, watched};

/// Bytes of rows, about, that one transaction writes.
const BYTES_AT_ONCE: usize = 256 * 1024;

/// What a compaction did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Compacted {
    /// Rows, all of which were compared with the old ones.
    pub rows: u64,
    /// Bytes on disk before.
    pub bytes_before: u64,
    /// Bytes on disk now.
    pub bytes_after: u64,
    /// Where the old database is kept.
    pub set_aside: Option<PathBuf>,
}

/// Puts a compact copy of the database in `data_dir`, which nobody may have open, in its place.
///
/// # Errors
/// [`DatabaseError::Unsound`] if the database does not fit its guard, for then it needs a
/// repair, or if the copy is not the same; [`DatabaseError::OlderSchema`]; and what opening,
/// reading and writing give. The old database is in its place then.
pub fn compact(data_dir: &Path, cache_bytes: u64, watcher: &dyn Watcher) -> Result<Compacted, DatabaseError> {
    if !will_be_there(data_dir) {
        return Err(DatabaseError::Missing(data_dir.to_path_buf()));
    }
    // Open, it is locked against everybody else, and while the new one is put in its place the
    // directory is.
    let old = watched(watcher, || Storage::look(data_dir, cache_bytes))?;
    let building = Building::beside_open(data_dir)?;
    is_migrated(&old.trees)?;
    let condition = Condition::of(&old.trees, old.stamp)?;
    let Some(stamp) = old.stamp.filter(|_| condition.agreement != Agreement::Mismatch) else {
        return Err(DatabaseError::Unsound("it does not fit its guard".into()));
    };
    let bytes_before = size_on_disk(data_dir);
    let new = Storage::open(building.path(), cache_bytes)?;
    let rows = copy_rows(&old.trees, &new, watcher)?;
    new.engine.sync()?;
    new.engine.write_guard(stamp)?;
    drop(new);
    // What a start will find, not what this process remembers.
    let new = watched(watcher, || Storage::open(building.path(), cache_bytes))?;
    compare(&old.trees, &new.trees, rows, watcher)?;
    let same_guard = new.stamp == Some(stamp);
    // Comparing may have made sled rearrange it.
    new.engine.sync()?;
    drop((old, new));
    if !same_guard {
        return Err(DatabaseError::Unsound("the copy's guard is not the same".into()));
    }
    let bytes_after = size_on_disk(building.path());
    note_compact_size(building.path()).map_err(DatabaseError::io("noting the size of the copy"))?;
    let set_aside = building.put_in_place()?;
    Ok(Compacted { rows, bytes_before, bytes_after, set_aside })
}

fn copy_rows(from: &Trees, to: &Storage, watcher: &dyn Watcher) -> Result<u64, DatabaseError> {
    let (mut copied, mut rows, mut bytes) = (0, Vec::new(), 0);
    for tree in TreeId::ALL {
        for row in from.get(tree).iter() {
            let (key, value) = row?;
            bytes += key.len() + value.len();
            rows.push(RowChange { tree, key: key.to_vec(), value: Some(value.to_vec()) });
            if bytes >= BYTES_AT_ONCE {
                to.engine.apply(&rows)?;
                copied += rows.len() as u64;
                watcher.progress("copying rows", copied, None);
                (rows, bytes) = (Vec::new(), 0);
            }
        }
    }
    to.engine.apply(&rows)?;
    Ok(copied + rows.len() as u64)
}

fn compare(old: &Trees, new: &Trees, total: u64, watcher: &dyn Watcher) -> Result<(), DatabaseError> {
    let mut compared = 0;
    for tree in TreeId::ALL {
        // Backwards: whoever walks forwards may pass over rows of a damaged page, and has copied none of them.
        let (mut old, mut new) = (old.get(tree).iter().rev(), new.get(tree).iter().rev());
        loop {
            match (old.next().transpose()?, new.next().transpose()?) {
                (None, None) => break,
                (old, new) if old == new => {
                    compared += 1;
                    watcher.progress("comparing", compared, Some(total));
                }
                _ => return Err(DatabaseError::Unsound(format!("the copy of {} is not the same", tree.name()))),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::samples::gone_back;

    #[test]
    fn a_copy_that_lacks_what_was_passed_over_is_not_the_same() {
        for data_dir in gone_back() {
            let old = Storage::look(data_dir.path(), 1 << 20).unwrap();
            let copy = tempfile::tempdir().unwrap();
            let new = Storage::open(copy.path(), 1 << 20).unwrap();
            let rows = copy_rows(&old.trees, &new, &()).unwrap();
            assert!(matches!(compare(&old.trees, &new.trees, rows, &()), Err(DatabaseError::Unsound(_))));
        }
    }
}
