//! `time-db` where it changes something: backups, restoring, export and import, migration.
//! Whatever is put in place goes behind the fence, and a crash leaves the old or the new.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;
#[path = "support/tool.rs"]
mod tool;

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Coin, TestNet, Wallet, in_sled, until, within};
use time_masternode::db::{Database, Owner};
use time_masternode::net::{NetworkMessage, TransactionStatusKind, UTXOSubscribe, UTXOSubscribed};
use time_masternode::types::{Address, Output, SecretKey, Txid};
use tool::{copy, failure, json_of, rows, set_back_to_schema_2, time_db, until_confirmed};

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
    sound(&net, &data_dir);
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
    let mut other = TestNet::running(1);
    other.stop(0);
    assert_eq!(restore(&other.data_dir(0), &[])["kind"], json!("other_network"), "nobody has to name the genesis");
    let genesis = other.directory().join(&other.devnet.genesis_file);
    assert_eq!(restore(&backup, &["--genesis", genesis.to_str().unwrap()])["kind"], json!("other_network"));
    let damaged = net.directory().join("damaged");
    copy(&backup, &damaged);
    std::fs::write(damaged.join("db").join("conf"), [0xa5; 62]).unwrap();
    assert_eq!(restore(&damaged, &[])["kind"], json!("damaged"));
    // Votes that cannot be read are not passed over in silence.
    let torn = net.directory().join("torn");
    copy(&backup, &torn);
    in_sled(&torn, |db| {
        db.open_tree("votes").unwrap().insert([0, 0, 0, 0, 0, 0, 0, 1, 0, 0], b"?").unwrap();
    });
    assert_eq!(restore(&torn, &[])["kind"], json!("corrupt"));
    let older = net.directory().join("older");
    copy(&backup, &older);
    set_back_to_schema_2(&older);
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
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while began.elapsed() < time {
        if let Some(status) = child.try_wait().unwrap() {
            let mut text = String::new();
            child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
            assert!(status.success(), "{args:?}: {status}: {text}");
            return true;
        }
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    false
}

/// A fortieth of the time that a command takes which is not cut off.
fn a_step(data_dir: &Path, args: &[&str]) -> Duration {
    let began = Instant::now();
    assert!(time_db(data_dir, args).status.success(), "{args:?}");
    began.elapsed() / 40
}

/// A copy of `data_dir` in `work`, in the place of what was there.
fn copy_anew(data_dir: &Path, work: &Path) {
    if work.exists() {
        std::fs::remove_dir_all(work).unwrap();
    }
    copy(data_dir, work);
}

/// `kill -9` at ever later moments, until the command comes to its end. Whatever is there
/// then is the old database or the new one, whole, and the command can be given again.
fn killed_at_every_moment(data_dir: &Path, work: &Path, args: &[&str]) {
    let old = json_of(data_dir, &["stats"], 0);
    copy_anew(data_dir, work);
    let a_step = a_step(work, args);
    let (mut olds, mut news) = (0, 0);
    for step in 0.. {
        copy_anew(data_dir, work);
        let ended = kill_after(work, args, a_step * step);
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
    let (whole, made) = (net.directory().join("whole"), net.directory().join("made"));
    let a_step = a_step(&net.data_dir(0), &["backup", "--to", whole.to_str().unwrap()]);
    for step in 0.. {
        let ended = kill_after(&net.data_dir(0), &["backup", "--to", made.to_str().unwrap()], a_step * step);
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

/// A compact copy is the same database: the same rows, the same guard, no fence, and wallets
/// go on in the same log. `kill -9` at ever later moments leaves the old one or the new one.
#[tokio::test]
async fn a_compact_copy_is_the_same_database() {
    let mut net = TestNet::running(4);
    let (coins, to) = (net.coins(), net.address(&SecretKey::generate()));
    let mut wallet = net.wallet(3).await;
    let seen = subscribe(&mut wallet, &to, None).await;
    for coin in &coins[..2] {
        let payment = net.pay(coin, &to, 1);
        wallet.pay(&payment).await;
        until_confirmed(&mut wallet, payment.txid()).await;
    }
    let data_dir = net.data_dir(3);
    assert_eq!(failure(&data_dir, &["compact"])["kind"], json!("in_use"));
    net.stop(3);
    let (rows_before, before) = (rows(&data_dir, &["dump"]), json_of(&data_dir, &["stats"], 0));
    let same = |dir: &Path, what: &str| {
        assert_eq!(rows(dir, &["dump"]), rows_before, "{what}");
        assert_eq!(json_of(dir, &["stats"], 0)["guard"], before["guard"], "{what}");
    };
    let work = net.directory().join("work");
    copy_anew(&data_dir, &work);
    let a_step = a_step(&work, &["compact"]);
    let (mut olds, mut news) = (0, 0);
    for step in 0.. {
        copy_anew(&data_dir, &work);
        let ended = kill_after(&work, &["compact"], a_step * step);
        same(&work, "cut off");
        *(if work.join("set-aside-1").join("db").exists() { &mut news } else { &mut olds }) += 1;
        assert!(time_db(&work, &["compact"]).status.success(), "it can be given again");
        same(&work, "given again");
        if ended {
            break;
        }
    }
    assert!(olds > 0 && news > 0, "{olds} were old, {news} new");

    let compacted = json_of(&data_dir, &["compact"], 0);
    assert_eq!(compacted["set_aside"], json!(data_dir.join("set-aside-1")));
    assert!(compacted["bytes_after"].as_u64() <= compacted["bytes_before"].as_u64(), "{compacted}");
    same(&data_dir, "the new one");
    same(&data_dir.join("set-aside-1"), "what was there before");
    sound(&net, &data_dir);
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    let status = net.status(3);
    assert_eq!((&status["voting"], &status["fence"]), (&json!("Active"), &Value::Null), "{status}");
    // Without it there is no quorum.
    net.kill(2);
    let mut wallet = net.wallet(3).await;
    wallet.pay(&net.pay(&coins[2], &to, 1)).await;
    assert!(!subscribe(&mut wallet, &to, Some(&seen)).await.reset, "its log is the same");

    // One that may have lost votes needs a repair, and stays as it is.
    net.stop(3);
    std::fs::remove_file(data_dir.join("guard")).unwrap();
    let refused = failure(&data_dir, &["compact"]);
    assert!(refused["error"].as_str().unwrap().contains("does not fit its guard"), "{refused}");
    assert!(!data_dir.join("unfinished").exists() && !data_dir.join("set-aside-2").exists());
}

/// A network with payments in blocks, a block's fees that were spent, something final in no
/// block, and something in flight. All nodes are stopped; the first two know the most.
async fn used_network(retention: &str) -> (TestNet, Address) {
    let mut net = TestNet::with_interval(4, 200);
    net.set_environment("TIME_RETENTION_BLOCKS", retention);
    net.start_all();
    let to = net.address(&SecretKey::generate());
    let coins = net.coins();
    let mut wallet = net.wallet(0).await;
    let mut coin = coins[0].clone();
    for _ in 0..6 {
        let payment = net.pay(&coin, &to, 1);
        wallet.pay(&payment).await;
        until_confirmed(&mut wallet, payment.txid()).await;
        coin = TestNet::outputs(&payment, &coin.key).remove(1);
    }
    let proposer = net.member_key(0);
    let fees = within("a block of the first member", async {
        loop {
            let entries = wallet.coins_of(&net.address(&proposer)).await.utxos;
            if entries.len() >= 2 {
                return entries;
            }
            let payment = net.pay(&coin, &to, 1);
            wallet.pay(&payment).await;
            until_confirmed(&mut wallet, payment.txid()).await;
            coin = TestNet::outputs(&payment, &coin.key).remove(1);
        }
    })
    .await;
    let fee = |i: usize| Coin { outpoint: fees[i].outpoint, amount: fees[i].output.amount, key: proposer.clone() };
    let least = net.genesis.min_fee();
    let rest = fees[0].output.amount.checked_add(fees[1].output.amount).and_then(|sum| sum.checked_sub(least));
    let spent = net.sign(&[fee(0), fee(1)], vec![Output { amount: rest.unwrap(), address: to }], 0);
    wallet.pay(&spent).await;
    until_confirmed(&mut wallet, spent.txid()).await;
    subscribe(&mut wallet, &to, None).await;
    // Three members settle it, and then there are two, who make no block.
    net.kill(3);
    let mut coin = coins[1].clone();
    let change = loop {
        let last = net.pay(&coin, &to, 2);
        wallet.pay(&last).await;
        net.kill(2);
        coin = TestNet::outputs(&last, &coin.key).remove(1);
        if wallet.query(last.txid()).await.status == TransactionStatusKind::Finalized {
            break coin;
        }
        // A block was faster.
        net.start(2);
        net.wait_ready(&[0, 1, 2]);
    };
    for stuck in [net.pay(&change, &to, 3), net.pay(&coins[2], &to, 4)] {
        wallet.broadcast(&stuck).await;
        wallet.status_of(stuck.txid(), &[TransactionStatusKind::Pending]).await;
    }
    net.stop(0);
    net.stop(1);
    (net, to)
}

/// More is in flight than one record of an import holds.
#[tokio::test]
async fn all_that_is_in_flight_is_imported() {
    let mut net = TestNet::running(4);
    let coins = net.coins();
    let to = net.address(&SecretKey::generate());
    let split = net.split(&coins[0], 200);
    let mut wallet = net.wallet(0).await;
    wallet.pay(&split).await;
    until_confirmed(&mut wallet, split.txid()).await;
    net.kill(3);
    net.kill(2);
    let stuck: Vec<_> = TestNet::outputs(&split, &coins[0].key)
        .iter()
        .map(|coin| {
            net.sign(
                std::slice::from_ref(coin),
                vec![Output { amount: coin.amount.checked_sub(net.genesis.min_fee()).unwrap(), address: to }],
                0,
            )
        })
        .collect();
    for payment in &stuck {
        wallet.broadcast(payment).await;
    }
    until("all are in flight", || (net.status(0)["in_flight"] == 200).then_some(()));
    net.stop(0);
    let (old, new) = (net.data_dir(0), net.directory().join("imported"));
    let file = net.directory().join("ledger.export");
    exported(&old, &file);
    let imported = json_of(&new, &["import", file.to_str().unwrap(), "--genesis", &genesis_file(&net)], 0);
    sound(&net, &new);
    let locks = rows(&new, &["locks"]);
    assert_eq!(locks, rows(&old, &["locks"]));
    assert!(locks.len() == 200 && locks.iter().all(|lock| lock["votes"] == json!(["Approve"])));
    let votes = rows(&new, &["dump", "--tree", "votes"]);
    let commits: Vec<u64> = votes.iter().map(|row| row["key"].as_str().unwrap().parse().unwrap()).collect();
    let first = imported["commit"].as_u64().unwrap() + 1;
    assert_eq!(commits, [first, first + 1], "two records, each of a commit of its own");
}

/// Exports a stopped node's database; gives the lines.
fn exported(data_dir: &Path, file: &Path) -> Vec<Value> {
    let made = json_of(data_dir, &["export", file.to_str().unwrap()], 0);
    let text = std::fs::read_to_string(file).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(made["records"].as_u64().unwrap(), lines.len() as u64 - 2);
    assert_eq!(made["bytes"].as_u64().unwrap(), text.len() as u64);
    assert_eq!(made["blake3"], lines.last().unwrap()["End"]["blake3"]);
    lines
}

fn genesis_file(net: &TestNet) -> String {
    net.directory().join(&net.devnet.genesis_file).to_str().unwrap().to_owned()
}

/// Every invariant holds.
fn sound(net: &TestNet, data_dir: &Path) {
    json_of(data_dir, &["verify", "--full", "--genesis", &genesis_file(net)], 0);
}

fn kind(line: &Value) -> &str {
    line.as_object().unwrap().keys().next().unwrap()
}

/// What an import makes holds all that was exported, whatever was pruned; only the change
/// log begins anew, and the fence is up.
#[tokio::test]
async fn an_import_holds_what_was_exported() {
    for retention in ["0", "2"] {
        let (net, to) = used_network(retention).await;
        let (old, new) = (net.data_dir(0), net.directory().join("imported"));
        let file = net.directory().join("ledger.export");
        let lines = exported(&old, &file);
        let kinds: BTreeSet<&str> = lines[1..].iter().map(kind).collect();
        assert_eq!(kinds, ["Block", "End", "InFlight", "Output", "Settled", "Subscription"].into());
        let before = json_of(&old, &["stats"], 0);
        assert_eq!(before["pruned"]["height"] != json!(0), retention == "2", "{before}");
        let imported = json_of(&new, &["import", file.to_str().unwrap(), "--genesis", &genesis_file(&net)], 0);
        assert_eq!((&imported["commit"], &imported["height"]), (&before["commit"], &before["height"]));
        assert_eq!((&imported["previous_log_id"], &imported["set_aside"]), (&before["log_id"], &Value::Null));
        assert_ne!(imported["log_id"], before["log_id"]);

        let trees = [
            "utxos",
            "addresses",
            "locks",
            "certificates",
            "transactions",
            "subscriptions",
            "blocks",
            "confirmed",
            "dead",
        ];
        for tree in trees {
            // What is in flight stands under the commits that it came with; an import is one.
            let dump = |dir: &Path| -> BTreeSet<String> {
                rows(dir, &["dump", "--tree", tree]).iter().map(ToString::to_string).collect()
            };
            assert_eq!(dump(&new), dump(&old), "{tree}");
        }
        let votes = |dir: &Path| -> BTreeSet<String> {
            let rows = rows(dir, &["dump", "--tree", "votes"]);
            rows.iter().flat_map(|row| row["value"].as_array().unwrap().iter().map(ToString::to_string)).collect()
        };
        let in_flight: BTreeSet<String> =
            net.dump(0, "locks").iter().map(|row| row["key"].as_str().unwrap().into()).collect();
        let needed = |vote: &String| in_flight.iter().any(|txid| vote.contains(txid.as_str()));
        assert_eq!(votes(&new), votes(&old).into_iter().filter(needed).collect());
        sound(&net, &new);
        let after = json_of(&new, &["stats"], 0);
        for same in ["supply", "state_digest", "block_hash", "outputs", "public_key", "genesis_hash"] {
            assert_eq!(after[same], before[same], "{same}");
        }
        let live = |row: &&Value| row["value"]["state"].get("Confirmed").is_none();
        let outputs = rows(&new, &["dump", "--tree", "utxos"]).iter().filter(live).count();
        assert!(after["fence"]["fenced"].as_u64().unwrap() >= outputs as u64 + 4, "and those of what is in flight");
        // The log goes on after a gap, and tells what is final and in no block.
        let log = rows(&new, &["changes"]);
        let first = before["sequence"].as_u64().unwrap() + 2;
        let numbers: Vec<u64> = log.iter().map(|entry| entry["sequence"].as_u64().unwrap()).collect();
        assert_eq!(numbers, (first..first + log.len() as u64).collect::<Vec<_>>());
        let unconfirmed =
            lines.iter().filter(|line| line["Settled"].is_object() && line["Settled"]["height"].is_null());
        let unconfirmed: Vec<&Value> = unconfirmed.map(|line| &line["Settled"]["transaction"]["txid"]).collect();
        let told = log.iter().map(|entry| &entry["change"]["Transition"]["new_state"]["SpentFinalized"]["txid"]);
        assert_eq!(told.filter(|txid| !txid.is_null()).collect::<Vec<_>>(), unconfirmed);
        // Exported again, it is the same ledger.
        let again = exported(&new, &net.directory().join("again.export"));
        let same = |line: &&Value| !["Fenced", "End", "format"].contains(&kind(line));
        assert!(again[1..].iter().filter(same).eq(lines[1..].iter().filter(same)));
        let coins = rows(&new, &["dump", "--tree", "utxos", "--address", &to.to_string(), "--state", "Unspent"]);
        assert!(coins.len() >= 7, "{coins:?}");
    }
}

/// A member's database is replaced by an export that is older than what it has said. It
/// stands behind the fence, catches up, serves the same coins, and its wallets begin anew.
#[tokio::test]
async fn a_node_goes_on_with_what_was_imported() {
    let mut net = TestNet::running(4);
    let (coins, to) = (net.coins(), net.address(&SecretKey::generate()));
    let mut wallet = net.wallet(3).await;
    let first = net.pay(&coins[0], &to, 1);
    wallet.pay(&first).await;
    until_confirmed(&mut wallet, first.txid()).await;
    net.stop(3);
    let (data_dir, file) = (net.data_dir(3), net.directory().join("ledger.export"));
    exported(&data_dir, &file);
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    let mut wallet = net.wallet(3).await;
    let second = net.pay(&coins[1], &to, 2);
    wallet.pay(&second).await;
    until_confirmed(&mut wallet, second.txid()).await;
    let seen = subscribe(&mut wallet, &to, None).await;
    assert_eq!(seen.utxos.len(), 2);
    net.stop(3);
    let imported = json_of(&data_dir, &["import", file.to_str().unwrap(), "--genesis", &genesis_file(&net)], 0);
    assert_eq!(imported["set_aside"], json!(data_dir.join("set-aside-1")));
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    until_fence_stands(&net, 3);
    let mut wallet = net.wallet(3).await;
    until_confirmed(&mut wallet, second.txid()).await;
    let resumed = subscribe(&mut wallet, &to, Some(&seen)).await;
    assert!(resumed.reset && resumed.log_id != seen.log_id);
    assert_eq!(resumed.utxos, seen.utxos);
    let ours = wallet.coins_of(&to).await;
    let theirs = net.wallet(0).await.coins_of(&to).await;
    assert_eq!((ours.utxos, ours.total), (theirs.utxos, theirs.total));
    // It votes on what came into being meanwhile: without it there is no quorum.
    let third = net.pay(&coins[2], &to, 3);
    wallet.pay(&third).await;
    net.kill(2);
    let change = TestNet::outputs(&third, &coins[2].key).remove(1);
    wallet.pay(&net.pay(&change, &to, 4)).await;
    net.stop(3);
    assert_eq!(json_of(&data_dir, &["stats"], 0)["supply"]["conserved"], json!(true));
}

/// An observer has no votes to lose: its log is another one, and there is no fence.
#[test]
fn an_observers_ledger_is_imported_without_a_fence() {
    let net = TestNet::new(1);
    let (old, new) = (net.directory().join("observer"), net.directory().join("imported"));
    let owner = Owner { genesis: &net.genesis, public_key: None, first_start: false };
    drop(Database::open(&old, owner, 1 << 20).unwrap());
    let file = net.directory().join("ledger.export");
    exported(&old, &file);
    let imported = json_of(&new, &["import", file.to_str().unwrap(), "--genesis", &genesis_file(&net)], 0);
    assert_eq!((&imported["fenced"], &imported["public_key"]), (&Value::Null, &Value::Null));
    sound(&net, &new);
    let stats = json_of(&new, &["stats"], 0);
    assert_eq!((&stats["fence"], &stats["supply"]["conserved"]), (&Value::Null, &json!(true)));
    let backup = net.directory().join("backup");
    json_of(&new, &["backup", "--to", backup.to_str().unwrap()], 0);
    let restored = json_of(&new, &["restore", "--from", backup.to_str().unwrap()], 0);
    assert_eq!(restored["fenced"], Value::Null);
    assert_ne!(restored["log_id"], restored["previous_log_id"]);
    drop(Database::open(&new, owner, 1 << 20).unwrap());

    // The same through a pipe.
    let pipe = format!(
        "{0} --data-dir {1} export - | {0} --data-dir {2} import - --genesis {3}",
        env!("CARGO_BIN_EXE_time-db"),
        old.display(),
        net.directory().join("piped").display(),
        genesis_file(&net)
    );
    assert!(Command::new("bash").args(["-o", "pipefail", "-c", &pipe]).status().unwrap().success());
    let dump = |dir: &Path| rows(dir, &["dump", "--tree", "utxos"]);
    assert_eq!(dump(&net.directory().join("piped")), dump(&old));
}

/// The file of these lines, its last line made anew.
fn sealed(lines: &[Value]) -> String {
    let mut text: String = lines[..lines.len() - 1].iter().map(|line| format!("{line}\n")).collect();
    let checksum = blake3::hash(text.as_bytes()).to_hex().to_string();
    let records = lines.len() - 2;
    text.push_str(&json!({ "End": { "records": records, "blake3": checksum } }).to_string());
    text.push('\n');
    text
}

fn place(lines: &[Value], wanted: impl Fn(&Value) -> bool) -> usize {
    lines.iter().position(wanted).unwrap()
}

fn output_in(lines: &[Value], state: &str) -> usize {
    place(lines, |line| {
        let found = &line["Output"]["state"];
        found == state || found.get(state).is_some()
    })
}

fn unconfirmed(lines: &[Value]) -> usize {
    place(lines, |line| line["Settled"].is_object() && line["Settled"]["height"].is_null())
}

fn first(lines: &[Value], name: &str) -> usize {
    place(lines, |line| line.get(name).is_some())
}

/// Turns a hex digit into another one.
fn flip(text: &mut Value) {
    let digit = if text.as_str().unwrap().starts_with('0') { "1" } else { "0" };
    *text = json!(format!("{digit}{}", &text.as_str().unwrap()[1..]));
}

type Doctored = fn(&mut Vec<Value>);

/// What somebody may do to an export who can make its checksum anew, and what is said.
const DOCTORED: [(&str, &str, Doctored); 35] = [
    ("a coin is left out", "digest|final and in no block are missing", |lines| {
        lines.remove(output_in(lines, "Unspent"));
    }),
    ("a coin has grown", "nothing here made", |lines| {
        let at = output_in(lines, "Unspent");
        let amount = lines[at]["Output"]["output"]["amount"].as_u64().unwrap();
        lines[at]["Output"]["output"]["amount"] = json!(amount + 1);
    }),
    ("a coin is added", "nothing here made", |lines| {
        let at = output_in(lines, "Unspent");
        let mut added = lines[at].clone();
        added["Output"]["outpoint"]["txid"] = json!("00".repeat(32));
        lines.insert(first(lines, "Output"), added);
    }),
    ("a spent coin is added as spent", "does not spend it", |lines| {
        let mut added = lines[output_in(lines, "Confirmed")].clone();
        added["Output"]["outpoint"] = json!({ "txid": "00".repeat(32), "vout": 0 });
        lines.insert(first(lines, "Output"), added);
    }),
    ("a spent coin comes back", "digest|nothing here made", |lines| {
        let at = output_in(lines, "Confirmed");
        lines[at]["Output"]["state"] = json!("Unspent");
    }),
    ("a coin that is finally spent comes back", "spent by what is final", |lines| {
        let at = output_in(lines, "SpentFinalized");
        lines[at]["Output"]["state"] = json!("Unspent");
    }),
    ("a lock is gone", "locked for what is in flight", |lines| {
        let at = output_in(lines, "Locked");
        lines[at]["Output"]["state"] = json!("Unspent");
    }),
    ("a lock of another time", "what it is locked for", |lines| {
        let at = output_in(lines, "Locked");
        lines[at]["Output"]["state"]["Locked"]["locked_at"] = json!(1);
    }),
    ("a locked coin is left out", "digest|final and in no block are missing", |lines| {
        lines.remove(output_in(lines, "Locked"));
    }),
    ("a lock of nobody", "what it is locked for", |lines| {
        let at = output_in(lines, "Unspent");
        lines[at]["Output"]["state"] = json!({ "Locked": { "txid": "00".repeat(32), "locked_at": 1 } });
    }),
    ("spent by another", "what has spent it", |lines| {
        let at = output_in(lines, "SpentFinalized");
        lines[at]["Output"]["state"]["SpentFinalized"]["txid"] = json!("00".repeat(32));
    }),
    ("spent in another block", "what has spent it", |lines| {
        let at = output_in(lines, "Confirmed");
        lines[at]["Output"]["state"]["Confirmed"]["block_height"] = json!(1_000);
    }),
    ("two coins change places", "not in order", |lines| {
        let at = first(lines, "Output");
        lines.swap(at, at + 1);
    }),
    ("a coin twice", "not in order", |lines| {
        let at = first(lines, "Output");
        lines.insert(at, lines[at].clone());
    }),
    ("an output of what is final is left out", "final and in no block are missing", |lines| {
        let txid = lines[unconfirmed(lines)]["Settled"]["transaction"]["txid"].clone();
        lines.remove(place(lines, |line| {
            line["Output"]["outpoint"]["txid"] == txid && line["Output"]["state"] == "Unspent"
        }));
    }),
    ("a transaction of a block is left out", "of the block before is missing", |lines| {
        lines.remove(first(lines, "Settled"));
    }),
    ("a block is left out", "does not belong here", |lines| {
        lines.remove(place(lines, |line| line["Block"]["block"]["height"] == 2));
    }),
    ("the last block is left out with all that is in it", "not the one that the header names", |lines| {
        let height = lines[0]["height"].clone();
        lines.retain(|line| line["Block"]["block"]["height"] != height && line["Settled"]["height"] != height);
    }),
    ("the last block is left out, in the header too", "nothing here made|does not spend it", |lines| {
        let height = lines[0]["height"].clone();
        lines.retain(|line| line["Block"]["block"]["height"] != height && line["Settled"]["height"] != height);
        let last = lines.iter().rev().find(|line| line.get("Block").is_some()).unwrap()["Block"].clone();
        lines[0]["height"] = last["block"]["height"].clone();
        lines[0]["block_hash"] = last["certificate"]["block_hash"].clone();
    }),
    ("a block has another time", "the certificate is for another block", |lines| {
        let at = first(lines, "Block");
        lines[at]["Block"]["block"]["timestamp_ms"] = json!(1);
    }),
    ("a block's vote is forged", "a signature does not verify", |lines| {
        let at = first(lines, "Block");
        flip(&mut lines[at]["Block"]["certificate"]["votes"][0]["signature"]);
    }),
    ("a block has too few votes", "short of the quorum", |lines| {
        let at = first(lines, "Block");
        lines[at]["Block"]["certificate"]["votes"].as_array_mut().unwrap().truncate(2);
    }),
    ("an owner's signature is forged", "a signature does not verify", |lines| {
        let at = first(lines, "Settled");
        flip(&mut lines[at]["Settled"]["transaction"]["inputs"][0]["signature"]);
    }),
    ("a payment pays another amount", "its txid is", |lines| {
        let at = first(lines, "Settled");
        lines[at]["Settled"]["transaction"]["outputs"][0]["amount"] = json!(2);
    }),
    ("another key signs", "does not own", |lines| {
        let at = first(lines, "Settled");
        lines[at]["Settled"]["transaction"]["inputs"][0]["public_key"] =
            lines[first(lines, "Block")]["Block"]["block"]["proposer"].clone();
    }),
    ("a fee is another one", "fee is not", |lines| {
        let at = first(lines, "Settled");
        lines[at]["Settled"]["settled"]["fee"] = json!(1);
    }),
    ("what is final has no proof", "neither a block nor a finality proof", |lines| {
        let at = unconfirmed(lines);
        lines[at]["Settled"]["certificate"] = Value::Null;
    }),
    ("a finality proof is forged", "a signature does not verify", |lines| {
        let at = unconfirmed(lines);
        flip(&mut lines[at]["Settled"]["certificate"]["votes"][0]["signature"]);
    }),
    ("what is final comes twice", "was here before", |lines| {
        let at = unconfirmed(lines);
        lines.insert(at, lines[at].clone());
    }),
    ("it was committed to without a certificate", "without its certificate", |lines| {
        let at = first(lines, "InFlight");
        lines[at]["InFlight"]["votes"] = json!(["Approve", "Commit"]);
    }),
    ("something in flight comes twice", "was here before", |lines| {
        let at = first(lines, "InFlight");
        lines.insert(at, lines[at].clone());
    }),
    ("a death in no block", "no such block", |lines| {
        let dead = json!({ "Dead": { "txid": "00".repeat(32), "by": null, "height": 1_000 } });
        lines.insert(first(lines, "Output"), dead);
    }),
    ("records out of order", "does not belong here", |lines| {
        let moved = lines.remove(first(lines, "Subscription"));
        lines.insert(first(lines, "Output"), moved);
    }),
    ("a subscription of no wallet", "no wallet can make", |lines| {
        let at = first(lines, "Subscription");
        lines[at]["Subscription"]["token_hash"] = json!("00");
    }),
    ("a stranger's database", "no member of this network", |lines| {
        lines[0]["public_key"] = json!("00".repeat(32));
    }),
];

/// Whatever is wrong with a file, the import says where and what, and changes nothing.
#[tokio::test]
async fn a_bad_export_is_refused_and_changes_nothing() {
    let (net, _) = used_network("0").await;
    let (data_dir, file) = (net.data_dir(0), net.directory().join("ledger.export"));
    let lines = exported(&data_dir, &file);
    let bad = net.directory().join("bad.export");
    let names = || std::fs::read_dir(&data_dir).unwrap().map(|e| e.unwrap().file_name()).collect::<BTreeSet<_>>();
    let (files, before) = (names(), rows(&data_dir, &["dump"]));
    let genesis = genesis_file(&net);
    let refused = |bytes: &[u8]| {
        std::fs::write(&bad, bytes).unwrap();
        let refused = failure(&data_dir, &["import", bad.to_str().unwrap(), "--genesis", &genesis]);
        assert_eq!(names(), files);
        refused["error"].as_str().unwrap().to_owned()
    };
    for (story, said, doctor) in DOCTORED {
        let mut doctored = lines.clone();
        doctor(&mut doctored);
        assert_ne!(doctored, lines, "{story}");
        let error = refused(sealed(&doctored).as_bytes());
        assert!(said.split('|').any(|said| error.contains(said)), "{story}: {error}");
        if story.contains("forged") {
            let changed = lines.iter().zip(&doctored).position(|(a, b)| a != b).unwrap();
            assert!(error.contains(&format!("line {} ", changed + 1)), "{story}: {error}");
        }
    }
    let whole = std::fs::read(&file).unwrap();
    let cut = |length: usize| refused(&whole[..length]);
    for part in 0..12 {
        let error = cut(whole.len() * part / 12);
        assert!(error.contains("not whole") || error.contains("no export"), "{part}: {error}");
    }
    assert!(cut(whole.len() - 1).contains("not whole"));
    let last_line = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
    assert!(cut(last_line).contains("not whole"));
    assert!(
        refused(&[&whole[..], b"more"].concat()).contains("ends here")
            || refused(&[&whole[..], b"\n"].concat()).contains("more after")
    );
    for part in 0..40 {
        let mut flipped = whole.clone();
        let at = whole.len() * part / 40 + 7;
        flipped[at] ^= 0x04;
        refused(&flipped);
    }
    let records =
        |n: u64| sealed(&lines).replace(&format!("\"records\":{}", lines.len() - 2), &format!("\"records\":{n}"));
    assert!(refused(records(1).as_bytes()).contains("there should be 1"));
    assert!(refused(b"{}\n").contains("no export"));
    let mut future = lines.clone();
    future[0]["version"] = json!(2);
    assert!(refused(sealed(&future).as_bytes()).contains("version 2"));

    let other = TestNet::new(4);
    let foreign = failure(&data_dir, &["import", file.to_str().unwrap(), "--genesis", &genesis_file(&other)]);
    assert_eq!(foreign["kind"], json!("other_network"));
    let without = failure(&data_dir, &["import", file.to_str().unwrap()]);
    assert!(without["error"].as_str().unwrap().contains("genesis"), "{without}");
    let taken = failure(&data_dir, &["export", file.to_str().unwrap()]);
    assert_eq!(taken["kind"], json!("exists"));
    assert_eq!(names(), files);
    assert_eq!(rows(&data_dir, &["dump"]), before);
    assert_eq!(std::fs::read(&file).unwrap(), whole);
}

#[tokio::test]
async fn a_killed_import_leaves_the_old_or_the_new() {
    let (net, _) = used_network("0").await;
    let (data_dir, file) = (net.data_dir(0), net.directory().join("ledger.export"));
    exported(&data_dir, &file);
    let genesis = genesis_file(&net);
    let work = net.directory().join("work");
    killed_at_every_moment(&data_dir, &work, &["import", file.to_str().unwrap(), "--genesis", &genesis]);
}

/// An older schema is brought up to date with a copy kept; what is newer is refused.
#[tokio::test]
async fn a_migration_keeps_a_copy_and_says_from_what_to_what() {
    let mut net = TestNet::running(1);
    net.stop(0);
    let (data_dir, genesis) = (net.data_dir(0), genesis_file(&net));
    let newest = json_of(&data_dir, &["stats"], 0)["schema"].clone();
    let set_schema = |schema: u32| {
        in_sled(&data_dir, |db| db.open_tree("meta").unwrap().insert("schema", &schema.to_le_bytes()).unwrap());
    };
    let migrate = ["migrate", "--genesis", &genesis];
    let nothing = json_of(&data_dir, &migrate, 0);
    assert_eq!(nothing, json!({ "from": newest, "to": newest, "copy": null }));
    set_back_to_schema_2(&data_dir);
    assert_eq!(json_of(&data_dir, &["stats"], 0)["schema"], json!(2), "looking does not migrate");
    assert!(failure(&data_dir, &["migrate"])["error"].as_str().unwrap().contains("genesis"));
    let other = TestNet::new(1);
    let foreign = failure(&data_dir, &["migrate", "--genesis", &genesis_file(&other)]);
    assert_eq!(foreign["kind"], json!("other_network"));
    let migrated = json_of(&data_dir, &migrate, 0);
    assert_eq!((&migrated["from"], &migrated["to"]), (&json!(2), &newest));
    let copy = Path::new(migrated["copy"].as_str().unwrap());
    assert_eq!(json_of(copy, &["stats"], 0)["schema"], json!(2));
    assert_eq!(json_of(&data_dir, &["stats"], 0)["schema"], newest);
    set_schema(99);
    assert_eq!(failure(&data_dir, &migrate)["kind"], json!("newer_schema"));
    set_schema(u32::try_from(newest.as_u64().unwrap()).unwrap());
    net.start(0);
    net.wait_ready(&[0]);
}
