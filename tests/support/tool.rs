//! `time-db` as tests call it.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use time_masternode::net::TransactionStatusKind;
use time_masternode::types::Txid;

use crate::support::{Wallet, in_sled, within};

pub fn time_db(data_dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_time-db")).arg("--data-dir").arg(data_dir).args(args).output().unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The JSON that a command prints; it has to end with this exit code.
#[track_caller]
pub fn json_of(data_dir: &Path, args: &[&str], code: i32) -> Value {
    let output = time_db(data_dir, &[args, &["--format", "json"]].concat());
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", stdout(&output)))
}

#[track_caller]
pub fn rows(data_dir: &Path, args: &[&str]) -> Vec<Value> {
    json_of(data_dir, args, 0).as_array().unwrap().clone()
}

/// The failure that a command tells as JSON; it has to end with 2.
#[track_caller]
pub fn failure(data_dir: &Path, args: &[&str]) -> Value {
    let output = time_db(data_dir, &[args, &["--format", "json"]].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let text = stderr(&output);
    let last = text.lines().last().unwrap_or_else(|| panic!("it says nothing"));
    serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {text}"))
}

pub fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

pub async fn until_confirmed(wallet: &mut Wallet, txid: Txid) {
    within("confirmation", async {
        while wallet.query(txid).await.status != TransactionStatusKind::Confirmed {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Makes of a database without a payment what a program of schema 2 would have left: each output
/// of the genesis in a row of its own, with its state.
pub fn set_back_to_schema_2(data_dir: &Path) {
    in_sled(data_dir, |db| {
        let utxos = db.open_tree("utxos").unwrap();
        for (key, row) in utxos.iter().map(Result::unwrap).collect::<Vec<_>>() {
            let (txid, first) = key.split_at(32);
            let first = u32::from_be_bytes(first.try_into().unwrap());
            // That it is of no transaction, and how many there are; then a tag and an output each.
            for (vout, output) in (first..).zip(row[1 + 8..].chunks(4 + 33)) {
                utxos.insert([txid, &vout.to_be_bytes()].concat(), [&output[4..], &[0; 4]].concat()).unwrap();
            }
        }
        db.open_tree("meta").unwrap().insert("schema", &2_u32.to_le_bytes()).unwrap();
    });
}
