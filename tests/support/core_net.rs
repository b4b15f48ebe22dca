//! A network of consensus cores without threads, sockets or a real clock.
//!
//! Each honest member is a real [`Machine`] over its own [`Store`], which stands for the
//! database: what a step wants written is applied atomically or, if the member crashes
//! first, not at all. Everything that travels carries real signatures, and each is
//! checked before a machine sees it. A seed decides who acts, what is delayed, doubled
//! or lost, and who crashes; the same seed gives the same run.
//!
//! The invariants stand in [`World::check_commit`] and [`Store::check`]. They are looked
//! at after every durable commit, not only at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use time_masternode::consensus::{
    Action, Certificate, Changes, CheckedCertificate, Committee, CountedVote, Dead, Event, Finalized, InFlight,
    LogEntry, Machine, MemberBatch, MemberIndex, Now, Progress, Recovered, Rules, Settled, SignedTransaction, Source,
    Step, Ticket, Utxo, Verified, View, Vote, VoteKind, Voting, check_form, sign_batch,
};
use time_masternode::types::{
    Address, Allocation, Amount, Genesis, Height, Network, OutPoint, Output, RawGenesis, RawInput, RawMasternode,
    SecretKey, Signature, Transaction, Txid, UTXOState, sighash,
};

/// First coins of every test network; coin `i` belongs to wallet `i`.
pub const COINS: u32 = 10;
/// Base units of a first coin.
pub const COIN: u64 = 10_000;
/// The least fee.
pub const MIN_FEE: u64 = 10;

/// SplitMix64: small, and the same on every machine for ever, so that a seed in an old
/// report still replays.
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5bd1_e995)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    pub fn chance(&mut self, permille: u64) -> bool {
        self.next() % 1000 < permille
    }

    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// A network: its genesis, its committee, and the secret keys of its members.
#[derive(Debug)]
pub struct Setting {
    pub committee: Arc<Committee>,
    pub genesis: Genesis,
    pub keys: Vec<SecretKey>,
    pub rules: Rules,
}

pub fn wallet_key(wallet: u32) -> SecretKey {
    let mut seed = [0x77; 32];
    seed[..4].copy_from_slice(&wallet.to_le_bytes());
    SecretKey::from_seed(seed)
}

pub fn wallet_address(wallet: u32) -> Address {
    Address::of_key(&wallet_key(wallet).public_key(), Network::Devnet)
}

impl Setting {
    /// The network of `n` members of weight 1, made once for each `n`.
    pub fn of(n: usize) -> Arc<Self> {
        static MADE: Mutex<BTreeMap<usize, Arc<Setting>>> = Mutex::new(BTreeMap::new());
        Arc::clone(MADE.lock().unwrap().entry(n).or_insert_with(|| Arc::new(Self::make(&vec![1; n]))))
    }

    pub fn make(weights: &[u64]) -> Self {
        let keys: Vec<_> = (1..=weights.len()).map(|i| SecretKey::from_seed([u8::try_from(i).unwrap(); 32])).collect();
        let raw = RawGenesis {
            network: Network::Devnet,
            timestamp: 1_700_000_000,
            block_interval_ms: 1_000,
            min_fee: MIN_FEE,
            masternodes: keys
                .iter()
                .zip(weights)
                .enumerate()
                .map(|(i, (key, weight))| RawMasternode {
                    id: format!("member-{i}"),
                    public_key: key.public_key(),
                    weight: *weight,
                    p2p_address: String::new(),
                    payout_address: Address::of_key(&key.public_key(), Network::Devnet).to_string(),
                })
                .collect(),
            allocations: (0..COINS)
                .map(|i| Allocation { address: wallet_address(i).to_string(), amount: COIN })
                .collect(),
        };
        let genesis = Genesis::try_from(raw).unwrap();
        let committee = Arc::new(Committee::of_genesis(&genesis));
        let rules = Rules { network: genesis.network(), min_fee: genesis.min_fee() };
        Self { committee, genesis, keys, rules }
    }

    pub fn member(&self, i: usize) -> MemberIndex {
        self.committee.indices().nth(i).unwrap()
    }

    /// The first coin of a wallet.
    pub fn coin(&self, wallet: u32) -> OutPoint {
        OutPoint { txid: self.genesis.transaction().txid(), vout: wallet }
    }

    /// A well-formed transaction, signed by the wallets that are named with its inputs.
    /// It went through its JSON form, as everything does that a wallet sends.
    pub fn pay(&self, inputs: &[(OutPoint, u32)], outputs: &[(u64, u32)], nonce: i64) -> Arc<Transaction> {
        let blank = Signature::from_bytes([0; 64]);
        let mut raw_inputs: Vec<_> = inputs
            .iter()
            .map(|(previous_output, wallet)| RawInput {
                previous_output: *previous_output,
                public_key: wallet_key(*wallet).public_key(),
                signature: blank,
            })
            .collect();
        let outputs: Vec<_> = outputs
            .iter()
            .map(|(amount, wallet)| Output {
                amount: Amount::from_units(*amount).unwrap(),
                address: wallet_address(*wallet),
            })
            .collect();
        let unsigned = Transaction::from_parts(raw_inputs.clone(), outputs.clone(), nonce);
        let message = sighash(&self.genesis.hash(), &unsigned.txid());
        for (input, (_, wallet)) in raw_inputs.iter_mut().zip(inputs) {
            input.signature = wallet_key(*wallet).sign(&message);
        }
        let signed = Transaction::from_parts(raw_inputs, outputs, nonce);
        Arc::new(check_form(signed.to_raw(), &self.rules).unwrap())
    }

    /// Checks the signatures of a transaction, as the verify pool does.
    pub fn signed(&self, transaction: &Transaction) -> Verified<SignedTransaction> {
        Verified::check(SignedTransaction::new(transaction.clone(), self.genesis.hash())).unwrap()
    }

    /// A batch that went over the wire: only its public form, checked again.
    pub fn batch(&self, voter: usize, votes: Vec<Vote>) -> Arc<Verified<MemberBatch>> {
        let signed = sign_batch(&self.keys[voter], &self.committee, votes).unwrap();
        let arrived = MemberBatch::new(signed.get().wire().clone(), &self.committee).unwrap();
        Arc::new(Verified::check(arrived).unwrap())
    }

    /// A certificate of these voters, each vote in a batch of its own.
    pub fn certificate(&self, kind: VoteKind, txid: Txid, voters: &[usize]) -> Arc<Certificate> {
        let vote = |voter: &usize| {
            let batch = self.batch(*voter, vec![Vote { kind, txid }]);
            CountedVote { batch, index: 0 }.to_signed()
        };
        let votes = voters.iter().map(vote).collect();
        Arc::new(Certificate { kind, txid, epoch: self.committee.epoch(), votes })
    }

    pub fn verified(&self, certificate: &Certificate) -> Verified<CheckedCertificate> {
        certificate.clone().verify(&self.committee).unwrap()
    }
}

/// The durable half of a member: what the database would hold.
#[derive(Debug, Clone)]
pub struct Store {
    pub utxos: BTreeMap<OutPoint, Utxo>,
    pub in_flight: BTreeMap<Txid, InFlight>,
    /// This member's votes on what is in flight.
    pub votes: BTreeMap<Txid, BTreeSet<VoteKind>>,
    pub certificates: BTreeMap<(Txid, VoteKind), Arc<Certificate>>,
    pub finalized: BTreeMap<Txid, Finalized>,
    /// The order in which this member learned what is final.
    pub order: Vec<Txid>,
    /// What the chain killed: there is no chain here, so only what a test says.
    pub dead: BTreeSet<Txid>,
}

impl View for Store {
    fn utxo(&self, outpoint: &OutPoint) -> Option<Utxo> {
        self.utxos.get(outpoint).copied()
    }

    fn settled(&self, txid: &Txid) -> Option<Settled> {
        self.finalized.get(txid).map(|f| f.settled)
    }

    fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.finalized.get(txid).map(|f| Arc::clone(&f.transaction))
    }

    fn confirmed(&self, _: &Txid) -> Option<Height> {
        None
    }

    fn dead(&self, txid: &Txid) -> Option<Dead> {
        self.dead.contains(txid).then_some(Dead { by: None, height: 1 })
    }

    fn is_fenced(&self, _: &OutPoint) -> bool {
        false
    }
}

impl Store {
    pub fn new(setting: &Setting) -> Self {
        let first = setting.genesis.transaction().creates();
        Self {
            utxos: first.map(|(at, output)| (at, Utxo { output, state: UTXOState::Unspent })).collect(),
            in_flight: BTreeMap::new(),
            votes: BTreeMap::new(),
            certificates: BTreeMap::new(),
            finalized: BTreeMap::new(),
            order: Vec::new(),
            dead: BTreeSet::new(),
        }
    }

    pub fn state(&self, outpoint: &OutPoint) -> Option<UTXOState> {
        self.utxos.get(outpoint).map(|utxo| utxo.state)
    }

    pub fn has_vote(&self, vote: &Vote) -> bool {
        self.votes.get(&vote.txid).is_some_and(|kinds| kinds.contains(&vote.kind))
    }

    /// One atomic commit. Every step of every output has to start where the output stands
    /// and to be one that the protocol knows.
    pub fn apply(&mut self, changes: &Changes) {
        let mut reached = BTreeMap::new();
        for entry in &changes.log {
            let LogEntry::Transition(step) = entry else { continue };
            let stands = reached.get(&step.outpoint).copied().or_else(|| self.state(&step.outpoint));
            assert_eq!(stands, step.old_state, "a step of {} starts where the output stands", step.outpoint);
            let legal = UTXOState::may_follow(step.old_state.as_ref(), &step.new_state);
            assert!(legal, "{} goes from {:?} to {:?}", step.outpoint, step.old_state, step.new_state);
            reached.insert(step.outpoint, step.new_state);
        }
        let written: BTreeMap<_, _> = changes.utxos.iter().map(|(at, utxo)| (*at, utxo.state)).collect();
        assert_eq!(written, reached, "what is written is what the change log says");
        self.utxos.extend(changes.utxos.iter().map(|(at, utxo)| (*at, *utxo)));
        for vote in &changes.votes {
            assert!(self.votes.entry(vote.txid).or_default().insert(vote.kind), "{vote:?} is cast once");
        }
        self.certificates.extend(changes.certificates.iter().map(|(key, c)| (*key, Arc::clone(c))));
        for (txid, row) in &changes.in_flight {
            match row {
                Some(row) => {
                    self.in_flight.insert(*txid, row.clone());
                }
                None => {
                    assert!(changes.finalized.contains_key(txid), "without a chain only finality ends a flight");
                    self.in_flight.remove(txid);
                }
            }
        }
        for (txid, finalized) in &changes.finalized {
            assert!(self.finalized.insert(*txid, finalized.clone()).is_none(), "{txid} becomes final once");
            self.order.push(*txid);
            self.votes.remove(txid);
            self.certificates.retain(|(of, _), _| of != txid);
        }
    }

    /// The sums and the links between the tables.
    pub fn check(&self) {
        let live = self.utxos.values().filter(|utxo| utxo.state.is_live()).map(|utxo| utxo.output.amount.units());
        let fees = self.finalized.values().map(|f| f.settled.fee.units());
        assert_eq!(live.sum::<u64>() + fees.sum::<u64>(), u64::from(COINS) * COIN, "supply is conserved");
        for (outpoint, utxo) in &self.utxos {
            match utxo.state {
                UTXOState::Locked { txid, locked_at } => {
                    let row = self.in_flight.get(&txid).unwrap_or_else(|| panic!("{outpoint} is locked for nothing"));
                    assert_eq!(row.locked_at, Some(locked_at), "the holder's row says when it locked {outpoint}");
                    assert!(
                        self.has_vote(&Vote { kind: VoteKind::Approve, txid }),
                        "{outpoint} is locked by approving"
                    );
                }
                UTXOState::SpentFinalized { txid, .. } => {
                    assert!(self.finalized.contains_key(&txid), "{outpoint} is spent by something final");
                }
                UTXOState::Unspent | UTXOState::Confirmed { .. } => {}
            }
        }
        for (txid, row) in &self.in_flight {
            assert!(!self.finalized.contains_key(txid), "what is final is not in flight");
            assert_eq!(row.transaction.txid(), *txid);
            let approved = self.has_vote(&Vote { kind: VoteKind::Approve, txid: *txid });
            assert_eq!(approved, row.locked_at.is_some(), "approved is what is locked, {txid}");
            for outpoint in row.transaction.spends().filter(|_| approved) {
                assert!(self.locked_or_beaten(&outpoint, txid), "{txid} approved but does not hold {outpoint}");
            }
        }
        for (txid, kinds) in &self.votes {
            assert!(self.in_flight.contains_key(txid), "a vote on {txid} has its body beside it");
            if kinds.contains(&VoteKind::Commit) {
                let certificate = self.certificates.get(&(*txid, VoteKind::Approve));
                assert!(certificate.is_some(), "a commit to {txid} has C(T) beside it");
            }
        }
    }

    /// Whether `outpoint` is locked for `txid`, or was until a final rival spent it.
    pub fn locked_or_beaten(&self, outpoint: &OutPoint, txid: &Txid) -> bool {
        match self.state(outpoint) {
            Some(UTXOState::Locked { txid: by, .. }) => by == *txid,
            Some(UTXOState::SpentFinalized { txid: by, .. }) => by != *txid,
            _ => false,
        }
    }

    /// What the database reads back at a start.
    pub fn recovered(&self) -> Vec<Recovered> {
        let row = |(txid, in_flight): (&Txid, &InFlight)| Recovered {
            in_flight: in_flight.clone(),
            votes: self.votes.get(txid).into_iter().flatten().copied().collect(),
            certificates: [VoteKind::Approve, VoteKind::Abort]
                .iter()
                .filter_map(|kind| self.certificates.get(&(*txid, *kind)).map(|c| c.as_ref().clone()))
                .collect(),
        };
        self.in_flight.iter().map(row).collect()
    }

    /// The body and the best certificate, for whoever asks.
    fn answer(&self, txid: &Txid) -> Option<Message> {
        if let Some(f) = self.finalized.get(txid) {
            return Some(Message::Body(Arc::clone(&f.transaction), f.certificate.clone()));
        }
        let row = self.in_flight.get(txid)?;
        let best = [VoteKind::Approve, VoteKind::Abort].into_iter().find_map(|k| self.certificates.get(&(*txid, k)));
        Some(Message::Body(Arc::clone(&row.transaction), best.cloned()))
    }
}

/// What travels between members.
#[derive(Debug, Clone)]
pub enum Message {
    /// "I have locked this."
    Locked(Arc<Transaction>),
    /// Votes under one signature.
    Votes(Arc<Verified<MemberBatch>>),
    /// A body that was asked for or is thought to be missing, with a certificate.
    Body(Arc<Transaction>, Option<Arc<Certificate>>),
    /// "Give me this body and what you know of it."
    Request(Txid),
    /// "This is in flight here."
    Status(Vec<Txid>),
    /// The connection is up, for the first time or again.
    Connected,
}

#[derive(Debug)]
struct Envelope {
    due_ms: u64,
    from: usize,
    to: usize,
    message: Message,
}

/// An honest member.
#[derive(Debug)]
pub struct Node {
    /// `None` while it is down.
    pub machine: Option<Machine>,
    pub store: Store,
    /// Its own batches, signed for durable votes and not counted yet.
    uncounted: Vec<Arc<Verified<MemberBatch>>>,
}

/// What an adversary is allowed to do in this run.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    pub loss: u64,
    pub duplicate: u64,
    pub max_delay_ms: usize,
    pub crash: u64,
    /// Whether the last members of the committee lie, or are only silent.
    pub liars: bool,
}

const CALM: Weather = Weather { loss: 0, duplicate: 0, max_delay_ms: 40, crash: 0, liars: false };

/// What has been said and settled by whom: kept outside of the members, so that no crash
/// of theirs can make it forgotten.
#[derive(Debug, Default)]
struct History {
    votes: BTreeSet<(usize, Vote)>,
    approved: BTreeMap<(usize, OutPoint), Txid>,
    committed: BTreeMap<(usize, OutPoint), Txid>,
    final_spender: BTreeMap<OutPoint, Txid>,
}

/// The network.
#[derive(Debug)]
pub struct World {
    pub setting: Arc<Setting>,
    pub rng: Rng,
    pub now_ms: u64,
    pub nodes: Vec<Node>,
    pub weather: Weather,
    /// Directions in which nothing arrives.
    blocked: BTreeSet<(usize, usize)>,
    wire: Vec<Envelope>,
    /// Every body that a wallet ever sent.
    pub bodies: BTreeMap<Txid, Verified<SignedTransaction>>,
    /// What was signed and what was verified before: signatures are most of the work.
    signed: BTreeMap<(usize, Vec<Vote>), Arc<Verified<MemberBatch>>>,
    checked: BTreeMap<(VoteKind, Txid, Vec<Signature>), Vec<Verified<CheckedCertificate>>>,
    history: History,
    next_ticket: u64,
    pub replies: BTreeMap<Ticket, (usize, Txid, Vec<Progress>)>,
    /// What the liars have overheard, by what is voted.
    overheard: BTreeMap<Vote, BTreeMap<usize, CountedVote>>,
    pub restarts: u64,
    pub lost_commits: u64,
}

impl World {
    /// `n` members of which the last `f` are not honest.
    pub fn new(n: usize, f: usize, seed: u64, weather: Weather) -> Self {
        let setting = Setting::of(n);
        let node = |_| Node { machine: None, store: Store::new(&setting), uncounted: Vec::new() };
        let nodes: Vec<_> = (0..n - f).map(node).collect();
        let mut world = Self {
            setting,
            rng: Rng::new(seed),
            now_ms: 1_000,
            nodes,
            weather,
            blocked: BTreeSet::new(),
            wire: Vec::new(),
            bodies: BTreeMap::new(),
            signed: BTreeMap::new(),
            checked: BTreeMap::new(),
            history: History::default(),
            next_ticket: 0,
            replies: BTreeMap::new(),
            overheard: BTreeMap::new(),
            restarts: 0,
            lost_commits: 0,
        };
        for i in 0..world.nodes.len() {
            world.start(i);
        }
        world.restarts = 0;
        world
    }

    fn now(&self, i: usize) -> Now {
        // The members' wall clocks disagree by seconds: nothing may depend on them.
        let unix_ms = 1_700_000_000_000 + self.now_ms + 3_000 * i as u64;
        Now { ms: self.now_ms, unix: i64::try_from(unix_ms / 1_000).unwrap(), unix_ms }
    }

    pub fn is_up(&self, i: usize) -> bool {
        self.nodes[i].machine.is_some()
    }

    /// Starts a member from what its database holds. Its votes and its locks have to be
    /// exactly those that were durable; they are said again.
    pub fn start(&mut self, i: usize) {
        let own = self.setting.member(i);
        let now = self.now(i);
        let mut machine = Machine::new(Arc::clone(&self.setting.committee), self.setting.rules, Some(own));
        machine.recover(self.nodes[i].store.recovered(), now);
        let votes = machine.own_votes();
        let durable = self.nodes[i].store.votes.iter();
        let durable: BTreeSet<_> = durable.flat_map(|(t, k)| k.iter().map(|k| Vote { kind: *k, txid: *t })).collect();
        assert_eq!(votes.iter().copied().collect::<BTreeSet<_>>(), durable, "votes survive a restart exactly");
        let rows: Vec<_> = self.nodes[i].store.in_flight.keys().copied().collect();
        assert_eq!(machine.in_flight_after(None, usize::MAX), rows, "rows survive a restart exactly");
        assert_eq!(machine.voting(), Voting::Active);
        self.nodes[i].machine = Some(machine);
        self.restarts += 1;
        self.say(i, None, votes);
    }

    /// The member's memory is gone, and with it what it had not written.
    pub fn crash(&mut self, i: usize) {
        self.nodes[i].machine = None;
        self.nodes[i].uncounted.clear();
    }

    /// Signs durable votes, sends them, and leaves them to be counted here.
    fn say(&mut self, i: usize, to: Option<usize>, votes: Vec<Vote>) {
        if votes.is_empty() {
            return;
        }
        for vote in &votes {
            let store = &self.nodes[i].store;
            let kept = store.has_vote(vote) || store.finalized.contains_key(&vote.txid);
            assert!(kept, "member {i} says {vote:?}, which its database does not hold");
        }
        let batch = self.batch(i, votes);
        self.nodes[i].uncounted.push(Arc::clone(&batch));
        self.send(i, to, &Message::Votes(batch));
    }

    fn send(&mut self, from: usize, to: Option<usize>, message: &Message) {
        let everybody = 0..self.setting.keys.len();
        for to in to.map_or(everybody, |to| to..to + 1).filter(|to| *to != from) {
            if self.blocked.contains(&(from, to)) || self.rng.chance(self.weather.loss) {
                continue;
            }
            let copies = if self.rng.chance(self.weather.duplicate) { 2 } else { 1 };
            for _ in 0..copies {
                let due_ms = self.now_ms + self.rng.below(self.weather.max_delay_ms) as u64;
                self.wire.push(Envelope { due_ms, from, to, message: message.clone() });
            }
        }
    }

    /// Makes a body known to whoever may relay it: the liars.
    pub fn introduce(&mut self, transaction: &Arc<Transaction>) {
        self.bodies.entry(transaction.txid()).or_insert_with(|| self.setting.signed(transaction));
    }

    /// A wallet sends a transaction to a member; `None` if that is down.
    pub fn submit(&mut self, i: usize, transaction: &Arc<Transaction>) -> Option<Ticket> {
        let txid = transaction.txid();
        self.introduce(transaction);
        let verified = self.bodies[&txid].clone();
        if !self.is_up(i) {
            return None;
        }
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.replies.insert(ticket, (i, txid, Vec::new()));
        self.step(i, vec![Event::Transaction { transaction: verified, source: Source::Wallet(ticket) }]);
        Some(ticket)
    }

    /// One batch of events: handle, commit, say. Between the three a member may crash.
    pub fn step(&mut self, i: usize, events: Vec<Event>) {
        let now = self.now(i);
        let Node { machine: Some(machine), store, uncounted } = &mut self.nodes[i] else { return };
        let mut step = Step::new(now, &*store);
        for batch in std::mem::take(uncounted) {
            machine.count_own(&mut step, &batch);
        }
        for event in events {
            machine.handle(&mut step, event);
        }
        let Step { changes, actions, fault, .. } = step;
        assert_eq!(fault, None, "member {i} meets no fault");
        if !changes.is_empty() && self.rng.chance(self.weather.crash) {
            self.lost_commits += 1;
            return self.crash(i);
        }
        self.nodes[i].store.apply(&changes);
        self.nodes[i].store.check();
        self.check_commit(i, &changes);
        if self.rng.chance(self.weather.crash) {
            return self.crash(i);
        }
        self.say(i, None, changes.votes);
        for action in actions {
            self.act(i, action);
        }
    }

    fn act(&mut self, i: usize, action: Action) {
        match action {
            Action::Broadcast(transaction) => self.send(i, None, &Message::Locked(transaction)),
            Action::Send { to, transaction } => self.send(i, Some(to.get()), &Message::Locked(transaction)),
            Action::ResendVotes { to, votes } => self.say(i, to.map(MemberIndex::get), votes),
            Action::ReturnBatch { to, batch } => self.send(i, Some(to.get()), &Message::Votes(batch)),
            Action::SendCertified { to, transaction, certificate } => {
                self.send(i, to.map(MemberIndex::get), &Message::Body(transaction, Some(certificate)));
            }
            Action::SendSettled { to, txid } => {
                let body = self.nodes[i].store.answer(&txid).expect("what is called settled is in the database");
                self.send(i, Some(to.get()), &body);
            }
            Action::Request { to, txid } => self.send(i, to.map(MemberIndex::get), &Message::Request(txid)),
            Action::Reply { ticket, txid, progress } => self.reply(i, ticket, txid, progress),
            Action::Advise { .. } | Action::Progress { .. } => {}
            Action::Consensus(_)
            | Action::RequestBodies { .. }
            | Action::RequestBlocks { .. }
            | Action::RequestFence { .. }
            | Action::SendBlocks { .. }
            | Action::Disconnect { .. } => panic!("there is no chain here: {action:?}"),
        }
    }

    /// A wallet hears. `Pending` is a promise: the transaction and its locks are durable.
    fn reply(&mut self, i: usize, ticket: Ticket, txid: Txid, progress: Progress) {
        let store = &self.nodes[i].store;
        match &progress {
            Progress::Pending { .. } if !store.finalized.contains_key(&txid) => {
                let row = store.in_flight.get(&txid).expect("what is pending is in the database");
                for outpoint in row.transaction.spends() {
                    assert!(store.locked_or_beaten(&outpoint, &txid), "pending {txid} does not hold {outpoint}");
                }
            }
            Progress::Finalized { settled, .. } => {
                assert_eq!(store.settled(&txid), Some(*settled), "what is called final is in the database");
            }
            Progress::Confirmed { .. } => panic!("there is no chain here"),
            Progress::Pending { .. } | Progress::Aborted(_) | Progress::Rejected(_) | Progress::Unknown => {}
        }
        let (asked, of, answers) = self.replies.get_mut(&ticket).expect("only tickets that were given are answered");
        assert_eq!((*asked, *of), (i, txid));
        answers.push(progress);
    }

    /// The rules of §6, over everything that any honest member ever made durable.
    fn check_commit(&mut self, i: usize, changes: &Changes) {
        for vote in &changes.votes {
            let Vote { kind, txid } = *vote;
            assert!(self.history.votes.insert((i, *vote)), "member {i} votes {vote:?} once in its life");
            let opposite = match kind {
                VoteKind::Commit => Some(VoteKind::Abort),
                VoteKind::Abort => Some(VoteKind::Commit),
                VoteKind::Approve => None,
            };
            if let Some(kind) = opposite {
                let contradicts = self.history.votes.contains(&(i, Vote { kind, txid }));
                assert!(!contradicts, "member {i} both commits and aborts {txid}");
            }
            // Without a chain nothing dies. A lock ends only when its coin is spent, and
            // what spends a spent coin is not valid: so not even a final rival lets a
            // member approve two conflicting transactions.
            let book = match kind {
                VoteKind::Approve => &mut self.history.approved,
                VoteKind::Commit => &mut self.history.committed,
                VoteKind::Abort => continue,
            };
            for outpoint in self.bodies[&txid].get().transaction().spends() {
                let before = book.insert((i, outpoint), txid);
                assert_eq!(before, None, "member {i} gives {kind:?} to {txid} against what it gave for {outpoint}");
            }
        }
        for vote in changes.votes.iter().filter(|vote| vote.kind == VoteKind::Abort) {
            let body = self.bodies[&vote.txid].get().transaction();
            let rival = |row: &InFlight| Machine::conflict(&row.transaction, body);
            let known = self.nodes[i].store.in_flight.values().any(rival);
            assert!(known, "an abort of {} has both bodies beside it", vote.txid);
        }
        for ((txid, kind), certificate) in &changes.certificates {
            assert_eq!((certificate.txid, certificate.kind), (*txid, *kind));
            let _checked = self.check_certificate(certificate);
        }
        for (txid, finalized) in &changes.finalized {
            let certificate = finalized.certificate.as_ref().expect("without a chain only F makes final");
            assert_eq!((certificate.txid, certificate.kind), (*txid, VoteKind::Commit));
            let _checked = self.check_certificate(certificate);
            for outpoint in finalized.transaction.spends() {
                let spender = *self.history.final_spender.entry(outpoint).or_insert(*txid);
                assert_eq!(spender, *txid, "two final transactions spend {outpoint}");
                let state = self.nodes[i].store.state(&outpoint);
                let spent = matches!(state, Some(UTXOState::SpentFinalized { txid: by, .. }) if by == *txid);
                assert!(spent, "{txid} is final and {outpoint} is {state:?}");
            }
        }
    }

    fn batch(&mut self, voter: usize, votes: Vec<Vote>) -> Arc<Verified<MemberBatch>> {
        let setting = &self.setting;
        Arc::clone(self.signed.entry((voter, votes.clone())).or_insert_with(|| setting.batch(voter, votes)))
    }

    /// Verifies a certificate, each different one once.
    fn check_certificate(&mut self, certificate: &Certificate) -> Verified<CheckedCertificate> {
        let signatures = certificate.votes.iter().map(|vote| vote.signature).collect();
        let alike = self.checked.entry((certificate.kind, certificate.txid, signatures)).or_default();
        if let Some(known) = alike.iter().find(|known| known.get().certificate() == certificate) {
            return known.clone();
        }
        let verified = self.setting.verified(certificate);
        alike.push(verified.clone());
        verified
    }

    /// Hands a member up to `most` of the messages that are due for it, in any order, in
    /// one step: as the ledger takes many events into one commit.
    pub fn deliver(&mut self, i: usize, most: usize) -> bool {
        let due = |e: &Envelope, now| e.to == i && e.due_ms <= now;
        let mut events = Vec::new();
        for _ in 0..most {
            let ready: Vec<_> = (0..self.wire.len()).filter(|at| due(&self.wire[*at], self.now_ms)).collect();
            if ready.is_empty() {
                break;
            }
            let at = self.rng.pick(&ready);
            let envelope = self.wire.swap_remove(at);
            if i >= self.nodes.len() {
                self.overhear(envelope);
            } else if self.is_up(i) {
                self.arrive(envelope, &mut events);
            }
        }
        let any = !events.is_empty();
        if any {
            self.step(i, events);
        }
        any
    }

    fn arrive(&mut self, Envelope { from, to, message, .. }: Envelope, events: &mut Vec<Event>) {
        let sender = self.setting.member(from);
        match message {
            Message::Locked(transaction) => {
                let transaction = self.bodies[&transaction.txid()].clone();
                events.push(Event::Transaction { transaction, source: Source::Member(sender) });
            }
            Message::Votes(batch) => events.push(Event::Votes(batch)),
            Message::Body(transaction, certificate) => {
                let transaction = self.bodies[&transaction.txid()].clone();
                events.push(Event::Transaction { transaction, source: Source::Answer });
                if let Some(certificate) = certificate {
                    events.push(Event::Certificate(self.check_certificate(&certificate)));
                }
            }
            Message::Request(txid) => {
                if let Some(answer) = self.nodes[to].store.answer(&txid) {
                    self.send(to, Some(from), &answer);
                }
            }
            // Each side gives what the other lacks, and asks for what it lacks itself.
            Message::Status(in_flight) => {
                for txid in in_flight {
                    let store = &self.nodes[to].store;
                    if store.finalized.contains_key(&txid) {
                        let answer = store.answer(&txid).unwrap();
                        self.send(to, Some(from), &answer);
                    } else if !store.in_flight.contains_key(&txid) {
                        self.send(to, Some(from), &Message::Request(txid));
                    }
                }
            }
            Message::Connected => {
                // The node answers a peer's `GetFinalized` beside the core.
                for txid in self.nodes[to].store.order.clone() {
                    let answer = self.nodes[to].store.answer(&txid).unwrap();
                    self.send(to, Some(from), &answer);
                }
                events.push(Event::Connected(sender));
            }
        }
    }

    fn overhear(&mut self, envelope: Envelope) {
        let Message::Votes(batch) = envelope.message else { return };
        let voter = batch.get().member().get();
        for (index, vote) in batch.get().votes().iter().enumerate() {
            let counted = CountedVote { batch: Arc::clone(&batch), index };
            self.overheard.entry(*vote).or_default().insert(voter, counted);
        }
    }

    pub fn tick(&mut self, i: usize) {
        self.step(i, vec![Event::Tick]);
    }

    pub fn block(&mut self, from: usize, to: usize) {
        self.blocked.insert((from, to));
    }

    pub fn reconnect(&mut self, a: usize, b: usize) {
        self.blocked.remove(&(a, b));
        self.blocked.remove(&(b, a));
        self.send(a, Some(b), &Message::Connected);
        self.send(b, Some(a), &Message::Connected);
    }

    /// A member that lies does one of the things that a liar can do: vote for anything and
    /// show it to some, claim to have locked a rival, keep a certificate for one alone,
    /// give a member its own votes back, vote on what does not exist.
    pub fn lie(&mut self) {
        let n = self.setting.keys.len();
        let honest = self.nodes.len();
        if honest == n || !self.weather.liars || self.bodies.is_empty() {
            return;
        }
        let liar = honest + self.rng.below(n - honest);
        let known: Vec<Txid> = self.bodies.keys().copied().collect();
        let txid = self.rng.pick(&known);
        let to = self.rng.below(honest);
        match self.rng.below(8) {
            0..=3 => {
                let kinds: Vec<_> = VoteKind::ALL.into_iter().filter(|_| self.rng.chance(700)).collect();
                let votes: Vec<_> = kinds.into_iter().map(|kind| Vote { kind, txid }).collect();
                if votes.is_empty() {
                    return;
                }
                let batch = self.batch(liar, votes);
                for (index, vote) in batch.get().votes().iter().enumerate() {
                    let counted = CountedVote { batch: Arc::clone(&batch), index };
                    self.overheard.entry(*vote).or_default().insert(liar, counted);
                }
                for to in 0..honest {
                    if self.rng.chance(400) {
                        self.send(liar, Some(to), &Message::Votes(Arc::clone(&batch)));
                    }
                }
            }
            4 => {
                let body = Arc::new(self.bodies[&txid].get().transaction().clone());
                self.send(liar, Some(to), &Message::Locked(body));
            }
            5 => {
                let enough = self.setting.committee.quorum();
                let has_quorum =
                    |(vote, votes): (&Vote, &BTreeMap<_, _>)| (votes.len() as u64 >= enough).then_some(*vote);
                let made: Vec<Vote> = self.overheard.iter().filter_map(has_quorum).collect();
                if made.is_empty() {
                    return;
                }
                let Vote { kind, txid } = self.rng.pick(&made);
                let votes = self.overheard[&Vote { kind, txid }].values().map(CountedVote::to_signed).collect();
                let epoch = self.setting.committee.epoch();
                let certificate = Arc::new(Certificate { kind, txid, epoch, votes });
                let body = Arc::new(self.bodies[&txid].get().transaction().clone());
                self.send(liar, Some(to), &Message::Body(body, Some(certificate)));
            }
            6 => {
                let theirs = self.overheard.values().filter_map(|votes| votes.get(&to)).map(|v| Arc::clone(&v.batch));
                let theirs: Vec<_> = theirs.collect();
                if !theirs.is_empty() {
                    let at = self.rng.below(theirs.len());
                    self.send(liar, Some(to), &Message::Votes(Arc::clone(&theirs[at])));
                }
            }
            _ => {
                let mut nothing = [0; 32];
                nothing[..8].copy_from_slice(&self.rng.next().to_le_bytes());
                let kind = self.rng.pick(&VoteKind::ALL);
                let batch = self.setting.batch(liar, vec![Vote { kind, txid: Txid::from_bytes(nothing) }]);
                self.send(liar, Some(to), &Message::Votes(batch));
            }
        }
    }

    /// All honest members are up, every connection is made anew, nothing is lost any more.
    pub fn heal(&mut self) {
        self.blocked.clear();
        self.weather = Weather { liars: self.weather.liars, ..CALM };
        for i in 0..self.nodes.len() {
            if !self.is_up(i) {
                self.start(i);
            }
        }
        for a in 0..self.setting.keys.len() {
            for b in 0..a {
                self.reconnect(a, b);
            }
        }
    }

    /// Lets `ms` pass on a calm network. Stops early when `done`.
    pub fn run(&mut self, ms: u64, mut done: impl FnMut(&Self) -> bool) {
        let end = self.now_ms + ms;
        let mut status_at = self.now_ms + 500;
        while self.now_ms < end && !done(self) {
            self.now_ms += 100;
            for i in 0..self.setting.keys.len() {
                while self.deliver(i, 8) {}
            }
            for i in 0..self.nodes.len() {
                self.tick(i);
                if self.now_ms >= status_at {
                    let in_flight: Vec<_> = self.nodes[i].store.in_flight.keys().copied().collect();
                    self.send(i, None, &Message::Status(in_flight));
                }
            }
            if self.now_ms >= status_at {
                status_at += 3_000;
            }
            if self.rng.chance(300) {
                self.lie();
            }
        }
    }

    pub fn is_final_everywhere(&self, txid: &Txid) -> bool {
        self.nodes.iter().all(|node| node.store.finalized.contains_key(txid))
    }

    pub fn is_final_anywhere(&self, txid: &Txid) -> bool {
        self.nodes.iter().any(|node| node.store.finalized.contains_key(txid))
    }

    pub fn voted(&self, i: usize, kind: VoteKind, txid: Txid) -> bool {
        self.history.votes.contains(&(i, Vote { kind, txid }))
    }

    /// Whether an honest member ever locked it: then a wallet may rely on it.
    pub fn acknowledged(&self, txid: Txid) -> bool {
        (0..self.nodes.len()).any(|i| self.voted(i, VoteKind::Approve, txid))
    }

    /// The member that committed to a rival of `txid`, if this one did.
    pub fn committed_to_rival(&self, i: usize, transaction: &Transaction) -> bool {
        let other = |outpoint| self.history.committed.get(&(i, outpoint)).is_some_and(|t| *t != transaction.txid());
        transaction.spends().any(other)
    }
}
