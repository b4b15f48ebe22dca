//! Subscribers: each follows one wallet's address on one node and hears of every new output.
//!
//! A connection has many of them. Notifications do not name their subscription, but no two
//! of one connection follow the same address, so the output's address says whose it is.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Context, bail, ensure};
use futures_util::SinkExt;
use time_masternode::net::{NetworkMessage, UTXOSubscribe, UTXOUnsubscribe, encode};
use time_masternode::types::Address;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::heard::{Heard, HeardNotification, read};
use super::load::{Load, Sample};
use super::wire::{Shared, Sink, Source, connect, next_text};

/// Subscriptions of one connection; a node allows twice as many.
const PER_CONNECTION: usize = 512;
/// Requests of one connection that have no answer yet.
const WINDOW: usize = 64;

/// A wallet's address, followed on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    pub wallet: usize,
    pub slot: usize,
    pub address: Address,
    subscriber_id: String,
    resume_token: String,
}

/// Shares subscriptions out: each wallet's on its own node first, then on the next ones.
pub fn subscriptions(count: usize, wallets: &[(usize, Address)], slots: usize) -> Vec<Subscription> {
    let subscription = |index: usize| {
        let wallet = index % wallets.len();
        let (home, address) = wallets[wallet];
        Subscription {
            wallet,
            slot: (home + index / wallets.len()) % slots,
            address,
            subscriber_id: format!("bench-{}", hex::encode(rand::random::<[u8; 16]>())),
            resume_token: hex::encode(rand::random::<[u8; 32]>()),
        }
    };
    (0..count).map(subscription).collect()
}

/// What the subscribers have heard.
#[derive(Debug, Default)]
pub struct Tally {
    /// From the payer's broadcast.
    pub whole: Vec<Sample>,
    /// From the payer's `Finalized` on the same node.
    pub commit: Vec<Sample>,
    /// Notifications of all kinds.
    pub notifications: usize,
    /// Notifications whose number was not above the one before: there should be none.
    pub out_of_order: usize,
    /// New outputs of the run's payments, by wallet and node.
    new_outputs: HashMap<(usize, usize), usize>,
}

impl Tally {
    /// New outputs that subscribers have to be told of and have not been.
    pub fn missing(&self, subscriptions: &[Subscription], load: &Load) -> usize {
        let plan = load.plan();
        let mut expected = vec![0; plan.wallets.len()];
        for (index, planned) in plan.payments.iter().enumerate() {
            if load.is_final(index) {
                expected[planned.payee] += plan.paid;
                expected[planned.payer] += plan.change;
            }
        }
        let heard = |s: &Subscription| self.new_outputs.get(&(s.wallet, s.slot)).copied().unwrap_or(0);
        subscriptions.iter().map(|s| expected[s.wallet].saturating_sub(heard(s))).sum()
    }
}

/// The subscriptions of one connection.
struct Follower {
    by_address: HashMap<String, (Subscription, u64)>,
    /// By connection of a payer: its node.
    slot_of: Rc<Vec<usize>>,
}

/// A connection whose subscriptions have begun.
pub struct Line {
    sink: Sink,
    source: Source,
    subscriptions: Vec<Subscription>,
}

/// Subscribes, so that from here on every change is heard.
pub async fn begin(addresses: &[String], subscriptions: &[Subscription]) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (slot, address) in addresses.iter().enumerate() {
        let here: Vec<Subscription> = subscriptions.iter().filter(|s| s.slot == slot).cloned().collect();
        for share in here.chunks(PER_CONNECTION) {
            let (mut sink, mut source) = connect(address).await?;
            let request = |s: &Subscription| {
                NetworkMessage::UTXOSubscribe(UTXOSubscribe {
                    outpoints: Vec::new(),
                    addresses: vec![s.address.to_string()],
                    subscriber_id: s.subscriber_id.clone(),
                    resume_token: Some(s.resume_token.clone()),
                    resume_from: None,
                    log_id: None,
                })
            };
            for window in share.chunks(WINDOW) {
                send_all(&mut sink, window.iter().map(request)).await?;
                answers(&mut source, window.len(), |heard| matches!(heard, Heard::UTXOSubscribed(_))).await?;
            }
            lines.push(Line { sink, source, subscriptions: share.to_vec() });
        }
    }
    Ok(lines)
}

async fn send_all(sink: &mut Sink, messages: impl Iterator<Item = NetworkMessage>) -> anyhow::Result<()> {
    for message in messages {
        let text = Utf8Bytes::try_from(encode(&message, None)).context("a message that is no text")?;
        sink.feed(Message::Text(text)).await.context("sending to a node")?;
    }
    sink.flush().await.context("sending to a node")
}

/// Waits for so many answers; what else comes in between is passed over.
async fn answers(source: &mut Source, count: usize, is_answer: impl Fn(&Heard<'_>) -> bool) -> anyhow::Result<()> {
    let mut answered = 0;
    while answered < count {
        let text = next_text(source).await?;
        let heard = read(&text)?;
        if let Heard::Error(error) = &heard {
            bail!("a node refused a subscription: {:?}: {}", error.code, error.message);
        }
        answered += usize::from(is_answer(&heard));
    }
    Ok(())
}

/// Listens on a connection until the run is over.
pub async fn follow(
    shared: Rc<Shared>,
    tally: Rc<RefCell<Tally>>,
    slot_of: Rc<Vec<usize>>,
    line: Line,
) -> anyhow::Result<()> {
    let Line { sink: _open, mut source, subscriptions } = line;
    let by_address = subscriptions.into_iter().map(|s| (s.address.to_string(), (s, 0))).collect();
    let mut follower = Follower { by_address, slot_of };
    loop {
        let text = next_text(&mut source).await?;
        match read(&text)? {
            Heard::UTXOStateNotification(heard) => {
                let now = shared.now();
                shared.look(|load| follower.hear(&heard, load, now, &mut tally.borrow_mut()))?;
            }
            Heard::BlockNotification(_) => tally.borrow_mut().notifications += 1,
            Heard::UTXOSnapshot(_) => {}
            other => bail!("a node said what no subscriber asked for: {other:?}"),
        }
    }
}

impl Follower {
    fn hear(&mut self, heard: &HeardNotification<'_>, load: &Load, now: u64, tally: &mut Tally) -> anyhow::Result<()> {
        let step = &heard.notification;
        let subscription = self.by_address.get_mut(&*step.output.address);
        let (subscription, sequence) = subscription.context("a notification about an address that nobody follows")?;
        tally.notifications += 1;
        tally.out_of_order += usize::from(heard.sequence <= *sequence);
        *sequence = heard.sequence;
        let times = load.times_of(&step.outpoint.txid).filter(|_| step.old_state.is_none());
        let Some((index, began, finalised)) = times else { return Ok(()) };
        *tally.new_outputs.entry((subscription.wallet, subscription.slot)).or_default() += 1;
        let plan = load.plan();
        if index < plan.uncontested {
            tally.whole.push(Sample { at: now, latency: now.saturating_sub(began) });
            if self.slot_of[plan.payments[index].connection] == subscription.slot {
                tally.commit.push(Sample { at: now, latency: finalised.map_or(0, |told| now.saturating_sub(told)) });
            }
        }
        Ok(())
    }
}

/// Cancels subscriptions, so that a network that goes on does not remember them.
pub async fn cancel(addresses: &[String], subscriptions: &[Subscription]) -> anyhow::Result<()> {
    for (slot, address) in addresses.iter().enumerate() {
        let here: Vec<&Subscription> = subscriptions.iter().filter(|s| s.slot == slot).collect();
        if here.is_empty() {
            continue;
        }
        let (mut sink, mut source) = connect(address).await?;
        for window in here.chunks(WINDOW) {
            let request = |s: &&Subscription| {
                let (subscriber_id, resume_token) = (s.subscriber_id.clone(), Some(s.resume_token.clone()));
                NetworkMessage::UTXOUnsubscribe(UTXOUnsubscribe { subscriber_id, resume_token })
            };
            send_all(&mut sink, window.iter().map(request)).await?;
            answers(&mut source, window.len(), |heard| matches!(heard, Heard::UTXOUnsubscribed(_))).await?;
        }
        ensure!(sink.close().await.is_ok(), "a node broke the connection off");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use time_masternode::types::{Network, SecretKey};

    use super::*;

    #[test]
    fn each_address_is_followed_at_home_first_and_once_on_each_node() {
        let address = |seed: u8| Address::of_key(&SecretKey::from_seed([seed; 32]).public_key(), Network::Devnet);
        let wallets: Vec<(usize, Address)> =
            (0..6).map(|wallet: u8| (usize::from(wallet % 3), address(wallet))).collect();
        let all = subscriptions(18, &wallets, 3);
        assert!(all[..6].iter().all(|s| s.slot == s.wallet % 3));
        let places: BTreeSet<(usize, usize)> = all.iter().map(|s| (s.wallet, s.slot)).collect();
        assert_eq!(places.len(), 18);
    }
}
