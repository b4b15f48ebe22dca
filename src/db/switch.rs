//! Puts a whole new database in the place of the old one, so that a crash at any moment
//! leaves the one or the other, and nothing is ever deleted that somebody may need.
//!
//! The new one is built as a data directory of its own, [`UNFINISHED`], inside the real one:
//! the same file system, and no mount point in the way. When it is whole and synced it is
//! renamed to [`INCOMING`]. That rename is the decision. What follows are renames that can
//! be done again from wherever they were cut off: the old database and its guard go to
//! `set-aside-N`, the new ones into their place. Whoever opens a data directory calls
//! [`enter`] first, which brings to an end what was decided; so nobody sees anything between.
//!
//! While a new database is being built or put in place, the data directory itself is locked,
//! and the old database's file with sled's own lock: no node starts in the middle of it.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use super::DatabaseError;
use super::guard::{Guard, sync_directory};
use super::open::{DATABASE_DIR, LOCK_POLL, OTHER_LOCK_PATIENCE, note_compact_size, sled_file, was_moved_to};

/// A data directory in the making.
const UNFINISHED: &str = "unfinished";
/// One that is whole, and whose time has come.
const INCOMING: &str = "incoming";
/// How the names of directories begin that hold what was there before.
pub(super) const SET_ASIDE: &str = "set-aside";
/// In [`INCOMING`]: the name of the directory for what was there before.
const PLACE_FOR_OLD: &str = "place-for-old";
/// What a data directory consists of.
const PARTS: [&str; 2] = [Guard::FILE_NAME, DATABASE_DIR];

/// A lock that ends when it is dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

fn lock(path: &Path, data_dir: &Path) -> Result<Lock, DatabaseError> {
    let file = File::open(path).map_err(DatabaseError::io("opening a file to lock it"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock { _file: file }),
        Err(Errno::WOULDBLOCK) => Err(DatabaseError::InUse(data_dir.to_path_buf())),
        Err(error) => Err(DatabaseError::Io { what: "locking the data directory", source: error.into() }),
    }
}

/// Locks sled's file as sled does; `None` if there is none.
pub(super) fn lock_database(data_dir: &Path) -> Result<Option<Lock>, DatabaseError> {
    let path = sled_file(data_dir);
    path.is_file().then(|| lock(&path, data_dir)).transpose()
}

/// Locks a data directory, and ends a switch in it that was decided and cut off. To be held
/// until the database is open.
pub(super) fn enter(data_dir: &Path) -> Result<Lock, DatabaseError> {
    let began = Instant::now();
    let entered = loop {
        match lock(data_dir, data_dir) {
            // A process that was killed is gone a moment before its lock is.
            Err(DatabaseError::InUse(_)) if began.elapsed() < OTHER_LOCK_PATIENCE => std::thread::sleep(LOCK_POLL),
            entered => break entered?,
        }
    };
    if data_dir.join(INCOMING).is_dir() {
        let _database = lock_database(data_dir)?;
        finish(data_dir)?;
        tracing::info!("a new database was put in place");
    }
    Ok(entered)
}

/// Removes what was being built, or was replaced, when the process that did it came to its end:
/// nobody uses it.
pub(super) fn remove_unfinished(data_dir: &Path, _entered: &Lock) -> Result<(), DatabaseError> {
    let path = data_dir.join(UNFINISHED);
    if path.is_dir() {
        // If two databases were exchanged, that has to be durable before one of them goes.
        sync_directory(data_dir)?;
        sync_directory(&path)?;
    }
    remove_tree(&path)
}

/// Whether there is a database in `data_dir`, or one is about to be.
pub(super) fn will_be_there(data_dir: &Path) -> bool {
    sled_file(data_dir).is_file() || data_dir.join(INCOMING).is_dir()
}

/// A new database that is being built beside the old one.
#[derive(Debug)]
pub(super) struct Building {
    data_dir: PathBuf,
    path: PathBuf,
    /// What is there when this is dropped stays there.
    kept: AtomicBool,
    _directory: Lock,
    _old: Option<Lock>,
}

impl Building {
    /// Begins to build in `data_dir`, which is made if it is not there. What an earlier
    /// attempt left unfinished is removed: nobody has ever used it.
    pub(super) fn begin(data_dir: &Path) -> Result<Self, DatabaseError> {
        std::fs::create_dir_all(data_dir).map_err(DatabaseError::io("creating the data directory"))?;
        let directory = enter(data_dir)?;
        let old = lock_database(data_dir)?;
        Self::in_locked(data_dir, directory, old)
    }

    /// The same beside a database that the caller itself has open, and with that locked. It
    /// has to be closed before the new one is put in its place.
    pub(super) fn beside_open(data_dir: &Path) -> Result<Self, DatabaseError> {
        Self::in_locked(data_dir, lock(data_dir, data_dir)?, None)
    }

    fn in_locked(data_dir: &Path, directory: Lock, old: Option<Lock>) -> Result<Self, DatabaseError> {
        let path = data_dir.join(UNFINISHED);
        remove_unfinished(data_dir, &directory)?;
        std::fs::create_dir(&path).map_err(DatabaseError::io("creating a directory for the new database"))?;
        let kept = AtomicBool::new(false);
        Ok(Self { data_dir: data_dir.to_path_buf(), path, kept, _directory: directory, _old: old })
    }

    /// Whether [`Self::exchange`] is possible here, before anything is built: the file system has to know how
    /// to exchange directories, and the database has to be one.
    pub(super) fn can_exchange(&self) -> Result<(), DatabaseError> {
        let try_it = || -> std::io::Result<()> {
            let [a, b] = ["a", "b"].map(|name| self.path.join(name));
            std::fs::create_dir(&a)?;
            std::fs::create_dir(&b)?;
            renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE)?;
            std::fs::remove_dir(a)?;
            std::fs::remove_dir(b)?;
            let place = std::fs::symlink_metadata(self.data_dir.join(DATABASE_DIR))?;
            match place.is_dir() && place.dev() == std::fs::metadata(&self.path)?.dev() {
                true => Ok(()),
                false => Err(std::io::Error::other("the database is elsewhere")),
            }
        };
        try_it().map_err(DatabaseError::io("trying whether directories can be exchanged"))
    }

    /// The data directory that is being built.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// It is whole, synced, of the same commit as the old one, and both are open: puts it in the
    /// place of the old database, under the same guard, in one step. What is in place then is
    /// so also after the power has gone, and the old database goes when this is dropped.
    ///
    /// # Errors
    /// Whether the new one is in place ([`NotExchanged::InPlace`]): then only a start can go on.
    pub(super) fn exchange(&self) -> Result<(), NotExchanged> {
        let (new, here) = (self.path.join(DATABASE_DIR), self.data_dir.join(DATABASE_DIR));
        let kept = |source: std::io::Error| {
            NotExchanged::Kept(DatabaseError::Io { what: "putting the compact copy in place", source })
        };
        // sled would look for what is too large for its file under the old name.
        if std::fs::read_dir(new.join("blobs")).map_err(kept)?.next().is_some() {
            return Err(kept(std::io::Error::other("it consists of more than one file")));
        }
        note_compact_size(&self.path).map_err(kept)?;
        sync_directory(&new).map_err(NotExchanged::Kept)?;
        let parents = [File::open(&self.data_dir).map_err(kept)?, File::open(&self.path).map_err(kept)?];
        // As long as nobody knows which of them will be in place, neither may go.
        self.kept.store(true, Ordering::SeqCst);
        if let Err(error) = renameat_with(CWD, &new, CWD, &here, RenameFlags::EXCHANGE) {
            self.kept.store(false, Ordering::SeqCst);
            return Err(kept(error.into()));
        }
        for parent in parents {
            parent.sync_all().map_err(|source| {
                NotExchanged::InPlace(DatabaseError::Io { what: "putting the compact copy in place", source })
            })?;
        }
        self.kept.store(false, Ordering::SeqCst);
        was_moved_to(&self.data_dir);
        Ok(())
    }

    /// It is whole: puts it in place. Gives where what was there before is kept.
    pub(super) fn put_in_place(self) -> Result<Option<PathBuf>, DatabaseError> {
        let replaces = PARTS.iter().any(|part| self.data_dir.join(part).exists());
        let place = free_name(&self.data_dir, SET_ASIDE);
        let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        std::fs::write(self.path.join(PLACE_FOR_OLD), name).map_err(DatabaseError::io("naming a place for the old"))?;
        sync_all(&self.path)?;
        let incoming = self.data_dir.join(INCOMING);
        std::fs::rename(&self.path, incoming).map_err(DatabaseError::io("naming the new database"))?;
        sync_directory(&self.data_dir)?;
        finish(&self.data_dir)?;
        Ok(replaces.then_some(place))
    }
}

/// Why a new database was not exchanged for the old one.
#[derive(Debug)]
pub(super) enum NotExchanged {
    /// The old one is in its place.
    Kept(DatabaseError),
    /// The new one is, until the power goes; which one is then, nobody knows.
    InPlace(DatabaseError),
}

impl Drop for Building {
    fn drop(&mut self) {
        if self.kept.load(Ordering::SeqCst) {
            return;
        }
        // Only what was given up; what is in place has another name by now.
        if let Err(error) = remove_tree(&self.path) {
            tracing::warn!(%error, "an unfinished database was left behind");
        }
    }
}

/// A name in the data directory that is not taken.
pub(super) fn free_name(data_dir: &Path, name: &str) -> PathBuf {
    (1..).map(|n: u64| data_dir.join(format!("{name}-{n}"))).find(|path| !path.exists()).unwrap_or_default()
}

fn remove_tree(path: &Path) -> Result<(), DatabaseError> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(DatabaseError::Io { what: "removing an unfinished database", source: error })
        }
        _ => Ok(()),
    }
}

/// Makes a data directory durable: every file, then the names.
pub(super) fn sync_all(data_dir: &Path) -> Result<(), DatabaseError> {
    let synced = DatabaseError::io("syncing a new database");
    let sync = || -> std::io::Result<()> {
        for directory in [data_dir.join(DATABASE_DIR), data_dir.to_path_buf()] {
            for entry in std::fs::read_dir(&directory)? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(&directory)?.sync_all()?;
        }
        Ok(())
    };
    sync().map_err(synced)
}

/// The renames after the decision. Each is done if it has not been done yet.
fn finish(data_dir: &Path) -> Result<(), DatabaseError> {
    let incoming = data_dir.join(INCOMING);
    let renamed = || -> std::io::Result<()> {
        for part in PARTS {
            let (new, here) = (incoming.join(part), data_dir.join(part));
            if !new.exists() {
                continue;
            }
            if here.exists() {
                let place = data_dir.join(std::fs::read_to_string(incoming.join(PLACE_FOR_OLD))?);
                std::fs::create_dir_all(&place)?;
                std::fs::rename(&here, place.join(part))?;
                File::open(&place)?.sync_all()?;
                File::open(data_dir)?.sync_all()?;
            }
            std::fs::rename(new, here)?;
        }
        File::open(data_dir)?.sync_all()?;
        File::open(&incoming)?.sync_all()?;
        std::fs::remove_dir_all(&incoming)?;
        File::open(data_dir)?.sync_all()
    };
    renamed().map_err(DatabaseError::io("putting the new database in place"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn database(data_dir: &Path, text: &str) {
        write(&sled_file(data_dir), text);
        write(&data_dir.join("guard"), text);
    }

    fn read(data_dir: &Path) -> (String, String) {
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        (read(sled_file(data_dir)), read(data_dir.join("guard")))
    }

    fn both(text: &str) -> (String, String) {
        (text.into(), text.into())
    }

    #[test]
    fn the_new_is_put_in_place_and_the_old_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = Vec::new();
        for text in ["one", "two", "three"] {
            let building = Building::begin(dir.path()).unwrap();
            assert!(matches!(enter(dir.path()), Err(DatabaseError::InUse(_))), "nobody comes in meanwhile");
            database(building.path(), text);
            kept.push(building.put_in_place().unwrap());
            assert_eq!(read(dir.path()), both(text));
        }
        assert_eq!(kept, [None, Some(dir.path().join("set-aside-1")), Some(dir.path().join("set-aside-2"))]);
        assert_eq!(read(&dir.path().join("set-aside-1")), both("one"));
        assert_eq!(read(&dir.path().join("set-aside-2")), both("two"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4);
    }

    #[test]
    fn what_is_given_up_leaves_the_old_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        database(dir.path(), "old");
        // A crash leaves the unfinished one; the next attempt takes it away.
        write(&dir.path().join(UNFINISHED).join("db").join("rest"), "of a crash");
        let building = Building::begin(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(building.path()).unwrap().count(), 0);
        write(&building.path().join("db").join("db"), "half");
        drop(building);
        drop(enter(dir.path()).unwrap());
        assert_eq!(read(dir.path()), both("old"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_database_that_somebody_has_open_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        database(dir.path(), "old");
        let open = lock_database(dir.path()).unwrap();
        assert!(matches!(Building::begin(dir.path()), Err(DatabaseError::InUse(_))));
        drop(open);
        Building::begin(dir.path()).unwrap();
    }

    /// The crash comes after the decision, before each of the renames in turn.
    #[test]
    fn what_was_decided_is_brought_to_an_end() {
        let moves = [
            ("guard", "set-aside-1/guard"),
            ("incoming/guard", "guard"),
            ("db", "set-aside-1/db"),
            ("incoming/db", "db"),
            ("incoming/place-for-old", "incoming/gone"),
        ];
        for (done, old) in (0..=moves.len()).flat_map(|done| [(done, true), (done, false)]) {
            let dir = tempfile::tempdir().unwrap();
            if old {
                database(dir.path(), "old");
            }
            let incoming = dir.path().join(INCOMING);
            database(&incoming, "new");
            write(&incoming.join(PLACE_FOR_OLD), "set-aside-1");
            for (from, to) in &moves[..done] {
                if dir.path().join(from).exists() {
                    std::fs::create_dir_all(dir.path().join(to).parent().unwrap()).unwrap();
                    std::fs::rename(dir.path().join(from), dir.path().join(to)).unwrap();
                }
            }
            assert!(will_be_there(dir.path()));
            drop(enter(dir.path()).unwrap());
            assert_eq!(read(dir.path()), both("new"), "{done} renames were done");
            assert!(!incoming.exists());
            if old {
                assert_eq!(read(&dir.path().join("set-aside-1")), both("old"), "{done} renames were done");
            }
        }
    }
}
