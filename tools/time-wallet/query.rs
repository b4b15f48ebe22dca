//! Questions to a node: coins, parents, statuses.
//!
//! What comes back is the node's word. Parents are hashed before they are returned; coins
//! and statuses are for the caller to check or to present as what the node says.

use std::collections::{BTreeMap, BTreeSet};

use time_masternode::limits::MAX_UTXOS_PER_PAGE;
use time_masternode::net::{AddressQuery, GetTransactions, NetworkMessage, TransactionStatus, TransactionStatusQuery};
use time_masternode::types::{Address, Genesis, OutPoint, Transaction, Txid, UtxoEntry};

use super::client::{Client, ClientError};
use super::coins::{CoinsError, check_parent};

/// Coins that this wallet is willing to hold in memory.
const MAX_COINS: usize = 1_000_000;
/// Parents that are asked for at once.
const PARENTS_PER_REQUEST: usize = 64;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The connection, or the node's refusal.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A forged parent.
    #[error(transparent)]
    Coins(#[from] CoinsError),
    /// A page that brings nothing and is not the last.
    #[error("the node's pages have no end")]
    EndlessPages,
    /// More coins than this wallet can hold.
    #[error("the address has more than {MAX_COINS} coins, more than this wallet can hold")]
    TooManyCoins,
}

impl QueryError {
    /// Whether something was refused or found false, as opposed to not done.
    pub const fn is_refusal(&self) -> bool {
        match self {
            Self::Client(error) => error.is_refusal(),
            Self::Coins(_) => true,
            Self::EndlessPages | Self::TooManyCoins => false,
        }
    }
}

/// Every live output of an address, as the node has them.
pub async fn live_coins(client: &mut Client, address: Address) -> Result<Vec<UtxoEntry>, QueryError> {
    let mut coins: BTreeMap<OutPoint, UtxoEntry> = BTreeMap::new();
    let mut after = None;
    loop {
        let request = NetworkMessage::AddressQuery(AddressQuery {
            addresses: vec![address.to_string()],
            after: after.clone(),
            limit: u32::try_from(MAX_UTXOS_PER_PAGE).unwrap_or(u32::MAX),
        });
        let wanted = |message| match message {
            NetworkMessage::AddressResponse(page) => Some(page),
            _ => None,
        };
        let page = client.ask(&request, wanted).await?;
        let before = coins.len();
        coins
            .extend(page.utxos.iter().filter(|coin| coin.output.address == address).map(|coin| (coin.outpoint, *coin)));
        if coins.len() > MAX_COINS {
            return Err(QueryError::TooManyCoins);
        }
        match page.next {
            None => return Ok(coins.into_values().collect()),
            Some(next) if coins.len() == before || after.as_ref() == Some(&next) => {
                return Err(QueryError::EndlessPages);
            }
            next => after = next,
        }
    }
}

/// Fetches transactions and hashes them. Unknown ones are left out, as are blocks' hashes,
/// under which fees stand: they are no transactions.
pub async fn parents(
    client: &mut Client,
    genesis: &Genesis,
    txids: BTreeSet<Txid>,
) -> Result<BTreeMap<Txid, Transaction>, QueryError> {
    let mut found = BTreeMap::new();
    let mut wanted: Vec<Txid> = txids.into_iter().collect();
    if let Some(position) = wanted.iter().position(|txid| *txid == genesis.transaction().txid()) {
        found.insert(wanted.remove(position), genesis.transaction().clone());
    }
    while !wanted.is_empty() {
        let chunk: Vec<Txid> = wanted.iter().take(PARENTS_PER_REQUEST).copied().collect();
        let request = NetworkMessage::GetTransactions(GetTransactions { txids: chunk.clone(), bodies_only: true });
        let answer = client
            .ask(&request, |message| match message {
                NetworkMessage::Transactions(answer) => Some(answer.transactions),
                _ => None,
            })
            .await?;
        let mut arrived = BTreeSet::new();
        for body in answer.into_iter().map(|entry| entry.transaction).filter(|body| chunk.contains(&body.txid)) {
            let txid = body.txid;
            found.insert(txid, check_parent(body, txid, genesis)?);
            arrived.insert(txid);
        }
        // An answer is cut at a size, so what is missing is asked for again; an answer
        // without any of them says that the rest of this chunk is unknown.
        wanted.retain(|txid| if arrived.is_empty() { !chunk.contains(txid) } else { !arrived.contains(txid) });
    }
    Ok(found)
}

/// Where a transaction stands, as the node says.
pub async fn status(client: &mut Client, txid: Txid) -> Result<TransactionStatus, QueryError> {
    let request = NetworkMessage::TransactionStatusQuery(TransactionStatusQuery { txid });
    let wanted = |message| match message {
        NetworkMessage::TransactionStatus(status) if status.txid == txid => Some(*status),
        _ => None,
    };
    Ok(client.ask(&request, wanted).await?)
}
