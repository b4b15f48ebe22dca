//! Decides: validity, locks, votes, certificates, finality, conflicts.
//!
//! Pure: no async, no clock, no randomness (but for signing and batch checks, whose
//! outcome does not depend on it), no I/O, nothing of sled or tokio. Time is an argument.
//!
//! # Why it is safe
//!
//! Write C(T) for approvals of a quorum, F(T) for commits of a quorum, A(T) for aborts of
//! a quorum. Three rules carry everything, and each is durable before it is said:
//!
//! 1. A member approves T only while T is valid, all its inputs exist here, and each is
//!    unlocked or locked for T; it then locks them. Only the death of T or finality of a
//!    rival takes a lock away: **there is no time-out**.
//! 2. A member commits to T only holding C(T), and never after it voted to abort T, and
//!    never to two conflicting transactions unless the first is dead.
//! 3. A member aborts T only if it has not committed to T, and never commits to it after.
//!
//! *A final T is never aborted.* F(T) and A(T) are two quorums; an honest member would be
//! in both, having both committed to T and aborted it, against 2 and 3.
//!
//! *Two conflicting T and T' are never both final.* Both would have C, so an honest member
//! approved both. It approved the second only when the lock of the first was gone, so the
//! first was dead to it. It died by A (then it is not final, see above), or because the
//! chain contains T'' in conflict with it; then repeat the argument with T'' at a lower
//! height. Heights end.
//!
//! *It is live.* With a conflict known to all honest members, either one of them holds
//! C(T); then it spreads, and a block includes T. Or none does; then all vote to abort.
//! What nobody contradicts is never aborted.
//!
//! Approvals of a quorum alone are **not** finality: together with any release of locks
//! two conflicting transactions could get them. `tests/consensus_rules.rs` catches that
//! bug, and others of the kind, when they are planted here.

mod agree;
mod agreement;
mod block;
mod certificate;
mod chain;
mod committee;
mod conflict;
mod event;
mod execute;
mod fence;
mod finality;
mod flaw;
mod follow;
mod machine;
mod ownership;
mod pending;
mod resend;
mod validate;
mod verified;
mod view;
mod vote;
mod waiting;

pub use agreement::{
    AgreementFault, AgreementRecord, ConsensusMessage, ConsensusVote, Polka, Proposal, RoundChange, RoundTimer,
    RoundVote,
};
pub use block::{BlockError, CheckedBlock};
pub use certificate::{Certificate, CertificateError, CheckedCertificate, SignedVote};
pub use chain::{BlockFault, ChainTip};
pub use committee::{Committee, MemberIndex, quorum};
pub use event::{Action, Ballot, Event, Fault, Now, Progress, Recovered, Source, Suspension, Ticket, Voting};
pub use fence::{FencePage, FenceState};
#[cfg(feature = "planted-flaws")]
pub use flaw::Flaw;
pub use machine::{Machine, Step};
pub use validate::{Rejection, Rules, SignedTransaction, check_form, check_ledger};
pub use verified::{Signable, Signed, Verified};
pub use view::{Changes, Dead, Finalized, InFlight, LogEntry, Settled, Transition, Utxo, View};
pub use vote::{CountedVote, MemberBatch, Vote, VoteBatch, VoteError, VoteKind, batch_message, sign_batch};
