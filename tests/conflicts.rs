//! The same coin in two transactions, sent to two masternodes at the same moment, for a
//! thousand coins: never both are final, all nodes agree which one is, and a coin that
//! neither wins is free again, by the chain and without an operator.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use support::{Coin, TestNet, Wallet};
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

/// So many of a wallet's payments wait for their first answer: fewer than a node that has much to
/// do refuses.
const UNANSWERED: usize = 48;

/// Sends all of them and reads every first answer, so that nothing stands in a queue.
async fn send_all(mut wallet: Wallet, payments: Vec<Transaction>) -> BTreeMap<Txid, TransactionStatusKind> {
    let (mut sent, mut answers) = (0, BTreeMap::new());
    while answers.len() < payments.len() {
        if sent < payments.len() && sent - answers.len() < UNANSWERED {
            wallet.broadcast(&payments[sent]).await;
            sent += 1;
            continue;
        }
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

/// The state of each coin on one node.
async fn states(net: &TestNet, node: usize, coins: &[Coin]) -> Vec<UTXOState> {
    let mut wallet = net.wallet(node).await;
    let outpoints: Vec<_> = coins.iter().map(|coin| coin.outpoint).collect();
    wallet.states(&outpoints).await.into_iter().map(|entry| entry.state.unwrap()).collect()
}

/// Waits until every coin is spent in the chain or free again, the same on every node;
/// gives who has spent each.
async fn settled(net: &TestNet, coins: &[Coin]) -> Vec<Option<Txid>> {
    support::within("every coin to be free or spent", async {
        loop {
            let mut by_node = Vec::new();
            for node in 0..4 {
                by_node.push(states(net, node, coins).await);
            }
            let of_coin = |i: usize| -> BTreeSet<Option<Txid>> {
                let spender = |state: &UTXOState| match state {
                    UTXOState::Unspent => Some(None),
                    UTXOState::Confirmed { txid, .. } => Some(Some(*txid)),
                    UTXOState::Locked { .. } | UTXOState::SpentFinalized { .. } => None,
                };
                by_node.iter().filter_map(|states| spender(&states[i])).collect()
            };
            let ended =
                by_node.iter().flatten().all(|state| matches!(state, UTXOState::Unspent | UTXOState::Confirmed { .. }));
            let agreed: Vec<_> = (0..coins.len()).map(of_coin).collect();
            if ended && agreed.iter().all(|spenders| spenders.len() == 1) {
                return agreed.into_iter().filter_map(|spenders| spenders.into_iter().next()).collect();
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    })
    .await
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

    let settled = settled(&net, &coins).await;
    let mut again = Vec::new();
    let mut wallets = Vec::new();
    for node in 0..4 {
        wallets.push(net.wallet(node).await);
    }
    for (i, ([a, b], spender)) in rivals.iter().zip(&settled).enumerate() {
        for wallet in &mut wallets {
            for txid in [a.txid(), b.txid()] {
                let status = wallet.query(txid).await.status;
                let expected: &[_] = match spender {
                    Some(winner) if *winner == txid => &[TransactionStatusKind::Confirmed],
                    // Whoever had not locked it before the winner knows nothing of it.
                    _ => &[TransactionStatusKind::Aborted, TransactionStatusKind::Unknown],
                };
                assert!(expected.contains(&status), "{txid}: {status:?}, and {spender:?} has won");
            }
        }
        if spender.is_none() {
            let third = net.pay(&coins[i], &net.address(&SecretKey::generate()), 3);
            wallets[i % 4].pay(&third).await;
            again.push((coins[i].clone(), third.txid()));
        }
    }
    let won = coins.len() - again.len();
    eprintln!("of {} contested coins {won} were won by one transaction, {} by neither", coins.len(), again.len());
    // What neither has won was spent by a third transaction, without anybody's help.
    let (free, thirds): (Vec<Coin>, Vec<Txid>) = again.into_iter().unzip();
    let spenders = support::within("the third ones", async {
        loop {
            let spenders: Vec<Txid> = self::settled(&net, &free).await.into_iter().flatten().collect();
            if spenders.len() == thirds.len() {
                return spenders;
            }
        }
    });
    assert_eq!(spenders.await, thirds);
}
