//! The guard: a small file beside the database that remembers the last commit.
//!
//! Damage can make sled open at an older state without a word. The guard holds the number
//! and the chained digest of the last commit, which sled holds too, and is synced after
//! each commit and before anything of it leaves. At the next start the two have to agree;
//! sled one commit ahead is an ordinary crash between the two writes, and anything else
//! means that votes may be lost.
//!
//! Two slots are written in turn, each in a sector of its own with a checksum, so that a
//! torn write leaves the other.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::DatabaseError;
use super::schema::Head;

const MAGIC: &[u8; 8] = b"TIMEGRD1";
const SLOT_BYTES: usize = 80;
const SLOT_STRIDE: u64 = 4096;

/// What a slot says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The number of the last commit.
    pub commit: u64,
    /// The digest of the chain of commits up to it.
    pub digest: [u8; 32],
}

impl Stamp {
    fn to_bytes(self) -> [u8; SLOT_BYTES] {
        let mut bytes = [0; SLOT_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..16].copy_from_slice(&self.commit.to_be_bytes());
        bytes[16..48].copy_from_slice(&self.digest);
        let checksum = blake3::hash(&bytes[..48]);
        bytes[48..].copy_from_slice(checksum.as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; SLOT_BYTES]) -> Option<Self> {
        let commit = u64::from_be_bytes(bytes[8..16].try_into().ok()?);
        let stamp = Self { commit, digest: bytes[16..48].try_into().ok()? };
        (stamp.to_bytes() == *bytes).then_some(stamp)
    }
}

/// The open guard file.
#[derive(Debug)]
pub struct Guard {
    file: File,
}

impl Guard {
    /// The file's name in the data directory.
    pub const FILE_NAME: &'static str = "guard";

    /// Opens the guard, making an empty one if there is none, and reads the newest stamp.
    pub fn open(data_dir: &Path) -> Result<(Self, Option<Stamp>), DatabaseError> {
        let path = data_dir.join(Self::FILE_NAME);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(DatabaseError::io("opening the guard"))?;
        file.sync_all().map_err(DatabaseError::io("syncing the guard"))?;
        sync_directory(data_dir)?;
        let stamp = newest(&file)?;
        Ok((Self { file }, stamp))
    }

    /// The newest stamp of the guard in `data_dir`, without making or changing anything.
    pub fn read(data_dir: &Path) -> Result<Option<Stamp>, DatabaseError> {
        match File::open(data_dir.join(Self::FILE_NAME)) {
            Ok(file) => newest(&file),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(DatabaseError::Io { what: "opening the guard", source }),
        }
    }

    /// Writes a stamp and syncs it.
    pub fn write(&self, stamp: Stamp) -> Result<(), DatabaseError> {
        let offset = if stamp.commit.is_multiple_of(2) { 0 } else { SLOT_STRIDE };
        self.file.write_all_at(&stamp.to_bytes(), offset).map_err(DatabaseError::io("writing the guard"))?;
        self.file.sync_data().map_err(DatabaseError::io("syncing the guard"))
    }
}

fn newest(file: &File) -> Result<Option<Stamp>, DatabaseError> {
    let slots = [0, SLOT_STRIDE].into_iter().map(|offset| read_slot(file, offset));
    let slots = slots.collect::<Result<Vec<_>, _>>()?;
    Ok(slots.into_iter().flatten().max_by_key(|stamp| stamp.commit))
}

fn read_slot(file: &File, offset: u64) -> Result<Option<Stamp>, DatabaseError> {
    let mut bytes = [0; SLOT_BYTES];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(Stamp::from_bytes(&bytes)),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
        Err(source) => Err(DatabaseError::Io { what: "reading the guard", source }),
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(path: &Path) -> Result<(), DatabaseError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(DatabaseError::io("syncing a directory"))
}

/// How the guard and the database stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agreement {
    /// Both name the same commit.
    Equal,
    /// The database is one commit ahead: a crash between the two writes.
    OneAhead,
    /// Anything else: the database may be older than what this node has said.
    Mismatch,
}

/// Compares the newest stamp with the database's head.
pub(super) fn compare(stamp: Option<Stamp>, head: &Head) -> Agreement {
    let stamp = stamp.unwrap_or(Stamp { commit: 0, digest: [0; 32] });
    if (stamp.commit, stamp.digest) == (head.commit, head.digest) {
        Agreement::Equal
    } else if (Some(stamp.commit), stamp.digest) == (head.commit.checked_sub(1), head.previous_digest) {
        Agreement::OneAhead
    } else {
        Agreement::Mismatch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(commit: u64) -> Stamp {
        Stamp { commit, digest: [u8::try_from(commit).unwrap(); 32] }
    }

    #[test]
    fn the_newest_whole_slot_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (guard, none) = Guard::open(dir.path()).unwrap();
        assert_eq!(none, None);
        for commit in 1..=5 {
            guard.write(stamp(commit)).unwrap();
            assert_eq!(Guard::open(dir.path()).unwrap().1, Some(stamp(commit)));
        }
        // A torn write of the sixth leaves the fifth.
        guard.file.write_all_at(&stamp(6).to_bytes()[..30], 0).unwrap();
        assert_eq!(Guard::open(dir.path()).unwrap().1, Some(stamp(5)));
        std::fs::write(dir.path().join("guard"), b"").unwrap();
        assert_eq!(Guard::open(dir.path()).unwrap().1, None);
    }

    #[test]
    fn only_equal_and_one_ahead_are_sound() {
        let mut head = Head::EMPTY;
        assert_eq!(compare(None, &head), Agreement::Equal);
        let first = head.next(&[1; 32], 0);
        assert_eq!(compare(None, &first), Agreement::OneAhead);
        let second = first.next(&[2; 32], 0);
        let of = |h: &Head| Some(Stamp { commit: h.commit, digest: h.digest });
        assert_eq!(compare(of(&first), &first), Agreement::Equal);
        assert_eq!(compare(of(&first), &second), Agreement::OneAhead);
        assert_eq!(compare(of(&second), &first), Agreement::Mismatch, "an older database");
        assert_eq!(compare(None, &second), Agreement::Mismatch, "a lost guard");
        assert_eq!(compare(of(&second), &Head::EMPTY), Agreement::Mismatch, "a lost database");
        head = first.next(&[3; 32], 0);
        assert_eq!(compare(of(&second), &head), Agreement::Mismatch, "another history");
    }
}
