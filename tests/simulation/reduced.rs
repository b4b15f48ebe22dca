//! What the simulator found, each reduced to its core.

use std::sync::Arc;

use time_masternode::consensus::{
    Action, Ballot, ChainTip, ConsensusMessage, Event, FenceState, Machine, Now, Proposal, Source, Step, Suspension,
    Utxo, Vote, VoteKind, Voting,
};
use time_masternode::db::{Database, MemoryDisk, Owner};
use time_masternode::limits::ASK_EVERYBODY_AFTER_MS;
use time_masternode::types::{Block, Txid, UTXOState, proposal_message};

use super::core_net::{COIN, MIN_FEE, Setting, Store};

/// One member that takes part in agreeing on blocks. What the others say is said by the test.
struct Alone {
    setting: Arc<Setting>,
    machine: Machine,
    store: Store,
    now_ms: u64,
}

impl Alone {
    fn new() -> Self {
        let setting = Setting::of(4);
        let mut machine = Machine::new(Arc::clone(&setting.committee), setting.rules, Some(setting.member(0)));
        machine.follow_from(ChainTip::of_genesis(&setting.genesis), Vec::new(), 1_000);
        let store = Store::new(&setting);
        let mut alone = Self { setting, machine, store, now_ms: 10_000 };
        let ballot = Ballot { key: alone.setting.keys[0].clone(), log: Vec::new() };
        alone.step(|machine, step| machine.take_part(step, ballot));
        alone
    }

    fn step(&mut self, run: impl FnOnce(&mut Machine, &mut Step<'_, Store>)) -> Vec<Action> {
        let now = Now { ms: self.now_ms, unix: 1_700_000_000, unix_ms: 1_700_000_000_000 + self.now_ms };
        let mut step = Step::new(now, &self.store);
        run(&mut self.machine, &mut step);
        while self.machine.advance(&mut step) {}
        let Step { changes, actions, fault, .. } = step;
        assert_eq!(fault, None);
        self.store.apply(&changes);
        actions
    }

    fn handle(&mut self, event: Event) -> Vec<Action> {
        self.step(|machine, step| machine.handle(step, event))
    }

    fn certificate(&mut self, kind: VoteKind, txid: Txid) -> Vec<Action> {
        let certificate = self.setting.certificate(kind, txid, &[1, 2, 3]);
        let verified = self.setting.verified(&certificate);
        self.handle(Event::Certificate(verified))
    }

    /// The first block, put forward by the member whose turn it is.
    fn proposal(&mut self, transactions: Vec<Txid>, aborts: Vec<Txid>) -> Vec<Action> {
        let tip = ChainTip::of_genesis(&self.setting.genesis);
        let (key, genesis_hash) = (self.setting.keys[1].clone(), self.setting.genesis.hash());
        let proposer = key.public_key();
        let (height, previous_hash, state_digest) = (1, tip.hash, tip.digest.digest());
        let timestamp_ms = 1_700_000_000_000;
        let block = Block { height, previous_hash, timestamp_ms, proposer, state_digest, transactions, aborts };
        let signature = key.sign(&proposal_message(&genesis_hash, 1, 0, &block.hash(&genesis_hash), -1));
        let proposal = Proposal { height, round: 0, block: Arc::new(block), valid_round: -1, proposer, signature };
        let (from, message) = (self.setting.member(1), Arc::new(ConsensusMessage::Proposal(proposal)));
        self.handle(Event::Consensus { from, message })
    }
}

fn requests(actions: &[Action]) -> Vec<Option<usize>> {
    let to = |action: &Action| match action {
        Action::Request { to, .. } => Some(to.map(|to| to.get())),
        _ => None,
    };
    actions.iter().filter_map(to).collect()
}

fn votes(actions: &[Action]) -> Vec<bool> {
    let vote = |action: &Action| match action {
        Action::Consensus(message) => match message.as_ref() {
            ConsensusMessage::Vote(vote) => Some(vote.block_hash.is_some()),
            _ => None,
        },
        _ => None,
    };
    actions.iter().filter_map(vote).collect()
}

/// A liar puts a block forward that contains what there is only an abort for, or aborts what
/// is only approved. The proof that is lacking is asked for of the proposer, and later of
/// everybody; not with each message that comes, and an answer is one, so that questions and
/// answers would multiply without end.
#[test]
fn a_block_that_lacks_a_proof_is_not_asked_for_with_every_message() {
    for abort in [false, true] {
        let mut alone = Alone::new();
        let setting = Arc::clone(&alone.setting);
        let payment = setting.pay(&[(setting.coin(0), 0)], &[(COIN - MIN_FEE, 1)], 1);
        let txid = payment.txid();
        alone.handle(Event::Transaction {
            transaction: setting.signed(&payment),
            source: Source::Member(setting.member(2)),
        });
        let (lacking, held) =
            if abort { (VoteKind::Abort, VoteKind::Approve) } else { (VoteKind::Approve, VoteKind::Abort) };
        alone.certificate(held, txid);
        let entries = |this: bool| if this { vec![txid] } else { Vec::new() };
        let actions = alone.proposal(entries(!abort), entries(abort));
        assert_eq!(requests(&actions), [Some(1)], "the proposer is asked");
        for _ in 0..3 {
            let answer = Event::Transaction { transaction: setting.signed(&payment), source: Source::Answer };
            assert_eq!(requests(&alone.handle(answer)), [], "an answer without the proof asks nothing");
        }
        alone.now_ms += ASK_EVERYBODY_AFTER_MS;
        assert_eq!(requests(&alone.handle(Event::Tick)), [None], "everybody is asked");
        assert_eq!(requests(&alone.handle(Event::Tick)), []);
        assert_eq!(votes(&alone.certificate(lacking, txid)), [true], "with the proof, the block is voted for");
    }
}

/// A transaction died before this member knew of it, and the coin that killed it is forgotten
/// here. Somebody shows the old votes to abort it: no block may abort it again, and no height
/// is opened for its sake.
#[test]
fn what_died_unseen_and_is_forgotten_is_not_aborted_again() {
    let mut alone = Alone::new();
    let setting = Arc::clone(&alone.setting);
    let payment = setting.pay(&[(setting.coin(0), 0)], &[(COIN - MIN_FEE, 1)], 1);
    let txid = payment.txid();
    alone.store.utxos.remove(&setting.coin(0));
    alone.certificate(VoteKind::Abort, txid);
    alone.handle(Event::Transaction { transaction: setting.signed(&payment), source: Source::Answer });
    for _ in 0..5 {
        alone.now_ms += 1_000;
        assert_eq!(votes(&alone.handle(Event::Tick)), [false; 0], "no height is opened");
    }
    assert_eq!(votes(&alone.proposal(Vec::new(), vec![txid])), [false], "a block that aborts it is refused");
    assert!(alone.store.in_flight.is_empty());
}

/// A member that lost its votes votes again behind its fence, or long after the fence has worn
/// off. Others bring a vote of its former life back, on what the chain has made impossible
/// before this member ever saw it, and the coin is free of the fence for that reason, or
/// forgotten. That is no twin. A vote on what could live and was never fenced is.
#[test]
fn a_lost_vote_on_what_the_chain_has_killed_is_no_twin() {
    let setting = Setting::of(4);
    let payment = setting.pay(&[(setting.coin(0), 0)], &[(COIN - MIN_FEE, 1)], 1);
    let rival = setting.pay(&[(setting.coin(0), 0)], &[(COIN - MIN_FEE - 1, 1)], 2);
    let spent = UTXOState::Confirmed { txid: rival.txid(), block_height: 1, confirmed_at: 0 };
    let twin = Voting::Suspended(Suspension::UnknownOwnVote);
    for state in [FenceState::Standing { height: 0 }, FenceState::Down] {
        for (coin, expected) in
            [(Some(spent), Voting::Active), (None, Voting::Active), (Some(UTXOState::Unspent), twin)]
        {
            let mut alone = Alone::new();
            alone.machine.stand_behind(state, 0);
            let utxo = alone.store.utxos.remove(&setting.coin(0)).unwrap();
            alone.store.utxos.extend(coin.map(|state| (setting.coin(0), Utxo { state, ..utxo })));
            let own = setting.batch(0, vec![Vote { kind: VoteKind::Commit, txid: payment.txid() }]);
            alone.handle(Event::Votes(own));
            assert_eq!(alone.machine.voting(), Voting::Active, "what it is about is not known yet");
            alone.handle(Event::Transaction { transaction: setting.signed(&payment), source: Source::Answer });
            assert_eq!(alone.machine.voting(), expected, "{state:?}, {coin:?}");
        }
    }
}

/// The power goes while a new database is being made, at each of its writes, and what was
/// being written reaches the platter or does not. It opens all the same, and a member that
/// may have voted before stands behind its fence.
#[test]
fn a_database_whose_making_was_cut_off_opens_behind_its_fence() {
    let setting = Setting::of(4);
    let public_key = Some(setting.keys[0].public_key());
    let owner = Owner { genesis: &setting.genesis, public_key, first_start: false };
    let mut cut = 0;
    for writes in 0.. {
        let mut whole = false;
        for keep in [false, true] {
            let disk = MemoryDisk::new();
            disk.fail_after(writes);
            whole = Database::open_in_memory(&disk, owner).is_ok();
            cut += u64::from(!whole);
            disk.lose_power(keep);
            let opened = Database::open_in_memory(&disk, owner);
            let recovered = opened.unwrap_or_else(|e| panic!("cut off after {writes}, kept: {keep}: {e}")).recovered;
            assert_eq!(recovered.suspension, None);
            let coins = setting.genesis.transaction().outputs().len() as u64;
            assert_eq!(recovered.fence, Some((FenceState::Asking, coins)));
        }
        if whole {
            break;
        }
    }
    assert!(cut > 4, "the making has several writes");
}
