//! Databases that the programs of older schemas have left, opened by this one.
//!
//! tests/data has, for each schema, the directory of a member that has lived through payments
//! of every kind and was stopped with much in flight, and what that old program's own
//! `time-db dump` said of it. Nothing of that may be lost or said otherwise afterwards.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/faults/mod.rs"]
mod faults;
mod support;
#[path = "support/tool.rs"]
mod tool;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use faults::disk::{Disk, Image, Loss, image_of, put_image};
use faults::trace::{Record, read_trace};
use faults::{Dice, Watch, number, seed};
use serde_json::{Value, json};
use support::{Coin, Link, TestNet, in_sled, until};
use time_masternode::consensus::{Rules, Vote, VoteKind, check_form, sign_batch};
use time_masternode::db::SCHEMA_VERSION;
use time_masternode::net::{NetworkMessage, TransactionStatusKind, UTXOSubscribe};
use time_masternode::types::{OutPoint, Output, RawTransaction, SecretKey, Transaction, Txid};
use tool::{copy, failure, json_of, stderr, time_db};

/// The schemas of which there are directories: all that ever were.
const SCHEMAS: std::ops::RangeInclusive<u32> = 1..=SCHEMA_VERSION;

/// What an old program has left: the network of four whose first member's data is here, and
/// what it said of them.
struct Left {
    schema: u32,
    net: TestNet,
    dump: Vec<Value>,
}

impl Left {
    fn by(schema: u32) -> Self {
        let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/schema-{schema}/devnet.tar.gz"));
        let archive = std::fs::File::open(&archive).unwrap_or_else(|e| panic!("{}: {e}", archive.display()));
        let directory = tempfile::tempdir().unwrap();
        tar::Archive::new(flate2::read::GzDecoder::new(archive)).unpack(directory.path()).unwrap();
        let dump = std::fs::read(directory.path().join("dump.json")).unwrap();
        Self { schema, net: TestNet::of(directory), dump: serde_json::from_slice(&dump).unwrap() }
    }

    fn data_dir(&self) -> PathBuf {
        self.net.data_dir(0)
    }

    fn genesis(&self) -> String {
        self.net.directory().join(&self.net.devnet.genesis_file).to_str().unwrap().to_owned()
    }

    /// What the old program said of a tree: keys and values.
    fn tree(&self, name: &str) -> Vec<(&str, &Value)> {
        of_tree(&self.dump, name)
    }

    /// The transactions in flight, with the time at which their inputs were locked.
    fn in_flight(&self) -> BTreeMap<Txid, (Transaction, Option<i64>)> {
        let body = |(_, row): (&str, &Value)| {
            let raw: RawTransaction = serde_json::from_value(row["transaction"].clone()).unwrap();
            let rules = Rules { network: self.net.genesis.network(), min_fee: self.net.genesis.min_fee() };
            let body = check_form(raw, &rules).unwrap();
            (body.txid(), (body, row["locked_at"].as_i64()))
        };
        self.tree("locks").into_iter().map(body).collect()
    }

    /// Every vote of this member on something in flight.
    fn votes(&self) -> BTreeSet<(Txid, String)> {
        let in_flight = self.in_flight();
        votes(&self.dump).into_iter().filter(|(txid, _)| in_flight.contains_key(txid)).collect()
    }

    fn commit(&self) -> u64 {
        self.tree("meta").iter().find(|(key, _)| *key == "head").unwrap().1["commit"].as_u64().unwrap()
    }

    /// Where what was there before is kept.
    fn kept(&self) -> PathBuf {
        let name = format!("before-schema-{SCHEMA_VERSION}-from-{}-at-{}", self.schema, self.commit());
        self.data_dir().join(name)
    }

    /// Coins of the wallets that nothing has touched, with their keys.
    fn free_coins(&self) -> Vec<Coin> {
        let keys: BTreeMap<String, SecretKey> = self
            .net
            .devnet
            .wallets
            .iter()
            .map(|wallet| (wallet.address.clone(), SecretKey::from_hex(&wallet.secret_seed).unwrap()))
            .collect();
        let coin = |(key, row): (&str, &Value)| {
            let output: Output = serde_json::from_value(row["output"].clone()).unwrap();
            let owner = keys.get(&output.address.to_string()).filter(|_| row["state"] == "Unspent")?;
            Some(Coin { outpoint: key.parse::<OutPoint>().unwrap(), amount: output.amount, key: owner.clone() })
        };
        self.tree("utxos").into_iter().filter_map(coin).collect()
    }
}

fn of_tree<'a>(dump: &'a [Value], name: &str) -> Vec<(&'a str, &'a Value)> {
    let rows = dump.iter().filter(|row| row["tree"] == name);
    rows.map(|row| (row["key"].as_str().unwrap(), &row["value"])).collect()
}

fn votes(dump: &[Value]) -> BTreeSet<(Txid, String)> {
    let votes = of_tree(dump, "votes").into_iter().flat_map(|(_, row)| row.as_array().unwrap());
    let vote = |vote: &Value| (text(&vote["txid"]).parse().unwrap(), text(&vote["kind"]).to_owned());
    votes.map(vote).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// Every row of every tree as it lies there, and the guard.
#[derive(PartialEq, Eq)]
struct Raw {
    trees: BTreeMap<Vec<u8>, BTreeMap<Vec<u8>, Vec<u8>>>,
    guard: Vec<u8>,
}

impl Raw {
    /// Of a copy, for to open it is to write.
    fn of(data_dir: &Path) -> Self {
        let work = tempfile::tempdir().unwrap();
        copy(&data_dir.join("db"), work.path());
        for entry in std::fs::read_dir(work.path().join("db")).unwrap() {
            // Half a snapshot, which the program does not open either.
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "generating") {
                std::fs::remove_file(path).unwrap();
            }
        }
        let db = sled::Config::new().path(work.path().join("db")).flush_every_ms(None).open().unwrap();
        let rows = |name: &sled::IVec| {
            let row = |row: Result<(sled::IVec, sled::IVec), sled::Error>| {
                row.map(|(key, value)| (key.to_vec(), value.to_vec())).unwrap()
            };
            let rows: BTreeMap<_, _> = db.open_tree(name).unwrap().iter().map(row).collect();
            (name.to_vec(), rows)
        };
        // A tree that is not there yet has as many rows as an empty one.
        let trees = db.tree_names().iter().map(rows).filter(|(_, rows)| !rows.is_empty()).collect();
        Self { trees, guard: std::fs::read(data_dir.join("guard")).unwrap() }
    }

    fn schema(&self) -> u32 {
        u32::from_le_bytes(self.trees[b"meta".as_slice()][b"schema".as_slice()].as_slice().try_into().unwrap())
    }
}

/// Names of files, and of directories, whatever is in them.
fn names(data_dir: &Path) -> BTreeSet<PathBuf> {
    let not_sleds = |path: &PathBuf| !path.file_name().unwrap().to_string_lossy().starts_with("snap.");
    image_of(data_dir).into_keys().filter(not_sleds).collect()
}

fn set_schema(data_dir: &Path, schema: u32) {
    in_sled(data_dir, |db| db.open_tree("meta").unwrap().insert("schema", &schema.to_le_bytes()).unwrap());
}

/// Nothing is wrong, in any invariant.
fn assert_sound(left: &Left, data_dir: &Path) {
    json_of(data_dir, &["verify", "--full", "--genesis", &left.genesis()], 0);
}

/// What looks into a database.
fn looks(left: &Left, scratch: &Path) -> Vec<Vec<String>> {
    let export = scratch.join("export");
    let genesis = left.genesis();
    let txid = left.in_flight().into_keys().next().unwrap().to_string();
    let commands: [&[&str]; 10] = [
        &["dump"],
        &["dump", "--tree", "locks"],
        &["get", "--txid", &txid],
        &["locks"],
        &["changes"],
        &["verify"],
        &["verify", "--full", "--genesis", &genesis],
        &["repair", "--genesis", &genesis],
        &["repair", "--apply", "--genesis", &genesis],
        &["export", export.to_str().unwrap()],
    ];
    commands.iter().map(|args| args.iter().map(ToString::to_string).collect()).collect()
}

/// Old rows are not taken for new ones, nor for damage that should be repaired.
#[test]
fn tools_say_that_an_older_schema_is_to_be_migrated_and_leave_it_as_it_is() {
    for schema in 1..SCHEMA_VERSION {
        let left = Left::by(schema);
        let (data_dir, scratch) = (left.data_dir(), tempfile::tempdir().unwrap());
        let (before, files) = (Raw::of(&data_dir), names(&data_dir));
        for args in looks(&left, scratch.path()) {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let refused = failure(&data_dir, &args);
            assert_eq!(refused["kind"], json!("older_schema"), "{args:?}: {refused}");
            assert!(text(&refused["error"]).contains(&format!("schema {schema}")), "{args:?}: {refused}");
            assert!(text(&refused["next"]).contains("time-db migrate"), "{args:?}: {refused}");
        }
        let stats = json_of(&data_dir, &["stats"], 0);
        assert_eq!((&stats["schema"], &stats["commit"]), (&json!(schema), &json!(left.commit())));
        assert_eq!((&stats["guard"]["fits"], &stats["supply"]), (&json!("equal"), &Value::Null));

        // A copy of it is a copy, and comes back only with the genesis: migrated, fenced.
        let (backup, fresh) = (scratch.path().join("backup"), scratch.path().join("fresh"));
        let backup = backup.to_str().unwrap();
        let made = json_of(&data_dir, &["backup", "--to", backup], 0);
        assert_eq!((&made["schema"], &made["fits_guard"]), (&json!(schema), &json!(true)));
        assert_eq!(failure(&fresh, &["restore", "--from", backup])["kind"], json!("older_schema"));
        json_of(&fresh, &["restore", "--from", backup, "--genesis", &left.genesis()], 0);
        assert_sound(&left, &fresh);
        assert!(Raw::of(&data_dir) == before, "no row has changed");
        assert_eq!(names(&data_dir), files);
    }
}

/// What the old program said is what this one says.
#[test]
fn what_was_migrated_says_what_the_old_program_said() {
    for schema in SCHEMAS {
        let left = Left::by(schema);
        let data_dir = left.data_dir();
        let before = Raw::of(&data_dir);
        let migrate = ["migrate", "--genesis", &left.genesis()];
        let migrated = json_of(&data_dir, &migrate, 0);
        let copy = (schema < SCHEMA_VERSION).then(|| left.kept());
        assert_eq!(migrated, json!({ "from": schema, "to": SCHEMA_VERSION, "copy": copy }));
        assert!(copy.is_none_or(|copy| Raw::of(&copy) == before), "it is kept as it was");
        assert_sound(&left, &data_dir);
        assert_same(&left, json_of(&data_dir, &["dump"], 0).as_array().unwrap());
        let stats = json_of(&data_dir, &["stats"], 0);
        assert_eq!((&stats["supply"]["conserved"], &stats["guard"]["fits"]), (&json!(true), &json!("equal")));

        let after = Raw::of(&data_dir);
        assert_eq!(json_of(&data_dir, &migrate, 0)["copy"], Value::Null);
        assert!(Raw::of(&data_dir) == after, "a second time there is nothing to do");

        // What it exports is the ledger that can be imported.
        let (file, imported) = (data_dir.join("export"), left.net.directory().join("imported"));
        json_of(&data_dir, &["export", file.to_str().unwrap()], 0);
        json_of(&imported, &["import", file.to_str().unwrap(), "--genesis", &left.genesis()], 0);
        assert_sound(&left, &imported);
        let utxos = |dir: &Path| json_of(dir, &["dump", "--tree", "utxos"], 0);
        assert_eq!(utxos(&imported), utxos(&data_dir));
    }
}

/// Holds the dump of a migrated database against that of the program which wrote it.
fn assert_same(left: &Left, now: &[Value]) {
    if left.schema == SCHEMA_VERSION {
        return assert_eq!(now, left.dump);
    }
    for tree in ["utxos", "addresses", "votes", "changes", "subscriptions", "blocks", "dead", "agreement", "fence"] {
        assert_eq!(of_tree(now, tree), left.tree(tree), "{tree} of schema {}", left.schema);
    }
    let meta = |dump: &[Value], name: &str| -> Option<Value> {
        of_tree(dump, "meta").into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone())
    };
    for name in ["network", "head", "suspension", "fence", "pruned"] {
        assert_eq!(meta(now, name), meta(&left.dump, name), "{name} of schema {}", left.schema);
    }
    let chain = meta(now, "chain").unwrap();
    match meta(&left.dump, "chain") {
        Some(before) => assert_eq!(chain, before),
        None => assert_eq!((&chain["height"], &chain["unconfirmed_from"]), (&json!(0), &json!(1))),
    }
    assert_eq!(sorted(of_tree(now, "locks")), sorted(left.tree("locks")));
    let expected = if left.schema < 3 { in_terms_of_schema_3(left) } else { left.dump.clone() };
    for tree in ["certificates", "transactions", "confirmed"] {
        assert_eq!(sorted(of_tree(now, tree)), sorted(of_tree(&expected, tree)), "{tree} of schema {}", left.schema);
    }
}

/// Records, whatever rows they stood in.
fn sorted<'a>(mut records: Vec<(&'a str, &'a Value)>) -> Vec<(&'a str, &'a Value)> {
    records.sort_by_key(|(key, _)| *key);
    records
}

/// Since schema 3 a proof is told with what it proves, and the time of a confirmation, which
/// stood in the outputs that were spent, with its height.
fn in_terms_of_schema_3(left: &Left) -> Vec<Value> {
    let (in_flight, mut proofs, mut told) = (left.in_flight(), BTreeMap::new(), Vec::new());
    let mut tell = |tree: &str, key: &str, value: Value| told.push(json!({ "tree": tree, "key": key, "value": value }));
    for (key, certificate) in left.tree("certificates") {
        let txid = text(&certificate["txid"]);
        if in_flight.contains_key(&txid.parse().unwrap()) {
            tell("certificates", key, certificate.clone());
        } else if certificate["kind"] == "Commit" {
            proofs.insert(txid, certificate);
        }
    }
    for (txid, row) in left.tree("transactions") {
        let mut row = row.clone();
        row["proof"] = json!(proofs.get(txid));
        tell("transactions", txid, row);
    }
    let states = left.tree("utxos").into_iter().map(|(_, row)| &row["state"]["Confirmed"]).filter(|c| !c.is_null());
    let times: BTreeMap<&str, &Value> = states.map(|c| (text(&c["txid"]), &c["confirmed_at"])).collect();
    for (txid, height) in left.tree("confirmed") {
        tell("confirmed", txid, json!({ "height": height, "confirmed_at": times[txid] }));
    }
    told
}

/// What each directory is good for: were something of it not there, nothing would be proved.
#[test]
fn the_directories_hold_what_can_be_lost() {
    for schema in SCHEMAS {
        let left = Left::by(schema);
        let (votes, in_flight) = (left.votes(), left.in_flight());
        for kind in ["Approve", "Commit", "Abort"] {
            assert!(votes.iter().any(|(_, k)| k == kind), "schema {schema}: {kind}");
        }
        assert!(in_flight.values().any(|(_, locked_at)| locked_at.is_none()), "known, and not locked");
        assert!(in_flight.len() > 30, "more than a row holds");
        let certificates = left.tree("certificates");
        for kind in ["Approve", "Abort"] {
            let held = |(_, c): &(&str, &Value)| {
                c["kind"] == kind && in_flight.contains_key(&text(&c["txid"]).parse().unwrap())
            };
            assert!(certificates.iter().any(held), "schema {schema}: a certificate of {kind}");
        }
        let has_state = |name: &str| left.tree("utxos").iter().any(|(_, row)| !row["state"][name].is_null());
        assert!(has_state("Locked") && has_state("SpentFinalized"));
        assert_eq!(left.tree("subscriptions").len(), 2);
        if schema > 1 {
            assert!(has_state("Confirmed"));
            for tree in ["blocks", "confirmed", "dead", "agreement"] {
                assert!(!left.tree(tree).is_empty(), "schema {schema}: {tree}");
            }
            // One that only a block has settled.
            let is_final = |txid: &str| {
                let of = |(_, c): &(&str, &Value)| c["kind"] == "Commit" && c["txid"] == txid;
                certificates.iter().any(of)
                    || left.tree("transactions").iter().any(|(key, row)| *key == txid && !row["proof"].is_null())
            };
            assert!(left.tree("confirmed").iter().any(|(txid, _)| !is_final(txid)));
        }
    }
}

/// Members whose nodes do not run, played with their keys towards the first one.
struct Peers {
    links: Vec<(SecretKey, Link)>,
}

impl Peers {
    async fn connect(net: &TestNet) -> Self {
        let mut links = Vec::new();
        for member in 1..net.devnet.nodes.len() {
            let key = net.member_key(member);
            links.push((key.clone(), Link::member(net, 0, &key).await));
        }
        Self { links }
    }

    /// One vote short of a quorum.
    async fn vote(&mut self, net: &TestNet, kind: VoteKind, txid: Txid) {
        for (key, link) in self.links.iter_mut().take(2) {
            let batch = sign_batch(key, &net.committee(), vec![Vote { kind, txid }]).unwrap();
            link.send(&NetworkMessage::Votes(Arc::new(batch.get().wire().clone()))).await;
        }
    }
}

/// The real program starts on what an old one has left. It stands by every vote, gives new
/// ones, serves the wallets of before where they were, and what it writes is sound.
#[tokio::test]
async fn the_member_votes_on_and_stands_by_what_it_said() {
    for schema in SCHEMAS {
        let mut left = Left::by(schema);
        left.net.start(0);
        let in_flight = left.in_flight().len();
        let status = until("it goes on with what was in flight", || {
            let status: Value = serde_json::from_str(&left.net.http(0, "/status")?.1).ok()?;
            (status["in_flight"] == in_flight).then_some(status)
        });
        assert_eq!((&status["voting"], &status["fence"]), (&json!("Active"), &Value::Null), "schema {schema}");
        assert_eq!(left.kept().exists(), schema < SCHEMA_VERSION);
        let mut wallet = left.net.wallet(0).await;
        resume(&left, &mut wallet).await;
        // Wallets see every output where the old program left it, and proofs of what is final.
        for rows in left.tree("utxos").chunks(100) {
            let outpoints: Vec<OutPoint> = rows.iter().map(|(key, _)| key.parse().unwrap()).collect();
            for (entry, (key, row)) in wallet.states(&outpoints).await.iter().zip(rows) {
                assert_eq!(json!(entry.state), row["state"], "{key} of schema {schema}");
            }
        }
        for (txid, _) in left.tree("transactions") {
            let status = wallet.query(txid.parse().unwrap()).await;
            assert!(status.status.is_final() && status.finality_proof.is_some(), "{status:?}");
        }

        let mut peers = Peers::connect(&left.net).await;
        // It had committed to this; with the commits of two more it is final.
        let committed = left.votes().into_iter().find(|(_, kind)| kind == "Commit").unwrap().0;
        peers.vote(&left.net, VoteKind::Commit, committed).await;
        wallet.until_final(committed).await;
        // What is new it approves and commits to.
        let to = left.net.address(&SecretKey::generate());
        let payment = left.net.pay(&left.free_coins()[0], &to, 1);
        wallet.broadcast(&payment).await;
        wallet.status_of(payment.txid(), &[TransactionStatusKind::Pending]).await;
        peers.vote(&left.net, VoteKind::Approve, payment.txid()).await;
        peers.vote(&left.net, VoteKind::Commit, payment.txid()).await;
        wallet.until_final(payment.txid()).await;
        // What contradicts a vote of before it does not approve.
        let rival = rival(&left);
        wallet.broadcast(&rival).await;
        wallet.status_of(rival.txid(), &[TransactionStatusKind::Rejected]).await;
        left.net.stop(0);

        let data_dir = left.data_dir();
        assert_sound(&left, &data_dir);
        let dump = json_of(&data_dir, &["dump"], 0);
        let now = votes(dump.as_array().unwrap());
        let lost: Vec<_> = left.votes().into_iter().filter(|v| v.0 != committed && !now.contains(v)).collect();
        assert!(lost.is_empty(), "schema {schema}: {lost:?}");
        assert!(!now.contains(&(rival.txid(), "Approve".into())));
    }
}

/// The subscription that the old program was given goes on where it was, with the same log.
async fn resume(left: &Left, wallet: &mut support::Wallet) {
    let meta = left.tree("meta");
    let of = |name: &str| meta.iter().find(|(key, _)| *key == name).unwrap().1;
    let (log_id, sequence) = (text(&of("network")["log_id"]), of("head")["sequence"].as_u64());
    let subscriptions = left.tree("subscriptions");
    let before = subscriptions.iter().find(|(_, s)| s["subscriber_id"] == "a wallet").unwrap().1;
    let subscribe = UTXOSubscribe {
        outpoints: serde_json::from_value(before["outpoints"].clone()).unwrap(),
        addresses: serde_json::from_value(before["addresses"].clone()).unwrap(),
        subscriber_id: "a wallet".into(),
        resume_token: Some("11".repeat(32)),
        resume_from: sequence,
        log_id: Some(log_id.to_owned()),
    };
    wallet.send(&NetworkMessage::UTXOSubscribe(subscribe)).await;
    let subscribed = wallet.wait_for("the subscription", |message| match message {
        NetworkMessage::UTXOSubscribed(subscribed) => Some(subscribed),
        _ => None,
    });
    let subscribed = subscribed.await;
    assert_eq!((subscribed.reset, Some(subscribed.sequence)), (false, sequence));
    assert_eq!(subscribed.log_id, log_id);
}

/// A payment of a coin that the old program had locked for another one.
fn rival(left: &Left) -> Transaction {
    let spent: BTreeSet<String> = left
        .in_flight()
        .values()
        .filter(|(_, locked_at)| locked_at.is_some())
        .flat_map(|(transaction, _)| transaction.spends().map(|outpoint| outpoint.to_string()))
        .collect();
    let key = SecretKey::from_hex(&left.net.devnet.wallets[0].secret_seed).unwrap();
    let owner = left.net.address(&key).to_string();
    let utxos = left.tree("utxos");
    let locked = |(place, row): &&(&str, &Value)| spent.contains(*place) && row["output"]["address"] == owner.as_str();
    let (place, row) = utxos.iter().find(locked).unwrap();
    let output: Output = serde_json::from_value(row["output"].clone()).unwrap();
    let coin = Coin { outpoint: place.parse().unwrap(), amount: output.amount, key };
    left.net.pay(&coin, &left.net.address(&SecretKey::generate()), 99)
}

/// `time-db migrate`, under the shim or without it.
fn migrate(left: &Left, data_dir: &Path, watch: &Watch) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_time-db"));
    command.arg("--data-dir").arg(data_dir).args(["migrate", "--genesis", &left.genesis()]);
    watch.apply(&mut command).output().unwrap()
}

/// The power goes at any moment of a migration: what is there is the old schema or the new
/// one, whole; with the new one there is the copy of the old; and it can be migrated.
/// `TIME_POWER_CUTS=200` makes more cuts than CI does.
#[test]
fn a_migration_that_is_cut_off_is_made_again() {
    let (seed, cuts) = (seed("cut migrations"), number("TIME_POWER_CUTS").unwrap_or(3));
    for schema in 1..SCHEMA_VERSION {
        let left = Left::by(schema);
        let (data_dir, trace) = (left.data_dir(), left.net.directory().join("trace"));
        let (image, before) = (image_of(&data_dir), Raw::of(&data_dir));
        let output = migrate(&left, &data_dir, &Watch::all(&data_dir, &trace));
        assert!(output.status.success(), "{}", stderr(&output));
        let after = Raw::of(&data_dir);
        let (records, _) = read_trace(&trace, 0);
        let syncs: Vec<usize> = (0..records.len()).filter(|at| matches!(records[*at], Record::Sync(_))).collect();
        assert!(syncs.len() > 10, "a migration syncs: {}", syncs.len());
        let (mut dice, mut disk, mut at) = (Dice::new(seed), Disk::new(&data_dir, &image), 0);
        // Anywhere, and before each sync from where the copy gets its name: there it is migrated.
        let named = records.iter().rposition(|record| matches!(record, Record::Rename { .. })).unwrap();
        let mut places: Vec<usize> = (0..cuts).map(|_| syncs[dice.index(syncs.len())] + dice.index(2)).collect();
        places.extend(syncs.iter().copied().filter(|at| *at > named).chain([records.len()]));
        eprintln!("schema {schema}: {} cuts", places.len());
        places.sort_unstable();
        let (mut olds, mut news) = (0, 0);
        for place in places {
            records[at..place].iter().for_each(|record| disk.follow(record));
            at = place;
            let loss = Loss::any(&mut dice);
            let cut = disk.after_power_cut(loss, &mut dice);
            let told = format!("schema {schema}, cut at {at} of {}, {loss:?}", records.len());
            match assert_migrates(&left, &cut, &before, &after, &told) {
                true => news += 1,
                false => olds += 1,
            }
        }
        assert!(olds > 0 && news > 0, "{olds} were old, {news} new");
    }
}

/// Whether the new schema was there already.
fn assert_migrates(left: &Left, cut: &Image, before: &Raw, after: &Raw, told: &str) -> bool {
    let directory = left.net.directory().join("cut");
    put_image(&directory, cut);
    let found = Raw::of(&directory);
    let kept = directory.join(left.kept().file_name().unwrap());
    let migrated = found.schema() == SCHEMA_VERSION;
    if found.schema() > left.schema {
        assert!(kept.exists(), "{told}: schema {} without the copy", found.schema());
    } else {
        assert!(found == *before, "{told}: neither the old rows nor the new ones");
    }
    assert!(!kept.exists() || Raw::of(&kept) == *before, "{told}: the copy is another one");
    let made = migrate(left, &directory, &Watch::nothing());
    assert!(made.status.success(), "{told}: {}", stderr(&made));
    assert!(Raw::of(&directory) == *after, "{told}: other rows than without the cut");
    migrated
}

/// Whatever the n-th call on the disk is that fails: the program says so, and on a disk that
/// works it is migrated to the same.
#[test]
fn a_migration_on_a_failing_disk_is_made_again() {
    for schema in 1..SCHEMA_VERSION {
        let left = Left::by(schema);
        let (data_dir, image) = (left.data_dir(), image_of(&left.data_dir()));
        let before = Raw::of(&data_dir);
        assert!(migrate(&left, &data_dir, &Watch::nothing()).status.success());
        let after = Raw::of(&data_dir);
        let work = left.net.directory().join("work");
        let mut failed = 0;
        for call in (0..).map(|n| 9 * 5_u64.pow(n) / 3_u64.pow(n)) {
            put_image(&work, &image);
            let kind = ["eio", "kill", "enospc"][failed % 3];
            let watch = Watch::all(&work, &left.net.directory().join("faults")).failing(call, kind, kind != "kill");
            if migrate(&left, &work, &watch).status.success() {
                break;
            }
            failed += 1;
            assert_migrates(
                &left,
                &image_of(&work),
                &before,
                &after,
                &format!("schema {schema}, {kind} at call {call}"),
            );
        }
        assert!(failed > 4, "only {failed} of them failed");
    }
}

/// There is no way back: a newer schema is refused by everything, and left as it is.
#[test]
fn a_newer_schema_is_refused_and_left_as_it_is() {
    let left = Left::by(SCHEMA_VERSION);
    let (data_dir, scratch) = (left.data_dir(), tempfile::tempdir().unwrap());
    let newer = SCHEMA_VERSION + 1;
    let backup = scratch.path().join("backup");
    set_schema(&data_dir, newer);
    let (before, files) = (Raw::of(&data_dir), names(&data_dir));
    let mut commands = looks(&left, scratch.path());
    for more in
        [&["stats"][..], &["migrate", "--genesis", &left.genesis()], &["backup", "--to", backup.to_str().unwrap()]]
    {
        commands.push(more.iter().map(ToString::to_string).collect());
    }
    for args in &commands {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let refused = failure(&data_dir, &args);
        assert_eq!(refused["kind"], json!("newer_schema"), "{args:?}: {refused}");
        assert!(text(&refused["error"]).contains(&format!("schema {newer}")), "{refused}");
    }
    let fresh = scratch.path().join("fresh");
    let restore = ["restore", "--from", data_dir.to_str().unwrap(), "--genesis", &left.genesis()];
    assert_eq!(failure(&fresh, &restore)["kind"], json!("newer_schema"));
    let config = left.net.directory().join(&left.net.devnet.nodes[0].config_file);
    let node = Command::new(env!("CARGO_BIN_EXE_time-masternode")).args(["run", "--config"]).arg(config).output();
    let node = node.unwrap();
    let said = String::from_utf8_lossy(&node.stderr).into_owned();
    assert_eq!(node.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("the database has schema {newer}, and this program knows only up to")), "{said}");
    assert!(Raw::of(&data_dir) == before, "no row has changed");
    assert_eq!(names(&data_dir), files);
    // Its own number makes it its own again.
    set_schema(&data_dir, SCHEMA_VERSION);
    assert_sound(&left, &data_dir);
    assert!(time_db(&data_dir, &["dump"]).status.success());
}

/// Programs before schema 6 pruned what blocks had spent, a part of a block at a time and before
/// the change log. What they left is not taken for what was lost.
#[test]
fn what_was_pruned_before_is_not_missed() {
    let left = Left::by(5);
    let data_dir = left.data_dir();
    let tip = left.tree("meta").iter().find(|(key, _)| *key == "chain").unwrap().1["height"].as_u64().unwrap();
    let in_chain = left.tree("utxos").into_iter().filter(|(_, row)| !row["state"]["Confirmed"].is_null());
    let spent: Vec<OutPoint> = in_chain.map(|(key, _)| key.parse().unwrap()).collect();
    assert!(spent.len() > 4);
    in_sled(&data_dir, |db| {
        let (utxos, meta) = (db.open_tree("utxos").unwrap(), db.open_tree("meta").unwrap());
        for OutPoint { txid, vout } in &spent {
            assert!(utxos.remove([txid.as_bytes().as_slice(), &vout.to_be_bytes()].concat()).unwrap().is_some());
        }
        meta.insert("pruned", [tip - 1, 1, 0].map(u64::to_le_bytes).concat()).unwrap();
    });
    json_of(&data_dir, &["migrate", "--genesis", &left.genesis()], 0);
    assert_sound(&left, &data_dir);
    let dumped = json_of(&data_dir, &["dump"], 0);
    let dumped = dumped.as_array().unwrap();
    assert_eq!(of_tree(dumped, "utxos").len(), left.tree("utxos").len() - spent.len());
    // To restore a copy it is opened as a node opens it.
    let (backup, fresh) = (left.net.directory().join("backup"), left.net.directory().join("fresh"));
    json_of(&data_dir, &["backup", "--to", backup.to_str().unwrap()], 0);
    json_of(&fresh, &["restore", "--from", backup.to_str().unwrap()], 0);
    assert_sound(&left, &fresh);
    // So is what is imported.
    let (file, imported) = (left.net.directory().join("export"), left.net.directory().join("imported"));
    json_of(&data_dir, &["export", file.to_str().unwrap()], 0);
    json_of(&imported, &["import", file.to_str().unwrap(), "--genesis", &left.genesis()], 0);
    assert_sound(&left, &imported);
    // Nothing is forgotten any more, so what is lost from now on is.
    in_sled(&fresh, |db| db.open_tree("meta").unwrap().remove("forgotten").unwrap().unwrap());
    json_of(&fresh, &["verify"], 1);
}
