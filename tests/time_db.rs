//! `time-db` on the databases of real networks: what it shows, what it finds, and what it
//! does with a database that is in use, missing, damaged, foreign or of the future.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;
#[path = "support/tool.rs"]
mod tool;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use support::{Coin, TestNet, in_sled, until_closed};
use time_masternode::net::TransactionStatusKind;
use time_masternode::types::{Address, SecretKey, Transaction};
use tool::{copy, failure, json_of, rows, stderr, stdout, time_db, until_confirmed};

/// The trees that rows are of, with how many there are of each.
fn trees(rows: &[Value]) -> std::collections::BTreeMap<String, usize> {
    let mut trees = std::collections::BTreeMap::new();
    rows.iter().for_each(|row| *trees.entry(row["tree"].as_str().unwrap().to_owned()).or_default() += 1);
    trees
}

/// A network that was used and stopped.
struct Used {
    net: TestNet,
    /// Whom all payments are for.
    to: Address,
    /// In a block.
    confirmed: Transaction,
    /// Its coin.
    spent: Coin,
    /// In flight on the nodes 0 and 1, which are too few.
    stuck: Transaction,
    /// Its coin.
    held: Coin,
}

impl Used {
    async fn network() -> Self {
        let mut net = TestNet::with_interval(4, 200);
        net.start_all();
        let to = net.address(&SecretKey::generate());
        let coins = net.coins();
        let mut wallet = net.wallet(0).await;
        let confirmed = net.pay(&coins[0], &to, 1);
        wallet.pay(&confirmed).await;
        until_confirmed(&mut wallet, confirmed.txid()).await;
        net.kill(3);
        net.kill(2);
        let stuck = net.pay(&coins[1], &to, 2);
        wallet.broadcast(&stuck).await;
        wallet.status_of(stuck.txid(), &[TransactionStatusKind::Pending]).await;
        net.stop(0);
        net.stop(1);
        Self { net, to, confirmed, spent: coins[0].clone(), stuck, held: coins[1].clone() }
    }

    fn data_dir(&self) -> PathBuf {
        self.net.data_dir(0)
    }
}

#[tokio::test]
async fn what_is_there_is_shown() {
    let used = Used::network().await;
    every_filter(&used);
    one_thing(&used);
    in_flight_and_the_log(&used);
    numbers(&used);
    formats(&used);
    configuration(&used);
}

fn every_filter(used: &Used) {
    let dir = used.data_dir();
    let (txid, held) = (used.confirmed.txid().to_string(), used.held.outpoint.to_string());
    let locked = rows(&dir, &["dump", "--tree", "utxos", "--state", "Locked"]);
    assert_eq!(locked.len(), 1);
    assert_eq!(locked[0]["key"], json!(held));
    assert_eq!(locked[0]["value"]["state"]["Locked"]["txid"], json!(used.stuck.txid()));
    let all = rows(&dir, &["dump", "--tree", "utxos"]);
    let live = rows(&dir, &["dump", "--tree", "utxos", "--state", "Unspent"]);
    let spent = rows(&dir, &["dump", "--tree", "utxos", "--state", "Confirmed"]);
    assert_eq!(all.len(), locked.len() + live.len() + spent.len());

    let to = used.to.to_string();
    let owned = rows(&dir, &["dump", "--address", &to]);
    assert_eq!(
        trees(&owned),
        [("utxos", 1), ("addresses", 1), ("transactions", 1), ("locks", 1), ("changes", 1)]
            .map(|(t, n)| (t.to_owned(), n))
            .into()
    );
    assert_eq!(rows(&dir, &["dump", "--address", &to, "--tree", "utxos"])[0]["value"]["output"]["amount"], json!(1));

    let about = rows(&dir, &["dump", "--outpoint", &used.spent.outpoint.to_string()]);
    let steps = about.iter().filter(|row| row["tree"] == "changes").count();
    assert!((2..=3).contains(&steps), "locked, perhaps final, confirmed: {about:#?}");
    assert_eq!(trees(&about)["transactions"], 1, "what spends it");
    assert!(!trees(&about).contains_key("locks"));

    let about = rows(&dir, &["dump", "--txid", &txid]);
    let found = trees(&about);
    for tree in ["utxos", "addresses", "transactions", "confirmed", "blocks", "changes"] {
        assert!(found.contains_key(tree), "{tree}: {found:?}");
    }
    let others = about.iter().filter(|row| !row.to_string().contains(&txid)).count();
    assert_eq!(others, 0, "{about:#?}");

    let first = rows(&dir, &["dump", "--height", "1"]);
    assert_eq!(trees(&first)["blocks"], 1);
    assert!(trees(&first)["confirmed"] >= 1);
    assert!(rows(&dir, &["dump", "--height", "1000000.."]).is_empty());

    let log = rows(&dir, &["dump", "--sequence", "2..3"]);
    assert_eq!(log.iter().map(|row| row["key"].clone()).collect::<Vec<_>>(), [json!("2"), json!("3")]);
    let last = log.len() + rows(&dir, &["dump", "--sequence", "4.."]).len() + 1;
    assert_eq!(rows(&dir, &["dump", "--tree", "changes"]).len(), last);

    let two = rows(&dir, &["dump", "--tree", "utxos", "--tree", "meta", "--limit", "2"]);
    assert_eq!(trees(&two), [("meta".to_owned(), 2), ("utxos".to_owned(), 2)].into());
    // Filters narrow each other.
    assert!(rows(&dir, &["dump", "--tree", "utxos", "--state", "Locked", "--address", &to]).is_empty());
    for wrong in [["--state", "Spent"], ["--height", "9..7"], ["--txid", "xyz"], ["--tree", "nonsense"]] {
        assert_eq!(time_db(&dir, &[&["dump"][..], &wrong].concat()).status.code(), Some(2), "{wrong:?}");
    }
    let payload = [0; 21];
    let foreign = Address::from_payload(time_masternode::types::Network::Mainnet, payload).unwrap().to_string();
    let refused = time_db(&dir, &["dump", "--address", &foreign]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("another network"), "{}", stderr(&refused));
}

fn one_thing(used: &Used) {
    let dir = used.data_dir();
    let spent = used.spent.outpoint.to_string();
    let about = rows(&dir, &["get", "--outpoint", &spent]);
    let found = trees(&about);
    assert_eq!((found["utxos"], found["transactions"], found["confirmed"]), (1, 1, 1), "it and its spender");
    assert!(found["changes"] >= 2);
    assert!(!found.contains_key("addresses"), "it is spent");
    let held = rows(&dir, &["get", "--outpoint", &used.held.outpoint.to_string()]);
    let found = trees(&held);
    assert_eq!((found["utxos"], found["addresses"], found["locks"], found["changes"]), (1, 1, 1, 1));

    let about = rows(&dir, &["get", "--txid", &used.stuck.txid().to_string()]);
    let found = trees(&about);
    assert_eq!((found["locks"], found["votes"], found["utxos"]), (1, 1, 1), "{about:#?}");
    let about = rows(&dir, &["get", "--txid", &used.confirmed.txid().to_string()]);
    let found = trees(&about);
    assert_eq!((found["transactions"], found["confirmed"], found["utxos"], found["addresses"]), (1, 1, 3, 2));

    let height = about.iter().find(|row| row["tree"] == "confirmed").unwrap()["value"]["height"].to_string();
    let block = rows(&dir, &["get", "--height", &height]);
    assert_eq!(trees(&block)["blocks"], 1);
    assert_eq!(trees(&block)["changes"], 2, "the block, and the coin that it spent");

    let entry = rows(&dir, &["get", "--sequence", "1"]);
    assert_eq!(entry.iter().find(|row| row["tree"] == "changes").unwrap()["key"], json!("1"));
    assert_eq!(trees(&entry)["utxos"], 1, "where that output stands now");

    // Every record of every tree is found again by its key.
    for row in &rows(&dir, &["dump"]) {
        let (tree, key) = (row["tree"].as_str().unwrap(), row["key"].as_str().unwrap());
        assert_eq!(rows(&dir, &["get", "--tree", tree, "--key", key]), std::slice::from_ref(row), "{tree} {key}");
    }
    for nothing in [
        vec!["get", "--txid", &"00".repeat(32)],
        vec!["get", "--outpoint", &format!("{}:9", used.spent.outpoint.txid)],
        vec!["get", "--height", "1000000"],
        vec!["get", "--sequence", "1000000"],
        vec!["get", "--tree", "meta", "--key", "nothing"],
    ] {
        let output = time_db(&dir, &nothing);
        assert!(output.status.code() == Some(1) || nothing[1] == "--outpoint", "{nothing:?}: {}", stderr(&output));
    }
    assert_eq!(time_db(&dir, &["get"]).status.code(), Some(2));
    assert_eq!(time_db(&dir, &["get", "--tree", "utxos", "--key", "x"]).status.code(), Some(2));
}

fn in_flight_and_the_log(used: &Used) {
    let dir = used.data_dir();
    let locks = rows(&dir, &["locks"]);
    assert_eq!(locks.len(), 1);
    let lock = &locks[0];
    assert!(lock.as_object().unwrap().keys().eq([
        "certificates",
        "holds",
        "lacks",
        "locked_at",
        "transaction",
        "txid",
        "votes"
    ]));
    assert_eq!(lock["txid"], json!(used.stuck.txid()));
    assert!(lock["locked_at"].as_i64().unwrap() > 1_700_000_000);
    assert_eq!(lock["votes"], json!(["Approve"]));
    assert_eq!(lock["certificates"], json!([]));
    assert_eq!(lock["holds"][0]["outpoint"], json!(used.held.outpoint));
    assert_eq!(lock["holds"][0]["output"]["amount"], json!(used.held.amount));
    assert_eq!(lock["lacks"], json!([]));
    let text = stdout(&time_db(&dir, &["locks"]));
    assert!(text.contains("own votes: Approve") && text.contains(&format!("holds {}", used.held.outpoint)), "{text}");

    let log = rows(&dir, &["changes"]);
    let numbers: Vec<_> = log.iter().map(|entry| entry["sequence"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    assert!(log.iter().all(|entry| entry.as_object().unwrap().keys().eq(["change", "sequence"])));
    assert_eq!(rows(&dir, &["changes", "--from", "3"]), log[2..]);
    assert_eq!(rows(&dir, &["changes", "--from", "3", "--to", "4"]), log[2..4]);
    assert_eq!(rows(&dir, &["changes", "--from", "3", "--limit", "1"]), log[2..3]);
    assert!(rows(&dir, &["changes", "--from", "9", "--to", "8"]).is_empty());
    let table = stdout(&time_db(&dir, &["changes"]));
    assert!(table.contains("Unspent -> {\"Locked\""), "{table}");
}

fn numbers(used: &Used) {
    let dir = used.data_dir();
    let stats = json_of(&dir, &["stats"], 0);
    assert_eq!(stats["schema"], stats["newest_schema"]);
    assert_eq!(stats["network"], json!("devnet"));
    assert_eq!(stats["genesis_hash"], json!(used.net.genesis.hash()));
    assert_eq!(stats["public_key"], json!(used.net.member_key(0).public_key()));
    assert_eq!(stats["guard"], json!({ "commit": stats["commit"], "fits": "equal" }));
    assert_eq!((&stats["suspension"], &stats["fence"]), (&Value::Null, &Value::Null));
    assert!(stats["height"].as_u64().unwrap() >= 1);
    let allocated: u64 = used.net.genesis.transaction().outputs().iter().map(|output| output.amount.units()).sum();
    assert_eq!(stats["supply"]["allocated"], json!(allocated));
    assert_eq!(stats["supply"]["conserved"], json!(true));
    assert_eq!(stats["outputs"]["Locked"], json!({ "count": 1, "amount": used.held.amount }));
    assert_eq!(stats["outputs"]["Confirmed"], json!({ "count": 1, "amount": null }));
    let utxos = stats["trees"].as_array().unwrap().iter().find(|tree| tree["name"] == "utxos").unwrap();
    let outputs = rows(&dir, &["dump", "--tree", "utxos"]).len() as u64;
    assert!((outputs / 4..outputs).contains(&utxos["rows"].as_u64().unwrap()), "several in a row: {utxos}");
    assert!(utxos["bytes"].as_u64().unwrap() > 0 && stats["bytes_on_disk"].as_u64().unwrap() > 0);
    assert_eq!(stats["log_id"].as_str().unwrap().len(), 32);
    let text = stdout(&time_db(&dir, &["stats"]));
    assert!(text.contains("as allocated") && text.contains("fits"), "{text}");
}

fn formats(used: &Used) {
    let dir = used.data_dir();
    for command in [&["dump"][..], &["locks"], &["changes"], &["get", "--height", "1"]] {
        let array = rows(&dir, command);
        let lines = stdout(&time_db(&dir, &[command, &["--format", "ndjson"]].concat()));
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(array, lines, "{command:?}");
        let output = time_db(&dir, command);
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "no progress where nobody looks: {command:?}");
    }
    let line = stdout(&time_db(&dir, &["stats", "--format", "ndjson"]));
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), json_of(&dir, &["stats"], 0));
    // Whoever closes the pipe early has had enough.
    let shell = format!("{} --data-dir {} dump | head -1", env!("CARGO_BIN_EXE_time-db"), dir.display());
    let output = Command::new("bash").args(["-o", "pipefail", "-c", &shell]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
}

/// The node's own configuration says where everything is; flags go first.
fn configuration(used: &Used) {
    let config = used.net.directory().join(&used.net.devnet.nodes[0].config_file);
    let with_config = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_time-db"));
        command.arg("--config").arg(&config).args(more).args(["stats", "--format", "json"]).output().unwrap()
    };
    let output = with_config(&[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), json_of(&used.data_dir(), &["stats"], 0));
    let other = used.net.data_dir(1);
    let output = with_config(&["--data-dir", other.to_str().unwrap()]);
    let stats: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(stats["public_key"], json!(used.net.member_key(1).public_key()));
    let neither = Command::new(env!("CARGO_BIN_EXE_time-db")).arg("stats").output().unwrap();
    assert_eq!(neither.status.code(), Some(2));
    assert!(stderr(&neither).contains("data_dir"), "{}", stderr(&neither));
}

#[tokio::test]
async fn a_database_that_cannot_be_used_is_named_with_what_to_do() {
    let mut net = TestNet::running(1);
    let dir = net.data_dir(0);
    let running = failure(&dir, &["stats"]);
    assert_eq!(running["kind"], json!("in_use"));
    assert!(running["next"].as_str().unwrap().contains("stop the node"), "{running}");
    let coins = net.coins();
    let to = net.address(&SecretKey::generate());
    net.wallet(0).await.pay(&net.pay(&coins[0], &to, 1)).await;
    net.stop(0);

    let empty = tempfile::tempdir().unwrap();
    for missing in [Path::new("/no/such/directory"), empty.path()] {
        assert_eq!(failure(missing, &["stats"])["kind"], json!("missing"));
    }
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0, "nothing is made");
    let text = stderr(&time_db(empty.path(), &["stats"]));
    assert!(text.contains("no database") && text.contains("next: "), "{text}");

    let other = TestNet::new(1);
    let genesis = other.directory().join(&other.devnet.genesis_file);
    let foreign = failure(&dir, &["stats", "--genesis", genesis.to_str().unwrap()]);
    assert_eq!(foreign["kind"], json!("other_network"));

    let future = net.directory().join("future");
    copy(&dir, &future);
    in_sled(&future, |db| {
        let schema = 99_u32.to_le_bytes();
        db.open_tree("meta").unwrap().insert("schema", &schema).unwrap();
    });
    let newer = failure(&future, &["stats"]);
    assert_eq!(newer["kind"], json!("newer_schema"));
    assert!(newer["error"].as_str().unwrap().contains("99"), "{newer}");

    // Without its guard it does not fit, and no new one is made.
    let unguarded = net.directory().join("unguarded");
    copy(&dir, &unguarded);
    std::fs::remove_file(unguarded.join("guard")).unwrap();
    let stats = json_of(&unguarded, &["stats"], 1);
    assert_eq!(stats["guard"], json!({ "commit": null, "fits": "mismatch" }));
    let looked = time_db(&unguarded, &["dump", "--tree", "meta"]);
    assert!(looked.status.success() && stderr(&looked).contains("does not fit its guard"), "{}", stderr(&looked));
    assert!(!unguarded.join("guard").exists());
    assert_eq!(json_of(&unguarded, &["stats"], 1)["commit"], stats["commit"], "looking commits nothing");

    // A row that cannot be read is a finding, whichever it is; the others are printed.
    let all = stdout(&time_db(&dir, &["dump", "--tree", "utxos"])).lines().count();
    let mut rows = 0;
    loop {
        let torn = net.directory().join(format!("torn-{rows}"));
        copy(&dir, &torn);
        let mut key = None;
        in_sled(&torn, |db| {
            let utxos = db.open_tree("utxos").unwrap();
            key = utxos.iter().keys().nth(rows).map(Result::unwrap);
            key.iter().for_each(|key| assert!(utxos.insert(key, b"?").unwrap().is_some()));
        });
        if key.is_none() {
            break;
        }
        let rest = time_db(&torn, &["dump", "--tree", "utxos"]);
        assert_eq!(rest.status.code(), Some(1), "{}", stderr(&rest));
        assert!(stdout(&rest).lines().count() < all);
        assert!(json_of(&torn, &["stats"], 1)["unreadable"].as_u64().unwrap() >= 1);
        std::fs::remove_dir_all(&torn).unwrap();
        rows += 1;
    }
    assert!(rows > 1, "one of the genesis, and one of the payment");

    // A tree that an older schema has not got is not made by looking.
    let older = net.directory().join("older");
    copy(&dir, &older);
    in_sled(&older, |db| assert!(db.drop_tree("fence").unwrap()));
    assert!(time_db(&older, &["dump"]).status.success());
    in_sled(&older, |db| assert!(!db.tree_names().iter().any(|name| *name == b"fence")));
}

/// Damaged files: whatever sled makes of them, the program says so and ends, and it neither
/// hangs nor prints a backtrace.
#[tokio::test]
async fn a_damaged_database_ends_with_a_message() {
    let mut net = TestNet::running(1);
    let dir = net.data_dir(0);
    let coins = net.coins();
    let to = net.address(&SecretKey::generate());
    let mut wallet = net.wallet(0).await;
    for coin in &coins {
        wallet.pay(&net.pay(coin, &to, 1)).await;
    }
    net.stop(0);
    // With a snapshot of its own, sled reads pages only when they are asked for.
    let snapped = net.directory().join("snapped");
    copy(&dir, &snapped);
    #[expect(deprecated, reason = "the only way to have a snapshot of a database as small as a test's")]
    let config = sled::Config::new().path(snapped.join("db")).snapshot_after_ops(1);
    let db = config.open().unwrap();
    for i in 0..1_000_u32 {
        db.insert(i.to_be_bytes(), &[0; 8]).unwrap();
    }
    db.flush().unwrap();
    drop(db);
    until_closed(&snapped);
    let mut names = std::fs::read_dir(snapped.join("db")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names.any(|name| name.to_string_lossy().starts_with("snap.")));
    let mut codes = std::collections::BTreeMap::new();
    for (base, part) in [&dir, &snapped].into_iter().flat_map(|base| (0..10).map(move |part| (base, part))) {
        let damaged = net.directory().join("damaged");
        copy(base, &damaged);
        let mut bytes = std::fs::read(base.join("db").join("db")).unwrap();
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        bytes[used * part / 10..used * (part + 1) / 10].fill(0xa5);
        std::fs::write(damaged.join("db").join("db"), bytes).unwrap();
        let output = time_db(&damaged, &["stats"]);
        let (code, text) = (output.status.code(), stderr(&output));
        assert!(!text.contains("panicked at"), "{text}");
        match code {
            // The place was not in use.
            Some(0) => assert_eq!(time_db(&damaged, &["dump"]).stdout, time_db(base, &["dump"]).stdout),
            Some(1) => assert!(text.contains("guard"), "{text}"),
            Some(2) => assert!(text.contains("damaged") && text.contains("next: "), "{text}"),
            _ => panic!("{code:?}: {text}"),
        }
        *codes.entry(code).or_insert(0) += 1;
        std::fs::remove_dir_all(&damaged).unwrap();
    }
    let of = |code| codes.contains_key(&Some(code));
    assert!(of(1) && of(2), "some opens as something older, some not at all: {codes:?}");
}

/// sled waits for ever on a pipe that nobody writes to.
#[test]
fn opening_does_not_take_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("db")).unwrap();
    std::fs::write(directory.path().join("db").join("db"), b"").unwrap();
    let made = Command::new("mkfifo").arg(directory.path().join("db").join("conf")).status().unwrap();
    assert!(made.success());
    let stuck = failure(directory.path(), &["stats", "--open-timeout", "1"]);
    assert_eq!(stuck["kind"], json!("damaged"));
    assert!(stuck["error"].as_str().unwrap().contains("1 seconds"), "{stuck}");
}
