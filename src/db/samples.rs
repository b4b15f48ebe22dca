//! What this module's own tests begin with: a genesis of one member and twenty coins of
//! 1 to 20 units, and transactions that nobody signed.

use std::path::Path;
use std::sync::Arc;

use super::held::Held;
use super::open::{DATABASE_DIR, open_patiently};
use super::{Database, DatabaseError, MemoryDisk, Opened, Owner};
use crate::types::{
    Address, Allocation, Amount, Genesis, Input, Network, OutPoint, Output, RawGenesis, RawMasternode, SecretKey,
    Signature, Transaction,
};

pub(crate) fn key() -> SecretKey {
    SecretKey::from_seed([1; 32])
}

pub(crate) fn address() -> Address {
    Address::of_key(&key().public_key(), Network::Devnet)
}

pub(crate) fn genesis() -> Genesis {
    let member = RawMasternode {
        id: "m".into(),
        public_key: key().public_key(),
        weight: 1,
        p2p_address: String::new(),
        payout_address: address().to_string(),
    };
    let allocations = (1..=20).map(|amount| Allocation { address: address().to_string(), amount }).collect();
    Genesis::try_from(RawGenesis {
        network: Network::Devnet,
        timestamp: 1,
        block_interval_ms: 1,
        min_fee: 1,
        masternodes: vec![member],
        allocations,
    })
    .expect("it is sound")
}

pub(super) fn spend(outpoint: OutPoint, amount: u64) -> Arc<Transaction> {
    let signature = Signature::from_bytes([9; 64]);
    let input = Input { previous_output: outpoint, public_key: key().public_key(), signature };
    let output = Output { amount: Amount::from_units(amount).expect("it is little"), address: address() };
    Arc::new(Transaction::from_parts(vec![input], vec![output], 0))
}

/// The member's database, or an observer's.
pub(crate) fn open_sample(disk: &MemoryDisk, genesis: &Genesis, member: bool, first_start: bool) -> Opened {
    try_open_sample(disk, genesis, member, first_start).expect("a disk in memory is sound")
}

/// The same, of a disk that may not be sound.
pub(super) fn try_open_sample(
    disk: &MemoryDisk,
    genesis: &Genesis,
    member: bool,
    first_start: bool,
) -> Result<Opened, DatabaseError> {
    let public_key = member.then(|| key().public_key());
    Database::open_in_memory(disk, Owner { genesis, public_key, first_start })
}

/// Rows of the change log in what [`gone_back`] gives.
pub(super) const ROWS_GONE_BACK: u64 = 3_000;

/// Data directories in which a sector of sled's file is zeroed, so that a page of the change log has
/// gone back to what it was before it was split: whoever walks forwards passes over rows, and
/// each of them is found by its key. Most damaged sectors do something else.
pub(super) fn gone_back() -> Vec<tempfile::TempDir> {
    let open = |dir: &Path| {
        let path = dir.join(DATABASE_DIR);
        let db = open_patiently(&sled::Config::new().path(&path).flush_every_ms(None), &path)?;
        let tree = db.open_tree("changes")?;
        Ok::<_, DatabaseError>((Held::new(db), Held::new(tree)))
    };
    let sound = tempfile::tempdir().expect("there is room");
    let (db, tree) = open(sound.path()).expect("a new database opens");
    for n in 0..ROWS_GONE_BACK {
        tree.insert(n.to_be_bytes(), vec![5; 300]).expect("it takes rows");
        if n % 8 == 7 {
            db.flush().expect("it takes rows");
        }
    }
    drop((tree, db));
    let read = |name: &str| std::fs::read(sound.path().join("db").join(name)).expect("it is a file");
    let (conf, file) = (read("conf"), read("db"));
    let used = file.iter().rposition(|byte| *byte != 0).expect("there is something in it");
    let with_sector_zeroed = |sector: usize| {
        let dir = tempfile::tempdir().expect("there is room");
        std::fs::create_dir(dir.path().join("db")).expect("it is empty");
        let mut bytes = file.clone();
        bytes[512 * sector..][..512].fill(0);
        std::fs::write(dir.path().join("db").join("conf"), &conf).expect("there is room");
        std::fs::write(dir.path().join("db").join("db"), &bytes).expect("there is room");
        let (_db, tree) = std::panic::catch_unwind(|| open(dir.path())).ok()?.ok()?;
        let all_there = (0..ROWS_GONE_BACK).all(|n| tree.get(n.to_be_bytes()).is_ok_and(|row| row.is_some()));
        let walked = tree.iter().filter(Result::is_ok).count() as u64;
        (all_there && walked < ROWS_GONE_BACK).then_some(dir)
    };
    // Which sectors do it differs from one file to the next, for sled's threads write it.
    let sectors = |first: usize| (first..used / 512).step_by(29);
    let mut damaged = (0..29).map(|first| sectors(first).filter_map(with_sector_zeroed).collect::<Vec<_>>());
    damaged.find(|damaged| !damaged.is_empty()).expect("a page has gone back")
}
