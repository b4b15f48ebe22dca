//! The bounded room in which children wait for their parents.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::event::Source;
use crate::limits::MAX_WAITING_FOR_PARENTS;
use crate::types::{Transaction, Txid};

/// A transaction whose parent is not settled here.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) transaction: Arc<Transaction>,
    /// Everybody who sent it and wants an answer.
    pub(super) sources: Vec<Source>,
    parent: Txid,
}

/// Children by txid and by the parent that they wait for. Nothing of it is acknowledged.
#[derive(Debug, Default)]
pub(super) struct ParentRoom {
    children: BTreeMap<Txid, Waiting>,
    by_parent: BTreeMap<Txid, BTreeSet<Txid>>,
}

impl ParentRoom {
    /// How many sources of one child are remembered.
    const MAX_SOURCES: usize = 16;

    /// Adds a source to a child that waits already; `None` if it does not, `Some(false)` if
    /// no more can wait with it.
    pub(super) fn join(&mut self, txid: &Txid, source: Source) -> Option<bool> {
        let waiting = self.children.get_mut(txid)?;
        if waiting.sources.contains(&source) {
            return Some(true);
        }
        let room = waiting.sources.len() < Self::MAX_SOURCES;
        if room {
            waiting.sources.push(source);
        }
        Some(room)
    }

    /// Lets a child wait; `false` if the room is full.
    pub(super) fn enter(&mut self, transaction: Arc<Transaction>, source: Source, parent: Txid) -> bool {
        if self.children.len() >= MAX_WAITING_FOR_PARENTS {
            return false;
        }
        let txid = transaction.txid();
        self.by_parent.entry(parent).or_default().insert(txid);
        self.children.insert(txid, Waiting { transaction, sources: vec![source], parent });
        true
    }

    /// The body of a child that waits.
    pub(super) fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.children.get(txid).map(|waiting| Arc::clone(&waiting.transaction))
    }

    /// Takes one child out.
    pub(super) fn leave(&mut self, txid: &Txid) -> Option<Waiting> {
        let waiting = self.children.remove(txid)?;
        if let Some(siblings) = self.by_parent.get_mut(&waiting.parent) {
            siblings.remove(txid);
            if siblings.is_empty() {
                self.by_parent.remove(&waiting.parent);
            }
        }
        Some(waiting)
    }

    /// Takes out all that waited for `parent`.
    pub(super) fn leave_with(&mut self, parent: &Txid) -> Vec<Waiting> {
        let children = self.by_parent.get(parent).cloned().unwrap_or_default();
        children.iter().filter_map(|txid| self.leave(txid)).collect()
    }
}
