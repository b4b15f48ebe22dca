//! Damage anywhere in the data directory: the node holds all that it has said, or says that
//! it does not.
//!
//! A member of a real network is killed under load. Then a copy of its directory is damaged
//! at one place: sectors zeroed, overwritten or stale, bits flipped, files truncated, removed
//! or older than the others. The real program is started on it, and has to serve with
//! everything that it ever said in a sound database, or to refuse with a clear word, or to
//! follow without voting. Never may it vote on an older state, hang, or fall over without a
//! word. sled by itself notices few of these. `time-db` explains each of them, and what it
//! repairs needs no second repair.
//!
//! `TIME_DAMAGES=500` damages more copies than CI does, `TIME_SEED=17` repeats the choices.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/faults/mod.rs"]
mod faults;
mod support;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use faults::disk::{Disk, Image, image_of, put_image};
use faults::said::Said;
use faults::trace::read_trace;
use faults::traffic::Traffic;
use faults::{Dice, Member, Outcome, PATIENCE, Process, Watch, number, seed, tail, wait_ready};
use serde::{Deserialize, Serialize};
use support::{TestNet, in_sled};
use time_masternode::config::read_genesis;

/// Damages of one run of the network.
const DAMAGES_PER_RUN: u64 = 100;

/// A used directory, as it was when its node was killed, and how it came to be.
struct Used {
    net: TestNet,
    said: Said,
    now: Image,
    /// As it was at earlier moments.
    before: Vec<Image>,
}

/// Lets a network work, one member of it twice, and kills it.
async fn use_a_directory(dice: &mut Dice, long: bool) -> Used {
    let net = TestNet::with_interval(4, 300);
    let (data_dir, trace) = (net.data_dir(0), net.directory().join("trace"));
    let fresh = image_of(&data_dir);
    let start = |node| {
        let watch = if node == 0 { Watch::all(&data_dir, &trace) } else { Watch::nothing() };
        Some(Process::start(&net, node, &net.data_dir(node), &watch))
    };
    let mut nodes: Vec<_> = (0..4).map(start).collect();
    wait_ready(&mut nodes);
    let mut traffic = Traffic::begin(&net, 4, 250, dice.another()).await;
    traffic.most = 8;
    traffic.run_times(&net, if long { 300 } else { 100 }).await;
    assert!(nodes[0].as_mut().unwrap().stop().unwrap().success());
    nodes[0] = start(0);
    wait_ready(&mut nodes);
    traffic.run_times(&net, if long { 400 } else { 120 }).await;
    // Something stays in flight for ever, so that there are locks and votes to lose.
    (nodes[2], nodes[3]) = (None, None);
    traffic.run_times(&net, 40).await;
    nodes[0].as_mut().unwrap().kill();
    drop(nodes);
    let (records, _) = read_trace(&trace, 0);
    let mut said = Member::of(&net, 0).said_nothing();
    said.hear(&records);
    let mut disk = Disk::new(&data_dir, &fresh);
    let mut before = Vec::new();
    let mut moments: Vec<usize> = (0..12).map(|_| records.len() / 4 + dice.index(records.len() * 3 / 4)).collect();
    moments.sort_unstable();
    for (at, record) in records.iter().enumerate() {
        if moments.contains(&at) {
            before.push(disk.seen());
        }
        disk.follow(record);
    }
    let now = image_of(&data_dir);
    Used { net, said, now, before }
}

/// Damages a copy at one place, and says how.
fn damage(used: &Used, dice: &mut Dice) -> (Image, String) {
    let mut image = used.now.clone();
    let old = used.before[dice.index(used.before.len())].clone();
    let names: Vec<PathBuf> = image.iter().filter(|(_, bytes)| bytes.is_some()).map(|(name, _)| name.clone()).collect();
    let any_file = |dice: &mut Dice| {
        // Most of what is there is in the database's file.
        let big = names.iter().find(|name| name.ends_with("db/db")).unwrap();
        if dice.below(4) > 0 { big.clone() } else { names[dice.index(names.len())].clone() }
    };
    let name = any_file(dice);
    let file = image[&name].clone().unwrap();
    let sectors = file.len().div_ceil(512).max(1);
    let size = 512 * [1, 1, 8, 8, 64, 1_024][dice.index(6)];
    let from = 512 * dice.index(sectors);
    let to = (from + size).min(file.len());
    let shown = name.display().to_string();
    let mut put = |bytes: Vec<u8>| image.insert(name.clone(), Some(bytes));
    let told = match dice.below(10) {
        0 => {
            let mut bytes = file;
            bytes[from.min(to)..to].fill(0);
            put(bytes);
            format!("{shown}: {from}..{to} zeroed")
        }
        1 => {
            let mut bytes = file;
            bytes[from.min(to)..to].iter_mut().for_each(|byte| *byte = dice.next().to_le_bytes()[0]);
            put(bytes);
            format!("{shown}: {from}..{to} overwritten at random")
        }
        2 | 3 if !file.is_empty() => {
            let mut bytes = file;
            let (at, bit) = (dice.index(bytes.len()), dice.below(8));
            bytes[at] ^= 1 << bit;
            put(bytes);
            format!("{shown}: bit {bit} of byte {at} flipped")
        }
        4 => {
            let length = dice.index(file.len() + 1);
            put(file[..length].to_vec());
            format!("{shown}: {length} of {} bytes left", file.len())
        }
        5 | 6 => {
            let stale = old.get(&name).cloned().flatten().unwrap_or_default();
            let mut bytes = file;
            let to = to.min(stale.len());
            if from < to {
                bytes[from..to].copy_from_slice(&stale[from..to]);
            }
            put(bytes);
            format!("{shown}: {from}..{to} as it was before")
        }
        7 => {
            image.insert("guard".into(), old[Path::new("guard")].clone());
            "an older guard".into()
        }
        8 => {
            let newer = image["guard".as_ref() as &Path].clone();
            image = old;
            image.insert("guard".into(), newer);
            "an older database with the newer guard".into()
        }
        _ => {
            image.remove(&name);
            format!("{shown} removed")
        }
    };
    (image, told)
}

/// What a look into a directory is asked for, of a process of its own: a damaged database may
/// bring down whoever opens it.
#[derive(Serialize, Deserialize)]
struct Errand {
    data_dir: PathBuf,
    genesis: PathBuf,
    said: PathBuf,
    answer: PathBuf,
}

/// What was found.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Examined {
    /// Why it does not open.
    closed: Option<String>,
    suspension: Option<String>,
    fenced: bool,
    /// What was said and is not there.
    missing: Vec<String>,
    /// Reading what was said met an error or a panic: whoever reads it is told.
    unreadable: Option<String>,
    /// What `verify` says.
    findings: Vec<String>,
}

const ERRAND: &str = "FAULT_EXAMINE";

#[test]
#[ignore = "a helper: the other tests run it in a process of its own"]
fn examine_in_a_process_of_its_own() {
    let Ok(path) = std::env::var(ERRAND) else { return };
    let errand: Errand = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let said: Said = bincode::deserialize(&std::fs::read(&errand.said).unwrap()).unwrap();
    let member = Member { genesis: read_genesis(&errand.genesis).unwrap(), key: said.by() };
    let mut examined = Examined::default();
    match member.open(&errand.data_dir) {
        Err(error) => examined.closed = Some(error.to_string()),
        Ok(opened) => {
            examined.suspension = opened.recovered.suspension.map(|reason| reason.to_string());
            examined.fenced = opened.recovered.fence.is_some();
            match std::panic::catch_unwind(AssertUnwindSafe(|| said.missing(usize::MAX, &opened))) {
                Ok(Ok(missing)) => examined.missing = missing,
                Ok(Err(error)) => examined.unreadable = Some(error.to_string()),
                Err(_) => examined.unreadable = Some("a panic".into()),
            }
        }
    }
    match std::panic::catch_unwind(AssertUnwindSafe(|| member.verify(&errand.data_dir))) {
        Ok(Ok(report)) => {
            let told = report.findings().map(|(check, f)| format!("{check}: {:?} {} {}", f.damage, f.place, f.what));
            examined.findings = told.collect();
        }
        Ok(Err(error)) => examined.findings.push(format!("open: {error}")),
        Err(_) => examined.findings.push("open: a panic".into()),
    }
    std::fs::write(&errand.answer, serde_json::to_vec(&examined).unwrap()).unwrap();
}

/// Looks into a directory. The database may bring down the process that does: then that is
/// the answer.
fn examine(used: &Used, data_dir: &Path) -> Result<Examined, String> {
    let at = |name: &str| used.net.directory().join(name);
    let errand = Errand {
        data_dir: data_dir.to_path_buf(),
        genesis: at(used.net.devnet.genesis_file.to_str().unwrap()),
        said: at("said"),
        answer: at("answer"),
    };
    if errand.answer.exists() {
        std::fs::remove_file(&errand.answer).unwrap();
    }
    std::fs::write(&errand.said, bincode::serialize(&used.said).unwrap()).unwrap();
    std::fs::write(at("errand"), serde_json::to_vec(&errand).unwrap()).unwrap();
    let log = std::fs::File::create(at("examine.log")).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "examine_in_a_process_of_its_own"])
        .env(ERRAND, at("errand"))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            return Err("looking into it hangs".into());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    match std::fs::read(&errand.answer) {
        Ok(answer) => Ok(serde_json::from_slice(&answer).unwrap()),
        Err(_) => {
            Err(format!("looking into it ended:\n{}", tail(&std::fs::read_to_string(at("examine.log")).unwrap())))
        }
    }
}

/// How a damaged directory was met, for the count; or what must not be.
fn meet(used: &Used, image: &Image) -> Result<&'static str, String> {
    let directory = used.net.directory().join("damaged");
    put_image(&directory, image);
    let mut process = Process::start(&used.net, 0, &directory, &Watch::nothing());
    let voting = match process.outcome()? {
        Outcome::Refused { error } if error.contains("not trusted") => return Ok("refused: not all is there"),
        Outcome::Refused { error } if error.contains("storage engine") => return Ok("refused: sled notices"),
        Outcome::Refused { .. } => return Ok("refused: something cannot be read"),
        Outcome::Up { voting } => voting,
    };
    let ended = process.stop()?;
    if !ended.success() {
        process.refusal(ended)?;
    }
    match voting.as_str() {
        "Active" => {}
        "Suspended: the database does not fit its guard: votes may have been lost" => {
            return Ok("follows and does not vote: it is older than its guard");
        }
        "Fencing" => return Ok("follows and asks for its fence"),
        _ => return Err(format!("an unexpected word on voting: {voting}")),
    }
    let examined = examine(used, &directory)?;
    if examined.closed.is_some() || examined.unreadable.is_some() {
        return Ok("votes, and stops with a clear word where it reads the damaged place");
    }
    if examined.missing.is_empty() && examined.findings.is_empty() && examined.suspension.is_none() {
        return Ok("holds everything and is sound");
    }
    Err(format!("it votes and is not what it was: {examined:#?}"))
}

/// `time-db` explains a directory, mends what can be mended, and says so: each command comes to
/// an end with a word that a script can go by.
fn explain(used: &Used, image: &Image) -> Result<&'static str, String> {
    let directory = used.net.directory().join("explained");
    put_image(&directory, image);
    let genesis = used.net.directory().join(&used.net.devnet.genesis_file);
    let ask = |args: &[&str]| -> Result<(i32, String), String> {
        let told = used.net.directory().join("told");
        let mut child = Command::new(env!("CARGO_BIN_EXE_time-db"))
            .arg("--data-dir")
            .arg(&directory)
            .arg("--genesis")
            .arg(&genesis)
            .args(args)
            .args(["--format", "json"])
            .stdout(std::fs::File::create(&told).unwrap())
            .stderr(std::fs::File::create(told.with_extension("err")).unwrap())
            .spawn()
            .unwrap();
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if began.elapsed() > PATIENCE {
                child.kill().unwrap();
                child.wait().unwrap();
                return Err(format!("time-db {args:?} does not come to an end"));
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        };
        let told = [told.clone(), told.with_extension("err")].map(|path| std::fs::read_to_string(path).unwrap());
        let text = told.concat();
        match status.code() {
            Some(code @ 0..=2) if !text.contains("should not") => Ok((code, text)),
            _ => Err(format!("time-db {args:?} ended with {status}: {}", tail(&text))),
        }
    };
    let verified = ask(&["verify"])?;
    let planned = ask(&["repair"])?;
    let wrong = |what: &str, (code, text): &(i32, String)| Err(format!("{what}: {code}: {}", tail(text)));
    match planned.0 {
        0 if verified.0 == 0 => return Ok("there is nothing to repair"),
        0 => return wrong("nothing to repair, and verify says", &verified),
        // What is no database at all, or never open, is for a human.
        2 if ["missing", "damaged"].iter().any(|kind| planned.1.contains(&format!("\"kind\":\"{kind}\""))) => {
            return Ok("it cannot be told; what to do is said");
        }
        2 => return wrong("repair cannot tell", &planned),
        _ => {}
    }
    let applied = ask(&["repair", "--apply"])?;
    if applied.0 != 0 {
        return wrong("--apply", &applied);
    }
    let again = ask(&["repair"])?;
    if again.0 != 0 {
        return wrong("repaired twice", &again);
    }
    Ok(if planned.1.contains("\"resync\"") { "set aside, to be fetched again" } else { "repaired where it is" })
}

#[tokio::test]
async fn no_damage_makes_a_member_vote_on_an_older_state() {
    let damages = number("TIME_DAMAGES").unwrap_or(12);
    let seed = seed("damages");
    let began = Instant::now();
    let (mut made, mut met) = (0, BTreeMap::<(&str, &str), u64>::new());
    let mut violations = Vec::new();
    while made < damages {
        let mut dice = Dice::new(seed.wrapping_add(made));
        let used = use_a_directory(&mut dice, damages > 100).await;
        let examined = {
            let directory = used.net.directory().join("damaged");
            put_image(&directory, &used.now);
            examine(&used, &directory).unwrap()
        };
        assert!(examined.missing.is_empty() && examined.findings.is_empty(), "before any damage: {examined:#?}");
        for _ in 0..DAMAGES_PER_RUN.min(damages - made) {
            let (image, told) = damage(&used, &mut dice);
            match meet(&used, &image).and_then(|how| Ok((how, explain(&used, &image)?))) {
                Ok(how) => *met.entry(how).or_default() += 1,
                Err(what) => {
                    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
                        "damaged-{}-{}",
                        std::process::id(),
                        violations.len()
                    ));
                    put_image(&kept, &image);
                    eprintln!("{told}, kept in {}: {what}", kept.display());
                    violations.push(told);
                }
            }
        }
        made = (made + DAMAGES_PER_RUN).min(damages);
        eprintln!("{made} damages, {:?}: {met:#?}", began.elapsed());
    }
    assert!(violations.is_empty(), "{} of {made}: {violations:#?}", violations.len());
}

/// sled writes its file in segments and leaves out, without a word, one whose head it cannot
/// read: some rows are then as they were before, and the last commit is the last one.
#[tokio::test]
async fn no_segment_is_lost_in_silence() {
    const SEGMENT: usize = 512 * 1024;
    let seed = seed("segments");
    let used = use_a_directory(&mut Dice::new(seed), true).await;
    let name = Path::new("db/db");
    let file = used.now[name].clone().unwrap();
    let (mut met, mut violations) = (BTreeMap::<(&str, &str), u64>::new(), Vec::new());
    for segment in 0..file.len().div_ceil(SEGMENT) {
        let mut bytes = file.clone();
        bytes[segment * SEGMENT..][..512].fill(0);
        let mut image = used.now.clone();
        image.insert(name.to_path_buf(), Some(bytes));
        match meet(&used, &image).and_then(|how| Ok((how, explain(&used, &image)?))) {
            Ok(how) => *met.entry(how).or_default() += 1,
            Err(what) => violations.push(format!("segment {segment}: {what}")),
        }
    }
    eprintln!("{} bytes: {met:#?}", file.len());
    assert!(violations.is_empty(), "{violations:#?}");
}

/// One row is gone, from any tree that something which was said depends on, and everything
/// else is as it was: the guard fits, and sled has nothing to complain of.
#[tokio::test]
async fn no_row_is_lost_in_silence() {
    let mut dice = Dice::new(seed("rows"));
    let used = use_a_directory(&mut dice, false).await;
    let genesis = used.net.genesis.transaction().txid();
    let directory = used.net.directory().join("rows");
    let mut met = BTreeMap::<String, u64>::new();
    for tree in ["changes", "utxos", "addresses", "transactions", "confirmed", "blocks", "locks", "votes"] {
        put_image(&directory, &used.now);
        let key = in_sled(&directory, |db| {
            let rows = db.open_tree(tree).unwrap();
            // What the genesis made and nobody spent is in no log.
            let made_by_genesis = |key: &[u8]| key.windows(32).any(|part| part == genesis.as_bytes());
            let mut keys: Vec<_> = rows.iter().keys().map(Result::unwrap).filter(|key| !made_by_genesis(key)).collect();
            assert!(!keys.is_empty(), "{tree} has no rows");
            let key = keys.swap_remove(dice.index(keys.len()));
            rows.remove(&key).unwrap();
            key
        });
        let image = image_of(&directory);
        match meet(&used, &image) {
            Ok(how) => *met.entry(format!("{tree}: {how}")).or_default() += 1,
            Err(what) => panic!("{tree} without {}: {what}", hex::encode(key)),
        }
    }
    eprintln!("{met:#?}");
    let noticed = met.keys().filter(|how| how.contains("refused")).count();
    assert!(noticed >= 6, "a row of most trees matters: {met:#?}");
}
