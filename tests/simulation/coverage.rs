//! What runs came across: a simulator that never meets the hard cases proves little.

macro_rules! counters {
    ($($(#[$what:meta])* $name:ident,)*) => {
        /// How often what happened.
        #[derive(Debug, Default, Clone, PartialEq, Eq)]
        pub struct Coverage {
            $($(#[$what])* pub $name: u64,)*
            /// A digest of every commit and when it was made: the same for the same seed.
            pub fingerprint: u64,
        }

        impl Coverage {
            /// Adds what another run came across.
            pub fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
                self.fingerprint ^= other.fingerprint;
            }

            /// What never happened.
            pub fn missed(&self) -> Vec<&'static str> {
                let counts = [$((stringify!($name), self.$name)),*];
                counts.into_iter().filter(|(_, times)| *times == 0).map(|(name, _)| name).collect()
            }
        }
    };
}

counters! {
    seeds,
    /// Seeds after whose healing everything had to come to an end.
    live_seeds,
    commits,
    blocks,
    later_rounds,
    /// Blocks that were executed after others had.
    caught_up,
    /// What honest members said about blocks.
    block_messages,
    confirmed,
    confirmed_children,
    chain_aborts,
    killed_by_inclusion,
    restarts,
    /// Commits that the power cut off, and those of them that were durable all the same.
    cut_commits,
    kept_commits,
    pruned_commits,
    lost_disks,
    rolled_back_disks,
    /// Such disks that were repaired where they were.
    repaired_disks,
    fences_standing,
    fences_down,
    lies,
    ambushes,
    duels,
}

impl Coverage {
    /// Takes a commit into the digest.
    pub fn mark(&mut self, parts: [u64; 4]) {
        for part in parts {
            self.fingerprint = (self.fingerprint ^ part).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
