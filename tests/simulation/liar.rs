//! What up to a third of the weight does to the rest. The liars know each other, hear what
//! is sent to any of them, have their own keys and nobody else's, and do whatever may be of
//! use: vote for everything and show it to one member only, keep certificates back and
//! bring them out late, claim to have locked what contradicts, put two blocks forward, say
//! two things in one round, name nothing to a member that asks for its fence, claim heights.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use time_masternode::consensus::{
    Certificate, ConsensusMessage, ConsensusVote, CountedVote, FencePage, Proposal, Vote, VoteKind,
};
use time_masternode::types::{Block, BlockHash, ConsensusStep, Height, Txid, consensus_vote_message, proposal_message};

use super::network::{Entry, Message};
use super::world::World;

/// What the liars have heard.
#[derive(Debug, Default)]
pub struct Liars {
    /// Whether they say anything at all.
    pub speak: bool,
    votes: BTreeMap<Vote, BTreeMap<usize, CountedVote>>,
    certificates: BTreeMap<(Txid, VoteKind), Arc<Certificate>>,
    /// By height and round: the blocks that are talked of.
    talk: BTreeMap<(Height, u32), BTreeSet<Option<BlockHash>>>,
    proposals: Vec<Arc<ConsensusMessage>>,
}

impl World {
    /// The liars among the members.
    pub fn lying(&self) -> Vec<usize> {
        self.shape.liars.iter().copied().collect()
    }

    /// Whether a liar's program gets its message through its own hands.
    pub fn lets_pass(&mut self, _: usize, to: usize, message: &Message) -> bool {
        let fair = if self.liars.speak { 750 } else { 1_000 };
        match message {
            Message::Fence(_) => self.rng.chance(500),
            // One half of the members is favoured.
            Message::Votes(_) | Message::Locked(_) => {
                self.rng.chance(if to.is_multiple_of(2) { fair } else { fair / 2 })
            }
            _ => self.rng.chance(fair),
        }
    }

    pub fn overhear(&mut self, from: usize, liar: usize, message: &Message) {
        match message {
            Message::Votes(batch) => {
                let voter = batch.get().member().get();
                for (index, vote) in batch.get().votes().iter().enumerate() {
                    let counted = CountedVote { batch: Arc::clone(batch), index };
                    self.liars.votes.entry(*vote).or_default().insert(voter, counted);
                }
            }
            Message::Transactions(entries) => {
                for certificate in entries.iter().filter_map(|entry| entry.certificate.as_ref()) {
                    let place = (certificate.txid, certificate.kind);
                    self.liars.certificates.insert(place, Arc::clone(certificate));
                }
            }
            Message::Consensus(message) => self.overhear_talk(message),
            Message::GetFence { .. } if self.liars.speak => {
                let nothing = FencePage { height: 0, ..FencePage::default() };
                self.network.send(&mut self.rng, self.now_ms, liar, from, &Message::Fence(nothing));
            }
            _ => {}
        }
    }

    fn overhear_talk(&mut self, message: &Arc<ConsensusMessage>) {
        match message.as_ref() {
            ConsensusMessage::Vote(vote) => {
                self.liars.talk.entry((vote.height, vote.round)).or_default().insert(vote.block_hash);
            }
            ConsensusMessage::Proposal(proposal) => {
                let hash = proposal.block.hash(&self.setting.genesis.hash());
                self.liars.talk.entry((proposal.height, proposal.round)).or_default().insert(Some(hash));
                self.liars.proposals.push(Arc::clone(message));
            }
            ConsensusMessage::Polka(_) | ConsensusMessage::RoundChange(_) => {}
        }
    }

    /// One lie.
    pub fn lie(&mut self) {
        let liars = self.lying();
        if liars.is_empty() || !self.liars.speak || self.bodies.is_empty() {
            return;
        }
        self.coverage.lies += 1;
        let liar = self.rng.pick(&liars);
        let honest: Vec<_> = self.honest().collect();
        let to = self.rng.pick(&honest);
        let height = self.history.height();
        // What is still open is of more use than what is over.
        let open: Vec<Txid> = self.bodies.keys().copied().filter(|txid| !self.is_over(txid, height)).collect();
        let all: Vec<Txid> = self.bodies.keys().copied().collect();
        let txid = if open.is_empty() || self.rng.chance(100) { self.rng.pick(&all) } else { self.rng.pick(&open) };
        match self.rng.below(12) {
            0..=2 => self.vote_for_anything(liar, txid),
            3 => self.tell(liar, to, &Message::Locked(txid)),
            4 | 5 => self.bring_out_certificate(to),
            6 => self.return_own_votes(liar, to),
            7 => {
                let kind = self.rng.pick(&VoteKind::ALL);
                let nothing = Txid::from_bytes([u8::try_from(self.rng.below(8)).expect("below 8") + 1; 32]);
                if let Some(batch) = self.sign_for(liar, vec![Vote { kind, txid: nothing }]) {
                    self.tell(liar, to, &Message::Votes(batch));
                }
            }
            8 | 9 => self.say_two_things(liar),
            10 => self.put_two_blocks_forward(),
            _ => {
                let boast = height + self.rng.below(3) as u64;
                self.tell(liar, to, &Message::Status { height: boast, in_flight: vec![txid] });
            }
        }
    }

    fn is_over(&self, txid: &Txid, height: Height) -> bool {
        self.history.is_confirmed(txid) || self.history.is_dead(txid, height)
    }

    /// Says something to one member, past its own program.
    fn tell(&mut self, liar: usize, to: usize, message: &Message) {
        self.network.send(&mut self.rng, self.now_ms, liar, to, message);
    }

    fn vote_for_anything(&mut self, liar: usize, txid: Txid) {
        let kinds: Vec<_> = VoteKind::ALL.into_iter().filter(|_| self.rng.chance(600)).collect();
        let votes: Vec<_> = kinds.into_iter().map(|kind| Vote { kind, txid }).collect();
        let Some(batch) = self.sign_for(liar, votes) else { return };
        for (index, vote) in batch.get().votes().iter().enumerate() {
            let counted = CountedVote { batch: Arc::clone(&batch), index };
            self.liars.votes.entry(*vote).or_default().insert(liar, counted);
        }
        let shown = self.rng.pick(&[200, 500, 1_000]);
        for to in 0..self.members.len() {
            if self.rng.chance(shown) {
                self.tell(liar, to, &Message::Votes(Arc::clone(&batch)));
            }
        }
    }

    /// A certificate that the liars made of what they heard, or were given, for one member.
    fn bring_out_certificate(&mut self, to: usize) {
        let liar = self.lying()[0];
        let quorum = self.setting.committee.quorum();
        let weight = |votes: &BTreeMap<usize, CountedVote>| votes.keys().map(|i| self.shape.weights[*i]).sum::<u64>();
        let made: Vec<Vote> =
            self.liars.votes.iter().filter(|(_, votes)| weight(votes) >= quorum).map(|(vote, _)| *vote).collect();
        let certificate = if !made.is_empty() && self.rng.chance(700) {
            let Vote { kind, txid } = self.rng.pick(&made);
            let votes = self.liars.votes[&Vote { kind, txid }].values().map(CountedVote::to_signed).collect();
            Arc::new(Certificate { kind, txid, epoch: self.setting.committee.epoch(), votes })
        } else {
            let known: Vec<_> = self.liars.certificates.values().cloned().collect();
            if known.is_empty() {
                return;
            }
            Arc::clone(&known[self.rng.below(known.len())])
        };
        if self.bodies.contains_key(&certificate.txid) {
            let entry = Entry { txid: certificate.txid, certificate: Some(certificate) };
            self.tell(liar, to, &Message::Transactions(vec![entry]));
        }
    }

    fn return_own_votes(&mut self, liar: usize, to: usize) {
        let theirs = self.liars.votes.values().filter_map(|votes| votes.get(&to)).map(|vote| Arc::clone(&vote.batch));
        let theirs: Vec<_> = theirs.collect();
        if !theirs.is_empty() {
            let at = self.rng.below(theirs.len());
            self.tell(liar, to, &Message::Votes(Arc::clone(&theirs[at])));
        }
    }

    /// Votes in a round of the open height for whatever is talked of, to each member another.
    fn say_two_things(&mut self, liar: usize) {
        let open = self.history.height() + 1;
        let places = self.liars.talk.range((open, 0)..).map(|(place, _)| *place);
        let places: Vec<_> = places.take(8).collect();
        if places.is_empty() {
            return;
        }
        let (height, round) = self.rng.pick(&places);
        let mut hashes: Vec<_> = self.liars.talk[&(height, round)].iter().copied().collect();
        hashes.push(None);
        let genesis = self.setting.genesis.hash();
        let (key, voter) = (self.members[liar].key.clone(), self.members[liar].public_key);
        for to in 0..self.members.len() {
            for step in [ConsensusStep::Prevote, ConsensusStep::Precommit] {
                if self.members[to].honest && self.rng.chance(500) {
                    let block_hash = self.rng.pick(&hashes);
                    let bytes = consensus_vote_message(step, &genesis, height, round, block_hash.as_ref());
                    let signature = key.sign(&bytes);
                    let vote = ConsensusVote { step, height, round, block_hash, voter, signature };
                    self.tell(liar, to, &Message::Consensus(Arc::new(ConsensusMessage::Vote(vote))));
                }
            }
        }
    }

    /// In the first rounds of the next height that are theirs, blocks of whatever they have
    /// certificates for, one for each half of the members.
    fn put_two_blocks_forward(&mut self) {
        let (previous_hash, timestamp, state_digest) = self.history.tip();
        let height = self.history.height() + 1;
        let n = self.members.len() as u64;
        let mine = (0..4_u32).find_map(|round| {
            let turn = usize::try_from((height + u64::from(round)) % n).ok()?;
            self.shape.liars.contains(&turn).then_some((round, turn))
        });
        let Some((round, liar)) = mine else { return };
        let (key, proposer) = (self.members[liar].key.clone(), self.members[liar].public_key);
        let known: Vec<_> = self.liars.certificates.keys().copied().collect();
        let genesis = self.setting.genesis.hash();
        for half in 0..2 {
            let (mut transactions, mut aborts) = (Vec::new(), Vec::new());
            for (txid, kind) in &known {
                let over = self.is_over(txid, height - 1);
                if !self.rng.chance(if over { 50 } else { 600 }) {
                    continue;
                }
                match kind {
                    VoteKind::Abort => aborts.push(*txid),
                    _ if !transactions.contains(txid) => transactions.push(*txid),
                    _ => {}
                }
            }
            if self.rng.chance(200) {
                transactions.extend(self.history.bodies.keys().next().copied());
            }
            let timestamp_ms = (timestamp + 1).max(1_700_000_000_000 + self.now_ms + half);
            let block = Block { height, previous_hash, timestamp_ms, proposer, state_digest, transactions, aborts };
            let hash = block.hash(&genesis);
            let signature = key.sign(&proposal_message(&genesis, height, round, &hash, -1));
            let proposal = Proposal { height, round, block: Arc::new(block), valid_round: -1, proposer, signature };
            let message = Message::Consensus(Arc::new(ConsensusMessage::Proposal(proposal)));
            self.liars.talk.entry((height, round)).or_default().insert(Some(hash));
            for to in 0..self.members.len() {
                if self.members[to].honest && (to as u64 % 2 == half || self.rng.chance(200)) {
                    self.tell(liar, to, &message);
                }
            }
        }
    }
}
