//! For tests: a file that takes no more writes from some moment on, as a disk that breaks.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// A file in memory that can be sealed.
pub(super) struct BreakableFile(OwnedFd);

impl BreakableFile {
    /// The file that sled will open in this directory.
    pub(super) fn for_sled(directory: &Path) -> Self {
        let file =
            memfd_create("sled", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("this system can do that");
        std::fs::create_dir_all(directory).expect("this system can do that");
        let there = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::os::unix::fs::symlink(there, directory.join("db")).expect("this system can do that");
        Self(file)
    }

    /// From now on each write to it fails.
    pub(super) fn break_it(&self) {
        fcntl_add_seals(&self.0, SealFlags::WRITE).expect("this system can do that");
    }
}
