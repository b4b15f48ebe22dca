//! The project agrees with the reference implementation, byte for byte.
//!
//! `vectors.json` is what the reference printed. Every entry of every section is used.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use time_masternode::consensus::{
    Certificate, Committee, MemberBatch, Rules, SignedTransaction, Verified, Vote, VoteBatch, VoteKind, check_form,
    quorum, sign_batch,
};
use time_masternode::net::handshake_message;
use time_masternode::types::{
    Address, Amount, Block, BlockHash, CommitVote, ConsensusStep, Genesis, GenesisHash, Hash32, MerkleTree, Network,
    OutPoint, Output, PublicKey, RawGenesis, RawTransaction, SecretKey, Signature, Transaction, Txid, UtxoDigest,
    consensus_vote_message, merkle_climb, proposal_message, sighash, tagged_hash,
};

fn vectors() -> Value {
    serde_json::from_str(include_str!("vectors.json")).unwrap()
}

fn read<T: DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

fn list<T: DeserializeOwned>(section: &str) -> Vec<T> {
    let items: Vec<T> = read(&vectors()[section]);
    assert!(!items.is_empty(), "{section}");
    items
}

fn genesis() -> Genesis {
    Genesis::try_from(read::<RawGenesis>(&vectors()["genesis"]["json"])).unwrap()
}

fn rules() -> Rules {
    Rules { network: Network::Devnet, min_fee: genesis().min_fee() }
}

fn transactions() -> Vec<Transaction> {
    list::<Value>("transactions").iter().map(|t| check_form(read(&t["json"]), &rules()).unwrap()).collect()
}

fn named(name: &str) -> SecretKey {
    use sha2::Digest;
    SecretKey::from_seed(sha2::Sha256::digest(name.as_bytes()).into())
}

#[test]
fn tagged_hashes() {
    #[derive(Deserialize)]
    struct Vector {
        tag: String,
        data: String,
        hash: Hash32,
    }
    for v in list::<Vector>("tagged_hash") {
        assert_eq!(tagged_hash(&v.tag, &[&hex::decode(&v.data).unwrap()]), *v.hash.as_bytes());
    }
}

#[test]
fn keys_and_addresses() {
    for v in list::<Value>("keys") {
        let key = SecretKey::from_hex(v["seed"].as_str().unwrap()).unwrap().public_key();
        assert_eq!(key, read::<PublicKey>(&v["public_key"]));
        for network in Network::ALL {
            let text = v["addresses"][network.to_string()].as_str().unwrap();
            assert_eq!(Address::of_key(&key, network).to_string(), text);
            assert_eq!(Address::parse(text, network), Ok(Address::of_key(&key, network)));
        }
    }
    for text in list::<String>("invalid_addresses") {
        assert!(text.parse::<Address>().is_err(), "{text:?}");
    }
}

#[test]
fn genesis_files() {
    let vectors = vectors();
    let check = |v: &Value| {
        let genesis = Genesis::try_from(read::<RawGenesis>(&v["json"])).unwrap();
        assert_eq!(genesis.hash(), read::<GenesisHash>(&v["genesis_hash"]));
        if let Some(txid) = v.get("genesis_txid") {
            assert_eq!(genesis.transaction().txid(), read::<Txid>(txid));
        }
        genesis
    };
    check(&vectors["genesis"]);
    for other in vectors["other_networks"].as_array().unwrap() {
        check(other);
    }
    let weighted = &vectors["weighted_genesis"];
    let committee = Committee::of_genesis(&check(weighted));
    assert_eq!(committee.total_weight(), read::<u64>(&weighted["total_weight"]));
    assert_eq!(committee.quorum(), read::<u64>(&weighted["quorum"]));
}

#[test]
fn transactions_and_their_signatures() {
    let genesis_hash = genesis().hash();
    for v in list::<Value>("transactions") {
        let raw: RawTransaction = read(&v["json"]);
        let transaction = check_form(raw.clone(), &rules()).unwrap();
        assert_eq!(hex::encode(transaction.canonical_bytes()), v["canonical_bytes"].as_str().unwrap());
        assert_eq!(transaction.txid(), read::<Txid>(&v["txid"]));
        assert_eq!(hex::encode(sighash(&genesis_hash, &transaction.txid())), v["sighash"].as_str().unwrap());
        assert_eq!(serde_json::to_value(transaction.to_raw()).unwrap(), v["json"]);
        assert!(Verified::check(SignedTransaction::new(transaction.clone(), genesis_hash)).is_ok());
        let elsewhere = GenesisHash::from_bytes([0; 32]);
        assert!(Verified::check(SignedTransaction::new(transaction, elsewhere)).is_err());
    }
}

#[test]
fn quorums() {
    for v in list::<Value>("quorum") {
        assert_eq!(quorum(read(&v["total_weight"])), read::<u64>(&v["quorum"]));
    }
}

#[test]
fn merkle_trees() {
    #[derive(Deserialize)]
    struct Vector {
        leaves: Vec<Hash32>,
        root: Hash32,
        paths: Vec<Vec<Hash32>>,
    }
    for v in list::<Vector>("merkle") {
        let tree = MerkleTree::new(v.leaves.clone()).unwrap();
        assert_eq!(tree.root(), v.root);
        for (i, path) in v.paths.iter().enumerate() {
            assert_eq!(&tree.path(i), path);
            assert_eq!(merkle_climb(v.leaves[i], i, v.leaves.len(), path), Some(v.root));
        }
    }
}

#[test]
fn vote_batches() {
    let committee = Committee::of_genesis(&genesis());
    for (i, batch) in list::<VoteBatch>("vote_batches").into_iter().enumerate() {
        let key = named(&format!("masternode-{}", i + 1));
        let ours = sign_batch(&key, &committee, batch.votes.clone()).unwrap();
        assert_eq!(ours.get().wire(), &batch, "the same signature, for Ed25519 is deterministic");
        assert!(Verified::check(MemberBatch::new(batch.clone(), &committee).unwrap()).is_ok());
        let mut other = batch;
        other.votes[0].kind = VoteKind::Abort;
        assert!(Verified::check(MemberBatch::new(other, &committee).unwrap()).is_err());
    }
}

#[test]
fn certificates() {
    let vectors = vectors();
    let committee = Committee::of_genesis(&genesis());
    let certificate: Certificate = read(&vectors["certificate"]["json"]);
    assert_eq!(serde_json::to_value(&certificate).unwrap(), vectors["certificate"]["json"]);
    let weight: usize = read(&vectors["certificate"]["weight"]);
    assert_eq!(certificate.votes.len(), weight);
    assert!(certificate.verify(&committee).is_ok());
    for bad in list::<Value>("invalid_certificates") {
        let certificate: Certificate = read(&bad["json"]);
        assert!(certificate.verify(&committee).is_err(), "{}", bad["name"]);
    }
    for other in vectors["other_networks"].as_array().unwrap() {
        let elsewhere = Committee::of_genesis(&Genesis::try_from(read::<RawGenesis>(&other["json"])).unwrap());
        assert!(read::<Certificate>(&vectors["certificate"]["json"]).verify(&elsewhere).is_err());
    }
}

#[test]
fn state_digests() {
    let digests: Vec<Value> = list("state_digests");
    let expect = |i: usize, digest: &UtxoDigest| {
        assert_eq!(digest.digest().to_string(), digests[i]["digest"].as_str().unwrap(), "{}", digests[i]["after"]);
    };
    let (genesis, transactions) = (genesis(), transactions());
    let mut digest = UtxoDigest::new();
    expect(0, &digest);
    let mut outputs = std::collections::BTreeMap::new();
    for (outpoint, output) in genesis.transaction().creates() {
        digest.add(&outpoint, &output);
        outputs.insert(outpoint, output);
    }
    expect(1, &digest);
    for transaction in &transactions {
        for outpoint in transaction.spends() {
            digest.remove(&outpoint, &outputs.remove(&outpoint).unwrap());
        }
        for (outpoint, output) in transaction.creates() {
            digest.add(&outpoint, &output);
            outputs.insert(outpoint, output);
        }
    }
    let first: Value = vectors()["blocks"][0]["block_hash"].clone();
    let fees = OutPoint { txid: read(&first), vout: 0 };
    let amount = Amount::from_units(20).unwrap();
    digest.add(&fees, &Output { amount, address: genesis.masternodes()[0].payout_address });
    expect(2, &digest);
    assert_eq!(digests.len(), 3);
}

#[test]
fn blocks_and_what_is_signed_about_them() {
    let vectors = vectors();
    let genesis_hash = genesis().hash();
    let mut hashes = Vec::new();
    for v in list::<Value>("blocks") {
        let block: Block = read(&v["json"]);
        assert_eq!(serde_json::to_value(&block).unwrap(), v["json"]);
        assert_eq!(block.hash(&genesis_hash), read::<BlockHash>(&v["block_hash"]));
        hashes.push(block.hash(&genesis_hash));
    }
    let consensus = &vectors["consensus"];
    let is = |name: &str, message: [u8; 32]| assert_eq!(hex::encode(message), consensus[name].as_str().unwrap());
    is("prevote_nil", consensus_vote_message(ConsensusStep::Prevote, &genesis_hash, 1, 0, None));
    let precommit = consensus_vote_message(ConsensusStep::Precommit, &genesis_hash, 1, 2, Some(&hashes[0]));
    is("precommit", precommit);
    is("proposal", proposal_message(&genesis_hash, 1, 2, &hashes[0], -1));
    let commit: CommitVote = read(&consensus["commit"]);
    assert_eq!(serde_json::to_value(&commit).unwrap(), consensus["commit"]);
    assert_eq!((commit.height, commit.round, commit.block_hash), (1, 2, hashes[0]));
    assert_eq!(commit.votes.len() as u64, read::<u64>(&consensus["commit_weight"]));
    assert!(commit.votes.iter().all(|v| v.voter.verify(&precommit, &v.signature)));
}

#[test]
fn handshakes() {
    #[derive(Deserialize)]
    struct Vector {
        own_key: PublicKey,
        peer_key: Option<PublicKey>,
        own_nonce: Hash32,
        peer_nonce: Hash32,
        message: Hash32,
        signature: Signature,
    }
    for v in list::<Vector>("handshakes") {
        let message =
            handshake_message(&genesis().hash(), &v.peer_nonce, &v.own_nonce, v.peer_key.as_ref(), &v.own_key);
        assert_eq!(message, *v.message.as_bytes());
        assert!(v.own_key.verify(&message, &v.signature));
    }
}

#[test]
fn no_section_is_forgotten() {
    let vectors = vectors();
    let known = [
        "tagged_hash",
        "keys",
        "invalid_addresses",
        "genesis",
        "transactions",
        "quorum",
        "merkle",
        "vote_batches",
        "certificate",
        "invalid_certificates",
        "weighted_genesis",
        "other_networks",
        "state_digests",
        "blocks",
        "handshakes",
        "consensus",
    ];
    for section in vectors.as_object().unwrap().keys() {
        assert!(known.contains(&section.as_str()), "{section} has no test");
    }
    assert_eq!(vectors.as_object().unwrap().len(), known.len());
    let vote = Vote { kind: VoteKind::Approve, txid: Txid::from_bytes([0; 32]) };
    assert_ne!(vote.leaf(), Vote { kind: VoteKind::Commit, ..vote }.leaf());
}
