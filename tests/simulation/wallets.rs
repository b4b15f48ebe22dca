//! Wallets: they pay, pay on from what is not settled yet, and spend one coin two, three and
//! more times at different members.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use time_masternode::types::{
    Address, Amount, OutPoint, Output, PublicKey, RawInput, SecretKey, Signature, Transaction, Txid, sighash,
};

use super::core_net::{COIN, MIN_FEE, Setting, wallet_address, wallet_key};
use super::world::World;

/// Wallets that own anything.
const OWNERS: u32 = 6;

/// A wallet's key and what follows from it, worked out once.
#[derive(Debug)]
struct Owner {
    key: SecretKey,
    public_key: PublicKey,
    address: Address,
}

/// What wallets own, or would own if everything that they sent were settled.
#[derive(Debug)]
pub struct Wallets {
    /// Amount and owner.
    outputs: BTreeMap<OutPoint, (u64, u32)>,
    owners: Arc<Vec<Owner>>,
    nonce: i64,
    /// Contradictions on purpose, in thousandths of all payments.
    pub rivalry: u64,
    /// Payments that spend what is not settled yet.
    pub chaining: u64,
}

impl Wallets {
    /// The owners of the coins of the genesis.
    pub fn new(setting: &Setting, coins: u32, rivalry: u64, chaining: u64) -> Self {
        let outputs = (0..coins).map(|wallet| (setting.coin(wallet), (COIN, wallet))).collect();
        static OWNED: LazyLock<Arc<Vec<Owner>>> = LazyLock::new(|| {
            let owner = |wallet| {
                let key = wallet_key(wallet);
                Owner { public_key: key.public_key(), address: wallet_address(wallet), key }
            };
            Arc::new((0..OWNERS).map(owner).collect())
        });
        Self { outputs, owners: Arc::clone(&OWNED), nonce: 0, rivalry, chaining }
    }

    /// A new payment; `None` if there is nothing to spend.
    pub fn pay(&mut self, world: &mut World) -> Option<Txid> {
        let height = world.history.height();
        let wanted = world.rng.pick(&[1, 1, 1, 2, 3]);
        let mut inputs: Vec<OutPoint> = Vec::new();
        for _ in 0..wanted {
            let rival = world.rng.chance(self.rivalry);
            let child = world.rng.chance(self.chaining);
            let fits = |outpoint: &OutPoint, (amount, _): &(u64, u32)| {
                let history = &world.history;
                let spenders = history.spenders.get(outpoint).into_iter().flatten();
                let (mut alive, mut confirmed) = (false, false);
                for spender in spenders {
                    alive |= !history.is_dead(spender, height);
                    confirmed |= history.is_confirmed(spender);
                }
                let parent = outpoint.txid;
                let unsettled = history.bodies.contains_key(&parent) && !history.is_settled(&parent);
                let possible = !history.is_dead(&parent, height) && !confirmed && *amount > 4 * MIN_FEE;
                possible && alive == rival && unsettled == child && !inputs.contains(outpoint)
            };
            let able: Vec<_> = self.outputs.iter().filter(|(at, of)| fits(at, of)).map(|(at, _)| *at).collect();
            if !able.is_empty() {
                inputs.push(world.rng.pick(&able));
            }
        }
        if inputs.is_empty() {
            return None;
        }
        Some(self.spend(world, &inputs))
    }

    /// Something that can be spent, and nobody has spent yet, or only what is dead.
    pub fn fresh(&self, world: &mut World) -> Option<OutPoint> {
        let height = world.history.height();
        let unspent = |outpoint: &&OutPoint| {
            let spenders = world.history.spenders.get(outpoint).into_iter().flatten();
            let settled =
                world.history.is_settled(&outpoint.txid) || !world.history.bodies.contains_key(&outpoint.txid);
            settled
                && self.outputs[outpoint].0 > 4 * MIN_FEE
                && spenders.into_iter().all(|t| world.history.is_dead(t, height))
        };
        let able: Vec<_> = self.outputs.keys().filter(unspent).copied().collect();
        (!able.is_empty()).then(|| world.rng.pick(&able))
    }

    /// A payment of these outputs to one or two owners.
    pub fn spend(&mut self, world: &mut World, inputs: &[OutPoint]) -> Txid {
        let owned: Vec<_> = inputs.iter().map(|outpoint| (*outpoint, self.outputs[outpoint].1)).collect();
        let total: u64 = inputs.iter().map(|outpoint| self.outputs[outpoint].0).sum();
        let fee = MIN_FEE + world.rng.below(3) as u64;
        let rest = total - fee;
        let owner = u32::try_from(world.rng.below(OWNERS as usize)).expect("below 6");
        let outputs = if rest > 8 * MIN_FEE && world.rng.chance(500) {
            vec![(rest / 3, owner), (rest - rest / 3, owned[0].1)]
        } else {
            vec![(rest, owner)]
        };
        self.nonce += 1;
        let transaction = self.sign(world, &owned, &outputs);
        for ((outpoint, _), of) in transaction.creates().zip(&outputs) {
            self.outputs.insert(outpoint, *of);
        }
        world.introduce(&transaction);
        transaction.txid()
    }

    fn sign(&self, world: &World, inputs: &[(OutPoint, u32)], outputs: &[(u64, u32)]) -> Arc<Transaction> {
        let owner = |wallet: u32| &self.owners[usize::try_from(wallet).expect("a few wallets")];
        let blank = Signature::from_bytes([0; 64]);
        let input = |(previous_output, wallet): &(OutPoint, u32)| RawInput {
            previous_output: *previous_output,
            public_key: owner(*wallet).public_key,
            signature: blank,
        };
        let output = |(amount, wallet): &(u64, u32)| Output {
            amount: Amount::from_units(*amount).expect("an amount is small"),
            address: owner(*wallet).address,
        };
        let mut signed: Vec<RawInput> = inputs.iter().map(input).collect();
        let outputs: Vec<Output> = outputs.iter().map(output).collect();
        let unsigned = Transaction::from_parts(signed.clone(), outputs.clone(), self.nonce);
        let message = sighash(world.setting.committee.genesis_hash(), &unsigned.txid());
        for (input, (_, wallet)) in signed.iter_mut().zip(inputs) {
            input.signature = owner(*wallet).key.sign(&message);
        }
        Arc::new(Transaction::from_parts(signed, outputs, self.nonce))
    }

    /// Whether it is there and has more than a few fees in it.
    pub fn is_worth_spending(&self, outpoint: &OutPoint) -> bool {
        self.outputs.get(outpoint).is_some_and(|(amount, _)| *amount > 4 * MIN_FEE)
    }

    /// Whether some wallet has the key to it.
    pub fn owns(&self, outpoint: &OutPoint) -> bool {
        self.outputs.contains_key(outpoint)
    }
}
