//! A masternode for a UTXO payment network with instant finality.
#![forbid(unsafe_code)]
pub mod consensus;
pub mod db;
pub mod limits;
pub mod net;
pub mod node;
pub mod types;
