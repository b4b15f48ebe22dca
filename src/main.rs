//! `time-masternode`: init, run, devnet.
#![forbid(unsafe_code)]

mod demo;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use time_masternode::config::{LogFormat, Options, Settings, commented, make_data_dir, read_genesis};
use time_masternode::db::DatabaseError;
use time_masternode::devnet::{Devnet, DevnetOptions};
use time_masternode::node::MasternodeUTXOIntegration;
use time_masternode::types::SecretKey;
use time_masternode::{files, keyfile};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The storage engine allocates much and frees it on other threads, which costs the system's
/// allocator a quarter more CPU for a payment (docs/PERFORMANCE.md).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How long opening may take before that is said.
const OPENING_IS_LONG: Duration = Duration::from_secs(30);
/// How long a node that has failed may take to close what it has open.
const AFTER_FAILURE: Duration = Duration::from_secs(10);

/// A masternode for a UTXO payment network with instant finality.
///
/// Exit codes: 0 stopped cleanly, 1 had to stop or could not start, 2 wrong usage or
/// configuration.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write a data directory, a key file and a commented configuration
    #[command(
        after_help = "Example:\n  time-masternode init --dir my-node --genesis genesis.json\n  time-masternode run --config my-node/config.toml"
    )]
    Init(Init),
    /// Run a node until it is told to stop (SIGINT, SIGTERM)
    #[command(
        after_help = "Every option can stand in the configuration file (--p2p-listen as p2p_listen) or in the\nenvironment (TIME_P2P_LISTEN). A flag goes before the environment, that before the file."
    )]
    Run(Run),
    /// Run a whole network with funded wallets, in one process
    #[command(
        after_help = "Examples:\n  time-masternode devnet --demo\n  time-masternode devnet --data-dir net\n  time-masternode devnet --data-dir net --init-only && time-masternode run --config net/masternode-1/config.toml\n\nNode i listens on base+10*(i-1)+{0,1,2} for peers, HTTP and wallets. DIR/devnet.json says\nwhere everything is, with the secret seeds of the wallets."
    )]
    Devnet(DevnetArgs),
}

#[derive(Args)]
struct Init {
    /// The directory to make
    #[arg(long)]
    dir: PathBuf,
    /// The network's genesis file; it is copied
    #[arg(long)]
    genesis: Option<PathBuf>,
    /// Configure an observer: no key
    #[arg(long)]
    observer: bool,
}

#[derive(Args)]
struct Run {
    /// The configuration file
    #[arg(long, short, env = "TIME_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: Box<Options>,
    /// This key has never been used: make the database without a fence. Never after a loss
    #[arg(long)]
    first_start: bool,
}

#[derive(Args)]
struct DevnetArgs {
    /// Masternodes
    #[arg(long, default_value_t = 4)]
    nodes: u16,
    /// Where to keep it; an existing one is continued. Default: a temporary one, removed at the end
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The first node's first port
    #[arg(long, default_value_t = 24_000)]
    base_port: u16,
    /// How long after a block the next is due (part of the genesis)
    #[arg(long, default_value_t = 2_000, value_name = "MS")]
    block_interval_ms: u64,
    /// Write the files and exit
    #[arg(long, requires = "data_dir")]
    init_only: bool,
    /// Make payments, show each state change with its milliseconds, and exit
    #[arg(long, conflicts_with = "init_only")]
    demo: bool,
    /// What is logged, as in RUST_LOG
    #[arg(long, env = "TIME_LOG", default_value = "warn", value_name = "FILTER")]
    log: String,
    /// How logs look
    #[arg(long, env = "TIME_LOG_FORMAT", default_value = "human", value_name = "FORMAT")]
    log_format: LogFormat,
}

/// The configuration is no good: exit code 2.
struct Misconfigured(anyhow::Error);

enum Failure {
    Config(Misconfigured),
    Stopped(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Stopped(error)
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Init(args) => init(&args).map_err(|e| Failure::Config(Misconfigured(e))),
        Command::Run(args) => run(args),
        Command::Devnet(args) => devnet(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Config(Misconfigured(error))) => {
            tell(&error);
            ExitCode::from(2)
        }
        Err(Failure::Stopped(error)) => {
            tell(&error);
            ExitCode::from(1)
        }
    }
}

/// Says what went wrong, and what to do about it where that is known.
fn tell(error: &anyhow::Error) {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Some errors say what caused them themselves.
        if !text.ends_with(&cause) {
            text = if text.is_empty() { cause } else { format!("{text}: {cause}") };
        }
    }
    eprintln!("error: {text}");
    if let Some(database) = error.chain().find_map(|cause| cause.downcast_ref::<DatabaseError>()) {
        eprintln!("next: {}", database.next_step());
    }
}

const AGREEMENT_CRATES: [&str; 3] =
    ["arc_malachitebft_core_consensus", "arc_malachitebft_core_driver", "arc_malachitebft_core_votekeeper"];

fn start_logging(filter: &str, format: LogFormat) -> anyhow::Result<()> {
    // The agreement crate tells of every vote at `info`; who wants that names it.
    let quiet: &[&str] = if filter.contains("malachite") { &[] } else { &AGREEMENT_CRATES };
    let filter = quiet.iter().fold(filter.to_owned(), |all, name| format!("{all},{name}=warn"));
    let filter = tracing_subscriber::EnvFilter::try_new(&filter).with_context(|| format!("log filter {filter:?}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Human => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("starting the log: {error}"))
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")
}

fn init(args: &Init) -> anyhow::Result<()> {
    let config_file = args.dir.join("config.toml");
    anyhow::ensure!(!config_file.exists(), "{} exists already and is never overwritten", config_file.display());
    make_data_dir(&args.dir.join("data")).context("making the data directory")?;
    if let Some(genesis) = &args.genesis {
        read_genesis(genesis)?;
        let bytes = std::fs::read(genesis).with_context(|| format!("reading {}", genesis.display()))?;
        files::create_new(&args.dir.join("genesis.json"), 0o644, &bytes)?;
    }
    let key_file = Path::new("masternode.key");
    let key = (!args.observer).then(SecretKey::generate);
    if let Some(key) = &key {
        keyfile::create(&args.dir.join(key_file), key, None)?;
    }
    let options = Options {
        data_dir: Some("data".into()),
        genesis_file: Some("genesis.json".into()),
        key_file: key.as_ref().map(|_| key_file.to_path_buf()),
        ..Options::default()
    };
    files::create_new(&config_file, 0o644, commented(&options).as_bytes())?;
    println!("wrote {}", config_file.display());
    if let Some(key) = key {
        println!("public key {}", key.public_key());
        println!("Keep {} safe and private: whoever has it votes in your name.", args.dir.join(key_file).display());
    }
    if args.genesis.is_none() {
        println!("Put the network's genesis.json into {} before you run it.", args.dir.display());
    }
    println!("Then: time-masternode run --config {}", config_file.display());
    Ok(())
}

fn run(args: Run) -> Result<(), Failure> {
    let config = |error: anyhow::Error| Failure::Config(Misconfigured(error));
    let file = match &args.config {
        Some(path) => Options::read(path).map_err(|e| config(e.into()))?,
        None => Options::default(),
    };
    let options = args.options.or(file);
    start_logging(options.log.as_deref().unwrap_or("info"), options.log_format.unwrap_or_default()).map_err(config)?;
    let mut settings = Settings::try_from(options).map_err(|e| config(e.into()))?;
    settings.first_start |= args.first_start;
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        // Before anything is opened, so that a signal during the start is not the end.
        let mut signals = Signals::listen()?;
        let Some(node) = opened(settings, &mut signals).await? else { return Ok(Ended::Opening) };
        node.initialize().await.context("starting the node")?;
        until_stopped(&[node], signals).await.map(|()| Ended::Running)
    });
    if !matches!(outcome, Ok(Ended::Running)) {
        // What was going on may never come to an end.
        runtime.shutdown_background();
    }
    Ok(outcome.map(|_| ())?)
}

/// What a node was doing when it was told to stop.
enum Ended {
    Opening,
    Running,
}

/// Opens the node, on a thread of its own: with a damaged database that may never come to an
/// end. `None` if it was told to stop meanwhile.
async fn opened(settings: Settings, signals: &mut Signals) -> anyhow::Result<Option<MasternodeUTXOIntegration>> {
    let mut opening = tokio::task::spawn_blocking(move || settings.open());
    let mut long = tokio::time::interval_at(tokio::time::Instant::now() + OPENING_IS_LONG, OPENING_IS_LONG);
    loop {
        tokio::select! {
            outcome = &mut opening => {
                let node = outcome.context("opening the node")?.context("opening the node")?;
                return Ok(Some(node));
            }
            _ = signals.interrupt.recv() => break,
            _ = signals.terminate.recv() => break,
            _ = long.tick() => tracing::warn!(
                "the database is still being opened; a large one takes minutes, a damaged one may never be open: \
                 then stop the node, keep the directory, and look at it with `time-db verify`"
            ),
        }
    }
    tracing::info!("stopped while the database was being opened");
    Ok(None)
}

/// What an operator ends a node with.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        let terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        Ok(Self { interrupt, terminate })
    }
}

/// Runs nodes until a signal comes or one of them has to stop.
async fn until_stopped(nodes: &[MasternodeUTXOIntegration], mut signals: Signals) -> anyhow::Result<()> {
    let stopped = futures_util::future::select_all(nodes.iter().map(|node| Box::pin(node.stopped())));
    let outcome = tokio::select! {
        _ = signals.interrupt.recv() => Ok(()),
        _ = signals.terminate.recv() => Ok(()),
        (reason, ..) = stopped => reason.map_err(anyhow::Error::msg),
    };
    let patience = if outcome.is_ok() { Duration::MAX } else { AFTER_FAILURE };
    for node in nodes {
        if tokio::time::timeout(patience, node.shutdown()).await.is_err() {
            tracing::warn!("it does not come to an end by itself");
        }
    }
    tracing::info!("stopped");
    outcome
}

fn devnet(args: &DevnetArgs) -> Result<(), Failure> {
    let config = |error: anyhow::Error| Failure::Config(Misconfigured(error));
    start_logging(&args.log, args.log_format).map_err(config)?;
    let temporary = match &args.data_dir {
        Some(_) => None,
        None => {
            Some(tempfile::Builder::new().prefix("time-devnet-").tempdir().context("making a temporary directory")?)
        }
    };
    let directory = match (&args.data_dir, &temporary) {
        (Some(directory), _) => directory.clone(),
        (None, Some(temporary)) => temporary.path().to_path_buf(),
        (None, None) => return Err(config(anyhow::anyhow!("no directory"))),
    };
    let options =
        DevnetOptions { nodes: args.nodes, base_port: args.base_port, block_interval_ms: args.block_interval_ms };
    let devnet = Devnet::open(&directory, options).map_err(|e| config(e.into()))?;
    if args.init_only {
        println!("wrote {}", directory.join("devnet.json").display());
        for node in &devnet.nodes {
            println!("time-masternode run --config {}", directory.join(&node.config_file).display());
        }
        return Ok(());
    }
    let result = runtime()?.block_on(run_devnet(&directory, &devnet, args.demo));
    drop(temporary);
    Ok(result?)
}

async fn run_devnet(directory: &Path, devnet: &Devnet, show: bool) -> anyhow::Result<()> {
    let signals = Signals::listen()?;
    let mut nodes = Vec::new();
    for node in &devnet.nodes {
        let settings = Settings::try_from(Options::read(&directory.join(&node.config_file))?)?;
        let node = settings.open().with_context(|| format!("opening {}", node.id))?;
        node.initialize().await?;
        nodes.push(node);
    }
    let connected = async {
        for node in &nodes {
            let mut changed = node.peers().members_changed();
            while node.peers().connected_members().len() + 1 < nodes.len() {
                changed.changed().await.context("a node stopped")?;
            }
            while !node.not_ready()?.is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        Ok::<(), anyhow::Error>(())
    };
    connected.await?;
    println!("devnet ready");
    if show {
        let shown = demo::run(directory, devnet).await;
        for node in &nodes {
            node.shutdown().await;
        }
        return shown;
    }
    until_stopped(&nodes, signals).await
}
