//! Which coins a payment spends.
//!
//! Pure functions. A node's word about an amount or an owner is not enough to spend a coin:
//! amounts are not in what an input signs, so whoever lies about them makes the wallet give
//! the difference away as a fee. A [`Coin`] that is spent has therefore passed
//! [`check_claim`] against its parent, whose hash is the txid that the input names.

use std::collections::BTreeSet;

use time_masternode::consensus::{Rules, check_form};
use time_masternode::limits::MAX_INPUTS;
use time_masternode::types::{Amount, Genesis, OutPoint, Output, RawTransaction, Transaction, Txid};

/// An output that could be spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coin {
    /// Its place.
    pub outpoint: OutPoint,
    /// Its amount and owner.
    pub output: Output,
}

/// Why no coins were picked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoinsError {
    /// The coins together are not enough.
    #[error("insufficient coins: {needed} TIME needed, {available} TIME can be spent")]
    Insufficient {
        /// Payments and fee.
        needed: Amount,
        /// What can be spent.
        available: Amount,
    },
    /// They would be enough, but not in one transaction.
    #[error(
        "the {MAX_INPUTS} largest coins add up to {available} TIME, {needed} TIME are needed; send to yourself first"
    )]
    TooManyPieces {
        /// Payments and fee.
        needed: Amount,
        /// What a transaction can carry.
        available: Amount,
    },
    /// More coins were named than a transaction can have inputs.
    #[error("a transaction has at most {MAX_INPUTS} inputs")]
    TooManyNamed,
    /// A coin was named twice.
    #[error("coin {0} is named twice")]
    NamedTwice(OutPoint),
    /// More than there can be.
    #[error("the coins add up to more than there can be")]
    Overflow,
    /// The parent's body is not the transaction that it claims to be.
    #[error("the node lies: what it gave as transaction {0} is not that transaction")]
    ForgedParent(Txid),
    /// The parent does not have the output that the node claims.
    #[error("the node lies: {0} is not what it says it is")]
    ForgedCoin(OutPoint),
}

/// Picks the largest coins until they cover `needed`, at most 256 of them.
///
/// Largest first makes the fewest inputs, and with it "not enough" is exact: if the 256
/// largest do not suffice, no 256 do.
pub fn select(coins: &[Coin], needed: Amount) -> Result<Vec<Coin>, CoinsError> {
    let mut sorted = coins.to_vec();
    sorted.sort_by(|a, b| b.output.amount.cmp(&a.output.amount).then(a.outpoint.cmp(&b.outpoint)));
    let (mut picked, mut sum) = (Vec::new(), Amount::ZERO);
    for coin in sorted.iter().take(MAX_INPUTS) {
        if sum >= needed && !picked.is_empty() {
            break;
        }
        sum = sum.checked_add(coin.output.amount).ok_or(CoinsError::Overflow)?;
        picked.push(*coin);
    }
    if sum >= needed && !picked.is_empty() {
        return Ok(picked);
    }
    let available = total(coins)?;
    if available >= needed && !coins.is_empty() {
        return Err(CoinsError::TooManyPieces { needed, available: sum });
    }
    Err(CoinsError::Insufficient { needed, available })
}

/// Takes exactly the named coins, all of them.
pub fn take_named(coins: Vec<Coin>, needed: Amount) -> Result<Vec<Coin>, CoinsError> {
    if coins.len() > MAX_INPUTS {
        return Err(CoinsError::TooManyNamed);
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = coins.iter().find(|coin| !seen.insert(coin.outpoint)) {
        return Err(CoinsError::NamedTwice(twice.outpoint));
    }
    let available = total(&coins)?;
    if available < needed || coins.is_empty() { Err(CoinsError::Insufficient { needed, available }) } else { Ok(coins) }
}

/// The sum of all.
pub fn total(coins: &[Coin]) -> Result<Amount, CoinsError> {
    Amount::checked_sum(coins.iter().map(|coin| coin.output.amount)).ok_or(CoinsError::Overflow)
}

/// Hashes a body that a node gave for `txid`; anything but that very transaction is an error.
pub fn check_parent(raw: RawTransaction, txid: Txid, genesis: &Genesis) -> Result<Transaction, CoinsError> {
    let rules = Rules { network: genesis.network(), min_fee: genesis.min_fee() };
    // A txid covers neither keys nor signatures, and neither matters to the outputs.
    let parent = check_form(raw, &rules).map_err(|_| CoinsError::ForgedParent(txid))?;
    if parent.txid() == txid { Ok(parent) } else { Err(CoinsError::ForgedParent(txid)) }
}

/// Holds what the node says of a coin to the coin's parent.
pub fn check_claim(coin: &Coin, parent: &Transaction) -> Result<(), CoinsError> {
    let real = usize::try_from(coin.outpoint.vout).ok().and_then(|vout| parent.outputs().get(vout));
    if parent.txid() == coin.outpoint.txid && real == Some(&coin.output) {
        Ok(())
    } else {
        Err(CoinsError::ForgedCoin(coin.outpoint))
    }
}

#[cfg(test)]
mod tests {
    use time_masternode::types::{Address, Network, SecretKey};

    use super::*;

    fn amount(units: u64) -> Amount {
        Amount::from_units(units).unwrap()
    }

    fn owner() -> Address {
        Address::of_key(&SecretKey::from_seed([1; 32]).public_key(), Network::Devnet)
    }

    fn coin(n: u32, units: u64) -> Coin {
        let outpoint = OutPoint { txid: Txid::from_bytes([1; 32]), vout: n };
        Coin { outpoint, output: Output { amount: amount(units), address: owner() } }
    }

    fn picked(coins: &[Coin], needed: u64) -> Result<Vec<u32>, CoinsError> {
        select(coins, amount(needed)).map(|coins| coins.iter().map(|c| c.outpoint.vout).collect())
    }

    #[test]
    fn the_largest_come_first_and_no_more_than_needed() {
        let coins = [coin(0, 5), coin(1, 50), coin(2, 20), coin(3, 20)];
        assert_eq!(picked(&coins, 1), Ok(vec![1]));
        assert_eq!(picked(&coins, 50), Ok(vec![1]));
        assert_eq!(picked(&coins, 51), Ok(vec![1, 2]));
        assert_eq!(picked(&coins, 91), Ok(vec![1, 2, 3, 0]));
        assert_eq!(picked(&coins, 95), Ok(vec![1, 2, 3, 0]));
        let insufficient =
            |needed, available| CoinsError::Insufficient { needed: amount(needed), available: amount(available) };
        assert_eq!(picked(&coins, 96), Err(insufficient(96, 95)));
        assert_eq!(picked(&[], 1), Err(insufficient(1, 0)));
        assert_eq!(picked(&[], 0), Err(insufficient(0, 0)), "a transaction without inputs is none");
    }

    #[test]
    fn a_transaction_has_at_most_256_inputs() {
        let coins: Vec<_> = (0..300).map(|n| coin(n, 10)).collect();
        assert_eq!(picked(&coins, 2_560).unwrap().len(), 256);
        let error = CoinsError::TooManyPieces { needed: amount(2_561), available: amount(2_560) };
        assert_eq!(picked(&coins, 2_561), Err(error));
        assert_eq!(
            picked(&coins, 3_001),
            Err(CoinsError::Insufficient { needed: amount(3_001), available: amount(3_000) })
        );
        assert_eq!(take_named(coins, amount(1)), Err(CoinsError::TooManyNamed));
    }

    #[test]
    fn named_coins_are_all_taken_once() {
        let coins = vec![coin(0, 5), coin(1, 50)];
        assert_eq!(take_named(coins.clone(), amount(1)), Ok(coins.clone()));
        assert!(matches!(take_named(coins, amount(56)), Err(CoinsError::Insufficient { .. })));
        let twice = take_named(vec![coin(7, 5), coin(7, 5)], amount(1));
        assert_eq!(twice, Err(CoinsError::NamedTwice(coin(7, 5).outpoint)));
    }

    #[test]
    fn sums_that_cannot_be_are_refused() {
        let most = Amount::MAX.units();
        assert_eq!(picked(&[coin(0, most - 1), coin(1, most - 1)], most), Err(CoinsError::Overflow));
    }

    #[test]
    fn a_claim_is_held_to_the_parent() {
        let parent = Transaction::from_parts(Vec::new(), vec![coin(0, 5).output, coin(1, 6).output], 1);
        let real = |vout, units| Coin { outpoint: OutPoint { txid: parent.txid(), vout }, ..coin(vout, units) };
        assert_eq!(check_claim(&real(0, 5), &parent), Ok(()));
        assert_eq!(check_claim(&real(1, 6), &parent), Ok(()));
        let elsewhere = coin(0, 5);
        for forged in [real(0, 6), real(0, 4), real(1, 5), real(2, 5), real(u32::MAX, 5), elsewhere] {
            assert_eq!(check_claim(&forged, &parent), Err(CoinsError::ForgedCoin(forged.outpoint)));
        }
        let mut stranger = real(0, 5);
        stranger.output.address = Address::of_key(&SecretKey::from_seed([2; 32]).public_key(), Network::Devnet);
        assert!(check_claim(&stranger, &parent).is_err());
    }
}
