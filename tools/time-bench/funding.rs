//! Splits one coin into as many as the load needs: a tree of transactions.
//!
//! A transaction has at most 256 outputs, so the coins are the leaves of a tree whose inner
//! nodes are transactions. A txid does not depend on signatures, so the whole tree is signed
//! before any of it is sent; a level is sent when the one above it is final everywhere.
//! Decides only; `prepare` sends.

use time_masternode::types::{
    Address, Amount, Genesis, Input, OutPoint, Output, SecretKey, Signature, Transaction, sighash,
};

/// Outputs of one transaction of the tree; the root has one more for the change.
const FAN: usize = 250;

/// A coin and its key.
#[derive(Clone)]
pub struct Coin {
    pub outpoint: OutPoint,
    pub amount: Amount,
    pub key: SecretKey,
}

/// Why no tree can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FundingError {
    /// The coin is too small, or the load too large.
    #[error("the load needs {needed} base units, and the largest coin has {largest}")]
    TooLittle {
        /// What all coins and fees cost.
        needed: u64,
        /// What there is.
        largest: u64,
    },
}

/// The transactions, level by level, and the coins that come out.
pub struct Funding {
    pub levels: Vec<Vec<Transaction>>,
    pub coins: Vec<OutPoint>,
}

/// The transaction that spends `coins` of one key into `outputs`.
pub fn sign(
    genesis: &Genesis,
    key: &SecretKey,
    coins: &[OutPoint],
    outputs: Vec<Output>,
    timestamp: i64,
) -> Transaction {
    let public_key = key.public_key();
    let input =
        |previous_output: &OutPoint, signature| Input { previous_output: *previous_output, public_key, signature };
    let unsigned: Vec<Input> = coins.iter().map(|coin| input(coin, Signature::from_bytes([0; 64]))).collect();
    let txid = Transaction::from_parts(unsigned, outputs.clone(), timestamp).txid();
    let signature = key.sign(&sighash(&genesis.hash(), &txid));
    Transaction::from_parts(coins.iter().map(|coin| input(coin, signature)).collect(), outputs, timestamp)
}

/// Splits `source` into `leaves`, in this order; what is left goes back to its key.
pub fn split(genesis: &Genesis, source: &Coin, leaves: &[Output]) -> Result<Funding, FundingError> {
    let owner = Address::of_key(&source.key.public_key(), genesis.network());
    let fee = genesis.min_fee().units();
    // From the leaves upwards: what each transaction pays out, then what it costs.
    let mut outputs: Vec<Vec<Vec<Output>>> = vec![chunks(leaves)];
    while outputs.last().is_some_and(|level| level.len() > 1) {
        let level = outputs.last().into_iter().flatten();
        let above: Vec<Output> = level.map(|paid| output(cost(paid, fee), owner)).collect();
        outputs.push(chunks(&above));
    }
    outputs.reverse();
    let needed = outputs.first().and_then(|level| level.first()).map_or(0, |paid| cost(paid, fee));
    let largest = source.amount.units();
    let Some(rest) = largest.checked_sub(needed) else { return Err(FundingError::TooLittle { needed, largest }) };
    if let Some(root) = outputs.first_mut().and_then(|level| level.first_mut()).filter(|_| rest > 0) {
        root.push(output(rest, owner));
    }
    // From the root downwards: an output of one level is the coin of a transaction below.
    let mut coins = vec![source.outpoint];
    let mut levels = Vec::with_capacity(outputs.len());
    for level in outputs {
        let paid: Vec<usize> = level.iter().map(Vec::len).collect();
        let transactions: Vec<Transaction> = level
            .into_iter()
            .zip(&coins)
            .map(|(outputs, coin)| sign(genesis, &source.key, &[*coin], outputs, genesis.timestamp()))
            .collect();
        let is_root = levels.is_empty();
        let change = usize::from(is_root && rest > 0);
        coins = transactions
            .iter()
            .zip(paid)
            .flat_map(|(transaction, paid)| transaction.creates().take(paid - change).collect::<Vec<_>>())
            .map(|(outpoint, _)| outpoint)
            .collect();
        levels.push(transactions);
    }
    Ok(Funding { levels, coins })
}

fn output(units: u64, address: Address) -> Output {
    // Above the limit the root's cost is above any coin's amount, and is refused there.
    Output { amount: Amount::from_units(units).unwrap_or(Amount::MAX), address }
}

fn chunks(outputs: &[Output]) -> Vec<Vec<Output>> {
    outputs.chunks(FAN).map(<[Output]>::to_vec).collect()
}

fn cost(outputs: &[Output], fee: u64) -> u64 {
    outputs.iter().map(|output| output.amount.units()).fold(fee, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use time_masternode::consensus::{Rules, check_form};
    use time_masternode::types::{Allocation, Network, RawGenesis, RawMasternode};

    use super::*;

    fn genesis(key: &SecretKey) -> Genesis {
        let address = Address::of_key(&key.public_key(), Network::Devnet).to_string();
        let masternode = RawMasternode {
            id: "m".into(),
            public_key: key.public_key(),
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
            allocations: vec![Allocation { address, amount: 1_000_000_000 }],
        };
        Genesis::try_from(raw).unwrap()
    }

    /// Whatever the number of leaves: every transaction is well-formed, spends what is
    /// there, loses nothing but fees, and the leaves come out in order.
    #[test]
    fn the_tree_spends_what_it_makes_and_makes_the_leaves() {
        let key = SecretKey::from_seed([1; 32]);
        let genesis = genesis(&key);
        let (outpoint, first) = genesis.transaction().creates().next().unwrap();
        let source = Coin { outpoint, amount: first.amount, key };
        let rules = Rules { network: Network::Devnet, min_fee: genesis.min_fee() };
        for count in [1, 2, FAN - 1, FAN, FAN + 1, 3 * FAN + 7, FAN * FAN + 1] {
            let leaf = |i: usize| {
                let key = SecretKey::from_seed([u8::try_from(i % 7).unwrap(); 32]).public_key();
                output(100 + i as u64, Address::of_key(&key, Network::Devnet))
            };
            let leaves: Vec<Output> = (0..count).map(leaf).collect();
            let source = Coin { amount: Amount::from_units(10_000_000_000).unwrap(), ..source.clone() };
            let funding = split(&genesis, &source, &leaves).unwrap();
            let mut live = BTreeMap::from([(source.outpoint, source.amount.units())]);
            for transaction in funding.levels.iter().flatten() {
                check_form(transaction.to_raw(), &rules).unwrap();
                let brought: u64 = transaction.spends().map(|spent| live.remove(&spent).unwrap()).sum();
                let paid: u64 = transaction.outputs().iter().map(|output| output.amount.units()).sum();
                assert_eq!(brought, paid + 10, "{count} leaves");
                live.extend(transaction.creates().map(|(outpoint, output)| (outpoint, output.amount.units())));
            }
            assert_eq!(funding.coins.len(), count);
            for (coin, leaf) in funding.coins.iter().zip(&leaves) {
                assert_eq!(live.remove(coin), Some(leaf.amount.units()));
            }
            assert_eq!(live.len(), 1, "{count} leaves: only the change is left");
        }
    }

    #[test]
    fn what_costs_more_than_there_is_is_refused() {
        let key = SecretKey::from_seed([1; 32]);
        let genesis = genesis(&key);
        let (outpoint, first) = genesis.transaction().creates().next().unwrap();
        let source = Coin { outpoint, amount: first.amount, key };
        let leaves = [first];
        let error = FundingError::TooLittle { needed: 1_000_000_010, largest: 1_000_000_000 };
        assert_eq!(split(&genesis, &source, &leaves).err(), Some(error));
    }
}
