//! Copies of a stopped node's files, whole and durable.

use std::fs::File;
use std::path::Path;

use super::DatabaseError;
use super::guard::{Guard, sync_directory};
use super::open::DATABASE_DIR;

/// Copies sled's files and the guard of a database that nobody has open into a new
/// directory. A copy that is cut off stands under another name and is never taken for one.
pub(super) fn copy_files(data_dir: &Path, to: &Path) -> Result<(), DatabaseError> {
    let unfinished = to.with_extension("unfinished");
    let made = DatabaseError::io("making a backup");
    std::fs::create_dir_all(unfinished.join(DATABASE_DIR)).map_err(made)?;
    let database = data_dir.join(DATABASE_DIR);
    let entries = std::fs::read_dir(&database).map_err(DatabaseError::io("reading the database's directory"))?;
    for entry in entries {
        let entry = entry.map_err(DatabaseError::io("reading the database's directory"))?;
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file {
            copy_file(&entry.path(), &unfinished.join(DATABASE_DIR).join(entry.file_name()))?;
        }
    }
    let guard = data_dir.join(Guard::FILE_NAME);
    if guard.is_file() {
        copy_file(&guard, &unfinished.join(Guard::FILE_NAME))?;
    }
    sync_directory(&unfinished.join(DATABASE_DIR))?;
    sync_directory(&unfinished)?;
    std::fs::rename(&unfinished, to).map_err(DatabaseError::io("naming a backup"))?;
    match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

fn copy_file(from: &Path, to: &Path) -> Result<(), DatabaseError> {
    let copy = || {
        std::fs::copy(from, to)?;
        File::open(to)?.sync_all()
    };
    copy().map_err(DatabaseError::io("copying a file of the database"))
}
