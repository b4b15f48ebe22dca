//! A masternode for a UTXO payment network with instant finality.
//!
//! A wallet sends a transaction; every masternode validates it, locks its inputs and
//! votes; with votes of 2/3+1 it is final and can never be reversed. Everything that is
//! said was durable before it was said.
//!
//! # The house
//!
//! ```text
//! types      values: amounts, hashes, keys, addresses, transactions, blocks, genesis
//!   ^
//! consensus  decides: validity, locks, votes, certificates, finality, conflicts  (pure)
//!   ^                  ^
//! db         remembers: sled trees, the commit, the guard, the change log
//! net        speaks: frames, messages, handshakes, peers, WebSocket
//!   ^
//! node       wires: the ledger thread, the protocol handler, the feed, catching up
//!   ^
//! main, tools/*, examples/*, benches/*   (with config, keyfile, files, devnet beside them)
//! ```
//!
//! Imports point upwards in this picture and nowhere else. Only [`db`] knows sled, only
//! [`net`] owns sockets, and the two never meet. [`consensus`] knows neither, nor a clock.
//! Every bound is named in [`limits`].
//!
//! Begin with [`consensus`] for why it is safe, with [`db`] for what is kept, with
//! [`node`] for the way of a transaction, and with `docs/PROTOCOL.md` for the bytes.
#![forbid(unsafe_code)]

pub mod config;
pub mod consensus;
pub mod db;
pub mod devnet;
pub mod files;
pub mod keyfile;
pub mod limits;
pub mod net;
pub mod node;
pub mod types;
