//! Follows addresses: prints each change once, for ever, across lost connections.
//!
//! A change is printed, then the position is saved, then the next is read. So a crash
//! between the two repeats one line and loses none. What is printed is what the node says;
//! whoever acts on a payment verifies its proof (`status`, `proof`).

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use time_masternode::limits::{DIAL_BACKOFF_MAX, DIAL_BACKOFF_MIN, PING_EVERY, SILENCE_TIMEOUT};
use time_masternode::net::{
    BlockNotification, ErrorCode, NetworkMessage, UTXOStateNotificationMessage, UTXOSubscribed, UTXOUnsubscribe,
};
use time_masternode::types::{Address, UTXOState, UtxoEntry};
use tokio::time::{Instant, timeout};

use super::client::{Client, ClientError};
use super::report::{Report, printable, remark, utc};
use super::watch_state::{Beginning, StateError, WatchState};

/// How long the farewell to a node may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why a watch ended or a connection of it did.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The connection, or the node's refusal.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The state file.
    #[error(transparent)]
    State(#[from] StateError),
    /// Standard output.
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
    /// Not even a pong came.
    #[error("the node has been silent for too long")]
    Silent,
    /// An answer that fits nothing.
    #[error("the node neither goes on from where this watch stopped nor resets it")]
    Broken,
}

impl WatchError {
    /// Whether another connection may help.
    fn is_passing(&self) -> bool {
        match self {
            Self::Client(error) if error.is_bad_address() => false,
            Self::Client(ClientError::Refused { code, .. }) => !matches!(
                code,
                ErrorCode::InvalidAddress
                    | ErrorCode::InvalidOutpoint
                    | ErrorCode::NotYourSubscription
                    | ErrorCode::TooLarge
                    | ErrorCode::Malformed
            ),
            Self::Client(_) | Self::Silent | Self::Broken => true,
            Self::State(_) | Self::Output(_) => false,
        }
    }

    /// Whether the node refused the subscription for good.
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Client(error) if error.is_refusal())
    }
}

/// One printed line, for people and for programs.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    text: String,
    json: Value,
}

/// A watch with its state and where it is kept.
pub struct Watch<'a> {
    node: &'a str,
    report: Report,
    state: WatchState,
    file: Option<&'a Path>,
}

impl<'a> Watch<'a> {
    /// Takes up the state in `file`, or begins a new one and saves it before anything is sent.
    pub fn open(
        node: &'a str,
        report: Report,
        addresses: Vec<Address>,
        file: Option<&'a Path>,
    ) -> Result<Self, WatchError> {
        let saved = match file {
            Some(path) => WatchState::load(path, &addresses)?,
            None => None,
        };
        let watch = Self { node, report, state: saved.unwrap_or_else(|| WatchState::new(addresses)), file };
        watch.save()?;
        Ok(watch)
    }

    fn save(&self) -> Result<(), StateError> {
        self.file.map_or(Ok(()), |path| self.state.save(path))
    }

    fn print(&self, lines: &[Line]) -> Result<(), WatchError> {
        for line in lines {
            self.report.result(&line.text, &line.json)?;
        }
        Ok(())
    }

    /// Follows until `stop` is done, which is no error.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), WatchError> {
        tokio::pin!(stop);
        let mut backoff = DIAL_BACKOFF_MIN;
        loop {
            let mut client = None;
            let ended = tokio::select! {
                ended = self.session(&mut client, &mut backoff) => ended,
                () = &mut stop => {
                    self.farewell(client).await;
                    return Ok(());
                }
            };
            let Err(error) = ended else { continue };
            if !error.is_passing() {
                return Err(error);
            }
            remark(&format!("{error}; connecting again in {} ms", backoff.as_millis()));
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = &mut stop => return Ok(()),
            }
            backoff = (backoff * 2).min(DIAL_BACKOFF_MAX);
        }
    }

    /// A watch that keeps no state never comes back, so the node need not remember it.
    async fn farewell(&self, client: Option<Client>) {
        let (None, Some(mut client)) = (self.file, client) else { return };
        let subscriber_id = self.state.subscriber_id().to_owned();
        let message = NetworkMessage::UTXOUnsubscribe(UTXOUnsubscribe { subscriber_id, resume_token: None });
        if !matches!(timeout(FAREWELL, client.send(&message)).await, Ok(Ok(_))) {
            remark("the node was not told that this watch has ended");
        }
    }

    /// One connection, from the subscription to the loss. Cancelling it loses nothing: what
    /// was printed has been saved before the next wait.
    async fn session(&mut self, slot: &mut Option<Client>, backoff: &mut Duration) -> Result<(), WatchError> {
        let client = slot.insert(Client::connect(self.node).await?);
        let name = self.state.subscriber_id().to_owned();
        let wanted = |message| match message {
            NetworkMessage::UTXOSubscribed(answer) if answer.subscriber_id == name => Some(answer),
            _ => None,
        };
        let answer = client.ask(&self.state.request(), wanted).await?;
        let lines = begin(&mut self.state, &answer);
        self.print(&lines.ok_or(WatchError::Broken)?)?;
        self.save()?;
        *backoff = DIAL_BACKOFF_MIN;
        loop {
            match client.next(Instant::now() + PING_EVERY).await? {
                Some(incoming) => {
                    if let NetworkMessage::Error(error) = &incoming.message {
                        remark(&format!("the node says {:?}: {}", error.code, printable(&error.message)));
                    }
                    let before = self.state.position().cloned();
                    let lines = take(&mut self.state, &incoming.message);
                    self.print(&lines)?;
                    if self.state.position() != before.as_ref() {
                        self.save()?;
                    }
                }
                None if client.last_heard().elapsed() > SILENCE_TIMEOUT => return Err(WatchError::Silent),
                None => client.ping().await?,
            }
        }
    }
}

/// What an answer to the subscription says; `None` if it contradicts itself.
fn begin(state: &mut WatchState, answer: &UTXOSubscribed) -> Option<Vec<Line>> {
    let beginning = state.begin(answer);
    let (what, event) = match beginning {
        Beginning::Broken => return None,
        Beginning::Resumed => {
            let sequence = state.position().map_or(answer.sequence, |position| position.sequence);
            remark(&format!("connected; going on after change {sequence}"));
            return Some(Vec::new());
        }
        Beginning::Fresh => ("the coins now are", "Snapshot"),
        Beginning::Reset => ("RESET: the node cannot go on from where this watch stopped; the coins now are", "Reset"),
    };
    let json = json!({"event": event, "sequence": answer.sequence, "log_id": answer.log_id});
    let mut lines = vec![Line { text: format!("{what} (change {})", answer.sequence), json }];
    lines.extend(answer.utxos.iter().map(coin_line));
    Some(lines)
}

/// What a message says that was not said before.
fn take(state: &mut WatchState, message: &NetworkMessage) -> Vec<Line> {
    match message {
        NetworkMessage::UTXOSnapshot(part) if part.subscriber_id == state.subscriber_id() => {
            if !part.more {
                state.snapshot_ends();
            }
            part.utxos.iter().map(coin_line).collect()
        }
        NetworkMessage::UTXOStateNotification(change) if state.advance(change.sequence) => vec![change_line(change)],
        // A block without the wallet's transactions moves the position and says nothing.
        NetworkMessage::BlockNotification(block) if state.advance(block.sequence) && !block.transactions.is_empty() => {
            vec![block_line(block)]
        }
        _ => Vec::new(),
    }
}

fn state_text(state: &UTXOState) -> String {
    state.txid().map_or_else(|| state.name().to_owned(), |by| format!("{} by {by}", state.name()))
}

fn coin_line(coin: &UtxoEntry) -> Line {
    let UtxoEntry { outpoint, output, state } = coin;
    let text = format!("  {outpoint}  {} TIME  {}  {}", output.amount, state_text(state), output.address);
    let json = json!({
        "event": "Coin", "outpoint": outpoint.to_string(), "amount": output.amount,
        "address": output.address, "state": state,
    });
    Line { text, json }
}

fn change_line(change: &UTXOStateNotificationMessage) -> Line {
    let step = &change.notification;
    let old = step.old_state.as_ref().map_or("new", UTXOState::name);
    let text = format!(
        "{}  {}  {} TIME  {old} -> {}  {}",
        utc(step.timestamp),
        step.outpoint,
        step.output.amount,
        state_text(&step.new_state),
        step.output.address,
    );
    let json = json!({
        "event": "Change", "sequence": change.sequence, "timestamp": step.timestamp,
        "outpoint": step.outpoint.to_string(), "amount": step.output.amount, "address": step.output.address,
        "old_state": step.old_state, "state": step.new_state, "originator": step.originator,
    });
    Line { text, json }
}

fn block_line(block: &BlockNotification) -> Line {
    let seconds = i64::try_from(block.timestamp_ms / 1_000).unwrap_or(i64::MAX);
    let txids: Vec<_> = block.transactions.iter().map(ToString::to_string).collect();
    let text = format!("{}  block {}  contains {}", utc(seconds), block.height, txids.join(" "));
    let json = json!({
        "event": "Block", "sequence": block.sequence, "height": block.height, "block_hash": block.block_hash,
        "timestamp_ms": block.timestamp_ms, "transactions": block.transactions,
    });
    Line { text, json }
}

#[cfg(test)]
mod tests {
    use time_masternode::net::{UTXOSnapshot, UTXOStateNotification};
    use time_masternode::types::{Amount, BlockHash, Network, OutPoint, Output, SecretKey, Txid};

    use super::*;

    fn output() -> Output {
        let address = Address::of_key(&SecretKey::from_seed([1; 32]).public_key(), Network::Devnet);
        Output { amount: Amount::from_units(150_000_000).unwrap(), address }
    }

    fn coin(vout: u32) -> UtxoEntry {
        let outpoint = OutPoint { txid: Txid::from_bytes([2; 32]), vout };
        UtxoEntry { outpoint, output: output(), state: UTXOState::Unspent }
    }

    fn change(sequence: u64) -> NetworkMessage {
        let notification = UTXOStateNotification {
            outpoint: coin(0).outpoint,
            output: output(),
            old_state: None,
            new_state: UTXOState::Locked { txid: Txid::from_bytes([3; 32]), locked_at: 1 },
            timestamp: 1_760_000_000,
            originator: "m1\u{1b}[2J".into(),
        };
        NetworkMessage::UTXOStateNotification(UTXOStateNotificationMessage { sequence, notification })
    }

    fn block(sequence: u64, transactions: Vec<Txid>) -> NetworkMessage {
        let block_hash = BlockHash::from_bytes([4; 32]);
        NetworkMessage::BlockNotification(BlockNotification {
            sequence,
            height: 3,
            block_hash,
            timestamp_ms: 1_760_000_000_999,
            transactions,
        })
    }

    fn subscribed(state: &WatchState, sequence: u64, more: bool) -> UTXOSubscribed {
        UTXOSubscribed {
            subscriber_id: state.subscriber_id().into(),
            resume_token: "00".repeat(32),
            log_id: "log".into(),
            sequence,
            reset: false,
            utxos: vec![coin(0)],
            more,
        }
    }

    #[test]
    fn a_snapshot_in_parts_then_each_change_once() {
        let mut state = WatchState::new(vec![output().address]);
        let answer = subscribed(&state, 5, true);
        assert_eq!(begin(&mut state, &answer).unwrap().len(), 2);
        let subscriber_id = state.subscriber_id().to_owned();
        let part = |subscriber_id: &str, more| {
            let utxos = vec![coin(1), coin(2)];
            NetworkMessage::UTXOSnapshot(UTXOSnapshot { subscriber_id: subscriber_id.into(), utxos, more })
        };
        assert!(take(&mut state, &part("another", false)).is_empty());
        assert_eq!(take(&mut state, &part(&subscriber_id, true)).len(), 2);
        assert_eq!(state.position(), None);
        assert_eq!(take(&mut state, &part(&subscriber_id, false)).len(), 2);
        assert_eq!(state.position().map(|p| p.sequence), Some(5));
        assert!(take(&mut state, &change(5)).is_empty());
        assert_eq!(take(&mut state, &change(6)).len(), 1);
        assert!(take(&mut state, &change(6)).is_empty());
    }

    #[test]
    fn a_block_of_others_moves_the_position_silently() {
        let mut state = WatchState::new(vec![output().address]);
        let answer = subscribed(&state, 5, false);
        begin(&mut state, &answer);
        assert!(take(&mut state, &block(6, Vec::new())).is_empty());
        assert_eq!(state.position().map(|p| p.sequence), Some(6));
        let lines = take(&mut state, &block(7, vec![Txid::from_bytes([3; 32])]));
        assert_eq!(lines[0].text, format!("2025-10-09T08:53:20Z  block 3  contains {}", "03".repeat(32)));
    }

    #[test]
    fn a_change_is_one_line() {
        let NetworkMessage::UTXOStateNotification(message) = change(6) else { panic!() };
        let line = change_line(&message);
        let outpoint = format!("{}:0", "02".repeat(32));
        let locked = format!("new -> Locked by {}", "03".repeat(32));
        let text = format!("2025-10-09T08:53:20Z  {outpoint}  1.50000000 TIME  {locked}  {}", output().address);
        assert_eq!(line.text, text);
        assert!(!line.json.to_string().contains('\u{1b}'));
        assert_eq!(line.json["amount"], 150_000_000);
    }
}
