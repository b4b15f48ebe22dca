//! The life of an output (protocol §6).

use serde::{Deserialize, Serialize};

use super::{Height, OutPoint, Output, Txid, UnixSeconds};

/// Where an output stands. Times are in Unix seconds by the reporting node's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum UTXOState {
    /// It can be spent.
    Unspent,
    /// The reporting node has locked it for a transaction and approved that.
    Locked {
        /// The transaction that holds the lock.
        txid: Txid,
        /// When this node locked it.
        locked_at: UnixSeconds,
    },
    /// A final transaction has spent it. Nothing reverses this.
    SpentFinalized {
        /// The transaction that spent it.
        txid: Txid,
        /// When this node learned that it is final.
        finalized_at: UnixSeconds,
        /// How many members committed to it.
        votes: u32,
    },
    /// The spending transaction stands in a block.
    Confirmed {
        /// The transaction that spent it.
        txid: Txid,
        /// The block's height.
        block_height: Height,
        /// When this node executed the block.
        confirmed_at: UnixSeconds,
    },
}

impl UTXOState {
    /// The transaction that locked or spent it.
    pub const fn txid(&self) -> Option<Txid> {
        match self {
            Self::Unspent => None,
            Self::Locked { txid, .. } | Self::SpentFinalized { txid, .. } | Self::Confirmed { txid, .. } => Some(*txid),
        }
    }

    /// Whether it is still somebody's money: unspent or locked.
    pub const fn is_live(&self) -> bool {
        matches!(self, Self::Unspent | Self::Locked { .. })
    }

    /// The name of the state alone, as in JSON.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Unspent => "Unspent",
            Self::Locked { .. } => "Locked",
            Self::SpentFinalized { .. } => "SpentFinalized",
            Self::Confirmed { .. } => "Confirmed",
        }
    }

    /// Whether an output may go from `old` (`None`: it does not exist) to `new`.
    ///
    /// Anything else is a bug, and a node that meets it stops.
    pub fn may_follow(old: Option<&Self>, new: &Self) -> bool {
        match (old, new) {
            (None, Self::Unspent) => true,
            (Some(Self::Unspent), Self::Locked { .. }) => true,
            (Some(Self::Unspent | Self::Locked { .. }), Self::SpentFinalized { .. } | Self::Confirmed { .. }) => true,
            (Some(Self::SpentFinalized { txid: spent_by, .. }), Self::Confirmed { txid, .. }) => spent_by == txid,
            (Some(Self::Locked { .. }), Self::Unspent) => true,
            _ => false,
        }
    }
}

/// An output with its place and its state, as wallets see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UtxoEntry {
    /// Where it was created.
    pub outpoint: OutPoint,
    /// Amount and owner.
    pub output: Output,
    /// Where it stands.
    pub state: UTXOState,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_transitions_of_the_protocol_are_legal() {
        let (a, b) = (Txid::from_bytes([1; 32]), Txid::from_bytes([2; 32]));
        let unspent = UTXOState::Unspent;
        let locked = |txid| UTXOState::Locked { txid, locked_at: 0 };
        let spent = |txid| UTXOState::SpentFinalized { txid, finalized_at: 0, votes: 3 };
        let confirmed = |txid| UTXOState::Confirmed { txid, block_height: 1, confirmed_at: 0 };
        let states = [unspent, locked(a), locked(b), spent(a), spent(b), confirmed(a), confirmed(b)];
        let legal = |old: Option<UTXOState>, new| UTXOState::may_follow(old.as_ref(), &new);
        assert_eq!(states.map(|s| legal(None, s)), [true, false, false, false, false, false, false]);
        assert_eq!(states.map(|s| legal(Some(unspent), s)), [false, true, true, true, true, true, true]);
        assert_eq!(states.map(|s| legal(Some(locked(a)), s)), [true, false, false, true, true, true, true]);
        assert_eq!(states.map(|s| legal(Some(spent(a)), s)), [false, false, false, false, false, true, false]);
        assert_eq!(states.map(|s| legal(Some(confirmed(a)), s)), [false; 7]);
    }
}
