//! A whole network on one machine: genesis, nodes and funded wallets.
//!
//! What is written is what `time-masternode run --config` reads, so the same directory
//! runs in one process or with a process for each node.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, Options, commented, make_data_dir};
use crate::files::{self, FileError};
use crate::keyfile::{self, KeyFileError};
use crate::types::{Address, Allocation, Amount, Network, RawGenesis, RawMasternode, SecretKey};

/// The file that describes a devnet, in its directory.
pub const FILE_NAME: &str = "devnet.json";
/// What each wallet begins with.
const TIME_PER_WALLET: u64 = 10_000_000;
/// The wallets' names.
const WALLETS: [&str; 4] = ["alice", "bob", "carol", "dave"];

/// A node of a devnet; paths are relative to the devnet's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevnetNode {
    /// Its id in the genesis.
    pub id: String,
    /// What `run --config` takes.
    pub config_file: PathBuf,
    /// Its data directory.
    pub data_dir: PathBuf,
    /// Where peers dial it.
    pub p2p_address: String,
    /// Where its `/status` is.
    pub http_address: String,
    /// Where wallets connect.
    pub websocket_address: String,
}

/// A funded wallet.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevnetWallet {
    /// Its name.
    pub name: String,
    /// The 32-byte Ed25519 seed in hex. Play money only.
    pub secret_seed: String,
    /// Its address.
    pub address: String,
}

/// What `devnet.json` says.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devnet {
    /// The genesis, relative to the directory.
    pub genesis_file: PathBuf,
    /// The nodes.
    pub nodes: Vec<DevnetNode>,
    /// The wallets.
    pub wallets: Vec<DevnetWallet>,
}

/// Why a devnet cannot be made or continued.
#[derive(Debug, thiserror::Error)]
pub enum DevnetError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A key file.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// A node's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// `devnet.json` is not what it was.
    #[error("{path}: {source}")]
    Json {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A directory could not be made.
    #[error("{path}: {source}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The directory is used for something else.
    #[error("{0} is not empty and has no {FILE_NAME}: choose another directory")]
    NotADevnet(PathBuf),
    /// More nodes than a committee or the ports allow.
    #[error("{0}")]
    Size(String),
}

/// What a new devnet is made of.
#[derive(Debug, Clone, Copy)]
pub struct DevnetOptions {
    /// Masternodes.
    pub nodes: u16,
    /// The first node's first port.
    pub base_port: u16,
    /// How long after a block the next is due.
    pub block_interval_ms: u64,
}

impl Devnet {
    /// Reads the devnet in `directory`, or makes one there. An existing one is continued as
    /// it is, whatever the options say.
    pub fn open(directory: &Path, options: DevnetOptions) -> Result<Self, DevnetError> {
        let path = directory.join(FILE_NAME);
        if path.is_file() {
            let bytes = files::read(&path, 16 * 1024 * 1024)?;
            return serde_json::from_slice(&bytes).map_err(|source| DevnetError::Json { path, source });
        }
        let create = |path: &Path| {
            std::fs::create_dir_all(path).map_err(|source| DevnetError::Directory { path: path.to_path_buf(), source })
        };
        create(directory)?;
        if std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(DevnetError::NotADevnet(directory.to_path_buf()));
        }
        let last_port = u32::from(options.base_port) + 10 * u32::from(options.nodes.saturating_sub(1)) + 2;
        if options.nodes == 0 || options.nodes > 256 || last_port > u32::from(u16::MAX) {
            return Err(DevnetError::Size("a devnet has 1 to 256 nodes, and ports for all of them".into()));
        }
        let keys: Vec<SecretKey> = (0..options.nodes).map(|_| SecretKey::generate()).collect();
        let nodes: Vec<DevnetNode> = (1..=options.nodes).map(|i| node(i, options.base_port)).collect();
        let wallets: Vec<DevnetWallet> = WALLETS.iter().map(|name| wallet(name)).collect();
        let devnet = Self { genesis_file: "genesis.json".into(), nodes, wallets };
        write_json(&directory.join(&devnet.genesis_file), &devnet.genesis(&keys, options.block_interval_ms))?;
        for (node, key) in devnet.nodes.iter().zip(&keys) {
            create(&directory.join(&node.id))?;
            make_data_dir(&directory.join(&node.data_dir))?;
            keyfile::create(&directory.join(&node.id).join("masternode.key"), key, None)?;
            let config = commented(&Options {
                data_dir: Some("data".into()),
                genesis_file: Some(Path::new("..").join(&devnet.genesis_file)),
                key_file: Some("masternode.key".into()),
                p2p_listen: node.p2p_address.parse().ok(),
                http_listen: node.http_address.parse().ok(),
                websocket_listen: node.websocket_address.parse().ok(),
                ..Options::default()
            });
            files::create_new(&directory.join(&node.config_file), 0o644, config.as_bytes())?;
        }
        // Last, for it says that everything else is there.
        write_json(&path, &devnet)?;
        Ok(devnet)
    }

    fn genesis(&self, keys: &[SecretKey], block_interval_ms: u64) -> RawGenesis {
        let network = Network::Devnet;
        let masternodes = self.nodes.iter().zip(keys).map(|(node, key)| RawMasternode {
            id: node.id.clone(),
            public_key: key.public_key(),
            weight: 1,
            p2p_address: node.p2p_address.clone(),
            payout_address: Address::of_key(&key.public_key(), network).to_string(),
        });
        let allocation = |wallet: &DevnetWallet| Allocation {
            address: wallet.address.clone(),
            amount: TIME_PER_WALLET * Amount::UNITS_PER_TIME,
        };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        RawGenesis {
            network,
            timestamp: now.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0)),
            block_interval_ms,
            min_fee: 1_000,
            masternodes: masternodes.collect(),
            allocations: self.wallets.iter().map(allocation).collect(),
        }
    }
}

fn node(i: u16, base_port: u16) -> DevnetNode {
    let id = format!("masternode-{i}");
    let port = base_port + 10 * (i - 1);
    let address = |offset: u16| format!("127.0.0.1:{}", port + offset);
    DevnetNode {
        config_file: Path::new(&id).join("config.toml"),
        data_dir: Path::new(&id).join("data"),
        id,
        p2p_address: address(0),
        http_address: address(1),
        websocket_address: address(2),
    }
}

fn wallet(name: &str) -> DevnetWallet {
    let key = SecretKey::generate();
    DevnetWallet {
        name: name.to_owned(),
        secret_seed: key.to_hex().to_string(),
        address: Address::of_key(&key.public_key(), Network::Devnet).to_string(),
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), DevnetError> {
    let json = |source| DevnetError::Json { path: path.to_path_buf(), source };
    let mut text = serde_json::to_string_pretty(value).map_err(json)?;
    text.push('\n');
    Ok(files::create_new(path, 0o600, text.as_bytes())?)
}
