//! Bugs that are planted on purpose, one at a time: in the core by its own switch, in the
//! members' surroundings here. A run without one plants nothing.

use time_masternode::consensus::{Flaw, Machine};

/// What is wrong in this run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    Nothing,
    /// In the core.
    Core(Flaw),
    /// The votes of a commit leave although it failed.
    VoteBeforeSync,
    /// A member that lost its disk votes as if it were new.
    NoFence,
    /// A quorum is one less than is safe, for everybody.
    ShortQuorum,
}

impl Planted {
    /// Every bug. `FenceForgetsSpent` alone is none: what a member can have voted on spends an
    /// output of the genesis, of a block up to H+1, or of a transaction that an honest answer
    /// names, and all of those are fenced as outputs. So that one forgets outputs too.
    pub const ALL: [Self; 16] = [
        Self::ShortQuorum,
        Self::VoteBeforeSync,
        Self::NoFence,
        Self::Core(Flaw::CommitAfterAbort),
        Self::Core(Flaw::LockForgottenOnRestart),
        Self::Core(Flaw::ReleaseByTimeout),
        Self::Core(Flaw::AbortExecutedTwice),
        Self::Core(Flaw::ChildApprovedEarly),
        Self::Core(Flaw::EvidenceSentOnce),
        Self::Core(Flaw::FirstEvidenceKept),
        Self::Core(Flaw::FenceForgetsTransactions),
        Self::Core(Flaw::AgreesTooEarly),
        Self::Core(Flaw::VotesFinal),
        Self::Core(Flaw::ApproveAborted),
        Self::Core(Flaw::DeadStillContradicts),
        Self::Core(Flaw::AbortForbidsApprove),
    ];

    pub fn is(self, other: Self) -> bool {
        self == other
    }

    /// Plants it in the core of an honest member.
    pub fn plant(self, machine: &mut Machine) {
        if let Self::Core(flaw) = self {
            machine.plant(flaw);
        }
    }
}
