//! Answers messages: the way from the wire to the ledger, and the wallets' questions.
//!
//! Wire types become domain types here; cheap rules come first, and whatever is signed
//! goes through the verify pool. Nothing here changes the ledger.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::feed::Feed;
use super::input::{Input, Work};
use super::state_manager::UTXOStateManager;
use super::status::StatusHub;
use super::sync::FinalizedSync;
use super::verify::VerifyPool;
use crate::consensus::{
    Event, MemberBatch, MemberIndex, Rejection, Signable, SignedTransaction, Source, Utxo, VoteBatch, VoteKind,
    check_form,
};
use crate::db::{DatabaseError, Durable, Reader};
use crate::limits::{
    MAX_ADDRESSES_PER_QUERY, MAX_CONCURRENT_READS, MAX_OUTPOINTS_PER_QUERY, MAX_PAGE_BYTES, MAX_TRANSACTION_BYTES,
    MAX_TRANSACTIONS_PER_REQUEST, MAX_UTXOS_PER_PAGE,
};
use crate::net::{
    AddressQuery, AddressResponse, CertifiedTransaction, Closed, Connection, ErrorCode, ErrorMessage, GetTransactions,
    Handler, Handling, Incoming, NetworkMessage, RequestId, StateEntry, TransactionStatusKind, Transactions,
    UTXOStateQuery, UTXOStateResponse,
};
use crate::types::{Address, Network, OutPoint, RawTransaction, Transaction, Txid};

/// Takes every message of every connection.
#[derive(Debug)]
pub struct UTXOProtocolHandler {
    pub(super) ledger: Arc<UTXOStateManager>,
    pub(super) statuses: Arc<StatusHub>,
    pub(super) feed: Arc<Feed>,
    pub(super) pool: VerifyPool,
    pub(super) sync: FinalizedSync,
    reads: Arc<Semaphore>,
    member_reads: Arc<Semaphore>,
}

/// A refusal on its way to the peer.
pub(super) type Refusal = ErrorMessage;

pub(super) fn refusal(code: ErrorCode, message: impl Into<String>) -> Refusal {
    ErrorMessage::new(code, message)
}

fn too_many(what: &str, limit: usize) -> Refusal {
    refusal(ErrorCode::TooLarge, format!("at most {limit} {what}"))
}

pub(super) fn internal(error: impl std::fmt::Display) -> Refusal {
    tracing::error!(%error, "a request failed");
    refusal(ErrorCode::Internal, "the node could not read its database")
}

fn not_authorized() -> Refusal {
    refusal(ErrorCode::NotAuthorized, "only authenticated members may send this")
}

impl Handler for UTXOProtocolHandler {
    fn connected(&self, connection: &Arc<Connection>) {
        if let Some(member) = connection.member() {
            self.ledger.tell(Input::Event(Event::Connected(member)));
            self.sync.came(member, connection.id());
        }
    }

    /// While the door is shut: most of what a payment costs is to read it.
    fn turns_payments_away(&self) -> Option<ErrorMessage> {
        (!self.pool.lets_in()).then(busy)
    }

    fn handle<'a>(&'a self, connection: &'a Arc<Connection>, incoming: Incoming, bytes: usize) -> Handling<'a> {
        Box::pin(async move {
            let request_id = incoming.request_id.clone();
            let answered = match self.dispatch(connection, incoming, bytes).await {
                Ok(Some(answer)) => connection.answer(&answer.into_inner(), request_id.as_deref()).await,
                Ok(None) => Ok(()),
                Err(refused) => connection.refuse(ErrorMessage { request_id, ..refused }).await,
            };
            if answered == Err(Closed) {
                tracing::trace!("a connection closed before its answer");
            }
        })
    }

    fn disconnected(&self, connection: &Arc<Connection>) {
        self.statuses.forget(connection.id());
        if let Some(member) = connection.member()
            && self.sync.lost(member, connection.id())
        {
            self.ledger.tell(Input::Event(Event::Disconnected(member)));
        }
    }
}

impl UTXOProtocolHandler {
    pub(super) fn new(
        ledger: Arc<UTXOStateManager>,
        statuses: Arc<StatusHub>,
        feed: Arc<Feed>,
        pool: VerifyPool,
    ) -> Self {
        let sync = FinalizedSync::new(Arc::clone(ledger.committee()));
        let reads = || Arc::new(Semaphore::new(MAX_CONCURRENT_READS));
        Self { ledger, statuses, feed, pool, sync, reads: reads(), member_reads: reads() }
    }

    async fn dispatch(
        &self,
        connection: &Arc<Connection>,
        incoming: Incoming,
        bytes: usize,
    ) -> Result<Option<Durable<NetworkMessage>>, Refusal> {
        let request_id = incoming.request_id;
        match incoming.message {
            NetworkMessage::TransactionBroadcast(raw) => {
                self.transaction(connection, raw, bytes, request_id).await.map(|()| None)
            }
            NetworkMessage::Votes(batch) => self.votes(connection, batch).await.map(|()| None),
            NetworkMessage::Transactions(Transactions { transactions }) => {
                let member = connection.member().ok_or_else(not_authorized)?;
                self.certified(connection, member, transactions).await.map(|()| None)
            }
            NetworkMessage::Finalized(page) => {
                let member = connection.member().ok_or_else(not_authorized)?;
                self.finalized_page(connection, member, page).await.map(|()| None)
            }
            NetworkMessage::Status(status) => {
                let member = connection.member().ok_or_else(not_authorized)?;
                self.peer_status(connection, member, status).await.map(|()| None)
            }
            NetworkMessage::TransactionRejected(advice) => {
                connection.member().ok_or_else(not_authorized)?;
                tracing::debug!(txid = %advice.txid, code = advice.rejection.code, "a member refused a transaction");
                Ok(None)
            }
            NetworkMessage::TransactionStatusQuery(query) => {
                self.status_query(connection, query.txid, request_id).map(|()| None)
            }
            NetworkMessage::GetTransactions(query) => self.get_transactions(connection, query).await.map(Some),
            NetworkMessage::GetFinalized(query) => self.get_finalized(connection, query).await.map(Some),
            NetworkMessage::UTXOStateQuery(query) => self.state_query(connection, query).await.map(Some),
            NetworkMessage::AddressQuery(query) => self.address_query(connection, query).await.map(Some),
            NetworkMessage::UTXOSubscribe(request) => {
                self.subscribe(connection, request, request_id).await.map(|()| None)
            }
            NetworkMessage::UTXOUnsubscribe(request) => self.unsubscribe(connection, request).await.map(Some),
            NetworkMessage::Hello(_) | NetworkMessage::Authenticate(_) => {
                Err(refusal(ErrorCode::Malformed, "the handshake is over, or there is none on this connection"))
            }
            NetworkMessage::GetBlocks(query) => self.get_blocks(connection, query).await.map(Some),
            NetworkMessage::Blocks(blocks) => {
                let member = connection.member().ok_or_else(not_authorized)?;
                self.blocks(connection, member, blocks).await.map(|()| None)
            }
            NetworkMessage::GetFence(query) => {
                connection.member().ok_or_else(not_authorized)?;
                self.get_fence(connection, query).await.map(Some)
            }
            NetworkMessage::Fence(page) => {
                let from = connection.member().ok_or_else(not_authorized)?;
                self.fence_page(connection, from, page).await.map(|()| None)
            }
            NetworkMessage::Consensus(message) => {
                let from = connection.member().ok_or_else(not_authorized)?;
                let passed = self.pool.pass_for_member(Event::Consensus { from, message }, connection).await;
                passed.map(|()| None).map_err(|_| busy())
            }
            NetworkMessage::Error(error) => {
                if let (ErrorCode::DuplicateIdentity, Some(member)) = (error.code, connection.member()) {
                    self.ledger.tell(Input::Event(Event::Twin(member)));
                }
                tracing::debug!(code = ?error.code, message = error.message, "a peer refused something");
                Ok(None)
            }
            // Answers that nobody asked for.
            _ => Ok(None),
        }
    }

    /// Reads the database off the runtime's threads, for an answer to this connection; what
    /// was read is durable. Members do not wait for what wallets ask.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        connection: &Connection,
        read: impl FnOnce(&Reader) -> Result<T, DatabaseError> + Send + 'static,
    ) -> Result<Durable<T>, Refusal> {
        self.look(connection, |reader| reader.read(read)).await
    }

    /// The same for what does not leave the node, and need not be durable.
    pub(super) async fn peek<T: Send + 'static>(
        &self,
        connection: &Connection,
        peek: impl FnOnce(&Reader) -> Result<T, DatabaseError> + Send + 'static,
    ) -> Result<T, Refusal> {
        self.look_with(self.places(connection), peek).await
    }

    /// The same for what is read as of a durable commit, and need not wait for the next one.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        connection: &Connection,
        look: impl FnOnce(&Reader) -> Result<Durable<T>, DatabaseError> + Send + 'static,
    ) -> Result<Durable<T>, Refusal> {
        self.look_with(self.places(connection), look).await
    }

    fn places(&self, connection: &Connection) -> &Arc<Semaphore> {
        if connection.member().is_some() { &self.member_reads } else { &self.reads }
    }

    /// The same for the node's own housekeeping.
    pub(super) async fn read_for_house<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Reader) -> Result<T, DatabaseError> + Send + 'static,
    ) -> Result<Durable<T>, Refusal> {
        self.look_with(&self.member_reads, |reader| reader.read(read)).await
    }

    async fn look_with<T: Send + 'static>(
        &self,
        places: &Arc<Semaphore>,
        look: impl FnOnce(&Reader) -> Result<T, DatabaseError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let permit = Arc::clone(places).acquire_owned().await.map_err(internal)?;
        let reader = self.ledger.reader().clone();
        let done = tokio::task::spawn_blocking(move || {
            let result = look(&reader);
            drop(permit);
            result
        });
        done.await.map_err(internal)?.map_err(internal)
    }

    async fn transaction(
        &self,
        connection: &Arc<Connection>,
        raw: RawTransaction,
        bytes: usize,
        request_id: Option<RequestId>,
    ) -> Result<(), Refusal> {
        let txid = raw.txid;
        // An unknown version is named first: its limits are not known either.
        let known = raw.version == Transaction::VERSION;
        let size = if known && bytes > MAX_TRANSACTION_BYTES { Err(Rejection::TooLarge) } else { Ok(()) };
        let formed = size.and_then(|()| check_form(raw, &self.ledger.rules()));
        if let Some(member) = connection.member() {
            let Ok(transaction) = formed else { return Ok(()) };
            let signed = Signable::Transaction(self.signed(transaction));
            let submitted = self.pool.submit_for_member(signed, Source::Member(member), connection).await;
            return submitted.map_err(|_| busy());
        }
        let transaction = match formed {
            Ok(transaction) => transaction,
            Err(rejection) => {
                let refused = self.statuses.plain(txid, TransactionStatusKind::Rejected, Some((&rejection).into()));
                return connection.answer(&refused, request_id.as_deref()).await.or(Ok(()));
            }
        };
        let ticket = self.statuses.open(connection, request_id, Some(txid)).ok_or_else(busy)?;
        let signed = Signable::Transaction(self.signed(transaction));
        self.pool.submit(signed, Source::Wallet(ticket), connection).map_err(|_| {
            self.statuses.cancel(ticket, txid);
            busy()
        })
    }

    fn signed(&self, transaction: Transaction) -> SignedTransaction {
        SignedTransaction::new(transaction, *self.ledger.committee().genesis_hash())
    }

    async fn votes(&self, connection: &Arc<Connection>, batch: Arc<VoteBatch>) -> Result<(), Refusal> {
        connection.member().ok_or_else(not_authorized)?;
        let batch = Arc::unwrap_or_clone(batch);
        let batch = MemberBatch::new(batch, self.ledger.committee()).map_err(|error| {
            let code = match error {
                crate::consensus::VoteError::NotMember => ErrorCode::NotMember,
                _ => ErrorCode::Malformed,
            };
            refusal(code, error.to_string())
        })?;
        if self.decides_nothing(batch.wire()) {
            return Ok(());
        }
        let submitted = self.pool.submit_for_member(Signable::Votes(batch), Source::Answer, connection).await;
        submitted.map_err(|_| busy())
    }

    /// Whether all votes of a batch are on what is settled here, as those are that come when the
    /// quorum is full. The machine would pass over them, so their signature is not checked. What is
    /// signed with this member's own key is another matter: it may be a vote that was lost.
    fn decides_nothing(&self, batch: &VoteBatch) -> bool {
        let is_own = self.ledger.reader().network().public_key == Some(batch.voter);
        !is_own && self.ledger.health().are_settled(batch.votes.iter().map(|v| &v.txid))
    }

    /// Bodies with certificates, asked for or not. Each part is checked for itself; what
    /// this node has settled already is passed over.
    pub(super) async fn certified(
        &self,
        connection: &Arc<Connection>,
        _: MemberIndex,
        entries: Vec<CertifiedTransaction>,
    ) -> Result<(), Refusal> {
        let txids: Vec<Txid> = entries.iter().map(|entry| entry.transaction.txid).collect();
        let settled = self
            .peek(connection, move |reader| {
                txids.iter().map(|txid| reader.is_final(txid)).collect::<Result<Vec<_>, _>>()
            })
            .await?;
        for (entry, settled) in entries.into_iter().zip(settled) {
            if settled {
                continue;
            }
            let txid = entry.transaction.txid;
            let transaction = check_form(entry.transaction, &self.ledger.rules())
                .map_err(|rejection| refusal(ErrorCode::Malformed, format!("{txid}: {rejection}")))?;
            let signed = Signable::Transaction(self.signed(transaction));
            self.pool.submit_for_member(signed, Source::Answer, connection).await.map_err(|_| busy())?;
            let Some(certificate) = entry.certificate else { continue };
            if certificate.txid != txid {
                return Err(refusal(ErrorCode::Malformed, "a certificate of another transaction"));
            }
            let certificate = certificate
                .check(self.ledger.committee())
                .map_err(|error| refusal(ErrorCode::Malformed, error.to_string()))?;
            let certificate = Signable::Certificate(certificate);
            self.pool.submit_for_member(certificate, Source::Answer, connection).await.map_err(|_| busy())?;
        }
        Ok(())
    }

    fn status_query(
        &self,
        connection: &Arc<Connection>,
        txid: Txid,
        request_id: Option<RequestId>,
    ) -> Result<(), Refusal> {
        let place = self.pool.place().map_err(|_| busy())?;
        let ticket = self.statuses.open(connection, request_id, None).ok_or_else(busy)?;
        let work = Work { input: Input::Query { txid, ticket }, place: Some(place) };
        self.ledger.inputs().wallets.send(work).map_err(|_| {
            self.statuses.cancel(ticket, txid);
            busy()
        })
    }

    async fn get_transactions(
        &self,
        connection: &Connection,
        query: GetTransactions,
    ) -> Result<Durable<NetworkMessage>, Refusal> {
        let GetTransactions { txids, bodies_only } = query;
        if txids.len() > MAX_TRANSACTIONS_PER_REQUEST {
            return Err(too_many("transactions", MAX_TRANSACTIONS_PER_REQUEST));
        }
        let genesis = self.ledger.genesis().transaction().clone();
        let read = move |reader: &Reader| {
            let (mut transactions, mut bytes) = (Vec::new(), 0);
            for txid in txids {
                let found = if txid == genesis.txid() {
                    vec![CertifiedTransaction { transaction: genesis.to_raw(), certificate: None }]
                } else if bodies_only {
                    let body = transaction_body(reader, &txid)?;
                    let entry =
                        |body: Arc<Transaction>| CertifiedTransaction { transaction: body.to_raw(), certificate: None };
                    body.map(entry).into_iter().collect()
                } else {
                    transaction_entries(reader, &txid)?
                };
                bytes += found.iter().map(entry_bytes).sum::<usize>();
                if bytes > MAX_PAGE_BYTES && !transactions.is_empty() {
                    break;
                }
                transactions.extend(found);
            }
            Ok(NetworkMessage::Transactions(Transactions { transactions }))
        };
        self.read(connection, read).await
    }

    async fn state_query(
        &self,
        connection: &Connection,
        query: UTXOStateQuery,
    ) -> Result<Durable<NetworkMessage>, Refusal> {
        if query.outpoints.len() > MAX_OUTPOINTS_PER_QUERY {
            return Err(too_many("outpoints", MAX_OUTPOINTS_PER_QUERY));
        }
        let outpoints = parse_outpoints(&query.outpoints)?;
        if let Some(states) = self.ledger.reader().recent_states(&outpoints) {
            return Ok(states.map(|states| state_response(outpoints, states)));
        }
        let look = move |reader: &Reader| {
            let states = reader.states(&outpoints)?;
            Ok(states.map(|states| state_response(outpoints, states)))
        };
        self.look(connection, look).await
    }

    async fn address_query(
        &self,
        connection: &Connection,
        query: AddressQuery,
    ) -> Result<Durable<NetworkMessage>, Refusal> {
        if query.addresses.len() > MAX_ADDRESSES_PER_QUERY {
            return Err(too_many("addresses", MAX_ADDRESSES_PER_QUERY));
        }
        let addresses = parse_addresses(&query.addresses, self.ledger.rules().network)?;
        let after = query.after.as_deref().map(parse_outpoint).transpose()?;
        let limit = (query.limit as usize).clamp(1, MAX_UTXOS_PER_PAGE);
        let look = move |reader: &Reader| {
            let page = reader.address_page(&addresses, after, limit)?;
            Ok(page.map(|page| {
                NetworkMessage::AddressResponse(AddressResponse {
                    utxos: page.utxos,
                    total: page.total,
                    next: page.next.map(|outpoint| outpoint.to_string()),
                    sequence: page.sequence,
                })
            }))
        };
        self.look(connection, look).await
    }
}

fn state_response(outpoints: Vec<OutPoint>, states: Vec<Option<Utxo>>) -> NetworkMessage {
    let entry = |(outpoint, utxo): (OutPoint, Option<Utxo>)| {
        let (output, state) = (utxo.map(|u| u.output), utxo.map(|u| u.state));
        StateEntry { outpoint, output, state }
    };
    let states = outpoints.into_iter().zip(states).map(entry).collect();
    NetworkMessage::UTXOStateResponse(UTXOStateResponse { states })
}

pub(super) fn busy() -> Refusal {
    refusal(ErrorCode::Busy, "the node is busy; nothing was done, send it again later")
}

/// A body with F, else C, else A; and with A once more, where there is one beside C: a
/// block may abort what a quorum approved.
fn transaction_entries(reader: &Reader, txid: &Txid) -> Result<Vec<CertifiedTransaction>, DatabaseError> {
    let Some(first) = transaction_entry(reader, txid)? else { return Ok(Vec::new()) };
    let only_approved = first.certificate.as_ref().is_some_and(|certificate| certificate.kind == VoteKind::Approve);
    let abort = if only_approved { reader.certificate(txid, VoteKind::Abort)? } else { None };
    let second =
        abort.map(|abort| CertifiedTransaction { certificate: Some(Arc::unwrap_or_clone(abort)), ..first.clone() });
    Ok(std::iter::once(first).chain(second).collect())
}

/// The body of what is settled or in flight.
fn transaction_body(reader: &Reader, txid: &Txid) -> Result<Option<Arc<Transaction>>, DatabaseError> {
    let mut transaction = reader.body(txid)?;
    if transaction.is_none() {
        transaction = reader.in_flight(txid)?;
    }
    if transaction.is_none() {
        // It may have gone from the one tree to the other between the two looks.
        transaction = reader.body(txid)?;
    }
    Ok(transaction)
}

/// A body with F, else C, else A.
pub(super) fn transaction_entry(reader: &Reader, txid: &Txid) -> Result<Option<CertifiedTransaction>, DatabaseError> {
    let Some(transaction) = transaction_body(reader, txid)? else { return Ok(None) };
    let certificate = match reader.certificate(txid, VoteKind::Commit)? {
        Some(certificate) => Some(certificate),
        None => reader.certificate(txid, VoteKind::Abort)?,
    };
    let certificate = certificate.map(Arc::unwrap_or_clone);
    Ok(Some(CertifiedTransaction { transaction: transaction.to_raw(), certificate }))
}

/// About how many bytes of JSON an entry has, rather more than less.
pub(super) fn entry_bytes(entry: &CertifiedTransaction) -> usize {
    let transaction = 256 + 400 * entry.transaction.inputs.len() + 128 * entry.transaction.outputs.len();
    let votes = entry.certificate.iter().flat_map(|certificate| &certificate.votes);
    transaction + votes.map(|vote| 320 + 68 * vote.path.len()).sum::<usize>()
}

pub(super) fn parse_outpoint(text: &str) -> Result<OutPoint, Refusal> {
    text.parse().map_err(|error| {
        let text: String = text.chars().take(80).collect();
        refusal(ErrorCode::InvalidOutpoint, format!("{text:?}: {error}"))
    })
}

pub(super) fn parse_outpoints(texts: &[String]) -> Result<Vec<OutPoint>, Refusal> {
    texts.iter().map(|text| parse_outpoint(text)).collect()
}

pub(super) fn parse_addresses(texts: &[String], network: Network) -> Result<Vec<Address>, Refusal> {
    let parse = |text: &String| {
        Address::parse(text, network).map_err(|error| {
            let text: String = text.chars().take(80).collect();
            refusal(ErrorCode::InvalidAddress, format!("{text:?}: {error}"))
        })
    };
    texts.iter().map(parse).collect()
}
