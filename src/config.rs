//! The configuration of a node: TOML, environment, flags.
//!
//! One key is the same in all three: `p2p_listen` in the file, `TIME_P2P_LISTEN` in the
//! environment, `--p2p-listen` on the command line. A flag goes before the environment,
//! the environment before the file, the file before the default. [`Options`] are what was
//! given; [`Settings`] are what they mean, checked once.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::consensus::Committee;
use crate::files::{self, FileError};
use crate::keyfile::{KeyFile, KeyFileError, passphrase};
use crate::limits::{COMPACT_ABOVE_MB, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_IP, RETENTION_BLOCKS};
use crate::net::{PeerConfig, PeerManager};
use crate::node::{LedgerConfig, LedgerError, Listen, MasternodeUTXOIntegration, UTXOStateManager};
use crate::types::{Genesis, GenesisError, Height, RawGenesis, SecretKey};

/// Bytes that a configuration file may have.
const MAX_CONFIG_BYTES: u64 = 1024 * 1024;
/// Bytes that a genesis file may have.
const MAX_GENESIS_BYTES: u64 = 4 * 1024 * 1024 * 1024;

/// How logs look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// What was given, by whichever way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Where the database and its guard live
    #[arg(long, env = "TIME_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// The network's genesis file (JSON)
    #[arg(long, env = "TIME_GENESIS_FILE", value_name = "FILE")]
    pub genesis_file: Option<PathBuf>,
    /// The masternode's key file; without one the node is an observer
    #[arg(long, env = "TIME_KEY_FILE", value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// A file whose first line is the passphrase of an encrypted key file
    #[arg(long, env = "TIME_KEY_PASSPHRASE_FILE", value_name = "FILE")]
    pub key_passphrase_file: Option<PathBuf>,
    /// An observer's name in notifications and logs
    #[arg(long, env = "TIME_ID")]
    pub id: Option<String>,
    /// Where peers are accepted [default: 0.0.0.0:24000; testnet 24100]
    #[arg(long, env = "TIME_P2P_LISTEN", value_name = "IP:PORT")]
    pub p2p_listen: Option<SocketAddr>,
    /// Where the operator's HTTP is served [default: 127.0.0.1:24001; testnet 24101]
    #[arg(long, env = "TIME_HTTP_LISTEN", value_name = "IP:PORT")]
    pub http_listen: Option<SocketAddr>,
    /// Where wallets are accepted [default: 0.0.0.0:24002; testnet 24102]
    #[arg(long, env = "TIME_WEBSOCKET_LISTEN", value_name = "IP:PORT")]
    pub websocket_listen: Option<SocketAddr>,
    /// What peers may dial, if it differs from the genesis
    #[arg(long, env = "TIME_PUBLIC_ADDRESS", value_name = "HOST:PORT")]
    pub public_address: Option<String>,
    /// Where members really are, instead of where the genesis says: id=host:port,...
    #[arg(long, env = "TIME_PEERS", value_name = "ID=HOST:PORT", value_delimiter = ',')]
    pub peers: Option<Vec<String>>,
    /// Megabytes of the database's cache [default: 64]
    #[arg(long, env = "TIME_CACHE_MB", value_name = "MB")]
    pub cache_mb: Option<u64>,
    /// Connections of wallets and strangers, all together [default: 4096]
    #[arg(long, env = "TIME_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<usize>,
    /// Connections from one IP address [default: 256]
    #[arg(long, env = "TIME_MAX_CONNECTIONS_PER_IP", value_name = "N")]
    pub max_connections_per_ip: Option<usize>,
    /// Blocks whose spent outputs, certificates and changes are kept; 0 keeps everything [default: 604800]
    #[arg(long, env = "TIME_RETENTION_BLOCKS", value_name = "N")]
    pub retention_blocks: Option<u64>,
    /// Megabytes on disk from which on the node makes its database compact when it has little to do; 0
    /// never does [default: 256]
    #[arg(long, env = "TIME_COMPACT_ABOVE_MB", value_name = "MB")]
    pub compact_above_mb: Option<u64>,
    /// What is logged, as in RUST_LOG [default: info]
    #[arg(long, env = "TIME_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// How logs look [default: human]
    #[arg(long, env = "TIME_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// Why a configuration is no good.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The configuration file is no TOML of this program.
    #[error("{path}: {source}")]
    Toml {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: Box<toml::de::Error>,
    },
    /// The genesis file is no JSON of a genesis.
    #[error("{path}: {source}")]
    GenesisJson {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The genesis cannot work.
    #[error("{path}: {source}")]
    Genesis {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: GenesisError,
    },
    /// The key file.
    #[error("{path}: {source}")]
    Key {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: KeyFileError,
    },
    /// A key without which nothing works.
    #[error("`{0}` is missing: give it in the configuration file, in the environment or as a flag")]
    Missing(&'static str),
    /// A value that means nothing.
    #[error("`{key}`: {what}")]
    Invalid {
        /// Which key.
        key: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A key that is no member's.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl Options {
    /// Reads a configuration file. Its relative paths are relative to the file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let bytes = files::read(path, MAX_CONFIG_BYTES)?;
        // What is no UTF-8 is an error and not guessed at: a path would be another one.
        let mut options: Self = toml::from_slice(&bytes)
            .map_err(|source| ConfigError::Toml { path: path.to_path_buf(), source: Box::new(source) })?;
        let base = path.parent().unwrap_or(Path::new(""));
        let paths =
            [&mut options.data_dir, &mut options.genesis_file, &mut options.key_file, &mut options.key_passphrase_file];
        for path in paths.into_iter().flatten() {
            *path = base.join(&path);
        }
        Ok(options)
    }

    /// These, and where they say nothing, `others`.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            data_dir: self.data_dir.or(others.data_dir),
            genesis_file: self.genesis_file.or(others.genesis_file),
            key_file: self.key_file.or(others.key_file),
            key_passphrase_file: self.key_passphrase_file.or(others.key_passphrase_file),
            id: self.id.or(others.id),
            p2p_listen: self.p2p_listen.or(others.p2p_listen),
            http_listen: self.http_listen.or(others.http_listen),
            websocket_listen: self.websocket_listen.or(others.websocket_listen),
            public_address: self.public_address.or(others.public_address),
            peers: self.peers.or(others.peers),
            cache_mb: self.cache_mb.or(others.cache_mb),
            max_connections: self.max_connections.or(others.max_connections),
            max_connections_per_ip: self.max_connections_per_ip.or(others.max_connections_per_ip),
            retention_blocks: self.retention_blocks.or(others.retention_blocks),
            compact_above_mb: self.compact_above_mb.or(others.compact_above_mb),
            log: self.log.or(others.log),
            log_format: self.log_format.or(others.log_format),
        }
    }
}

/// Reads and checks a genesis file.
pub fn read_genesis(path: &Path) -> Result<Genesis, ConfigError> {
    let bytes = files::read(path, MAX_GENESIS_BYTES)?;
    let raw: RawGenesis = serde_json::from_slice(&bytes)
        .map_err(|source| ConfigError::GenesisJson { path: path.to_path_buf(), source })?;
    Genesis::try_from(raw).map_err(|source| ConfigError::Genesis { path: path.to_path_buf(), source })
}

/// What the options mean.
#[derive(Debug)]
pub struct Settings {
    /// The node's name.
    pub id: String,
    /// Where the database lives.
    pub data_dir: PathBuf,
    /// The network.
    pub genesis: Genesis,
    /// The member's key; `None` for an observer.
    pub key: Option<SecretKey>,
    /// Where it listens.
    pub listen: Listen,
    /// What peers may dial.
    pub public_address: Option<String>,
    /// Where members are, by id, if not where the genesis says.
    pub peers: BTreeMap<String, String>,
    /// Bytes of the database's cache.
    pub cache_bytes: u64,
    /// Connections of strangers.
    pub max_connections: usize,
    /// Connections from one IP address.
    pub max_connections_per_ip: usize,
    /// Blocks whose spent outputs, certificates and changes are kept; `None` keeps
    /// everything.
    pub retention_blocks: Option<Height>,
    /// Bytes on disk from which on the database is made compact; `None` never does that.
    pub compact_above_bytes: Option<u64>,
    /// The key has never been used: see [`LedgerConfig::first_start`].
    pub first_start: bool,
}

/// What stands in a data directory that has never been used, made by `init` and `devnet`. The
/// first start takes it away. A member without a database and without this file cannot
/// know whether it has voted, and goes behind the fence.
const FIRST_START_FILE: &str = "first-start";

/// Makes a data directory for a key that has never been used.
pub fn make_data_dir(data_dir: &Path) -> Result<(), FileError> {
    files::make_dir(data_dir)?;
    let text = "This directory has never been used. The first start of the node removes this file.\n\
                Never put it back: it tells the node that its key has never voted.\n";
    files::create_new(&data_dir.join(FIRST_START_FILE), 0o644, text.as_bytes())
}

/// The key of this data directory has been used, whatever the file says.
pub fn forget_first_start(data_dir: &Path) -> Result<(), FileError> {
    files::remove(&data_dir.join(FIRST_START_FILE))
}

impl TryFrom<Options> for Settings {
    type Error = ConfigError;

    fn try_from(options: Options) -> Result<Self, ConfigError> {
        let data_dir = options.data_dir.ok_or(ConfigError::Missing("data_dir"))?;
        let genesis_file = options.genesis_file.ok_or(ConfigError::Missing("genesis_file"))?;
        let genesis = read_genesis(&genesis_file)?;
        let key = match &options.key_file {
            Some(path) => {
                let error = |source| ConfigError::Key { path: path.clone(), source };
                let asked = || passphrase(options.key_passphrase_file.as_deref());
                Some(KeyFile::read(path).and_then(|file| file.unlock(asked)).map_err(error)?)
            }
            None => None,
        };
        let member = key.as_ref().map(|key| {
            let public_key = key.public_key();
            let member = genesis.masternodes().iter().find(|m| m.public_key == public_key);
            member.map(|m| m.id.clone()).ok_or(LedgerError::NotMember(public_key))
        });
        let id = match member.transpose()? {
            Some(id) => id,
            None => options.id.unwrap_or_else(|| "observer".into()),
        };
        let port = genesis.network().base_port();
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let listen = Listen {
            p2p: Some(options.p2p_listen.unwrap_or(SocketAddr::new(any, port))),
            http: Some(options.http_listen.unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port + 1))),
            websocket: Some(options.websocket_listen.unwrap_or(SocketAddr::new(any, port + 2))),
        };
        let cache_mb = options.cache_mb.unwrap_or(64);
        if !(1..=1024 * 1024).contains(&cache_mb) {
            return Err(ConfigError::Invalid { key: "cache_mb", what: "1 to 1048576 megabytes".into() });
        }
        let compact_above_mb = options.compact_above_mb.unwrap_or(COMPACT_ABOVE_MB);
        if compact_above_mb > 1024 * 1024 {
            return Err(ConfigError::Invalid { key: "compact_above_mb", what: "0 to 1048576 megabytes".into() });
        }
        Ok(Self {
            id,
            first_start: data_dir.join(FIRST_START_FILE).exists(),
            data_dir,
            peers: parse_peers(options.peers.unwrap_or_default(), &genesis)?,
            genesis,
            key,
            listen,
            public_address: options.public_address,
            cache_bytes: cache_mb * 1024 * 1024,
            max_connections: options.max_connections.unwrap_or(MAX_CONNECTIONS),
            max_connections_per_ip: options.max_connections_per_ip.unwrap_or(MAX_CONNECTIONS_PER_IP),
            retention_blocks: Some(options.retention_blocks.unwrap_or(RETENTION_BLOCKS)).filter(|n| *n > 0),
            compact_above_bytes: (compact_above_mb > 0).then_some(compact_above_mb * 1024 * 1024),
        })
    }
}

fn parse_peers(texts: Vec<String>, genesis: &Genesis) -> Result<BTreeMap<String, String>, ConfigError> {
    let parse = |text: String| match text.split_once('=') {
        Some((id, address)) if genesis.masternodes().iter().any(|m| m.id == id) => {
            Ok((id.to_owned(), address.to_owned()))
        }
        Some((id, _)) => {
            Err(ConfigError::Invalid { key: "peers", what: format!("the genesis has no masternode {id:?}") })
        }
        None => Err(ConfigError::Invalid { key: "peers", what: format!("{text:?} is not id=host:port") }),
    };
    texts.into_iter().map(parse).collect()
}

impl Settings {
    /// Opens the database and puts the node together; it does not run yet.
    pub fn open(self) -> Result<MasternodeUTXOIntegration, ConfigError> {
        let committee = Arc::new(Committee::of_genesis(&self.genesis));
        let addresses = committee
            .indices()
            .map(|index| {
                let member = committee.member(index);
                let address = self.peers.get(&member.id).unwrap_or(&member.p2p_address);
                (index, address.clone())
            })
            .filter(|(_, address)| !address.is_empty())
            .collect();
        let peers = PeerManager::new(PeerConfig {
            addresses,
            max_connections: self.max_connections,
            max_connections_per_ip: self.max_connections_per_ip,
            public_address: self.public_address,
            ..PeerConfig::new(self.genesis.network(), committee, self.key.clone())
        });
        let ledger = UTXOStateManager::open(LedgerConfig {
            id: self.id.clone(),
            data_dir: self.data_dir.clone(),
            genesis: self.genesis,
            key: self.key,
            cache_bytes: self.cache_bytes,
            first_start: self.first_start,
            retention_blocks: self.retention_blocks,
            compact_above_bytes: self.compact_above_bytes,
        })?;
        forget_first_start(&self.data_dir)?;
        let node = MasternodeUTXOIntegration::new(self.id, Arc::new(ledger), Arc::new(peers));
        Ok(node.listening(self.listen))
    }
}

/// A configuration file with every key explained; those that are not set are comments.
pub fn commented(options: &Options) -> String {
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let text = |value: &Option<String>| value.as_ref().map(|v| quoted(v));
    let path = |value: &Option<PathBuf>| value.as_ref().map(|v| quoted(&v.to_string_lossy()));
    let address = |value: &Option<SocketAddr>| value.map(|v| format!("\"{v}\""));
    let number = |value: Option<u64>| value.map(|v| v.to_string());
    let rows: [(&str, Option<String>, &str, &str); 17] = [
        ("data_dir", path(&options.data_dir), "\"data\"", "Where the database and its guard live."),
        ("genesis_file", path(&options.genesis_file), "\"genesis.json\"", "The network's genesis file."),
        (
            "key_file",
            path(&options.key_file),
            "\"masternode.key\"",
            "The masternode's key. Without one the node is an observer: it follows and never votes.\n# Never run two nodes with one key.",
        ),
        (
            "key_passphrase_file",
            path(&options.key_passphrase_file),
            "\"passphrase\"",
            "The passphrase of an encrypted key file, on its first line.",
        ),
        ("id", text(&options.id), "\"observer\"", "An observer's name. A masternode's stands in the genesis."),
        ("p2p_listen", address(&options.p2p_listen), "\"0.0.0.0:24000\"", "Where peers are accepted (testnet: 24100)."),
        (
            "http_listen",
            address(&options.http_listen),
            "\"127.0.0.1:24001\"",
            "/livez, /readyz, /metrics, /status (testnet: 24101). Keep it private.",
        ),
        (
            "websocket_listen",
            address(&options.websocket_listen),
            "\"0.0.0.0:24002\"",
            "Where wallets are accepted (testnet: 24102).",
        ),
        (
            "public_address",
            text(&options.public_address),
            "\"node.example:24000\"",
            "What peers may dial, if it differs from the genesis.",
        ),
        (
            "peers",
            options.peers.as_ref().map(|p| toml::Value::from(p.clone()).to_string()),
            "[\"masternode-2=10.0.0.2:24000\"]",
            "Where members really are, instead of where the genesis says.",
        ),
        ("cache_mb", number(options.cache_mb), "64", "Megabytes of the database's cache."),
        (
            "max_connections",
            number(options.max_connections.map(|n| n as u64)),
            "4096",
            "Connections of wallets and strangers, all together.",
        ),
        (
            "max_connections_per_ip",
            number(options.max_connections_per_ip.map(|n| n as u64)),
            "256",
            "Connections from one IP address.",
        ),
        (
            "retention_blocks",
            number(options.retention_blocks),
            "604800",
            "Blocks whose spent outputs, certificates and changes are kept; 0 keeps everything.",
        ),
        (
            "compact_above_mb",
            number(options.compact_above_mb),
            "256",
            "Megabytes on disk from which on the node makes its database compact when it has little to do; 0 never does.",
        ),
        ("log", text(&options.log), "\"info\"", "What is logged, as in RUST_LOG."),
        (
            "log_format",
            options.log_format.map(|f| if f == LogFormat::Json { "\"json\"".into() } else { "\"human\"".into() }),
            "\"human\"",
            "\"human\" or \"json\".",
        ),
    ];
    let mut out = String::from(
        "# Configuration of a time-masternode. Relative paths are relative to this file.\n\
         # Each key can also be given in the environment (data_dir as TIME_DATA_DIR) or as a\n\
         # flag (--data-dir); a flag goes before the environment, the environment before this.\n",
    );
    for (key, value, example, comment) in rows {
        match value {
            Some(value) => out.push_str(&format!("\n# {comment}\n{key} = {value}\n")),
            None => out.push_str(&format!("\n# {comment}\n#{key} = {example}\n")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commented_file_is_read_back() {
        let options = Options {
            data_dir: Some("data".into()),
            genesis_file: Some("genesis.json".into()),
            p2p_listen: Some(([127, 0, 0, 1], 7).into()),
            peers: Some(vec!["a=b:1".into()]),
            cache_mb: Some(8),
            max_connections: Some(3),
            log_format: Some(LogFormat::Json),
            ..Options::default()
        };
        assert_eq!(toml::from_str::<Options>(&commented(&options)).unwrap(), options);
        // Every example is a valid value too, and every key has one.
        let uncommented = commented(&Options::default()).replace("\n#", "\n").replace("\n ", "\n# ");
        let all: Options = toml::from_str(&uncommented.replace("# Configuration", "#"))
            .unwrap_or_else(|e| panic!("{e}\n{uncommented}"));
        assert!(serde_json::to_value(&all).unwrap().as_object().unwrap().values().all(|value| !value.is_null()));
    }

    /// TOML knows fewer escapes than Rust, and must not be given Rust's.
    #[test]
    fn any_text_is_read_back_from_the_commented_file() {
        let text = "a\u{0}\u{7f}\u{200b}\n\"\\'\u{10ffff}\u{85}\r";
        let options = Options {
            data_dir: Some(text.into()),
            id: Some(text.into()),
            peers: Some(vec![text.into(), String::new()]),
            log: Some("\"\"\"\n'''".into()),
            ..Options::default()
        };
        let written = commented(&options);
        assert_eq!(toml::from_str::<Options>(&written).unwrap(), options, "{written}");
    }

    #[test]
    fn a_file_that_is_not_utf_8_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        std::fs::write(&path, b"data_dir = \"d\xff\"\n").unwrap();
        assert!(matches!(Options::read(&path), Err(ConfigError::Toml { .. })));
        std::fs::write(&path, "data_dir = \"d\u{fc}\"\n").unwrap();
        assert_eq!(Options::read(&path).unwrap().data_dir, Some(directory.path().join("d\u{fc}")));
    }

    #[test]
    fn what_is_unknown_is_refused_and_flags_go_first() {
        assert!(toml::from_str::<Options>("data_dri = \"x\"").is_err());
        let flags = Options { cache_mb: Some(1), ..Options::default() };
        let file = Options { cache_mb: Some(2), id: Some("x".into()), ..Options::default() };
        let both = flags.or(file);
        assert_eq!((both.cache_mb, both.id.as_deref()), (Some(1), Some("x")));
    }
}
