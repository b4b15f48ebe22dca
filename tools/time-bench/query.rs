//! Questions beside the load: the state of one coin, there and back.
//!
//! They have a thread of their own, as they have with wallets: an answer is met when it
//! comes, and not when all that the load was told before it has been read.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use futures_util::SinkExt;
use futures_util::future::try_join_all;
use time_masternode::net::{NetworkMessage, UTXOStateQuery, encode, parse};
use time_masternode::types::OutPoint;
use tokio::sync::oneshot;
use tokio::time::sleep_until;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::load::Sample;
use super::wire::{connect, next_text};

/// Questions that are being asked.
pub struct Queries {
    samples: Arc<Mutex<Vec<Sample>>>,
    end: oneshot::Sender<()>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Queries {
    /// Asks each of these nodes for one of the coins after the other, `rate` times a second in
    /// all and one question at a time. Times are from `began`.
    pub fn begin(addresses: Vec<String>, coins: Vec<OutPoint>, rate: f64, began: Instant) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("starting the runtime of the queries")?;
        let pause = Duration::from_secs_f64(addresses.len() as f64 / rate);
        let samples = Arc::default();
        let (end, ended) = oneshot::channel::<()>();
        let all = Arc::clone(&samples);
        let thread = move || {
            let asks = addresses.iter().map(|address| ask(address, &coins, pause, began, &all));
            runtime.block_on(async {
                tokio::select! {
                    asked = try_join_all(asks) => asked.map(drop),
                    _ = ended => Ok(()),
                }
            })
        };
        let thread = std::thread::Builder::new().name("queries".into()).spawn(thread);
        Ok(Self { samples, end, thread: thread.context("starting the thread of the queries")? })
    }

    /// Stops; gives all that were answered.
    pub fn end(self) -> anyhow::Result<Vec<Sample>> {
        // It may have ended by itself, with an error.
        let _told = self.end.send(()).is_ok();
        self.thread.join().map_err(|_| anyhow!("the thread of the queries panicked"))??;
        Ok(std::mem::take(&mut *self.samples.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

async fn ask(
    address: &str,
    coins: &[OutPoint],
    pause: Duration,
    began: Instant,
    samples: &Mutex<Vec<Sample>>,
) -> anyhow::Result<()> {
    let (mut sink, mut source) = connect(address).await?;
    let now = || u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    let mut next = Instant::now();
    for coin in coins.iter().cycle() {
        sleep_until(next.into()).await;
        // A late answer puts the next question off; it is not made up for.
        next = (next + pause).max(Instant::now());
        let query = NetworkMessage::UTXOStateQuery(UTXOStateQuery { outpoints: vec![coin.to_string()] });
        let text = Utf8Bytes::try_from(encode(&query, None)).context("a message that is no text")?;
        let asked = now();
        sink.send(Message::Text(text)).await.context("asking a node")?;
        let answer = next_text(&mut source).await?;
        let answered = now();
        match parse(answer.as_bytes()).map(|incoming| incoming.message) {
            Ok(NetworkMessage::UTXOStateResponse(response)) if response.states.len() == 1 => {}
            other => bail!("a node answered a query with {other:?}"),
        }
        let sample = Sample { at: answered, latency: answered - asked };
        samples.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
    }
    Ok(())
}
