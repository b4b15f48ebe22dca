//! Four masternodes as four processes: payments become final with any three of them,
//! nothing does with two, and no `kill -9` takes anything back.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use support::{TestNet, until};
use time_masternode::consensus::CheckedBlock;
use time_masternode::net::{FinalityProof, GetTransactions, NetworkMessage, TransactionStatusKind};
use time_masternode::types::{Amount, SecretKey, Transaction, UTXOState};

/// The proof that a wallet keeps, verified with nothing but the genesis.
fn assert_proved(net: &TestNet, status: &time_masternode::net::TransactionStatus) {
    match status.finality_proof.clone() {
        Some(FinalityProof::Commit(proof)) => {
            assert_eq!(proof.txid, status.txid);
            Arc::unwrap_or_clone(proof).verify(&net.committee()).unwrap();
        }
        // Where this node has only seen the block, that proves it.
        Some(FinalityProof::Block(decided)) => {
            CheckedBlock::prove(Arc::unwrap_or_clone(decided), &net.committee(), &status.txid).unwrap();
        }
        other => panic!("no proof: {other:?}"),
    }
}

#[tokio::test]
async fn any_three_of_four_finalise_and_the_fourth_learns_what_it_missed() {
    let mut net = TestNet::running(4);
    let payee = SecretKey::generate();
    let to = net.address(&payee);
    let mut coin = net.coins().remove(0);
    let mut paid = Vec::new();
    for down in 0..4 {
        net.stop(down);
        let mut wallet = net.wallet((down + 1) % 4).await;
        let payment = net.pay(&coin, &to, 1_000);
        assert_proved(&net, &wallet.pay(&payment).await);
        coin = TestNet::outputs(&payment, &coin.key).remove(1);
        paid.push(payment.txid());
        net.start(down);
        net.wait_ready(&[0, 1, 2, 3]);
        let mut returned = net.wallet(down).await;
        for txid in &paid {
            assert_proved(&net, &returned.until_final(*txid).await);
        }
        let held = returned.coins_of(&to).await;
        assert_eq!(held.total, Amount::from_units(1_000 * paid.len() as u64).unwrap());
    }
}

#[tokio::test]
async fn with_two_down_nothing_is_final_and_nothing_is_lost() {
    let mut net = TestNet::running(4);
    let to = net.address(&SecretKey::generate());
    let coins = net.coins();
    net.kill(2);
    net.kill(3);
    let payments: Vec<Transaction> = coins.iter().map(|coin| net.pay(coin, &to, 7)).collect();
    let mut wallet = net.wallet(0).await;
    for payment in &payments {
        wallet.broadcast(payment).await;
        let status = wallet.status(payment.txid()).await;
        assert_eq!(status.status, TransactionStatusKind::Pending);
    }
    // Both that are up have approved, and that is all that can be.
    let mut other = net.wallet(1).await;
    until_locked(&mut other, &payments).await;
    for payment in &payments {
        assert_eq!(wallet.query(payment.txid()).await.status, TransactionStatusKind::Pending);
    }
    let ready = net.http(0, "/readyz").unwrap();
    assert_eq!(ready.0, 503);
    assert!(ready.1.contains("no quorum of peers"), "{}", ready.1);
    net.start(3);
    for payment in &payments {
        assert_proved(&net, &wallet.until_final(payment.txid()).await);
    }
    let mut third = net.wallet(3).await;
    for payment in &payments {
        assert_proved(&net, &third.until_final(payment.txid()).await);
    }
}

async fn until_locked(wallet: &mut support::Wallet, payments: &[Transaction]) {
    support::within("locks", async {
        for payment in payments {
            let outpoint = payment.inputs()[0].previous_output;
            while !matches!(wallet.state(outpoint).await, Some(UTXOState::Locked { .. })) {}
        }
    })
    .await;
}

/// What a stopped node holds: locked and spent outputs, and its own votes.
fn holdings(net: &TestNet, node: usize) -> (BTreeMap<String, Value>, Vec<Value>) {
    let utxos = net
        .dump(node, "utxos")
        .into_iter()
        .map(|row| (row["key"].as_str().unwrap().to_owned(), row["value"]["state"].clone()));
    let votes = net.dump(node, "votes").into_iter().flat_map(|row| row["value"].as_array().unwrap().clone());
    let mut votes: Vec<Value> = votes.collect();
    votes.sort_by_key(ToString::to_string);
    (utxos.collect(), votes)
}

/// With two nodes down every payment stays in flight, so there are locks and votes to
/// lose. They are the same after `kill -9`, and lead to finality when a third returns.
#[tokio::test]
async fn locks_and_votes_survive_kill_9() {
    let mut net = TestNet::running(4);
    let to = net.address(&SecretKey::generate());
    net.kill(2);
    net.kill(3);
    let payments: Vec<Transaction> = net.coins().iter().map(|coin| net.pay(coin, &to, 7)).collect();
    let mut wallet = net.wallet(0).await;
    for payment in &payments {
        wallet.broadcast(payment).await;
        wallet.status_of(payment.txid(), &[TransactionStatusKind::Pending]).await;
    }
    let mut other = net.wallet(1).await;
    until_locked(&mut other, &payments).await;
    net.kill(0);
    net.kill(1);
    let before: Vec<_> = [0, 1].map(|node| holdings(&net, node)).into();
    for (node, (utxos, votes)) in before.iter().enumerate() {
        let locked = utxos.values().filter(|state| state.get("Locked").is_some()).count();
        assert_eq!(locked, payments.len(), "node {node}");
        assert_eq!(votes.len(), payments.len(), "node {node}: one Approve each: {votes:?}");
    }
    net.start(0);
    net.start(1);
    until("both are back", || (net.http(0, "/livez")?.0 == 200 && net.http(1, "/livez")?.0 == 200).then_some(()));
    net.kill(0);
    net.kill(1);
    for node in [0, 1] {
        assert_eq!(holdings(&net, node), before[node], "node {node} after a restart");
    }
    for node in [0, 1, 2] {
        net.start(node);
    }
    net.wait_ready(&[0, 1, 2]);
    for node in [0, 1, 2] {
        let mut wallet = net.wallet(node).await;
        for payment in &payments {
            assert_proved(&net, &wallet.until_final(payment.txid()).await);
        }
    }
}

/// Rounds of payments during which one node, or all four, are killed. Whatever a wallet
/// was told stays true: `Finalized` for ever, `Pending` in flight or final.
#[tokio::test]
async fn what_was_acknowledged_survives_kill_9_under_load() {
    let rounds: usize = std::env::var("TIME_KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let mut net = TestNet::running(4);
    let to = net.address(&SecretKey::generate());
    let mut wallet = net.wallet(0).await;
    let mut coins = Vec::new();
    for first in net.coins() {
        let split = net.split(&first, 250);
        wallet.pay(&split).await;
        coins.extend(TestNet::outputs(&split, &first.key));
    }
    let per_round = (coins.len() / rounds).clamp(1, 30);
    let mut acknowledged: BTreeMap<_, TransactionStatusKind> = BTreeMap::new();
    for round in 0..rounds {
        let payments: Vec<Transaction> =
            coins.drain(..per_round.min(coins.len())).map(|coin| net.pay(&coin, &to, 1)).collect();
        assert!(!payments.is_empty(), "at most 1,000 rounds");
        for payment in &payments {
            wallet.broadcast(payment).await;
        }
        // Read as many answers as a random share of what is due, then kill without mercy.
        let share = rand::random::<u32>() as usize % (2 * payments.len());
        let mut heard = 0;
        while heard < share {
            let next = support::within("an answer", wallet.client.next()).await.unwrap();
            if let time_masternode::net::NetworkMessage::TransactionStatus(status) = next {
                acknowledged.insert(status.txid, status.status);
                heard += 1;
            }
        }
        let victims: Vec<usize> = if round % 3 == 2 { vec![0, 1, 2, 3] } else { vec![round % 4] };
        for &victim in &victims {
            net.kill(victim);
        }
        for &victim in &victims {
            net.start(victim);
        }
        net.wait_ready(&[0, 1, 2, 3]);
        wallet = net.wallet(0).await;
        for node in 0..4 {
            let mut wallet = net.wallet(node).await;
            for (txid, kind) in &acknowledged {
                // The node that said so has to stand by it at once; the others in the end.
                let told = wallet.query(*txid).await.status;
                let stands = match kind {
                    kind if kind.is_final() => told.is_final(),
                    _ => told == TransactionStatusKind::Pending || told.is_final(),
                };
                assert!(stands || node != 0, "round {round}: {txid} was {kind:?} and is {told:?}");
            }
            for txid in acknowledged.keys() {
                assert_proved(&net, &wallet.until_final(*txid).await);
            }
        }
    }
    assert!(!acknowledged.is_empty());
}

#[tokio::test]
async fn a_network_of_one_finalises_by_itself() {
    let net = TestNet::running(1);
    let to = net.address(&SecretKey::generate());
    let coin = net.coins().remove(0);
    let payment = net.pay(&coin, &to, 5);
    let mut wallet = net.wallet(0).await;
    assert_proved(&net, &wallet.pay(&payment).await);
}

/// Whoever only hashes parents, or has the block already, need not be sent the proofs.
#[tokio::test]
async fn a_body_comes_with_its_certificate_or_without() {
    let net = TestNet::running(1);
    let payment = net.pay(&net.coins().remove(0), &net.address(&SecretKey::generate()), 5);
    let mut wallet = net.wallet(0).await;
    wallet.pay(&payment).await;
    for bodies_only in [false, true] {
        let ask = GetTransactions { txids: vec![payment.txid()], bodies_only };
        wallet.send(&NetworkMessage::GetTransactions(ask)).await;
        let answer = wallet.wait_for("a body", |message| match message {
            NetworkMessage::Transactions(answer) => Some(answer.transactions),
            _ => None,
        });
        let [entry] = &answer.await[..] else { panic!("one was asked for") };
        assert_eq!(entry.transaction, payment.to_raw());
        assert_eq!(entry.certificate.is_none(), bodies_only);
    }
}

#[tokio::test]
async fn a_child_may_be_sent_with_its_parent() {
    let net = TestNet::running(4);
    let coin = net.coins().remove(0);
    let to = net.address(&coin.key);
    let mut chain = vec![net.pay(&coin, &to, 1_000)];
    for _ in 0..10 {
        let change = TestNet::outputs(chain.last().unwrap(), &coin.key).remove(1);
        chain.push(net.pay(&change, &to, 1_000));
    }
    // The youngest first: each waits for its parent, which is not even known yet.
    let mut wallet = net.wallet(1).await;
    for transaction in chain.iter().rev() {
        wallet.broadcast(transaction).await;
    }
    for transaction in &chain {
        assert_proved(&net, &wallet.until_final(transaction.txid()).await);
    }
}

/// An observer has no key: it takes payments and passes them on, follows what becomes
/// final, serves wallets, and never votes.
#[tokio::test]
async fn an_observer_follows_and_serves_wallets() {
    let net = TestNet::running(4);
    let port = support::free_base_port(1);
    let address = |offset: u16| format!("127.0.0.1:{}", port + offset);
    let data_dir = net.directory().join("observer");
    let observer = std::process::Command::new(env!("CARGO_BIN_EXE_time-masternode"))
        .args(["run", "--id", "watcher", "--p2p-listen", &address(0), "--http-listen", &address(1)])
        .args(["--websocket-listen", &address(2), "--genesis-file"])
        .arg(net.directory().join(&net.devnet.genesis_file))
        .arg("--data-dir")
        .arg(&data_dir)
        .stderr(std::process::Stdio::null())
        .spawn();
    let observer = support::Guarded(observer.unwrap());
    let payee = net.address(&SecretKey::generate());
    let coins = net.coins();
    let watched = async {
        let mut wallet = support::Wallet::at(&address(2)).await;
        // What somebody else pays elsewhere is heard of here, and so is what is paid here.
        net.wallet(0).await.pay(&net.pay(&coins[0], &payee, 5)).await;
        let mut total = 0;
        while total < 5 {
            total = wallet.coins_of(&payee).await.total.units();
        }
        let here = net.pay(&coins[1], &payee, 6);
        assert_proved(&net, &wallet.pay(&here).await);
        assert_eq!(wallet.coins_of(&payee).await.total.units(), 11);
    };
    support::within("following", watched).await;
    observer.kill();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_time-db"))
        .arg("--data-dir")
        .arg(&data_dir)
        .args(["dump", "--tree", "votes"])
        .output()
        .unwrap();
    assert!(output.status.success() && output.stdout.is_empty(), "it never voted");
}

/// A question about a payment that is on its way does not make the node forget whom to
/// tell that it is final, whichever of the two it comes to first.
#[tokio::test]
async fn asking_at_once_does_not_lose_the_answer() {
    let net = TestNet::running(4);
    let first = net.coins().remove(0);
    let split = net.split(&first, 100);
    let mut wallet = net.wallet(0).await;
    wallet.pay(&split).await;
    let to = net.address(&SecretKey::generate());
    for coin in TestNet::outputs(&split, &first.key) {
        let payment = net.pay(&coin, &to, 1);
        wallet.broadcast(&payment).await;
        let query = time_masternode::net::TransactionStatusQuery { txid: payment.txid() };
        wallet.send(&time_masternode::net::NetworkMessage::TransactionStatusQuery(query)).await;
        wallet.status_of(payment.txid(), &[TransactionStatusKind::Finalized]).await;
    }
}
