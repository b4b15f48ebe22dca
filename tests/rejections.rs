//! Every rejection of the protocol's §3, from the wire to the answer, over WebSocket and
//! over TCP.
//!
//! Four masternodes make a coin spent; then two of them go, so that a payment which the
//! other two have locked stays locked. Onto this ledger fall transactions that break one
//! rule each, and some that break two, to see which one is named. Each has to be refused
//! by its code and to leave nothing behind: no commit, no change, no lock, no vote.
//!
//! `Aborted` is not among them: a transaction dies in a block only, and there are none yet.

#![allow(clippy::unwrap_used, reason = "a test fails where it unwraps")]

mod support;

use std::slice::from_ref;

use serde_json::{Value, json};
use support::{Coin, Link, TestNet, until, within};
use time_masternode::limits::{MAX_INPUTS, MAX_OUTPUTS, MAX_TRANSACTION_BYTES};
use time_masternode::net::{ErrorCode, NetworkMessage, TransactionStatus, TransactionStatusKind};
use time_masternode::types::{
    Address, Amount, GenesisHash, Input, Network, OutPoint, Output, RawTransaction, SecretKey, Signature, Transaction,
    Txid, UTXOState, sighash,
};

/// A transaction and why it is refused.
struct Case {
    name: &'static str,
    raw: RawTransaction,
    code: &'static str,
    by: Option<Txid>,
}

/// The ledger of the story: a spent coin, a locked one, two that are free.
struct Stage {
    net: TestNet,
    spent: Coin,
    spender: Transaction,
    locked: Coin,
    holder: Transaction,
    free: Coin,
    other: Coin,
}

impl Stage {
    async fn set() -> Self {
        let mut net = TestNet::without_blocks(4);
        let coins = net.coins();
        let [spent, locked, free, other] = <[Coin; 4]>::try_from(coins).unwrap_or_else(|_| panic!("four coins"));
        let spender = net.split(&spent, 3);
        net.wallet(0).await.pay(&spender).await;
        net.wallet(1).await.until_final(spender.txid()).await;
        net.stop(2);
        net.stop(3);
        let holder = net.pay(&locked, &net.address(&free.key), 5);
        let mut wallet = net.wallet(0).await;
        wallet.broadcast(&holder).await;
        let mut witness = net.wallet(1).await;
        within("the lock on the other node", async {
            while !matches!(witness.state(locked.outpoint).await, Some(UTXOState::Locked { .. })) {}
        })
        .await;
        Self { net, spent, spender, locked, holder, free, other }
    }

    fn output(&self, units: u64) -> Output {
        Output { amount: Amount::from_units(units).unwrap(), address: self.net.address(&self.other.key) }
    }

    /// What `coins` hold, less the fee.
    fn worth(&self, coins: &[Coin]) -> u64 {
        coins.iter().map(|coin| coin.amount.units()).sum::<u64>() - self.net.genesis.min_fee().units()
    }

    /// A sound payment of `coins` but for what is the matter with the coins themselves.
    fn payment(&self, coins: &[Coin]) -> Transaction {
        self.net.sign(coins, vec![self.output(self.worth(coins).min(1_000))], 0)
    }

    /// Every case: one broken rule first, then two at once.
    fn cases(&self) -> Vec<Case> {
        let (free, spent, locked) = (self.free.clone(), self.spent.clone(), self.locked.clone());
        let refused = |name, raw, code| Case { name, raw, code, by: None };
        let good = self.payment(from_ref(&free));
        let edit = |transaction: &Transaction, change: &dyn Fn(&mut RawTransaction)| {
            let mut raw = transaction.to_raw();
            change(&mut raw);
            raw
        };
        let pays = |coins: &[Coin], outputs: Vec<Output>| self.net.sign(coins, outputs, 0);
        let many = |n: usize| -> Vec<Coin> { (0..n).map(|_| unknown(&free)).collect() };
        let wrong_key = Coin { key: SecretKey::generate(), ..free.clone() };
        // A settled parent has all the outputs it will ever have, so nothing waits for this.
        let missing = Coin {
            outpoint: OutPoint { txid: self.spender.txid(), vout: 99 },
            amount: free.amount,
            key: free.key.clone(),
        };
        let worth = self.worth(from_ref(&free));
        let testnet = Address::of_key(&self.other.key.public_key(), Network::Testnet).to_string();
        let nonsense = |raw: &mut RawTransaction| raw.outputs[0].address = "dtime1nonsense".into();
        let twice = [free.clone(), free.clone()];
        let by_spender = Some(self.spender.txid());
        let by_holder = Some(self.holder.txid());
        let one = || vec![self.output(1)];
        vec![
            refused("another version", edit(&good, &|raw| raw.version = 2), "UnsupportedVersion"),
            refused("version 0", edit(&good, &|raw| raw.version = 0), "UnsupportedVersion"),
            refused("no inputs", pays(&[], one()).to_raw(), "NoInputs"),
            refused("no outputs", pays(from_ref(&free), vec![]).to_raw(), "NoOutputs"),
            refused("an input too many", pays(&many(MAX_INPUTS + 1), one()).to_raw(), "TooManyInputs"),
            refused(
                "an output too many",
                pays(from_ref(&free), vec![self.output(1); MAX_OUTPUTS + 1]).to_raw(),
                "TooManyOutputs",
            ),
            refused("another txid", edit(&good, &|raw| raw.txid = Txid::from_bytes([7; 32])), "TxidMismatch"),
            refused("an output changed", edit(&good, &|raw| raw.outputs[0].amount += 1), "TxidMismatch"),
            refused("one coin twice", pays(&twice, one()).to_raw(), "DuplicateInput"),
            refused("an output of nothing", pays(from_ref(&free), vec![self.output(0)]).to_raw(), "ZeroAmount"),
            refused("an address that is none", edit(&good, &nonsense), "InvalidAddress"),
            // The payload is the same, so the txid is still right.
            refused(
                "a testnet address",
                edit(&good, &|raw| raw.outputs[0].address.clone_from(&testnet)),
                "WrongNetwork",
            ),
            refused("an amount of 2^53", edit(&good, &|raw| raw.outputs[0].amount = 1 << 53), "AmountOverflow"),
            refused("an amount of 2^64-1", edit(&good, &|raw| raw.outputs[0].amount = u64::MAX), "AmountOverflow"),
            refused(
                "a sum of 2^53",
                pays(from_ref(&free), vec![self.output(Amount::MAX.units()), self.output(1)]).to_raw(),
                "AmountOverflow",
            ),
            refused("an output that a final parent has not", pays(from_ref(&missing), one()).to_raw(), "UnknownInput"),
            Case {
                name: "a spent coin",
                raw: self.payment(from_ref(&spent)).to_raw(),
                code: "InputSpent",
                by: by_spender,
            },
            Case {
                name: "a locked coin",
                raw: self.payment(&[free.clone(), locked.clone()]).to_raw(),
                code: "InputLocked",
                by: by_holder,
            },
            refused("somebody else's coin", pays(from_ref(&wrong_key), one()).to_raw(), "WrongOwner"),
            refused(
                "more than the coin holds",
                pays(from_ref(&free), vec![self.output(free.amount.units() + 1)]).to_raw(),
                "InsufficientFunds",
            ),
            refused("a fee one short", pays(from_ref(&free), vec![self.output(worth + 1)]).to_raw(), "FeeTooLow"),
            refused("no fee", pays(from_ref(&free), vec![self.output(free.amount.units())]).to_raw(), "FeeTooLow"),
            refused("a broken signature", badly_signed(&good), "InvalidSignature"),
            refused("a signature for another network", self.foreign(&good), "InvalidSignature"),
            refused("a broken copy of what is in flight", badly_signed(&self.holder), "InvalidSignature"),
            // Two rules at once: the first in the protocol's order is named.
            refused(
                "version, inputs",
                edit(&good, &|raw| (raw.version, raw.inputs) = (9, vec![])),
                "UnsupportedVersion",
            ),
            refused("inputs, outputs", pays(&[], vec![]).to_raw(), "NoInputs"),
            refused(
                "too many inputs, txid",
                edit(&pays(&many(MAX_INPUTS + 1), one()), &|raw| raw.txid = Txid::from_bytes([7; 32])),
                "TooManyInputs",
            ),
            refused(
                "txid, one coin twice",
                edit(&pays(&twice, one()), &|raw| raw.txid = Txid::from_bytes([7; 32])),
                "TxidMismatch",
            ),
            refused("one coin twice, nothing", pays(&twice, vec![self.output(0)]).to_raw(), "DuplicateInput"),
            refused("one coin twice, address", edit(&pays(&twice, one()), &nonsense), "DuplicateInput"),
            refused("nothing, unknown", pays(&[unknown(&free)], vec![self.output(0)]).to_raw(), "ZeroAmount"),
            refused("spent, missing", self.payment(&[spent.clone(), missing.clone()]).to_raw(), "UnknownInput"),
            refused("missing, signature", badly_signed(&self.payment(from_ref(&missing))), "UnknownInput"),
            Case {
                name: "spent, owner",
                raw: self.payment(&[Coin { key: free.key.clone(), ..spent.clone() }]).to_raw(),
                code: "InputSpent",
                by: by_spender,
            },
            Case {
                name: "spent, signature",
                raw: badly_signed(&self.payment(from_ref(&spent))),
                code: "InputSpent",
                by: by_spender,
            },
            Case {
                name: "locked, signature",
                raw: badly_signed(&self.payment(from_ref(&locked))),
                code: "InputLocked",
                by: by_holder,
            },
            refused(
                "owner, funds",
                pays(from_ref(&wrong_key), vec![self.output(free.amount.units() + 1)]).to_raw(),
                "WrongOwner",
            ),
            refused("owner, signature", badly_signed(&pays(from_ref(&wrong_key), one())), "WrongOwner"),
            refused("fee, signature", badly_signed(&pays(from_ref(&free), vec![self.output(worth + 1)])), "FeeTooLow"),
        ]
    }

    /// The same transaction signed for a network with another genesis.
    fn foreign(&self, transaction: &Transaction) -> RawTransaction {
        let message = sighash(&GenesisHash::from_bytes([9; 32]), &transaction.txid());
        let mut raw = transaction.to_raw();
        raw.inputs[0].signature = self.free.key.sign(&message);
        raw
    }

    /// What a refused transaction must not change, on a running node.
    fn ledger(&self, node: usize) -> Value {
        let status = self.net.status(node);
        json!({ "commit": status["commit"], "sequence": status["sequence"], "in_flight": status["in_flight"] })
    }

    async fn states(&self, node: usize) -> Vec<Option<UTXOState>> {
        let of_split = TestNet::outputs(&self.spender, &self.spent.key);
        let coins = [&self.spent, &self.locked, &self.free, &self.other].into_iter().chain(&of_split);
        let outpoints: Vec<OutPoint> = coins.map(|coin| coin.outpoint).collect();
        let states = self.net.wallet(node).await.states(&outpoints).await;
        states.into_iter().map(|entry| entry.state).collect()
    }

    /// What a stopped node holds.
    fn dumps(&self) -> Vec<Vec<Value>> {
        let trees = [(0, "locks"), (0, "votes"), (0, "utxos"), (0, "certificates"), (1, "locks"), (1, "votes")];
        trees.into_iter().chain([(1, "utxos")]).map(|(node, tree)| self.net.dump(node, tree)).collect()
    }

    /// Starts the two nodes of the story again.
    fn start_both(&mut self) {
        for node in [0, 1] {
            self.net.start(node);
        }
        until("both see each other", || {
            let peers = |node| {
                let status: Value = serde_json::from_str(&self.net.http(node, "/status")?.1).ok()?;
                Some(status["peers"].as_array()?.len())
            };
            (peers(0)? == 1 && peers(1)? == 1).then_some(())
        });
    }
}

/// A coin that never was.
fn unknown(like: &Coin) -> Coin {
    Coin { outpoint: OutPoint { txid: Txid::from_bytes(rand::random()), vout: 0 }, ..like.clone() }
}

fn badly_signed(transaction: &Transaction) -> RawTransaction {
    let mut raw = transaction.to_raw();
    let Some(Input { signature, .. }) = raw.inputs.first_mut() else { panic!("an input") };
    let mut bytes = *signature.as_bytes();
    bytes[40] ^= 1;
    *signature = Signature::from_bytes(bytes);
    raw
}

/// A transaction's message with a request's id, padded to `size` bytes.
fn message(raw: &RawTransaction, request_id: &str, size: usize) -> String {
    let mut body = serde_json::to_value(raw).unwrap();
    body["request_id"] = request_id.into();
    let text = json!({ "TransactionBroadcast": body }).to_string();
    let padding = " ".repeat(size.saturating_sub(text.len()));
    format!("{padding}{text}")
}

/// The next status, with the id of the request that it answers.
async fn status(link: &mut Link, what: &str) -> (TransactionStatus, Option<String>) {
    let incoming = link.next().await.unwrap_or_else(|| panic!("{what}: the node hung up"));
    match incoming.message {
        NetworkMessage::TransactionStatus(status) => (*status, incoming.request_id),
        other => panic!("{what}: {other:?}"),
    }
}

async fn assert_rejected(link: &mut Link, case: &Case, size: usize) {
    link.say(&message(&case.raw, case.name, size)).await;
    let (status, request_id) = status(link, case.name).await;
    let rejection = status.rejection.unwrap_or_else(|| panic!("{}: {:?}", case.name, status.status));
    assert_eq!(rejection.code, case.code, "{}: {}", case.name, rejection.message);
    assert_eq!(rejection.by, case.by, "{}", case.name);
    assert_eq!(status.status, TransactionStatusKind::Rejected, "{}", case.name);
    assert_eq!(status.txid, case.raw.txid, "{}", case.name);
    assert_eq!(status.finality_proof, None, "{}", case.name);
    assert_eq!(request_id.as_deref(), Some(case.name));
}

#[tokio::test]
async fn every_rejection_has_its_code_and_changes_nothing() {
    let mut stage = Stage::set().await;
    for node in [0, 1] {
        stage.net.stop(node);
    }
    let dumps = stage.dumps();
    assert_eq!((dumps[0].len(), dumps[4].len()), (1, 1), "one payment is in flight on each");
    stage.start_both();
    let before = [stage.ledger(0), stage.ledger(1)];
    let states = stage.states(0).await;
    let mut links = [Link::web_socket(&stage.net, 0).await, Link::wallet(&stage.net, 0).await];
    let cases = stage.cases();
    for link in &mut links {
        for case in &cases {
            assert_rejected(link, case, 0).await;
            assert_eq!(stage.ledger(0), before[0], "{}", case.name);
            assert_eq!(stage.states(0).await, states, "{}", case.name);
        }
    }
    malformed(&stage, &mut links).await;
    too_large(&stage).await;
    unknown_after_the_wait(&stage, &mut links).await;
    // What was accepted before is not an error when it comes again, and nothing new.
    for link in &mut links {
        link.say(&message(&stage.holder.to_raw(), "again", 0)).await;
        let (status, request_id) = status(link, "what is in flight, again").await;
        assert_eq!((status.status, status.rejection), (TransactionStatusKind::Pending, None));
        assert_eq!(request_id.as_deref(), Some("again"));
    }
    assert_eq!([stage.ledger(0), stage.ledger(1)], before);
    assert_eq!(stage.states(0).await, states);
    for node in [0, 1] {
        stage.net.stop(node);
    }
    assert!(stage.dumps() == dumps, "locks, votes, outputs and certificates are what they were");
    nothing_is_held_against_the_good_copies(&mut stage).await;
}

/// What does not parse has no txid to give a status of: it gets an `Error`.
async fn malformed(stage: &Stage, links: &mut [Link]) {
    let good = serde_json::to_value(stage.payment(from_ref(&stage.free)).to_raw()).unwrap();
    let edits: [(&str, Value); 9] = [
        ("/txid", json!("xyz")),
        ("/txid", json!(good["txid"].as_str().unwrap().to_uppercase())),
        ("/version", json!(-1)),
        ("/inputs", json!(7)),
        ("/inputs/0/signature", json!("00")),
        ("/inputs/0/previous_output/vout", json!(4_294_967_296_u64)),
        ("/outputs/0/amount", json!(-1)),
        ("/outputs/0/amount", json!(1.5)),
        ("/timestamp", json!("now")),
    ];
    for link in links {
        for (place, value) in &edits {
            let mut body = good.clone();
            *body.pointer_mut(place).unwrap() = value.clone();
            body["request_id"] = json!(place);
            link.say(&json!({ "TransactionBroadcast": body }).to_string()).await;
            let incoming = link.next().await.unwrap();
            let NetworkMessage::Error(error) = incoming.message else { panic!("{place}: {:?}", incoming.message) };
            assert_eq!((error.code, error.request_id.as_deref()), (ErrorCode::Malformed, Some(*place)));
        }
        let cut = message(&stage.payment(from_ref(&stage.free)).to_raw(), "cut", 0);
        link.say(&cut[..cut.len() - 1]).await;
        let error = link.error("a text that is cut").await;
        assert_eq!(error.code, ErrorCode::Malformed);
    }
}

/// The limit itself is allowed, one byte more is not. On WebSocket that is the limit of a
/// message too, so there the connection ends.
async fn too_large(stage: &Stage) {
    let fee = stage.net.sign(from_ref(&stage.free), vec![stage.output(stage.free.amount.units())], 0);
    let fits = Case { name: "256 KiB", raw: fee.to_raw(), code: "FeeTooLow", by: None };
    let large = Case { name: "256 KiB and a byte", raw: fee.to_raw(), code: "TooLarge", by: None };
    let mut tcp = Link::wallet(&stage.net, 0).await;
    assert_rejected(&mut tcp, &fits, MAX_TRANSACTION_BYTES).await;
    assert_rejected(&mut tcp, &large, MAX_TRANSACTION_BYTES + 1).await;
    let mut raw = fee.to_raw();
    raw.version = 2;
    let both = Case { name: "version, size", raw, code: "UnsupportedVersion", by: None };
    assert_rejected(&mut tcp, &both, MAX_TRANSACTION_BYTES + 1).await;
    assert_rejected(&mut tcp, &fits, 0).await;
    let mut socket = Link::web_socket(&stage.net, 0).await;
    assert_rejected(&mut socket, &fits, MAX_TRANSACTION_BYTES).await;
    socket.say(&message(&large.raw, large.name, MAX_TRANSACTION_BYTES + 1)).await;
    socket.sent_away(large.name, ErrorCode::TooLarge).await;
}

/// A transaction whose parent nobody knows is told so only after its wait. Meanwhile it
/// is not acknowledged: the answer to a question that came later overtakes it.
async fn unknown_after_the_wait(stage: &Stage, links: &mut [Link]) {
    let orphans: Vec<Transaction> = links.iter().map(|_| stage.payment(&[unknown(&stage.free)])).collect();
    for (link, orphan) in links.iter_mut().zip(&orphans) {
        link.say(&message(&orphan.to_raw(), "orphan", 0)).await;
        let txid = orphan.txid();
        link.say(&json!({ "TransactionStatusQuery": { "txid": txid, "request_id": "query" } }).to_string()).await;
    }
    for (link, orphan) in links.iter_mut().zip(&orphans) {
        let (first, request_id) = status(link, "where the orphan stands").await;
        assert_eq!((first.status, request_id.as_deref()), (TransactionStatusKind::Unknown, Some("query")));
        let (second, request_id) = status(link, "the orphan").await;
        assert_eq!((second.txid, request_id.as_deref()), (orphan.txid(), Some("orphan")));
        assert_eq!(second.rejection.unwrap().code, "UnknownInput");
    }
}

/// With a third node back, the good copies of what was refused as badly signed, and the
/// payment that was in flight all the time, become final.
async fn nothing_is_held_against_the_good_copies(stage: &mut Stage) {
    for node in [0, 1, 2] {
        stage.net.start(node);
    }
    stage.net.wait_ready(&[0, 1, 2]);
    let good = stage.payment(from_ref(&stage.free));
    let mut link = Link::web_socket(&stage.net, 0).await;
    let case = Case { name: "once more", raw: badly_signed(&good), code: "InvalidSignature", by: None };
    assert_rejected(&mut link, &case, 0).await;
    let mut wallet = stage.net.wallet(0).await;
    wallet.pay(&good).await;
    wallet.until_final(stage.holder.txid()).await;
    // A bad copy of what is final changes nothing either.
    link.say(&message(&case.raw, "too late", 0)).await;
    let (status, _) = status(&mut link, "too late").await;
    assert_eq!(status.status, TransactionStatusKind::Rejected);
    assert!(wallet.query(good.txid()).await.status.is_final());
}
