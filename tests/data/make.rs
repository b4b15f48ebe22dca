//! Makes a data directory for tests/data. See README.md there: this file is copied into
//! tests/ of the program whose schema it is to be, and run there.
//!
//! One member of a network of four lives through payments that become final, chains of
//! them, a conflict of two halves of the network and, where the program has them, blocks.
//! Then it is alone, and its peers are played with their keys, so that what is in flight
//! stops exactly where it is wanted.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Link, TestNet, Wallet, until, within};
use time_masternode::consensus::{Vote, VoteKind, sign_batch};
use time_masternode::net::{NetworkMessage, TransactionStatusKind, UTXOSubscribe};
use time_masternode::types::{Block, BlockHash, ConsensusStep, SecretKey, Transaction, Txid, consensus_vote_message};

fn dump(net: &TestNet) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_time-db"))
        .arg("--data-dir")
        .arg(net.data_dir(0))
        .args(["dump", "--format", "json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

async fn subscribe(wallet: &mut Wallet, name: &str, addresses: Vec<String>, outpoints: Vec<String>) {
    let subscribe = UTXOSubscribe {
        outpoints,
        addresses,
        subscriber_id: name.into(),
        resume_token: Some("11".repeat(32)),
        resume_from: None,
        log_id: None,
    };
    wallet.send(&NetworkMessage::UTXOSubscribe(subscribe)).await;
    let subscribed = |message| matches!(message, NetworkMessage::UTXOSubscribed(_)).then_some(());
    wallet.wait_for("the subscription", subscribed).await;
}

/// The other members, played: each with its key and its connection to node 0.
struct Peers<'a> {
    net: &'a TestNet,
    links: Vec<(SecretKey, Link)>,
}

impl<'a> Peers<'a> {
    async fn connect(net: &'a TestNet) -> Self {
        let mut links = Vec::new();
        for member in 1..4 {
            let key = net.member_key(member);
            let link = Link::member(net, 0, &key).await;
            links.push((key, link));
        }
        Self { net, links }
    }

    /// The first `n` of them vote.
    async fn vote(&mut self, n: usize, kind: VoteKind, txid: Txid) {
        let committee = self.net.committee();
        for (key, link) in self.links.iter_mut().take(n) {
            let batch = sign_batch(key, &committee, vec![Vote { kind, txid }]).unwrap();
            link.send(&NetworkMessage::Votes(Arc::new(batch.get().wire().clone()))).await;
        }
    }

    /// They have decided a block.
    async fn decide(&mut self, dump: &[Value], transactions: Vec<Txid>) {
        let genesis = self.net.genesis.hash();
        let tip = &dump.iter().find(|row| row["key"] == "chain").unwrap()["value"];
        let height = tip["height"].as_u64().unwrap() + 1;
        let block = Block {
            height,
            previous_hash: serde_json::from_value::<BlockHash>(tip["hash"].clone()).unwrap(),
            timestamp_ms: tip["timestamp_ms"].as_u64().unwrap() + 1_000,
            proposer: self.links[0].0.public_key(),
            state_digest: serde_json::from_value(tip["state_digest"].clone()).unwrap(),
            transactions,
            aborts: Vec::new(),
        };
        let hash = block.hash(&genesis);
        let message = consensus_vote_message(ConsensusStep::Precommit, &genesis, height, 0, Some(&hash));
        let sign = |(key, _): &(SecretKey, Link)| json!({ "voter": key.public_key(), "signature": key.sign(&message) });
        let votes: Vec<Value> = self.links.iter().map(sign).collect();
        let certificate = json!({ "height": height, "round": 0, "block_hash": hash, "votes": votes });
        let blocks = json!({ "Blocks": { "blocks": [{ "block": block, "certificate": certificate }] } });
        self.links[0].1.say(&blocks.to_string()).await;
    }
}

async fn until_confirmed(wallet: &mut Wallet, txid: Txid) {
    within("confirmation", async {
        while serde_json::to_value(wallet.query(txid).await.status).unwrap() != "Confirmed" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

fn has_row(rows: &[Value], tree: &str, wanted: impl Fn(&Value) -> bool) -> bool {
    rows.iter().any(|row| row["tree"] == tree && wanted(row))
}

fn names(row: &Value, txid: Txid, kind: &str) -> bool {
    let texts = row.to_string();
    texts.contains(&txid.to_string()) && texts.contains(kind)
}

#[tokio::test]
async fn make() {
    let out = std::env::var("FIXTURE_OUT").expect("FIXTURE_OUT names the directory to make");
    let has_blocks = std::env::var("FIXTURE_BLOCKS").is_ok();
    let mut net = TestNet::running(4);
    let (coins, payee) = (net.coins(), SecretKey::generate());
    let to = net.address(&payee);
    let mut wallet = net.wallet(0).await;

    // A body of more than one part, then chains of payments, the last one sent before its parent.
    let split = net.split(&coins[0], 240);
    wallet.pay(&split).await;
    let small = TestNet::outputs(&split, &coins[0].key);
    let many = small[60..].iter().map(|coin| coin.outpoint.to_string()).collect();
    subscribe(&mut wallet, "a wallet", vec![to.to_string()], vec![small[0].outpoint.to_string()]).await;
    subscribe(&mut wallet, "one that follows many", Vec::new(), many).await;
    let mut coin = coins[1].clone();
    for units in 1..=4 {
        let payment = net.pay(&coin, &to, units);
        wallet.pay(&payment).await;
        coin = TestNet::outputs(&payment, &coin.key).remove(1);
    }
    let parent = net.pay(&small[0], &to, 5);
    let child = net.pay(&TestNet::outputs(&parent, &small[0].key)[1], &to, 6);
    wallet.broadcast(&child).await;
    wallet.broadcast(&parent).await;
    wallet.until_final(child.txid()).await;
    if has_blocks {
        until_confirmed(&mut wallet, child.txid()).await;
    }

    // Two halves of the network lock one coin for two payments.
    let conflict = [net.pay(&small[1], &to, 11), net.pay(&small[1], &to, 12)];
    net.stop(2);
    net.stop(3);
    halve(&mut net, [0, 1], &conflict[0]).await;
    halve(&mut net, [2, 3], &conflict[1]).await;
    net.start_all();
    if has_blocks {
        let mut wallet = net.wallet(0).await;
        for txid in conflict.iter().map(Transaction::txid) {
            within("the end of both", async {
                while serde_json::to_value(wallet.query(txid).await.status).unwrap() != "Aborted" {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
            .await;
        }
        (0..4).for_each(|node| net.stop(node));
    } else {
        // Nobody tells when there are certificates to abort; stopped and looked at, there are.
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            (0..4).for_each(|node| net.stop(node));
            let rows = dump(&net);
            if conflict.iter().any(|t| has_row(&rows, "certificates", |row| names(row, t.txid(), "Abort"))) {
                break;
            }
            net.start_all();
        }
    }

    // The member is alone with those that play its peers.
    net.start(0);
    let mut wallet = net.wallet(0).await;
    let mut peers = Peers::connect(&net).await;
    // Certified here, and settled by a block before its proof came.
    let by_block = net.pay(&small[2], &to, 21);
    pending(&mut wallet, &by_block).await;
    peers.vote(2, VoteKind::Approve, by_block.txid()).await;
    // Final, and in no block.
    let unconfirmed = net.pay(&small[3], &to, 22);
    pending(&mut wallet, &unconfirmed).await;
    peers.vote(2, VoteKind::Approve, unconfirmed.txid()).await;
    peers.vote(2, VoteKind::Commit, unconfirmed.txid()).await;
    wallet.until_final(unconfirmed.txid()).await;
    drop(peers);
    net.stop(0);
    let rows = dump(&net);
    assert!(has_row(&rows, "votes", |row| names(row, by_block.txid(), "Commit")), "it committed to what was certified");
    assert!(has_row(&rows, "certificates", |row| names(row, by_block.txid(), "Approve")));
    net.start(0);
    let mut wallet = net.wallet(0).await;
    let mut peers = Peers::connect(&net).await;
    if has_blocks {
        peers.decide(&rows, vec![by_block.txid()]).await;
        until_confirmed(&mut wallet, by_block.txid()).await;
    }
    // In flight: certified and committed to; contradicted, with a vote to abort and A of the
    // rival; the child of what is in no block; and so many that they fill more than a row.
    let certified = net.pay(&small[4], &to, 23);
    pending(&mut wallet, &certified).await;
    peers.vote(2, VoteKind::Approve, certified.txid()).await;
    let (contradicted, rival) = (net.pay(&small[5], &to, 24), net.pay(&small[5], &to, 25));
    pending(&mut wallet, &contradicted).await;
    peers.links[0].1.send(&NetworkMessage::TransactionBroadcast(rival.to_raw())).await;
    peers.vote(1, VoteKind::Approve, rival.txid()).await;
    let abort = Vote { kind: VoteKind::Abort, txid: contradicted.txid() };
    let votes = |message| matches!(message, NetworkMessage::Votes(batch) if batch.votes.contains(&abort)).then_some(());
    peers.links[0].1.wait_for("the vote to abort, which puts the rival on record", votes).await;
    let grandchild = net.pay(&TestNet::outputs(&unconfirmed, &small[3].key)[1], &to, 26);
    pending(&mut wallet, &grandchild).await;
    for coin in &small[10..40] {
        let payment = net.pay(coin, &to, 27);
        pending(&mut wallet, &payment).await;
    }
    peers.vote(3, VoteKind::Abort, rival.txid()).await;
    // What comes behind the votes shows that they were taken.
    pending(&mut wallet, &net.pay(&small[41], &to, 28)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    drop(peers);
    net.stop(0);
    let rows = dump(&net);
    let votes = |txid: Txid, kind: &str| {
        has_row(&rows, "votes", |row| row["value"].as_array().unwrap().iter().any(|vote| names(vote, txid, kind)))
    };
    assert!(votes(certified.txid(), "Commit") && votes(contradicted.txid(), "Abort"));
    assert!(votes(contradicted.txid(), "Approve") && !votes(rival.txid(), "Approve"));
    assert!(has_row(&rows, "certificates", |row| names(row, rival.txid(), "Abort")), "A of the rival");
    assert!(has_row(&rows, "certificates", |row| names(row, certified.txid(), "Approve")), "C of what is certified");
    keep(&net, Path::new(&out), &rows);
}

async fn pending(wallet: &mut Wallet, payment: &Transaction) {
    wallet.broadcast(payment).await;
    wallet.status_of(payment.txid(), &[TransactionStatusKind::Pending]).await;
}

/// Two nodes, and no others, lock a payment, and stop.
async fn halve(net: &mut TestNet, nodes: [usize; 2], payment: &Transaction) {
    for node in nodes {
        if !net.is_running(node) {
            net.start(node);
        }
    }
    until("they are connected", || {
        let status: Value = serde_json::from_str(&net.http(nodes[0], "/status")?.1).ok()?;
        let peers = status["peers"].as_array()?.len();
        (peers == 1 && net.http(nodes[1], "/status").is_some()).then_some(())
    });
    pending(&mut net.wallet(nodes[0]).await, payment).await;
    let mut wallet = net.wallet(nodes[1]).await;
    within("the other one locks it too", async {
        while wallet.query(payment.txid()).await.status != TransactionStatusKind::Pending {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    nodes.iter().for_each(|node| net.stop(*node));
}

/// The devnet's files, with the data of the first member alone, and the dump.
fn keep(net: &TestNet, out: &Path, rows: &[Value]) {
    std::fs::create_dir_all(out).unwrap();
    let from = net.directory();
    for node in ["masternode-1", "masternode-2", "masternode-3", "masternode-4"] {
        std::fs::create_dir_all(out.join(node)).unwrap();
        std::fs::copy(from.join(node).join("masternode.key"), out.join(node).join("masternode.key")).unwrap();
    }
    for name in ["genesis.json", "devnet.json", "masternode-1/config.toml"] {
        std::fs::copy(from.join(name), out.join(name)).unwrap();
    }
    let data = out.join("masternode-1").join("data");
    assert!(Command::new("cp").arg("-r").arg(net.data_dir(0)).arg(&data).status().unwrap().success());
    let mut text = String::from("[\n");
    for (i, row) in rows.iter().enumerate() {
        let comma = if i + 1 < rows.len() { "," } else { "" };
        text.push_str(&format!("{row}{comma}\n"));
    }
    text.push_str("]\n");
    std::fs::write(out.join("dump.json"), text).unwrap();
}
