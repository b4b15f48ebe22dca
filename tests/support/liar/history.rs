//! Lies about history: pages of the chain that are cut, out of order, forged or stale,
//! heights that nobody has reached, bodies under other keys, lists without an end.

use time_masternode::consensus::VoteKind;
use time_masternode::net::{Blocks, CertifiedTransaction, Finalized, NetworkMessage, Role, Status};
use time_masternode::types::{BlockHash, DecidedBlock, Height, RawTransaction, Signature, Txid};

use super::Mind;

/// How far beyond the chain the liars claim to be.
const AHEAD: Height = 1_000;

/// What the liars do when they are asked for the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HistoryLie {
    /// The truth.
    None,
    /// Each observer is told the next of the lies below, always the same one.
    Mixed,
    /// Never an answer, although they claim to have much more.
    Silent,
    /// Every page is cut to nothing, although they claim to have much more.
    Truncated,
    /// Pages backwards.
    Reordered,
    /// Pages with certificates that prove nothing: a signature spoiled, a member counted
    /// twice, a quorum not reached.
    Forged,
    /// Blocks on top of the chain that nobody has decided.
    Invented,
    /// The chain without an end: the same blocks again and again.
    Stale,
    /// True blocks, but every transaction's body under another key, and lists of what is
    /// final that are of that kind too and never end.
    WrongKeys,
}

impl HistoryLie {
    pub const EACH: [Self; 7] =
        [Self::Silent, Self::Truncated, Self::Reordered, Self::Forged, Self::Invented, Self::Stale, Self::WrongKeys];

    /// Under which name it is counted how often somebody asked for blocks and was lied to so.
    pub fn name(self) -> &'static str {
        match self {
            Self::None | Self::Mixed => "true pages",
            Self::Silent => "no pages",
            Self::Truncated => "pages cut to nothing",
            Self::Reordered => "pages backwards",
            Self::Forged => "forged pages",
            Self::Invented => "invented blocks",
            Self::Stale => "the same pages again",
            Self::WrongKeys => "pages before wrong keys",
        }
    }
}

impl Mind {
    /// The liars say to everybody how long their chain is.
    pub(super) fn claim_heights(&mut self) {
        let peers: Vec<u64> = self.peers.iter().filter(|(_, p)| p.role != Role::Wallet).map(|(id, _)| *id).collect();
        for peer in peers {
            let ahead = match self.history_lie(peer) {
                HistoryLie::None | HistoryLie::WrongKeys => 0,
                _ => AHEAD,
            };
            let height = self.chain.executed as Height + ahead;
            self.answer(peer, &NetworkMessage::Status(Status { height, in_flight: Vec::new() }));
        }
    }

    pub(super) fn history_lie(&self, peer: u64) -> HistoryLie {
        let Some(peer) = self.peers.get(&peer) else { return HistoryLie::None };
        match (self.lies.history, peer.role) {
            (HistoryLie::Mixed, Role::Observer) => {
                let place = self.observers.iter().position(|observer| *observer == peer.instance);
                place.map_or(HistoryLie::None, |place| HistoryLie::EACH[place % HistoryLie::EACH.len()])
            }
            (HistoryLie::Mixed, _) => HistoryLie::None,
            (lie, _) => lie,
        }
    }

    pub(super) fn serve_blocks(&mut self, to: u64, from_height: Height) {
        let lie = self.history_lie(to);
        self.deeds.did(lie.name());
        let from = usize::try_from(from_height.saturating_sub(1)).unwrap();
        let true_page: Vec<DecidedBlock> = self.chain.decided.iter().skip(from).take(50).cloned().collect();
        let blocks = match lie {
            HistoryLie::None | HistoryLie::Mixed | HistoryLie::WrongKeys => true_page,
            HistoryLie::Silent => return,
            HistoryLie::Truncated => Vec::new(),
            HistoryLie::Reordered => self.chain.decided.iter().skip(from).rev().take(50).cloned().collect(),
            HistoryLie::Forged if true_page.is_empty() => self.invented(from_height),
            HistoryLie::Forged => true_page.into_iter().map(|block| self.forged(block)).collect(),
            HistoryLie::Invented => true_page.into_iter().chain(self.invented(from_height)).collect(),
            HistoryLie::Stale => self.chain.decided.iter().take(50).cloned().collect(),
        };
        self.answer(to, &NetworkMessage::Blocks(Blocks { blocks }));
    }

    fn forged(&mut self, mut block: DecidedBlock) -> DecidedBlock {
        let votes = &mut block.certificate.votes;
        match self.rng.below(3) {
            0 => votes[0].signature = Signature::from_bytes([5; 64]),
            1 => votes[0] = votes[1].clone(),
            _ => votes.truncate(1),
        }
        block
    }

    /// A block of the liars' own at this height, under a certificate of an older one.
    fn invented(&mut self, height: Height) -> Vec<DecidedBlock> {
        let Some(mut made_up) = self.chain.decided.last().cloned() else { return Vec::new() };
        let last = usize::try_from(height).unwrap().checked_sub(2).and_then(|i| self.chain.decided.get(i));
        let before = last.map_or(BlockHash::from_bytes([3; 32]), |last| last.certificate.block_hash);
        made_up.block.height = height;
        made_up.block.previous_hash = before;
        made_up.block.timestamp_ms += 1;
        made_up.block.transactions = vec![Txid::from_bytes(rand::random())];
        made_up.certificate.height = height;
        made_up.certificate.block_hash = made_up.block.hash(&self.genesis.hash());
        vec![made_up]
    }

    /// What is final and in no block: nothing, or everything under other keys, on and on.
    pub(super) fn serve_finalized(&mut self, to: u64, after: Option<u64>) {
        let mut page = Finalized { entries: Vec::new(), next: None };
        if self.history_lie(to) == HistoryLie::WrongKeys {
            let bodies: Vec<RawTransaction> = self.coins.bodies.values().take(200).cloned().collect();
            for body in bodies {
                let Some(certificate) = self.certificate(VoteKind::Commit, body.txid) else { continue };
                // Twice: the certificate makes a place for the body that comes after it.
                let transaction = self.under_another_key(&body);
                let entry = CertifiedTransaction { transaction, certificate: Some(certificate) };
                page.entries.extend([entry.clone(), entry]);
            }
            page.next = Some(after.unwrap_or(0) + 1);
            self.deeds.did("finality with wrong keys");
        }
        self.answer(to, &NetworkMessage::Finalized(page));
    }
}
