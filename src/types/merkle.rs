//! Merkle trees over 32-byte leaves (protocol §1).

use super::hash::{Hash32, tagged_hash};

/// The node above two.
pub fn parent(left: &Hash32, right: &Hash32) -> Hash32 {
    Hash32::from_bytes(tagged_hash("TIME/merkle", &[left.as_bytes(), right.as_bytes()]))
}

/// All levels of a tree, leaves first. An odd last node moves up unchanged.
#[derive(Debug, Clone)]
pub struct MerkleTree {
    levels: Vec<Vec<Hash32>>,
}

impl MerkleTree {
    /// The tree over `leaves`; `None` if there are none.
    pub fn new(leaves: Vec<Hash32>) -> Option<Self> {
        if leaves.is_empty() {
            return None;
        }
        let mut levels = vec![leaves];
        while let Some(row) = levels.last().filter(|row| row.len() > 1) {
            let up = row
                .chunks(2)
                .map(|pair| match pair {
                    [left, right] => parent(left, right),
                    single => single[0],
                })
                .collect();
            levels.push(up);
        }
        Some(Self { levels })
    }

    /// The number of leaves.
    pub fn size(&self) -> usize {
        self.levels[0].len()
    }

    /// The root; of a single leaf, the leaf itself.
    pub fn root(&self) -> Hash32 {
        self.levels[self.levels.len() - 1][0]
    }

    /// The siblings from leaf `index` up; a level where the node has none adds nothing.
    pub fn path(&self, mut index: usize) -> Vec<Hash32> {
        let mut path = Vec::with_capacity(self.levels.len());
        for row in &self.levels[..self.levels.len() - 1] {
            if let Some(sibling) = row.get(index ^ 1) {
                path.push(*sibling);
            }
            index /= 2;
        }
        path
    }
}

/// The root that `leaf` at `index` of `size` leaves reaches along `path`.
///
/// `None` if the index is not below the size or the path has too few or too many entries.
pub fn climb(leaf: Hash32, mut index: usize, mut size: usize, path: &[Hash32]) -> Option<Hash32> {
    if index >= size {
        return None;
    }
    let mut node = leaf;
    let mut path = path.iter();
    while size > 1 {
        if index ^ 1 < size {
            let sibling = path.next()?;
            node = if index & 1 == 1 { parent(sibling, &node) } else { parent(&node, sibling) };
        }
        index /= 2;
        size = size.div_ceil(2);
    }
    path.next().is_none().then_some(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_climbs_to_the_root_and_to_no_other() {
        for n in 1..=33_u8 {
            let leaves: Vec<_> = (0..n).map(|i| Hash32::from_bytes([i; 32])).collect();
            let tree = MerkleTree::new(leaves.clone()).unwrap();
            for (i, leaf) in leaves.iter().enumerate() {
                let path = tree.path(i);
                let size = usize::from(n);
                assert_eq!(climb(*leaf, i, size, &path), Some(tree.root()));
                assert_eq!(climb(*leaf, size, size, &path), None);
                let longer: Vec<_> = path.iter().copied().chain([*leaf]).collect();
                assert_eq!(climb(*leaf, i, size, &longer), None);
                if !path.is_empty() {
                    assert_eq!(climb(*leaf, i, size, &path[1..]), None);
                    assert_ne!(climb(*leaf, i ^ 1, size, &path), Some(tree.root()));
                }
            }
        }
        assert!(MerkleTree::new(vec![]).is_none());
    }
}
