//! One member's core against what a liar may put forward as a block, rule by rule.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/core_net.rs"]
#[allow(dead_code, reason = "each test file uses a part of it")]
mod core_net;

use std::sync::Arc;

use core_net::{COIN, MIN_FEE, Setting, Store};
use time_masternode::consensus::{
    Action, Ballot, ChainTip, Changes, ConsensusMessage, Event, Machine, Now, Proposal, Source, Step, Vote, VoteKind,
};
use time_masternode::types::{
    Block, BlockHash, CommitVote, DecidedBlock, Transaction, Txid, UTXOState, proposal_message,
};

/// The member whose turn it is at height 1.
const PROPOSER: usize = 1;

/// A member and its database.
struct Member {
    setting: Arc<Setting>,
    machine: Machine,
    store: Store,
    now_ms: u64,
}

impl Member {
    fn new() -> Self {
        let setting = Setting::of(4);
        let mut machine = Machine::new(Arc::clone(&setting.committee), setting.rules, Some(setting.member(0)));
        machine.follow_from(ChainTip::of_genesis(&setting.genesis), Vec::new(), 1_000);
        let mut member = Self { store: Store::new(&setting), setting, machine, now_ms: 10_000 };
        let ballot = Ballot { key: member.setting.keys[0].clone(), log: Vec::new() };
        member.step(|machine, step| machine.take_part(step, ballot));
        member
    }

    /// One batch of the ledger: decide, commit, let out.
    fn step(&mut self, run: impl FnOnce(&mut Machine, &mut Step<'_, Store>)) -> Vec<Action> {
        let (changes, actions) = self.decide(run);
        self.store.apply(&changes);
        actions
    }

    fn decide(&mut self, run: impl FnOnce(&mut Machine, &mut Step<'_, Store>)) -> (Changes, Vec<Action>) {
        let now = Now { ms: self.now_ms, unix: 1_800_000_000, unix_ms: 1_800_000_000_000 + self.now_ms };
        let mut step = Step::new(now, &self.store);
        run(&mut self.machine, &mut step);
        self.machine.advance(&mut step);
        assert_eq!(step.fault, None);
        (step.changes, step.actions)
    }

    fn hear(&mut self, event: Event) -> Vec<Action> {
        self.step(|machine, step| machine.handle(step, event))
    }

    fn pay(&self, wallet: u32, nonce: i64) -> Arc<Transaction> {
        self.setting.pay(&[(self.setting.coin(wallet), wallet)], &[(COIN - MIN_FEE, wallet)], nonce)
    }

    fn hear_transaction(&mut self, transaction: &Transaction, source: Source) -> Vec<Action> {
        let transaction = self.setting.signed(transaction);
        self.hear(Event::Transaction { transaction, source })
    }

    fn hear_certificate(&mut self, kind: VoteKind, txid: Txid) -> Vec<Action> {
        let certificate = self.setting.certificate(kind, txid, &[1, 2, 3]);
        self.hear(Event::Certificate(self.setting.verified(&certificate)))
    }

    /// The first block, of these.
    fn block(&self, transactions: Vec<Txid>, aborts: Vec<Txid>) -> Block {
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
    fn hear_block(&mut self, block: Block) -> Vec<Action> {
        let (genesis, key) = (&self.setting.genesis, &self.setting.keys[PROPOSER]);
        let hash = block.hash(&genesis.hash());
        let signature = key.sign(&proposal_message(&genesis.hash(), 1, 0, &hash, -1));
        let (block, proposer) = (Arc::new(block), key.public_key());
        let proposal = Proposal { height: 1, round: 0, block, valid_round: -1, proposer, signature };
        let message = Arc::new(ConsensusMessage::Proposal(proposal));
        self.hear(Event::Consensus { from: self.setting.member(PROPOSER), message })
    }
}

fn requests(actions: &[Action], wanted: Txid) -> usize {
    actions.iter().filter(|action| matches!(action, Action::Request { txid, .. } if *txid == wanted)).count()
}

/// A liar aborts in its block what has C(T) and no A(T). Every member asks for A(T), which
/// nobody has. Answers to that question bring C(T) again; they must not make the member
/// ask at once again, or the members' questions and answers go round as fast as they can.
#[test]
fn what_a_block_lacks_is_asked_for_now_and_then() {
    let mut member = Member::new();
    let transaction = member.pay(0, 1);
    let txid = transaction.txid();
    member.hear_transaction(&transaction, Source::Member(member.setting.member(2)));
    member.hear_certificate(VoteKind::Approve, txid);
    let first = member.hear_block(member.block(Vec::new(), vec![txid]));
    assert_eq!(requests(&first, txid), 1, "the proposer is asked");
    let mut again = 0;
    for _ in 0..100 {
        member.now_ms += 1;
        again += requests(&member.hear_certificate(VoteKind::Approve, txid), txid);
    }
    assert_eq!(again, 0, "nothing new has come, and no time has passed");
    member.now_ms += 1_000;
    assert_eq!(requests(&member.hear(Event::Tick), txid), 1, "now everybody is asked");
}

/// B contradicts A and C, which do not contradict each other. The chain settles A, which
/// kills B, and aborts C: its owner is told that it was B that contradicted it, although B
/// is gone by then.
#[test]
fn the_dead_are_told_what_they_contradicted() {
    let mut member = Member::new();
    let setting = Arc::clone(&member.setting);
    let spend = |wallets: &[u32], nonce| {
        let inputs: Vec<_> = wallets.iter().map(|wallet| (setting.coin(*wallet), *wallet)).collect();
        setting.pay(&inputs, &[(COIN, wallets[0])], nonce)
    };
    let [a, b, c] = [spend(&[0, 1], 1), spend(&[1, 2], 2), spend(&[2, 3], 3)];
    member.hear_transaction(&a, Source::Member(setting.member(1)));
    member.hear_transaction(&b, Source::Member(setting.member(2)));
    member.hear_transaction(&c, Source::Member(setting.member(3)));
    let block = member.block(vec![a.txid()], vec![c.txid()]);
    let block_hash = block.hash(&setting.genesis.hash());
    let certificate = CommitVote { height: 1, round: 0, block_hash, votes: Vec::new() };
    let blocks = vec![Arc::new(DecidedBlock { block, certificate })];
    let from = setting.member(1);
    let (changes, _) = member.decide(|machine, step| machine.handle(step, Event::Blocks { from, blocks }));
    assert_eq!(changes.blocks.len(), 1, "it is executed");
    assert_eq!(changes.dead[&c.txid()].by, Some(b.txid()));
}

/// A liar votes on a transaction whose coin the chain has spent. Nothing of it stays: it
/// would be in flight for ever, and one of those that make the node too busy for wallets.
#[test]
fn what_the_chain_has_made_impossible_is_not_in_flight() {
    let mut member = Member::new();
    let late = member.pay(0, 1);
    let coin = member.setting.coin(0);
    let by = Txid::from_bytes([1; 32]);
    let state = UTXOState::Confirmed { txid: by, block_height: 1, confirmed_at: 0 };
    member.store.utxos.get_mut(&coin).unwrap().state = state;
    let votes = vec![Vote { kind: VoteKind::Approve, txid: late.txid() }];
    member.hear(Event::Votes(member.setting.batch(3, votes)));
    assert_eq!(member.machine.known(), 1, "its body may be anything");
    member.hear_transaction(&late, Source::Answer);
    assert_eq!((member.machine.in_flight(), member.machine.known()), (0, 0));
}
