//! What this node knows of that can have been voted on, for a member that lost votes.

use super::DatabaseError;
use super::schema::{TreeId, parse_outpoint_key};
use super::store::Reader;
use crate::consensus::FencePage;
use crate::limits::MAX_PAGE_BYTES;
use crate::types::{Address, Txid};

/// Entries of the change log that are looked through at once for what is final.
const LOG_ENTRIES_AT_ONCE: usize = 512;

/// Where a page begins. What moves while the pages are read goes from one place to a later
/// one, so it is not passed by: from flight to settled, from settled into the chain.
enum Place {
    InFlight(Vec<u8>),
    Settled(u64),
    Live(Vec<u8>),
    Fenced(Vec<u8>),
}

impl Place {
    /// Cursors are texts that sort as the places do.
    fn parse(cursor: Option<&str>) -> Self {
        let Some((kind, rest)) = cursor.and_then(|cursor| cursor.split_at_checked(1)) else {
            return Self::InFlight(Vec::new());
        };
        let key = hex::decode(rest).unwrap_or_default();
        match kind {
            "2" => Self::Settled(key.try_into().map_or(0, u64::from_be_bytes)),
            "3" => Self::Live(key),
            "4" => Self::Fenced(key),
            _ => Self::InFlight(key),
        }
    }

    fn cursor(&self) -> String {
        match self {
            Self::InFlight(key) => format!("1{}", hex::encode(key)),
            Self::Settled(sequence) => format!("2{}", hex::encode(sequence.to_be_bytes())),
            Self::Live(key) => format!("3{}", hex::encode(key)),
            Self::Fenced(key) => format!("4{}", hex::encode(key)),
        }
    }
}

/// The least key after `key`.
fn after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

impl Reader {
    /// A page of every transaction in flight, then of what is settled and not in the chain,
    /// then of the unspent and locked outputs, then of what is behind this node's own fence.
    pub fn fence_page(&self, cursor: Option<&str>, limit: usize) -> Result<FencePage, DatabaseError> {
        let mut page = FencePage::default();
        let mut place = Some(Place::parse(cursor));
        let (mut left, mut bytes) = (limit, 0);
        while left > 0 && bytes < MAX_PAGE_BYTES {
            let named = page.outpoints.len() + page.transactions.len();
            place = match place {
                Some(Place::InFlight(after)) => Some(self.fence_in_flight(&after, left, &mut page)),
                Some(Place::Settled(after)) => Some(self.fence_settled(after, &mut page)?),
                Some(Place::Live(key)) => Some(self.fence_live(&key, left, &mut page)?),
                Some(Place::Fenced(key)) => self.fence_fenced(&key, left, &mut page)?,
                None => break,
            };
            left = left.saturating_sub(page.outpoints.len() + page.transactions.len() - named);
            let bodies = page.transactions.iter().map(|t| 256 + 400 * t.inputs().len() + 128 * t.outputs().len());
            bytes = 96 * page.outpoints.len() + bodies.sum::<usize>();
        }
        page.next = place.map(|place| place.cursor());
        // Read last: what left flight for the chain meanwhile is in a block up to it.
        page.height = self.durable_head().height;
        Ok(page)
    }

    fn fence_in_flight(&self, after: &[u8], limit: usize, page: &mut FencePage) -> Place {
        // Bodies may be large, so a page has not many.
        let few = limit.min(256);
        let after = <[u8; 32]>::try_from(after).ok().map(Txid::from_bytes);
        let flights = self.in_flight_after(after, few);
        let last = flights.last().filter(|_| flights.len() == few).map(|last| last.transaction.txid());
        page.transactions.extend(flights.into_iter().map(|flight| flight.transaction.as_ref().clone()));
        last.map_or(Place::Settled(0), |last| Place::InFlight(last.as_bytes().to_vec()))
    }

    fn fence_settled(&self, after: u64, page: &mut FencePage) -> Result<Place, DatabaseError> {
        let end = self.durable_head().sequence;
        let from = after.max(self.unconfirmed_from()?.saturating_sub(1));
        let (txids, last) = self.unconfirmed(from, end, LOG_ENTRIES_AT_ONCE)?;
        for txid in txids {
            page.transactions.extend(self.finalized(&txid)?.map(|(transaction, _)| transaction));
        }
        Ok(if last > from { Place::Settled(last) } else { Place::Live(Vec::new()) })
    }

    fn fence_live(&self, from: &[u8], limit: usize, page: &mut FencePage) -> Result<Place, DatabaseError> {
        let mut next = None;
        for (n, row) in self.tree(TreeId::Addresses).range_from(from).take(limit).enumerate() {
            let (key, _) = row?;
            let outpoint = key.get(Address::PAYLOAD_LEN..).and_then(parse_outpoint_key);
            page.outpoints
                .push(outpoint.ok_or_else(|| DatabaseError::corrupt("addresses", "a key of the wrong length"))?);
            next = (n + 1 == limit).then(|| after(&key));
        }
        Ok(next.map_or(Place::Fenced(Vec::new()), Place::Live))
    }

    fn fence_fenced(&self, from: &[u8], limit: usize, page: &mut FencePage) -> Result<Option<Place>, DatabaseError> {
        let mut next = None;
        for (n, row) in self.tree(TreeId::Fence).range_from(from).take(limit).enumerate() {
            let (key, _) = row?;
            let outpoint = parse_outpoint_key(&key);
            page.outpoints.push(outpoint.ok_or_else(|| DatabaseError::corrupt("fence", "a key of the wrong length"))?);
            next = (n + 1 == limit).then(|| after(&key));
        }
        Ok(next.map(Place::Fenced))
    }
}
