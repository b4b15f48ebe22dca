//! The wallets' connections: a task that reads and one that writes for each.
//!
//! All tasks share one thread with the load's state machine, so nothing is locked and the
//! measuring takes as little as it can of the cores that it shares with the nodes. A writer
//! takes all that is due and flushes once; a reader handles all that has arrived before the
//! writer has its turn.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use time_masternode::limits::DIAL_TIMEOUT;
use time_masternode::net::ErrorCode;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{sleep_until, timeout};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use super::cli::Pace;
use super::heard::{Heard, HeardError, read};
use super::load::{Load, Micros};

/// Bytes of a message from a node.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// Where messages to a node go.
pub type Sink = SplitSink<WebSocketStream<MaybeTlsStream<TcpStream>>, Message>;
/// Where messages of a node come from.
pub type Source = SplitStream<WebSocketStream<MaybeTlsStream<TcpStream>>>;

/// What the run waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// That so many payments are final; without a number, that none are left to send.
    Finals(Option<usize>),
    /// That nothing is open, and everything final also in a block if that is asked for.
    Settled {
        /// Whether blocks are waited for.
        confirmed: bool,
    },
}

impl Goal {
    fn is_reached(self, load: &Load) -> bool {
        match self {
            Self::Finals(count) => load.exhausted() || count.is_some_and(|count| load.final_count() >= count),
            Self::Settled { confirmed } => load.open() == 0 && (!confirmed || load.all_confirmed()),
        }
    }
}

/// What all tasks of a run share.
pub struct Shared {
    load: RefCell<Load>,
    woken: Vec<Notify>,
    began: Instant,
    goal: Cell<Goal>,
    reached: Notify,
    failure: RefCell<Option<anyhow::Error>>,
    failed: Notify,
}

impl Shared {
    /// The run begins now.
    pub fn new(load: Load, connections: usize) -> Rc<Self> {
        Rc::new(Self {
            load: RefCell::new(load),
            woken: (0..connections).map(|_| Notify::new()).collect(),
            began: Instant::now(),
            goal: Cell::new(Goal::Finals(None)),
            reached: Notify::new(),
            failure: RefCell::new(None),
            failed: Notify::new(),
        })
    }

    /// When the run began.
    pub const fn began(&self) -> Instant {
        self.began
    }

    /// Microseconds since then.
    pub fn now(&self) -> Micros {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Changes the load; wakes the writers that have something to send now.
    pub fn update<T>(&self, change: impl FnOnce(&mut Load, Micros) -> T) -> T {
        let mut load = self.load.borrow_mut();
        let result = change(&mut load, self.now());
        for (connection, woken) in self.woken.iter().enumerate() {
            if load.has_outgoing(connection) {
                woken.notify_one();
            }
        }
        if self.goal.get().is_reached(&load) {
            self.reached.notify_one();
        }
        result
    }

    /// Looks at the load.
    pub fn look<T>(&self, look: impl FnOnce(&Load) -> T) -> T {
        look(&self.load.borrow())
    }

    /// Waits for the goal, or for the first thing that fails.
    pub async fn wait_for(&self, goal: Goal) -> anyhow::Result<()> {
        self.goal.set(goal);
        loop {
            if let Some(failure) = self.failure.borrow_mut().take() {
                return Err(failure);
            }
            if goal.is_reached(&self.load.borrow()) {
                return Ok(());
            }
            tokio::select! {
                () = self.reached.notified() => {}
                () = self.failed.notified() => {}
            }
        }
    }

    /// Runs a task of the run; the first that fails ends the run.
    pub fn spawn(self: &Rc<Self>, task: impl Future<Output = anyhow::Result<()>> + 'static) {
        let shared = Rc::clone(self);
        tokio::task::spawn_local(async move {
            if let Err(error) = task.await {
                shared.failure.borrow_mut().get_or_insert(error);
                shared.failed.notify_one();
            }
        });
    }

    /// Sends what is due over a connection, as it becomes due.
    pub async fn write(self: Rc<Self>, connection: usize, mut sink: Sink) -> anyhow::Result<()> {
        loop {
            self.woken[connection].notified().await;
            while let Some(text) = self.take(connection) {
                sink.feed(Message::Text(text)).await.context("sending a payment")?;
            }
            sink.flush().await.context("sending payments")?;
        }
    }

    fn take(&self, connection: usize) -> Option<Utf8Bytes> {
        let now = self.now();
        self.load.borrow_mut().take(connection, now)
    }

    /// Takes in what comes over a connection that sends payments.
    pub async fn read(self: Rc<Self>, connection: usize, mut source: Source) -> anyhow::Result<()> {
        loop {
            let text = next_text(&mut source).await?;
            match read(&text)? {
                Heard::TransactionStatus(heard) => {
                    self.update(|load, now| load.told(connection, &heard.status(), &text, now));
                }
                Heard::Error(error) => {
                    let index = refused_payment(&error)?;
                    self.update(|load, now| load.busy(connection, index, now));
                }
                other => bail!("a node said what nobody asked for: {other:?}"),
            }
        }
    }

    /// Hands out payments as time passes: those of an open loop, and those that a node had
    /// no room for.
    pub async fn keep_pace(self: Rc<Self>, pace: Pace) -> anyhow::Result<()> {
        let pause = match pace {
            Pace::Open(_) => std::time::Duration::from_millis(1),
            Pace::Closed(_) => std::time::Duration::from_millis(20),
        };
        loop {
            self.update(Load::advance);
            sleep_until((Instant::now() + pause).into()).await;
        }
    }
}

/// The payment that a node had no room for. Any other refusal ends the run.
fn refused_payment(error: &HeardError<'_>) -> anyhow::Result<usize> {
    let index = error.request_id.as_ref().and_then(|id| id.parse().ok());
    match (error.code, index) {
        (ErrorCode::Busy, Some(index)) => Ok(index),
        (code, _) => Err(anyhow!("a node refused: {code:?}: {}", error.message)),
    }
}

/// The next text of a node. Pings are answered by the library.
pub async fn next_text(source: &mut Source) -> anyhow::Result<Utf8Bytes> {
    loop {
        match source.next().await {
            Some(Ok(Message::Text(text))) => return Ok(text),
            Some(Ok(Message::Close(_))) | None => bail!("a node closed the connection"),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error).context("the connection to a node was lost"),
        }
    }
}

/// Connects to a node's wallet port.
pub async fn connect(address: &str) -> anyhow::Result<(Sink, Source)> {
    let config =
        WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE_BYTES)).max_frame_size(Some(MAX_MESSAGE_BYTES));
    let url = format!("ws://{address}");
    let connecting = timeout(DIAL_TIMEOUT, connect_async_with_config(&url, Some(config), true)).await;
    let (stream, _) = connecting.with_context(|| format!("{url} does not answer"))?.context(url)?;
    Ok(stream.split())
}
