//! The bounded room in which children wait for their parents.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::event::Source;
use crate::limits::MAX_WAITING_FOR_PARENTS;
use crate::types::{Transaction, Txid};

/// A transaction whose parent is not settled here.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Everybody who sent it and wants an answer, each with the copy that he sent: nobody
    /// can tell yet whose keys own what it spends.
    pub(super) copies: Vec<(Source, Arc<Transaction>)>,
    /// How many of the copies are different ones.
    different: usize,
    parent: Txid,
}

/// Children by txid and by the parent that they wait for. Nothing of it is acknowledged.
#[derive(Debug, Default)]
pub(super) struct ParentRoom {
    children: BTreeMap<Txid, Waiting>,
    by_parent: BTreeMap<Txid, BTreeSet<Txid>>,
    /// How many different bodies are kept.
    bodies: usize,
}

impl ParentRoom {
    /// How many sources of one child are remembered, beside the members.
    const MAX_SOURCES: usize = 16;

    /// Adds a source to a child that waits already; `None` if it does not, `Some(false)` if
    /// no more can wait with it.
    pub(super) fn join(&mut self, transaction: &Arc<Transaction>, source: Source) -> Option<bool> {
        let waiting = self.children.get_mut(&transaction.txid())?;
        let known = waiting.copies.iter().map(|(_, copy)| copy).find(|copy| **copy == *transaction).cloned();
        if known.is_some() && waiting.copies.iter().any(|(from, copy)| *from == source && **copy == **transaction) {
            return Some(true);
        }
        let one_of_few = match source {
            Source::Member(_) => waiting.copies.iter().all(|(from, _)| *from != source),
            Source::Wallet(_) | Source::Answer => {
                let others = waiting.copies.iter().filter(|(from, _)| !matches!(from, Source::Member(_)));
                others.count() < Self::MAX_SOURCES
            }
        };
        let room = one_of_few && (known.is_some() || self.bodies < MAX_WAITING_FOR_PARENTS);
        if room {
            waiting.different += usize::from(known.is_none());
            self.bodies += usize::from(known.is_none());
            waiting.copies.push((source, known.unwrap_or_else(|| Arc::clone(transaction))));
        }
        Some(room)
    }

    /// Lets a child wait; `false` if the room is full.
    pub(super) fn enter(&mut self, transaction: Arc<Transaction>, source: Source, parent: Txid) -> bool {
        if self.bodies >= MAX_WAITING_FOR_PARENTS {
            return false;
        }
        let txid = transaction.txid();
        self.by_parent.entry(parent).or_default().insert(txid);
        self.bodies += 1;
        self.children.insert(txid, Waiting { copies: vec![(source, transaction)], different: 1, parent });
        true
    }

    /// The copies of a child that waits.
    pub(super) fn copies(&self, txid: &Txid) -> impl Iterator<Item = &Arc<Transaction>> {
        self.children.get(txid).into_iter().flat_map(|waiting| &waiting.copies).map(|(_, copy)| copy)
    }

    /// Takes one child out.
    pub(super) fn leave(&mut self, txid: &Txid) -> Option<Waiting> {
        let waiting = self.children.remove(txid)?;
        self.bodies -= waiting.different;
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
