//! Bytes that others depend on: what stands in the database of an older version, and in
//! the messages of peers and wallets.
//!
//! If a test here fails, the change that made it fail breaks every database or every
//! wallet out there. It needs a migration or a new protocol version, not a new literal.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

use serde_json::json;
use time_masternode::consensus::{
    AgreementRecord, Certificate, ChainTip, Changes, Dead, FenceState, Finalized, InFlight, RoundTimer, Settled,
    SignedVote, Transition, Utxo, Vote, VoteBatch, VoteKind,
};
use time_masternode::db::{
    CommitBatch, Database, InspectTrees, LogEntry, Owner, Pruned, Row, SCHEMA_VERSION, Subscription, SubscriptionKey,
};
use time_masternode::net::{
    ErrorCode, ErrorMessage, FinalityProof, Hello, NetworkMessage, RejectionMessage, Role, StateEntry,
    TransactionStatus, TransactionStatusKind, UTXOStateNotification, UTXOStateNotificationMessage, UTXOSubscribe,
    parse,
};
use time_masternode::types::{
    Address, Allocation, Amount, Block, BlockHash, CommitVote, DecidedBlock, Genesis, Hash32, Input, Network, OutPoint,
    Output, PublicKey, RawGenesis, RawMasternode, SecretKey, Signature, Transaction, Txid, UTXOState,
};

fn key() -> SecretKey {
    SecretKey::from_seed([1; 32])
}

fn address() -> Address {
    Address::of_key(&key().public_key(), Network::Devnet)
}

fn outpoint() -> OutPoint {
    OutPoint { txid: Txid::from_bytes([0xaa; 32]), vout: 0x0102_0304 }
}

fn output() -> Output {
    Output { amount: Amount::from_units(0x0102_0304_0506).unwrap(), address: address() }
}

fn hex_of<T: serde::Serialize>(value: &T) -> String {
    hex::encode(bincode::serialize(value).unwrap())
}

#[test]
fn rows_are_what_schema_1_says() {
    let payload = hex::encode(address().payload());
    // Amount (u64 LE), network (u32 LE: devnet is 2), payload, state (u32 LE).
    let utxo = Utxo { output: output(), state: UTXOState::Unspent };
    assert_eq!(hex_of(&utxo), format!("060504030201000002000000{payload}00000000"));
    let locked = UTXOState::Locked { txid: Txid::from_bytes([7; 32]), locked_at: 5 };
    assert_eq!(hex_of(&locked), format!("01000000{}0500000000000000", "07".repeat(32)));
    let spent = UTXOState::SpentFinalized { txid: Txid::from_bytes([7; 32]), finalized_at: 5, votes: 3 };
    assert_eq!(hex_of(&spent), format!("02000000{}050000000000000003000000", "07".repeat(32)));
    let confirmed = UTXOState::Confirmed { txid: Txid::from_bytes([7; 32]), block_height: 9, confirmed_at: 5 };
    assert_eq!(hex_of(&confirmed), format!("03000000{}09000000000000000500000000000000", "07".repeat(32)));
    // A count (u64 LE), then kind (u32 LE, from 0) and txid each.
    let votes = vec![
        Vote { kind: VoteKind::Approve, txid: Txid::from_bytes([1; 32]) },
        Vote { kind: VoteKind::Abort, txid: Txid::from_bytes([2; 32]) },
    ];
    assert_eq!(hex_of(&votes), format!("020000000000000000000000{}02000000{}", "01".repeat(32), "02".repeat(32)));
    let entry = LogEntry::Transition(Transition {
        outpoint: outpoint(),
        output: output(),
        old_state: None,
        new_state: UTXOState::Unspent,
        timestamp: 6,
    });
    let expected =
        format!("00000000{}04030201060504030201000002000000{payload}00000000000600000000000000", "aa".repeat(32));
    assert_eq!(hex_of(&entry), expected);
    let settled = Settled { finalized_at: 5, votes: 3, fee: Amount::from_units(10).unwrap() };
    assert_eq!(hex_of(&settled), "0500000000000000030000000a00000000000000");
    let vote = SignedVote {
        voter: PublicKey::from_bytes([3; 32]),
        signature: Signature::from_bytes([4; 64]),
        index: 1,
        batch_size: 2,
        path: vec![Hash32::from_bytes([5; 32])],
    };
    let expected = format!("{}{}01000000020000000100000000000000{}", "03".repeat(32), "04".repeat(64), "05".repeat(32));
    assert_eq!(hex_of(&vote), expected);
    let subscription = Subscription {
        subscriber_id: "w".into(),
        token_hash: [6; 32],
        outpoints: vec![],
        addresses: vec![address()],
        last_used: 7,
    };
    let expected = format!(
        "010000000000000077{}0000000000000000010000000000000002000000{payload}0700000000000000",
        "06".repeat(32)
    );
    assert_eq!(hex_of(&subscription), expected);
}

#[test]
fn rows_are_what_schema_3_says() {
    assert_eq!(hex_of(&FenceState::Asking), "00000000");
    assert_eq!(hex_of(&FenceState::Standing { height: 7 }), "010000000700000000000000");
    let pruned = Pruned { height: 1, entries: 2, sequence: 3 };
    assert_eq!(hex_of(&pruned), "010000000000000002000000000000000300000000000000");
}

fn genesis() -> Genesis {
    Genesis::try_from(RawGenesis {
        network: Network::Devnet,
        timestamp: 1,
        block_interval_ms: 1,
        min_fee: 1,
        masternodes: vec![RawMasternode {
            id: "m".into(),
            public_key: key().public_key(),
            weight: 1,
            p2p_address: String::new(),
            payout_address: address().to_string(),
        }],
        allocations: vec![Allocation { address: address().to_string(), amount: 50 }],
    })
    .unwrap()
}

/// A block with `txid`, as a commit writes it, with something in the next height's log.
fn add_block(changes: &mut Changes, genesis: &Genesis, txid: Txid) -> BlockHash {
    let tip = ChainTip::of_genesis(genesis);
    let block = Block {
        height: 1,
        previous_hash: tip.hash,
        timestamp_ms: 7,
        proposer: key().public_key(),
        state_digest: tip.digest.digest(),
        transactions: vec![txid],
        aborts: vec![],
    };
    let hash = block.hash(&genesis.hash());
    let certificate = CommitVote { height: 1, round: 0, block_hash: hash, votes: vec![] };
    changes.log.push(LogEntry::Block { height: 1, block_hash: hash, timestamp_ms: 7 });
    changes.confirmed.insert(txid, 1);
    changes.dead.insert(Txid::from_bytes([8; 32]), Dead { by: Some(txid), height: 1 });
    changes.blocks.push((hash, DecidedBlock { block, certificate }.into()));
    changes.tip = Some(ChainTip { height: 1, hash, timestamp_ms: 7, ..tip });
    changes.agreement.push((2, AgreementRecord::Timeout { timer: RoundTimer::Propose, round: 3 }));
    hash
}

/// One commit with a row in every tree, read back by `time-db`'s eyes.
#[test]
fn a_commit_writes_every_tree_and_the_inspector_reads_them() {
    let directory = tempfile::tempdir().unwrap();
    let genesis = genesis();
    let owner = Owner { genesis: &genesis, public_key: Some(key().public_key()), first_start: true };
    let mut opened = Database::open(directory.path(), owner, 1 << 20).unwrap();
    let (coin, _) = genesis.transaction().creates().next().unwrap();
    let input =
        Input { previous_output: coin, public_key: key().public_key(), signature: Signature::from_bytes([9; 64]) };
    let spend = |amount: u64| {
        let outputs = vec![Output { amount: Amount::from_units(amount).unwrap(), address: address() }];
        std::sync::Arc::new(Transaction::from_parts(vec![input.clone()], outputs, 0))
    };
    let (in_flight, done) = (spend(40), spend(41));
    let certificate = |kind, txid| std::sync::Arc::new(Certificate { kind, txid, epoch: 0, votes: vec![] });
    let settled = Settled { finalized_at: 2, votes: 1, fee: Amount::from_units(9).unwrap() };
    let born = OutPoint { txid: done.txid(), vout: 0 };
    let mut changes = Changes::default();
    changes.utxos.insert(born, Utxo { output: done.outputs()[0], state: UTXOState::Unspent });
    changes.log.push(LogEntry::Transition(Transition {
        outpoint: born,
        output: done.outputs()[0],
        old_state: None,
        new_state: UTXOState::Unspent,
        timestamp: 3,
    }));
    changes.in_flight.insert(in_flight.txid(), Some(InFlight { transaction: in_flight.clone(), locked_at: Some(4) }));
    changes.votes.push(Vote { kind: VoteKind::Approve, txid: in_flight.txid() });
    changes
        .certificates
        .insert((in_flight.txid(), VoteKind::Approve), certificate(VoteKind::Approve, in_flight.txid()));
    let proof = certificate(VoteKind::Commit, done.txid());
    changes.finalized.insert(done.txid(), Finalized { transaction: done.clone(), settled, certificate: Some(proof) });
    let hash = add_block(&mut changes, &genesis, done.txid());
    let subscription = Subscription {
        subscriber_id: "wallet".into(),
        token_hash: [1; 32],
        outpoints: vec![born],
        addresses: vec![],
        last_used: 5,
    };
    let subscriptions = [(SubscriptionKey::of("wallet"), Some(subscription))].into();
    changes.fence.insert(born, true);
    changes.fence_state = Some(FenceState::Standing { height: 7 });
    let batch = CommitBatch { changes, subscriptions, ..CommitBatch::default() };
    opened.database.commit(batch, ()).unwrap().into_inner();
    drop(opened);

    let trees = InspectTrees::open(directory.path()).unwrap();
    let rows = |name: &str| -> Vec<Row> { trees.rows(name).unwrap().unwrap().collect::<Result<_, _>>().unwrap() };
    let keys = |name: &str| -> Vec<String> { rows(name).into_iter().map(|row| row.key).collect() };
    assert_eq!(keys("meta"), ["chain", "fence", "head", "kept", "network", "schema"]);
    assert_eq!(rows("meta")[5].value, json!(SCHEMA_VERSION));
    assert_eq!(rows("meta")[1].value, json!({ "Standing": { "height": 7 } }));
    assert_eq!(rows("meta")[2].value["commit"], json!(1));
    // What is in flight, the vote on it, its certificate, the agreement's entry, the fence.
    assert_eq!(rows("meta")[3].value["rows"], json!(5));
    assert_eq!(keys("fence"), [born.to_string()]);
    assert_eq!(rows("meta")[0].value["height"], json!(1));
    assert_eq!(rows("meta")[0].value["hash"], json!(hash));
    assert_eq!(rows("meta")[0].value["supply"], json!(50));
    assert_eq!(keys("blocks"), ["1"]);
    assert_eq!(rows("blocks")[0].value["block"]["transactions"], json!([done.txid()]));
    assert_eq!(rows("confirmed")[0].value, json!({ "height": 1, "confirmed_at": 0 }));
    assert_eq!(keys("confirmed"), [done.txid().to_string()]);
    assert_eq!(rows("dead")[0].value, json!({ "by": done.txid(), "height": 1 }));
    assert_eq!(keys("agreement"), ["2/0"]);
    assert_eq!(rows("agreement")[0].value, json!({ "Timeout": { "timer": "Propose", "round": 3 } }));
    assert_eq!(keys("utxos").len(), 2);
    assert!(keys("utxos").contains(&born.to_string()));
    assert!(keys("addresses").contains(&format!("{}/{born}", address())));
    assert_eq!(keys("locks"), [in_flight.txid().to_string()]);
    assert_eq!(rows("locks")[0].value["locked_at"], json!(4));
    assert_eq!(rows("votes")[0].value, json!([{ "kind": "Approve", "txid": in_flight.txid() }]));
    assert_eq!(keys("votes"), ["1"]);
    assert_eq!(keys("certificates"), [format!("{}:commit", in_flight.txid())]);
    assert_eq!(rows("transactions")[0].value["proof"]["kind"], json!("Commit"));
    assert_eq!(rows("transactions")[0].value["settled"], json!({ "fee": 9, "finalized_at": 2, "votes": 1 }));
    assert_eq!(keys("changes"), ["1", "2"]);
    assert_eq!(rows("subscriptions")[0].value["subscriber_id"], json!("wallet"));
    assert!(trees.rows("no-such-tree").unwrap().is_none());
}

/// What wallets and peers parse. Field names, nesting, numbers, nulls.
#[test]
fn messages_are_what_the_protocol_says() {
    let wire = |message: &NetworkMessage| serde_json::to_value(message).unwrap();
    let txid = Txid::from_bytes([0xab; 32]);
    let hex_txid = "ab".repeat(32);
    let status = TransactionStatus {
        txid,
        status: TransactionStatusKind::Rejected,
        rejection: Some(RejectionMessage { code: "InputSpent".into(), message: "m".into(), by: Some(txid) }),
        approvals: 0,
        commits: 0,
        total_masternodes: 4,
        block_height: None,
        finality_proof: None,
    };
    assert_eq!(
        wire(&NetworkMessage::TransactionStatus(Box::new(status))),
        json!({"TransactionStatus": {
            "txid": hex_txid, "status": "Rejected",
            "rejection": {"code": "InputSpent", "message": "m", "by": hex_txid},
            "approvals": 0, "commits": 0, "total_masternodes": 4, "block_height": null, "finality_proof": null
        }})
    );
    let proof = FinalityProof::Commit(std::sync::Arc::new(Certificate {
        kind: VoteKind::Commit,
        txid,
        epoch: 0,
        votes: vec![],
    }));
    assert_eq!(
        serde_json::to_value(&proof).unwrap(),
        json!({"Commit": {"kind": "Commit", "txid": hex_txid, "epoch": 0, "votes": []}})
    );
    let notification = NetworkMessage::UTXOStateNotification(UTXOStateNotificationMessage {
        sequence: 7,
        notification: UTXOStateNotification {
            outpoint: OutPoint { txid, vout: 1 },
            output: output(),
            old_state: None,
            new_state: UTXOState::Locked { txid, locked_at: 9 },
            timestamp: 10,
            originator: "masternode-1".into(),
        },
    });
    assert_eq!(
        wire(&notification),
        json!({"UTXOStateNotification": {"sequence": 7, "notification": {
            "outpoint": {"txid": hex_txid, "vout": 1},
            "output": {"amount": 0x0102_0304_0506_u64, "address": address().to_string()},
            "old_state": null, "new_state": {"Locked": {"txid": hex_txid, "locked_at": 9}},
            "timestamp": 10, "originator": "masternode-1"
        }}})
    );
    let unknown = StateEntry { outpoint: OutPoint { txid, vout: 0 }, output: None, state: None };
    assert_eq!(
        serde_json::to_value(unknown).unwrap(),
        json!({"outpoint": {"txid": hex_txid, "vout": 0}, "output": null, "state": null})
    );
    assert_eq!(serde_json::to_value(UTXOState::Unspent).unwrap(), json!("Unspent"));
    let error = NetworkMessage::Error(ErrorMessage::new(ErrorCode::NotYourSubscription, "m"));
    assert_eq!(wire(&error), json!({"Error": {"code": "NotYourSubscription", "message": "m", "request_id": null}}));
    let batch = VoteBatch {
        voter: PublicKey::from_bytes([1; 32]),
        epoch: 0,
        votes: vec![Vote { kind: VoteKind::Commit, txid }],
        signature: Signature::from_bytes([2; 64]),
    };
    assert_eq!(
        wire(&NetworkMessage::Votes(batch.into())),
        json!({"Votes": {"voter": "01".repeat(32), "epoch": 0, "votes": [{"kind": "Commit", "txid": hex_txid}], "signature": "02".repeat(64)}})
    );
    let hello = Hello {
        protocol_version: 1,
        network: Network::Devnet,
        genesis_hash: genesis().hash(),
        role: Role::Wallet,
        public_key: None,
        listen_address: None,
        nonce: Hash32::from_bytes([3; 32]),
        instance: Hash32::from_bytes([4; 32]),
        user_agent: "w/1".into(),
        height: 0,
        timestamp: 5,
    };
    assert_eq!(
        wire(&NetworkMessage::Hello(hello)),
        json!({"Hello": {
            "protocol_version": 1, "network": "devnet", "genesis_hash": genesis().hash().to_string(), "role": "Wallet",
            "public_key": null, "listen_address": null, "nonce": "03".repeat(32), "instance": "04".repeat(32),
            "user_agent": "w/1", "height": 0, "timestamp": 5
        }})
    );
}

#[test]
fn what_older_wallets_send_is_understood() {
    let subscribe = br#"{"UTXOSubscribe": {"addresses": [], "subscriber_id": "w", "a_field_of_the_future": 1}}"#;
    let expected = UTXOSubscribe {
        outpoints: vec![],
        addresses: vec![],
        subscriber_id: "w".into(),
        resume_token: None,
        resume_from: None,
        log_id: None,
    };
    assert_eq!(parse(subscribe).unwrap().message, NetworkMessage::UTXOSubscribe(expected));
}
