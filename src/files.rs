//! Reading and writing files with the care that keys and resume tokens need.
//!
//! Whoever writes here gets the whole file or none, durably, and never an overwritten key.
//! This module does not know what it writes and never prints any of it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Why a file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that must be new is there already.
    #[error("{path} exists already and is never overwritten", path = .0.display())]
    Exists(PathBuf),
    /// A secret that others can read is none.
    #[error("{path} can be read or written by others (mode {mode:03o}); run: chmod 600 {path}", path = path.display())]
    OpenToOthers {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// More bytes than such a file can have.
    #[error("{path} is larger than {limit} bytes", path = path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// The most it may have.
        limit: u64,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_path_buf();
    move |source| FileError::Io { action, path, source }
}

fn read_limited(source: impl Read, path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, FileError> {
    // Room for all of a small secret from the start: a vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(16 * 1024));
    source.take(limit + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(FileError::TooLarge { path: path.to_path_buf(), limit });
    }
    Ok(bytes)
}

/// Makes a directory and those above it.
pub fn make_dir(path: &Path) -> Result<(), FileError> {
    std::fs::create_dir_all(path).map_err(failed("make", path))
}

/// Removes a file, durably. One that is not there is gone already.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("remove", path)(error)),
    }
    match path.parent() {
        Some(parent) => File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed("sync", parent)),
        None => Ok(()),
    }
}

/// Reads a file of at most `limit` bytes; `-` is standard input.
pub fn read(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, FileError> {
    if path == Path::new("-") {
        return read_limited(io::stdin().lock(), path, limit);
    }
    read_limited(File::open(path).map_err(failed("read", path))?, path, limit)
}

/// Reads a secret file; refuses one that its group or everybody has access to.
pub fn read_secret(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let file = File::open(path).map_err(failed("read", path))?;
    // Asked of the open file, so that nobody swaps another in between.
    let mode = file.metadata().map_err(failed("read", path))?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(FileError::OpenToOthers { path: path.to_path_buf(), mode });
    }
    read_limited(file, path, limit)
}

/// Creates a file with these permissions and contents; fails if it is there already.
pub fn create_new(path: &Path, mode: u32, contents: &[u8]) -> Result<(), FileError> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|source| {
            match source.kind() {
                io::ErrorKind::AlreadyExists => FileError::Exists(path.to_path_buf()),
                _ => failed("create", path)(source),
            }
        })?;
    let written = file.write_all(contents).and_then(|()| file.sync_all()).and_then(|()| sync_directory(path));
    written.map_err(|source| {
        // Half a file would stand in the way of the next attempt. It was made here.
        std::fs::remove_file(path).unwrap_or_default();
        failed("write", path)(source)
    })
}

/// Makes a new file, mode 0600, of what `write` writes: it is there whole and durable, or
/// not at all. Fails if it is there already.
pub fn create_whole<T, E: From<FileError>>(path: &Path, write: impl FnOnce(&mut File) -> Result<T, E>) -> Result<T, E> {
    if path.symlink_metadata().is_ok() {
        return Err(FileError::Exists(path.to_path_buf()).into());
    }
    let file = tempfile::Builder::new().prefix(".time-").tempfile_in(directory_of(path));
    let mut file = file.map_err(failed("create", path))?;
    let written = write(file.as_file_mut())?;
    file.as_file().sync_all().map_err(failed("write", path))?;
    file.persist_noclobber(path).map_err(|error| match error.error.kind() {
        io::ErrorKind::AlreadyExists => FileError::Exists(path.to_path_buf()),
        _ => failed("write", path)(error.error),
    })?;
    sync_directory(path).map_err(failed("write", path))?;
    Ok(written)
}

/// Replaces a file by rename, mode 0600: a reader finds the old contents or the new.
pub fn replace(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    let write = || -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(".time-").tempfile_in(directory_of(path))?;
        file.write_all(contents)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        sync_directory(path)
    };
    write().map_err(failed("write", path))
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new name is durable only when its directory is.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory_of(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_is_private_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        std::fs::write(&path, "old").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_whole_file_is_there_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let write = |text: &'static str| {
            create_whole(&path, |file| file.write_all(text.as_bytes()).map_err(failed("write", Path::new("x"))))
        };
        let given_up: Result<(), FileError> = create_whole(&path, |file| {
            file.write_all(b"half").unwrap();
            Err(FileError::Exists("another".into()))
        });
        assert!(given_up.is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        write("whole").unwrap();
        assert!(matches!(write("other"), Err(FileError::Exists(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_over_the_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap().as_slice(), b"12345");
        assert!(matches!(read(&path, 4), Err(FileError::TooLarge { limit: 4, .. })));
    }
}
