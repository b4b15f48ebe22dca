//! A member that lost its votes comes back: it asks the others what it must not vote on,
//! and votes again on what comes into being afterwards. And what confirmed blocks have made
//! unnecessary is forgotten, on real networks.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::collections::BTreeSet;

use serde_json::Value;
use support::{Coin, TestNet, Wallet, until, within};
use time_masternode::net::{FinalityProof, NetworkMessage, TransactionStatusKind, UTXOSubscribe};
use time_masternode::types::{SecretKey, Transaction, Txid};

async fn until_confirmed(wallet: &mut Wallet, txid: Txid) {
    within("confirmation", async {
        while wallet.query(txid).await.status != TransactionStatusKind::Confirmed {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// The kinds of vote that a stopped node's database holds on a transaction.
fn own_votes(net: &TestNet, node: usize, txid: Txid) -> BTreeSet<String> {
    let rows = net.dump(node, "votes");
    let votes = rows.iter().flat_map(|row| row["value"].as_array().unwrap());
    let of = votes.filter(|vote| vote["txid"] == txid.to_string().as_str());
    of.map(|vote| vote["kind"].as_str().unwrap().to_owned()).collect()
}

fn change_of(payment: &Transaction, key: &SecretKey) -> Coin {
    TestNet::outputs(payment, key).remove(1)
}

/// The directory of a member is gone, guard and all. It follows the chain, stands behind the
/// fence, gives no vote on a coin that it may have voted on, and votes on what is new.
#[tokio::test]
async fn a_member_whose_directory_was_deleted_votes_behind_the_fence() {
    let mut net = TestNet::running(4);
    let coins = net.coins();
    let to = net.address(&SecretKey::generate());
    let before = net.pay(&coins[0], &to, 1);
    net.wallet(0).await.pay(&before).await;
    until_confirmed(&mut net.wallet(3).await, before.txid()).await;
    // With one of the others down and this one killed, it is needed for every quorum.
    net.kill(3);
    std::fs::remove_dir_all(net.data_dir(3)).unwrap();
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    let fence = net.status(3)["fence"].clone();
    assert_eq!(net.status(3)["voting"], "Active");
    assert_eq!(fence["standing"], true);
    assert!(fence["fenced"].as_u64().unwrap() >= 5, "three genesis coins, two outputs: {fence}");
    let agrees_from = fence["agrees_from"].as_u64().unwrap();

    // An old coin becomes final by the other three, and this one says nothing of it.
    let old = net.pay(&coins[1], &to, 1);
    net.wallet(3).await.pay(&old).await;
    // Its change came into being behind the fence's back: on that the member votes.
    net.kill(2);
    let key = &coins[1].key;
    let new = net.pay(&change_of(&old, key), &to, 1);
    let mut wallet = net.wallet(0).await;
    wallet.pay(&new).await;
    // Another old coin cannot become final by two members and a fenced one.
    let fenced = net.pay(&coins[2], &to, 1);
    wallet.broadcast(&fenced).await;
    until("the fenced member has heard of it", || (net.status(3)["in_flight"].as_u64()? > 0).then_some(()));
    net.stop(3);
    assert_eq!(own_votes(&net, 3, fenced.txid()), BTreeSet::new(), "no vote of any kind");
    net.start(2);
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    until_confirmed(&mut net.wallet(3).await, fenced.txid()).await;

    // Coins move on; blocks pass; at last the member agrees on blocks again. With one of the
    // others down the chain cannot go on without it.
    let mut coin = change_of(&new, key);
    while net.status(3)["height"].as_u64().unwrap() + 1 < agrees_from {
        let payment = net.pay(&coin, &to, 1);
        let mut wallet = net.wallet(1).await;
        wallet.pay(&payment).await;
        until_confirmed(&mut wallet, payment.txid()).await;
        until_confirmed(&mut net.wallet(3).await, payment.txid()).await;
        coin = change_of(&payment, key);
    }
    net.kill(0);
    let payment = net.pay(&coin, &to, 1);
    let mut wallet = net.wallet(3).await;
    wallet.pay(&payment).await;
    until_confirmed(&mut wallet, payment.txid()).await;
}

/// A network of three has no quorum besides one member: it is told so, and votes on nothing.
#[tokio::test]
async fn a_network_without_another_quorum_is_told() {
    let mut net = TestNet::running(3);
    net.kill(2);
    std::fs::remove_dir_all(net.data_dir(2)).unwrap();
    net.start(2);
    until("the member says why", || {
        let (code, body) = net.http(2, "/readyz")?;
        (code == 503 && body.contains("does not survive")).then_some(())
    });
    assert_eq!(net.status(2)["voting"], "Fencing");
}

fn first_sequence(rows: &[Value]) -> u64 {
    rows.iter().map(|row| row["key"].as_str().unwrap().parse::<u64>().unwrap()).min().unwrap()
}

/// What is older than the retention is gone, and everything that wallets may ask still has an
/// answer: the status, a proof, a snapshot instead of a resume.
#[tokio::test]
async fn what_blocks_have_made_unnecessary_is_forgotten() {
    let mut net = TestNet::with_interval(4, 200);
    net.set_environment("TIME_RETENTION_BLOCKS", "3");
    net.start_all();
    let mut coin = net.coins().remove(0);
    let key = coin.key.clone();
    let to = net.address(&SecretKey::generate());
    let mut wallet = net.wallet(0).await;
    let (mut spent, mut txids) = (Vec::new(), Vec::new());
    for _ in 0..12 {
        let payment = net.pay(&coin, &to, 1);
        wallet.pay(&payment).await;
        until_confirmed(&mut wallet, payment.txid()).await;
        spent.push(coin.outpoint);
        txids.push(payment.txid());
        coin = change_of(&payment, &key);
    }
    within("forgetting", async {
        while !matches!(wallet.query(txids[5]).await.finality_proof, Some(FinalityProof::Block(_))) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    // What has spent a coin is told for ever.
    for (coin, txid) in spent.iter().zip(&txids) {
        let state = wallet.state(*coin).await.map(|state| state.txid());
        assert_eq!(state, Some(Some(*txid)));
    }
    // It is confirmed for ever, and its block proves it.
    let status = wallet.query(txids[0]).await;
    assert_eq!(status.status, TransactionStatusKind::Confirmed);
    match status.finality_proof.unwrap() {
        FinalityProof::Block(decided) => {
            time_masternode::consensus::CheckedBlock::prove(
                std::sync::Arc::unwrap_or_clone(decided),
                &net.committee(),
                &txids[0],
            )
            .unwrap();
        }
        other => panic!("F(T) should be gone: {other:?}"),
    }
    // And it cannot be spent again.
    let again = net.sign(
        &[Coin { outpoint: spent[0], amount: net.coins()[0].amount, key: key.clone() }],
        vec![time_masternode::types::Output {
            amount: time_masternode::types::Amount::from_units(5).unwrap(),
            address: to,
        }],
        9,
    );
    wallet.broadcast(&again).await;
    let refused = wallet.status_of(again.txid(), &[TransactionStatusKind::Rejected]).await;
    assert_eq!(refused.rejection.unwrap().code, "InputSpent");
    // A wallet that comes back for what is gone gets a snapshot.
    let subscribe = UTXOSubscribe {
        outpoints: Vec::new(),
        addresses: vec![to.to_string()],
        subscriber_id: "late".into(),
        resume_token: Some("11".repeat(32)),
        resume_from: Some(1),
        log_id: None,
    };
    wallet.send(&NetworkMessage::UTXOSubscribe(subscribe)).await;
    let subscribed = wallet
        .wait_for("the subscription", |message| match message {
            NetworkMessage::UTXOSubscribed(subscribed) => Some(subscribed),
            _ => None,
        })
        .await;
    assert!(subscribed.reset);
    assert_eq!(subscribed.utxos.len(), 12);
    for node in 0..4 {
        net.stop(node);
        let proofs = net.dump(node, "transactions").iter().filter(|row| !row["value"]["proof"].is_null()).count();
        assert!(proofs <= 6, "the proofs of pruned blocks are gone: {proofs}");
        assert!(first_sequence(&net.dump(node, "changes")) > 1, "the log begins later");
    }
    // And it starts again, and goes on.
    net.start_all();
    let payment = net.pay(&coin, &to, 1);
    net.wallet(2).await.pay(&payment).await;
}

/// The directory of a running member is copied, and the copy is started on another machine:
/// the second instance finds the members connected to the first, and does not vote.
#[tokio::test]
async fn a_twin_of_a_running_member_notices_and_does_not_vote() {
    let mut net = TestNet::running(4);
    net.kill(3);
    let twin = net.directory().join("twin");
    let copied = std::process::Command::new("cp").arg("-r").arg(net.data_dir(3)).arg(&twin).status().unwrap();
    assert!(copied.success());
    net.start(3);
    net.wait_ready(&[0, 1, 2, 3]);
    let port = support::free_base_port(1);
    let address = |offset: u16| format!("127.0.0.1:{}", port + offset);
    let config = net.directory().join(&net.devnet.nodes[3].config_file);
    let process = std::process::Command::new(env!("CARGO_BIN_EXE_time-masternode"))
        .args(["run", "--p2p-listen", &address(0), "--http-listen", &address(1)])
        .args(["--websocket-listen", &address(2), "--config"])
        .arg(config)
        .arg("--data-dir")
        .arg(&twin)
        .stderr(std::process::Stdio::null())
        .spawn();
    let process = support::Guarded(process.unwrap());
    let voting = until("the twin to notice", || {
        let (_, body) = support::http_get(&address(1), "/status")?;
        let status: Value = serde_json::from_str(&body).ok()?;
        let voting = status["voting"].as_str()?.to_owned();
        voting.starts_with("Suspended").then_some(voting)
    });
    assert!(voting.contains("another live instance"), "{voting}");
    assert_eq!(net.status(3)["voting"], "Active", "the first one goes on");
    let to = net.address(&SecretKey::generate());
    net.wallet(3).await.pay(&net.pay(&net.coins()[0], &to, 1)).await;
    process.kill();
}
