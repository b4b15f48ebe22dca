//! The disk fails: at any call, once or for good, by half a write, or because it is full.
//!
//! A node works under a shim that makes the n-th call on its data directory fail. It has to
//! stop with a clear word, or to refuse to start, or to go on where the call did not matter;
//! nothing may leave it that the disk did not take. Started again on a disk that works, it
//! has to hold every status, notification and subscription that had left, in a sound
//! database, and to go on.
//!
//! `TIME_IO_CALLS=2000` lets each of the first 2,000 calls fail (CI a few of them),
//! `TIME_IO_FIRST=900` those from there on, `TIME_IO_CALL=17` only that one, `TIME_SEED` chooses how they fail, and
//! `TIME_IO_KIND=enospc` (`eio`, `short`, `full`) that all fail in this way.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/faults/mod.rs"]
mod faults;
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use faults::disk::{Image, image_of, put_image};
use faults::said::Said;
use faults::trace::{Record, read_trace};
use faults::{Dice, Member, Outcome, PATIENCE, Process, Watch, number, seed};
use support::{TestNet, within};
use time_masternode::net::{NetworkMessage, TransactionStatusKind, UTXOSubscribe, WalletClient};
use time_masternode::types::{SecretKey, Transaction};

/// Payments that spend each other's change.
const CHAIN: usize = 400;
/// Payments that are made after a call has failed and the node goes on.
const PAYMENTS_AFTER: usize = 5;

/// How a call fails, and whether all after it do so too.
const FAULTS: [(&str, bool); 7] = [
    ("eio", false),
    ("eio", true),
    ("enospc", false),
    ("enospc", true),
    ("short", false),
    ("short", true),
    ("full", true),
];

/// A network of one, whose wallet has signed all its payments beforehand.
struct Alone {
    net: TestNet,
    fresh: Image,
    payments: Vec<Transaction>,
    subscribe: UTXOSubscribe,
}

impl Alone {
    fn new() -> Self {
        let net = TestNet::with_interval(1, 200);
        let fresh = image_of(&net.data_dir(0));
        let to = net.address(&SecretKey::generate());
        let mut coin = net.coins().remove(0);
        let mut payments = Vec::new();
        for _ in 0..CHAIN {
            let payment = net.pay(&coin, &to, 1);
            coin = TestNet::outputs(&payment, &coin.key).remove(1);
            payments.push(payment);
        }
        let subscribe = UTXOSubscribe {
            outpoints: Vec::new(),
            addresses: vec![to.to_string()],
            subscriber_id: "wallet".into(),
            resume_token: Some("11".repeat(32)),
            resume_from: None,
            log_id: None,
        };
        Self { net, fresh, payments, subscribe }
    }

    async fn wallet(&self) -> Option<WalletClient> {
        let mut wallet = WalletClient::connect(&self.net.devnet.nodes[0].websocket_address).await.ok()?;
        wallet.send(&NetworkMessage::UTXOSubscribe(self.subscribe.clone())).await.ok()?;
        Some(wallet)
    }

    /// Pays, each payment when the one before is final, until the node is gone or `done`.
    /// Gives the number of payments of which the wallet was told that they are final.
    async fn pay_until(&self, mut done: impl FnMut(usize) -> bool) -> Result<usize, String> {
        let Some(mut wallet) = self.wallet().await else { return Ok(0) };
        for (n, payment) in self.payments.iter().enumerate() {
            if done(n) {
                return Ok(n);
            }
            if wallet.send(&NetworkMessage::TransactionBroadcast(payment.to_raw())).await.is_err() {
                return Ok(n);
            }
            let finality = wallet.wait_for(|message| match message {
                NetworkMessage::TransactionStatus(status) if status.txid == payment.txid() => {
                    status.status.is_final().then_some(())
                }
                _ => None,
            });
            match tokio::time::timeout(PATIENCE, finality).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Ok(n),
                Err(_) => return Err(format!("payment {n} is not final, and the node does not end")),
            }
        }
        Ok(self.payments.len())
    }

    /// The node serves again, knows what it said, and goes on.
    async fn goes_on(&self, data_dir: &Path, said: &Said) -> Result<(), String> {
        let mut process = Process::start(&self.net, 0, data_dir, &Watch::nothing());
        match process.outcome()? {
            Outcome::Up { voting } if voting == "Active" => {}
            other => return Err(format!("after a restart: {other:?}\n{}", process.log())),
        }
        let mut wallet = self.wallet().await.ok_or("no wallet can connect")?;
        let last = said.finals();
        let next = self.payments.iter().position(|payment| !last.contains(&payment.txid())).unwrap_or(CHAIN);
        for payment in self.payments[next..].iter().take(3) {
            wallet.send(&NetworkMessage::TransactionBroadcast(payment.to_raw())).await.map_err(|e| e.to_string())?;
            let status = wallet.wait_for(|message| match message {
                NetworkMessage::TransactionStatus(status) if status.txid == payment.txid() => {
                    (status.status != TransactionStatusKind::Pending).then_some(status.status)
                }
                _ => None,
            });
            let status = within("finality after a restart", status).await.map_err(|error| error.to_string())?;
            if !status.is_final() {
                return Err(format!("a payment after a restart is {status:?}"));
            }
        }
        let ended = process.stop()?;
        if !ended.success() {
            return Err(format!("after a restart it ended with {ended}:\n{}", process.log()));
        }
        let faults = Member::of(&self.net, 0).faults_of(data_dir, said, usize::MAX);
        if faults.is_empty() { Ok(()) } else { Err(format!("{faults:#?}")) }
    }

    fn said(&self, trace: &Path) -> (Said, Option<String>) {
        let (records, _) = read_trace(trace, 0);
        let failed = records.iter().find_map(|record| match record {
            Record::Fault { call, .. } => Some(call.clone()),
            _ => None,
        });
        let mut said = Member::of(&self.net, 0).said_nothing();
        said.hear(&records);
        (said, failed)
    }

    /// Lets the n-th call fail. How that went, in words.
    async fn fail_at(&self, n: u64, kind: &str, for_ever: bool) -> Result<String, String> {
        let (data_dir, trace) = (self.net.directory().join("failing"), self.net.directory().join("trace"));
        put_image(&data_dir, &self.fresh);
        if trace.exists() {
            std::fs::remove_file(&trace).unwrap();
        }
        let watch = Watch::words(&data_dir, &trace).failing(n, kind, for_ever);
        let mut process = Process::start(&self.net, 0, &data_dir, &watch);
        let mut how = match process.outcome()? {
            Outcome::Refused { .. } => Some("refused to start"),
            Outcome::Up { .. } => None,
        };
        if how.is_none() {
            let mut more = 0;
            let paid = self.pay_until(|_| {
                let failed = self.said(&trace).1.is_some();
                more += usize::from(failed);
                more > PAYMENTS_AFTER
            });
            paid.await.map_err(|error| format!("{error}\n{}", process.log()))?;
            // What has begun to stop is given the time for it.
            let (_, failed) = self.said(&trace);
            let must_stop = failed.as_deref().is_some_and(|call| kind != "short" && DEADLY.contains(&call));
            let ended = if must_stop { Some(process.end()?) } else { process.ended() };
            how = Some(match ended {
                Some(status) => {
                    process.refusal(status)?;
                    "stopped"
                }
                None => {
                    // It may meet the fault while it stops.
                    let status = process.stop()?;
                    if status.success() {
                        "went on"
                    } else {
                        process.refusal(status)?;
                        "stopped"
                    }
                }
            });
        }
        let (said, failed) = self.said(&trace);
        let Some(call) = failed else { return Ok("was never reached".into()) };
        self.goes_on(&data_dir, &said).await?;
        Ok(format!("{kind} at {call}: {}", how.unwrap()))
    }
}

/// A sector that cannot be read is no damage to what lies on the others: the node and `time-db`
/// say what to do, and nothing is cut off, set aside or forgotten.
#[tokio::test]
async fn a_bad_sector_is_no_reason_to_forget() {
    let mut dice = Dice::new(seed("bad sectors"));
    let alone = Alone::new();
    let (data_dir, trace) = (alone.net.directory().join("bad"), alone.net.directory().join("trace-of-bad"));
    put_image(&data_dir, &alone.fresh);
    let mut process = Process::start(&alone.net, 0, &data_dir, &Watch::words(&data_dir, &trace));
    assert!(matches!(process.outcome(), Ok(Outcome::Up { .. })));
    alone.pay_until(|n| n >= 40).await.unwrap();
    assert!(process.stop().unwrap().success());
    let (said, _) = alone.said(&trace);
    let sound = image_of(&data_dir);
    let size = sound[Path::new("db/db")].as_ref().unwrap().len() as u64;
    let genesis = alone.net.directory().join(&alone.net.devnet.genesis_file);
    let backup = alone.net.directory().join("backup");
    put_image(&backup, &sound);
    for _ in 0..number("TIME_IO_CALLS").unwrap_or(8).min(200) {
        put_image(&data_dir, &sound);
        let at = dice.below(size);
        let watch = Watch::words(&data_dir, &alone.net.directory().join("trace-of-look")).bad_sector(at);
        for args in [&["stats"][..], &["verify"], &["repair", "--apply"], &["compact"]] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_time-db"));
            command.arg("--data-dir").arg(&data_dir).arg("--genesis").arg(&genesis).args(args);
            let output = watch.apply(&mut command).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{args:?}, byte {at}: {text}");
            assert!(text.contains("Input/output error") && text.contains("check the disk"), "{args:?}: {text}");
        }
        let mut process = Process::start(&alone.net, 0, &data_dir, &watch);
        match process.outcome().unwrap() {
            Outcome::Refused { error } => assert!(error.contains("Input/output error"), "{error}"),
            up @ Outcome::Up { .. } => panic!("byte {at} cannot be read, and {up:?}"),
        }
        drop(process);
        assert_eq!(image_of(&data_dir), sound, "byte {at}: nothing was changed");
        // A backup is what helps then.
        let mut command = Command::new(env!("CARGO_BIN_EXE_time-db"));
        command.arg("--data-dir").arg(&data_dir).args(["restore", "--from"]).arg(&backup);
        let output = watch.apply(&mut command).output().unwrap();
        assert!(output.status.success(), "restore: {}", String::from_utf8_lossy(&output.stderr));
    }
    put_image(&data_dir, &sound);
    alone.goes_on(&data_dir, &said).await.unwrap();
}

/// Calls whose failure means that something is not on the platter.
const DEADLY: [&str; 4] = ["write", "fsync", "fdatasync", "sync_file_range"];

#[tokio::test]
async fn no_failed_call_takes_back_what_was_said() {
    let calls = number("TIME_IO_CALLS").unwrap_or(14);
    let mut dice = Dice::new(seed("failing calls"));
    let alone = Alone::new();
    let began = Instant::now();
    let numbers: Vec<u64> = match number("TIME_IO_CALL") {
        Some(only) => vec![only],
        // CI takes some of the first thousand.
        None if calls < 100 => (0..calls).map(|_| 1 + dice.below(1_000)).collect(),
        None => (number("TIME_IO_FIRST").unwrap_or(1)..=calls).collect(),
    };
    let wanted = std::env::var("TIME_IO_KIND").ok();
    let faults: Vec<_> = FAULTS.into_iter().filter(|(kind, _)| wanted.as_ref().is_none_or(|w| w == kind)).collect();
    assert!(!faults.is_empty(), "TIME_IO_KIND is eio, enospc, short or full");
    let first = dice.index(faults.len());
    let (mut met, mut violations) = (BTreeMap::<String, u64>::new(), Vec::new());
    for (i, n) in numbers.iter().enumerate() {
        let (kind, for_ever) = faults[(first + i) % faults.len()];
        match alone.fail_at(*n, kind, for_ever).await {
            Ok(how) => *met.entry(how).or_default() += 1,
            Err(what) => {
                eprintln!("call {n}, {kind}, for ever: {for_ever}: {what}");
                violations.push(format!("call {n}, {kind}, for ever: {for_ever}"));
            }
        }
        if (i + 1) % 100 == 0 || i + 1 == numbers.len() {
            eprintln!("{} failing calls, {:?}: {met:#?}", i + 1, began.elapsed());
        }
    }
    assert!(violations.is_empty(), "{} of {}: {violations:#?}", violations.len(), numbers.len());
}

/// A file system of a few megabytes in memory; none if this user may not make one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, megabytes: u32) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={megabytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(at.to_path_buf()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _unmounted = Command::new("umount").arg("-l").arg(&self.0).status().is_ok();
    }
}

/// The disk runs full under load, is still full at the next start, and has room again.
#[tokio::test]
async fn a_full_disk_and_its_return() {
    let alone = Alone::new();
    let mount_point = alone.net.directory().join("small");
    let Some(disk) = SmallDisk::mount(&mount_point, 6) else {
        eprintln!("left out: making a small file system needs root");
        return;
    };
    let (data_dir, trace) = (disk.0.join("data"), alone.net.directory().join("trace"));
    put_image(&data_dir, &alone.fresh);
    let ballast = disk.0.join("ballast");
    std::fs::write(&ballast, vec![0; 2 * 1024 * 1024]).unwrap();
    let mut process = Process::start(&alone.net, 0, &data_dir, &Watch::words(&data_dir, &trace));
    assert_eq!(process.outcome(), Ok(Outcome::Up { voting: "Active".into() }), "{}", process.log());
    let paid = alone.pay_until(|_| false).await.unwrap();
    assert!(paid > 0 && paid < CHAIN, "the disk is full before the wallet's coins are spent: {paid}");
    let status = process.end().unwrap();
    let error = process.refusal(status).unwrap();
    eprintln!("after {paid} payments: {error}");
    // Still full: it refuses, or serves what it has; either way nothing is lost by trying.
    for _ in 0..3 {
        let mut again = Process::start(&alone.net, 0, &data_dir, &Watch::words(&data_dir, &trace));
        match again.outcome().unwrap() {
            Outcome::Refused { error } => eprintln!("while it is full: {error}"),
            Outcome::Up { .. } => again.kill(),
        }
    }
    std::fs::remove_file(&ballast).unwrap();
    let (said, _) = alone.said(&trace);
    assert!(said.finals().len() >= paid);
    alone.goes_on(&data_dir, &said).await.unwrap();
}
