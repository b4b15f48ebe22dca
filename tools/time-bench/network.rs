//! The network that is loaded: one that is started here, or one that runs already.
//!
//! Nodes that were started here are processes of the `time-masternode` program and are
//! killed when this value is dropped, whatever ends the run. They lose nothing by that: what
//! a node has said is on disk.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use time_masternode::config::read_genesis;
use time_masternode::devnet::{Devnet, DevnetNode, DevnetOptions, FILE_NAME};
use time_masternode::types::Genesis;
use tokio::time::sleep;

use super::cli::NetworkArgs;
use super::probe;
use super::report::remark;

/// How long the nodes may take until they are ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How often they are asked.
const READY_POLL: Duration = Duration::from_millis(20);
/// What a node writes its log into, beside its configuration.
const LOG_NAME: &str = "time-bench.log";
/// Attempts to find free ports.
const PORT_ATTEMPTS: usize = 1_000;
/// How often it is looked whether databases are compact, and how long that may take.
const COMPACTION_POLL: Duration = Duration::from_millis(1_000);
const COMPACTION_TIMEOUT: Duration = Duration::from_secs(600);

/// Child processes that do not outlive this value.
#[derive(Default)]
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended by itself; either way it is gone afterwards.
            let _gone = child.kill().is_ok() && child.wait().is_ok();
        }
    }
}

/// A network that runs.
pub struct Network {
    pub directory: PathBuf,
    pub devnet: Devnet,
    pub genesis: Genesis,
    /// The nodes' processes, where they are known.
    pub pids: Vec<Option<u32>>,
    // Before the directory, so that nothing runs in it when it is removed.
    children: Children,
    _temporary: Option<tempfile::TempDir>,
}

impl Network {
    /// Starts a network or finds the one that runs, and waits until it is ready.
    pub async fn open(arguments: &NetworkArgs) -> anyhow::Result<Self> {
        let mut network = match &arguments.network {
            Some(directory) => Self::running(directory, &arguments.pids)?,
            None => Self::start(arguments)?,
        };
        network.wait_ready().await?;
        Ok(network)
    }

    fn running(directory: &Path, pids: &[u32]) -> anyhow::Result<Self> {
        ensure!(directory.join(FILE_NAME).is_file(), "{} has no {FILE_NAME}", directory.display());
        // What is there is read; the options are for a new one.
        let options = DevnetOptions { nodes: 0, base_port: 0, block_interval_ms: 0 };
        let devnet = Devnet::open(directory, options)?;
        let nodes = devnet.nodes.len();
        ensure!(pids.is_empty() || pids.len() == nodes, "--pids: the devnet has {nodes} nodes");
        let pids = (0..nodes).map(|node| pids.get(node).copied()).collect();
        Self::new(directory.to_path_buf(), devnet, pids, Children::default(), None)
    }

    fn start(arguments: &NetworkArgs) -> anyhow::Result<Self> {
        let program = match &arguments.masternode {
            Some(program) => program.clone(),
            None => beside_this_program("time-masternode")?,
        };
        ensure!(program.is_file(), "{} is no program; build it or give --masternode", program.display());
        let temporary = match &arguments.data_dir {
            Some(_) => None,
            None => {
                Some(tempfile::Builder::new().prefix("time-bench-").tempdir().context("making a temporary directory")?)
            }
        };
        let given = arguments.data_dir.as_deref();
        let directory = given.or(temporary.as_ref().map(tempfile::TempDir::path)).context("no directory")?;
        let base_port = match arguments.base_port {
            Some(port) => port,
            None => free_base_port(arguments.nodes)?,
        };
        let block_interval_ms = arguments.block_interval_ms;
        let devnet = Devnet::open(directory, DevnetOptions { nodes: arguments.nodes, base_port, block_interval_ms })?;
        let mut children = Children::default();
        for node in &devnet.nodes {
            children.0.push(start_node(&program, directory, node, arguments)?);
        }
        let pids = children.0.iter().map(|child| Some(child.id())).collect();
        Self::new(directory.to_path_buf(), devnet, pids, children, temporary)
    }

    fn new(
        directory: PathBuf,
        devnet: Devnet,
        pids: Vec<Option<u32>>,
        children: Children,
        temporary: Option<tempfile::TempDir>,
    ) -> anyhow::Result<Self> {
        let genesis = read_genesis(&directory.join(&devnet.genesis_file))?;
        Ok(Self { directory, devnet, genesis, pids, children, _temporary: temporary })
    }

    /// Waits until each node is ready and sees all others.
    async fn wait_ready(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + READY_TIMEOUT;
        for index in 0..self.devnet.nodes.len() {
            while !self.is_ready(index).await {
                self.check_processes()?;
                let id = &self.devnet.nodes[index].id;
                ensure!(Instant::now() < until, "{id} is not ready within {READY_TIMEOUT:?}\n{}", self.log(index));
                sleep(READY_POLL).await;
            }
        }
        let running: Vec<String> = self.pids.iter().flatten().map(ToString::to_string).collect();
        if !running.is_empty() {
            remark(&format!("{} nodes are ready; processes {}", self.devnet.nodes.len(), running.join(",")));
        }
        Ok(())
    }

    async fn is_ready(&self, index: usize) -> bool {
        let Ok((200, body)) = probe::http(&self.devnet.nodes[index].http_address, "/status").await else {
            return false;
        };
        let Ok(status) = serde_json::from_str::<serde_json::Value>(&body) else { return false };
        let peers = status["peers"].as_array().map_or(0, Vec::len);
        status["ready"] == true && peers + 1 == self.devnet.nodes.len()
    }

    /// After something failed: an error if that is because a node has ended.
    pub async fn why_a_process_ended(&mut self) -> anyhow::Result<()> {
        // Its connections are gone a moment before the process is.
        sleep(READY_POLL).await;
        self.check_processes()
    }

    /// An error if a node that was started here has ended.
    fn check_processes(&mut self) -> anyhow::Result<()> {
        for index in 0..self.children.0.len() {
            if let Some(status) = self.children.0[index].try_wait().context("looking after a node")? {
                bail!("{} ended with {status}\n{}", self.devnet.nodes[index].id, self.log(index));
            }
        }
        Ok(())
    }

    /// The end of a node's log, if it was started here.
    fn log(&self, index: usize) -> String {
        const LINES: usize = 20;
        let path = self.directory.join(&self.devnet.nodes[index].id).join(LOG_NAME);
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }

    /// The nodes with these ids, or all.
    pub fn chosen(&self, ids: &[String]) -> anyhow::Result<Vec<usize>> {
        if ids.is_empty() {
            return Ok((0..self.devnet.nodes.len()).collect());
        }
        let find = |id: &String| {
            let found = self.devnet.nodes.iter().position(|node| node.id == *id);
            found.with_context(|| format!("--to: there is no node {id:?}"))
        };
        let mut chosen = ids.iter().map(find).collect::<anyhow::Result<Vec<_>>>()?;
        chosen.sort_unstable();
        chosen.dedup();
        Ok(chosen)
    }

    /// Waits until no node has a reason to make its database compact, or is about it.
    pub async fn compacted(&self) -> anyhow::Result<()> {
        remark("waiting for the nodes to make their databases compact");
        let (began, mut since) = (Instant::now(), Instant::now());
        // Whether it is time is looked at once a second.
        while since.elapsed() < 3 * COMPACTION_POLL {
            if began.elapsed() > COMPACTION_TIMEOUT {
                bail!("the nodes' databases were not made compact in {COMPACTION_TIMEOUT:?}");
            }
            sleep(COMPACTION_POLL).await;
            for node in &self.devnet.nodes {
                if probe::metrics(&node.http_address).await?.get("database_compaction_due") != Some(&0) {
                    since = Instant::now();
                }
            }
        }
        Ok(())
    }

    /// Looks at every node.
    pub async fn sample(&self) -> anyhow::Result<Vec<probe::NodeSample>> {
        // Processes first and all at once: asking the nodes takes some time.
        let process = |pid: &Option<u32>| pid.map(|pid| probe::process(&pid.to_string())).transpose();
        let processes = self.pids.iter().map(process).collect::<anyhow::Result<Vec<_>>>()?;
        let mut samples = Vec::with_capacity(processes.len());
        for (node, process) in self.devnet.nodes.iter().zip(processes) {
            let data_dir = self.directory.join(&node.data_dir);
            let disk_bytes = probe::disk_bytes(&data_dir).with_context(|| format!("{}", data_dir.display()))?;
            let metrics = match probe::metrics(&node.http_address).await {
                // Somebody else's node that is down is no reason to lose the rest.
                Err(error) if self.children.0.is_empty() => {
                    remark(&format!("{} does not say what it counts: {error:#}", node.id));
                    BTreeMap::new()
                }
                metrics => metrics?,
            };
            samples.push(probe::NodeSample { process, metrics, disk_bytes });
        }
        Ok(samples)
    }
}

fn beside_this_program(name: &str) -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe().context("where is this program?")?;
    Ok(this.with_file_name(name))
}

fn start_node(program: &Path, directory: &Path, node: &DevnetNode, arguments: &NetworkArgs) -> anyhow::Result<Child> {
    let path = directory.join(&node.id).join(LOG_NAME);
    let log = std::fs::File::create(&path).with_context(|| format!("making {}", path.display()))?;
    Command::new(program)
        .args(["run", "--config"])
        .arg(directory.join(&node.config_file))
        .args(arguments.retention_blocks.map(|blocks| format!("--retention-blocks={blocks}")))
        .args(arguments.compacted.then_some("--compact-above-mb=1"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))
}

/// A port from which on all ports of a devnet are free right now.
fn free_base_port(nodes: u16) -> anyhow::Result<u16> {
    for _ in 0..PORT_ATTEMPTS {
        // Below the range from which the system takes ports for outgoing connections.
        let base = 10_000 + rand::random::<u16>() % 20_000;
        let ports = (0..nodes).flat_map(|node| (0..3).map(move |port| base.saturating_add(10 * node + port)));
        let held: Result<Vec<_>, _> = ports.map(|port| TcpListener::bind(("127.0.0.1", port))).collect();
        if held.is_ok() {
            return Ok(base);
        }
    }
    bail!("no free ports for {nodes} nodes; give --base-port")
}
