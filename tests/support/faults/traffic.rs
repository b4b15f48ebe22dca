//! Wallets that pay without pause, also the same coin twice, through nodes that come and go.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use time_masternode::net::{
    ErrorCode, ErrorMessage, NetworkMessage, TransactionStatusKind, UTXOSubscribe, WalletClient, encode,
};
use time_masternode::types::{Address, SecretKey, Transaction, Txid};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, WeakUnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use super::dice::Dice;
use crate::support::{Coin, DEADLINE, TestNet};

/// What is paid with, what was paid, and the wallets' connections.
pub struct Traffic {
    dice: Dice,
    /// Payments that are under way at most.
    pub most: usize,
    /// One in so many payments spends a coin twice; 0 for none.
    pub contested: u64,
    to: Address,
    free: Vec<Coin>,
    /// The change that comes back with finality.
    under_way: BTreeMap<Txid, Coin>,
    /// How many of these are not waited for.
    stuck: usize,
    /// Every transaction that was ever sent.
    pub bodies: BTreeMap<Txid, Transaction>,
    wallets: Vec<UnboundedSender<Transaction>>,
    news: UnboundedReceiver<(Txid, TransactionStatusKind)>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Traffic {
    /// Splits the first coins into `pieces` each, and begins to pay with them.
    pub async fn begin(net: &TestNet, nodes: usize, pieces: u64, mut dice: Dice) -> Self {
        let to = net.address(&SecretKey::generate());
        let (mut free, mut bodies) = (Vec::new(), BTreeMap::new());
        let coins = net.coins();
        for coin in &coins[..coins.len() / 2] {
            let split = net.split(coin, pieces);
            net.wallet(0).await.pay(&split).await;
            free.extend(TestNet::outputs(&split, &coin.key));
            bodies.insert(split.txid(), split);
        }
        let (tell, news) = unbounded_channel();
        let (mut wallets, mut tasks) = (Vec::new(), Vec::new());
        for node in 0..nodes {
            let (sender, payments) = unbounded_channel();
            let address = net.devnet.nodes[node].websocket_address.clone();
            let subscribe = UTXOSubscribe {
                outpoints: Vec::new(),
                addresses: vec![to.to_string(), net.address(&coins[0].key).to_string()],
                subscriber_id: format!("traffic-{node}"),
                resume_token: Some(format!("{:064x}", node + 1)),
                resume_from: None,
                log_id: None,
            };
            let again = sender.downgrade();
            tasks.push(tokio::spawn(wallet(address, subscribe, payments, again, tell.clone())));
            wallets.push(sender);
        }
        let dice = dice.another();
        Self {
            dice,
            most: 60,
            contested: 8,
            to,
            free,
            under_way: BTreeMap::new(),
            stuck: 0,
            bodies,
            wallets,
            news,
            tasks,
        }
    }

    /// Pays until `done` says so.
    pub async fn run(&mut self, net: &TestNet, mut done: impl FnMut() -> bool) {
        while !done() {
            self.step(net).await;
        }
    }

    /// Pays so many times. There have to be coins enough for those that never come back.
    pub async fn run_times(&mut self, net: &TestNet, payments: usize) {
        let goal = self.bodies.len() + payments;
        let began = Instant::now();
        while self.bodies.len() < goal {
            self.step(net).await;
            assert!(began.elapsed() < DEADLINE, "{} coins are free, none comes back", self.free.len());
        }
    }

    /// Pays once, or waits for news.
    async fn step(&mut self, net: &TestNet) {
        while let Ok((txid, kind)) = self.news.try_recv() {
            self.hear(txid, kind);
        }
        if self.under_way.len() < self.most + self.stuck && !self.free.is_empty() {
            self.pay(net);
            tokio::task::yield_now().await;
            return;
        }
        match tokio::time::timeout(Duration::from_millis(20), self.news.recv()).await {
            Ok(Some((txid, kind))) => self.hear(txid, kind),
            // What has been under way for long may be so for ever: that holds up no others.
            _ => self.stuck = (self.stuck + 1).min(self.under_way.len()),
        }
    }

    fn hear(&mut self, txid: Txid, kind: TransactionStatusKind) {
        if kind.is_final()
            && let Some(change) = self.under_way.remove(&txid)
        {
            self.free.push(change);
            self.stuck = self.stuck.min(self.under_way.len());
        }
    }

    fn pay(&mut self, net: &TestNet) {
        let coin = self.free.swap_remove(self.dice.index(self.free.len()));
        let amount = 1 + self.dice.below(1_000);
        if coin.amount.units() < 2 * net.genesis.min_fee().units() + 2 * amount {
            return;
        }
        let twice = self.contested > 0 && self.wallets.len() > 1 && self.dice.below(self.contested) == 0;
        let node = self.dice.index(self.wallets.len());
        self.send(net, &coin, amount, node);
        if twice {
            let other = node + 1 + self.dice.index(self.wallets.len() - 1);
            self.send(net, &coin, amount + 1, other % self.wallets.len());
        }
    }

    fn send(&mut self, net: &TestNet, coin: &Coin, amount: u64, node: usize) {
        let payment = net.pay(coin, &self.to, amount);
        self.under_way.extend(TestNet::outputs(&payment, &coin.key).pop().map(|change| (payment.txid(), change)));
        self.bodies.insert(payment.txid(), payment.clone());
        assert!(self.wallets[node].send(payment).is_ok(), "a wallet has ended");
    }
}

/// One wallet: sends what it is given, again if the node is busy, tells what it hears, and comes
/// back to its node.
async fn wallet(
    address: String,
    subscribe: UTXOSubscribe,
    mut payments: UnboundedReceiver<Transaction>,
    again: WeakUnboundedSender<Transaction>,
    tell: UnboundedSender<(Txid, TransactionStatusKind)>,
) {
    let mut unanswered = HashMap::new();
    loop {
        let Ok(mut client) = WalletClient::connect(&address).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let mut alive = client.send(&NetworkMessage::UTXOSubscribe(subscribe.clone())).await.is_ok();
        while alive {
            tokio::select! {
                payment = payments.recv() => {
                    let Some(payment) = payment else { return };
                    let txid = payment.txid().to_string();
                    let message = encode(&NetworkMessage::TransactionBroadcast(payment.to_raw()), Some(&txid));
                    alive = client.send_text(String::from_utf8(message.into()).unwrap()).await.is_ok();
                    unanswered.insert(txid, payment);
                }
                message = client.next() => match message {
                    Ok(NetworkMessage::TransactionStatus(status)) => {
                        unanswered.remove(&status.txid.to_string());
                        if tell.send((status.txid, status.status)).is_err() {
                            return;
                        }
                    }
                    Ok(NetworkMessage::Error(ErrorMessage { code: ErrorCode::Busy, request_id: Some(txid), .. })) => {
                        if let Some(payment) = unanswered.remove(&txid) {
                            let again = again.clone();
                            tokio::spawn(async move {
                                tokio::time::sleep(Duration::from_millis(50)).await;
                                // If nobody listens any more it is not needed either.
                                again.upgrade().is_some_and(|again| again.send(payment).is_ok())
                            });
                        }
                    }
                    Ok(_) => {}
                    Err(_) => alive = false,
                }
            }
        }
    }
}
