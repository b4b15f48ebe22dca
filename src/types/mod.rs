//! Values: amounts, hashes, keys, addresses, transactions, blocks and the genesis.
//!
//! Nothing here does I/O, reads a clock or knows another room of the house. What has
//! a type of this room is well-formed by construction: an [`Amount`] is in range, an
//! [`Address`] had a good checksum, a [`Transaction`] passed every rule that needs no
//! knowledge of the ledger. [`RawTransaction`] and [`RawGenesis`] are what arrived,
//! and nothing is promised about them.
//!
//! The canonical bytes of §1-§7 of the protocol are made here and nowhere else.
//! `tests/vectors.rs` holds them to the reference.

mod address;
mod amount;
mod block;
mod canonical;
mod genesis;
mod hash;
mod keys;
mod merkle;
mod transaction;
mod utxo;

pub use address::{Address, AddressError, Network};
pub use amount::Amount;
pub use block::{
    Block, CommitSignature, CommitVote, ConsensusStep, DecidedBlock, StateDigest, UtxoDigest, consensus_vote_message,
    proposal_message,
};
pub use canonical::CanonicalWriter;
pub use genesis::{Allocation, Genesis, GenesisError, Masternode, RawGenesis, RawMasternode};
pub use hash::{BlockHash, GenesisHash, Hash32, ParseHexError, Txid, tagged_hash};
pub use keys::{PublicKey, SecretKey, Signature, SignatureItem, verify_batch};
pub use merkle::{MerkleTree, climb as merkle_climb, parent as merkle_parent};
pub use transaction::{
    Input, OutPoint, OutPointError, Output, RawInput, RawOutput, RawTransaction, Transaction, sighash,
};
pub use utxo::{UTXOState, UtxoEntry};

/// Seconds since the Unix epoch, as they stand in states and transactions.
pub type UnixSeconds = i64;

/// The number of a block; the first block is 1 and the genesis is 0.
pub type Height = u64;
