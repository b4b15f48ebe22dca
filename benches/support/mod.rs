//! A network whose members and wallets are known, and a member's core on its database, for
//! benchmarks: what a payment goes through, step by step, so that each can be timed alone.
#![allow(dead_code, reason = "each benchmark uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on has nothing to tell")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use time_masternode::consensus::{
    Certificate, ChainTip, Changes, Committee, CountedVote, Event, Machine, MemberBatch, Now, Rules, SignedTransaction,
    Source, Step, Ticket, Verified, View, Vote, VoteKind, check_form, sign_batch,
};
use time_masternode::db::{CommitBatch, Database, MemoryDisk, Opened, Owner};
use time_masternode::types::{
    Address, Allocation, Amount, Genesis, Network, OutPoint, Output, RawGenesis, RawInput, RawMasternode, SecretKey,
    Signature, Transaction, sighash,
};

/// The node's allocator, so that what allocates costs here what it costs there.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Base units of a first coin.
pub const COIN: u64 = 1_000_000_000;
/// The least fee.
pub const FEE: u64 = 10;
/// What a payment pays; the rest is change.
pub const PAID: u64 = 1_000;
/// When everything here happens.
pub const NOW: Now = Now { ms: 10_000, unix: 1_800_000_000, unix_ms: 1_800_000_000_000 };

/// Criterion as the arguments want it; short enough that all benchmarks take some minutes.
pub fn criterion() -> Criterion {
    let warm_up = Duration::from_millis(500);
    Criterion::default().warm_up_time(warm_up).measurement_time(Duration::from_secs(2)).configure_from_args()
}

/// A directory on the disk that the build lies on: `/tmp` may be memory, which syncs for nothing.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A wallet's key.
pub fn wallet(number: u32) -> SecretKey {
    let mut seed = [0x77; 32];
    seed[..4].copy_from_slice(&number.to_le_bytes());
    SecretKey::from_seed(seed)
}

/// A wallet's address.
pub fn address(number: u32) -> Address {
    Address::of_key(&wallet(number).public_key(), Network::Devnet)
}

/// A coin of wallet 0.
#[derive(Debug, Clone, Copy)]
pub struct Coin {
    pub outpoint: OutPoint,
    pub units: u64,
}

/// A network: its genesis, its committee, and the secret keys of its members.
pub struct Setting {
    pub genesis: Genesis,
    pub committee: Arc<Committee>,
    pub rules: Rules,
    pub keys: Vec<SecretKey>,
    payer: SecretKey,
    change: Address,
}

impl Setting {
    /// So many members of weight 1; `owners` says whose the first coins are.
    pub fn new(members: u8, owners: impl IntoIterator<Item = u32>) -> Arc<Self> {
        let keys: Vec<_> = (1..=members).map(|i| SecretKey::from_seed([i; 32])).collect();
        let member = |(i, key): (usize, &SecretKey)| RawMasternode {
            id: format!("member-{i}"),
            public_key: key.public_key(),
            weight: 1,
            p2p_address: String::new(),
            payout_address: Address::of_key(&key.public_key(), Network::Devnet).to_string(),
        };
        let mut known = BTreeMap::new();
        let coin = |owner| {
            let address = *known.entry(owner).or_insert_with(|| address(owner));
            Allocation { address: address.to_string(), amount: COIN }
        };
        let genesis = Genesis::try_from(RawGenesis {
            network: Network::Devnet,
            timestamp: 1_700_000_000,
            block_interval_ms: 3_600_000,
            min_fee: FEE,
            masternodes: keys.iter().enumerate().map(member).collect(),
            allocations: owners.into_iter().map(coin).collect(),
        });
        let genesis = genesis.unwrap();
        let committee = Arc::new(Committee::of_genesis(&genesis));
        let rules = Rules { network: genesis.network(), min_fee: genesis.min_fee() };
        Arc::new(Self { genesis, committee, rules, keys, payer: wallet(0), change: address(0) })
    }

    /// The first coins of wallet 0, which has the first `count`.
    pub fn coins(&self, count: u32) -> Vec<Coin> {
        let txid = self.genesis.transaction().txid();
        (0..count).map(|vout| Coin { outpoint: OutPoint { txid, vout }, units: COIN }).collect()
    }

    /// A payment out of these coins of wallet 0: `PAID` to somebody, the rest to wallet 0.
    pub fn pay(&self, coins: &[Coin], to: Address) -> Transaction {
        let key = &self.payer;
        let (public_key, blank) = (key.public_key(), Signature::from_bytes([0; 64]));
        let input = |coin: &Coin| RawInput { previous_output: coin.outpoint, public_key, signature: blank };
        let mut inputs: Vec<_> = coins.iter().map(input).collect();
        let change = coins.iter().map(|coin| coin.units).sum::<u64>() - PAID - FEE;
        let output = |(units, address)| Output { amount: Amount::from_units(units).unwrap(), address };
        let outputs: Vec<_> = [(PAID, to), (change, self.change)].into_iter().map(output).collect();
        let unsigned = Transaction::from_parts(inputs.clone(), outputs.clone(), NOW.unix);
        let signature = key.sign(&sighash(&self.genesis.hash(), &unsigned.txid()));
        inputs.iter_mut().for_each(|input| input.signature = signature);
        check_form(Transaction::from_parts(inputs, outputs, NOW.unix).to_raw(), &self.rules).unwrap()
    }

    /// A payment out of each coin, to wallet 1.
    pub fn payments(&self, coins: &[Coin]) -> Vec<Transaction> {
        let to = address(1);
        coins.iter().map(|coin| self.pay(std::slice::from_ref(coin), to)).collect()
    }

    /// What wallets sent, verified.
    pub fn sent(&self, payments: &[Transaction]) -> Vec<Event> {
        let claim = |payment: &Transaction| SignedTransaction::new(payment.clone(), self.genesis.hash());
        let verified = Verified::check_all(payments.iter().map(claim).collect());
        let event = |(ticket, transaction): (u64, Result<_, _>)| Event::Transaction {
            transaction: transaction.unwrap(),
            source: Source::Wallet(Ticket(ticket)),
        };
        (0..).zip(verified).map(event).collect()
    }

    /// A member's votes on all of these, verified.
    pub fn batch(&self, member: usize, kind: VoteKind, payments: &[Transaction]) -> Arc<Verified<MemberBatch>> {
        let votes = payments.iter().map(|payment| Vote { kind, txid: payment.txid() }).collect();
        Arc::new(sign_batch(&self.keys[member], &self.committee, votes).unwrap())
    }

    /// As many other members' votes as a quorum needs beside the first member's.
    pub fn votes(&self, kind: VoteKind, payments: &[Transaction]) -> Vec<Event> {
        let others = 1..usize::try_from(self.committee.quorum()).unwrap();
        others.map(|member| Event::Votes(self.batch(member, kind, payments))).collect()
    }

    /// The votes of a quorum on `payments[index]`, each in a batch on all of them.
    pub fn counted(&self, kind: VoteKind, payments: &[Transaction], index: usize) -> Vec<CountedVote> {
        let quorum = usize::try_from(self.committee.quorum()).unwrap();
        (0..quorum).map(|member| CountedVote { batch: self.batch(member, kind, payments), index }).collect()
    }

    /// The certificate that those votes make.
    pub fn certificate(&self, kind: VoteKind, payments: &[Transaction], index: usize) -> Certificate {
        let votes = self.counted(kind, payments, index).iter().map(CountedVote::to_signed).collect();
        Certificate { kind, txid: payments[index].txid(), epoch: self.committee.epoch(), votes }
    }

    fn owner(&self) -> Owner<'_> {
        Owner { genesis: &self.genesis, public_key: Some(self.keys[0].public_key()), first_start: true }
    }
}

/// The first member's core and database: what its ledger's thread does, without the thread.
pub struct Ledger {
    pub setting: Arc<Setting>,
    pub database: Database,
    machine: Machine,
    own: Vec<Arc<Verified<MemberBatch>>>,
}

impl Ledger {
    /// On a disk in memory.
    pub fn in_memory(setting: &Arc<Setting>) -> Self {
        Self::of(setting, Database::open_in_memory(&MemoryDisk::new(), setting.owner()).unwrap())
    }

    /// On files.
    pub fn on_disk(setting: &Arc<Setting>, directory: &Path) -> Self {
        Self::of(setting, Database::open(directory, setting.owner(), 128 * 1024 * 1024).unwrap())
    }

    fn of(setting: &Arc<Setting>, opened: Opened) -> Self {
        let own = setting.committee.index_of(&setting.keys[0].public_key());
        let mut machine = Machine::new(Arc::clone(&setting.committee), setting.rules, own);
        let tip = ChainTip::of_genesis(&setting.genesis);
        machine.follow_from(tip, Vec::new(), setting.genesis.block_interval_ms());
        Self { setting: Arc::clone(setting), database: opened.database, machine, own: Vec::new() }
    }

    /// One batch of events: what is to be committed, and (not looked at) what then leaves.
    pub fn decide(&mut self, events: Vec<Event>) -> Changes {
        let view = self.database.view();
        let changes = decide(&mut self.machine, &view, &std::mem::take(&mut self.own), events);
        view.finish().unwrap();
        changes
    }

    /// Makes them durable.
    pub fn commit(&mut self, changes: Changes) {
        let batch = CommitBatch { changes, ..CommitBatch::default() };
        self.database.commit(batch, ()).unwrap().into_inner();
    }

    /// Signs what has been made durable. It is counted with the next batch.
    pub fn sign(&mut self, votes: Vec<Vote>) {
        self.own.extend(sign_batch(&self.setting.keys[0], &self.setting.committee, votes).map(Arc::new));
    }

    /// All three.
    pub fn process(&mut self, events: Vec<Event>) {
        let changes = self.decide(events);
        let votes = changes.votes.clone();
        self.commit(changes);
        self.sign(votes);
    }
}

fn decide<V: View>(machine: &mut Machine, view: &V, own: &[Arc<Verified<MemberBatch>>], events: Vec<Event>) -> Changes {
    let mut step = Step::new(NOW, view);
    own.iter().for_each(|batch| machine.count_own(&mut step, batch));
    events.into_iter().for_each(|event| machine.handle(&mut step, event));
    machine.advance(&mut step);
    assert_eq!(step.fault, None);
    step.changes
}

/// What a batch of payments goes through, in the order of the commits that it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The inputs are locked, and the vote is `Approve`.
    Lock,
    /// C(T) is here, and the vote is `Commit`.
    Certify,
    /// F(T) is here.
    Finalize,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Lock, Self::Certify, Self::Finalize];

    /// What brings it about.
    pub fn events(self, setting: &Setting, payments: &[Transaction]) -> Vec<Event> {
        match self {
            Self::Lock => setting.sent(payments),
            Self::Certify => setting.votes(VoteKind::Approve, payments),
            Self::Finalize => setting.votes(VoteKind::Commit, payments),
        }
    }

    /// Whether these changes are those of the stage, for so many payments.
    pub fn is_done(self, changes: &Changes, payments: usize) -> bool {
        match self {
            Self::Lock => changes.utxos.len() == payments && changes.votes.len() == payments,
            Self::Certify => changes.certificates.len() == payments && changes.votes.len() == payments,
            Self::Finalize => changes.finalized.len() == payments,
        }
    }
}
