//! Catching up with what is final but not in the chain.
//!
//! On every connection to a member this node pages through the member's own order of
//! settled transactions, from where it stopped the last time. Every entry carries its
//! finality proof, so a member can leave things out but cannot make anything up; that is
//! why more than one is asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::protocol::{Refusal, UTXOProtocolHandler, entry_bytes, transaction_entry};
use crate::consensus::{Committee, MemberIndex};
use crate::db::{Durable, LogEntry, Reader};
use crate::limits::{MAX_FINALIZED_PER_PAGE, MAX_PAGE_BYTES, MAX_TRANSACTIONS_PER_REQUEST};
use crate::net::{
    Connection, ConnectionId, Finalized, GetFinalized, GetTransactions, NetworkMessage, PeerManager, Status,
    Transactions, encode,
};
use crate::types::{Txid, UTXOState};

#[derive(Debug, Default, Clone, Copy)]
struct Progress {
    /// The member's cursor up to which everything was received.
    after: Option<u64>,
    /// The present connection.
    connection: Option<ConnectionId>,
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

    pub(super) fn first_request(&self, member: MemberIndex, connection: ConnectionId) -> GetFinalized {
        let mut members = self.members();
        let progress = members.entry(member).or_default();
        progress.connection = Some(connection);
        progress.complete = false;
        request(progress.after)
    }

    /// A connection is gone; if another has taken its place, that one counts.
    pub(super) fn lost(&self, member: MemberIndex, connection: ConnectionId) {
        let mut members = self.members();
        let progress = members.entry(member).or_default();
        if progress.connection == Some(connection) {
            progress.connection = None;
            progress.complete = false;
        }
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

    /// Members send observers nothing of themselves, so an observer asks again and again.
    pub(super) fn ask_for_news(&self, peers: &PeerManager) {
        for (member, ask) in self.sync.next_requests() {
            peers.send_to_member(member, encode(&NetworkMessage::GetFinalized(ask), None));
        }
    }

    /// A page of this node's own order: the change log names each transaction where it
    /// became final.
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
            let mut cursor = query.after.filter(|after| *after <= end).unwrap_or(0);
            let mut last: Option<Txid> = None;
            'pages: while cursor < end {
                let changes = reader.changes(cursor, end, 1024)?;
                if changes.is_empty() {
                    break;
                }
                for (sequence, change) in changes {
                    if let Some(txid) = finalized_by(&change).filter(|txid| last != Some(*txid)) {
                        if entries.len() >= limit || bytes >= MAX_PAGE_BYTES {
                            break 'pages;
                        }
                        if let Some(entry) = transaction_entry(reader, &txid)? {
                            bytes += entry_bytes(&entry);
                            entries.push(entry);
                        }
                        last = Some(txid);
                    }
                    cursor = sequence;
                }
            }
            // A cursor may be kept beyond the last page, for what comes later.
            let next = (cursor < end || !entries.is_empty()).then_some(cursor);
            Ok(NetworkMessage::Finalized(Finalized { entries, next }))
        };
        self.read(connection, read).await
    }

    /// A member says what it has in flight: send it what is final here, and ask for what
    /// is not known here.
    pub(super) async fn peer_status(
        &self,
        connection: &Arc<Connection>,
        _: MemberIndex,
        status: Status,
    ) -> Result<(), Refusal> {
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
            let ask = GetTransactions { txids: txids.to_vec() };
            connection.send_now(encode(&NetworkMessage::GetTransactions(ask), None));
        }
        Ok(())
    }
}

fn finalized_by(entry: &LogEntry) -> Option<Txid> {
    match entry {
        LogEntry::Transition(step) => match step.new_state {
            UTXOState::SpentFinalized { txid, .. } => Some(txid),
            _ => None,
        },
        LogEntry::Block { .. } => None,
    }
}
