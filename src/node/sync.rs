//! Catching up: blocks are served here and asked for by the core; then comes what is final
//! but not in the chain.
//!
//! Once it has all blocks, this node pages on every connection to a member through the member's own order of
//! settled transactions, from where it stopped the last time. Every entry carries its
//! finality proof, so a member can leave things out but cannot make anything up; that is
//! why more than one is asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::input::Input;
use super::protocol::{Refusal, UTXOProtocolHandler, busy, entry_bytes, refusal, transaction_entry};
use crate::consensus::{CheckedBlock, Committee, Event, FencePage, MemberIndex, Signable, Source, Voting, check_form};
use crate::db::{DatabaseError, Durable, Reader};
use crate::limits::{
    MAX_BLOCKS_PER_REQUEST, MAX_FENCED_PER_PAGE, MAX_FINALIZED_PER_PAGE, MAX_PAGE_BYTES, MAX_TRANSACTIONS_PER_REQUEST,
};
use crate::net::{
    Blocks, Connection, ConnectionId, ErrorCode, ErrorMessage, Fence, Finalized, GetBlocks, GetFence, GetFinalized,
    GetTransactions, NetworkMessage, PeerManager, Status, Transactions, encode,
};
use crate::types::{Height, Transaction, Txid};

/// Entries of the change log that are looked through at once for what is final.
const LOG_ENTRIES_AT_ONCE: usize = 512;

#[derive(Debug, Default, Clone, Copy)]
struct Progress {
    /// The member's cursor up to which everything was received.
    after: Option<u64>,
    /// The present connection.
    connection: Option<ConnectionId>,
    /// Whether it was asked on it.
    asked: bool,
    /// Whether the end was reached on it.
    complete: bool,
}

/// How far this node has read each member's list.
#[derive(Debug)]
pub(super) struct FinalizedSync {
    committee: Arc<Committee>,
    members: Mutex<BTreeMap<MemberIndex, Progress>>,
}

impl FinalizedSync {
    pub(super) const fn new(committee: Arc<Committee>) -> Self {
        Self { committee, members: Mutex::new(BTreeMap::new()) }
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<MemberIndex, Progress>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A member is connected; it is asked as soon as this node has all blocks.
    pub(super) fn came(&self, member: MemberIndex, connection: ConnectionId) {
        let mut members = self.members();
        let progress = members.entry(member).or_default();
        *progress = Progress { connection: Some(connection), asked: false, complete: false, ..*progress };
    }

    /// A connection is gone; if another has taken its place, that one counts. Whether the
    /// member is gone.
    pub(super) fn lost(&self, member: MemberIndex, connection: ConnectionId) -> bool {
        let mut members = self.members();
        let progress = members.entry(member).or_default();
        let gone = progress.connection == Some(connection);
        if gone {
            *progress = Progress { connection: None, asked: false, complete: false, ..*progress };
        }
        gone
    }

    /// What to ask a member that has not been asked on its connection.
    fn first_request(&self, member: MemberIndex) -> Option<GetFinalized> {
        let mut members = self.members();
        let progress = members.get_mut(&member).filter(|p| p.connection.is_some() && !p.asked)?;
        progress.asked = true;
        Some(request(progress.after))
    }

    /// What to ask the members whose lists have been read to the end, for what is new.
    fn next_requests(&self) -> Vec<(MemberIndex, GetFinalized)> {
        let members = self.members();
        members.iter().filter(|(_, p)| p.complete).map(|(member, p)| (*member, request(p.after))).collect()
    }

    /// Whether members of so much weight (with this node's own) have been read to the end
    /// that nothing final can be unknown here for lack of asking.
    pub(super) fn is_complete(&self, own: Option<MemberIndex>) -> bool {
        let members = self.members();
        let read = members.iter().filter(|(_, p)| p.complete).map(|(member, _)| self.committee.weight(*member));
        let own = own.map_or(0, |own| self.committee.weight(own));
        read.sum::<u64>() + own >= self.committee.quorum()
    }
}

fn request(after: Option<u64>) -> GetFinalized {
    GetFinalized { after, limit: u32::try_from(MAX_FINALIZED_PER_PAGE).unwrap_or(u32::MAX) }
}

impl UTXOProtocolHandler {
    /// A page came: take it in, then ask for the next.
    pub(super) async fn finalized_page(
        &self,
        connection: &Arc<Connection>,
        member: MemberIndex,
        page: Finalized,
    ) -> Result<(), Refusal> {
        self.certified(connection, member, page.entries).await?;
        let ask = {
            let mut members = self.sync.members();
            let progress = members.entry(member).or_default();
            // A cursor that does not move on would make this an endless errand.
            match page.next.filter(|next| progress.after.is_none_or(|after| *next > after)) {
                Some(next) => {
                    progress.after = Some(next);
                    Some(request(progress.after))
                }
                None => {
                    progress.complete = true;
                    None
                }
            }
        };
        if let Some(ask) = ask {
            connection.send_now(encode(&NetworkMessage::GetFinalized(ask), None));
        }
        Ok(())
    }

    /// Asks whoever has not been asked yet for what is final, once this node has all
    /// blocks. Members send observers nothing of themselves, so an observer asks again and
    /// again.
    pub(super) fn ask_for_news(&self, peers: &PeerManager, observer: bool) {
        if self.ledger.health().is_behind() {
            return;
        }
        for member in self.ledger.committee().indices() {
            if let Some(ask) = self.sync.first_request(member) {
                peers.send_to_member(member, &encode(&NetworkMessage::GetFinalized(ask), None));
            }
        }
        for (member, ask) in self.sync.next_requests().into_iter().filter(|_| observer) {
            peers.send_to_member(member, &encode(&NetworkMessage::GetFinalized(ask), None));
        }
    }

    /// A page of what is final here and in no block: the change log names each transaction
    /// where it became final.
    pub(super) async fn get_finalized(
        &self,
        connection: &Connection,
        query: GetFinalized,
    ) -> Result<Durable<NetworkMessage>, Refusal> {
        let limit = (query.limit as usize).clamp(1, MAX_FINALIZED_PER_PAGE);
        let read = move |reader: &Reader| {
            let (mut entries, mut bytes) = (Vec::new(), 0);
            let end = reader.durable_head().sequence;
            // A cursor beyond the end is of another log; that reader begins anew.
            let after = query.after.filter(|after| *after <= end).unwrap_or(0);
            let mut cursor = after.max(reader.unconfirmed_from()?.saturating_sub(1));
            while cursor < end && entries.len() < limit && bytes < MAX_PAGE_BYTES {
                let (txids, last) = reader.unconfirmed(cursor, end, LOG_ENTRIES_AT_ONCE)?;
                if last == cursor {
                    break;
                }
                for txid in txids {
                    if let Some(entry) = transaction_entry(reader, &txid)? {
                        bytes += entry_bytes(&entry);
                        entries.push(entry);
                    }
                }
                cursor = last;
            }
            // A cursor may be kept beyond the last page, for what comes later.
            let next = (cursor < end || !entries.is_empty()).then_some(cursor);
            Ok(NetworkMessage::Finalized(Finalized { entries, next }))
        };
        self.read(connection, read).await
    }

    /// A page of the chain. Anybody may have it.
    pub(super) async fn get_blocks(
        &self,
        connection: &Connection,
        query: GetBlocks,
    ) -> Result<Durable<NetworkMessage>, Refusal> {
        let limit = (query.limit as usize).clamp(1, MAX_BLOCKS_PER_REQUEST);
        let read = move |reader: &Reader| blocks_page(reader, query.from_height, limit).map(NetworkMessage::Blocks);
        self.read(connection, read).await
    }

    /// Blocks came. Each is checked for itself; the ledger sees whether they follow.
    pub(super) async fn blocks(
        &self,
        connection: &Arc<Connection>,
        member: MemberIndex,
        blocks: Blocks,
    ) -> Result<(), Refusal> {
        let check = |decided| CheckedBlock::new(decided, self.ledger.committee());
        let blocks = blocks.blocks.into_iter().take(MAX_BLOCKS_PER_REQUEST).map(check);
        match blocks.collect::<Result<Vec<_>, _>>() {
            Ok(blocks) => {
                let blocks = Signable::Blocks(blocks);
                let submitted = self.pool.submit_for_member(blocks, Source::Member(member), connection).await;
                submitted.map_err(|_| busy())
            }
            Err(error) => {
                let error = ErrorMessage::new(ErrorCode::Malformed, error.to_string());
                self.ledger.tell(Input::Event(Event::ForgedBlocks(member)));
                connection.close_with(&error);
                Err(error)
            }
        }
    }

    /// A member says what it has in flight: send it what is final here, and ask for what
    /// is not known here.
    pub(super) async fn peer_status(
        &self,
        connection: &Arc<Connection>,
        member: MemberIndex,
        status: Status,
    ) -> Result<(), Refusal> {
        self.ledger.tell(Input::Event(Event::Height { member, height: status.height }));
        let health = self.ledger.health();
        if status.height <= health.height()
            && !health.is_behind()
            && let Some(ask) = self.sync.first_request(member)
        {
            connection.send_now(encode(&NetworkMessage::GetFinalized(ask), None));
        }
        if status.in_flight.is_empty() {
            return Ok(());
        }
        let txids: Vec<Txid> = status.in_flight.into_iter().take(crate::limits::MAX_STATUS_IN_FLIGHT).collect();
        let read = move |reader: &Reader| {
            let (mut settled, mut unknown, mut bytes) = (Vec::new(), Vec::new(), 0);
            for txid in txids {
                if reader.is_final(&txid)? {
                    if let Some(entry) = transaction_entry(reader, &txid)?.filter(|_| bytes < MAX_PAGE_BYTES) {
                        bytes += entry_bytes(&entry);
                        settled.push(entry);
                    }
                } else if !reader.is_in_flight(&txid)? {
                    unknown.push(txid);
                }
            }
            Ok((settled, unknown))
        };
        let (settled, unknown) = self.read(connection, read).await?.into_inner();
        if !settled.is_empty() {
            connection.send_now(encode(&NetworkMessage::Transactions(Transactions { transactions: settled }), None));
        }
        for txids in unknown.chunks(MAX_TRANSACTIONS_PER_REQUEST) {
            let ask = GetTransactions { txids: txids.to_vec(), bodies_only: false };
            connection.send_now(encode(&NetworkMessage::GetTransactions(ask), None));
        }
        Ok(())
    }
}

impl UTXOProtocolHandler {
    /// What a member that lost votes may have voted on. Whoever lost votes itself, and does
    /// not know what on, cannot say.
    pub(super) async fn get_fence(
        &self,
        connection: &Connection,
        query: GetFence,
    ) -> Result<Durable<NetworkMessage>, Refusal> {
        if self.ledger.health().voting() != Voting::Active {
            return Err(refusal(ErrorCode::Busy, "this node does not know itself what was voted on"));
        }
        let limit = (query.limit as usize).clamp(1, MAX_FENCED_PER_PAGE);
        let read = move |reader: &Reader| {
            let page = reader.fence_page(query.after.as_deref(), limit)?;
            Ok(NetworkMessage::Fence(Fence {
                height: page.height,
                outpoints: page.outpoints,
                transactions: page.transactions.iter().map(Transaction::to_raw).collect(),
                next: page.next,
            }))
        };
        self.read(connection, read).await
    }

    /// A page of what this node asked for. What it names does no harm, so it is not checked.
    pub(super) async fn fence_page(
        &self,
        connection: &Arc<Connection>,
        from: MemberIndex,
        page: Fence,
    ) -> Result<(), Refusal> {
        let Fence { height, outpoints, transactions, next } = page;
        let rules = self.ledger.rules();
        let transactions = transactions.into_iter().map(|raw| check_form(raw, &rules)).collect::<Result<_, _>>();
        let transactions = transactions.map_err(|rejection| refusal(ErrorCode::Malformed, rejection.to_string()))?;
        let page = FencePage { height, outpoints, transactions, next };
        let passed = self.pool.pass_for_member(Event::Fence { from, page }, connection).await;
        passed.map_err(|_| busy())
    }
}

/// Decided blocks in order, cut where a page ends.
pub(super) fn blocks_page(reader: &Reader, from_height: Height, limit: usize) -> Result<Blocks, DatabaseError> {
    let (mut blocks, mut bytes) = (Vec::new(), 0);
    let mut height = from_height.max(1);
    while blocks.len() < limit && bytes < MAX_PAGE_BYTES && height <= reader.durable_head().height {
        let Some(decided) = reader.block(height)? else { break };
        let entries = decided.block.transactions.len() + decided.block.aborts.len();
        bytes += 1_024 + 68 * entries + 256 * decided.certificate.votes.len();
        blocks.push(decided);
        height += 1;
    }
    Ok(Blocks { blocks })
}
