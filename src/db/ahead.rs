//! The end of sled's file, written before it is needed.
//!
//! A sync of a file that has grown writes down its new size and its new blocks as well. On ext4
//! with a journal that makes a small commit two to three times as long. So a node that is not in
//! a hurry writes zeros behind what sled has written, and a commit that comes finds its place
//! there. sled itself takes no notice: while it runs it knows where its log ends, and a start
//! finds segments in which nothing is, as a crash leaves them, and gives them back.
//!
//! sled may be writing there at the same time, also between two commits: whoever reads splits the
//! nodes that have grown too large, and what that writes goes to the end of the log as well. So
//! the zeros are appended (`O_APPEND`), to where the file ends when it is their turn and not to
//! where it ended when somebody looked: they are never written over anything.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// sled's segments.
const SEGMENT_BYTES: u64 = 512 * 1024;
/// The beginning of each of them that says what it is, and is never all zeros.
const HEADER_BYTES: usize = 20;
/// So much is written at a time, in bytes.
const STEP: usize = 1024 * 1024;
/// More of it than this is as good as this.
const ENOUGH: u64 = 2 * STEP as u64;
/// How often it is looked how far sled has come.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How far the file has been made.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Whatever is written by way of it is appended.
    file: File,
    /// Bytes at the end in which there is nothing yet, when it was last looked at.
    unused: u64,
    look_at: Instant,
}

impl Ahead {
    /// Of sled's file, which has to be there.
    pub(super) fn of(path: &Path, now: Instant) -> io::Result<Self> {
        let file = File::options().read(true).append(true).open(path)?;
        Ok(Self { file, unused: 0, look_at: now })
    }

    /// So many bytes of the file are only zeros.
    pub(super) const fn bytes(&self) -> u64 {
        self.unused
    }

    /// Writes some more, if sled has come near the end.
    pub(super) fn tend(&mut self, now: Instant) -> io::Result<()> {
        if now < self.look_at {
            return Ok(());
        }
        self.look_at = now + LOOK_EVERY;
        let length = self.file.metadata()?.len();
        self.unused = unused(&self.file, length)?;
        if self.unused < STEP as u64 {
            self.file.write_all(&vec![0; STEP])?;
            self.unused += STEP as u64;
        }
        Ok(())
    }
}

/// Bytes behind the last segment that has been begun, as far as it matters: no more is read than
/// tells that there are enough.
fn unused(file: &File, length: u64) -> io::Result<u64> {
    let mut behind = length.next_multiple_of(SEGMENT_BYTES);
    while length.saturating_sub(behind) < ENOUGH
        && let Some(segment) = behind.checked_sub(SEGMENT_BYTES)
    {
        let mut header = [0; HEADER_BYTES];
        match file.read_exact_at(&mut header, segment) {
            // Not even a header has its place there.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            read => read?,
        }
        if header != [0; HEADER_BYTES] {
            break;
        }
        behind = segment;
    }
    Ok(length.saturating_sub(behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the file behind the last that is none of the zeros.
    fn zeros(file: &File) -> u64 {
        let length = file.metadata().unwrap().len();
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes.iter().rev().take_while(|byte| **byte == 0).count() as u64
    }

    /// sled's threads write whenever they like: a reader that comes upon a node that has grown
    /// too large splits it, and what it writes is at the end of the log too.
    #[test]
    fn what_others_write_at_the_end_meanwhile_stays() {
        const PIECES: u64 = 2_000;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let length = |piece: u64| 1 + piece * 7_919 % 50_000;
        let others = std::thread::spawn({
            let file = file.try_clone().unwrap();
            move || {
                let mut end = 0;
                for piece in 0..PIECES {
                    file.write_all_at(&vec![7; length(piece) as usize], end).unwrap();
                    end += length(piece);
                }
                end
            }
        });
        let mut now = Instant::now();
        let mut ahead = Ahead::of(&path, now).unwrap();
        while !others.is_finished() {
            ahead.tend(now).unwrap();
            now += LOOK_EVERY;
        }
        let end = others.join().unwrap();
        let mut bytes = vec![0; usize::try_from(end).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes.iter().position(|byte| *byte != 7), None);
    }

    /// Why that matters: everything is read, as a compact copy does it, and each leaf that has
    /// grown too large is split on the way.
    #[test]
    fn readers_of_sled_write_too() {
        const ROWS: u32 = 10_000;
        let dir = tempfile::tempdir().unwrap();
        let config = sled::Config::new().path(dir.path()).flush_every_ms(None);
        let db = crate::db::open::open_patiently(&config, dir.path()).unwrap();
        let mut batch = sled::Batch::default();
        (0..ROWS).for_each(|n| batch.insert(&n.wrapping_mul(0x9E37_79B1).to_be_bytes(), vec![7; 500]));
        db.apply_batch(batch).unwrap();
        db.flush().unwrap();
        let file = || std::fs::read(dir.path().join("db")).unwrap();
        let before = file();
        assert_eq!(db.iter().map(Result::unwrap).count(), ROWS as usize);
        db.flush().unwrap();
        assert!(file() != before);
    }

    #[test]
    fn sled_finds_its_place_ahead_and_nothing_of_it_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let config = sled::Config::new().path(dir.path()).flush_every_ms(None);
        let path = dir.path().join("db");
        let mut written = 0_u32;
        for _ in 0..3 {
            let db = crate::db::open::open_patiently(&config, dir.path()).unwrap();
            for n in 0..written {
                assert!(db.get(n.to_be_bytes()).unwrap().is_some_and(|value| value == [7; 10_000]), "{n}");
            }
            let file = File::open(&path).unwrap();
            let mut now = Instant::now();
            let mut ahead = Ahead::of(&path, now).unwrap();
            let mut lengths = std::collections::BTreeSet::new();
            for _ in 0..400 {
                db.insert(written.to_be_bytes(), vec![7; 10_000]).unwrap();
                db.flush().unwrap();
                written += 1;
                ahead.tend(now).unwrap();
                now += LOOK_EVERY;
                let left = zeros(&file);
                assert!((STEP as u64 - SEGMENT_BYTES..=2 * STEP as u64 + SEGMENT_BYTES).contains(&left), "{left}");
                lengths.insert(file.metadata().unwrap().len());
            }
            assert!(lengths.len() < 20, "it grows by steps, not each time: {lengths:?}");
        }
    }
}
