//! The bodies of the fuzz targets: what has to hold for any bytes at all.
//!
//! Each is a function of the bytes alone. It panics when something does not hold, and
//! says otherwise whether the bytes were accepted, so that whoever replays a corpus can
//! see that it reaches both answers. The fuzzer runs these, and so does
//! `cargo test --test fuzz_corpus`, on the corpora that are checked in.
//!
//! What is compared against stands in [`oracle`] and in the bodies: it is written from
//! the protocol a second time and shares no code with what it checks.

mod addresses;
mod blocks;
mod certificates;
mod config;
mod frames;
mod genesis;
mod keyfiles;
mod messages;
mod oracle;
mod records;
mod setting;
mod transactions;
mod votes;

pub use addresses::addresses;
pub use blocks::blocks;
pub use certificates::certificates;
pub use config::config;
pub use frames::frames;
pub use genesis::genesis;
pub use keyfiles::keyfiles;
pub use messages::messages;
pub use records::records;
pub use transactions::transactions;
pub use votes::votes;

/// What became of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// They are a good value, and everything that follows from that was checked.
    Accepted,
    /// They are none, and the refusal was checked.
    Refused,
}

/// A target's name, which is also that of its corpus, and its body.
pub type Target = (&'static str, fn(&[u8]) -> Outcome);

/// All of them.
pub const ALL: [Target; 11] = [
    ("addresses", addresses),
    ("blocks", blocks),
    ("certificates", certificates),
    ("config", config),
    ("frames", frames),
    ("genesis", genesis),
    ("keyfiles", keyfiles),
    ("messages", messages),
    ("records", records),
    ("transactions", transactions),
    ("votes", votes),
];
