//! The payments of a run, signed and encoded before the clock starts.
//!
//! Wallets are spread evenly over the nodes that are loaded, and each pays another one of
//! its own node, so that payer and payee hear of a payment by the same commit of the same
//! node. The pairs of contradicting payments come behind the uncontested payments and have
//! coins of their own: what becomes of them disturbs nobody's chain. No I/O.

use time_masternode::net::{NetworkMessage, encode};
use time_masternode::types::{Address, Amount, Genesis, OutPoint, Output, SecretKey, Txid};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::cli::LoadSettings;
use super::funding::sign;

/// What is paid with each output that is no change, in base units.
const PAYMENT: u64 = 1_000;

/// Somebody who pays.
pub struct Wallet {
    pub key: SecretKey,
    pub address: Address,
    /// Which of the loaded nodes it uses.
    pub slot: usize,
    /// Over which of all connections.
    pub connection: usize,
}

/// A payment, ready to be sent.
pub struct Planned {
    pub txid: Txid,
    pub message: Utf8Bytes,
    pub connection: usize,
    pub payer: usize,
    pub payee: usize,
}

/// What a run consists of.
pub struct Plan {
    pub wallets: Vec<Wallet>,
    /// The uncontested ones, then the pairs.
    pub payments: Vec<Planned>,
    pub uncontested: usize,
    /// Uncontested payments of one chain, which stand one after the other; 0 without chains.
    pub chain: usize,
    /// Outputs of each payment that go to the payee, and back to the payer.
    pub paid: usize,
    pub change: usize,
    /// The coins that were made for the run.
    pub coins: Vec<OutPoint>,
}

/// What a plan is made from; says which coins it needs.
pub struct Planner<'a> {
    genesis: &'a Genesis,
    settings: &'a LoadSettings,
    wallets: Vec<Wallet>,
    slots: usize,
    /// Payments of one chain; 1 without chains.
    chain: usize,
    timestamp: i64,
}

impl<'a> Planner<'a> {
    /// A plan for a load on `slots` nodes. Each run has new wallets, so that none disturbs
    /// another; their coins are play money, and no more than the run needs.
    pub fn new(genesis: &'a Genesis, settings: &'a LoadSettings, slots: usize, timestamp: i64) -> Self {
        let wallet = |index: usize| {
            let key = SecretKey::generate();
            let address = Address::of_key(&key.public_key(), genesis.network());
            let slot = index % slots;
            let connection = slot * settings.connections + index / slots % settings.connections;
            Wallet { key, address, slot, connection }
        };
        let wallets: Vec<Wallet> = (0..settings.wallets).map(wallet).collect();
        let chain = if settings.chained { settings.payments.div_ceil(wallets.len()) } else { 1 };
        Self { genesis, settings, wallets, slots, chain, timestamp }
    }

    /// Outputs that come back to the payer.
    fn change(&self) -> usize {
        if self.settings.chained { self.settings.inputs } else { usize::from(self.settings.outputs > 1) }
    }

    /// What each payment takes out of its wallet.
    fn spent(&self) -> u64 {
        (self.settings.outputs - self.change()) as u64 * PAYMENT + self.genesis.min_fee().units()
    }

    /// Chains, or payments where there are none.
    fn series(&self) -> usize {
        if self.settings.chained { self.wallets.len() } else { self.settings.payments }
    }

    /// Units of each coin of a series of so many payments.
    fn coin_of(&self, payments: usize) -> u64 {
        let inputs = self.settings.inputs as u64;
        // What is left at the end is an output for each piece of change.
        let left = self.change() as u64 * PAYMENT;
        (payments as u64 * self.spent() + left).div_ceil(inputs).max(1)
    }

    /// The coins that the plan needs, in order.
    pub fn leaves(&self) -> Vec<Output> {
        let leaves = |index: usize, payments: usize| {
            let address = self.wallets[index % self.wallets.len()].address;
            let amount = Amount::from_units(self.coin_of(payments)).unwrap_or(Amount::MAX);
            std::iter::repeat_n(Output { amount, address }, self.settings.inputs)
        };
        let series = (0..self.series()).flat_map(|index| leaves(index, self.chain));
        series.chain((0..self.settings.pairs).flat_map(|index| leaves(index, 1))).collect()
    }

    /// Signs and encodes everything, on all cores.
    pub fn build(self, coins: Vec<OutPoint>) -> Plan {
        let inputs = self.settings.inputs;
        let coins_of = |index: usize| &coins[index * inputs..(index + 1) * inputs];
        let series = self.series();
        let uncontested = series * self.chain;
        let mut payments: Vec<Planned> =
            on_all_cores(series, |index| self.series_of(index, coins_of(index))).into_iter().flatten().collect();
        let pairs =
            on_all_cores(self.settings.pairs, |pair| self.pair(pair, uncontested + 2 * pair, coins_of(series + pair)));
        payments.extend(pairs.into_iter().flatten());
        let change = self.change();
        Plan {
            payments,
            uncontested,
            chain: if self.settings.chained { self.chain } else { 0 },
            paid: self.settings.outputs - change,
            change,
            coins,
            wallets: self.wallets,
        }
    }

    /// The payments of one chain, or the one payment where there are none.
    fn series_of(&self, index: usize, coins: &[OutPoint]) -> Vec<Planned> {
        let payer = index % self.wallets.len();
        let mut coins = coins.to_vec();
        let mut units = self.coin_of(self.chain) * coins.len() as u64;
        let mut planned = Vec::with_capacity(self.chain);
        for step in 0..self.chain {
            let connection = self.wallets[payer].connection;
            let (payment, change) =
                self.payment(payer, &coins, units, self.timestamp, index * self.chain + step, connection);
            planned.push(payment);
            units -= self.spent();
            coins = change;
        }
        planned
    }

    /// Two payments with the same coins, sent to two nodes if there are two.
    fn pair(&self, pair: usize, number: usize, coins: &[OutPoint]) -> [Planned; 2] {
        let payer = pair % self.wallets.len();
        let units = self.coin_of(1) * coins.len() as u64;
        let wallet = &self.wallets[payer];
        let elsewhere = (wallet.slot + 1) % self.slots * self.settings.connections;
        [(0, wallet.connection), (1, elsewhere)].map(|(second, connection)| {
            self.payment(payer, coins, units, self.timestamp + i64::from(second), number + second as usize, connection)
                .0
        })
    }

    /// One payment and the coins that come back from it.
    fn payment(
        &self,
        payer: usize,
        coins: &[OutPoint],
        units: u64,
        timestamp: i64,
        number: usize,
        connection: usize,
    ) -> (Planned, Vec<OutPoint>) {
        let payee = (payer + self.slots) % self.wallets.len();
        let output = |units, wallet: usize| Output {
            amount: Amount::from_units(units).unwrap_or(Amount::MAX),
            address: self.wallets[wallet].address,
        };
        let change = self.change();
        let paid = self.settings.outputs - change;
        let mut outputs: Vec<Output> = (0..paid).map(|_| output(PAYMENT, payee)).collect();
        let mut rest = units - self.spent();
        for left in (1..=change as u64).rev() {
            let part = rest / left;
            outputs.push(output(part, payer));
            rest -= part;
        }
        let transaction = sign(self.genesis, &self.wallets[payer].key, coins, outputs, timestamp);
        let change = transaction.creates().skip(paid).map(|(outpoint, _)| outpoint).collect();
        let message = NetworkMessage::TransactionBroadcast(transaction.to_raw());
        // The encoder writes JSON, which is UTF-8.
        let message = Utf8Bytes::try_from(encode(&message, Some(&number.to_string()))).unwrap_or_default();
        (Planned { txid: transaction.txid(), message, connection, payer, payee }, change)
    }
}

/// `make` of each number below `count`, in order, shared out among the cores.
fn on_all_cores<T: Send>(count: usize, make: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = count.div_ceil(cores).max(1);
    std::thread::scope(|scope| {
        let make = &make;
        let begin = |from: usize| scope.spawn(move || (from..count.min(from + share)).map(make).collect::<Vec<T>>());
        let shares: Vec<_> = (0..count).step_by(share).map(begin).collect();
        let join = |share: std::thread::ScopedJoinHandle<'_, Vec<T>>| match share.join() {
            Ok(made) => made,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        shares.into_iter().flat_map(join).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use clap::Parser;
    use time_masternode::consensus::{Rules, check_form};
    use time_masternode::net::parse;
    use time_masternode::types::{Allocation, Network, RawGenesis, RawMasternode};

    use super::super::cli::Cli;
    use super::*;

    fn genesis() -> Genesis {
        let key = SecretKey::from_seed([1; 32]).public_key();
        let address = Address::of_key(&key, Network::Devnet).to_string();
        let masternode = RawMasternode {
            id: "m".into(),
            public_key: key,
            weight: 1,
            p2p_address: String::new(),
            payout_address: address.clone(),
        };
        let raw = RawGenesis {
            network: Network::Devnet,
            timestamp: 0,
            block_interval_ms: 1,
            min_fee: 10,
            masternodes: vec![masternode],
            allocations: vec![Allocation { address, amount: 1 }],
        };
        Genesis::try_from(raw).unwrap()
    }

    /// Replays a plan as a ledger would: everything spends what is there and belongs to the
    /// payer, by every rule but the network's.
    fn replay(arguments: &[&str]) -> (Plan, LoadSettings) {
        let genesis = genesis();
        let all = std::iter::once(&"time-bench").chain(arguments);
        let settings = Cli::try_parse_from(all).unwrap().load.settings(2).unwrap();
        let planner = Planner::new(&genesis, &settings, 2, 7);
        let leaves = planner.leaves();
        let source = Txid::from_bytes([9; 32]);
        let coins: Vec<OutPoint> = (0..).take(leaves.len()).map(|vout| OutPoint { txid: source, vout }).collect();
        let mut live: BTreeMap<OutPoint, Output> = coins.iter().copied().zip(leaves).collect();
        let plan = planner.build(coins);
        let rules = Rules { network: Network::Devnet, min_fee: genesis.min_fee() };
        for (number, planned) in plan.payments.iter().enumerate() {
            let incoming = parse(planned.message.as_bytes()).unwrap();
            assert_eq!(incoming.request_id, Some(number.to_string()));
            let NetworkMessage::TransactionBroadcast(raw) = incoming.message else { panic!() };
            let transaction = check_form(raw, &rules).unwrap();
            assert_eq!(transaction.txid(), planned.txid);
            assert_eq!(transaction.inputs().len(), settings.inputs);
            assert_eq!(transaction.outputs().len(), plan.paid + plan.change);
            let second_of_pair = number >= plan.uncontested && (number - plan.uncontested) % 2 == 1;
            let brought: u64 = transaction
                .spends()
                .map(|spent| {
                    let output = if second_of_pair { live.remove(&spent) } else { live.get(&spent).copied() };
                    let output = output.unwrap_or_else(|| panic!("payment {number} spends what is not there"));
                    if number < plan.uncontested {
                        live.remove(&spent);
                    }
                    assert_eq!(output.address, plan.wallets[planned.payer].address);
                    output.amount.units()
                })
                .sum();
            let paid: u64 = transaction.outputs().iter().map(|output| output.amount.units()).sum();
            assert_eq!(brought, paid + 10, "payment {number}");
            let to = |wallet: usize| {
                let address = plan.wallets[wallet].address;
                transaction.outputs().iter().filter(|output| output.address == address).count()
            };
            assert_eq!((to(planned.payee), to(planned.payer)), (plan.paid, plan.change));
            assert_eq!(plan.wallets[planned.payee].slot, plan.wallets[planned.payer].slot);
            live.extend(transaction.creates());
        }
        let txids: BTreeSet<Txid> = plan.payments.iter().map(|planned| planned.txid).collect();
        assert_eq!(txids.len(), plan.payments.len());
        (plan, settings)
    }

    #[test]
    fn independent_payments_and_pairs() {
        for shape in [["1", "2"], ["1", "1"], ["3", "2"], ["2", "5"]] {
            let (plan, settings) = replay(&[
                "--count",
                "20",
                "--in-flight",
                "5",
                "--inputs",
                shape[0],
                "--outputs",
                shape[1],
                "--wallets",
                "6",
                "--conflicts",
                "0.2",
            ]);
            assert_eq!((plan.uncontested, settings.pairs), (25, 4));
            for pair in plan.payments[25..].chunks(2) {
                assert_ne!(pair[0].connection, pair[1].connection);
            }
        }
    }

    #[test]
    fn chains_spend_their_own_change() {
        for shape in [["1", "2"], ["1", "1"], ["3", "3"], ["2", "5"]] {
            let (plan, _) = replay(&[
                "--chained",
                "--count",
                "20",
                "--in-flight",
                "5",
                "--inputs",
                shape[0],
                "--outputs",
                shape[1],
            ]);
            assert_eq!((plan.chain, plan.wallets.len(), plan.uncontested), (5, 6, 30));
            for chain in plan.payments.chunks(plan.chain) {
                assert!(chain.iter().all(|planned| planned.payer == chain[0].payer));
            }
        }
    }
}
