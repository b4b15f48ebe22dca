//! Bugs that are planted on purpose, one at a time: in the core by its own switch, in the
//! members' surroundings here. A run without one plants nothing.

use std::sync::Arc;

use time_masternode::consensus::Flaw;

use super::core_net::Setting;
use super::member::Member;

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
}

impl Planted {
    pub fn is(self, other: Self) -> bool {
        self == other
    }

    /// The network as its members take it to be.
    pub fn setting(self, setting: &Arc<Setting>) -> Arc<Setting> {
        Arc::clone(setting)
    }

    pub fn plant(self, member: &mut Member) {
        if let (Self::Core(flaw), Some(process)) = (self, &mut member.process)
            && member.honest
        {
            process.machine.plant(flaw);
        }
    }
}
