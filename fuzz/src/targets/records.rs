//! Rows of the database: whatever damage makes of them, nothing comes apart that reads
//! them, and what is called sound is so.

use std::fmt::Write;
use std::sync::{Arc, LazyLock};

use serde_json::json;
use time_masternode::consensus::{
    AgreementRecord, Certificate, ChainTip, Changes, CountedVote, Dead, Finalized, InFlight, LogEntry, RoundTimer,
    Settled, Transition, Utxo, Vote, VoteKind, check_form, sign_batch,
};
use time_masternode::db::{
    CommitBatch, Database, DatabaseError, DiskImage, InspectTrees, MemoryDisk, Owner, SCHEMA_VERSION, Subscription,
    SubscriptionKey, TREE_NAMES, Thing, VerifyOptions, verify_in_memory,
};
use time_masternode::types::{
    Amount, DecidedBlock, Input, OutPoint, Output, Signature, Transaction, Txid, UTXOState, sighash,
};

use super::Outcome;
use super::setting::{EQUAL, owner_of, secret_of, vectors};

/// Changes of rows that one input can make.
const MAX_CHANGES: usize = 12;
/// Rows of one tree that are looked at; there are far fewer.
const MAX_ROWS: usize = 4_096;

/// Signatures take nearly all the time, so they are checked for one input in so many.
const FULL_EVERY: usize = 16;
/// What is not sound is read and shown whole, which takes most of the rest, for one in so many.
const SHOWN_EVERY: usize = 4;

/// A list of changes to the rows of a sound database, each of a few bytes: which tree, what
/// is done, to which row, and with which bytes. See [`change`].
pub fn records(data: &[u8]) -> Outcome {
    let disk = MemoryDisk::new();
    disk.put_back(&BASE, true);
    let mut bytes = Bytes(data);
    for _ in 0..MAX_CHANGES {
        if change(&disk, &mut bytes).is_none() {
            break;
        }
    }
    inspected(&disk, data.iter().map(|byte| usize::from(*byte)).sum())
}

fn owner(first_start: bool) -> Owner<'static> {
    Owner { genesis: &EQUAL.genesis, public_key: Some(EQUAL.genesis.masternodes()[0].public_key), first_start }
}

type Row = (Vec<u8>, Vec<u8>);

fn rows(disk: &MemoryDisk) -> Vec<Vec<Row>> {
    TREE_NAMES.iter().map(|tree| disk.raw_rows(tree).expect("the tree is there")).collect()
}

/// `lot` decides how thoroughly.
fn inspected(disk: &MemoryDisk, lot: usize) -> Outcome {
    let before = rows(disk);
    let full = lot.is_multiple_of(FULL_EVERY);
    let genesis = Some(&EQUAL.genesis).filter(|_| full);
    let options = VerifyOptions { genesis, full, progress: &|_, _| {} };
    let report = verify_in_memory(disk, options).expect("a disk in memory can be read");
    let trees = InspectTrees::in_memory(disk);
    let shown = report.is_sound() || lot.is_multiple_of(SHOWN_EVERY);
    let all_readable = shown && trees.as_ref().is_ok_and(all_readable);
    for (check, finding) in report.findings() {
        assert!(!finding.what.contains("came apart"), "{check}: {finding:?}");
    }
    assert_eq!(rows(disk), before, "looking changes nothing");
    let opened = Database::open_in_memory(disk, owner(false));
    // Of another schema it is not verified but migrated, or refused.
    let of_this_schema = |trees: &InspectTrees| trees.condition().is_ok_and(|c| c.schema == Some(SCHEMA_VERSION));
    if report.is_sound() && trees.as_ref().is_ok_and(of_this_schema) {
        assert!(all_readable, "what is sound can be read");
        match opened {
            Ok(opened) => assert_eq!(opened.recovered.suspension, None, "what is sound votes"),
            Err(DatabaseError::OtherNetwork { .. } | DatabaseError::OtherKey { .. }) => {}
            Err(error) => panic!("what is sound can be opened: {error}"),
        }
        return Outcome::Accepted;
    }
    if let Ok(opened) = opened {
        used(&opened.database);
        let recovered = format!("{:?}", opened.recovered);
        drop(opened);
        let again = Database::open_in_memory(disk, owner(false)).expect("what was opened once is opened again");
        assert_eq!(format!("{:?}", again.recovered), recovered, "a second start goes on with the same");
    }
    Outcome::Refused
}

/// Whether every record of every tree can be shown.
fn all_readable(trees: &InspectTrees) -> bool {
    let mut all = trees.stats(&|_, _| {}).is_ok() && trees.log_begins().is_ok();
    all &= trees.in_flight().is_ok_and(|mut flights| flights.all(|flight| flight.is_ok()));
    for txid in BASE_TXIDS.iter() {
        let about = [Thing::Txid(*txid), Thing::OutPoint(OutPoint { txid: *txid, vout: 0 })];
        all &= about.iter().all(|thing| matches!(trees.about(thing), Ok(Ok(found)) if found.unreadable.is_empty()));
    }
    for name in TREE_NAMES {
        let rows = match trees.rows(name) {
            Ok(rows) => rows.expect("the tree is there"),
            // It says to be of another schema, and is not read as this one.
            Err(_) => return false,
        };
        for row in rows.take(MAX_ROWS) {
            match row {
                Ok(row) => {
                    assert_eq!(row.tree, name);
                    serde_json::to_string(&row).expect("a row is JSON");
                }
                Err(error) => {
                    assert!(error.to_string().len() < 4_096);
                    all = false;
                }
            }
        }
    }
    all
}

/// What a node reads for others; all of it may be refused, and none of it may panic.
fn used(database: &Database) {
    let reader = database.reader();
    let mut answers = String::new();
    let mut note = |answer: &dyn std::fmt::Debug| write!(answers, "{answer:?}").expect("a text takes everything");
    let addresses: Vec<_> = EQUAL.genesis.transaction().outputs().iter().map(|output| output.address).collect();
    note(&reader.address_page(&addresses, None, 100));
    note(&reader.snapshot(&addresses, &[]));
    note(&reader.outputs().take(MAX_ROWS).collect::<Vec<_>>());
    note(&reader.first_sequence());
    note(&reader.changes(0, u64::MAX, MAX_ROWS));
    note(&reader.unconfirmed(0, u64::MAX, MAX_ROWS));
    note(&reader.fence_page(None, 100));
    note(&reader.prunable(u64::MAX, 100));
    note(&reader.subscriptions().take(MAX_ROWS).collect::<Vec<_>>());
    note(&reader.block(1));
    for txid in BASE_TXIDS.iter() {
        note(&reader.finalized(txid));
        note(&reader.in_flight(txid));
        note(&reader.confirmed(txid));
        note(&reader.dead(txid));
        note(&reader.certificate(txid, VoteKind::Commit));
        note(&reader.certificate(txid, VoteKind::Approve));
    }
}

/// What is left of the input.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn byte(&mut self) -> Option<usize> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(usize::from(*first))
    }

    fn word(&mut self) -> Option<usize> {
        Some(self.byte()? << 8 | self.byte()?)
    }

    fn some(&mut self, length: usize) -> &'a [u8] {
        let (some, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        some
    }
}

/// Carries out one change; `None` when the input is at its end.
fn change(disk: &MemoryDisk, bytes: &mut Bytes<'_>) -> Option<()> {
    let tree = TREE_NAMES[bytes.byte()? % TREE_NAMES.len()];
    let what = bytes.byte()?;
    let rows = disk.raw_rows(tree)?;
    if what % 8 == 7 || rows.is_empty() {
        let length = bytes.byte()?;
        let key = bytes.some(length).to_vec();
        let length = bytes.word()?;
        disk.damage(tree, key, Some(bytes.some(length).to_vec()));
        return Some(());
    }
    let (mut key, mut value) = rows[bytes.byte()? % rows.len()].clone();
    match what % 8 {
        // A byte of the value, which mostly stands early in it.
        0 | 1 => {
            let place = if what % 8 == 0 { bytes.byte()? } else { bytes.word()? };
            let bits = bytes.byte()?;
            let length = value.len();
            if let Some(byte) = value.get_mut(place % length.max(1)) {
                *byte ^= u8::try_from(bits).unwrap_or(1);
            }
        }
        2 => {
            disk.damage(tree, key.clone(), None);
            let place = bytes.byte()?;
            let bits = bytes.byte()?;
            let length = key.len();
            if let Some(byte) = key.get_mut(place % length.max(1)) {
                *byte ^= u8::try_from(bits).unwrap_or(1);
            }
        }
        3 => value.truncate(bytes.word()?),
        4 => {
            let length = bytes.byte()?;
            value.extend_from_slice(bytes.some(length));
        }
        5 => {
            disk.damage(tree, key, None);
            return Some(());
        }
        _ => key.clone_from(&rows[bytes.byte()? % rows.len()].0),
    }
    disk.damage(tree, key, Some(value));
    Some(())
}

static BASE_TXIDS: LazyLock<Vec<Txid>> = LazyLock::new(|| {
    let [first, second, committed, approved] = transactions();
    [first, second, committed, approved].map(|transaction| transaction.txid()).to_vec()
});

/// A database of the first member after the vectors' first block: that block, with a
/// transaction that was final by votes and one that only the block settled; two in flight,
/// one of them committed; a subscription; something in the agreement's log.
static BASE: LazyLock<DiskImage> = LazyLock::new(|| {
    let disk = MemoryDisk::new();
    let mut database = Database::open_in_memory(&disk, owner(true)).expect("a new disk can be filled").database;
    let subscription = Subscription {
        subscriber_id: "wallet".into(),
        token_hash: [1; 32],
        outpoints: vec![EQUAL.genesis.transaction().creates().next().expect("there are coins").0],
        addresses: vec![EQUAL.genesis.transaction().outputs()[0].address],
        last_used: 5,
    };
    let subscriptions = [(SubscriptionKey::of("wallet"), Some(subscription))].into();
    for (changes, subscriptions) in [(first_block(), subscriptions), (in_flight(), Default::default())] {
        let batch = CommitBatch { changes, subscriptions, ..CommitBatch::default() };
        database.commit(batch, ()).expect("a disk in memory takes every commit").into_inner();
    }
    drop(database);
    let base = disk.image();
    let options = VerifyOptions { genesis: Some(&EQUAL.genesis), full: true, progress: &|_, _| {} };
    let report = verify_in_memory(&disk, options).expect("a disk in memory can be read");
    assert!(report.is_sound(), "{:?}", report.findings().collect::<Vec<_>>());
    base
});

fn decided() -> DecidedBlock {
    let vectors = vectors();
    let decided = json!({ "block": vectors["blocks"][0]["json"], "certificate": vectors["consensus"]["commit"] });
    serde_json::from_value(decided).expect("the vectors hold a block and its certificate")
}

/// The vectors' two, and two that spend what they and the block's fees have left.
fn transactions() -> [Arc<Transaction>; 4] {
    let vectors = vectors();
    let read = |index: usize| {
        let raw = serde_json::from_value(vectors["transactions"][index]["json"].clone());
        let raw = raw.expect("the vectors hold transactions");
        Arc::new(check_form(raw, &EQUAL.rules()).expect("they are good"))
    };
    let (first, second) = (read(0), read(1));
    let committed = spend(OutPoint { txid: first.txid(), vout: 0 }, first.outputs()[0]);
    let approved = spend(fees(), payout());
    [first, second, committed, approved]
}

/// Where the fees of the block are.
fn fees() -> OutPoint {
    OutPoint { txid: Txid::from_bytes(*decided().certificate.block_hash.as_bytes()), vout: 0 }
}

/// Its two fees of ten units, for the member that made it.
fn payout() -> Output {
    let amount = Amount::from_units(20).expect("it is not much");
    Output { amount, address: EQUAL.genesis.masternodes()[0].payout_address }
}

fn spend(coin: OutPoint, spent: Output) -> Arc<Transaction> {
    let owner = owner_of(&spent.address).expect("it is one of the vectors' keys");
    let units = spent.amount.units() - 10;
    let output = Output { amount: Amount::from_units(units).expect("it is less than was there"), ..spent };
    let signed = |signature| {
        let input = Input { previous_output: coin, public_key: owner, signature };
        Transaction::from_parts(vec![input], vec![output], 7)
    };
    let txid = signed(Signature::from_bytes([0; 64])).txid();
    let key = secret_of(&owner).expect("it is one of the vectors' keys");
    Arc::new(signed(key.sign(&sighash(&EQUAL.genesis.hash(), &txid))))
}

/// The certificate of three members.
fn certificate(kind: VoteKind, txid: Txid) -> Arc<Certificate> {
    let vote = |place: usize| {
        let key = secret_of(&EQUAL.genesis.masternodes()[place].public_key).expect("the members' keys are known");
        let batch = sign_batch(key, &EQUAL.committee, vec![Vote { kind, txid }]).expect("a member signs its vote");
        CountedVote { batch: Arc::new(batch), index: 0 }.to_signed()
    };
    Arc::new(Certificate { kind, txid, epoch: 0, votes: (0..3).map(vote).collect() })
}

/// Puts an output's step into the changes.
fn step(changes: &mut Changes, outpoint: OutPoint, output: Output, new_state: UTXOState) {
    let genesis = EQUAL.genesis.transaction().creates().any(|(coin, _)| coin == outpoint);
    let known = changes.utxos.get(&outpoint).map(|utxo| utxo.state);
    let is_new = new_state == UTXOState::Unspent && !genesis;
    let old_state = if is_new { None } else { Some(known.unwrap_or(UTXOState::Unspent)) };
    changes.utxos.insert(outpoint, Utxo { output, state: new_state });
    changes.log.push(LogEntry::Transition(Transition { outpoint, output, old_state, new_state, timestamp: 8 }));
}

fn first_block() -> Changes {
    let mut changes = Changes::default();
    let decided = decided();
    let hash = decided.certificate.block_hash;
    let mut outputs: std::collections::BTreeMap<OutPoint, Output> = EQUAL.genesis.transaction().creates().collect();
    let [first, second, ..] = transactions();
    let mut tip = ChainTip::of_genesis(&EQUAL.genesis);
    let proof = Some(certificate(VoteKind::Commit, first.txid()));
    for outpoint in first.spends() {
        let spent = UTXOState::SpentFinalized { txid: first.txid(), finalized_at: 8, votes: 3 };
        step(&mut changes, outpoint, outputs[&outpoint], spent);
    }
    for (outpoint, output) in first.creates() {
        step(&mut changes, outpoint, output, UTXOState::Unspent);
        outputs.insert(outpoint, output);
    }
    for transaction in [&first, &second] {
        for outpoint in transaction.spends() {
            let confirmed = UTXOState::Confirmed { txid: transaction.txid(), block_height: 1, confirmed_at: 8 };
            step(&mut changes, outpoint, outputs[&outpoint], confirmed);
            tip.digest.remove(&outpoint, &outputs[&outpoint]);
        }
        for (outpoint, output) in transaction.creates() {
            if transaction.txid() == second.txid() {
                step(&mut changes, outpoint, output, UTXOState::Unspent);
            }
            tip.digest.add(&outpoint, &output);
            outputs.insert(outpoint, output);
        }
    }
    step(&mut changes, fees(), payout(), UTXOState::Unspent);
    tip.digest.add(&fees(), &payout());
    let timestamp_ms = decided.block.timestamp_ms;
    changes.log.push(LogEntry::Block { height: 1, block_hash: hash, timestamp_ms });
    for (transaction, certificate) in [(&first, proof), (&second, None)] {
        let votes = if certificate.is_some() { 3 } else { 0 };
        let fee = Amount::from_units(10).expect("it is not much");
        let settled = Settled { finalized_at: 8, votes, fee };
        let finalized = Finalized { transaction: Arc::clone(transaction), settled, certificate };
        changes.finalized.insert(transaction.txid(), finalized);
        changes.confirmed.insert(transaction.txid(), 1);
    }
    changes.dead.insert(Txid::from_bytes([8; 32]), Dead { by: Some(first.txid()), height: 1 });
    changes.blocks.push((hash, Arc::new(decided)));
    changes.tip = Some(ChainTip { height: 1, hash, timestamp_ms, ..tip });
    changes
}

fn in_flight() -> Changes {
    let mut changes = Changes::default();
    let [first, _, committed, approved] = transactions();
    for (transaction, output) in [(&committed, first.outputs()[0]), (&approved, payout())] {
        let txid = transaction.txid();
        for outpoint in transaction.spends() {
            let state = UTXOState::Locked { txid, locked_at: 9 };
            changes.utxos.insert(outpoint, Utxo { output, state });
            let old_state = Some(UTXOState::Unspent);
            let locked = Transition { outpoint, output, old_state, new_state: state, timestamp: 9 };
            changes.log.push(LogEntry::Transition(locked));
        }
        let in_flight = InFlight { transaction: Arc::clone(transaction), locked_at: Some(9) };
        changes.in_flight.insert(txid, Some(in_flight));
        changes.votes.push(Vote { kind: VoteKind::Approve, txid });
    }
    let txid = committed.txid();
    changes.certificates.insert((txid, VoteKind::Approve), certificate(VoteKind::Approve, txid));
    changes.votes.push(Vote { kind: VoteKind::Commit, txid });
    changes.agreement.push((2, AgreementRecord::Timeout { timer: RoundTimer::Propose, round: 0 }));
    changes
}
