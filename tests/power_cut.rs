//! The power goes at any moment, and nothing that was said is taken back.
//!
//! A member of a real network runs under a shim that writes down, in one order, every change
//! of its files, every sync, and every word that it says. From that the disk is replayed as
//! a power cut can leave it: what was synced is there, and what was not is there or not, by
//! whole calls or by single sectors. On each such disk the database has to open, to be sound
//! in every invariant, to fit its guard, and to hold every vote, status, notification,
//! subscription and consensus message that had left the node by then.
//!
//! `TIME_POWER_CUTS=500` makes more cuts than CI does, `TIME_SEED=17` repeats the choices of
//! places (the network's own timing is never the same twice).

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/faults/mod.rs"]
mod faults;
mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use faults::disk::{Disk, Image, Loss, image_of, put_image};
use faults::said::Said;
use faults::trace::{Record, read_trace};
use faults::traffic::Traffic;
use faults::{Dice, Member, Outcome, PATIENCE, Process, Watch, number, seed, wait_ready};
use support::TestNet;

/// Bytes of one of sled's segments.
const SEGMENT: u64 = 512 * 1024;
/// Two of them.
const LARGE: usize = 1024 * 1024;
/// Cuts of one run of the network.
const CUTS_PER_RUN: u64 = 25;

#[tokio::test]
async fn no_power_cut_takes_back_what_was_said() {
    let cuts = number("TIME_POWER_CUTS").unwrap_or(12);
    let seed = seed("power cuts");
    let began = Instant::now();
    let (mut made, mut while_opening, mut words) = (0, 0, 0);
    for run in 0..cuts.div_ceil(CUTS_PER_RUN) {
        let mut dice = Dice::new(seed.wrapping_add(run));
        let of_run = CUTS_PER_RUN.min(cuts - made);
        let done = cut_a_run(&mut dice, of_run, if cuts > 100 { Run::Long } else { Run::Short }).await;
        made += of_run;
        while_opening += done.0;
        words += done.1;
        eprintln!("{made} power cuts and {while_opening} more while opening, {words} words, {:?}", began.elapsed());
    }
}

/// The same while the node makes its database compact, and before and after.
#[tokio::test]
async fn no_power_cut_while_the_database_is_made_compact_takes_anything_back() {
    let cuts = number("TIME_POWER_CUTS").unwrap_or(12);
    let mut dice = Dice::new(seed("power cuts while compacting"));
    for run in 0..cuts.div_ceil(CUTS_PER_RUN) {
        let (_, words) = cut_a_run(&mut dice, CUTS_PER_RUN.min(cuts - CUTS_PER_RUN * run), Run::Compact).await;
        eprintln!("run {run}: {words} words");
    }
}

/// The same in the middle of commits of which each is longer than two of sled's segments: by
/// its end, sled uses segments anew whose rows it has moved since its beginning.
#[tokio::test]
async fn no_power_cut_in_a_large_commit_takes_anything_back() {
    let cuts = number("TIME_POWER_CUTS").unwrap_or(8);
    let mut dice = Dice::new(seed("power cuts in large commits"));
    for run in 0..cuts.div_ceil(CUTS_PER_RUN) {
        let (_, words) = cut_a_run(&mut dice, CUTS_PER_RUN.min(cuts - CUTS_PER_RUN * run), Run::Large).await;
        eprintln!("run {run}: {words} words");
    }
}

/// What the network does whose trace is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    Short,
    Long,
    /// The first member makes its database compact.
    Compact,
    /// Many payments at once, for a few large blocks.
    Large,
}

/// Where so much has been written to sled's file in one commit that it counts as large, and some
/// of it into a segment that was used before: the records after which that holds. A commit ends
/// with the sync of its guard.
fn in_large_commits(records: &[Record]) -> Vec<usize> {
    let (mut files, mut end, mut written, mut reused) = (BTreeMap::new(), 0, 0, false);
    let mut places = Vec::new();
    for (at, record) in records.iter().enumerate() {
        match record {
            Record::Open { fd, path, .. } => {
                files.insert(*fd, path.file_name());
            }
            Record::Write { fd, offset, bytes } if files.get(fd) == Some(&Some("db".as_ref())) => {
                let is_padding = bytes.iter().all(|byte| *byte == 0);
                written += if is_padding { 0 } else { bytes.len() };
                reused |= !is_padding && offset / SEGMENT < end / SEGMENT;
                end = if is_padding { end } else { end.max(*offset) };
            }
            Record::Sync(fd) if files.get(fd) == Some(&Some("guard".as_ref())) => (written, reused) = (0, false),
            _ => {}
        }
        if reused && written > LARGE {
            places.push(at + 1);
        }
    }
    places
}

/// The most that was ever written by way of one descriptor of sled's file without a sync of that
/// descriptor, in bytes. What a node syncs itself at the end of a commit is another one.
fn most_unsynced(records: &[Record]) -> usize {
    let (mut unsynced, mut most) = (BTreeMap::new(), 0);
    for record in records {
        match record {
            Record::Open { fd, path, .. } => {
                unsynced.remove(fd);
                if path.ends_with("db/db") {
                    unsynced.insert(*fd, 0);
                }
            }
            Record::Write { fd, bytes, .. } if bytes.iter().any(|byte| *byte != 0) => {
                if let Some(unsynced) = unsynced.get_mut(fd) {
                    *unsynced += bytes.len();
                    most = most.max(*unsynced);
                }
            }
            Record::Sync(fd) => {
                unsynced.entry(*fd).and_modify(|bytes| *bytes = 0);
            }
            _ => {}
        }
    }
    most
}

/// Runs a network, and cuts the power of its first member at `cuts` places of its trace; half of
/// them while it makes its database compact, or all of them in large commits.
/// Gives the number of cuts while opening, and what was held to have been said.
async fn cut_a_run(dice: &mut Dice, cuts: u64, run: Run) -> (u64, usize) {
    let (large, compact) = (run == Run::Large, run == Run::Compact);
    let net = TestNet::with_interval(4, if large { 3_000 } else { 300 });
    let data_dir = net.data_dir(0);
    let before = image_of(&data_dir);
    let trace = net.directory().join("trace");
    let watch = |node| if node == 0 { Watch::all(&data_dir, &trace) } else { Watch::nothing() };
    let options = |node| if node == 0 && compact { &["--compact-above-mb", "1"][..] } else { &[] };
    let start = |node| Process::start_with(&net, node, &net.data_dir(node), &watch(node), options(node));
    let mut nodes: Vec<_> = (0..4).map(|node| Some(start(node))).collect();
    wait_ready(&mut nodes);
    let mut traffic = Traffic::begin(&net, 4, 250, dice.another()).await;
    // Few at once make many commits.
    traffic.most = if large { 900 } else { 8 };
    let payments = match run {
        Run::Short | Run::Compact => 250,
        Run::Long => 600,
        Run::Large => 6_000,
    };
    traffic.run_times(&net, payments).await;
    traffic.most = 8;
    if compact {
        let began = Instant::now();
        while nodes[0].as_ref().unwrap().compactions() != Some(1) {
            assert!(began.elapsed() < PATIENCE, "{}", nodes[0].as_ref().unwrap().log());
            // Now and then a payment, so that the copy has something to follow; not so many that a node
            // under the shim, which writes down each message on the thread that sends it, is never quiet.
            let paying = Instant::now();
            traffic.run_times(&net, 1).await;
            tokio::time::sleep((6 * paying.elapsed()).max(Duration::from_millis(100))).await;
        }
        traffic.run_times(&net, 60).await;
    }
    // Something stays in flight for ever, so that there are locks and votes to lose.
    (nodes[2], nodes[3]) = (None, None);
    traffic.run_times(&net, 60).await;
    let stopped = nodes[0].as_mut().unwrap().stop().unwrap();
    assert!(stopped.success(), "{}", nodes[0].as_ref().unwrap().log());
    drop(nodes);

    let (records, _) = read_trace(&trace, 0);
    let mut said = Member::of(&net, 0).said_nothing();
    said.hear(&records);
    assert!(said.len() > 500 && !said.votes.is_empty(), "only {} words were said", said.len());
    // Half of them anywhere, half of them behind a change of the disk.
    let change = |record: &Record| !matches!(record, Record::Send { .. } | Record::Close(_) | Record::Start);
    let changes: Vec<usize> = (0..records.len()).filter(|at| change(&records[*at])).map(|at| at + 1).collect();
    let exchanged = records.iter().position(|record| matches!(record, Record::Exchange(..)));
    assert_eq!(exchanged.is_some(), compact);
    let building = records.iter().position(|r| matches!(r, Record::MakeDir(path) if path.ends_with("unfinished")));
    // What ADR 0015 allows, and a piece of each of sled's threads that is about to be synced.
    let most = most_unsynced(&records);
    assert!(most <= 128 * 1024 + 8 * SEGMENT as usize, "{most} bytes were not synced");
    let large_ones = in_large_commits(&records);
    assert!(!large || !large_ones.is_empty(), "no commit is large");
    let mut place = |n: u64| match (building, exchanged) {
        _ if large => large_ones[dice.index(large_ones.len())],
        // Until all is synced that belongs to the exchange, and until the old files are gone.
        (_, Some(exchanged)) if n % 4 == 1 => exchanged + dice.index(40),
        (Some(building), Some(exchanged)) if n % 4 == 3 => building + dice.index(exchanged - building),
        _ if n.is_multiple_of(2) => dice.index(records.len()),
        _ => changes[dice.index(changes.len())],
    };
    let mut places: Vec<usize> = (0..cuts).map(|n| place(n).min(records.len())).collect();
    places.sort_unstable();
    let mut disk = Disk::new(&data_dir, &before);
    let (mut at, mut while_opening) = (0, 0);
    for (n, place) in places.into_iter().enumerate() {
        records[at..place].iter().for_each(|record| disk.follow(record));
        at = place;
        let loss = Loss::any(dice);
        let image = disk.after_power_cut(loss, dice);
        let told = format!("cut at {at} of {}, {loss:?}", records.len());
        if n % 3 == 2 {
            cut_while_opening(&net, &image, &said, at, dice, &told);
            while_opening += 1;
        } else {
            assert_holds(&net, &image, &said, at, &told);
        }
    }
    // The replay knows every call: what it has seen is what is there.
    records[at..].iter().for_each(|record| disk.follow(record));
    let (seen, there) = (disk.seen(), image_of(&data_dir));
    let differ: Vec<_> = there.keys().chain(seen.keys()).filter(|name| seen.get(*name) != there.get(*name)).collect();
    assert!(differ.is_empty(), "the shim missed changes of {differ:?}");
    (while_opening, said.len())
}

/// The disk opens, is sound, and holds what was said in the first `until` records.
fn assert_holds(net: &TestNet, image: &Image, said: &Said, until: usize, told: &str) {
    let directory = net.directory().join("cut");
    put_image(&directory, image);
    let faults = Member::of(net, 0).faults_of(&directory, said, until);
    if !faults.is_empty() {
        let kept = keep(net, image);
        panic!("{told}: {} faults, kept in {kept}: {:#?}", faults.len(), &faults[..faults.len().min(20)]);
    }
}

/// The real program starts on the disk, and the power goes again while it opens it or has
/// just done so.
fn cut_while_opening(net: &TestNet, image: &Image, said: &Said, until: usize, dice: &mut Dice, told: &str) {
    let directory = net.directory().join("opening");
    put_image(&directory, image);
    let trace = net.directory().join("trace-of-opening");
    if trace.exists() {
        std::fs::remove_file(&trace).unwrap();
    }
    let mut process = Process::start(net, 0, &directory, &Watch::all(&directory, &trace));
    let outcome = process.outcome();
    assert_eq!(outcome, Ok(Outcome::Up { voting: "Active".into() }), "{told}: {}", process.log());
    process.kill();
    let (records, _) = read_trace(&trace, 0);
    let place = dice.index(records.len() + 1);
    let mut disk = Disk::new(&directory, image);
    records[..place].iter().for_each(|record| disk.follow(record));
    let loss = Loss::any(dice);
    let image = disk.after_power_cut(loss, dice);
    assert_holds(
        net,
        &image,
        said,
        until,
        &format!("{told}, and again at {place} of {} of opening, {loss:?}", records.len()),
    );
}

/// Keeps an image that shows a fault.
fn keep(net: &TestNet, image: &Image) -> String {
    let kept = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("power-cut-{}", std::process::id()));
    put_image(&kept.join("data"), image);
    std::fs::copy(net.directory().join(&net.devnet.genesis_file), kept.join("genesis.json")).unwrap();
    kept.display().to_string()
}
