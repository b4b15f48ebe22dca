//! The end of sled's file, written before it is needed.
//!
//! A sync of a file that has grown writes down its new size and its new blocks as well. On ext4
//! with a journal that makes a small commit two to three times as long. So a node that is not in
//! a hurry writes zeros behind what sled has written, and a commit that comes finds its place
//! there. sled itself takes no notice: while it runs it knows where its log ends, and a start
//! finds segments in which nothing is, as a crash leaves them, and gives them back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
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
    /// Bytes at the end in which there is nothing yet, when it was last looked at.
    unused: u64,
    look_at: Instant,
}

impl Ahead {
    pub(super) const fn new(now: Instant) -> Self {
        Self { unused: 0, look_at: now }
    }

    /// So many bytes of the file are only zeros.
    pub(super) const fn bytes(&self) -> u64 {
        self.unused
    }

    /// Writes some more, if sled has come near the end. Nothing of the file may be being written.
    pub(super) fn tend(&mut self, file: &File, now: Instant) -> io::Result<()> {
        if now < self.look_at {
            return Ok(());
        }
        self.look_at = now + LOOK_EVERY;
        let length = file.metadata()?.len();
        self.unused = unused(file, length)?;
        if self.unused < STEP as u64 {
            file.write_all_at(&vec![0; STEP], length)?;
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
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mut now = Instant::now();
            let mut ahead = Ahead::new(now);
            let mut lengths = std::collections::BTreeSet::new();
            for _ in 0..400 {
                db.insert(written.to_be_bytes(), vec![7; 10_000]).unwrap();
                db.flush().unwrap();
                written += 1;
                ahead.tend(&file, now).unwrap();
                now += LOOK_EVERY;
                let left = zeros(&file);
                assert!((STEP as u64 - SEGMENT_BYTES..=2 * STEP as u64 + SEGMENT_BYTES).contains(&left), "{left}");
                lengths.insert(file.metadata().unwrap().len());
            }
            assert!(lengths.len() < 20, "it grows by steps, not each time: {lengths:?}");
        }
    }
}
