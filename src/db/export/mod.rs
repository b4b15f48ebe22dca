//! The whole ledger as one file that does not depend on the database: lines of JSON in the
//! terms of the protocol, with a checksum. `docs/EXPORT.md` describes it for others.
//!
//! A header says what it is; then come records; the last line says how many there were and
//! the BLAKE3 of every byte before it. Blocks come in order, each followed by its
//! transactions, then what is settled and in no block, what is in flight, what died, the
//! outputs, and the rest. So whoever reads it can check each record against those before,
//! without holding more than one block and what is not in the chain.
//!
//! Not in it: the change log (an import begins a new one), the agreement's write-ahead log
//! (what was imported is behind the fence and takes part in no height that was open), and
//! what follows from the rest (the index of addresses).

mod chain;
mod coins;
mod flight;
mod import;
mod lines;
mod seal;
mod write;

use serde::{Deserialize, Serialize};

use super::DatabaseError;
use crate::consensus::{BlockError, Certificate, CertificateError, Rejection, Settled, VoteKind};
use crate::types::{
    BlockHash, DecidedBlock, GenesisHash, Height, Network, OutPoint, PublicKey, RawTransaction, Txid, UnixSeconds,
    UtxoEntry,
};

pub use import::import;
pub use write::{Exported, export};

/// What the header says that the file is.
const FORMAT: &str = "time-db-export";
/// The only version there is.
const VERSION: u32 = 1;
/// Bytes of a line: a block of the most entries, with the certificate of the most members, is
/// far below.
const MAX_LINE_BYTES: u64 = 16 * 1024 * 1024;

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
    network: Network,
    genesis_hash: GenesisHash,
    /// The member; `None` for an observer.
    public_key: Option<PublicKey>,
    /// The name of the change log that the exported database had.
    log_id: String,
    /// Its last commit.
    commit: u64,
    /// The last number of its change log.
    sequence: u64,
    /// The chain's tip.
    height: Height,
    block_hash: BlockHash,
    /// Blocks up to this one have been pruned of spent outputs and certificates, and so many
    /// transactions of the next.
    pruned_height: Height,
    pruned_entries: u64,
    /// When the file was made.
    created: UnixSeconds,
}

/// A line between the first and the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Record {
    /// A block, with the proof that it was decided. Its transactions follow it.
    Block(Box<DecidedBlock>),
    /// A settled transaction.
    Settled(Box<SettledRecord>),
    /// A transaction in flight.
    InFlight(Box<InFlightRecord>),
    /// A transaction that can never be settled.
    Dead(DeadRecord),
    /// An output and where it stands, in order of outpoint.
    Output(UtxoEntry),
    /// An output on which this member must not vote.
    Fenced(OutPoint),
    /// A wallet's subscription.
    Subscription(SubscriptionRecord),
}

/// A settled transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SettledRecord {
    transaction: RawTransaction,
    settled: Settled,
    /// The height of its block.
    height: Option<Height>,
    /// When this node executed that block.
    confirmed_at: Option<UnixSeconds>,
    /// F(T); in the chain it may be C(T), or gone.
    certificate: Option<Certificate>,
}

/// A transaction in flight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct InFlightRecord {
    transaction: RawTransaction,
    /// When this member locked its inputs.
    locked_at: Option<UnixSeconds>,
    /// This member's votes.
    votes: Vec<VoteKind>,
    /// C(T) or F(T), and A(T).
    certificates: Vec<Certificate>,
}

/// A transaction that died.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DeadRecord {
    txid: Txid,
    /// A transaction that it contradicted.
    by: Option<Txid>,
    /// The block that killed it.
    height: Height,
}

/// A subscription. The token itself is the wallet's; only its hash is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SubscriptionRecord {
    subscriber_id: String,
    token_hash: String,
    outpoints: Vec<OutPoint>,
    addresses: Vec<crate::types::Address>,
    last_used: UnixSeconds,
}

/// The last line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Trailer {
    End {
        /// Lines between the first and this one.
        records: u64,
        /// Of all bytes before this line.
        blake3: String,
    },
}

/// Why an export is not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The database says no.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The file cannot be read.
    #[error("the export cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// The file is not what it should be. Nothing was changed.
    #[error("line {line} of the export: {fault}")]
    Refused {
        /// Which line, from 1.
        line: u64,
        /// What is wrong with it.
        fault: ImportFault,
    },
}

/// What is wrong with an export.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportFault {
    /// Not an export at all.
    #[error("this is no export of a database")]
    NotAnExport,
    /// One that a newer program made.
    #[error("version {0} of the format is not known; use a newer program")]
    UnknownVersion(u32),
    /// The database of a stranger.
    #[error("{0} is no member of this network")]
    NotMember(PublicKey),
    /// It ends without its last line.
    #[error("the file ends here, and it is not whole")]
    Incomplete,
    /// Something comes after its last line.
    #[error("there is more after the last line")]
    AfterTheEnd,
    /// A line without an end.
    #[error("the line is too long")]
    TooLong,
    /// A line that is no record.
    #[error("it is no record: {0}")]
    NotARecord(String),
    /// Bytes have changed.
    #[error("the checksum is wrong: the file was damaged")]
    Checksum,
    /// Lines are missing or too many.
    #[error("there are {found} records, and there should be {expected}")]
    Count {
        /// What the last line says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// A record where none of its kind belongs.
    #[error("a record of this kind does not belong here")]
    OutOfOrder,
    /// A block that was not decided.
    #[error("the block proves nothing: {0}")]
    Block(#[from] BlockError),
    /// A block that is not the next one.
    #[error("the block does not follow the one before")]
    NotNext,
    /// A block whose digest of the outputs is not that of the blocks before it.
    #[error("the outputs that the blocks before leave have another digest than the block says")]
    StateDigest,
    /// Something else where a block's transaction belongs.
    #[error("{0} of the block before is missing")]
    MissingTransaction(Txid),
    /// The header names another tip.
    #[error("the last block is not the one that the header names")]
    Tip,
    /// A transaction that breaks a rule.
    #[error("the transaction breaks a rule: {0}")]
    Transaction(#[from] Rejection),
    /// A settled transaction that says of its fee what is not so.
    #[error("its fee is not what its inputs leave")]
    Fee,
    /// It is settled, in flight or dead twice over.
    #[error("{0} was here before")]
    Twice(Txid),
    /// A certificate that proves nothing.
    #[error("a certificate proves nothing: {0}")]
    Certificate(#[from] CertificateError),
    /// A certificate of something else.
    #[error("a certificate is another transaction's, or says something else")]
    OtherCertificate,
    /// It is settled by neither a block nor a finality proof.
    #[error("it is settled by neither a block nor a finality proof")]
    Unproved,
    /// A signature that does not verify.
    #[error("a signature does not verify")]
    Signature,
    /// Votes that no honest member gives.
    #[error("these votes cannot have been given: {0}")]
    Votes(&'static str),
    /// A height that the chain has not got.
    #[error("there is no such block")]
    NoSuchBlock,
    /// Outputs that do not rise.
    #[error("the outputs are not in order")]
    Unsorted,
    /// An output that nothing here made, or that was made as another one.
    #[error("nothing here made this output")]
    NotMade,
    /// An output that cannot stand where it is said to.
    #[error("it cannot stand there: {0}")]
    State(&'static str),
    /// The outputs together are not those that the chain leaves.
    #[error("the outputs are not those that the chain and what is settled leave: {0}")]
    Outputs(&'static str),
    /// Money came into being, or went away.
    #[error("outputs of {live} and unpaid fees of {fees} are not the supply of {supply}")]
    Supply {
        /// Unspent and locked outputs.
        live: u64,
        /// Fees that no block has paid.
        fees: u64,
        /// What the genesis allocated.
        supply: u64,
    },
    /// A subscription that no wallet can make.
    #[error("no wallet can make this subscription")]
    Subscription,
}
