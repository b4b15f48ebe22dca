//! `verify` finds nothing on a sound database, in flight and in blocks, and names the
//! invariant that each kind of damage breaks.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::path::Path;

use support::{TestNet, in_sled, within};
use time_masternode::consensus::FenceState;
use time_masternode::db::{
    CommitBatch, Database, Owner, Remedy, SubscriptionKey, VerifyOptions, plan, repair, verify_data_dir,
};
use time_masternode::net::TransactionStatusKind;
use time_masternode::types::SecretKey;

/// A network that has confirmed, final and stuck payments; all nodes are stopped.
async fn used_network() -> TestNet {
    let mut net = TestNet::with_interval(4, 200);
    net.set_environment("TIME_RETENTION_BLOCKS", "2");
    net.start_all();
    let to = net.address(&SecretKey::generate());
    let mut wallet = net.wallet(0).await;
    let coins = net.coins();
    let mut coin = coins[0].clone();
    for _ in 0..6 {
        let payment = net.pay(&coin, &to, 1);
        wallet.pay(&payment).await;
        within("confirmation", async {
            while wallet.query(payment.txid()).await.status != TransactionStatusKind::Confirmed {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
        coin = TestNet::outputs(&payment, &coin.key).remove(1);
    }
    // Something is final and in no block, and something is in flight for ever.
    net.kill(3);
    net.kill(2);
    let stuck = net.pay(&coins[1], &to, 2);
    wallet.broadcast(&stuck).await;
    wallet.status_of(stuck.txid(), &[TransactionStatusKind::Pending]).await;
    net.stop(0);
    net.stop(1);
    net
}

#[tokio::test]
async fn a_database_that_was_used_is_sound() {
    let net = used_network().await;
    for node in 0..4 {
        for full in [false, true] {
            let options = VerifyOptions { genesis: Some(&net.genesis), full, progress: &|_, _| {} };
            let report = verify_data_dir(&net.data_dir(node), 1 << 24, options).unwrap();
            let findings: Vec<_> = report.findings().collect();
            assert!(report.is_sound(), "node {node}: {findings:#?}");
            let checked = |name| report.checks.iter().find(|check| check.name == name).unwrap().checked;
            for name in ["utxos", "addresses", "transactions", "confirmed", "changes", "blocks", "supply", "digest"] {
                assert!(checked(name) > 0, "{name} was looked at");
            }
            assert!(node > 1 || checked("locks") == 1, "the lock was looked at");
        }
    }
}

/// Copies a data directory.
fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

type Damaged = fn(&sled::Db);

fn first_key(tree: &sled::Tree) -> sled::IVec {
    tree.first().unwrap().unwrap().0
}

fn remove_first(db: &sled::Db, tree: &str) {
    let tree = db.open_tree(tree).unwrap();
    let key = first_key(&tree);
    tree.remove(key).unwrap();
}

/// Changes the bytes of a tree's first row.
fn change_first(db: &sled::Db, tree: &str, change: impl Fn(&mut Vec<u8>)) {
    let tree = db.open_tree(tree).unwrap();
    let (key, value) = tree.first().unwrap().unwrap();
    let mut value = value.to_vec();
    change(&mut value);
    tree.insert(key, value).unwrap();
}

/// A row of outputs that the genesis made and nobody spent: it belongs to no transaction, and
/// then come their count, and a tag and 33 bytes for each.
fn unspent_key(db: &sled::Db) -> sled::IVec {
    let utxos = db.open_tree("utxos").unwrap();
    let unspent = |row: &[u8]| row[0] == 0 && row[9..].chunks(37).all(|output| output[..4] == [1, 0, 0, 0]);
    utxos.iter().map(Result::unwrap).find(|(_, row)| unspent(row)).unwrap().0
}

/// The row with its first spent output as if nothing had spent it.
fn with_a_spent_output_live(row: &[u8]) -> Option<Vec<u8>> {
    let mut at = if row[0] == 1 { 1 + 28 } else { 1 } + 8;
    while let Some(tag) = row.get(at) {
        match tag {
            2 => return Some([&row[..at], &[1, 0, 0, 0], &row[at + 4..][..33], &row[at + 4 + 33 + 32..]].concat()),
            1 => at += 4 + 33,
            _ => at += 4,
        }
    }
    None
}

/// The first row of a settled transaction.
fn settled_key(db: &sled::Db) -> sled::IVec {
    let utxos = db.open_tree("utxos").unwrap();
    utxos.iter().map(Result::unwrap).find(|(_, row)| row[0] == 1).unwrap().0
}

/// The row of an output that something in flight spends: its record names the output.
fn locked_key(db: &sled::Db) -> sled::IVec {
    let utxos = db.open_tree("utxos").unwrap();
    let key = |named: &[u8]| {
        let (txid, vout) = named.split_at(32);
        let vout = u32::from_le_bytes(vout.try_into().unwrap());
        [txid, &(vout - vout % 4).to_be_bytes()].concat()
    };
    let records = db.open_tree("locks").unwrap();
    let records: Vec<_> = records.iter().map(|record| record.unwrap().1).collect();
    let mut named = records.iter().flat_map(|record| record.windows(36)).map(key);
    named.find(|key| utxos.contains_key(key).unwrap()).unwrap().into()
}

/// Each kind of damage, the invariant that has to name it, and what a repair makes of it.
const DAMAGES: [(&str, &str, Remedy, Damaged); 23] = [
    ("a coin is gone", "supply", Remedy::Resync, |db| {
        let key = unspent_key(db);
        db.open_tree("utxos").unwrap().remove(key).unwrap();
    }),
    ("a coin has grown", "digest", Remedy::Resync, |db| {
        let key = unspent_key(db);
        let utxos = db.open_tree("utxos").unwrap();
        let mut value = utxos.get(&key).unwrap().unwrap().to_vec();
        value[1 + 8 + 4] ^= 1;
        utxos.insert(key, value).unwrap();
    }),
    ("a spent coin is live again", "transactions", Remedy::Resync, |db| {
        let utxos = db.open_tree("utxos").unwrap();
        let spent = |(key, row): (sled::IVec, sled::IVec)| Some((key, with_a_spent_output_live(&row)?));
        let (key, row) = utxos.iter().map(Result::unwrap).find_map(spent).unwrap();
        utxos.insert(key, row).unwrap();
    }),
    ("a coin cannot be read", "utxos", Remedy::Resync, |db| {
        let key = unspent_key(db);
        db.open_tree("utxos").unwrap().insert(key, b"?").unwrap();
    }),
    ("a locked coin cannot be read", "utxos", Remedy::Resync, |db| {
        let key = locked_key(db);
        db.open_tree("utxos").unwrap().insert(key, b"?").unwrap();
    }),
    ("an index row is gone", "addresses", Remedy::Rebuild, |db| remove_first(db, "addresses")),
    ("an index row too many", "addresses", Remedy::Rebuild, |db| {
        db.open_tree("addresses").unwrap().insert([7; 57], b"").unwrap();
    }),
    ("a body is gone", "transactions", Remedy::Resync, |db| remove_first(db, "transactions")),
    ("a settled transaction is gone", "confirmed", Remedy::Resync, |db| {
        let key = settled_key(db);
        db.open_tree("utxos").unwrap().remove(key).unwrap();
    }),
    ("a body is another one", "transactions", Remedy::Resync, |db| {
        let utxos = db.open_tree("utxos").unwrap();
        let key = settled_key(db);
        let value = utxos.get(&key).unwrap().unwrap();
        let mut other = key.to_vec();
        other[0] ^= 0x55;
        utxos.insert(other, value).unwrap();
    }),
    ("a body has no transaction", "transactions", Remedy::Resync, |db| {
        let bodies = db.open_tree("transactions").unwrap();
        let (_, value) = bodies.first().unwrap().unwrap();
        bodies.insert([&(1_u64 << 40).to_be_bytes()[..], &[0, 0]].concat(), value).unwrap();
    }),
    ("a height is gone", "confirmed", Remedy::Resync, |db| remove_first(db, "confirmed")),
    ("a height too many", "confirmed", Remedy::Resync, |db| {
        // The last of the 64 numbers of its stretch.
        change_first(db, "confirmed", |row| *row.last_mut().unwrap() |= 0x80);
    }),
    ("something settled is dead", "dead", Remedy::Resync, |db| {
        let txid = first_key(&db.open_tree("confirmed").unwrap());
        let mut row = vec![0];
        row.extend_from_slice(&1_u64.to_le_bytes());
        db.open_tree("dead").unwrap().insert(txid, row).unwrap();
    }),
    ("the votes are gone", "locks", Remedy::Fence, |db| db.open_tree("votes").unwrap().clear().unwrap()),
    ("a lock's transaction is gone", "votes", Remedy::Fence, |db| db.open_tree("locks").unwrap().clear().unwrap()),
    ("a vote of a commit to come", "votes", Remedy::Fence, |db| {
        let votes = db.open_tree("votes").unwrap();
        let (_, value) = votes.first().unwrap().unwrap();
        votes.insert([&u64::MAX.to_be_bytes()[..], &[0, 0]].concat(), value).unwrap();
    }),
    ("a finality proof's signature is damaged", "transactions", Remedy::Resync, |db| {
        // The number of parts, how it is written, how many batches, the first one's voter; its signature.
        change_first(db, "proofs", |row| row[2 + 4 + 8 + 32] ^= 1);
    }),
    ("the log has a hole", "changes", Remedy::Resync, |db| {
        let changes = db.open_tree("changes").unwrap();
        let middle = changes.iter().nth(changes.len() / 2).unwrap().unwrap().0;
        changes.remove(middle).unwrap();
    }),
    ("a block is gone", "blocks", Remedy::Resync, |db| remove_first(db, "blocks")),
    ("a block's certificate is damaged", "blocks", Remedy::Resync, |db| {
        change_first(db, "blocks", |row| *row.last_mut().unwrap() ^= 1);
    }),
    ("the agreement's log has a stray row", "records", Remedy::Fence, |db| {
        let mut row = vec![0, 1];
        row.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        db.open_tree("agreement").unwrap().insert([0xee; 14], row).unwrap();
    }),
    ("the database is older than its guard", "meta", Remedy::Fence, |db| {
        let meta = db.open_tree("meta").unwrap();
        let mut head = meta.get("head").unwrap().unwrap().to_vec();
        head[0] ^= 0x40;
        meta.insert("head", head).unwrap();
    }),
];

#[tokio::test]
async fn each_damage_is_named_and_has_its_remedy() {
    let net = used_network().await;
    let options = VerifyOptions { genesis: Some(&net.genesis), full: false, progress: &|_, _| {} };
    for (i, (story, name, remedy, damage)) in DAMAGES.into_iter().enumerate() {
        let data_dir = net.directory().join(format!("damaged-{i}"));
        copy(&net.data_dir(0), &data_dir);
        in_sled(&data_dir, damage);
        let report = verify_data_dir(&data_dir, 1 << 24, options).unwrap();
        let findings: Vec<_> = report.findings().collect();
        assert!(findings.iter().any(|(check, _)| *check == name), "{story}: {name} finds it: {findings:#?}");
        let planned = plan(&data_dir, 1 << 24, options).unwrap();
        assert!(planned.has(remedy), "{story}: {remedy:?}: {planned:#?}");
        // Once is enough, and what was there is kept.
        let repaired =
            repair(&data_dir, 1 << 24, &planned, options).unwrap_or_else(|e| panic!("{story}: {e}: {planned:#?}"));
        assert!(repaired.kept.join("db").join("db").is_file(), "{story}");
        let after = repaired.report.unwrap_or_else(|| panic!("{story}: no report"));
        let findings: Vec<_> = after.findings().collect();
        assert!(after.is_sound(), "{story}: {findings:#?}");
        assert_eq!(repaired.fenced.is_some_and(|fenced| fenced > 0), remedy == Remedy::Fence, "{story}");
        let again = plan(&data_dir, 1 << 24, options).unwrap_or_else(|e| panic!("{story}: {e}"));
        assert_eq!(again.steps, [], "{story}: nothing is left to repair");
    }
}

fn time_db(data_dir: &Path, genesis: &Path, args: &[&str]) -> (Option<i32>, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_time-db"))
        .arg("--data-dir")
        .arg(data_dir)
        .arg("--genesis")
        .arg(genesis)
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code(), format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// Two of three are no quorum: nobody can say what the third must not vote on, and the operator
/// is told so before anything is done.
#[tokio::test]
async fn a_network_that_cannot_fence_a_member_is_told_so() {
    for (members, warned) in [(3, true), (4, false)] {
        let mut net = TestNet::running(members);
        let genesis = net.directory().join(&net.devnet.genesis_file);
        let to = net.address(&SecretKey::generate());
        net.wallet(0).await.pay(&net.pay(&net.coins()[0], &to, 1)).await;
        net.stop(0);
        let data_dir = net.data_dir(0);
        std::fs::remove_file(data_dir.join("guard")).unwrap();
        let (code, text) = time_db(&data_dir, &genesis, &["repair"]);
        assert_eq!((code, text.contains("never votes again")), (Some(1), warned), "{members} members: {text}");
    }
}

/// An observer has no votes to lose: what does not fit its guard, and a fence that it should not
/// have, are mended where they are.
#[test]
fn an_observer_without_its_guard_is_repaired_once() {
    let net = TestNet::new(1);
    let data_dir = net.directory().join("observer");
    let owner = Owner { genesis: &net.genesis, public_key: None, first_start: false };
    let mut database = Database::open(&data_dir, owner, 1 << 24).unwrap().database;
    let key = SubscriptionKey::of("a wallet");
    for _ in 0..2 {
        let batch = CommitBatch { subscriptions: [(key, None)].into(), ..CommitBatch::default() };
        database.commit(batch, ()).unwrap().into_inner();
    }
    drop(database);
    std::fs::remove_file(data_dir.join("guard")).unwrap();
    let asking = bincode::serialize(&FenceState::Asking).unwrap();
    in_sled(&data_dir, |db| db.open_tree("meta").unwrap().insert("fence", asking).unwrap());
    let options = VerifyOptions { genesis: Some(&net.genesis), full: false, progress: &|_, _| {} };
    let planned = plan(&data_dir, 1 << 24, options).unwrap();
    assert!(planned.has(Remedy::Rebuild) && !planned.has(Remedy::Fence), "{planned:#?}");
    let repaired = repair(&data_dir, 1 << 24, &planned, options).unwrap();
    assert!(repaired.report.unwrap().is_sound());
    assert_eq!(plan(&data_dir, 1 << 24, options).unwrap().steps, []);
}

/// The wrong genesis is no damage.
#[test]
fn a_database_is_not_judged_by_another_networks_genesis() {
    let (mut net, other) = (TestNet::running(1), TestNet::new(1));
    net.stop(0);
    let genesis = other.directory().join(&other.devnet.genesis_file);
    for args in [&["verify"][..], &["repair"], &["repair", "--apply"]] {
        let (code, text) = time_db(&net.data_dir(0), &genesis, args);
        assert!(code == Some(2) && text.contains("another network") && text.contains("next: "), "{args:?}: {text}");
    }
    assert!(!net.data_dir(0).join("set-aside-1").exists());
}

/// The operator's way: verify names it, repair says what it would do and changes nothing,
/// --apply does it, and the node comes back, behind the fence, with its wallets' coins.
#[tokio::test]
async fn an_operator_repairs_a_member_that_may_have_lost_votes() {
    let mut net = used_network().await;
    let genesis = net.directory().join(&net.devnet.genesis_file);
    let data_dir = net.data_dir(0);
    assert_eq!(time_db(&data_dir, &genesis, &["verify", "--full"]).0, Some(0));
    assert_eq!(time_db(&data_dir, &genesis, &["repair"]).0, Some(0), "nothing to repair");
    std::fs::remove_file(data_dir.join("guard")).unwrap();
    let (code, text) = time_db(&data_dir, &genesis, &["verify"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("the guard has seen 0"), "{text}");
    for _ in 0..2 {
        let (code, text) = time_db(&data_dir, &genesis, &["repair"]);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("behind the fence") && text.contains("nothing was changed"), "{text}");
    }
    // Started as it is, it follows and does not vote.
    for node in [0, 1, 2, 3] {
        net.start(node);
    }
    support::until("the member says why", || (net.http(0, "/readyz")?.1.contains("time-db repair")).then_some(()));
    net.stop(0);
    let (code, text) = time_db(&data_dir, &genesis, &["repair", "--apply"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(time_db(&data_dir, &genesis, &["repair"]).0, Some(0), "once is enough");
    assert_eq!(time_db(&data_dir, &genesis, &["verify", "--full"]).0, Some(0));
    net.start(0);
    net.wait_ready(&[0, 1, 2, 3]);
    support::until("it votes behind its fence", || {
        let status = net.status(0);
        (status["voting"] == "Active" && status["fence"]["standing"] == true).then_some(())
    });
    let to = net.address(&SecretKey::generate());
    let coin = net.coins().remove(2);
    net.wallet(0).await.pay(&net.pay(&coin, &to, 3)).await;
}
