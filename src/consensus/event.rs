//! What comes to the machine and what it answers: events, actions, progress, faults.

use std::sync::Arc;

use super::agreement::{AgreementFault, AgreementRecord, ConsensusMessage};
use super::certificate::{Certificate, CheckedCertificate};
use super::committee::MemberIndex;
use super::fence::FencePage;
use super::validate::{Rejection, SignedTransaction};
use super::verified::Verified;
use super::view::{Dead, InFlight, Settled};
use super::vote::{MemberBatch, Vote, VoteKind};
use crate::types::{DecidedBlock, Height, OutPoint, SecretKey, Transaction, Txid, UTXOState, UnixSeconds};

/// The time of a step, given from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds of a clock that never goes back; waits are measured with it.
    pub ms: u64,
    /// Seconds since the Unix epoch; states carry it, nothing is decided by it.
    pub unix: UnixSeconds,
    /// The same in milliseconds, for the timestamps of blocks.
    pub unix_ms: u64,
}

/// A wallet's request, by a number that its owner chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Who sent a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A wallet, which wants an answer.
    Wallet(Ticket),
    /// A member that has locked it.
    Member(MemberIndex),
    /// Somebody who was asked for the body.
    Answer,
}

/// What can happen to the machine.
#[derive(Debug)]
pub enum Event {
    /// A transaction came.
    Transaction {
        /// The body; its signatures are valid.
        transaction: Verified<SignedTransaction>,
        /// From whom.
        source: Source,
    },
    /// Votes of another member came.
    Votes(Arc<Verified<MemberBatch>>),
    /// A certificate came.
    Certificate(Verified<CheckedCertificate>),
    /// Decided blocks came, each with a good certificate.
    Blocks {
        /// From whom.
        from: MemberIndex,
        /// In order of height.
        blocks: Vec<Arc<DecidedBlock>>,
    },
    /// A member served blocks under certificates that prove nothing.
    ForgedBlocks(MemberIndex),
    /// A message about the next block came. Its signature is checked here.
    Consensus {
        /// From whom.
        from: MemberIndex,
        /// The message.
        message: Arc<ConsensusMessage>,
    },
    /// A member names what this one may have voted on before it lost votes.
    Fence {
        /// Who.
        from: MemberIndex,
        /// A page of what it names.
        page: FencePage,
    },
    /// A member says how long its chain is.
    Height {
        /// Who.
        member: MemberIndex,
        /// The height of its last block.
        height: Height,
    },
    /// A connection to a member is up, for the first time or again.
    Connected(MemberIndex),
    /// The connection to a member is gone.
    Disconnected(MemberIndex),
    /// A member says that it is connected to another live instance of this one's key.
    Twin(MemberIndex),
    /// Time passed.
    Tick,
}

/// Where a transaction stands, as wallets are told.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Stored durably, its inputs locked; so many members approved and committed.
    Pending {
        /// Members that approved.
        approvals: u32,
        /// Members that committed.
        commits: u32,
    },
    /// Final, for ever. The proof is in the database, or here if it was made just now.
    Finalized {
        /// The summary.
        settled: Settled,
        /// F(T), where it was made in this step.
        certificate: Option<Arc<Certificate>>,
    },
    /// In a block.
    Confirmed {
        /// The summary.
        settled: Settled,
        /// The block's height.
        height: Height,
    },
    /// Dead, for ever.
    Aborted(Dead),
    /// Refused; nothing was changed.
    Rejected(Rejection),
    /// Nothing is known of it here.
    Unknown,
}

/// What has to happen once the step's changes are durable.
#[derive(Debug, Clone)]
pub enum Action {
    /// Tell all members: "I have locked this."
    Broadcast(Arc<Transaction>),
    /// Tell one member the same, again.
    Send {
        /// Which.
        to: MemberIndex,
        /// The body.
        transaction: Arc<Transaction>,
    },
    /// Sign these votes, which are durable since long, and send them again.
    ResendVotes {
        /// To one, or to all.
        to: Option<MemberIndex>,
        /// The votes.
        votes: Vec<Vote>,
    },
    /// Give a member back a batch of its own.
    ReturnBatch {
        /// The member that signed it.
        to: MemberIndex,
        /// The batch.
        batch: Arc<Verified<MemberBatch>>,
    },
    /// Send a body with the certificate that is held for it.
    SendCertified {
        /// To one, or to all.
        to: Option<MemberIndex>,
        /// The body.
        transaction: Arc<Transaction>,
        /// C(T) or F(T).
        certificate: Arc<Certificate>,
    },
    /// Send the body and F(T) of a final transaction from the database.
    SendSettled {
        /// To whom.
        to: MemberIndex,
        /// Which.
        txid: Txid,
    },
    /// Ask for a body and what is known of it.
    Request {
        /// One member, or all.
        to: Option<MemberIndex>,
        /// Which.
        txid: Txid,
    },
    /// Ask a member for bodies that the chain needs, in one question.
    RequestBodies {
        /// Whom.
        to: MemberIndex,
        /// Which.
        txids: Vec<Txid>,
    },
    /// Tell all members something about the next block.
    Consensus(Arc<ConsensusMessage>),
    /// Ask a member for decided blocks.
    RequestBlocks {
        /// Whom.
        to: MemberIndex,
        /// From which height on.
        from_height: Height,
    },
    /// Ask a member what this one may have voted on before it lost votes.
    RequestFence {
        /// Whom.
        to: MemberIndex,
        /// Where the page begins.
        after: Option<String>,
    },
    /// Send a member decided blocks that it has missed.
    SendBlocks {
        /// To whom.
        to: MemberIndex,
        /// From which height on.
        from_height: Height,
    },
    /// End the connection to a member that served what cannot be.
    Disconnect {
        /// Which.
        member: MemberIndex,
    },
    /// Tell a member why its transaction was refused: advice, without effect.
    Advise {
        /// The member.
        to: MemberIndex,
        /// Which transaction.
        txid: Txid,
        /// Why.
        rejection: Rejection,
    },
    /// Answer a wallet.
    Reply {
        /// Its request.
        ticket: Ticket,
        /// Which transaction.
        txid: Txid,
        /// Where it stands.
        progress: Progress,
    },
    /// Tell whoever watches it where a transaction stands now.
    Progress {
        /// Which transaction.
        txid: Txid,
        /// Where it stands.
        progress: Progress,
    },
}

/// Whether this node votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voting {
    /// It does.
    Active,
    /// It is no member.
    Observer,
    /// It is a member that lost votes, and asks the others what it must not vote on.
    Fencing,
    /// It is a member and must not, for this reason.
    Suspended(Suspension),
}

/// Why a member must not vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Suspension {
    /// It met its own valid signature under a vote that its database does not hold.
    #[error(
        "its own signature stands under a vote that its database does not hold: votes were lost, or a twin is running"
    )]
    UnknownOwnVote,
    /// The database does not fit its guard.
    #[error("the database does not fit its guard: votes may have been lost")]
    GuardMismatch,
    /// Members of more than a third of the weight are connected to another instance.
    #[error("another live instance uses this member's key: stop one of the two for ever, and repair the other")]
    Twin,
}

impl Suspension {
    /// All reasons.
    pub const ALL: [Self; 3] = [Self::UnknownOwnVote, Self::GuardMismatch, Self::Twin];
}

/// Something that cannot be unless more than a third of the weight lies, or this program
/// is wrong. The node stops at once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Two final transactions spend one output.
    #[error("{txid} is final and spends {outpoint}, which the final {by} has spent")]
    ConflictingFinality {
        /// The second.
        txid: Txid,
        /// What both spend.
        outpoint: OutPoint,
        /// The first.
        by: Txid,
    },
    /// A final transaction that no honest quorum could have approved.
    #[error("{txid} is final and breaks a rule: {rejection}")]
    InvalidFinality {
        /// Which.
        txid: Txid,
        /// The rule.
        rejection: Rejection,
    },
    /// The database's UTXO set is not the one that the chain decided on.
    #[error("the state digest here is not that of the decided block {height}: the database is damaged")]
    StateDigest {
        /// The block.
        height: Height,
    },
    /// A decided block spends what is not here.
    #[error("{txid} of block {height} spends {outpoint}, which is not here: the database is damaged")]
    BlockInput {
        /// The block.
        height: Height,
        /// The transaction.
        txid: Txid,
        /// What it spends.
        outpoint: OutPoint,
    },
    /// A decided block's transaction is not here although it was.
    #[error("the body of {txid} of block {height} is not here: the database is damaged")]
    BlockBody {
        /// The block.
        height: Height,
        /// The transaction.
        txid: Txid,
    },
    /// Money came into being, or went away.
    #[error("block {height} does not conserve the supply")]
    Supply {
        /// The block.
        height: Height,
    },
    /// The agreement on blocks failed.
    #[error(transparent)]
    Agreement(AgreementFault),
    /// A step that no output can take.
    #[error("{outpoint} cannot go from {old:?} to {new:?}")]
    IllegalTransition {
        /// Which output.
        outpoint: OutPoint,
        /// Where it stood.
        old: Option<UTXOState>,
        /// Where it was to go.
        new: UTXOState,
    },
}

/// A transaction in flight, as recovered from the database.
#[derive(Debug)]
pub struct Recovered {
    /// The row of the `locks` tree.
    pub in_flight: InFlight,
    /// This member's votes on it.
    pub votes: Vec<VoteKind>,
    /// The certificates stored for it.
    pub certificates: Vec<Certificate>,
}

/// What a member brings to the agreement on blocks: its key, and what its log holds of the
/// open height.
#[derive(Debug)]
pub struct Ballot {
    /// The member's key.
    pub key: SecretKey,
    /// The write-ahead log, in order.
    pub log: Vec<AgreementRecord>,
}
