//! Questions beside the load: the state of one coin, there and back.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::SinkExt;
use time_masternode::net::{NetworkMessage, UTXOStateQuery, encode, parse};
use time_masternode::types::OutPoint;
use tokio::time::sleep_until;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::load::Sample;
use super::wire::{Shared, connect, next_text};

/// Asks one node for one of the run's coins after the other, `rate` times a second and one
/// question at a time.
pub async fn ask(
    shared: Rc<Shared>,
    address: String,
    rate: f64,
    samples: Rc<RefCell<Vec<Sample>>>,
) -> anyhow::Result<()> {
    let (mut sink, mut source) = connect(&address).await?;
    let pause = Duration::from_secs_f64(1.0 / rate);
    let coins: Vec<OutPoint> = shared.look(|load| load.plan().coins.clone());
    let mut next = Instant::now();
    for coin in coins.iter().cycle() {
        sleep_until(next.into()).await;
        // A late answer puts the next question off; it is not made up for.
        next = (next + pause).max(Instant::now());
        let query = NetworkMessage::UTXOStateQuery(UTXOStateQuery { outpoints: vec![coin.to_string()] });
        let text = Utf8Bytes::try_from(encode(&query, None)).context("a message that is no text")?;
        let asked = shared.now();
        sink.send(Message::Text(text)).await.context("asking a node")?;
        let answer = next_text(&mut source).await?;
        let now = shared.now();
        match parse(answer.as_bytes()).map(|incoming| incoming.message) {
            Ok(NetworkMessage::UTXOStateResponse(response)) if response.states.len() == 1 => {}
            other => bail!("a node answered a query with {other:?}"),
        }
        samples.borrow_mut().push(Sample { at: now, latency: now - asked });
    }
    Ok(())
}
