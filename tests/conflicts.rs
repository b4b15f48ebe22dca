//! The same coin in two transactions, sent to two masternodes at the same moment, for a
//! thousand coins: on no node are both final, and all nodes agree which one is.
//!
//! A coin that neither transaction wins stays locked on every node: there is no time-out
//! release, and blocks, which settle such conflicts, are a chapter of their own.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use support::{Coin, TestNet, Wallet};
use time_masternode::limits::CONFLICT_WAIT_MS;
use time_masternode::net::{NetworkMessage, TransactionStatusKind};
use time_masternode::types::{SecretKey, Transaction, Txid, UTXOState};

const COINS_PER_WALLET: u64 = 250;

/// A thousand small coins out of the four first ones.
async fn small_coins(net: &TestNet) -> Vec<Coin> {
    let mut wallet = net.wallet(0).await;
    let mut coins = Vec::new();
    for first in net.coins() {
        let split = net.split(&first, COINS_PER_WALLET);
        wallet.pay(&split).await;
        coins.extend(TestNet::outputs(&split, &first.key));
    }
    for node in 1..4 {
        let mut wallet = net.wallet(node).await;
        for coin in &coins {
            while wallet.state(coin.outpoint).await != Some(UTXOState::Unspent) {}
        }
    }
    coins
}

/// Sends all of them and reads every first answer, so that nothing stands in a queue.
async fn send_all(mut wallet: Wallet, payments: Vec<Transaction>) -> BTreeMap<Txid, TransactionStatusKind> {
    for payment in &payments {
        wallet.broadcast(payment).await;
    }
    let mut answers = BTreeMap::new();
    while answers.len() < payments.len() {
        let next = support::within("an answer", wallet.client.next()).await.unwrap();
        match next {
            NetworkMessage::TransactionStatus(status) => {
                answers.entry(status.txid).or_insert(status.status);
            }
            NetworkMessage::Error(error) => panic!("{error:?}"),
            _ => {}
        }
    }
    answers
}

/// Waits until no node has committed anything for longer than members wait before they
/// vote to abort. Then nothing more can happen without blocks.
async fn until_quiet(net: &TestNet) {
    let commits = || -> Vec<serde_json::Value> { (0..4).map(|node| net.status(node)["commit"].clone()).collect() };
    support::within("quiet", async {
        let mut before = Vec::new();
        while before != commits() {
            before = commits();
            tokio::time::sleep(std::time::Duration::from_millis(2 * CONFLICT_WAIT_MS)).await;
        }
    })
    .await;
}

/// The state of each coin on one node.
async fn states(net: &TestNet, node: usize, coins: &[Coin]) -> Vec<UTXOState> {
    let mut wallet = net.wallet(node).await;
    let outpoints: Vec<_> = coins.iter().map(|coin| coin.outpoint).collect();
    wallet.states(&outpoints).await.into_iter().map(|entry| entry.state.unwrap()).collect()
}

/// Who has spent a coin, by the states of all nodes; panics if they disagree.
fn spender(states: &[UTXOState]) -> Option<Txid> {
    let spenders: BTreeSet<Txid> = states
        .iter()
        .filter(|state| matches!(state, UTXOState::SpentFinalized { .. }))
        .filter_map(UTXOState::txid)
        .collect();
    assert!(spenders.len() <= 1, "two transactions have spent one coin: {states:?}");
    spenders.into_iter().next()
}

#[tokio::test]
async fn of_two_transactions_on_one_coin_never_both_are_final() {
    let net = TestNet::running(4);
    let coins = small_coins(&net).await;
    assert_eq!(coins.len(), 1_000);
    let rivals: Vec<[Transaction; 2]> = coins
        .iter()
        .map(|coin| [1, 2].map(|units| net.pay(coin, &net.address(&SecretKey::generate()), units)))
        .collect();
    // Each pair goes to two different nodes; which two changes from coin to coin.
    let mut to_node: [Vec<Transaction>; 4] = Default::default();
    for (i, [a, b]) in rivals.iter().enumerate() {
        to_node[i % 4].push(a.clone());
        to_node[(i + 1 + i / 4 % 3) % 4].push(b.clone());
    }
    let mut sending = Vec::new();
    for (node, payments) in to_node.into_iter().enumerate() {
        sending.push(tokio::spawn(send_all(net.wallet(node).await, payments)));
    }
    let mut answers = Vec::new();
    for sent in sending {
        answers.push(sent.await.unwrap());
    }
    let accepted = answers.iter().flatten().filter(|(_, kind)| **kind != TransactionStatusKind::Rejected).count();
    assert!(accepted >= coins.len(), "at least one of each pair was accepted by somebody");

    until_quiet(&net).await;
    // What can become final does so on every node. The others stay locked everywhere: for
    // two transactions without a quorum, or for one that members have voted to abort
    // before they saw its certificate. Nothing below depends on when one looks.
    let settled = support::within("agreement", async {
        loop {
            let mut by_node = Vec::new();
            for node in 0..4 {
                by_node.push(states(&net, node, &coins).await);
            }
            let of_coin = |i: usize| -> Vec<UTXOState> { by_node.iter().map(|states| states[i]).collect() };
            let agreed = (0..coins.len()).all(|i| {
                let states = of_coin(i);
                let spent = spender(&states).is_some();
                states.iter().all(|state| match state {
                    UTXOState::SpentFinalized { .. } => spent,
                    UTXOState::Locked { .. } => !spent,
                    _ => false,
                })
            });
            if agreed {
                return (0..coins.len()).map(|i| spender(&of_coin(i))).collect::<Vec<_>>();
            }
        }
    })
    .await;

    let mut finals = BTreeSet::new();
    let mut wallets = Vec::new();
    for node in 0..4 {
        wallets.push(net.wallet(node).await);
    }
    for ([a, b], spender) in rivals.iter().zip(&settled) {
        for wallet in &mut wallets {
            for transaction in [a, b] {
                let status = wallet.query(transaction.txid()).await.status;
                let final_here = status == TransactionStatusKind::Finalized;
                if final_here {
                    finals.insert(transaction.txid());
                }
                // A transaction may have become final since; never both, and never another
                // than the one that some node has seen to be final.
                assert!(final_here || Some(transaction.txid()) != *spender, "{}: {status:?}", transaction.txid());
            }
        }
        let both = finals.contains(&a.txid()) && finals.contains(&b.txid());
        assert!(!both, "both {} and {} are final", a.txid(), b.txid());
    }
    let won = settled.iter().flatten().count();
    eprintln!("of 1,000 contested coins {won} were won by one transaction, {} by neither", 1_000 - won);
}
