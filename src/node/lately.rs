//! What was seen lately, by its hash.

use std::collections::HashSet;

/// A set of hashes that forgets the oldest. Two generations bound it: when the young one is
/// full it becomes the old one, and what was old is forgotten.
#[derive(Debug)]
pub(super) struct Lately {
    generation: usize,
    young: HashSet<[u8; 32]>,
    old: HashSet<[u8; 32]>,
}

impl Lately {
    /// An empty set that remembers at least the last `generation` hashes, and at most twice
    /// as many.
    pub(super) fn new(generation: usize) -> Self {
        Self { generation, young: HashSet::new(), old: HashSet::new() }
    }

    pub(super) fn contains(&self, hash: &[u8; 32]) -> bool {
        self.young.contains(hash) || self.old.contains(hash)
    }

    pub(super) fn insert(&mut self, hash: [u8; 32]) {
        if self.young.len() >= self.generation {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(hash);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_remembered_and_the_oldest_forgotten() {
        let hash = |n: u8| [n; 32];
        let mut lately = Lately::new(4);
        for n in 0..100 {
            lately.insert(hash(n));
            assert!((n.saturating_sub(3)..=n).all(|recent| lately.contains(&hash(recent))), "{n}");
            assert!(n < 8 || !lately.contains(&hash(n - 8)), "{n}");
        }
    }
}
