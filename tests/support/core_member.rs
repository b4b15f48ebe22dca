//! One member's core and its database, step by step, for tests of what a liar may send.
#![allow(dead_code, reason = "each test file uses a part of it")]

#[path = "core_net.rs"]
pub mod core_net;

use std::sync::Arc;

use time_masternode::consensus::{
    Action, Ballot, ChainTip, Changes, ConsensusMessage, Event, Machine, MemberIndex, Now, Proposal, Source, Step,
    VoteKind,
};
use time_masternode::types::{Block, BlockHash, CommitVote, DecidedBlock, Transaction, Txid, proposal_message};

use core_net::{COIN, MIN_FEE, Setting, Store};

/// The member whose turn it is at height 1.
pub const PROPOSER: usize = 1;

/// A member and its database.
pub struct Member {
    pub setting: Arc<Setting>,
    pub machine: Machine,
    pub store: Store,
    pub now_ms: u64,
}

impl Member {
    /// A node that follows the network of four and is no member.
    pub fn observer() -> Self {
        Self::at(None)
    }

    fn at(place: Option<usize>) -> Self {
        let setting = Setting::of(4);
        let own = place.map(|place| setting.member(place));
        let mut machine = Machine::new(Arc::clone(&setting.committee), setting.rules, own);
        machine.follow_from(ChainTip::of_genesis(&setting.genesis), Vec::new(), 1_000);
        Self { store: Store::new(&setting), setting, machine, now_ms: 10_000 }
    }

    /// The first of four members.
    pub fn new() -> Self {
        let mut member = Self::at(Some(0));
        let ballot = Ballot { key: member.setting.keys[0].clone(), log: Vec::new() };
        member.step(|machine, step| machine.take_part(step, ballot));
        member
    }

    /// One batch of the ledger: decide, commit, let out.
    pub fn step(&mut self, run: impl FnOnce(&mut Machine, &mut Step<'_, Store>)) -> Vec<Action> {
        let (changes, actions) = self.decide(run);
        self.store.apply(&changes);
        actions
    }

    pub fn decide(&mut self, run: impl FnOnce(&mut Machine, &mut Step<'_, Store>)) -> (Changes, Vec<Action>) {
        let now = Now { ms: self.now_ms, unix: 1_800_000_000, unix_ms: 1_800_000_000_000 + self.now_ms };
        let mut step = Step::new(now, &self.store);
        run(&mut self.machine, &mut step);
        self.machine.advance(&mut step);
        assert_eq!(step.fault, None);
        (step.changes, step.actions)
    }

    pub fn hear(&mut self, event: Event) -> Vec<Action> {
        self.step(|machine, step| machine.handle(step, event))
    }

    pub fn pay(&self, wallet: u32, nonce: i64) -> Arc<Transaction> {
        self.setting.pay(&[(self.setting.coin(wallet), wallet)], &[(COIN - MIN_FEE, wallet)], nonce)
    }

    pub fn hear_transaction(&mut self, transaction: &Transaction, source: Source) -> Vec<Action> {
        let transaction = self.setting.signed(transaction);
        self.hear(Event::Transaction { transaction, source })
    }

    pub fn hear_certificate(&mut self, kind: VoteKind, txid: Txid) -> Vec<Action> {
        let certificate = self.setting.certificate(kind, txid, &[1, 2, 3]);
        self.hear(Event::Certificate(self.setting.verified(&certificate)))
    }

    /// The first block, of these.
    pub fn block(&self, transactions: Vec<Txid>, aborts: Vec<Txid>) -> Block {
        let genesis = &self.setting.genesis;
        Block {
            height: 1,
            previous_hash: BlockHash::from_bytes(*genesis.hash().as_bytes()),
            timestamp_ms: 1_800_000_000_000,
            proposer: self.setting.keys[PROPOSER].public_key(),
            state_digest: ChainTip::of_genesis(genesis).digest.digest(),
            transactions,
            aborts,
        }
    }

    /// The proposer of height 1 puts it forward.
    pub fn hear_block(&mut self, block: Block) -> Vec<Action> {
        let (genesis, key) = (&self.setting.genesis, &self.setting.keys[PROPOSER]);
        let hash = block.hash(&genesis.hash());
        let signature = key.sign(&proposal_message(&genesis.hash(), 1, 0, &hash, -1));
        let (block, proposer) = (Arc::new(block), key.public_key());
        let proposal = Proposal { height: 1, round: 0, block, valid_round: -1, proposer, signature };
        let message = Arc::new(ConsensusMessage::Proposal(proposal));
        self.hear(Event::Consensus { from: self.setting.member(PROPOSER), message })
    }

    /// The block is decided, and one member says so.
    pub fn hear_decided(&mut self, block: Block) -> (Changes, Vec<Action>) {
        self.hear_decided_from(self.setting.member(1), block)
    }

    pub fn hear_decided_from(&mut self, from: MemberIndex, block: Block) -> (Changes, Vec<Action>) {
        let block_hash = block.hash(&self.setting.genesis.hash());
        let certificate = CommitVote { height: block.height, round: 0, block_hash, votes: Vec::new() };
        let blocks = vec![Arc::new(DecidedBlock { block, certificate })];
        self.decide(|machine, step| machine.handle(step, Event::Blocks { from, blocks }))
    }
}
