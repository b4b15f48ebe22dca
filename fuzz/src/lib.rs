//! Fuzz targets of `time-masternode`. See `README.md`.
//!
//! The bodies of the targets are in [`targets`], which the main crate's tests include too;
//! [`mutate`] changes JSON as JSON, so that the fuzzer gets past the parser.
#![forbid(unsafe_code)]

pub mod mutate;
pub mod targets;
