//! The demonstration: real payments over real sockets, with every state change timed.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use time_masternode::config::read_genesis;
use time_masternode::consensus::Committee;
use time_masternode::devnet::Devnet;
use time_masternode::net::{
    FinalityProof, NetworkMessage, TransactionStatus, TransactionStatusKind, UTXOStateQuery, UTXOSubscribe,
    WalletClient,
};
use time_masternode::types::{
    Address, Amount, Genesis, Input, OutPoint, Output, SecretKey, Signature, Transaction, UTXOState, sighash,
};

/// Payments, one after the other, from which the figures at the end are taken.
const SERIES: usize = 200;

struct Wallet {
    name: String,
    key: SecretKey,
    address: Address,
}

/// An output and its value.
#[derive(Clone, Copy)]
struct Coin {
    outpoint: OutPoint,
    amount: Amount,
}

fn pay(genesis: &Genesis, from: &Wallet, coin: Coin, to: &Address, amount: Amount) -> anyhow::Result<Transaction> {
    let change = coin.amount.checked_sub(amount).and_then(|rest| rest.checked_sub(genesis.min_fee()));
    let change = change.context("not enough money")?;
    let outputs = vec![Output { amount, address: *to }, Output { amount: change, address: from.address }];
    let public_key = from.key.public_key();
    let input = |signature| Input { previous_output: coin.outpoint, public_key, signature };
    // The txid does not depend on the signature, so it is known before there is one.
    let unsigned = Transaction::from_parts(vec![input(Signature::from_bytes([0; 64]))], outputs.clone(), 0);
    let signature = from.key.sign(&sighash(&genesis.hash(), &unsigned.txid()));
    Ok(Transaction::from_parts(vec![input(signature)], outputs, 0))
}

fn change_of(transaction: &Transaction) -> anyhow::Result<Coin> {
    let (outpoint, output) = transaction.creates().nth(1).context("no change")?;
    Ok(Coin { outpoint, amount: output.amount })
}

async fn status_of(wallet: &mut WalletClient, transaction: &Transaction) -> anyhow::Result<TransactionStatus> {
    let status = wallet.wait_for(|message| match message {
        NetworkMessage::TransactionStatus(status) if status.txid == transaction.txid() => Some(*status),
        _ => None,
    });
    Ok(status.await?)
}

struct Demo {
    genesis: Genesis,
    committee: Committee,
    began: Instant,
}

impl Demo {
    fn say(&self, who: &str, what: &str) {
        println!("{:>9.2} ms  {who:<8} {what}", self.began.elapsed().as_secs_f64() * 1_000.0);
    }

    /// Sends a payment and follows it until it is final; gives the milliseconds that took.
    async fn follow(&self, wallet: &mut WalletClient, who: &str, transaction: &Transaction) -> anyhow::Result<f64> {
        let began = Instant::now();
        self.say(who, &format!("sends {}", transaction.txid()));
        wallet.send(&NetworkMessage::TransactionBroadcast(transaction.to_raw())).await?;
        loop {
            let status = status_of(wallet, transaction).await?;
            let counts =
                format!("{} approved, {} committed of {}", status.approvals, status.commits, status.total_masternodes);
            self.say(who, &format!("is told: {:?} ({counts})", status.status));
            match (status.status, status.finality_proof) {
                (kind, Some(FinalityProof::Commit(proof))) if kind.is_final() => {
                    let milliseconds = began.elapsed().as_secs_f64() * 1_000.0;
                    Arc::unwrap_or_clone(proof).verify(&self.committee).context("the finality proof is not valid")?;
                    self.say(who, "has verified the finality proof against the genesis");
                    return Ok(milliseconds);
                }
                (TransactionStatusKind::Pending, _) => {}
                (other, _) => anyhow::bail!("unexpected status {other:?}"),
            }
        }
    }

    /// Payments one at a time, each spending the change of the one before, with three
    /// clocks: the payer's, the payee's on another node, and that of a query.
    async fn series(
        &self,
        payer: &mut WalletClient,
        payee: &mut WalletClient,
        from: &Wallet,
        to: &Wallet,
        mut coin: Coin,
    ) -> anyhow::Result<()> {
        println!("\n{SERIES} payments, one after the other, each spending the change of the one before.\n");
        let amount = Amount::parse_time("1").context("an amount")?;
        let (mut settled, mut heard, mut asked) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..SERIES {
            let payment = pay(&self.genesis, from, coin, &to.address, amount)?;
            let began = Instant::now();
            let elapsed = || began.elapsed().as_secs_f64() * 1_000.0;
            payer.send(&NetworkMessage::TransactionBroadcast(payment.to_raw())).await?;
            let paying = async {
                while status_of(payer, &payment).await?.status != TransactionStatusKind::Finalized {}
                Ok::<f64, anyhow::Error>(elapsed())
            };
            let hearing = async {
                payee
                    .wait_for(|message| match message {
                        NetworkMessage::UTXOStateNotification(n) if n.notification.outpoint.txid == payment.txid() => {
                            Some(())
                        }
                        _ => None,
                    })
                    .await?;
                Ok::<f64, anyhow::Error>(elapsed())
            };
            let (paid, told) = tokio::try_join!(paying, hearing)?;
            settled.push(paid);
            heard.push(told);
            let began = Instant::now();
            let query = UTXOStateQuery { outpoints: vec![coin.outpoint.to_string()] };
            payee.send(&NetworkMessage::UTXOStateQuery(query)).await?;
            payee.wait_for(|message| matches!(message, NetworkMessage::UTXOStateResponse(_)).then_some(())).await?;
            asked.push(began.elapsed().as_secs_f64() * 1_000.0);
            coin = change_of(&payment)?;
        }
        line("from the broadcast to Finalized at the payer", settled);
        line("from the broadcast to the notification at the payee, elsewhere", heard);
        line("a query of a coin's state, there and back", asked);
        Ok(())
    }
}

/// Milliseconds, sorted, as a line for people.
fn line(what: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get((times.len().saturating_sub(1)) * percent / 100).copied().unwrap_or(f64::NAN);
    println!("{what:<62} p50 {:>6.2} ms  p99 {:>6.2} ms  max {:>6.2} ms", at(50), at(99), at(100));
}

/// Makes payments on a running devnet and prints what happens.
pub(crate) async fn run(directory: &Path, devnet: &Devnet) -> anyhow::Result<()> {
    let genesis = read_genesis(&directory.join(&devnet.genesis_file))?;
    let committee = Committee::of_genesis(&genesis);
    let mut wallets = Vec::new();
    for wallet in &devnet.wallets {
        let key = SecretKey::from_hex(&wallet.secret_seed)?;
        let address = Address::of_key(&key.public_key(), genesis.network());
        wallets.push(Wallet { name: wallet.name.clone(), key, address });
    }
    let [alice, bob, ..] = wallets.as_slice() else { anyhow::bail!("the devnet has no wallets") };
    let (first, last) = (&devnet.nodes[0], &devnet.nodes[devnet.nodes.len() - 1]);
    let mut payer = WalletClient::connect(&first.websocket_address).await?;
    let mut payee = WalletClient::connect(&last.websocket_address).await?;
    let demo = Demo { genesis, committee, began: Instant::now() };
    let coin = coin_of(&mut payer, alice).await?;

    println!("\nA payment: {} pays 25 TIME to {}, who listens on another node.\n", alice.name, bob.name);
    let subscriber_id = format!("demo-{}", bob.name);
    payee
        .send(&NetworkMessage::UTXOSubscribe(UTXOSubscribe {
            outpoints: vec![],
            addresses: vec![bob.address.to_string()],
            subscriber_id,
            resume_token: None,
            resume_from: None,
            log_id: None,
        }))
        .await?;
    payee.wait_for(|message| matches!(message, NetworkMessage::UTXOSubscribed(_)).then_some(())).await?;
    let amount = Amount::parse_time("25").context("an amount")?;
    let payment = pay(&demo.genesis, alice, coin, &bob.address, amount)?;
    demo.follow(&mut payer, &alice.name, &payment).await?;
    let incoming = payee.wait_for(|message| match message {
        NetworkMessage::UTXOStateNotification(n) if n.notification.outpoint.txid == payment.txid() => {
            Some(n.notification)
        }
        _ => None,
    });
    let incoming = incoming.await?;
    let text = format!(
        "hears from {}: {} TIME are {}",
        incoming.originator,
        incoming.output.amount,
        incoming.new_state.name()
    );
    demo.say(&bob.name, &text);

    println!("\nA double spend: the same coin once more.\n");
    let again = pay(&demo.genesis, alice, coin, &alice.address, amount)?;
    payer.send(&NetworkMessage::TransactionBroadcast(again.to_raw())).await?;
    let refused = status_of(&mut payer, &again).await?;
    let rejection = refused.rejection.context("the double spend was not rejected")?;
    demo.say(&alice.name, &format!("is told: {:?}: {} ({})", refused.status, rejection.code, rejection.message));

    demo.series(&mut payer, &mut payee, alice, bob, change_of(&payment)?).await?;
    println!(
        "every payment is final by the votes of {} of {} masternodes at least, and durable on each.",
        demo.committee.quorum(),
        devnet.nodes.len()
    );
    Ok(())
}

/// The largest coin that a wallet can spend.
async fn coin_of(client: &mut WalletClient, wallet: &Wallet) -> anyhow::Result<Coin> {
    use time_masternode::net::AddressQuery;
    let query = AddressQuery { addresses: vec![wallet.address.to_string()], after: None, limit: 1000 };
    client.send(&NetworkMessage::AddressQuery(query)).await?;
    let page = client.wait_for(|message| match message {
        NetworkMessage::AddressResponse(page) => Some(page),
        _ => None,
    });
    let unspent = page.await?.utxos.into_iter().filter(|utxo| utxo.state == UTXOState::Unspent);
    let largest = unspent.max_by_key(|utxo| utxo.output.amount).context("the wallet has no coin")?;
    Ok(Coin { outpoint: largest.outpoint, amount: largest.output.amount })
}
