//! The tables of what is not settled yet. All of it is memory; what has to survive a
//! crash is in the [`Changes`](super::view::Changes) of the step that made it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::certificate::Certificate;
use super::committee::{Committee, MemberIndex};
use super::vote::{CountedVote, VoteKind};
use crate::limits::MAX_UNKNOWN_PER_MEMBER;
use crate::types::{OutPoint, Transaction, Txid, UnixSeconds};

/// The votes of one kind on one transaction, one of each member.
#[derive(Debug, Default)]
pub(super) struct Tally {
    votes: BTreeMap<MemberIndex, CountedVote>,
    weight: u64,
}

impl Tally {
    /// Counts a vote; a second one of the same member changes nothing.
    pub(super) fn add(&mut self, committee: &Committee, vote: CountedVote) {
        let member = vote.batch.get().member();
        if let std::collections::btree_map::Entry::Vacant(place) = self.votes.entry(member) {
            place.insert(vote);
            self.weight += committee.weight(member);
        }
    }

    pub(super) fn remove(&mut self, committee: &Committee, member: MemberIndex) {
        if self.votes.remove(&member).is_some() {
            self.weight -= committee.weight(member);
        }
    }

    pub(super) fn has(&self, member: MemberIndex) -> bool {
        self.votes.contains_key(&member)
    }

    pub(super) fn of(&self, member: MemberIndex) -> Option<&CountedVote> {
        self.votes.get(&member)
    }

    pub(super) fn count(&self) -> u32 {
        // A committee has at most 256 members.
        u32::try_from(self.votes.len()).unwrap_or(u32::MAX)
    }

    pub(super) const fn weight(&self) -> u64 {
        self.weight
    }

    fn certificate(&self, committee: &Committee, kind: VoteKind, txid: Txid) -> Certificate {
        let votes = self.votes.values().map(CountedVote::to_signed).collect();
        Certificate { kind, txid, epoch: committee.epoch(), votes }
    }
}

/// One value for each kind of vote.
#[derive(Debug, Clone, Default)]
pub(super) struct PerKind<T>([T; 3]);

impl<T> PerKind<T> {
    pub(super) fn of(&self, kind: VoteKind) -> &T {
        &self.0[usize::from(kind.byte() - 1)]
    }

    pub(super) fn of_mut(&mut self, kind: VoteKind) -> &mut T {
        &mut self.0[usize::from(kind.byte() - 1)]
    }
}

/// A transaction that is neither settled nor dead here.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The body; absent while only votes or a certificate have come.
    pub(super) transaction: Option<Arc<Transaction>>,
    /// Whether a row of it is in the database.
    pub(super) recorded: bool,
    /// When this member locked its inputs.
    pub(super) locked_at: Option<UnixSeconds>,
    /// What this member has voted, durably or in the batch at hand.
    pub(super) own: PerKind<bool>,
    /// What members have voted.
    pub(super) tallies: PerKind<Tally>,
    /// C(T), F(T), A(T), as far as they are here.
    pub(super) certificates: PerKind<Option<Arc<Certificate>>>,
    /// Whether a conflict is known and its timer runs or has run.
    pub(super) contradicted: bool,
    /// What contradicted it first; it may be gone by now.
    pub(super) contradicted_by: Option<Txid>,
    /// Since when it is in flight.
    pub(super) since_ms: u64,
    /// How often it has been said again.
    pub(super) said_again: u32,
}

impl Pending {
    /// It is in flight from now on, if it was not before.
    pub(super) fn begin(&mut self, now_ms: u64) {
        if self.since_ms == 0 {
            self.since_ms = now_ms.max(1);
        }
    }

    pub(super) fn certificate(&self, kind: VoteKind) -> Option<&Arc<Certificate>> {
        self.certificates.of(kind).as_ref()
    }

    /// Makes the certificate of `kind` if the votes are a quorum and it is not here yet.
    pub(super) fn certify(&mut self, committee: &Committee, kind: VoteKind, txid: Txid) -> bool {
        if self.certificate(kind).is_some() || self.tallies.of(kind).weight() < committee.quorum() {
            return false;
        }
        *self.certificates.of_mut(kind) = Some(Arc::new(self.tallies.of(kind).certificate(committee, kind, txid)));
        true
    }

    pub(super) fn voted_by(&self, member: MemberIndex) -> bool {
        VoteKind::ALL.into_iter().any(|kind| self.tallies.of(kind).has(member))
    }

    pub(super) fn has_own_vote(&self) -> bool {
        VoteKind::ALL.into_iter().any(|kind| *self.own.of(kind))
    }

    /// Whether anything would be lost if it were forgotten.
    pub(super) fn matters(&self) -> bool {
        self.recorded
            || self.has_own_vote()
            || VoteKind::ALL.into_iter().any(|k| self.certificate(k).is_some() || self.tallies.of(k).weight() > 0)
    }
}

/// Every pending transaction, and who spends what.
#[derive(Debug)]
pub(super) struct PendingTable {
    by_txid: BTreeMap<Txid, Pending>,
    spenders: BTreeMap<OutPoint, BTreeSet<Txid>>,
    /// How many have a body.
    bodies: usize,
    /// What a member voted on and this one has not, oldest first: its quota.
    unknown: Vec<VecDeque<Txid>>,
}

impl PendingTable {
    pub(super) fn new(members: usize) -> Self {
        Self { by_txid: BTreeMap::new(), spenders: BTreeMap::new(), bodies: 0, unknown: vec![VecDeque::new(); members] }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.by_txid.len()
    }

    /// How many have a body. What is known by votes only is not counted: whoever votes on
    /// what does not exist has a quota of its own, and must not use up anybody else's.
    pub(super) fn bodies(&self) -> usize {
        self.bodies
    }

    pub(super) fn get(&self, txid: &Txid) -> Option<&Pending> {
        self.by_txid.get(txid)
    }

    pub(super) fn get_mut(&mut self, txid: &Txid) -> Option<&mut Pending> {
        self.by_txid.get_mut(txid)
    }

    pub(super) fn entry(&mut self, txid: Txid) -> &mut Pending {
        self.by_txid.entry(txid).or_default()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Txid, &Pending)> {
        self.by_txid.iter()
    }

    /// Those after `after`, in order of txid.
    pub(super) fn after(&self, after: Txid) -> impl Iterator<Item = (&Txid, &Pending)> {
        self.by_txid.range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded))
    }

    /// Gives a pending transaction its body.
    pub(super) fn attach(&mut self, transaction: &Arc<Transaction>) -> &mut Pending {
        let txid = transaction.txid();
        for outpoint in transaction.spends() {
            self.spenders.entry(outpoint).or_default().insert(txid);
        }
        let pending = self.by_txid.entry(txid).or_default();
        if pending.transaction.replace(Arc::clone(transaction)).is_none() {
            self.bodies += 1;
        }
        pending
    }

    /// Takes a pending transaction's body away; what else is known of it stays.
    pub(super) fn detach(&mut self, txid: &Txid) {
        let body = self.by_txid.get_mut(txid).and_then(|pending| pending.transaction.take());
        self.forget_spends(txid, body.as_deref());
    }

    pub(super) fn remove(&mut self, txid: &Txid) -> Option<Pending> {
        let pending = self.by_txid.remove(txid)?;
        self.forget_spends(txid, pending.transaction.as_deref());
        Some(pending)
    }

    fn forget_spends(&mut self, txid: &Txid, body: Option<&Transaction>) {
        self.bodies -= usize::from(body.is_some());
        for outpoint in body.into_iter().flat_map(Transaction::spends) {
            if let Some(spenders) = self.spenders.get_mut(&outpoint) {
                spenders.remove(txid);
                if spenders.is_empty() {
                    self.spenders.remove(&outpoint);
                }
            }
        }
    }

    /// The pending transactions that spend an output.
    pub(super) fn spenders(&self, outpoint: &OutPoint) -> impl Iterator<Item = Txid> + '_ {
        self.spenders.get(outpoint).into_iter().flatten().copied()
    }

    /// The other pending transactions that spend an input of `transaction`.
    pub(super) fn rivals(&self, transaction: &Transaction) -> BTreeSet<Txid> {
        let spenders = transaction.spends().filter_map(|outpoint| self.spenders.get(&outpoint)).flatten();
        spenders.filter(|txid| **txid != transaction.txid()).copied().collect()
    }

    /// Makes room for a transaction on which `member` votes and this member has not, whether
    /// its body is here or not. Beyond its quota the member's own oldest votes are
    /// forgotten, and nobody else's.
    pub(super) fn admit_unknown(&mut self, committee: &Committee, member: MemberIndex, txid: Txid) {
        let queue = &mut self.unknown[member.get()];
        queue.push_back(txid);
        if queue.len() <= MAX_UNKNOWN_PER_MEMBER {
            return;
        }
        let Some(oldest) = queue.pop_front() else { return };
        let Some(pending) = self.by_txid.get_mut(&oldest).filter(|p| !p.recorded) else { return };
        for kind in VoteKind::ALL {
            pending.tallies.of_mut(kind).remove(committee, member);
        }
        if !pending.matters() {
            self.remove(&oldest);
        }
    }
}
