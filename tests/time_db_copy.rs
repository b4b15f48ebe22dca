//! `time-db` where it changes something: backups, restoring, export and import, migration.
//! Whatever is put in place goes behind the fence, and a crash leaves the old or the new.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;
#[path = "support/tool.rs"]
mod tool;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{TestNet, Wallet, until};
use time_masternode::net::{NetworkMessage, TransactionStatusKind, UTXOSubscribe, UTXOSubscribed};
use time_masternode::types::{Address, SecretKey, Txid};
use tool::{copy, failure, json_of, rows, time_db, until_confirmed};

/// Follows an address under a token of its own; with a place in a log, from there on.
async fn subscribe(wallet: &mut Wallet, address: &Address, from: Option<&UTXOSubscribed>) -> UTXOSubscribed {
    let subscribe = UTXOSubscribe {
        outpoints: Vec::new(),
        addresses: vec![address.to_string()],
        subscriber_id: "a wallet".into(),
        resume_token: Some("11".repeat(32)),
        resume_from: from.map(|from| from.sequence),
        log_id: from.map(|from| from.log_id.clone()),
    };
    wallet.send(&NetworkMessage::UTXOSubscribe(subscribe)).await;
    wallet
        .wait_for("the subscription", |message| match message {
            NetworkMessage::UTXOSubscribed(subscribed) => Some(subscribed),
            _ => None,
        })
        .await
}

/// The kinds of vote that a stopped node's database holds on a transaction.
fn own_votes(net: &TestNet, node: usize, txid: Txid) -> BTreeSet<String> {
    let rows = net.dump(node, "votes");
    let votes = rows.iter().flat_map(|row| row["value"].as_array().unwrap());
    let of = votes.filter(|vote| vote["txid"] == txid.to_string().as_str());
    of.map(|vote| vote["kind"].as_str().unwrap().to_owned()).collect()
}

fn until_fence_stands(net: &TestNet, node: usize) {
    until("the fence stands", || {
        let status: Value = serde_json::from_str(&net.http(node, "/status")?.1).ok()?;
        (status["fence"]["standing"] == true && status["voting"] == "Active").then_some(())
    });
}

/// A backup is taken, the member votes on, the backup comes back: it has lost votes, and
/// gives none on anything that it may have voted on.
#[tokio::test]
async fn what_was_restored_votes_behind_the_fence() {
    let mut net = TestNet::running(4);
    let coins = net.coins();
    let to = net.address(&SecretKey::generate());
    let first = net.pay(&coins[0], &to, 1);
    let mut wallet = net.wallet(3).await;
    wallet.pay(&first).await;
    until_confirmed(&mut wallet, first.txid()).await;
    let seen = subscribe(&mut wallet, &to, None).await;
    assert!(!seen.reset);
    let backup = net.directory().join("backups").join("first");
    let data_dir = net.data_dir(3);
    let in_use = failure(&data_dir, &["backup", "--to", backup.to_str().unwrap()]);
    assert_eq!(in_use["kind"], json!("in_use"));
    net.stop(3);
    let made = json_of(&data_dir, &["backup", "--to", backup.to_str().unwrap()], 0);
    let stats = json_of(&data_dir, &["stats"], 0);
    assert_eq!(
        made,
        json!({
            "backup": backup, "commit": stats["commit"], "height": stats["height"], "sequence": stats["sequence"],
            "log_id": stats["log_id"], "schema": stats["schema"], "fits_guard": true
        })
    );
    let again = failure(&data_dir, &["backup", "--to", backup.to_str().unwrap()]);
    assert_eq!(again["kind"], json!("exists"));

    // It votes on something that two members cannot settle, and forgets it.
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    net.stop(1);
    net.stop(2);
    let voted = net.pay(&coins[1], &to, 2);
    let mut wallet = net.wallet(3).await;
    wallet.broadcast(&voted).await;
    wallet.status_of(voted.txid(), &[TransactionStatusKind::Pending]).await;
    net.stop(3);
    assert_eq!(own_votes(&net, 3, voted.txid()), ["Approve".to_owned()].into());
    let restored = json_of(&data_dir, &["restore", "--from", backup.to_str().unwrap()], 0);
    assert_eq!((&restored["commit"], &restored["previous_log_id"]), (&stats["commit"], &stats["log_id"]));
    assert_ne!(restored["log_id"], stats["log_id"]);
    assert_eq!(restored["set_aside"], json!(data_dir.join("set-aside-1")));
    assert!(restored["fenced"].as_u64().unwrap() >= 5, "three genesis coins and two outputs: {restored}");
    let now = json_of(&data_dir, &["stats"], 0);
    assert_eq!(now["fence"], json!({ "standing": false, "fenced": restored["fenced"], "agrees_from": null }));
    assert_eq!((&now["log_id"], &now["guard"]["fits"]), (&restored["log_id"], &json!("equal")));
    assert_eq!(own_votes(&net, 3, voted.txid()), BTreeSet::new(), "the vote is lost");
    let kept = rows(&data_dir.join("set-aside-1"), &["dump", "--tree", "votes"]);
    assert!(kept[0].to_string().contains(&voted.txid().to_string()), "but kept: {kept:?}");

    net.start(1);
    net.start(2);
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    until_fence_stands(&net, 3);
    let mut wallet = net.wallet(3).await;
    wallet.until_final(voted.txid()).await;
    let resumed = subscribe(&mut wallet, &to, Some(&seen)).await;
    assert!(resumed.reset, "its log is another one");
    assert_eq!(resumed.log_id, now["log_id"].as_str().unwrap());
    assert_eq!(resumed.utxos.len(), 2);

    // On what came into being meanwhile it votes, on an old coin it does not.
    let new = net.pay(&coins[2], &to, 3);
    wallet.pay(&new).await;
    net.kill(2);
    let change = TestNet::outputs(&new, &coins[2].key).remove(1);
    let mut wallet = net.wallet(0).await;
    wallet.pay(&net.pay(&change, &to, 4)).await;
    let fenced = net.pay(&coins[3], &to, 5);
    wallet.broadcast(&fenced).await;
    let in_flight = || (net.status(3)["in_flight"].as_u64()? > 0).then_some(());
    until("the fenced member has heard of it", in_flight);
    net.stop(3);
    assert_eq!(own_votes(&net, 3, fenced.txid()), BTreeSet::new(), "no vote of any kind");
}

/// What cannot be restored is refused, and what is there stays as it is.
#[tokio::test]
async fn a_bad_restore_changes_nothing() {
    let mut net = TestNet::running(1);
    net.stop(0);
    let data_dir = net.data_dir(0);
    let backup = net.directory().join("backup");
    json_of(&data_dir, &["backup", "--to", backup.to_str().unwrap()], 0);
    let before = rows(&data_dir, &["dump"]);
    let names = || std::fs::read_dir(&data_dir).unwrap().map(|e| e.unwrap().file_name()).collect::<BTreeSet<_>>();
    let files = names();
    let restore = |from: &Path, more: &[&str]| {
        failure(&data_dir, &[&["restore", "--from", from.to_str().unwrap()], more].concat())
    };
    assert_eq!(restore(Path::new("/no/such/backup"), &[])["kind"], json!("missing"));
    assert!(restore(&data_dir, &[])["error"].as_str().unwrap().contains("from itself"));
    let other = TestNet::new(1);
    let genesis = other.directory().join(&other.devnet.genesis_file);
    assert_eq!(restore(&backup, &["--genesis", genesis.to_str().unwrap()])["kind"], json!("other_network"));
    let damaged = net.directory().join("damaged");
    copy(&backup, &damaged);
    std::fs::write(damaged.join("db").join("conf"), [0xa5; 62]).unwrap();
    assert_eq!(restore(&damaged, &[])["kind"], json!("damaged"));
    let older = net.directory().join("older");
    copy(&backup, &older);
    let db = sled::Config::new().path(older.join("db")).open().unwrap();
    db.open_tree("meta").unwrap().insert("schema", &2_u32.to_le_bytes()).unwrap();
    db.flush().unwrap();
    drop(db);
    assert_eq!(restore(&older, &[])["kind"], json!("older_schema"));
    net.start(0);
    until("it runs", || net.http(0, "/livez"));
    assert_eq!(restore(&backup, &[])["kind"], json!("in_use"));
    net.stop(0);
    assert_eq!(names(), files);
    let rest = |rows: Vec<Value>| rows.into_iter().filter(|row| row["key"] != "head").collect::<Vec<_>>();
    assert_eq!(rest(rows(&data_dir, &["dump"])), rest(before));

    // With the genesis, one of an older schema is migrated on its way.
    let genesis = net.directory().join(&net.devnet.genesis_file);
    let args = ["restore", "--from", older.to_str().unwrap(), "--genesis", genesis.to_str().unwrap()];
    json_of(&data_dir, &args, 0);
    let stats = json_of(&data_dir, &["stats"], 0);
    assert_eq!(stats["schema"], stats["newest_schema"]);
    // Into an empty directory nothing has to be set aside.
    let fresh = net.directory().join("fresh").join("data");
    let restored = json_of(&fresh, &["restore", "--from", backup.to_str().unwrap()], 0);
    assert_eq!(restored["set_aside"], Value::Null);
    assert_eq!(json_of(&fresh, &["stats"], 0)["commit"].as_u64(), restored["commit"].as_u64().map(|n| n + 2));
}

/// Kills a command after some time; whether it had ended before.
fn kill_after(data_dir: &Path, args: &[&str], time: Duration) -> bool {
    let mut child = Command::new(env!("CARGO_BIN_EXE_time-db"))
        .arg("--data-dir")
        .arg(data_dir)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while began.elapsed() < time {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{args:?}: {status}");
            return true;
        }
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    false
}

/// `kill -9` at ever later moments, until the command comes to its end. Whatever is there
/// then is the old database or the new one, whole, and the command can be given again.
fn killed_at_every_moment(data_dir: &Path, work: &Path, args: &[&str]) {
    let old = json_of(data_dir, &["stats"], 0);
    let (mut olds, mut news) = (0, 0);
    for step in 0.. {
        if work.exists() {
            std::fs::remove_dir_all(work).unwrap();
        }
        copy(data_dir, work);
        let ended = kill_after(work, args, Duration::from_millis(3 * step));
        let found = json_of(work, &["stats"], 0);
        if found["log_id"] == old["log_id"] {
            assert_eq!((&found["commit"], &found["fence"]), (&old["commit"], &Value::Null));
            olds += 1;
        } else {
            assert_eq!(found["fence"]["standing"], json!(false), "{found}");
            let kept = json_of(&work.join("set-aside-1"), &["stats"], 0);
            assert_eq!(kept["log_id"], old["log_id"]);
            news += 1;
        }
        assert!(time_db(work, args).status.success(), "it can be given again");
        assert_eq!(json_of(work, &["stats"], 0)["fence"]["standing"], json!(false));
        if ended {
            break;
        }
    }
    assert!(olds > 0 && news > 0, "{olds} were old, {news} new");
}

#[tokio::test]
async fn a_killed_restore_leaves_the_old_or_the_new() {
    let mut net = TestNet::running(1);
    let (coins, to) = (net.coins(), net.address(&SecretKey::generate()));
    let mut wallet = net.wallet(0).await;
    wallet.pay(&net.pay(&coins[0], &to, 1)).await;
    net.stop(0);
    let backup = net.directory().join("backup");
    json_of(&net.data_dir(0), &["backup", "--to", backup.to_str().unwrap()], 0);
    let work = net.directory().join("work");
    killed_at_every_moment(&net.data_dir(0), &work, &["restore", "--from", backup.to_str().unwrap()]);
    // A backup that is cut off is none.
    let made = net.directory().join("made");
    for step in 0.. {
        let ended =
            kill_after(&net.data_dir(0), &["backup", "--to", made.to_str().unwrap()], Duration::from_millis(step));
        assert!(ended || !made.exists() || json_of(&made, &["stats"], 0)["guard"]["fits"] == "equal");
        if ended {
            break;
        }
        if made.exists() {
            std::fs::remove_dir_all(&made).unwrap();
        }
    }
    assert_eq!(rows(&made, &["dump"]), rows(&net.data_dir(0), &["dump"]));
}
