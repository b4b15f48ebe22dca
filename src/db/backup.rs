//! Copies of a stopped node's files, whole and durable: backups, and restoring them.
//!
//! A copy that is cut off stands under another name and is never taken for one. A backup is
//! opened before it gets its name: what cannot be opened is none. What is restored goes
//! behind the fence with a new name for its change log, for the node has said more since
//! than the backup knows, and then takes the place of what was there ([`super::switch`]).

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use super::DatabaseError;
use super::guard::{Guard, Stamp, sync_directory};
use super::inspect::{Condition, Trees as InspectTrees};
use super::open::{DATABASE_DIR, Storage, schema_check};
use super::repair_fence::put_behind_fence;
use super::schema::{SCHEMA_VERSION, StoredNetwork, meta};
use super::store::Database;
use super::switch::{Building, enter, lock_database, sync_all, will_be_there};
use super::watcher::{Watcher, watched};
use crate::types::Genesis;

/// Bytes that are copied at once.
const COPY_BYTES: usize = 1024 * 1024;

/// What was restored or imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutInPlace {
    /// What it was before it went behind the fence.
    pub from: Condition,
    /// What the data directory holds now.
    pub now: Condition,
    /// Outputs behind the fence; `None` for an observer, which has none.
    pub fenced: Option<u64>,
    /// Where what was there before is kept.
    pub set_aside: Option<PathBuf>,
}

/// Copies the database in `data_dir`, which nobody may have open, to a new directory, and
/// opens the copy to see that it is one. Gives what was copied.
pub fn backup(data_dir: &Path, to: &Path, cache_bytes: u64, watcher: &dyn Watcher) -> Result<Condition, DatabaseError> {
    if !will_be_there(data_dir) {
        return Err(DatabaseError::Missing(data_dir.to_path_buf()));
    }
    if to.symlink_metadata().is_ok() {
        return Err(DatabaseError::Exists(to.to_path_buf()));
    }
    let _entered = enter(data_dir)?;
    let _database = lock_database(data_dir)?.ok_or_else(|| DatabaseError::Missing(data_dir.to_path_buf()))?;
    let unfinished = unfinished_name(to);
    copy_to(data_dir, &unfinished, watcher)?;
    let copy = watched(watcher, || InspectTrees::open_with_cache(&unfinished, cache_bytes))?;
    let condition = copy.condition()?;
    // Opening it and looking at it may have written to it.
    copy.sync()?;
    drop(copy);
    sync_all(&unfinished)?;
    give_name(&unfinished, to)?;
    Ok(condition)
}

/// Puts a copy of the database in `from` into `data_dir`, behind the fence. What was there
/// is set aside. A copy that a node would not start with is refused: it can be repaired where
/// it is. With the genesis it is seen to that it is of this network, and one of an
/// older schema is migrated.
pub fn restore(
    data_dir: &Path,
    from: &Path,
    genesis: Option<&Genesis>,
    cache_bytes: u64,
    watcher: &dyn Watcher,
) -> Result<PutInPlace, DatabaseError> {
    if !will_be_there(from) {
        return Err(DatabaseError::Missing(from.to_path_buf()));
    }
    let replaced = network_in(data_dir, cache_bytes, watcher)?;
    let building = Building::begin(data_dir)?;
    {
        let _entered = enter(from)?;
        let _database = lock_database(from)?.ok_or_else(|| DatabaseError::Missing(from.to_path_buf()))?;
        copy_to(from, building.path(), watcher)?;
    }
    let storage = watched(watcher, || Storage::open(building.path(), cache_bytes))?;
    let schema = schema_check(&storage.trees)?;
    let condition = Condition::of(&storage.trees, storage.stamp)?;
    if let Some(genesis) = genesis {
        condition.belongs_to(genesis)?;
    }
    if let (Some(replaced), Some(network)) = (&replaced, &condition.network) {
        network.is_of(replaced.genesis_hash, replaced.public_key)?;
    }
    if let Some(genesis) = genesis.filter(|_| schema.is_some_and(|schema| schema < SCHEMA_VERSION)) {
        storage.migrate(genesis)?;
    }
    fence_and_put(building, storage, condition, watcher)
}

/// Whose database stands in a data directory, if there is one that can be read: nobody else's
/// is put in its place. One that cannot be read is what a restore is for.
pub(super) fn network_in(
    data_dir: &Path,
    cache_bytes: u64,
    watcher: &dyn Watcher,
) -> Result<Option<StoredNetwork>, DatabaseError> {
    let look = || Storage::look(data_dir, cache_bytes).and_then(|files| files.meta::<StoredNetwork>(meta::NETWORK));
    match watched(watcher, look) {
        Err(error @ DatabaseError::InUse(_)) => Err(error),
        found => Ok(found.unwrap_or_default()),
    }
}

/// The last steps of a restore and an import.
pub(super) fn fence_and_put(
    building: Building,
    storage: Storage,
    from: Condition,
    watcher: &dyn Watcher,
) -> Result<PutInPlace, DatabaseError> {
    watcher.progress("putting it behind the fence", 0, None);
    let mut database = Database::of_storage(storage, false)?;
    let fenced = put_behind_fence(&mut database)?;
    let stamp = Stamp { commit: database.head.commit, digest: database.head.digest };
    let now = Condition::of(&database.shared.trees, Some(stamp))?;
    drop(database);
    let set_aside = building.put_in_place()?;
    Ok(PutInPlace { from, now, fenced, set_aside })
}

/// Copies sled's files and the guard of a database that nobody has open into a new
/// directory.
pub(super) fn copy_files(data_dir: &Path, to: &Path) -> Result<(), DatabaseError> {
    let unfinished = unfinished_name(to);
    copy_to(data_dir, &unfinished, &())?;
    give_name(&unfinished, to)
}

/// `to.unfinished`, beside it.
fn unfinished_name(to: &Path) -> PathBuf {
    let mut name = to.file_name().unwrap_or_default().to_os_string();
    name.push(".unfinished");
    to.with_file_name(name)
}

fn give_name(unfinished: &Path, to: &Path) -> Result<(), DatabaseError> {
    std::fs::rename(unfinished, to).map_err(DatabaseError::io("naming a backup"))?;
    match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

/// What an earlier attempt left there is removed: it was never a copy.
fn copy_to(data_dir: &Path, to: &Path, watcher: &dyn Watcher) -> Result<(), DatabaseError> {
    let made = DatabaseError::io("making a backup");
    let make = || match std::fs::remove_dir_all(to) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => std::fs::create_dir_all(to.join(DATABASE_DIR)),
    };
    make().map_err(made)?;
    let total = super::open::size_on_disk(data_dir);
    let mut copied = 0;
    let mut tell = |bytes: u64| {
        copied += bytes;
        watcher.progress("copying", copied, Some(total));
    };
    let entries = std::fs::read_dir(data_dir.join(DATABASE_DIR));
    for entry in entries.map_err(DatabaseError::io("reading the database's directory"))? {
        let entry = entry.map_err(DatabaseError::io("reading the database's directory"))?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file {
            copy_file(&entry.path(), &to.join(DATABASE_DIR).join(entry.file_name()), &mut tell)?;
        }
    }
    let guard = data_dir.join(Guard::FILE_NAME);
    if guard.is_file() {
        copy_file(&guard, &to.join(Guard::FILE_NAME), &mut |_| {})?;
    }
    sync_directory(&to.join(DATABASE_DIR))?;
    sync_directory(to)
}

fn copy_file(from: &Path, to: &Path, copied: &mut dyn FnMut(u64)) -> Result<(), DatabaseError> {
    let mut copy = || -> std::io::Result<()> {
        let (mut source, mut target) = (File::open(from)?, File::create_new(to)?);
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            match source.read(&mut buffer)? {
                0 => return target.sync_all(),
                read => {
                    target.write_all(&buffer[..read])?;
                    copied(read as u64);
                }
            }
        }
    };
    copy().map_err(DatabaseError::io("copying a file of the database"))
}
