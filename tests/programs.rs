//! The programs as an operator meets them: files, exit codes, messages, the operator's
//! port, and what each says when something is wrong.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

use support::{TestNet, until};
use time_masternode::net::TransactionStatusKind;
use time_masternode::types::{SecretKey, UTXOState};

/// Of `open`, on Linux.
const O_NONBLOCK: i32 = 0o4000;

fn masternode(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_time-masternode")).args(args).output().unwrap()
}

fn time_db(data_dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_time-db")).arg("--data-dir").arg(data_dir).args(args).output().unwrap()
}

fn time_wallet(net: &TestNet, node: usize, args: &[&str]) -> Output {
    let genesis = net.directory().join(&net.devnet.genesis_file);
    Command::new(env!("CARGO_BIN_EXE_time-wallet"))
        .args(["--node", &format!("ws://{}", net.devnet.nodes[node].websocket_address), "--genesis"])
        .arg(genesis)
        .args(args)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn init_writes_a_private_key_and_a_config_and_overwrites_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().join("node");
    let path = dir.to_str().unwrap();
    let output = masternode(&["init", "--dir", path]);
    assert!(output.status.success(), "{}", stderr(&output));
    let mode = std::fs::metadata(dir.join("masternode.key")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let key = std::fs::read_to_string(dir.join("masternode.key")).unwrap();
    let seed = serde_json::from_str::<serde_json::Value>(&key).unwrap()["secret_seed"].as_str().unwrap().to_owned();
    assert!(!stdout(&output).contains(&seed), "the seed is never printed");
    let again = masternode(&["init", "--dir", path]);
    assert_eq!(again.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(dir.join("masternode.key")).unwrap(), key);
    // There is no genesis yet, and the program says so.
    let run = masternode(&["run", "--config", dir.join("config.toml").to_str().unwrap()]);
    assert_eq!(run.status.code(), Some(2));
    assert!(stderr(&run).contains("genesis.json"), "{}", stderr(&run));
}

#[test]
fn a_bad_configuration_says_which_key_and_ends_with_2() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.toml");
    for (text, expected) in [
        ("data_dri = \"x\"", "data_dri"),
        ("p2p_listen = \"nowhere\"", "p2p_listen"),
        ("genesis_file = \"genesis.json\"", "data_dir"),
        ("data_dir = \"x\"", "genesis_file"),
        ("not toml", "TOML"),
    ] {
        std::fs::write(&file, text).unwrap();
        let output = masternode(&["run", "--config", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(stderr(&output).contains(expected), "{text}: {}", stderr(&output));
    }
    let output = masternode(&["run", "--config", "/no/such/file.toml"]);
    assert_eq!(output.status.code(), Some(2));
    // A key that is no member's of the genesis.
    let net = TestNet::new(1);
    let stranger = directory.path().join("stranger.key");
    time_masternode::keyfile::create(&stranger, &SecretKey::generate(), None).unwrap();
    let config = net.directory().join(&net.devnet.nodes[0].config_file);
    let output = masternode(&["run", "--config", config.to_str().unwrap(), "--key-file", stranger.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("not a masternode's"), "{}", stderr(&output));
}

#[test]
fn a_devnet_is_continued_and_never_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().join("net");
    let init = || masternode(&["devnet", "--init-only", "--data-dir", dir.to_str().unwrap(), "--nodes", "2"]);
    assert!(init().status.success());
    let before = std::fs::read(dir.join("devnet.json")).unwrap();
    let genesis = std::fs::read(dir.join("genesis.json")).unwrap();
    assert!(init().status.success());
    assert_eq!(std::fs::read(dir.join("devnet.json")).unwrap(), before);
    assert_eq!(std::fs::read(dir.join("genesis.json")).unwrap(), genesis);
    let other = directory.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("precious"), "x").unwrap();
    let output = masternode(&["devnet", "--init-only", "--data-dir", other.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(std::fs::read_dir(&other).unwrap().count(), 1);
}

#[test]
fn the_operators_port_tells_how_the_node_is() {
    let mut net = TestNet::running(4);
    assert_eq!(net.http(0, "/livez").unwrap(), (200, "alive\n".into()));
    assert_eq!(net.http(0, "/readyz").unwrap().0, 200);
    let status = net.status(0);
    assert_eq!(status["id"], "masternode-1");
    assert_eq!(status["voting"], "Active");
    assert_eq!(status["peers"].as_array().unwrap().len(), 3);
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    let (code, metrics) = net.http(0, "/metrics").unwrap();
    assert_eq!(code, 200);
    assert!(metrics.contains("time_connected_members 3"), "{metrics}");
    assert!(metrics.trim_end().ends_with("# EOF"));
    assert_eq!(net.http(0, "/nonsense").unwrap().0, 404);
    net.kill(1);
    net.kill(2);
    // One goes before the other; in between it may wait for what the second has yet to tell.
    until("readiness is lost", || {
        let (code, reasons) = net.http(0, "/readyz")?;
        (code == 503 && reasons.contains("no quorum of peers")).then_some(())
    });
    assert_eq!(net.http(0, "/livez").unwrap().0, 200);
}

/// sled wakes all of its threads for each piece of its log that one of them writes.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn one_thread_of_the_storage_engine_writes_and_the_others_sleep() {
    let net = TestNet::running(1);
    let to = net.address(&SecretKey::generate());
    let mut coin = net.coins().remove(0);
    let mut wallet = net.wallet(0).await;
    // A commit that takes long wakes all of them for a while, and where much else is going on some do
    // not come to be put to sleep; once a second they are asked again.
    let (mut woken, began) = (BTreeMap::new(), Instant::now());
    while began.elapsed() < support::DEADLINE {
        let before = net.waits(0, "sled-io");
        for _ in 0..5 {
            let payment = net.pay(&coin, &to, 1);
            wallet.pay(&payment).await;
            coin = TestNet::outputs(&payment, &coin.key).remove(1);
        }
        woken = net.waits(0, "sled-io");
        assert!(woken.len() >= 7, "{woken:?}");
        woken.retain(|thread, waits| before.get(thread) != Some(waits));
        if woken.len() == 1 {
            return;
        }
    }
    panic!("many wake up: {woken:?}");
}

#[test]
fn time_db_reads_a_stopped_node_in_every_format_and_no_running_one() {
    let mut net = TestNet::running(1);
    let data_dir = net.data_dir(0);
    let running = time_db(&data_dir, &["dump"]);
    assert_eq!(running.status.code(), Some(2));
    assert!(stderr(&running).contains("in use by another process"), "{}", stderr(&running));
    net.stop(0);
    let json: Vec<serde_json::Value> =
        serde_json::from_slice(&time_db(&data_dir, &["dump", "--format", "json"]).stdout).unwrap();
    let ndjson = stdout(&time_db(&data_dir, &["dump", "--format", "ndjson"]));
    let lines: Vec<serde_json::Value> = ndjson.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(json, lines);
    assert!(json.iter().all(|row| row.as_object().unwrap().keys().eq(["key", "tree", "value"])));
    let utxos = net.dump(0, "utxos");
    assert_eq!(utxos.len(), net.devnet.wallets.len());
    let table = stdout(&time_db(&data_dir, &["dump", "--tree", "utxos", "--limit", "2"]));
    assert_eq!(table.lines().count(), 2);
    assert_eq!(time_db(&data_dir, &["dump", "--tree", "nonsense"]).status.code(), Some(2));
    let missing = time_db(Path::new("/no/such/dir"), &["dump"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(stderr(&missing).contains("no database"), "{}", stderr(&missing));
}

/// What sled reads first never comes: the node is not open, and is told to stop.
#[test]
fn a_node_whose_database_never_opens_can_be_stopped() {
    let mut net = TestNet::running(1);
    net.stop(0);
    let configuration = net.data_dir(0).join("db").join("conf");
    std::fs::remove_file(&configuration).unwrap();
    assert!(Command::new("mkfifo").arg(&configuration).status().unwrap().success());
    let log = net.directory().join("never-opens.log");
    let mut node = Command::new(env!("CARGO_BIN_EXE_time-masternode"))
        .args(["run", "--config"])
        .arg(net.data_dir(0).parent().unwrap().join("config.toml"))
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    // It opens for writing once somebody waits to read.
    let _writer = until("the database is being opened", || {
        std::fs::OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(&configuration).ok()
    });
    support::terminate(&node);
    let status = until("it ends", || node.try_wait().unwrap());
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(status.success() && log.contains("while the database was being opened"), "{status}: {log}");
}

#[test]
fn a_database_of_another_network_is_refused() {
    let (mut ours, theirs) = (TestNet::running(1), TestNet::new(1));
    ours.stop(0);
    let config = theirs.directory().join(&theirs.devnet.nodes[0].config_file);
    let data_dir = ours.data_dir(0);
    let output = masternode(&["run", "--config", config.to_str().unwrap(), "--data-dir", data_dir.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("belongs to another network"), "{}", stderr(&output));
}

/// A database that is older than its guard may have lost votes. The node follows the
/// network and does not vote, says why, and does not forget that over a restart.
#[tokio::test]
async fn a_member_whose_database_is_behind_its_guard_follows_and_does_not_vote() {
    let mut net = TestNet::running(4);
    let to = net.address(&SecretKey::generate());
    let coins = net.coins();
    net.stop(3);
    let old = net.directory().join("old");
    copy(&net.data_dir(3).join("db"), &old);
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    let mut wallet = net.wallet(3).await;
    wallet.pay(&net.pay(&coins[0], &to, 5)).await;
    net.stop(3);
    std::fs::remove_dir_all(net.data_dir(3).join("db")).unwrap();
    copy(&old, &net.data_dir(3).join("db"));
    for _ in 0..2 {
        net.start(3);
        let reasons =
            until("it says why", || net.http(3, "/readyz").filter(|(_, body)| body.contains("not voting because")));
        assert_eq!(reasons.0, 503);
        assert!(reasons.1.contains("does not fit its guard"), "{}", reasons.1);
        assert!(net.status(3)["voting"].as_str().unwrap().starts_with("Suspended"));
        net.stop(3);
    }
    net.start(3);
    // With it and two others there is no quorum of votes; with three others there is.
    let second = net.pay(&coins[1], &to, 6);
    let mut voter = net.wallet(0).await;
    voter.pay(&second).await;
    let mut follower = net.wallet(3).await;
    follower.until_final(second.txid()).await;
    net.kill(2);
    let third = net.pay(&coins[2], &to, 7);
    let mut other = net.wallet(1).await;
    voter.broadcast(&third).await;
    voter.status_of(third.txid(), &[TransactionStatusKind::Pending]).await;
    support::within("the other voter locks it", async {
        while !matches!(other.state(coins[2].outpoint).await, Some(UTXOState::Locked { .. })) {}
    })
    .await;
    assert_eq!(voter.query(third.txid()).await.status, TransactionStatusKind::Pending);
    assert_eq!(follower.state(coins[2].outpoint).await, Some(UTXOState::Unspent), "it locks nothing");
    net.stop(3);
    assert!(net.dump(3, "votes").is_empty());
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn time_wallet_pays_and_proves_against_a_real_network() {
    let net = TestNet::running(4);
    let file = |name: &str| net.directory().join(name).to_str().unwrap().to_owned();
    let (seed, alice, bob, proof) = (file("seed"), file("alice.key"), file("bob.key"), file("proof.json"));
    std::fs::write(&seed, &net.devnet.wallets[0].secret_seed).unwrap();
    let ok = |output: Output| {
        assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
        stdout(&output)
    };
    ok(time_wallet(&net, 0, &["keygen", "--out", &alice, "--from-seed-file", &seed]));
    ok(time_wallet(&net, 0, &["keygen", "--out", &bob]));
    let address = ok(time_wallet(&net, 0, &["address", "--key", &bob])).trim().to_owned();
    let sent = ok(time_wallet(&net, 0, &["send", "--key", &alice, "--to", &address, "--amount", "12.5"]));
    assert!(sent.contains("proof verified"), "{sent}");
    let txid = sent.split_whitespace().next().unwrap();
    assert!(ok(time_wallet(&net, 1, &["status", txid])).contains("proof verified"));
    ok(time_wallet(&net, 2, &["proof", txid, "--out", &proof]));
    assert!(ok(time_wallet(&net, 0, &["verify-proof", &proof, "--txid", txid])).contains("is final"));
    let balance = until("the payment arrives", || {
        let text = ok(time_wallet(&net, 3, &["balance", "--address", &address]));
        text.contains("12.50000000").then_some(text)
    });
    assert!(balance.contains("12.50000000 TIME in 1 coins"), "{balance}");
    let broke = time_wallet(&net, 0, &["send", "--key", &bob, "--to", &address, "--amount", "13"]);
    assert_eq!(broke.status.code(), Some(1));
    // Another network's genesis proves nothing.
    let other = TestNet::new(4);
    let foreign = time_wallet(&other, 0, &["verify-proof", &proof]);
    assert_eq!(foreign.status.code(), Some(1));
}
