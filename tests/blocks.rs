//! The chain of a real network: the same on every node, with every payment in it, whoever
//! is killed or comes late.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value;
use support::{Coin, Link, TestNet, Wallet, until, within};
use time_masternode::consensus::{CheckedBlock, Verified};
use time_masternode::net::{
    FinalityProof, GetBlocks, NetworkMessage, TransactionStatusKind, UTXOStateNotificationMessage, UTXOSubscribe,
};
use time_masternode::types::{
    Address, DecidedBlock, OutPoint, Output, SecretKey, Transaction, Txid, UTXOState, UtxoDigest,
};

/// A node's whole chain, over its peers' port. Every block has to follow the one before and
/// to carry the votes of a quorum.
async fn chain(net: &TestNet, node: usize) -> Vec<DecidedBlock> {
    let mut link = Link::wallet(net, node).await;
    let mut chain: Vec<DecidedBlock> = Vec::new();
    loop {
        let from_height = chain.len() as u64 + 1;
        link.send(&NetworkMessage::GetBlocks(GetBlocks { from_height, limit: 50 })).await;
        let page = link
            .wait_for("blocks", |message| match message {
                NetworkMessage::Blocks(blocks) => Some(blocks.blocks),
                _ => None,
            })
            .await;
        if page.is_empty() {
            return chain;
        }
        for decided in page {
            let before = chain.last().map_or(*net.genesis.hash().as_bytes(), |b| *b.certificate.block_hash.as_bytes());
            assert_eq!(decided.block.height, chain.len() as u64 + 1);
            assert_eq!(*decided.block.previous_hash.as_bytes(), before);
            let checked = CheckedBlock::new(decided.clone(), &net.committee()).unwrap();
            assert!(Verified::check(checked).is_ok(), "its certificate verifies");
            chain.push(decided);
        }
    }
}

async fn until_confirmed(wallet: &mut Wallet, txids: &[Txid]) {
    within("confirmation", async {
        for txid in txids {
            while wallet.query(*txid).await.status != TransactionStatusKind::Confirmed {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    })
    .await;
}

/// `n` coins out of the first wallet's, split by a payment that is final.
async fn small_coins(net: &TestNet, n: u64) -> (Txid, Vec<Coin>) {
    let first = net.coins().remove(0);
    let split = net.split(&first, n);
    net.wallet(0).await.pay(&split).await;
    (split.txid(), TestNet::outputs(&split, &first.key))
}

/// What a stopped node's `chain` row says.
fn tip(net: &TestNet, node: usize) -> Value {
    let rows = net.dump(node, "meta");
    rows.into_iter().find(|row| row["key"] == "chain").unwrap()["value"].clone()
}

/// The chain's UTXO set of a stopped node on which everything is confirmed: digest and sum.
fn utxo_set(net: &TestNet, node: usize) -> (String, u64) {
    let (mut digest, mut sum) = (UtxoDigest::new(), 0);
    for row in net.dump(node, "utxos") {
        let state: UTXOState = serde_json::from_value(row["value"]["state"].clone()).unwrap();
        if let UTXOState::Confirmed { .. } = state {
            continue;
        }
        assert!(state.is_live(), "everything is confirmed: {row}");
        let outpoint: OutPoint = row["key"].as_str().unwrap().parse().unwrap();
        let output: Output = serde_json::from_value(row["value"]["output"].clone()).unwrap();
        digest.add(&outpoint, &output);
        sum += output.amount.units();
    }
    (digest.digest().to_string(), sum)
}

/// Stops all nodes and holds their databases against each other and against the supply.
fn assert_same_ledgers(net: &mut TestNet, nodes: usize) {
    for node in 0..nodes {
        net.stop(node);
    }
    let supply: u64 = net.genesis.transaction().outputs().iter().map(|output| output.amount.units()).sum();
    let first = tip(net, 0);
    for node in 0..nodes {
        let tip = tip(net, node);
        for field in ["height", "hash", "state_digest", "supply"] {
            assert_eq!(tip[field], first[field], "{field} of node {node}");
        }
        let (digest, sum) = utxo_set(net, node);
        assert_eq!((tip["state_digest"].as_str().unwrap(), sum), (digest.as_str(), supply), "node {node}");
        assert_eq!(net.dump(node, "locks").len(), 0, "nothing is in flight on node {node}");
    }
}

fn equivocations(net: &TestNet, node: usize) -> String {
    let metrics = net.http(node, "/metrics").unwrap().1;
    metrics.lines().find(|line| line.starts_with("time_equivocations_total")).unwrap().to_owned()
}

#[tokio::test]
async fn every_node_has_the_same_chain_and_every_payment_is_in_it() {
    let mut net = TestNet::running(4);
    let (split, coins) = small_coins(&net, 200).await;
    let to = net.address(&SecretKey::generate());
    let mut txids = vec![split];
    for (i, coin) in coins.iter().enumerate() {
        let payment = net.pay(coin, &to, 3);
        txids.push(payment.txid());
        net.wallet(i % 4).await.broadcast(&payment).await;
    }
    for node in 0..4 {
        until_confirmed(&mut net.wallet(node).await, &txids).await;
    }
    let first = chain(&net, 0).await;
    let contained: Vec<Txid> = first.iter().flat_map(|decided| decided.block.transactions.clone()).collect();
    assert_eq!(contained.len(), txids.len(), "each once, and nothing else");
    assert_eq!(contained.iter().collect::<BTreeSet<_>>(), txids.iter().collect());
    assert_eq!(contained[0], split, "the parent comes before its children");
    for node in 1..4 {
        let other: Vec<_> = chain(&net, node).await.iter().map(|decided| decided.certificate.block_hash).collect();
        assert_eq!(other, first.iter().map(|decided| decided.certificate.block_hash).collect::<Vec<_>>());
    }
    // The digest in each block is that of the set before it.
    let mut set = UtxoDigest::new();
    net.genesis.transaction().creates().for_each(|(outpoint, output)| set.add(&outpoint, &output));
    assert_eq!(first[0].block.state_digest, set.digest());
    assert_same_ledgers(&mut net, 4);
}

#[tokio::test]
async fn wallets_hear_of_confirmation_and_of_their_part_of_a_block() {
    let net = TestNet::running(4);
    let payee = SecretKey::generate();
    let to = net.address(&payee);
    let mut watcher = net.wallet(2).await;
    let subscribe = UTXOSubscribe {
        outpoints: Vec::new(),
        addresses: vec![to.to_string()],
        subscriber_id: "payee".into(),
        resume_token: None,
        resume_from: None,
        log_id: None,
    };
    watcher.send(&NetworkMessage::UTXOSubscribe(subscribe)).await;
    let coins = net.coins();
    let (theirs, other) = (net.pay(&coins[0], &to, 5), net.pay(&coins[1], &stranger(&net), 6));
    let mut wallet = net.wallet(0).await;
    wallet.pay(&other).await;
    wallet.broadcast(&theirs).await;
    let confirmed = wallet.status_of(theirs.txid(), &[TransactionStatusKind::Confirmed]).await;
    let height = confirmed.block_height.unwrap();
    match confirmed.finality_proof.unwrap() {
        FinalityProof::Commit(certificate) => {
            Arc::unwrap_or_clone(certificate).verify(&net.committee()).unwrap();
        }
        FinalityProof::Block(decided) => {
            CheckedBlock::prove(Arc::unwrap_or_clone(decided), &net.committee(), &theirs.txid()).unwrap();
        }
    }
    let mut last = 0;
    let block = watcher
        .wait_for("the payee's block", |message| match message {
            NetworkMessage::UTXOStateNotification(UTXOStateNotificationMessage { sequence, .. }) => {
                assert!(sequence > last, "in order");
                last = sequence;
                None
            }
            NetworkMessage::BlockNotification(block) => {
                assert!(block.sequence > last, "behind what it changed");
                last = block.sequence;
                (!block.transactions.is_empty()).then_some(block)
            }
            _ => None,
        })
        .await;
    assert_eq!(block.height, height);
    assert_eq!(block.transactions, [theirs.txid()], "its own part, and nobody else's");
    let spent = wallet.state(theirs.inputs()[0].previous_output).await.unwrap();
    assert!(
        matches!(spent, UTXOState::Confirmed { txid, block_height, .. } if (txid, block_height) == (theirs.txid(), height))
    );
    // Asked again, it stays so.
    assert_eq!(wallet.query(theirs.txid()).await.block_height, Some(height));
}

fn stranger(net: &TestNet) -> Address {
    net.address(&SecretKey::generate())
}

/// Two transactions of the owner on one coin, each known to half of the members before
/// they can tell each other: neither gets a quorum. Without an operator the coin can be
/// spent again, and both are told to be aborted, or one of them was final.
#[tokio::test]
async fn a_contested_coin_can_be_spent_again() {
    let mut net = TestNet::running(4);
    let (_, coins) = small_coins(&net, 40).await;
    let mut wallets = Vec::new();
    for node in 0..4 {
        wallets.push(net.wallet(node).await);
    }
    let mut pairs = Vec::new();
    for coin in &coins {
        let (a, b) = (net.pay(coin, &stranger(&net), 1), net.pay(coin, &stranger(&net), 2));
        for (node, transaction) in [(0, &a), (1, &a), (2, &b), (3, &b)] {
            wallets[node].broadcast(transaction).await;
        }
        pairs.push((coin, a, b));
    }
    let mut again = Vec::new();
    for (coin, a, b) in &pairs {
        let ended = [a, b].map(Transaction::txid);
        let mut won = [false; 2];
        for (which, txid) in ended.iter().enumerate() {
            // Whoever took it is told how it ended.
            let taker = 2 * which;
            let told = within("an end", async {
                loop {
                    let status = wallets[taker].query(*txid).await;
                    use TransactionStatusKind::{Aborted, Confirmed, Unknown};
                    if matches!(status.status, Confirmed | Aborted) {
                        return status;
                    }
                    // This node had seen the other one first, and then never took this one.
                    if status.status == Unknown
                        && let Some(UTXOState::Confirmed { .. } | UTXOState::Unspent) =
                            wallets[taker].state(coin.outpoint).await
                    {
                        return status;
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            })
            .await;
            won[which] = told.status == TransactionStatusKind::Confirmed;
            if let Some(why) = told.rejection {
                assert_eq!(why.code, "Aborted");
                assert_eq!(why.by, Some(ended[1 - which]), "the rival is named");
            }
        }
        assert!(!(won[0] && won[1]), "both won");
        if !won[0] && !won[1] {
            let third = net.pay(coin, &stranger(&net), 3);
            until_unspent(&mut wallets[1], coin.outpoint).await;
            wallets[1].pay(&third).await;
            again.push(third.txid());
        }
    }
    eprintln!("of {} contested coins {} were won by neither", coins.len(), again.len());
    until_confirmed(&mut wallets[3], &again).await;
    for wallet in &mut wallets {
        for (coin, ..) in &pairs {
            let state = within("the end", async {
                loop {
                    let state = wallet.state(coin.outpoint).await.unwrap();
                    if !state.is_live() {
                        return state;
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            });
            state.await;
        }
    }
    until_idle(&net, 4);
    assert_same_ledgers(&mut net, 4);
}

async fn until_unspent(wallet: &mut Wallet, outpoint: OutPoint) {
    within("a free coin", async {
        while wallet.state(outpoint).await != Some(UTXOState::Unspent) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Nothing is in flight, and everything that is final is in the chain, the same everywhere.
fn until_idle(net: &TestNet, nodes: usize) {
    until("rest", || {
        let heights: BTreeSet<_> = (0..nodes).map(|node| net.status(node)["height"].to_string()).collect();
        let idle = (0..nodes).all(|node| net.status(node)["in_flight"] == 0);
        let unconfirmed = (0..nodes).any(|node| {
            let metrics = net.http(node, "/metrics").map(|answer| answer.1).unwrap_or_default();
            !metrics.lines().any(|line| line == "time_unconfirmed 0")
        });
        (heights.len() == 1 && idle && !unconfirmed).then_some(())
    });
}

#[tokio::test]
async fn the_chain_goes_on_without_one_node_and_it_catches_up() {
    let mut net = TestNet::running(4);
    let (split, coins) = small_coins(&net, 40).await;
    for node in 0..4 {
        until_confirmed(&mut net.wallet(node).await, &[split]).await;
    }
    net.kill(3);
    let mut txids = Vec::new();
    // More blocks than members, so each turn comes, also that of the absent one.
    for coins in coins.chunks(8) {
        let mut wallet = net.wallet(0).await;
        for coin in coins {
            let payment = net.pay(coin, &stranger(&net), 1);
            wallet.broadcast(&payment).await;
            txids.push(payment.txid());
        }
        until_confirmed(&mut wallet, &txids).await;
    }
    assert!(net.status(0)["height"].as_u64().unwrap() >= 5);
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    until_confirmed(&mut net.wallet(3).await, &txids).await;
    until_idle(&net, 4);
    let (ours, theirs) = (chain(&net, 0).await, chain(&net, 3).await);
    assert_eq!(ours.len(), theirs.len());
    assert_same_ledgers(&mut net, 4);
}

/// `kill -9` at any moment, one node or all, with blocks under way: no member says two
/// things at once, and the chain is the same everywhere afterwards.
#[tokio::test]
async fn no_kill_makes_a_member_say_two_things_about_a_block() {
    let rounds: usize = std::env::var("TIME_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let mut net = TestNet::running(4);
    let (_, coins) = small_coins(&net, 250).await;
    let mut coins: Vec<Coin> = coins;
    let mut txids = Vec::new();
    for round in 0..rounds {
        let mut next = Vec::new();
        for coin in coins.drain(..10.min(coins.len())) {
            let payment = net.pay(&coin, &net.address(&coin.key), 10);
            net.wallet(round % 4).await.broadcast(&payment).await;
            txids.push(payment.txid());
            next.extend(TestNet::outputs(&payment, &coin.key).into_iter().nth(1));
        }
        coins.extend(next);
        // Some time within the second in which a block is agreed on.
        tokio::time::sleep(std::time::Duration::from_millis(u64::from(rand::random::<u32>() % 1_200))).await;
        let victims: Vec<usize> = if round % 4 == 3 { vec![0, 1, 2, 3] } else { vec![(round + 1) % 4] };
        victims.iter().for_each(|victim| net.kill(*victim));
        victims.iter().for_each(|victim| net.start(*victim));
        net.wait_ready(&[0, 1, 2, 3]);
        for node in 0..4 {
            assert_eq!(equivocations(&net, node), "time_equivocations_total 0", "round {round}, node {node}");
            assert_eq!(net.status(node)["voting"], "Active", "round {round}, node {node}");
        }
    }
    until_idle(&net, 4);
    assert_same_ledgers(&mut net, 4);
}

/// An observer with an empty directory joins a chain that is there already, and so does a
/// member whose directory is gone: behind the fence.
#[tokio::test]
async fn an_empty_observer_catches_up_with_the_chain() {
    let blocks: usize = std::env::var("TIME_SYNC_BLOCKS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let per_block: usize = std::env::var("TIME_SYNC_PER_BLOCK").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    let interval = if blocks > 20 { 100 } else { 1_000 };
    let mut net = TestNet::with_interval(4, interval);
    net.start_all();
    let (_, mut coins) = small_coins(&net, 250).await;
    let mut last = Vec::new();
    let mut wallet = net.wallet(0).await;
    while net.status(0)["height"].as_u64().unwrap() < blocks as u64 {
        let batch: Vec<Coin> = coins.drain(..per_block.min(coins.len())).collect();
        last.clear();
        for coin in batch {
            let payment = net.pay(&coin, &net.address(&coin.key), 10);
            wallet.broadcast(&payment).await;
            last.push(payment.txid());
            coins.extend(TestNet::outputs(&payment, &coin.key).into_iter().nth(1));
        }
        until_confirmed(&mut wallet, &last).await;
    }
    let height = net.status(0)["height"].as_u64().unwrap();
    let transactions: usize = chain(&net, 0).await.iter().map(|decided| decided.block.transactions.len()).sum();
    let port = support::free_base_port(1);
    let address = |offset: u16| format!("127.0.0.1:{}", port + offset);
    let began = std::time::Instant::now();
    let observer = std::process::Command::new(env!("CARGO_BIN_EXE_time-masternode"))
        .args(["run", "--id", "late", "--p2p-listen", &address(0), "--http-listen", &address(1)])
        .args(["--websocket-listen", &address(2), "--genesis-file"])
        .arg(net.directory().join(&net.devnet.genesis_file))
        .arg("--data-dir")
        .arg(net.directory().join("late"))
        .stderr(std::process::Stdio::null())
        .spawn();
    let observer = support::Guarded(observer.unwrap());
    let mut wallet = Wallet::at(&address(2)).await;
    until_confirmed(&mut wallet, &last).await;
    eprintln!("{height} blocks with {transactions} transactions in {:?}", began.elapsed());
    // And it goes on from there.
    let coin = coins.pop().unwrap();
    let payment = net.pay(&coin, &stranger(&net), 1);
    wallet.broadcast(&payment).await;
    until_confirmed(&mut wallet, &[payment.txid()]).await;
    observer.kill();
    net.kill(3);
    std::fs::remove_dir_all(net.data_dir(3)).unwrap();
    let began = std::time::Instant::now();
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    eprintln!("a member without its directory was in step, behind its fence, in {:?}", began.elapsed());
    last.push(payment.txid());
    until_confirmed(&mut net.wallet(3).await, &last).await;
    assert_eq!(net.status(3)["fence"]["standing"], true);
    until_idle(&net, 4);
    assert_same_ledgers(&mut net, 4);
}

#[tokio::test]
async fn a_network_of_one_makes_its_own_blocks() {
    let mut net = TestNet::running(1);
    let coin = net.coins().remove(0);
    let payment = net.pay(&coin, &stranger(&net), 5);
    let mut wallet = net.wallet(0).await;
    wallet.pay(&payment).await;
    until_confirmed(&mut wallet, &[payment.txid()]).await;
    net.kill(0);
    net.start(0);
    net.wait_ready(&[0]);
    let next = net.pay(&TestNet::outputs(&payment, &coin.key)[1], &stranger(&net), 5);
    let mut wallet = net.wallet(0).await;
    wallet.pay(&next).await;
    until_confirmed(&mut wallet, &[next.txid()]).await;
    assert_same_ledgers(&mut net, 1);
}
