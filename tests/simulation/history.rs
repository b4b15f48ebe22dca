//! What was ever said and settled, kept outside of the members, so that no crash and no
//! lost disk can make it forgotten. The rules of protocol §6 and §7 stand here, over the
//! whole life of each honest member and over all of them together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use time_masternode::consensus::{Changes, CheckedBlock, ConsensusMessage, Verified, Vote, VoteKind};
use time_masternode::types::{
    Block, BlockHash, ConsensusStep, DecidedBlock, Height, OutPoint, Output, PublicKey, StateDigest, Transaction, Txid,
    UtxoDigest,
};

use super::book::Book;
use super::core_net::Setting;

/// What one member has said in all its life.
#[derive(Debug, Default)]
struct Life {
    votes: BTreeSet<Vote>,
    /// By input: everything that was approved, and committed to.
    approved: BTreeMap<OutPoint, BTreeSet<Txid>>,
    committed: BTreeMap<OutPoint, BTreeSet<Txid>>,
    block_votes: BTreeMap<(Height, u32, bool), Option<BlockHash>>,
    proposals: BTreeMap<(Height, u32), (BlockHash, i64)>,
}

/// The one chain.
#[derive(Debug)]
struct Chain {
    hashes: Vec<BlockHash>,
    timestamps: Vec<u64>,
    digests: Vec<StateDigest>,
    unspent: BTreeMap<OutPoint, Output>,
    digest: UtxoDigest,
    included: BTreeMap<Txid, Height>,
    aborted: BTreeMap<Txid, Height>,
    spent: BTreeMap<OutPoint, (Txid, Height)>,
}

/// The book of books.
#[derive(Debug)]
pub struct History {
    setting: Arc<Setting>,
    /// The weight of those that sign whatever is asked of them.
    lying_weight: u64,
    lives: Vec<Life>,
    /// Every body that a wallet ever made.
    pub bodies: BTreeMap<Txid, Arc<Transaction>>,
    pub spenders: BTreeMap<OutPoint, BTreeSet<Txid>>,
    /// What is final somewhere, in a block, or could be made final with the liars' help.
    settled: BTreeMap<OutPoint, Txid>,
    is_settled: BTreeSet<Txid>,
    commit_weight: BTreeMap<Txid, u64>,
    chain: Chain,
}

impl History {
    pub fn new(setting: &Arc<Setting>, lying_weight: u64) -> Self {
        let mut digest = UtxoDigest::new();
        let unspent: BTreeMap<_, _> = setting.genesis.transaction().creates().collect();
        unspent.iter().for_each(|(at, output)| digest.add(at, output));
        Self {
            setting: Arc::clone(setting),
            lying_weight,
            lives: setting.keys.iter().map(|_| Life::default()).collect(),
            bodies: BTreeMap::new(),
            spenders: BTreeMap::new(),
            settled: BTreeMap::new(),
            is_settled: BTreeSet::new(),
            commit_weight: BTreeMap::new(),
            chain: Chain {
                hashes: vec![BlockHash::from_bytes(*setting.genesis.hash().as_bytes())],
                timestamps: vec![0],
                digests: vec![digest.digest()],
                unspent,
                digest,
                included: BTreeMap::new(),
                aborted: BTreeMap::new(),
                spent: BTreeMap::new(),
            },
        }
    }

    pub fn introduce(&mut self, transaction: &Arc<Transaction>) {
        if self.bodies.insert(transaction.txid(), Arc::clone(transaction)).is_none() {
            for outpoint in transaction.spends() {
                self.spenders.entry(outpoint).or_default().insert(transaction.txid());
            }
        }
    }

    pub fn height(&self) -> Height {
        self.chain.hashes.len() as Height - 1
    }

    pub fn tip(&self) -> (BlockHash, u64, StateDigest) {
        let last = self.chain.hashes.len() - 1;
        (self.chain.hashes[last], self.chain.timestamps[last], self.chain.digests[last])
    }

    pub fn is_settled(&self, txid: &Txid) -> bool {
        self.is_settled.contains(txid)
    }

    pub fn is_confirmed(&self, txid: &Txid) -> bool {
        self.chain.included.contains_key(txid)
    }

    pub fn aborts(&self) -> usize {
        self.chain.aborted.len()
    }

    /// The chain's unspent outputs.
    pub fn unspent(&self) -> &BTreeMap<OutPoint, Output> {
        &self.chain.unspent
    }

    /// Whether the blocks up to `height` have killed it.
    pub fn is_dead(&self, txid: &Txid, height: Height) -> bool {
        let by_then = |at: &Height| *at <= height;
        let contradicted =
            |outpoint: OutPoint| self.chain.spent.get(&outpoint).is_some_and(|(by, at)| by != txid && by_then(at));
        self.chain.aborted.get(txid).is_some_and(by_then)
            || self.bodies.get(txid).is_some_and(|body| body.spends().any(contradicted))
    }

    /// The others that spend one of its inputs.
    pub fn rivals(&self, txid: &Txid) -> BTreeSet<Txid> {
        let Some(body) = self.bodies.get(txid) else { return BTreeSet::new() };
        let spenders = body.spends().filter_map(|outpoint| self.spenders.get(&outpoint)).flatten();
        spenders.copied().filter(|other| other != txid).collect()
    }

    /// Two that conflict are never both settled, and what is settled never dies.
    fn settle(&mut self, txid: Txid, how: &str) {
        if !self.is_settled.insert(txid) {
            return;
        }
        ensure!(!self.is_dead(&txid, Height::MAX), "{txid} is {how} and dead");
        for outpoint in self.bodies[&txid].spends() {
            let by = *self.settled.entry(outpoint).or_insert(txid);
            ensure!(by == txid, "{txid} is {how} and spends {outpoint}, which the settled {by} has spent");
        }
    }

    /// A member says (or is about to say) a vote. `before` and `after` are its heights
    /// around the commit of the vote.
    pub fn say(&mut self, i: usize, vote: Vote, before: Height, after: Height) {
        let Vote { kind, txid } = vote;
        if !self.lives[i].votes.insert(vote) {
            return;
        }
        ensure!(!self.is_dead(&txid, before), "member {i} votes {kind:?} on the dead {txid}");
        let said = |kind| self.lives[i].votes.contains(&Vote { kind, txid });
        ensure!(!(said(VoteKind::Commit) && said(VoteKind::Abort)), "member {i} both commits to and aborts {txid}");
        let Some(body) = self.bodies.get(&txid).cloned() else {
            violated_unknown(i, vote);
        };
        if kind == VoteKind::Abort {
            let rivals = self.rivals(&txid);
            let living = rivals.iter().any(|rival| !self.is_dead(rival, before));
            ensure!(living, "member {i} aborts {txid}, which nothing alive contradicts");
            return;
        }
        for outpoint in body.spends() {
            let life = &self.lives[i];
            let book = if kind == VoteKind::Approve { &life.approved } else { &life.committed };
            for other in book.get(&outpoint).into_iter().flatten().filter(|other| **other != txid) {
                let dead = self.is_dead(other, after);
                ensure!(dead, "member {i} votes {kind:?} on {txid} and on {other}, which conflict and live");
            }
            let life = &mut self.lives[i];
            let book = if kind == VoteKind::Approve { &mut life.approved } else { &mut life.committed };
            book.entry(outpoint).or_default().insert(txid);
        }
        if kind == VoteKind::Commit {
            let weight = self.commit_weight.entry(txid).or_default();
            *weight += self.setting.committee.weight(self.setting.member(i));
            if *weight + self.lying_weight >= self.true_quorum() {
                self.settle(txid, "as good as final");
            }
        }
    }

    /// The quorum of the protocol, whatever the members take it for.
    fn true_quorum(&self) -> u64 {
        2 * self.setting.committee.total_weight() / 3 + 1
    }

    /// What a commit of an honest member says of the world.
    pub fn enter(&mut self, i: usize, changes: &Changes, before: Height, book: &Book) {
        // Blocks first: what a vote presumes may have been executed in the same commit.
        for (hash, decided) in &changes.blocks {
            self.execute(i, *hash, decided);
        }
        if let Some(tip) = &changes.tip {
            let at = usize::try_from(tip.height).expect("a height is small");
            ensure!(self.chain.digests[at] == tip.digest.digest(), "member {i} has another state at {}", tip.height);
        }
        for (txid, dead) in &changes.dead {
            ensure!(self.is_dead(txid, dead.height), "member {i} buries {txid}, which lives");
        }
        for (txid, finalized) in &changes.finalized {
            match &finalized.certificate {
                Some(certificate) => {
                    ensure!(
                        (certificate.txid, certificate.kind) == (*txid, VoteKind::Commit),
                        "member {i}: the proof of {txid} proves something else"
                    );
                    self.settle(*txid, "final");
                }
                None => ensure!(self.is_confirmed(txid), "member {i}: {txid} is settled by nothing"),
            }
        }
        for vote in &changes.votes {
            if vote.kind == VoteKind::Abort {
                let rival = |other: &Txid| book.in_flight.contains_key(other) || changes.in_flight.contains_key(other);
                let beside = self.rivals(&vote.txid).iter().any(rival);
                ensure!(beside, "member {i} aborts {} without the other body beside it", vote.txid);
            }
            self.say(i, *vote, before, book.height);
        }
    }

    /// A block that a member executes. The first to do so has it checked.
    fn execute(&mut self, i: usize, hash: BlockHash, decided: &DecidedBlock) {
        let at = usize::try_from(decided.block.height).expect("a height is small");
        if let Some(known) = self.chain.hashes.get(at) {
            ensure!(*known == hash, "member {i} has another block at {at}");
            return;
        }
        ensure!(at == self.chain.hashes.len(), "member {i} executes {at} before the one below");
        let proven = CheckedBlock::new(decided.clone(), &self.setting.committee).map(Verified::check);
        ensure!(matches!(proven, Ok(Ok(_))), "block {at} is not decided by a quorum");
        self.extend(&decided.block, hash);
    }

    fn extend(&mut self, block: &Block, hash: BlockHash) {
        let at = block.height;
        let (previous, timestamp, digest) = self.tip();
        ensure!(block.previous_hash == previous && block.timestamp_ms > timestamp, "block {at} does not follow");
        ensure!(block.state_digest == digest, "block {at} stands on another state");
        ensure!(!block.transactions.is_empty() || !block.aborts.is_empty(), "block {at} is empty");
        let mut fees = 0;
        for txid in &block.transactions {
            ensure!(!self.is_confirmed(txid), "{txid} stands in the chain twice");
            ensure!(!self.is_dead(txid, at), "block {at} contains the dead {txid}");
            let body = Arc::clone(&self.bodies[txid]);
            for outpoint in body.spends() {
                let Some(output) = self.chain.unspent.remove(&outpoint) else {
                    super::violation::violated(format!("block {at}: {txid} spends {outpoint}, which is not there"));
                };
                self.chain.digest.remove(&outpoint, &output);
                self.chain.spent.insert(outpoint, (*txid, at));
                fees += output.amount.units();
            }
            for (outpoint, output) in body.creates() {
                self.chain.digest.add(&outpoint, &output);
                self.chain.unspent.insert(outpoint, output);
                fees -= output.amount.units();
            }
            self.chain.included.insert(*txid, at);
            self.settle(*txid, "in a block");
            for rival in self.rivals(txid) {
                ensure!(!self.is_settled(&rival), "block {at} kills {rival}, which is settled");
            }
        }
        for txid in &block.aborts {
            ensure!(!self.is_confirmed(txid), "block {at} aborts {txid}, which is in the chain");
            ensure!(!self.is_settled(txid), "block {at} aborts {txid}, which is settled");
            ensure!(!self.is_dead(txid, at), "block {at} aborts {txid}, which is dead");
            self.chain.aborted.insert(*txid, at);
        }
        if fees > 0 {
            let proposer = self.setting.committee.index_of(&block.proposer).expect("the proposer is a member");
            let address = self.setting.committee.member(proposer).payout_address;
            let outpoint = OutPoint { txid: Txid::from_bytes(*hash.as_bytes()), vout: 0 };
            let amount = time_masternode::types::Amount::from_units(fees).expect("fees are an amount");
            self.chain.unspent.insert(outpoint, Output { amount, address });
            self.chain.digest.add(&outpoint, &Output { amount, address });
        }
        self.chain.hashes.push(hash);
        self.chain.timestamps.push(block.timestamp_ms);
        self.chain.digests.push(self.chain.digest.digest());
    }

    /// A member says something about a block: once for each round and step of its life.
    pub fn say_of_block(&mut self, i: usize, own: &PublicKey, message: &ConsensusMessage) {
        let life = &mut self.lives[i];
        match message {
            ConsensusMessage::Vote(vote) if vote.voter == *own => {
                let place = (vote.height, vote.round, vote.step == ConsensusStep::Precommit);
                let said = *life.block_votes.entry(place).or_insert(vote.block_hash);
                ensure!(
                    said == vote.block_hash,
                    "member {i} says two things in a {:?} at height {}, round {}",
                    vote.step,
                    vote.height,
                    vote.round
                );
            }
            ConsensusMessage::Proposal(proposal) if proposal.proposer == *own => {
                let hash = proposal.block.hash(&self.setting.genesis.hash());
                let said = (hash, proposal.valid_round);
                let before = *life.proposals.entry((proposal.height, proposal.round)).or_insert(said);
                ensure!(
                    before == said,
                    "member {i} puts two blocks forward at height {}, round {}",
                    proposal.height,
                    proposal.round
                );
            }
            _ => {}
        }
    }

    /// Whether nobody ever contradicted it, nor what it spends.
    pub fn is_uncontradicted(&self, txid: &Txid) -> bool {
        let parents = |body: &Arc<Transaction>| {
            body.spends()
                .all(|outpoint| !self.bodies.contains_key(&outpoint.txid) || self.is_uncontradicted(&outpoint.txid))
        };
        self.rivals(txid).is_empty() && self.bodies.get(txid).is_some_and(parents)
    }
}

fn violated_unknown(i: usize, vote: Vote) -> ! {
    super::violation::violated(format!("member {i} votes {vote:?} on what nobody ever sent"))
}
