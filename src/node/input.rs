//! What the ledger thread is asked to do, and the queues that it comes through.

use crossbeam_channel::{Receiver, Sender};
use tokio::sync::oneshot;

use super::door::Place;
use crate::consensus::{Event, Ticket};
use crate::db::{Durable, PruneBatch, Subscription, SubscriptionKey};
use crate::limits::{LEDGER_QUEUE, VERIFY_QUEUE};
use crate::types::{Transaction, Txid, UnixSeconds};

/// What the ledger thread is asked to do.
#[derive(Debug)]
pub(super) enum Input {
    /// Something for the machine.
    Event(Event),
    /// A wallet's transaction with a bad signature: say what is wrong with it.
    Unsigned { transaction: Transaction, ticket: Ticket },
    /// A wallet asks where a transaction stands.
    Query { txid: Txid, ticket: Ticket },
    /// Make, replace or cancel a subscription, if the token fits.
    Subscription(SubscriptionRequest),
    /// Forget what confirmed blocks have made unnecessary, and say when it is done.
    Prune { batch: PruneBatch, done: oneshot::Sender<()> },
    /// Come to an end.
    Stop,
}

/// A change of a durable subscription.
#[derive(Debug)]
pub(super) struct SubscriptionRequest {
    pub(super) key: SubscriptionKey,
    /// The new one; `None` cancels.
    pub(super) subscription: Option<Subscription>,
    /// The hash of the token that the wallet showed, now or when its session began.
    pub(super) token_hash: [u8; 32],
    /// Only if it has not been used since; for housekeeping.
    pub(super) last_used_before: Option<UnixSeconds>,
    /// Told when it is durable, or that the subscription is somebody else's.
    pub(super) done: oneshot::Sender<Durable<Result<SubscriptionDone, NotYours>>>,
}

/// What became of a subscription request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SubscriptionDone {
    /// Whether it existed before.
    pub(super) existed: bool,
    /// The request's place in the order of all of them.
    pub(super) number: u64,
}

/// The token does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotYours;

/// An input with the place that it holds in the queue.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) input: Input,
    pub(super) place: Option<Place>,
}

/// The ledger's queues. What is said of the next block goes first, for its timers run; then
/// whatever members send, so that what is already under way is finished before more is begun.
#[derive(Debug, Clone)]
pub(super) struct Inputs {
    pub(super) agreement: Sender<Work>,
    pub(super) members: Sender<Work>,
    pub(super) wallets: Sender<Work>,
}

/// The other ends.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) agreement: Receiver<Work>,
    pub(super) members: Receiver<Work>,
    pub(super) wallets: Receiver<Work>,
}

/// New queues. What holds a place always has room, for there are fewer of those; what comes by
/// [`UTXOStateManager::tell`] may have to wait for it.
///
/// [`UTXOStateManager::tell`]: super::UTXOStateManager::tell
pub(super) fn queues() -> (Inputs, Queues) {
    let (wallets, from_wallets) = crossbeam_channel::bounded(LEDGER_QUEUE);
    let (members, from_members) = crossbeam_channel::bounded(2 * VERIFY_QUEUE);
    let (agreement, from_agreement) = crossbeam_channel::bounded(VERIFY_QUEUE);
    let inputs = Inputs { agreement, members, wallets };
    (inputs, Queues { agreement: from_agreement, members: from_members, wallets: from_wallets })
}
