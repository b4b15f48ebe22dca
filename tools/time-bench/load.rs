//! Which payment is sent when, and what its wallet has been told of it.
//!
//! A state machine without I/O: time is an argument, in microseconds since the load began.
//! It counts only what was said on the connection that sent the payment, and each word
//! once. Uncontested payments keep the pace; pairs of contradicting ones go out beside them
//! and take no place in flight, for what becomes of them may take a few blocks.

use std::collections::{BTreeMap, HashMap, VecDeque};

use time_masternode::net::TransactionStatusKind;
use time_masternode::types::Txid;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::cli::{LoadSettings, OnBusy, Pace};
use super::plan::Plan;

/// Microseconds since the load began.
pub type Micros = u64;

/// How long a wallet waits before it sends again what a node was too busy for.
const BUSY_PAUSE: Micros = 50_000;
/// One proof in so many is kept, to be verified after the run.
const PROOF_EVERY: usize = 32;
/// Proofs that are kept at most.
const MAX_PROOFS: usize = 1_000;

/// The code of a rejection for lack of room.
const BUSY: &str = "Busy";

/// What a wallet knows of its payment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Not sent yet.
    #[default]
    Planned,
    /// Sent, and not settled.
    Open,
    /// The node had no room; it will be sent again.
    Postponed,
    /// The node had no room, and that was it.
    Dropped,
    Rejected,
    Aborted,
    Final,
    Confirmed,
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    state: State,
    /// Whether the wallet was told `Pending`.
    accepted: bool,
    /// When its clock started.
    began: Micros,
    finalised: Micros,
}

/// A moment and how long after its payment's beginning it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    pub at: Micros,
    pub latency: Micros,
}

/// What has been said and done.
#[derive(Debug, Default)]
pub struct Counts {
    /// Payments that were sent; sending again does not count.
    pub sent: usize,
    pub resent: usize,
    /// Answers that a node is busy.
    pub busy: usize,
    pub dropped: usize,
    pub finalised: usize,
    pub confirmed: usize,
    pub aborted: usize,
    /// Refusals but for `Busy`, of contested payments.
    pub rejected_contested: BTreeMap<String, usize>,
    /// The same of payments that nobody contradicts: there should be none.
    pub rejected: BTreeMap<String, usize>,
    /// Uncontested payments that were aborted: there should be none.
    pub aborted_uncontested: usize,
    /// Final statuses that came without a proof: there should be none.
    pub unproved: usize,
    /// Open loop: payments that were due when no wallet had one ready.
    pub withheld: usize,
}

/// A status as far as it matters here.
pub struct Status<'a> {
    pub txid: Txid,
    pub kind: TransactionStatusKind,
    /// The code of its rejection.
    pub code: Option<&'a str>,
    pub proved: bool,
}

/// The state of a run.
pub struct Load {
    plan: Plan,
    pace: Pace,
    on_busy: OnBusy,
    pairs_per_payment: f64,
    entries: Vec<Entry>,
    by_txid: HashMap<Txid, usize>,
    /// By connection: what goes out next.
    queues: Vec<VecDeque<usize>>,
    /// Payments that wait until their node may have room again, in order of time.
    postponed: VecDeque<(Micros, usize)>,
    /// Independent payments: the next one. Chains: the next one of each that is ready.
    next: usize,
    ready: VecDeque<usize>,
    next_pair: usize,
    pairs_due: f64,
    /// Uncontested payments that were handed out and are not settled.
    in_flight: usize,
    handed_out: usize,
    stopped: bool,
    exhausted: bool,
    open: usize,
    counts: Counts,
    accepted: Vec<Sample>,
    finalised: Vec<Sample>,
    finalised_contested: Vec<Sample>,
    confirmed: Vec<Sample>,
    proofs: Vec<String>,
}

impl Load {
    /// A load that has not begun.
    pub fn new(plan: Plan, settings: &LoadSettings, connections: usize) -> Self {
        let by_txid = plan.payments.iter().enumerate().map(|(index, planned)| (planned.txid, index)).collect();
        let ready = if plan.chain > 0 { (0..plan.uncontested).step_by(plan.chain).collect() } else { VecDeque::new() };
        let payments = plan.payments.len();
        Self {
            pace: settings.pace,
            on_busy: settings.on_busy,
            pairs_per_payment: settings.pairs_per_payment,
            entries: vec![Entry::default(); payments],
            by_txid,
            queues: vec![VecDeque::new(); connections],
            postponed: VecDeque::new(),
            next: 0,
            ready,
            next_pair: plan.uncontested,
            pairs_due: 0.0,
            in_flight: 0,
            handed_out: 0,
            stopped: false,
            exhausted: false,
            open: 0,
            counts: Counts::default(),
            // Room from the start, so that growing does not disturb the run.
            accepted: Vec::with_capacity(payments),
            finalised: Vec::with_capacity(payments),
            finalised_contested: Vec::new(),
            confirmed: Vec::with_capacity(payments),
            proofs: Vec::new(),
            plan,
        }
    }

    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    pub const fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Whether there was nothing left to send before it was stopped.
    pub const fn exhausted(&self) -> bool {
        self.exhausted
    }

    /// Payments that were sent and of which nothing is settled.
    pub const fn open(&self) -> usize {
        self.open
    }

    /// Final payments, contested ones among them.
    pub const fn final_count(&self) -> usize {
        self.counts.finalised
    }

    /// Whether every final payment is in a block, as far as the wallets know.
    pub const fn all_confirmed(&self) -> bool {
        self.counts.confirmed == self.counts.finalised
    }

    /// From when on uncontested payments took how long to be `Pending`, `Finalized` and
    /// `Confirmed`; and contested ones to be `Finalized`.
    pub fn samples(&self) -> (&[Sample], &[Sample], &[Sample], &[Sample]) {
        (&self.accepted, &self.finalised, &self.confirmed, &self.finalised_contested)
    }

    /// Statuses with proofs, as they came.
    pub fn proofs(&self) -> &[String] {
        &self.proofs
    }

    /// When a payment was sent, and when its wallet was told that it is final.
    pub fn times_of(&self, txid: &Txid) -> Option<(usize, Micros, Option<Micros>)> {
        let index = *self.by_txid.get(txid)?;
        let entry = self.entries[index];
        let is_final = matches!(entry.state, State::Final | State::Confirmed);
        Some((index, entry.began, is_final.then_some(entry.finalised)))
    }

    /// Whether a payment's wallet was told that it is final.
    pub fn is_final(&self, index: usize) -> bool {
        matches!(self.entries[index].state, State::Final | State::Confirmed)
    }

    /// Whether anything waits to go out over this connection.
    pub fn has_outgoing(&self, connection: usize) -> bool {
        !self.queues[connection].is_empty()
    }

    /// Nothing new is begun any more.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Hands out what is due now.
    pub fn advance(&mut self, now: Micros) {
        while self.postponed.front().is_some_and(|(due, _)| *due <= now) {
            let Some((_, index)) = self.postponed.pop_front() else { break };
            self.queues[self.plan.payments[index].connection].push_back(index);
        }
        match self.pace {
            Pace::Closed(most) => while self.in_flight < most && self.hand_out(None) {},
            Pace::Open(rate) => loop {
                let due = (self.handed_out + self.counts.withheld) as f64 * 1e6 / rate;
                if due > now as f64 || self.stopped || self.exhausted {
                    break;
                }
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and now")]
                if !self.hand_out(Some(due as Micros)) && !self.exhausted {
                    self.counts.withheld += 1;
                }
            },
        }
    }

    fn hand_out(&mut self, due: Option<Micros>) -> bool {
        if self.stopped {
            return false;
        }
        let next = if self.plan.chain > 0 {
            // With room in flight some chain is free, unless it has come to its end. The open
            // loop does not wait for chains, and ends with the last of them.
            let closed = matches!(self.pace, Pace::Closed(_));
            self.exhausted |= self.ready.is_empty() && (closed || self.in_flight == 0);
            self.ready.pop_front()
        } else {
            self.exhausted |= self.next >= self.plan.uncontested;
            (self.next < self.plan.uncontested).then(|| {
                self.next += 1;
                self.next - 1
            })
        };
        let Some(index) = next else { return false };
        self.in_flight += 1;
        self.handed_out += 1;
        self.enqueue(index, due);
        self.pairs_due += self.pairs_per_payment;
        while self.pairs_due >= 1.0 && self.next_pair + 1 < self.plan.payments.len() {
            self.pairs_due -= 1.0;
            self.enqueue(self.next_pair, due);
            self.enqueue(self.next_pair + 1, due);
            self.next_pair += 2;
        }
        true
    }

    fn enqueue(&mut self, index: usize, due: Option<Micros>) {
        self.open += 1;
        self.entries[index].began = due.unwrap_or_default();
        self.queues[self.plan.payments[index].connection].push_back(index);
    }

    /// The next message for a connection; the caller sends it now.
    pub fn take(&mut self, connection: usize, now: Micros) -> Option<Utf8Bytes> {
        let index = self.queues[connection].pop_front()?;
        let entry = &mut self.entries[index];
        if entry.state == State::Planned {
            self.counts.sent += 1;
            if matches!(self.pace, Pace::Closed(_)) {
                entry.began = now;
            }
        } else {
            self.counts.resent += 1;
        }
        entry.state = State::Open;
        Some(self.plan.payments[index].message.clone())
    }

    /// A connection was told something about one of its payments. `text` is the message.
    pub fn told(&mut self, connection: usize, status: &Status<'_>, text: &str, now: Micros) {
        let Some(&index) = self.by_txid.get(&status.txid) else { return };
        if self.plan.payments[index].connection != connection {
            return;
        }
        match status.kind {
            TransactionStatusKind::Pending => {
                let entry = &mut self.entries[index];
                if !std::mem::replace(&mut entry.accepted, true) && index < self.plan.uncontested {
                    self.accepted.push(Sample { at: now, latency: now.saturating_sub(entry.began) });
                }
            }
            TransactionStatusKind::Finalized | TransactionStatusKind::Confirmed if !status.proved => {
                self.counts.unproved += 1;
            }
            TransactionStatusKind::Finalized => self.is_now_final(index, text, now),
            TransactionStatusKind::Confirmed => {
                self.is_now_final(index, text, now);
                let entry = &mut self.entries[index];
                if entry.state == State::Final {
                    entry.state = State::Confirmed;
                    self.counts.confirmed += 1;
                    if index < self.plan.uncontested {
                        self.confirmed.push(Sample { at: now, latency: now.saturating_sub(entry.began) });
                    }
                }
            }
            TransactionStatusKind::Rejected if status.code == Some(BUSY) => self.busy(connection, index, now),
            TransactionStatusKind::Rejected => {
                let contested = index >= self.plan.uncontested;
                if self.settle(index, State::Rejected) {
                    let counts = &mut self.counts;
                    let by_code = if contested { &mut counts.rejected_contested } else { &mut counts.rejected };
                    *by_code.entry(status.code.unwrap_or_default().to_owned()).or_default() += 1;
                }
            }
            TransactionStatusKind::Aborted => {
                if self.settle(index, State::Aborted) {
                    self.counts.aborted += 1;
                    self.counts.aborted_uncontested += usize::from(index < self.plan.uncontested);
                }
            }
            TransactionStatusKind::Unknown => {}
        }
        self.advance(now);
    }

    fn is_now_final(&mut self, index: usize, text: &str, now: Micros) {
        if !self.settle(index, State::Final) {
            return;
        }
        let entry = &mut self.entries[index];
        entry.finalised = now;
        let sample = Sample { at: now, latency: now.saturating_sub(entry.began) };
        let samples = if index < self.plan.uncontested { &mut self.finalised } else { &mut self.finalised_contested };
        samples.push(sample);
        if self.counts.finalised.is_multiple_of(PROOF_EVERY) && self.proofs.len() < MAX_PROOFS {
            self.proofs.push(text.to_owned());
        }
        self.counts.finalised += 1;
    }

    /// A node had no room for a payment of this connection.
    pub fn busy(&mut self, connection: usize, index: usize, now: Micros) {
        let Some(planned) = self.plan.payments.get(index) else { return };
        if planned.connection != connection || self.entries[index].state != State::Open {
            return;
        }
        self.counts.busy += 1;
        match self.on_busy {
            OnBusy::Resend => {
                self.entries[index].state = State::Postponed;
                self.postponed.push_back((now + BUSY_PAUSE, index));
            }
            OnBusy::Drop => {
                if self.settle(index, State::Dropped) {
                    self.counts.dropped += 1;
                }
            }
        }
        self.advance(now);
    }

    /// Settles an open payment; `false` if it is not open. A chain goes on with its next
    /// payment once the last one is final, and ends where that never will be.
    fn settle(&mut self, index: usize, state: State) -> bool {
        let entry = &mut self.entries[index];
        if !matches!(entry.state, State::Open | State::Postponed) {
            return false;
        }
        entry.state = state;
        self.open -= 1;
        if index < self.plan.uncontested {
            self.in_flight -= 1;
            let chain = self.plan.chain;
            if chain > 0 && state == State::Final && !(index + 1).is_multiple_of(chain) {
                self.ready.push_back(index + 1);
            }
        }
        true
    }

    /// What became of the pairs: how many have two, one and no final payment, and how many
    /// are open.
    pub fn pairs(&self) -> [usize; 4] {
        let mut outcomes = [0; 4];
        for pair in self.entries[self.plan.uncontested..self.next_pair].chunks(2) {
            let finals = pair.iter().filter(|entry| matches!(entry.state, State::Final | State::Confirmed)).count();
            let open = pair.iter().any(|entry| matches!(entry.state, State::Planned | State::Open | State::Postponed));
            let outcome = match finals {
                0 if open => 3,
                finals => 2 - finals.min(2),
            };
            outcomes[outcome] += 1;
        }
        outcomes
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::cli::Cli;
    use super::super::plan::Planned;
    use super::*;

    /// A plan without real transactions: the machine looks at txids only.
    fn load(arguments: &[&str], chains: usize) -> Load {
        let all = std::iter::once(&"time-bench").chain(arguments);
        let settings = Cli::try_parse_from(all).unwrap().load.settings(1).unwrap();
        let planned = |index: usize| Planned {
            txid: txid(index),
            message: Utf8Bytes::from(index.to_string()),
            connection: index % 2,
            payer: 0,
            payee: 0,
        };
        let uncontested = settings.payments;
        let payments = (0..uncontested + 2 * settings.pairs).map(planned).collect();
        let chain = uncontested.checked_div(chains).unwrap_or(0);
        let plan = Plan { wallets: Vec::new(), payments, uncontested, chain, paid: 1, change: 1, coins: Vec::new() };
        Load::new(plan, &settings, 2)
    }

    fn txid(index: usize) -> Txid {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&(index as u64).to_le_bytes());
        Txid::from_bytes(bytes)
    }

    /// What goes out over both connections, in order.
    fn sent(load: &mut Load, now: Micros) -> Vec<usize> {
        let mut all = Vec::new();
        for connection in 0..2 {
            while let Some(text) = load.take(connection, now) {
                all.push(text.as_str().parse().unwrap());
            }
        }
        all.sort_unstable();
        all
    }

    fn tell(load: &mut Load, index: usize, kind: TransactionStatusKind, now: Micros) {
        let status = Status { txid: txid(index), kind, code: None, proved: true };
        load.told(index % 2, &status, "proof", now);
    }

    fn reject(load: &mut Load, index: usize, code: &str, now: Micros) {
        let kind = TransactionStatusKind::Rejected;
        load.told(index % 2, &Status { txid: txid(index), kind, code: Some(code), proved: false }, "", now);
    }

    #[test]
    fn a_closed_loop_keeps_so_many_in_flight_and_counts_each_word_once() {
        let mut load = load(&["--count", "10", "--in-flight", "3"], 0);
        load.advance(0);
        assert_eq!(sent(&mut load, 5), [0, 1, 2]);
        tell(&mut load, 1, TransactionStatusKind::Pending, 7);
        assert!(sent(&mut load, 8).is_empty(), "pending is not settled");
        tell(&mut load, 1, TransactionStatusKind::Finalized, 9);
        tell(&mut load, 1, TransactionStatusKind::Finalized, 10);
        assert_eq!(sent(&mut load, 10), [3]);
        tell(&mut load, 1, TransactionStatusKind::Confirmed, 25);
        tell(&mut load, 0, TransactionStatusKind::Confirmed, 30);
        assert_eq!(sent(&mut load, 30), [4], "in a block without the word before is final too");
        let (accepted, finalised, confirmed, _) = load.samples();
        assert_eq!(accepted, [Sample { at: 7, latency: 2 }]);
        assert_eq!(finalised, [Sample { at: 9, latency: 4 }, Sample { at: 30, latency: 25 }]);
        assert_eq!(confirmed, [Sample { at: 25, latency: 20 }, Sample { at: 30, latency: 25 }]);
        assert_eq!((load.counts().finalised, load.counts().confirmed, load.open()), (2, 2, 3));
    }

    #[test]
    fn what_another_connection_or_nobody_proved_is_not_counted() {
        let mut load = load(&["--count", "10", "--in-flight", "2"], 0);
        load.advance(0);
        sent(&mut load, 1);
        let kind = TransactionStatusKind::Finalized;
        load.told(1, &Status { txid: txid(0), kind, code: None, proved: true }, "", 2);
        load.told(0, &Status { txid: txid(0), kind, code: None, proved: false }, "", 3);
        load.told(0, &Status { txid: txid(999), kind, code: None, proved: true }, "", 4);
        assert_eq!((load.final_count(), load.counts().unproved, load.open()), (0, 1, 2));
    }

    #[test]
    fn a_chain_waits_for_its_last_payment_and_ends_where_one_is_refused() {
        // Two chains of three.
        let mut load = load(&["--count", "4", "--in-flight", "2", "--chained"], 2);
        load.advance(0);
        assert_eq!(sent(&mut load, 1), [0, 3]);
        tell(&mut load, 3, TransactionStatusKind::Finalized, 2);
        assert_eq!(sent(&mut load, 3), [4]);
        assert!(!load.exhausted());
        reject(&mut load, 0, "UnknownInput", 4);
        assert!(sent(&mut load, 5).is_empty());
        assert!(load.exhausted(), "the first chain has ended, so two in flight are no more");
        assert_eq!(load.counts().rejected, BTreeMap::from([("UnknownInput".into(), 1)]));
    }

    #[test]
    fn an_open_loop_sends_what_is_due_and_counts_from_then() {
        let mut load = load(&["--rate", "1000", "--duration", "1", "--warm-up", "0"], 0);
        load.advance(0);
        assert_eq!(sent(&mut load, 0), [0]);
        load.advance(3_500);
        assert_eq!(sent(&mut load, 3_600), [1, 2, 3]);
        tell(&mut load, 1, TransactionStatusKind::Finalized, 5_000);
        assert_eq!(load.samples().1, [Sample { at: 5_000, latency: 4_000 }]);
        load.advance(10_000_000);
        assert_eq!(sent(&mut load, 10_000_000).len(), 996);
        assert!(load.exhausted());
    }

    #[test]
    fn an_open_loop_of_chains_withholds_what_no_wallet_has() {
        let mut load = load(&["--rate", "1000", "--duration", "0.006", "--warm-up", "0", "--chained"], 2);
        load.advance(3_500);
        let chain = load.plan().chain;
        assert_eq!(sent(&mut load, 3_500), [0, chain]);
        assert_eq!((load.counts().withheld, load.exhausted()), (2, false));
    }

    #[test]
    fn what_a_node_is_too_busy_for_is_sent_again_or_dropped() {
        let mut load_again = load(&["--count", "10", "--in-flight", "2"], 0);
        load_again.advance(0);
        assert_eq!(sent(&mut load_again, 0), [0, 1]);
        reject(&mut load_again, 0, BUSY, 10);
        load_again.busy(1, 1, 20);
        load_again.busy(0, 1, 20);
        load_again.busy(0, 77_777, 20);
        assert!(sent(&mut load_again, 30).is_empty());
        load_again.advance(10 + BUSY_PAUSE);
        assert_eq!(sent(&mut load_again, 10 + BUSY_PAUSE), [0]);
        tell(&mut load_again, 0, TransactionStatusKind::Finalized, 100_000);
        assert_eq!(load_again.samples().1, [Sample { at: 100_000, latency: 100_000 }], "from the first attempt");
        assert_eq!(sent(&mut load_again, 100_000), [1, 2]);
        let counts = load_again.counts();
        assert_eq!((counts.busy, counts.resent, counts.dropped), (2, 2, 0));

        let mut load = load(&["--count", "10", "--in-flight", "2", "--on-busy", "drop"], 0);
        load.advance(0);
        sent(&mut load, 0);
        load.busy(0, 0, 1);
        assert_eq!((load.counts().dropped, load.counts().sent, load.open()), (1, 2, 2), "another one takes its place");
    }

    #[test]
    fn pairs_go_out_beside_the_load_and_are_judged_together() {
        let mut load = load(&["--count", "6", "--in-flight", "2", "--conflicts", "0.5"], 0);
        let first = load.plan().uncontested;
        load.advance(0);
        assert_eq!(sent(&mut load, 0), [0, 1, first, first + 1], "two payments, and a pair for each two");
        tell(&mut load, first, TransactionStatusKind::Finalized, 5);
        reject(&mut load, first + 1, "InputLocked", 6);
        assert!(sent(&mut load, 7).is_empty(), "they take no place in flight");
        tell(&mut load, 0, TransactionStatusKind::Finalized, 8);
        tell(&mut load, 1, TransactionStatusKind::Finalized, 8);
        assert_eq!(sent(&mut load, 9), [2, 3, first + 2, first + 3]);
        assert_eq!(load.pairs(), [0, 1, 0, 1]);
        tell(&mut load, first + 2, TransactionStatusKind::Aborted, 9);
        tell(&mut load, first + 3, TransactionStatusKind::Aborted, 9);
        assert_eq!(load.pairs(), [0, 1, 1, 0]);
        let (_, finalised, _, contested) = load.samples();
        assert_eq!((finalised.len(), contested.len(), load.final_count()), (2, 1, 3));
        assert_eq!((load.counts().aborted, load.counts().aborted_uncontested), (2, 0));
        tell(&mut load, 2, TransactionStatusKind::Finalized, 10);
        tell(&mut load, 3, TransactionStatusKind::Finalized, 10);
        let pair = sent(&mut load, 10);
        let (a, b) = (pair[2], pair[3]);
        tell(&mut load, a, TransactionStatusKind::Finalized, 11);
        tell(&mut load, b, TransactionStatusKind::Finalized, 12);
        assert_eq!(load.pairs(), [1, 1, 1, 0], "both final: the promise is broken");
    }
}
