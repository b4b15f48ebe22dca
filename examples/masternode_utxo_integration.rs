//! One masternode inside a program of one's own: start it, process a transaction, handle a
//! message, read its counters, stop it.
//!
//! It is a network of one member, so it has a quorum by itself; everything else is as in a
//! large network: a real database, real signatures, durable votes.
//!
//! ```text
//! cargo run --example masternode_utxo_integration
//! ```

use std::sync::Arc;

use time_masternode::consensus::Committee;
use time_masternode::net::{
    FinalityProof, NetworkMessage, PeerConfig, PeerManager, TransactionStatusQuery, UTXOStateQuery,
};
use time_masternode::node::{LedgerConfig, MasternodeUTXOIntegration, UTXOStateManager};
use time_masternode::types::{
    Address, Allocation, Amount, Genesis, Input, Network, Output, RawGenesis, RawMasternode, SecretKey, Signature,
    Transaction, sighash,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let masternode = SecretKey::generate();
    let (alice, bob) = (SecretKey::generate(), SecretKey::generate());
    let genesis = genesis(&masternode, &alice)?;

    // 1. The connections.
    let committee = Arc::new(Committee::of_genesis(&genesis));
    let peer_manager =
        Arc::new(PeerManager::new(PeerConfig::new(genesis.network(), committee.clone(), Some(masternode.clone()))));

    // 2. The ledger: opens the database, or recovers it.
    let utxo_manager = Arc::new(UTXOStateManager::open(LedgerConfig {
        id: "masternode-1".into(),
        data_dir: directory.path().to_path_buf(),
        genesis: genesis.clone(),
        key: Some(masternode),
        cache_bytes: 16 * 1024 * 1024,
        // A key that was made just now has never voted.
        first_start: true,
        retention_blocks: None,
        compact_above_bytes: None,
    })?);

    // 3. Both together, running.
    let integration = MasternodeUTXOIntegration::new("masternode-1".into(), utxo_manager, peer_manager);
    integration.initialize().await?;
    println!("{} is running", integration.id());

    // 4. A transaction: its inputs are locked, it is broadcast and voted on.
    let payment = payment(&genesis, &alice, &bob)?;
    let status = integration.process_transaction(&payment.to_raw()).await?;
    println!("{} is {:?}", status.txid, status.status);

    // 5. Messages: where does it stand, and where does its coin?
    let peer = "127.0.0.1:0".parse()?;
    let query = NetworkMessage::TransactionStatusQuery(TransactionStatusQuery { txid: payment.txid() });
    let proof = loop {
        match integration.handle_network_message(&query, peer).await? {
            Some(NetworkMessage::TransactionStatus(status)) if status.status.is_final() => {
                println!("{} is {:?} by {} votes", status.txid, status.status, status.commits);
                break status.finality_proof;
            }
            Some(_) => tokio::task::yield_now().await,
            None => return Err("no answer".into()),
        }
    };
    match proof {
        Some(FinalityProof::Commit(certificate)) => {
            Arc::unwrap_or_clone(certificate).verify(&committee)?;
            println!("its finality proof verifies against the genesis");
        }
        _ => return Err("no finality proof".into()),
    }
    let coin = payment.inputs()[0].previous_output.to_string();
    let query = NetworkMessage::UTXOStateQuery(UTXOStateQuery { outpoints: vec![coin] });
    if let Some(NetworkMessage::UTXOStateResponse(response)) = integration.handle_network_message(&query, peer).await? {
        for entry in response.states {
            println!("{} is {}", entry.outpoint, entry.state.map_or("unknown", |state| state.name()));
        }
    }

    // 6. Counters, and the end.
    println!("{:?}", integration.stats()?);
    integration.shutdown().await;
    Ok(())
}

/// A network of one member, with one coin.
fn genesis(masternode: &SecretKey, owner: &SecretKey) -> Result<Genesis, Box<dyn std::error::Error>> {
    let address = |key: &SecretKey| Address::of_key(&key.public_key(), Network::Devnet).to_string();
    Ok(Genesis::try_from(RawGenesis {
        network: Network::Devnet,
        timestamp: 1_760_000_000,
        block_interval_ms: 2_000,
        min_fee: 10,
        masternodes: vec![RawMasternode {
            id: "masternode-1".into(),
            public_key: masternode.public_key(),
            weight: 1,
            p2p_address: String::new(),
            payout_address: address(masternode),
        }],
        allocations: vec![Allocation { address: address(owner), amount: 100 * Amount::UNITS_PER_TIME }],
    })?)
}

/// Pays the whole coin, but for the fee, from one key to another.
fn payment(genesis: &Genesis, from: &SecretKey, to: &SecretKey) -> Result<Transaction, Box<dyn std::error::Error>> {
    let (outpoint, coin) = genesis.transaction().creates().next().ok_or("the genesis has no coin")?;
    let amount = coin.amount.checked_sub(genesis.min_fee()).ok_or("the coin is too small")?;
    let outputs = vec![Output { amount, address: Address::of_key(&to.public_key(), genesis.network()) }];
    let input = |signature| vec![Input { previous_output: outpoint, public_key: from.public_key(), signature }];
    // The signature is not part of what the txid commits to.
    let txid = Transaction::from_parts(input(Signature::from_bytes([0; 64])), outputs.clone(), 0).txid();
    Ok(Transaction::from_parts(input(from.sign(&sighash(&genesis.hash(), &txid))), outputs, 0))
}
