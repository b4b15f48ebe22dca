//! Makes the coins of a run: through the network, and final on every node before the load
//! begins.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures_util::future::try_join_all;
use time_masternode::limits::MAX_UTXOS_PER_PAGE;
use time_masternode::net::{AddressQuery, NetworkMessage, TransactionStatusKind, WalletClient};
use time_masternode::types::{Address, OutPoint, Output, SecretKey, Transaction, Txid, UTXOState};
use tokio::time::timeout;

use super::funding::{Coin, split};
use super::network::Network;
use super::report::remark;

/// Transactions of the tree that are on their way at once.
const WINDOW: usize = 16;
/// How long the network may take for the next of them.
const STALLED: Duration = Duration::from_secs(60);
/// Pages of coins that are looked at to find the largest.
const MAX_PAGES: usize = 64;

/// What preparing took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Prepared {
    pub coins: usize,
    pub transactions: usize,
}

/// The largest coin of the devnet's funded wallets that can be spent.
async fn largest_coin(network: &Network, client: &mut WalletClient) -> anyhow::Result<Coin> {
    let mut largest: Option<Coin> = None;
    for wallet in &network.devnet.wallets {
        let key = SecretKey::from_hex(&wallet.secret_seed).context("a wallet of the devnet has no good seed")?;
        let address = Address::of_key(&key.public_key(), network.genesis.network()).to_string();
        let mut after = None;
        for _ in 0..MAX_PAGES {
            let limit = u32::try_from(MAX_UTXOS_PER_PAGE).unwrap_or(u32::MAX);
            let query = AddressQuery { addresses: vec![address.clone()], after, limit };
            client.send(&NetworkMessage::AddressQuery(query)).await?;
            let page = client
                .wait_for(|message| match message {
                    NetworkMessage::AddressResponse(page) => Some(page),
                    _ => None,
                })
                .await?;
            for utxo in page.utxos.iter().filter(|utxo| utxo.state == UTXOState::Unspent) {
                if largest.as_ref().is_none_or(|largest| largest.amount < utxo.output.amount) {
                    largest = Some(Coin { outpoint: utxo.outpoint, amount: utxo.output.amount, key: key.clone() });
                }
            }
            after = page.next;
            if after.is_none() {
                break;
            }
        }
    }
    largest.context("the devnet's wallets have no coin that can be spent")
}

/// Makes these coins.
pub async fn prepare(network: &Network, leaves: &[Output]) -> anyhow::Result<(Vec<OutPoint>, Prepared)> {
    let addresses = network.devnet.nodes.iter().map(|node| &node.websocket_address);
    let mut clients = Vec::new();
    for address in addresses {
        clients.push(WalletClient::connect(address).await.with_context(|| format!("connecting to {address}"))?);
    }
    let first = clients.first_mut().context("the devnet has no nodes")?;
    let source = timeout(STALLED, largest_coin(network, first)).await.context("a query takes too long")??;
    let funding = split(&network.genesis, &source, leaves)?;
    let transactions = funding.levels.iter().map(Vec::len).sum();
    remark(&format!("making {} coins by {transactions} transactions", leaves.len()));
    for level in &funding.levels {
        // Each node is sent all of them, and says itself when they are final there.
        try_join_all(clients.iter_mut().map(|client| settle(client, level))).await?;
    }
    Ok((funding.coins, Prepared { coins: leaves.len(), transactions }))
}

/// Sends transactions to one node, a few at a time, until all are final there.
async fn settle(client: &mut WalletClient, transactions: &[Transaction]) -> anyhow::Result<()> {
    let mut to_send = transactions.iter();
    let mut open = std::collections::BTreeSet::<Txid>::new();
    loop {
        while open.len() < WINDOW {
            let Some(transaction) = to_send.next() else { break };
            client.send(&NetworkMessage::TransactionBroadcast(transaction.to_raw())).await?;
            open.insert(transaction.txid());
        }
        if open.is_empty() {
            return Ok(());
        }
        let next = timeout(STALLED, client.next()).await.context("making the coins does not move on")??;
        match next {
            NetworkMessage::TransactionStatus(status) => match status.status {
                TransactionStatusKind::Finalized | TransactionStatusKind::Confirmed => {
                    open.remove(&status.txid);
                }
                TransactionStatusKind::Pending | TransactionStatusKind::Unknown => {}
                TransactionStatusKind::Rejected | TransactionStatusKind::Aborted => {
                    let why = status.rejection.map_or_else(String::new, |rejection| rejection.message);
                    bail!("making the coins: {} is {:?}: {why}", status.txid, status.status);
                }
            },
            NetworkMessage::Error(error) => ensure!(false, "making the coins: {:?}: {}", error.code, error.message),
            _ => {}
        }
    }
}
