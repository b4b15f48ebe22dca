//! Real faults on the real program: a library between it and the system, the disk that a
//! power cut leaves, payments while all that happens, and a record of what was said.
//!
//! A node's own sockets are the witness. The shim writes down, in one order, what the node
//! changed on its disk and what it said; so each word has a place in the trace, and whatever
//! happens to the disk from there on, the word has to stand.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod dice;
pub mod disk;
pub mod said;
pub mod trace;
pub mod traffic;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use time_masternode::db::{Database, DatabaseError, Opened, Owner, Report, VerifyOptions, verify_data_dir};
use time_masternode::types::{Genesis, PublicKey};

use self::said::Said;
use super::support::{TestNet, http_get};

pub use dice::Dice;

/// How long a process may take for anything before it counts as hanging.
pub const PATIENCE: Duration = Duration::from_secs(180);

const CACHE_BYTES: u64 = 16 * 1024 * 1024;

/// A number from the environment.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// The seed of this run: `TIME_SEED`, or any.
pub fn seed(test: &str) -> u64 {
    let seed = number("TIME_SEED").unwrap_or_else(|| u64::from(rand::random::<u32>()));
    eprintln!("{test}: replay with TIME_SEED={seed}");
    seed
}

/// The library that the node is started with, built once.
pub fn shim() -> &'static Path {
    static SHIM: OnceLock<PathBuf> = OnceLock::new();
    SHIM.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/faults/shim.c");
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        // Other test programs build it at the same time.
        let unfinished = directory.join(format!("shim-{}.so", std::process::id()));
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let built = Command::new(compiler)
            .args(["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o"])
            .args([&unfinished, &source])
            .args(["-lpthread", "-ldl"])
            .status()
            .expect("a C compiler is needed");
        assert!(built.success(), "the shim does not compile");
        let library = directory.join("shim.so");
        std::fs::rename(&unfinished, &library).unwrap();
        library
    })
}

/// How a node is started under the shim.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    variables: Vec<(&'static str, String)>,
}

impl Watch {
    /// Without it.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// Everything is written down.
    pub fn all(directory: &Path, trace: &Path) -> Self {
        Self::default().with("FAULT_DIR", directory.display()).with("FAULT_TRACE", trace.display())
    }

    /// What the node says is written down.
    pub fn words(directory: &Path, trace: &Path) -> Self {
        Self::all(directory, trace).with("FAULT_SENDS_ONLY", 1)
    }

    /// The n-th call on the data directory fails.
    #[must_use]
    pub fn failing(self, n: u64, kind: &str, for_ever: bool) -> Self {
        let failing = self.with("FAULT_AT", n).with("FAULT_KIND", kind);
        if for_ever { failing.with("FAULT_FOREVER", 1) } else { failing }
    }

    /// A sector of the database's file cannot be read, now or later.
    #[must_use]
    pub fn bad_sector(self, at: u64) -> Self {
        self.with("FAULT_BAD", at)
    }

    /// Gives a command what it needs to run so.
    pub fn apply<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        if !self.variables.is_empty() {
            command.env("LD_PRELOAD", shim());
        }
        command.envs(self.variables.iter().map(|(name, value)| (*name, value)))
    }

    fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.variables.push((name, value.to_string()));
        self
    }
}

/// A node's process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    http: String,
}

/// How a start went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It serves. What `/status` says of its voting.
    Up { voting: String },
    /// It ended with a clear word.
    Refused { error: String },
}

impl Process {
    /// Starts node `node` of a network on a data directory.
    pub fn start(net: &TestNet, node: usize, data_dir: &Path, watch: &Watch) -> Self {
        Self::start_with(net, node, data_dir, watch, &[])
    }

    /// The same with more options.
    pub fn start_with(net: &TestNet, node: usize, data_dir: &Path, watch: &Watch, options: &[&str]) -> Self {
        let about = &net.devnet.nodes[node];
        let log = net.directory().join(format!("process-{node}.log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_time-masternode"));
        command.args(["run", "--log", "info", "--config"]).arg(net.directory().join(&about.config_file));
        command.arg("--data-dir").arg(data_dir).args(options);
        watch.apply(&mut command);
        // What was said by processes of before stays, for whoever looks for the reason.
        let file = std::fs::OpenOptions::new().create(true).write(true).truncate(true).open(&log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().unwrap();
        Self { child, log, http: about.http_address.clone() }
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    pub fn status(&self) -> Option<serde_json::Value> {
        serde_json::from_str(&http_get(&self.http, "/status")?.1).ok()
    }

    /// A number of its `/metrics`.
    pub fn metric(&self, name: &str) -> Option<u64> {
        let (_, text) = http_get(&self.http, "/metrics")?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.parse().ok())
    }

    /// How often it has made its database compact, if it serves.
    pub fn compactions(&self) -> Option<u64> {
        self.metric("time_database_compactions_total")
    }

    /// Waits until it serves or has ended. What is neither is a hang, and what ends without
    /// a clear word an unexplained end: both are errors.
    pub fn outcome(&mut self) -> Result<Outcome, String> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return self.refusal(status).map(|error| Outcome::Refused { error });
            }
            if let Some(status) = self.status() {
                return Ok(Outcome::Up { voting: status["voting"].as_str().unwrap_or_default().to_owned() });
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("it hangs:\n{}", self.log()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until it has ended by itself.
    pub fn end(&mut self) -> Result<ExitStatus, String> {
        let began = Instant::now();
        loop {
            match self.ended() {
                Some(status) => return Ok(status),
                None if began.elapsed() > PATIENCE => return Err(format!("it does not end:\n{}", self.log())),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The clear word with which it ended: exit code 1 and an `error:` line.
    pub fn refusal(&self, status: ExitStatus) -> Result<String, String> {
        let log = self.log();
        let error = log.lines().rev().find(|line| line.starts_with("error: "));
        match (status.code(), error) {
            (Some(1), Some(error)) => Ok(error.to_owned()),
            _ => Err(format!("it ended with {status} and no clear word:\n{}", tail(&log))),
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            self.child.kill().unwrap();
        }
        self.child.wait().unwrap();
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) -> Result<ExitStatus, String> {
        if self.ended().is_none() {
            crate::support::terminate(&self.child);
        }
        self.end()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _killed = self.child.kill().is_ok() && self.child.wait().is_ok();
    }
}

/// The last lines of a log.
pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().rev().take(25).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// Waits until these processes see each other and are ready.
pub fn wait_ready(processes: &mut [Option<Process>]) {
    let running = processes.iter().flatten().count();
    let began = Instant::now();
    let is_ready = |process: &Process| {
        process.status().is_some_and(|status| {
            status["ready"] == true && status["peers"].as_array().is_some_and(|peers| peers.len() + 1 >= running)
        })
    };
    while !processes.iter().flatten().all(is_ready) {
        for process in processes.iter_mut().flatten() {
            if let Some(status) = process.ended() {
                panic!("a node ended with {status}:\n{}", process.log());
            }
        }
        let logs = || processes.iter().flatten().map(Process::log).collect::<Vec<_>>().join("\n---\n");
        assert!(began.elapsed() < PATIENCE, "a node is not ready:\n{}", logs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whose database is looked at.
#[derive(Debug, Clone)]
pub struct Member {
    pub genesis: Genesis,
    pub key: PublicKey,
}

impl Member {
    pub fn of(net: &TestNet, node: usize) -> Self {
        Self { genesis: net.genesis.clone(), key: net.member_key(node).public_key() }
    }

    /// Nothing said yet.
    pub fn said_nothing(&self) -> Said {
        Said::nothing(self.key, self.genesis.hash())
    }

    /// Opens a directory's database as the node does, in this process.
    pub fn open(&self, data_dir: &Path) -> Result<Opened, DatabaseError> {
        // The file is there until the first start has ended well.
        let first_start = data_dir.join("first-start").exists();
        let owner = Owner { genesis: &self.genesis, public_key: Some(self.key), first_start };
        Database::open(data_dir, owner, CACHE_BYTES)
    }

    /// Every invariant of a directory's database, checked.
    pub fn verify(&self, data_dir: &Path) -> Result<Report, DatabaseError> {
        let options = VerifyOptions { genesis: Some(&self.genesis), full: true, progress: &|_, _| {} };
        verify_data_dir(data_dir, CACHE_BYTES, options)
    }

    /// What does not hold of: it opens, it is sound, it fits its guard, it votes, and all that
    /// was said in the first `until` records is there. Nothing is the good answer.
    pub fn faults_of(&self, data_dir: &Path, said: &Said, until: usize) -> Vec<String> {
        let mut faults = Vec::new();
        let opened = match self.open(data_dir) {
            Ok(opened) => opened,
            Err(error) => return vec![format!("it does not open: {error}")],
        };
        faults.extend(opened.recovered.suspension.map(|reason| format!("it does not vote: {reason}")));
        faults.extend(opened.recovered.fence.map(|fence| format!("it is behind a fence: {fence:?}")));
        faults.extend(said.missing(until, &opened).unwrap_or_else(|error| vec![error.to_string()]));
        drop(opened);
        match self.verify(data_dir) {
            Ok(report) => faults.extend(report.findings().map(|(check, finding)| format!("{check}: {finding:?}"))),
            Err(error) => faults.push(format!("it cannot be verified: {error}")),
        }
        faults
    }
}

/// Copies a data directory.
pub fn copy(from: &Path, to: &Path) {
    disk::put_image(to, &disk::image_of(from));
}
