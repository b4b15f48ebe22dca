//! What all commands share: the genesis, the network, where addresses come from.

use std::path::{Path, PathBuf};

use time_masternode::types::{Address, AddressError, Genesis, GenesisError, Network, RawGenesis};

use super::report::Report;
use time_masternode::files::{self, FileError};
use time_masternode::keyfile::{KeyFile, KeyFileError};

/// Why what a command needs is not there.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// The genesis file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A key file.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// Not JSON of a genesis.
    #[error("{path}: not a genesis file: {source}")]
    GenesisFormat {
        /// Which file.
        path: String,
        /// Where it stops being one.
        source: serde_json::Error,
    },
    /// A genesis that no node would start with.
    #[error("{path}: {source}")]
    Genesis {
        /// Which file.
        path: String,
        /// What is wrong with it.
        source: GenesisError,
    },
    /// No genesis was given.
    #[error("this needs the network's genesis file: give --genesis FILE or set TIME_WALLET_GENESIS")]
    NoGenesis,
    /// Nothing says which network.
    #[error("which network? Give --genesis FILE or --network mainnet|testnet|devnet")]
    NoNetwork,
    /// The two disagree.
    #[error("--network {given}, but the genesis is of {genesis}")]
    OtherNetwork {
        /// By `--network`.
        given: Network,
        /// By the genesis.
        genesis: Network,
    },
    /// Not an address of the network.
    #[error("{text:?}: {source}")]
    Address {
        /// What was given.
        text: String,
        /// What is wrong with it.
        source: AddressError,
    },
}

/// The global options.
pub struct Context {
    /// The node's WebSocket address.
    pub node: String,
    /// Where results go.
    pub report: Report,
    genesis: Option<PathBuf>,
}

impl Context {
    /// The options as they were given; the genesis is read when it is needed.
    pub const fn new(node: String, genesis: Option<PathBuf>, report: Report) -> Self {
        Self { node, report, genesis }
    }

    /// The genesis, if one was given.
    pub fn genesis_if_given(&self) -> Result<Option<Genesis>, ContextError> {
        let Some(path) = &self.genesis else { return Ok(None) };
        let bytes = files::read(path, u64::MAX - 1)?;
        let raw: RawGenesis = serde_json::from_slice(&bytes)
            .map_err(|source| ContextError::GenesisFormat { path: path.display().to_string(), source })?;
        let genesis = Genesis::try_from(raw)
            .map_err(|source| ContextError::Genesis { path: path.display().to_string(), source })?;
        Ok(Some(genesis))
    }

    /// The genesis, which has to be given.
    pub fn genesis(&self) -> Result<Genesis, ContextError> {
        self.genesis_if_given()?.ok_or(ContextError::NoGenesis)
    }

    /// The network by the genesis or by `--network`; they must not disagree.
    pub fn network_if_given(&self, given: Option<Network>) -> Result<Option<Network>, ContextError> {
        match (self.genesis_if_given()?.map(|genesis| genesis.network()), given) {
            (Some(genesis), Some(given)) if genesis != given => Err(ContextError::OtherNetwork { given, genesis }),
            (genesis, given) => Ok(genesis.or(given)),
        }
    }

    /// The addresses of keys and those given as text, without repetition.
    pub fn addresses(
        &self,
        keys: &[PathBuf],
        texts: &[String],
        given: Option<Network>,
    ) -> Result<Vec<Address>, ContextError> {
        let network = self.network_if_given(given)?;
        let mut addresses = Vec::with_capacity(keys.len() + texts.len());
        for path in keys {
            addresses.push(self.address_of_key(path, network)?);
        }
        for text in texts {
            addresses.push(parse_address(text, network)?);
        }
        addresses.sort_unstable();
        addresses.dedup();
        Ok(addresses)
    }

    fn address_of_key(&self, path: &Path, network: Option<Network>) -> Result<Address, ContextError> {
        let key = KeyFile::read(path)?;
        Ok(Address::of_key(&key.public_key(), network.ok_or(ContextError::NoNetwork)?))
    }
}

/// An address that has to be of the network, if it is known which.
pub fn parse_address(text: &str, network: Option<Network>) -> Result<Address, ContextError> {
    let parsed = network.map_or_else(|| text.parse(), |network| Address::parse(text, network));
    parsed.map_err(|source| ContextError::Address { text: text.chars().take(100).collect(), source })
}
