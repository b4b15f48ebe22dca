//! The node inside somebody else's program, by the names of the quick start:
//! `UTXOStateManager`, `PeerManager`, `MasternodeUTXOIntegration`, and what they promise.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use std::net::SocketAddr;

use support::{TestNet, Wallet, within};
use time_masternode::config::{Options, Settings};
use time_masternode::net::{
    NetworkMessage, TransactionStatusKind, UTXOStateNotification, UTXOStateNotificationMessage, UTXOStateQuery,
};
use time_masternode::node::{MasternodeUTXOIntegration, NodeError};
use time_masternode::types::UTXOState;

/// A node of the network, in this process.
async fn embedded(net: &TestNet, node: usize) -> MasternodeUTXOIntegration {
    let config = net.directory().join(&net.devnet.nodes[node].config_file);
    let node = Settings::try_from(Options::read(&config).unwrap()).unwrap().open().unwrap();
    node.initialize().await.unwrap();
    node
}

fn local() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_node_processes_answers_and_stops() {
    let net = TestNet::new(1);
    let node = embedded(&net, 0).await;
    let coin = net.coins().remove(0);
    let payment = net.pay(&coin, &net.address(&coin.key), 5);
    let status = node.process_transaction(&payment.to_raw()).await.unwrap();
    assert!(status.status == TransactionStatusKind::Pending || status.status.is_final());
    let mut wallet = net.wallet(0).await;
    wallet.until_final(payment.txid()).await;
    let again = net.pay(&coin, &net.address(&coin.key), 6);
    match node.process_transaction(&again.to_raw()).await {
        Err(NodeError::Rejected(rejection)) => assert_eq!(rejection.code, "InputSpent"),
        other => panic!("{other:?}"),
    }
    let query = NetworkMessage::UTXOStateQuery(UTXOStateQuery { outpoints: vec![coin.outpoint.to_string()] });
    match node.handle_network_message(&query, local()).await.unwrap() {
        Some(NetworkMessage::UTXOStateResponse(response)) => {
            assert!(matches!(
                response.states[0].state,
                Some(UTXOState::SpentFinalized { .. } | UTXOState::Confirmed { .. })
            ));
        }
        other => panic!("{other:?}"),
    }
    let status = NetworkMessage::Status(time_masternode::net::Status { height: 0, in_flight: Vec::new() });
    let refused = node.handle_network_message(&status, local()).await.unwrap();
    assert!(matches!(refused, Some(NetworkMessage::Error(_))), "{refused:?}");
    let stats = node.stats().unwrap();
    assert_eq!((stats.finalized, stats.in_flight), (1, 0));
    node.shutdown().await;
    assert_eq!(node.stopped().await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_peer_manager_sends_and_routes() {
    let net = TestNet::new(2);
    let (first, second) = (embedded(&net, 0).await, embedded(&net, 1).await);
    let connected = async {
        let mut changed = first.peers().members_changed();
        while first.peers().connected_members().is_empty() {
            changed.changed().await.unwrap();
        }
    };
    within("the two find each other", connected).await;
    let before = first.peers().connections();
    let mut wallet: Wallet = net.wallet(0).await;
    let (outpoint, output) = net.genesis.transaction().creates().next().unwrap();
    assert_eq!(wallet.state(outpoint).await, Some(UTXOState::Unspent));
    // The wallet's is among the new ones; the two members may still be choosing theirs.
    let new: Vec<_> = first.peers().connections().into_iter().filter(|id| !before.contains(id)).collect();
    let notification = UTXOStateNotificationMessage {
        sequence: 7,
        notification: UTXOStateNotification {
            outpoint,
            output,
            old_state: None,
            new_state: UTXOState::Unspent,
            timestamp: 8,
            originator: "masternode-1".into(),
        },
    };
    let mut sent = 0;
    for peer in &new {
        sent += usize::from(first.peers().send_utxo_notification_to_peer(*peer, notification.clone()).await.is_ok());
    }
    assert!(sent >= 1);
    let heard = wallet.wait_for("the notification", |message| match message {
        NetworkMessage::UTXOStateNotification(heard) => Some(heard),
        _ => None,
    });
    assert_eq!(heard.await, notification);
    // A message that is routed by hand is answered on the wallet's connection.
    let query = NetworkMessage::UTXOStateQuery(UTXOStateQuery { outpoints: vec![outpoint.to_string()] });
    for peer in &new {
        let _routed = first.peers().handle_utxo_message(*peer, query.clone()).await.is_ok();
    }
    let states = wallet.wait_for("the answer", |message| match message {
        NetworkMessage::UTXOStateResponse(response) => Some(response.states),
        _ => None,
    });
    assert_eq!(states.await[0].output, Some(output));
    // Members take a notification for what it is, somebody's word, and stay connected.
    first.peers().broadcast_utxo_notification(notification);
    let coin = net.coins().remove(0);
    let payment = net.pay(&coin, &net.address(&coin.key), 5);
    assert_eq!(wallet.pay(&payment).await.commits, 2);
    assert_eq!(second.stats().unwrap().connected_members, 1);
    drop(wallet);
    first.shutdown().await;
    second.shutdown().await;
    let gone = first.peers().send_utxo_notification_to_peer(
        new[0],
        UTXOStateNotificationMessage {
            sequence: 1,
            notification: UTXOStateNotification {
                outpoint,
                output,
                old_state: None,
                new_state: UTXOState::Unspent,
                timestamp: 1,
                originator: String::new(),
            },
        },
    );
    assert!(gone.await.is_err());
}
