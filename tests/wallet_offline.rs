//! What `time-wallet` does without a node, asked of the real program.
//!
//! Keys and proofs are held to `vectors.json`, which the reference implementation printed.
// A failed unwrap in a helper is a failed test; clippy.toml allows it in `#[test]` functions only.
#![allow(clippy::unwrap_used)]

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use time_masternode::consensus::{Rules, SignedTransaction, Verified, check_form};
use time_masternode::types::{Genesis, RawGenesis, RawTransaction};

fn vectors() -> Value {
    serde_json::from_str(include_str!("vectors.json")).unwrap()
}

/// A directory with the genesis of the vectors, and the program to run in it.
struct Wallet {
    dir: TempDir,
}

impl Wallet {
    fn new() -> Self {
        let wallet = Self { dir: tempfile::tempdir().unwrap() };
        wallet.write("genesis.json", &vectors()["genesis"]["json"].to_string());
        wallet
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_time-wallet"));
        command.current_dir(self.dir.path()).args(arguments.split_whitespace());
        command.env_remove("TIME_WALLET_NODE").env_remove("TIME_WALLET_GENESIS");
        // Nothing listens on the discard port: whoever asks a node in these tests fails.
        command.args(["--node", "ws://127.0.0.1:9"]).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs with the genesis of the vectors.
    fn on_devnet(&self, arguments: &str) -> Output {
        self.run(&format!("--genesis genesis.json {arguments}"))
    }

    /// Imports the seed of a key of the vectors as `NAME.key`.
    fn import(&self, n: usize, name: &str) -> Value {
        let vector = vectors()["keys"][n].clone();
        self.write("seed", vector["seed"].as_str().unwrap());
        let done = self.run(&format!("keygen --from-seed-file seed --out {name}.key"));
        assert_code(&done, 0);
        vector
    }
}

#[track_caller]
fn assert_code(output: &Output, code: i32) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "stdout: {out}\nstderr: {err}");
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn keygen_makes_a_private_file_and_never_overwrites_one() {
    let wallet = Wallet::new();
    let made = wallet.run("keygen --out a.key");
    assert_code(&made, 0);
    assert_eq!(mode(&wallet.path("a.key")), 0o600);
    let before = wallet.read("a.key");
    let key: Value = serde_json::from_str(&before).unwrap();
    assert!(out(&made).contains(key["public_key"].as_str().unwrap()));
    let seed = key["secret_seed"].as_str().unwrap();
    assert!(!out(&made).contains(seed) && !err(&made).contains(seed), "a seed is never printed");

    let again = wallet.run("keygen --out a.key");
    assert_code(&again, 2);
    assert!(err(&again).contains("exists already"), "{}", err(&again));
    assert_eq!(wallet.read("a.key"), before);

    assert_code(&wallet.run("keygen --out b.key"), 0);
    let other: Value = serde_json::from_str(&wallet.read("b.key")).unwrap();
    assert_ne!(other["secret_seed"], key["secret_seed"]);
}

#[test]
fn an_imported_seed_has_the_addresses_of_the_vectors() {
    let wallet = Wallet::new();
    for n in 0..2 {
        let name = format!("key{n}");
        let vector = wallet.import(n, &name);
        let file: Value = serde_json::from_str(&wallet.read(&format!("{name}.key"))).unwrap();
        assert_eq!((&file["public_key"], &file["secret_seed"]), (&vector["public_key"], &vector["seed"]));
        for network in ["mainnet", "testnet", "devnet"] {
            let printed = wallet.run(&format!("address --key {name}.key --network {network}"));
            assert_code(&printed, 0);
            assert_eq!(out(&printed).trim(), vector["addresses"][network].as_str().unwrap());
        }
        let printed = wallet.on_devnet(&format!("--format json address --key {name}.key"));
        let printed: Value = serde_json::from_str(&out(&printed)).unwrap();
        assert_eq!(printed, json!({"address": vector["addresses"]["devnet"]}));
    }
    assert_code(&wallet.run("address --key key0.key"), 2);
    assert_code(&wallet.on_devnet("address --key key0.key --network mainnet"), 2);
}

#[test]
fn a_seed_comes_by_standard_input_too() {
    let wallet = Wallet::new();
    let vector = vectors()["keys"][0].clone();
    let mut child = wallet.command("keygen --from-seed-file - --out a.key").stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(vector["seed"].as_str().unwrap().as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let file: Value = serde_json::from_str(&wallet.read("a.key")).unwrap();
    assert_eq!(file["public_key"], vector["public_key"]);
}

#[test]
fn a_bad_seed_makes_no_file_and_is_not_printed() {
    let wallet = Wallet::new();
    let seed = vectors()["keys"][0]["seed"].as_str().unwrap().to_owned();
    for bad in [seed[1..].to_owned(), format!("{seed}00"), seed.to_uppercase(), String::new()] {
        wallet.write("seed", &bad);
        let refused = wallet.run("keygen --from-seed-file seed --out a.key");
        assert_code(&refused, 2);
        assert!(!err(&refused).contains(&seed[1..20]));
        assert!(!wallet.path("a.key").exists());
    }
    // A seed where a key file belongs: the error must not quote it.
    wallet.write("seed", &format!("\"{seed}\""));
    std::fs::set_permissions(wallet.path("seed"), Permissions::from_mode(0o600)).unwrap();
    let refused = wallet.run("address --key seed --network devnet");
    assert_code(&refused, 2);
    assert!(!err(&refused).contains(&seed[..8]), "{}", err(&refused));
}

#[test]
fn a_key_file_that_others_can_read_is_refused() {
    let wallet = Wallet::new();
    wallet.import(0, "a");
    for open in [0o644, 0o640, 0o604, 0o620] {
        std::fs::set_permissions(wallet.path("a.key"), Permissions::from_mode(open)).unwrap();
        let refused = wallet.on_devnet("address --key a.key");
        assert_code(&refused, 2);
        assert!(err(&refused).contains("chmod 600"), "{}", err(&refused));
    }
    std::fs::set_permissions(wallet.path("a.key"), Permissions::from_mode(0o400)).unwrap();
    assert_code(&wallet.on_devnet("address --key a.key"), 0);
}

#[test]
fn a_changed_key_file_is_refused() {
    let wallet = Wallet::new();
    wallet.import(0, "a");
    let original: Value = serde_json::from_str(&wallet.read("a.key")).unwrap();
    let changes: [fn(&mut Value); 4] = [
        |file| file["public_key"] = vectors()["keys"][1]["public_key"].clone(),
        |file| file["version"] = json!(2),
        |file| file["secret_seed"] = Value::Null,
        |file| file["secret_seed"] = json!("00"),
    ];
    for change in changes {
        let mut file = original.clone();
        change(&mut file);
        wallet.write("a.key", &file.to_string());
        assert_code(&wallet.on_devnet("address --key a.key"), 2);
    }
    wallet.write("a.key", &original.to_string());
    assert_code(&wallet.on_devnet("address --key a.key"), 0);
}

/// The first coin of the genesis belongs to the first key of the vectors.
fn offline_payment(wallet: &Wallet, more: &str) -> Output {
    let genesis_txid = vectors()["genesis"]["genesis_txid"].as_str().unwrap().to_owned();
    let to = vectors()["keys"][1]["addresses"]["devnet"].as_str().unwrap().to_owned();
    wallet.on_devnet(&format!("send --to {to} --amount 0.5 --offline --coin {genesis_txid}:0 {more}"))
}

fn genesis() -> Genesis {
    let raw: RawGenesis = serde_json::from_value(vectors()["genesis"]["json"].clone()).unwrap();
    Genesis::try_from(raw).unwrap()
}

#[test]
fn an_encrypted_key_opens_with_its_passphrase_only() {
    let wallet = Wallet::new();
    wallet.write("seed", vectors()["keys"][0]["seed"].as_str().unwrap());
    wallet.write("passphrase", "correct horse battery staple\n");
    wallet.write("wrong", "correct horse battery stable\n");
    assert_code(&wallet.run("keygen --from-seed-file seed --out a.key --passphrase-file passphrase"), 0);
    assert_eq!(mode(&wallet.path("a.key")), 0o600);
    let text = wallet.read("a.key");
    let file: Value = serde_json::from_str(&text).unwrap();
    assert!(file.get("secret_seed").is_none() && !text.contains(vectors()["keys"][0]["seed"].as_str().unwrap()));

    // The address needs no passphrase, a signature does.
    assert_code(&wallet.on_devnet("address --key a.key"), 0);
    let signed = offline_payment(&wallet, "--key a.key --passphrase-file passphrase");
    assert_code(&signed, 0);
    let refused = offline_payment(&wallet, "--key a.key --passphrase-file wrong");
    assert_code(&refused, 2);
    assert!(out(&refused).is_empty() && err(&refused).contains("passphrase is wrong"), "{}", err(&refused));

    // The public key is associated data: with another one the block does not open.
    let mut moved = file;
    moved["public_key"] = vectors()["keys"][1]["public_key"].clone();
    wallet.write("a.key", &moved.to_string());
    assert_code(&offline_payment(&wallet, "--key a.key --passphrase-file passphrase"), 2);

    wallet.write("empty", "\n");
    assert_code(&wallet.run("keygen --out b.key --passphrase-file empty"), 2);
    assert!(!wallet.path("b.key").exists());
}

#[test]
fn a_payment_signed_offline_is_valid() {
    let wallet = Wallet::new();
    let (payer, payee) = (wallet.import(0, "a"), vectors()["keys"][1].clone());
    let signed = offline_payment(&wallet, "--key a.key");
    assert_code(&signed, 0);
    let raw: RawTransaction = serde_json::from_str(&out(&signed)).unwrap();
    let genesis = genesis();
    let coin = genesis.transaction().outputs()[0].amount.units();
    let outputs: Vec<_> = raw.outputs.iter().map(|o| (o.amount, json!(o.address))).collect();
    let change = coin - 50_000_000 - genesis.min_fee().units();
    let devnet = |key: &Value| key["addresses"]["devnet"].clone();
    assert_eq!(outputs, [(50_000_000, devnet(&payee)), (change, devnet(&payer))]);
    let rules = Rules { network: genesis.network(), min_fee: genesis.min_fee() };
    let transaction = check_form(raw, &rules).unwrap();
    assert!(Verified::check(SignedTransaction::new(transaction, genesis.hash())).is_ok());

    // Somebody else's coin, and one that does not exist.
    wallet.import(1, "b");
    assert_code(&offline_payment(&wallet, "--key b.key"), 1);
    let txid = genesis.transaction().txid();
    assert_code(&offline_payment(&wallet, &format!("--key a.key --coin {txid}:9")), 1);
    assert_code(&offline_payment(&wallet, &format!("--key a.key --coin {txid}:0")), 1);
    let fee = offline_payment(&wallet, "--key a.key --fee 0.00000009");
    assert_code(&fee, 2);
    assert!(err(&fee).contains("below the network's least"), "{}", err(&fee));
    assert_code(&offline_payment(&wallet, "--key a.key --fee 80000000"), 1);
}

#[test]
fn a_bad_payment_is_not_broadcast() {
    let wallet = Wallet::new();
    wallet.import(0, "a");
    let mut raw: Value = serde_json::from_str(&out(&offline_payment(&wallet, "--key a.key"))).unwrap();
    wallet.write("good.json", &raw.to_string());
    let unconnected = wallet.on_devnet("broadcast good.json");
    assert_code(&unconnected, 2);
    assert!(err(&unconnected).contains("cannot connect"), "{}", err(&unconnected));
    raw["outputs"][0]["amount"] = json!(1);
    wallet.write("bad.json", &raw.to_string());
    let refused = wallet.on_devnet("broadcast bad.json");
    assert_code(&refused, 1);
    assert!(err(&refused).contains("TxidMismatch"), "{}", err(&refused));
    wallet.write("none.json", "{}");
    assert_code(&wallet.on_devnet("broadcast none.json"), 2);
}

#[test]
fn a_good_proof_is_verified_in_every_form() {
    let wallet = Wallet::new();
    let certificate = vectors()["certificate"]["json"].clone();
    let txid = certificate["txid"].as_str().unwrap().to_owned();
    let proof = json!({"Commit": certificate});
    let status = json!({
        "txid": txid, "status": "Finalized", "rejection": null, "approvals": 4, "commits": 3,
        "total_masternodes": 4, "block_height": null, "finality_proof": proof,
    });
    for form in [certificate.clone(), proof.clone(), status.clone(), json!({"TransactionStatus": status})] {
        wallet.write("proof.json", &form.to_string());
        let verified = wallet.on_devnet("verify-proof proof.json");
        assert_code(&verified, 0);
        let text = format!("{txid} is final: 3 of 4 masternodes committed, weight 3 of 4 (quorum 3)");
        assert_eq!(out(&verified).trim(), text);
        assert_code(&wallet.on_devnet(&format!("verify-proof proof.json --txid {txid}")), 0);
    }
    let json: Value = serde_json::from_str(&out(&wallet.on_devnet("--format json verify-proof proof.json"))).unwrap();
    assert_eq!((&json["txid"], &json["weight"], &json["quorum"]), (&json!(txid), &json!(3), &json!(3)));

    // A status that names one transaction and proves another.
    let mut crossed = status;
    crossed["txid"] = vectors()["transactions"][1]["txid"].clone();
    wallet.write("proof.json", &crossed.to_string());
    assert_refused(&wallet.on_devnet("verify-proof proof.json"));
    crossed["finality_proof"] = Value::Null;
    wallet.write("proof.json", &crossed.to_string());
    assert_refused(&wallet.on_devnet("verify-proof proof.json"));
}

#[track_caller]
fn assert_refused(output: &Output) {
    assert_code(output, 1);
    assert!(output.stdout.is_empty() && err(output).contains("PROOF INVALID"), "{}", err(output));
}

#[test]
fn every_invalid_certificate_is_refused() {
    let wallet = Wallet::new();
    let invalid = vectors()["invalid_certificates"].as_array().unwrap().clone();
    assert!(invalid.len() >= 11);
    for bad in invalid {
        wallet.write("proof.json", &bad["json"].to_string());
        assert_refused(&wallet.on_devnet("verify-proof proof.json"));
        wallet.write("proof.json", &json!({"Commit": bad["json"]}).to_string());
        assert_refused(&wallet.on_devnet("verify-proof proof.json"));
    }
}

#[test]
fn a_proof_holds_on_its_network_and_for_its_transaction_only() {
    let wallet = Wallet::new();
    wallet.write("proof.json", &vectors()["certificate"]["json"].to_string());
    let others = vectors()["other_networks"].as_array().unwrap().clone();
    assert_eq!(others.len(), 2);
    for other in others.iter().chain([&vectors()["weighted_genesis"]]) {
        wallet.write("other.json", &other["json"].to_string());
        assert_refused(&wallet.run("--genesis other.json verify-proof proof.json"));
    }
    let txid = vectors()["transactions"][1]["txid"].clone();
    assert_refused(&wallet.on_devnet(&format!("verify-proof proof.json --txid {}", txid.as_str().unwrap())));
    let blind = wallet.run("verify-proof proof.json");
    assert_code(&blind, 2);
    assert!(err(&blind).contains("--genesis"), "{}", err(&blind));
}

#[test]
fn votes_that_are_no_commits_prove_nothing() {
    use time_masternode::consensus::{Certificate, Committee, SignedVote, Vote, VoteKind, sign_batch};
    use time_masternode::types::SecretKey;
    // A valid certificate of approvals: a quorum signed it, and still nothing is final.
    let seeds: Vec<[u8; 32]> = (1..=4).map(|n| [n; 32]).collect();
    let mut raw = vectors()["genesis"]["json"].clone();
    for (member, seed) in raw["masternodes"].as_array_mut().unwrap().iter_mut().zip(&seeds) {
        member["public_key"] = json!(SecretKey::from_seed(*seed).public_key());
    }
    let genesis = Genesis::try_from(serde_json::from_value::<RawGenesis>(raw.clone()).unwrap()).unwrap();
    let committee = Committee::of_genesis(&genesis);
    let txid = genesis.transaction().txid();
    let wallet = Wallet::new();
    wallet.write("own.json", &raw.to_string());
    for (kind, code) in [(VoteKind::Commit, 0), (VoteKind::Approve, 1), (VoteKind::Abort, 1)] {
        let votes = seeds.iter().map(|seed| {
            let batch = sign_batch(&SecretKey::from_seed(*seed), &committee, vec![Vote { kind, txid }]).unwrap();
            let wire = batch.get().wire().clone();
            SignedVote { voter: wire.voter, signature: wire.signature, index: 0, batch_size: 1, path: Vec::new() }
        });
        let certificate = Certificate { kind, txid, epoch: 0, votes: votes.collect() };
        assert!(certificate.clone().verify(&committee).is_ok(), "{kind:?}: the certificate itself is sound");
        wallet.write("proof.json", &serde_json::to_string(&certificate).unwrap());
        assert_code(&wallet.run("--genesis own.json verify-proof proof.json"), code);
    }
}

/// The vectors' block proves the transactions that it contains, and nothing else.
#[test]
fn a_block_proves_what_it_contains() {
    let wallet = Wallet::new();
    let mut block =
        json!({"Block": {"block": vectors()["blocks"][0]["json"], "certificate": vectors()["consensus"]["commit"]}});
    wallet.write("block.json", &block.to_string());
    let of = |name: &str| vectors()["blocks"][0]["json"][name][0].as_str().unwrap().to_owned();
    let (contained, aborted) = (of("transactions"), of("aborts"));
    let proven = wallet.on_devnet(&format!("verify-proof block.json --txid {contained}"));
    assert_code(&proven, 0);
    assert_code(&wallet.on_devnet(&format!("verify-proof block.json --txid {aborted}")), 1);
    block["Block"]["block"]["timestamp_ms"] = json!(1);
    wallet.write("block.json", &block.to_string());
    assert_code(&wallet.on_devnet(&format!("verify-proof block.json --txid {contained}")), 1);
    let mut forged =
        json!({"Block": {"block": vectors()["blocks"][0]["json"], "certificate": vectors()["consensus"]["commit"]}});
    forged["Block"]["certificate"]["votes"][0]["signature"] = json!("00".repeat(64));
    wallet.write("block.json", &forged.to_string());
    assert_code(&wallet.on_devnet(&format!("verify-proof block.json --txid {contained}")), 1);
}

#[test]
fn what_is_no_proof_cannot_be_judged() {
    let wallet = Wallet::new();
    let block =
        json!({"Block": {"block": vectors()["blocks"][0]["json"], "certificate": vectors()["consensus"]["commit"]}});
    wallet.write("block.json", &block.to_string());
    let unjudged = wallet.on_devnet("verify-proof block.json");
    assert_code(&unjudged, 2);
    assert!(err(&unjudged).contains("say which transaction"), "{}", err(&unjudged));
    for garbage in ["", "{", "[]", "7", "{}", "null", "{\"Commit\": 7}", "{\"finality_proof\": {}}", "{\"votes\": []}"]
    {
        wallet.write("garbage.json", garbage);
        let unjudged = wallet.on_devnet("verify-proof garbage.json");
        assert_code(&unjudged, 2);
        assert!(unjudged.stdout.is_empty());
    }
    assert_code(&wallet.on_devnet("verify-proof no-such-file"), 2);
    wallet.write("genesis.json", "{}");
    assert_code(&wallet.on_devnet("verify-proof block.json"), 2);
}

#[test]
fn what_needs_a_node_says_that_there_is_none() {
    let wallet = Wallet::new();
    let key = wallet.import(0, "a");
    let address = key["addresses"]["devnet"].as_str().unwrap();
    let txid = vectors()["transactions"][0]["txid"].as_str().unwrap().to_owned();
    for command in [
        format!("balance --address {address}"),
        "balance --key a.key".into(),
        format!("send --key a.key --to {address} --amount 1"),
        format!("status {txid}"),
        format!("proof {txid}"),
    ] {
        let unconnected = wallet.on_devnet(&command);
        assert_code(&unconnected, 2);
        assert!(err(&unconnected).contains("cannot connect"), "{command}: {}", err(&unconnected));
    }
    assert_code(&wallet.on_devnet("balance --key a.key --address x"), 2);
    assert_code(&wallet.on_devnet(&format!("send --key a.key --to {address} --amount 0")), 2);
    assert_code(&wallet.on_devnet(&format!("send --key a.key --to {address} --amount 1e3")), 2);
    let elsewhere = key["addresses"]["mainnet"].as_str().unwrap();
    assert_code(&wallet.on_devnet(&format!("send --key a.key --to {elsewhere} --amount 1")), 2);
}
