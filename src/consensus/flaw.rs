//! Bugs that a simulation plants on purpose, to see that it would find them.
//!
//! They exist only under the feature `planted-flaws`, which nothing but this package's own
//! tests turn on. Without it a machine has no place to keep one, and the question whether
//! it has is the constant `false`.

use super::machine::Machine;

/// A rule that is broken.
#[cfg_attr(not(feature = "planted-flaws"), allow(dead_code))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// A member commits to what it has voted to abort.
    CommitAfterAbort,
}

impl Machine {
    /// Breaks a rule, from now on.
    #[cfg(feature = "planted-flaws")]
    pub fn plant(&mut self, flaw: Flaw) {
        self.flaw = Some(flaw);
    }

    #[cfg(feature = "planted-flaws")]
    pub(super) fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    #[cfg(not(feature = "planted-flaws"))]
    pub(super) const fn has(&self, _: Flaw) -> bool {
        false
    }
}
