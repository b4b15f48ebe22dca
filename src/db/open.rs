//! Opening what the rows lie on: never so that damage brings the caller down, never under a
//! schema that this program does not know, and with a copy kept before a migration.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Read;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::codec::{RowChange, decode, encode};
use super::engine::{Engine, Files, InPlace, OpenFiles, Tree};
use super::guard::{Guard, Stamp, sync_directory};
use super::held::Held;
use super::memory::MemoryDisk;
use super::outputs::{OUTPUTS_IN_ROW, OutputRow, StoredOutput, row_of};
use super::schema::{Head, SCHEMA_VERSION, StoredNetwork, StoredTip, TreeId, address_key, meta, outpoint_key};
use super::store::Trees;
use super::threads::Writer;
use super::{DatabaseError, FrozenRow, FrozenRows, switch};
use crate::consensus::{ChainTip, FenceState};
use crate::types::{Genesis, OutPoint, PublicKey};

/// sled's directory inside the data directory.
pub(super) const DATABASE_DIR: &str = "db";

/// Outputs of the genesis that one transaction writes: whole rows of them.
const OUTPUTS_AT_ONCE: usize = 512 * OUTPUTS_IN_ROW as usize;

/// Bytes that are read at once where a file is only read through.
const READ_BYTES: usize = 1024 * 1024;

/// How long this process waits for its own lock of before.
const OWN_LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// The same of another process's lock: one that was killed is gone a moment before its lock is.
pub(super) const OTHER_LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// How often it looks.
pub(super) const LOCK_POLL: Duration = Duration::from_millis(5);

/// An open disk, and what its guard says.
#[derive(Debug)]
pub(super) struct Storage {
    pub(super) engine: Engine,
    pub(super) trees: Trees,
    pub(super) stamp: Option<Stamp>,
}

impl Storage {
    /// The files in `data_dir`, made if they are not there.
    pub(super) fn open(data_dir: &Path, cache_bytes: u64) -> Result<Self, DatabaseError> {
        std::fs::create_dir_all(data_dir).map_err(DatabaseError::io("creating the data directory"))?;
        let entered = switch::enter(data_dir)?;
        switch::remove_unfinished(data_dir, &entered)?;
        // All of sled's threads are there for its recovery.
        let writer = Writer::enter();
        let every_tree = |db: &sled::Db| TreeId::ALL.iter().map(|id| Ok(db.open_tree(id.name())?)).collect();
        let (db, trees): (_, Vec<sled::Tree>) = open_sled(data_dir, cache_bytes, every_tree)?;
        // Also of an old database: a crash may have come between its making and this.
        sync_names(data_dir)?;
        let (guard, stamp) = Guard::open(data_dir)?;
        let files = Files::new(db, trees, &sled_file(data_dir), writer)?;
        let readable = InPlace::new(files.readable());
        let trees = Trees::new(|id| Tree::InPlace(readable.clone(), id));
        Ok(Self { engine: Engine::Sled { files, readable, guard, copying: None }, trees, stamp })
    }

    /// The files of a database that is only looked at. It has to exist, and nothing is made
    /// in it: no guard, no tree. A tree that an older schema has not got is empty.
    pub(super) fn look(data_dir: &Path, cache_bytes: u64) -> Result<Self, DatabaseError> {
        let missing = || DatabaseError::Missing(data_dir.to_path_buf());
        if !switch::will_be_there(data_dir) {
            return Err(missing());
        }
        let _entered = switch::enter(data_dir)?;
        if !is_there(data_dir) {
            return Err(missing());
        }
        let (db, trees) = open_sled(data_dir, cache_bytes, |db| {
            let (names, empty) = (db.tree_names(), MemoryDisk::new());
            let open = |id: TreeId| match names.iter().any(|name| *name == id.name().as_bytes()) {
                true => Ok(Tree::Sled(Held::new(db.open_tree(id.name())?))),
                false => Ok(Tree::Memory(empty.clone(), id)),
            };
            TreeId::ALL.into_iter().map(open).collect::<Result<Vec<_>, DatabaseError>>()
        })?;
        let trees = Trees::new(|id| trees[id as usize].clone());
        let engine = Engine::Sealed(OpenFiles::new(db, &sled_file(data_dir))?);
        Ok(Self { engine, trees, stamp: Guard::read(data_dir)? })
    }

    /// A disk in memory.
    pub(super) fn memory(disk: &MemoryDisk) -> Self {
        Self {
            engine: Engine::Memory(disk.clone()),
            trees: Trees::new(|id| Tree::Memory(disk.clone(), id)),
            stamp: disk.guard(),
        }
    }

    pub(super) fn meta<T: serde::de::DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, DatabaseError> {
        read_meta(&self.trees, key)
    }

    /// Brings an older schema up to this program's, one step after the other.
    pub(super) fn migrate(&self, genesis: &Genesis) -> Result<(), DatabaseError> {
        let stored = self.meta::<StoredNetwork>(meta::NETWORK)?;
        // A new database is filled elsewhere; another network's is refused elsewhere.
        if stored.is_none_or(|stored| stored.genesis_hash != genesis.hash()) {
            return Ok(());
        }
        while let Some(schema) = self.meta::<u32>(meta::SCHEMA)?.filter(|schema| *schema < SCHEMA_VERSION) {
            let rows = match schema {
                1 => super::m0002_blocks::rows(genesis),
                2 => self.rows_of_schema_3()?,
                3 => self.rows_of_schema_4()?,
                4 => self.rows_of_schema_5()?,
                5 => self.rows_of_schema_6()?,
                _ => return Err(DatabaseError::corrupt("meta", format!("there never was a schema {schema}"))),
            };
            tracing::info!(from = schema, "migrating the database");
            self.write(rows)?;
        }
        Ok(())
    }

    fn rows_of_schema_3(&self) -> Result<Vec<FrozenRow>, DatabaseError> {
        let rows = super::m0003_fence::rows(|tree| self.all_rows(tree))?;
        rows.ok_or_else(|| DatabaseError::corrupt("locks", "a row that schema 2 never wrote"))
    }

    fn rows_of_schema_4(&self) -> Result<Vec<FrozenRow>, DatabaseError> {
        let rows = super::m0004_bodies::rows(|tree| self.all_rows(tree))?;
        rows.ok_or_else(|| DatabaseError::corrupt("transactions", "a row that schema 3 never wrote"))
    }

    fn rows_of_schema_5(&self) -> Result<Vec<FrozenRow>, DatabaseError> {
        let rows = super::m0005_confirmed::rows(|tree| self.all_rows(tree))?;
        rows.ok_or_else(|| DatabaseError::corrupt("confirmed", "a row that schema 4 never wrote"))
    }

    fn rows_of_schema_6(&self) -> Result<Vec<FrozenRow>, DatabaseError> {
        let rows = super::m0006_outputs::rows(|tree| self.all_rows(tree))?;
        rows.ok_or_else(|| DatabaseError::corrupt("utxos", "a row that schema 5 never wrote"))
    }

    /// All rows of a tree, for a migration.
    fn all_rows(&self, tree: &'static str) -> Result<FrozenRows, DatabaseError> {
        let id = TreeId::named(tree).ok_or_else(|| DatabaseError::corrupt(tree, "there is no such tree"))?;
        self.trees.get(id).iter().map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec()))).collect()
    }

    /// Fills a new database: the genesis, then the stamp that says it is whole. Until that
    /// stamp is there, opening starts over, and writes the same rows again. With `fenced`, nothing
    /// that the genesis made may be voted on before others have said what this member may have
    /// voted on.
    pub(super) fn initialise(
        &self,
        genesis: &Genesis,
        public_key: Option<PublicKey>,
        fenced: bool,
    ) -> Result<StoredNetwork, DatabaseError> {
        let mut outputs = genesis.transaction().creates().peekable();
        while outputs.peek().is_some() {
            let (mut rows, mut of_genesis) = (Vec::new(), BTreeMap::<OutPoint, OutputRow>::new());
            for (outpoint, output) in outputs.by_ref().take(OUTPUTS_AT_ONCE) {
                of_genesis.entry(row_of(&outpoint)).or_default().set(&outpoint, StoredOutput::Live(output));
                let index = address_key(&output.address, &outpoint).to_vec();
                rows.push(RowChange { tree: TreeId::Addresses, key: index, value: Some(Vec::new()) });
                if fenced {
                    let key = outpoint_key(&outpoint).to_vec();
                    rows.push(RowChange { tree: TreeId::Fence, key, value: Some(Vec::new()) });
                }
            }
            of_genesis.iter().try_for_each(|(first, row)| row.put(&mut rows, first))?;
            // The stamp says that everything before it is there, so that has to be so first.
            self.engine.apply(&rows)?;
            self.engine.sync()?;
        }
        let (hash, log_id) = (genesis.hash(), rand::random());
        let network = StoredNetwork { network: genesis.network(), genesis_hash: hash, public_key, log_id };
        let tip = StoredTip::new(&ChainTip::of_genesis(genesis), 1);
        let mut stamp = vec![
            (meta::CHAIN, encode(TreeId::Meta, &tip)?),
            (meta::NETWORK, encode(TreeId::Meta, &network)?),
            (meta::SCHEMA, encode(TreeId::Meta, &SCHEMA_VERSION)?),
        ];
        if fenced {
            stamp.push((meta::FENCE, encode(TreeId::Meta, &FenceState::Asking)?));
        }
        let row = |(key, value): (&[u8], _)| RowChange { tree: TreeId::Meta, key: key.to_vec(), value: Some(value) };
        self.engine.apply(&stamp.into_iter().map(row).collect::<Vec<_>>())?;
        self.engine.sync()?;
        Ok(network)
    }

    /// Writes rows of a migration in one transaction, and syncs it.
    fn write(&self, rows: Vec<FrozenRow>) -> Result<(), DatabaseError> {
        let row = |(tree, key, value): FrozenRow| {
            let tree = TreeId::named(tree).ok_or_else(|| DatabaseError::corrupt(tree, "there is no such tree"))?;
            Ok(RowChange { tree, key, value })
        };
        let rows = rows.into_iter().map(row).collect::<Result<Vec<_>, DatabaseError>>()?;
        self.engine.apply(&rows)?;
        self.engine.sync()
    }
}

/// Opens the files for use, migrated; of an older schema a copy is kept first.
pub(super) fn open_migrated(data_dir: &Path, genesis: &Genesis, cache_bytes: u64) -> Result<Storage, DatabaseError> {
    let mut storage = Storage::open(data_dir, cache_bytes)?;
    let ours = storage.meta::<StoredNetwork>(meta::NETWORK)?.is_some_and(|n| n.genesis_hash == genesis.hash());
    let older = schema_check(&storage.trees)?.filter(|schema| ours && *schema < SCHEMA_VERSION);
    if let Some(schema) = older {
        let commit = storage.meta::<Head>(meta::HEAD)?.unwrap_or(Head::EMPTY).commit;
        drop(storage);
        let copy = copy_before_migration(data_dir, schema, commit);
        if !copy.exists() {
            super::backup::copy_files(data_dir, &copy)?;
        }
        tracing::info!(copy = %copy.display(), "kept a copy of the database before migrating it");
        storage = Storage::open(data_dir, cache_bytes)?;
        storage.migrate(genesis)?;
    }
    Ok(storage)
}

/// Where the database of an older schema is kept.
pub(super) fn copy_before_migration(data_dir: &Path, schema: u32, commit: u64) -> PathBuf {
    data_dir.join(format!("before-schema-{SCHEMA_VERSION}-from-{schema}-at-{commit}"))
}

pub(super) fn sled_file(data_dir: &Path) -> PathBuf {
    data_dir.join(DATABASE_DIR).join("db")
}

/// Whether there is a database in a data directory at all.
pub(super) fn is_there(data_dir: &Path) -> bool {
    sled_file(data_dir).is_file()
}

/// Bytes of sled's files in a data directory.
pub(super) fn size_on_disk(data_dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(data_dir.join(DATABASE_DIR)) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|m| m.len()).sum()
}

/// Beside sled's files, where they are compact: how many bytes they were then.
const COMPACT_SIZE_FILE: &str = "compact";

/// Writes down how large the database in `data_dir` is, which is compact. It has to be synced
/// with its directory.
pub(super) fn note_compact_size(data_dir: &Path) -> std::io::Result<()> {
    let path = data_dir.join(DATABASE_DIR).join(COMPACT_SIZE_FILE);
    std::fs::write(&path, size_on_disk(data_dir).to_string())?;
    std::fs::File::open(path)?.sync_all()
}

/// How large the database in `data_dir` was when it was last compact, if that is known.
pub(super) fn compact_size(data_dir: &Path) -> Option<u64> {
    std::fs::read_to_string(data_dir.join(DATABASE_DIR).join(COMPACT_SIZE_FILE)).ok()?.parse().ok()
}

/// Reads all of sled's files once, before sled does. While it recovers, sled takes a segment that it cannot
/// read for one that was never written, and cuts it off: after one error of the disk most of
/// the database may be gone for good.
fn read_through(data_dir: &Path) -> Result<(), DatabaseError> {
    let read = || -> std::io::Result<()> {
        let mut buffer = vec![0; READ_BYTES];
        let entries = match std::fs::read_dir(data_dir.join(DATABASE_DIR)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let mut file = std::fs::File::open(entry.path())?;
                while file.read(&mut buffer)? > 0 {}
            }
        }
        Ok(())
    };
    read().map_err(DatabaseError::io("reading the database's files"))
}

/// Opens sled so that neither a half-written snapshot nor a panic inside it brings the
/// caller down.
fn open_sled<T>(
    data_dir: &Path,
    cache_bytes: u64,
    trees: impl FnOnce(&sled::Db) -> Result<T, DatabaseError>,
) -> Result<(sled::Db, T), DatabaseError> {
    let path = data_dir.join(DATABASE_DIR);
    remove_stale_snapshots(&path)?;
    remove_unborn_configuration(data_dir)?;
    read_through(data_dir)?;
    let config = sled::Config::new().path(&path).cache_capacity(cache_bytes).flush_every_ms(None);
    let opened = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let db = open_patiently(&config, &path)?;
        let trees = trees(&db)?;
        Ok::<_, DatabaseError>((db, trees))
    }));
    match opened {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(DatabaseError::Sled(sled::Error::Io(error)))) if is_lock_error(&error) => {
            Err(DatabaseError::InUse(data_dir.to_path_buf()))
        }
        Ok(Err(DatabaseError::Sled(error @ sled::Error::Corruption { .. }))) => {
            Err(DatabaseError::Damaged(error.to_string()))
        }
        Ok(Err(error)) => Err(error),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(DatabaseError::Damaged(text.unwrap_or_else(|| "it panicked".into())))
        }
    }
}

/// The databases that this process has had open.
fn opened() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    static OPENED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    OPENED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A database that this process has had open stands in another data directory now.
pub(super) fn was_moved_to(data_dir: &Path) {
    opened().insert(data_dir.join(DATABASE_DIR));
}

/// Opens sled's files, and waits a little for whoever has just let go of them: if this very
/// process has had them open, its own lock may live longer than the handle that was dropped,
/// for sled's threads hold it too.
pub(super) fn open_patiently(config: &sled::Config, path: &Path) -> Result<sled::Db, DatabaseError> {
    let patience = if opened().contains(path) { OWN_LOCK_PATIENCE } else { OTHER_LOCK_PATIENCE };
    let began = Instant::now();
    loop {
        match config.open() {
            Err(sled::Error::Io(error)) if is_lock_error(&error) && began.elapsed() < patience => {
                std::thread::sleep(LOCK_POLL);
            }
            outcome => {
                let db = outcome?;
                opened().insert(path.to_path_buf());
                return Ok(db);
            }
        }
    }
}

fn is_lock_error(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::WouldBlock || error.to_string().contains("could not acquire lock")
}

/// A snapshot that was being written when the power went would be taken for the newest.
fn remove_stale_snapshots(path: &Path) -> Result<(), DatabaseError> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(DatabaseError::Io { what: "reading the database's directory", source }),
    };
    for entry in entries {
        let entry = entry.map_err(DatabaseError::io("reading the database's directory"))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            std::fs::remove_file(entry.path()).map_err(DatabaseError::io("removing a half-written snapshot"))?;
        }
    }
    Ok(())
}

/// sled writes its configuration before its file, and not at once. What was cut off there is
/// the configuration of nothing, and sled would call it damaged for ever.
fn remove_unborn_configuration(data_dir: &Path) -> Result<(), DatabaseError> {
    let is_empty = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len()) == 0;
    let configuration = data_dir.join(DATABASE_DIR).join("conf");
    if is_empty(&sled_file(data_dir)) && configuration.is_file() {
        std::fs::remove_file(&configuration).map_err(DatabaseError::io("removing a half-written configuration"))?;
    }
    Ok(())
}

/// sled never syncs the names of its files, nor `conf`.
fn sync_names(data_dir: &Path) -> Result<(), DatabaseError> {
    let path = data_dir.join(DATABASE_DIR);
    for name in ["conf", "db"] {
        let file = OpenOptions::new().read(true).open(path.join(name));
        file.and_then(|f| f.sync_all()).map_err(DatabaseError::io("syncing the database's files"))?;
    }
    sync_directory(&path)?;
    sync_directory(data_dir)?;
    match data_dir.canonicalize().ok().and_then(|p| p.parent().map(Path::to_path_buf)) {
        Some(parent) => sync_directory(&parent),
        None => Ok(()),
    }
}

pub(super) fn read_meta<T: serde::de::DeserializeOwned>(trees: &Trees, key: &[u8]) -> Result<Option<T>, DatabaseError> {
    let row = trees.get(TreeId::Meta).get(key)?;
    row.map(|row| decode(TreeId::Meta, &row)).transpose()
}

/// Refuses a schema that this program does not know.
pub(super) fn schema_check(trees: &Trees) -> Result<Option<u32>, DatabaseError> {
    let found = read_meta::<u32>(trees, meta::SCHEMA)?;
    match found {
        Some(found) if found > SCHEMA_VERSION => Err(DatabaseError::NewerSchema { found, known: SCHEMA_VERSION }),
        found => Ok(found),
    }
}

/// Refuses what was not brought up to this program's schema: its rows would be taken for
/// what they are not. One that was never filled has none.
pub(super) fn is_migrated(trees: &Trees) -> Result<(), DatabaseError> {
    match schema_check(trees)? {
        Some(found) if found < SCHEMA_VERSION => Err(DatabaseError::OlderSchema { found, known: SCHEMA_VERSION }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_that_was_cut_off_before_there_was_a_database_harms_nothing() {
        for beginning in ["", "segment_size: 524", "segment_size: 524288\nuse_compression: false\nversion: 0.34\n"] {
            let directory = tempfile::tempdir().unwrap();
            std::fs::create_dir(directory.path().join(DATABASE_DIR)).unwrap();
            std::fs::write(directory.path().join(DATABASE_DIR).join("conf"), beginning).unwrap();
            drop(Storage::open(directory.path(), 1 << 20).unwrap());
            drop(Storage::open(directory.path(), 1 << 20).unwrap());
        }
    }
}
