//! Builds and signs a transaction. Pure: no node, no file, no clock.
//!
//! What is returned has passed the rules of the protocol that need no ledger, and its
//! signatures verify. The coins given must have been checked (see [`super::coins`]).

use time_masternode::consensus::{Rejection, Rules, SignedTransaction, Verified, check_form};
use time_masternode::limits::{MAX_OUTPUTS, MAX_TRANSACTION_BYTES};
use time_masternode::types::{
    Address, Amount, Genesis, Input, Output, SecretKey, Signature, Transaction, UnixSeconds, sighash,
};

use super::coins::Coin;

/// Why no transaction was made.
#[derive(Debug, thiserror::Error)]
pub enum PaymentError {
    /// As many `--to` as `--amount` are needed.
    #[error("{addresses} times --to, but {amounts} times --amount")]
    Unpaired {
        /// How many addresses.
        addresses: usize,
        /// How many amounts.
        amounts: usize,
    },
    /// A payment of nothing.
    #[error("a payment of 0 TIME is none")]
    Zero,
    /// An address of another network.
    #[error("{0} is an address of {1}, not of {2}")]
    WrongNetwork(Address, time_masternode::types::Network, time_masternode::types::Network),
    /// More outputs than fit.
    #[error("a transaction has at most {MAX_OUTPUTS} outputs, and the change is one of them")]
    TooManyOutputs,
    /// Less than the network takes.
    #[error("a fee of {fee} TIME is below the network's least of {min_fee} TIME")]
    FeeTooLow {
        /// The wanted fee.
        fee: Amount,
        /// The least.
        min_fee: Amount,
    },
    /// The payments exceed what there can be.
    #[error("the payments add up to more than there can be")]
    Overflow,
    /// The coins do not cover the payments.
    #[error("the coins do not cover the payments and the fee")]
    Uncovered,
    /// The wallet's own work does not hold: a bug, and nothing was sent.
    #[error("the wallet made a transaction that it must not send: {0}")]
    Unsound(Rejection),
}

/// What is to be paid.
#[derive(Debug, Clone)]
pub struct Plan {
    payments: Vec<Output>,
    fee: Amount,
    needed: Amount,
}

impl Plan {
    /// Checks addresses, amounts and the fee; without one it is the network's least.
    pub fn new(
        addresses: &[Address],
        amounts: &[Amount],
        fee: Option<Amount>,
        genesis: &Genesis,
    ) -> Result<Self, PaymentError> {
        if addresses.len() != amounts.len() {
            return Err(PaymentError::Unpaired { addresses: addresses.len(), amounts: amounts.len() });
        }
        if addresses.len() > MAX_OUTPUTS {
            return Err(PaymentError::TooManyOutputs);
        }
        let (network, min_fee) = (genesis.network(), genesis.min_fee());
        if let Some(wrong) = addresses.iter().find(|address| address.network() != network) {
            return Err(PaymentError::WrongNetwork(*wrong, wrong.network(), network));
        }
        if amounts.contains(&Amount::ZERO) {
            return Err(PaymentError::Zero);
        }
        let fee = fee.unwrap_or(min_fee);
        if fee < min_fee {
            return Err(PaymentError::FeeTooLow { fee, min_fee });
        }
        let needed = Amount::checked_sum(amounts.iter().copied().chain([fee])).ok_or(PaymentError::Overflow)?;
        let payments =
            addresses.iter().zip(amounts).map(|(address, amount)| Output { amount: *amount, address: *address });
        Ok(Self { payments: payments.collect(), fee, needed })
    }

    /// Payments and fee together.
    pub const fn needed(&self) -> Amount {
        self.needed
    }

    /// The fee.
    pub const fn fee(&self) -> Amount {
        self.fee
    }

    /// What is paid to whom.
    pub fn payments(&self) -> &[Output] {
        &self.payments
    }

    /// Makes the transaction: what is left goes back to the key's own address, and nothing
    /// left makes no output.
    pub fn sign(
        &self,
        coins: &[Coin],
        key: &SecretKey,
        genesis: &Genesis,
        timestamp: UnixSeconds,
    ) -> Result<Transaction, PaymentError> {
        let total = Amount::checked_sum(coins.iter().map(|coin| coin.output.amount)).ok_or(PaymentError::Overflow)?;
        let change = total.checked_sub(self.needed).ok_or(PaymentError::Uncovered)?;
        let public_key = key.public_key();
        let mut outputs = self.payments.clone();
        if change > Amount::ZERO {
            outputs.push(Output { amount: change, address: Address::of_key(&public_key, genesis.network()) });
        }
        if outputs.len() > MAX_OUTPUTS {
            return Err(PaymentError::TooManyOutputs);
        }
        let inputs = |signature| {
            let input = move |coin: &Coin| Input { previous_output: coin.outpoint, public_key, signature };
            coins.iter().map(input).collect::<Vec<_>>()
        };
        // The txid covers no signature, so it can be had before there is one; every input
        // signs the same message.
        let unsigned = Transaction::from_parts(inputs(Signature::from_bytes([0; 64])), outputs.clone(), timestamp);
        let signature = key.sign(&sighash(&genesis.hash(), &unsigned.txid()));
        let signed = Transaction::from_parts(inputs(signature), outputs, timestamp);
        check_own(&signed, genesis).map_err(PaymentError::Unsound)?;
        Ok(signed)
    }
}

/// The rules that need no ledger, and the signatures: what a node would say first.
pub fn check_own(transaction: &Transaction, genesis: &Genesis) -> Result<(), Rejection> {
    let rules = Rules { network: genesis.network(), min_fee: genesis.min_fee() };
    let raw = transaction.to_raw();
    if serde_json::to_vec(&raw).map_or(true, |bytes| bytes.len() > MAX_TRANSACTION_BYTES) {
        return Err(Rejection::TooLarge);
    }
    let transaction = check_form(raw, &rules)?;
    Verified::check(SignedTransaction::new(transaction, genesis.hash())).map_err(|_| Rejection::InvalidSignature)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use time_masternode::types::{Allocation, Network, OutPoint, RawGenesis, RawMasternode};

    use super::*;

    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed([n; 32])
    }

    fn address(n: u8) -> Address {
        Address::of_key(&key(n).public_key(), Network::Devnet)
    }

    fn amount(units: u64) -> Amount {
        Amount::from_units(units).unwrap()
    }

    fn genesis() -> Genesis {
        let member = RawMasternode {
            id: "m".into(),
            public_key: key(9).public_key(),
            weight: 1,
            p2p_address: String::new(),
            payout_address: address(9).to_string(),
        };
        Genesis::try_from(RawGenesis {
            network: Network::Devnet,
            timestamp: 1,
            block_interval_ms: 1,
            min_fee: 10,
            masternodes: vec![member],
            allocations: vec![Allocation { address: address(1).to_string(), amount: 100 }],
        })
        .unwrap()
    }

    fn coin(units: u64) -> Coin {
        let outpoint = OutPoint { txid: genesis().transaction().txid(), vout: 0 };
        Coin { outpoint, output: Output { amount: amount(units), address: address(1) } }
    }

    #[test]
    fn change_goes_home_and_nothing_makes_no_output() {
        let genesis = genesis();
        let plan = Plan::new(&[address(2)], &[amount(30)], None, &genesis).unwrap();
        assert_eq!(plan.needed(), amount(40));
        let signed = plan.sign(&[coin(100)], &key(1), &genesis, 5).unwrap();
        let outputs = [(30, address(2)), (60, address(1))].map(|(n, address)| Output { amount: amount(n), address });
        assert_eq!(signed.outputs(), outputs);
        let exact = plan.sign(&[coin(40)], &key(1), &genesis, 5).unwrap();
        assert_eq!(exact.outputs(), &outputs[..1]);
        assert!(matches!(plan.sign(&[coin(39)], &key(1), &genesis, 5), Err(PaymentError::Uncovered)));
    }

    #[test]
    fn the_change_counts_as_an_output() {
        let genesis = genesis();
        let plan = Plan::new(&[address(2); 256], &[amount(1); 256], None, &genesis).unwrap();
        assert!(matches!(plan.sign(&[coin(267)], &key(1), &genesis, 5), Err(PaymentError::TooManyOutputs)));
        assert_eq!(plan.sign(&[coin(266)], &key(1), &genesis, 5).unwrap().outputs().len(), 256);
    }

    #[test]
    fn a_senseless_plan_is_refused() {
        let genesis = genesis();
        let plan = |addresses: &[Address], amounts: &[u64], fee: Option<u64>| {
            let amounts: Vec<_> = amounts.iter().map(|n| amount(*n)).collect();
            Plan::new(addresses, &amounts, fee.map(amount), &genesis).map(|plan| plan.needed()).unwrap_err()
        };
        assert!(matches!(plan(&[address(2)], &[1, 2], None), PaymentError::Unpaired { addresses: 1, amounts: 2 }));
        assert!(matches!(plan(&[address(2)], &[0], None), PaymentError::Zero));
        assert!(matches!(plan(&[address(2)], &[1], Some(9)), PaymentError::FeeTooLow { .. }));
        let elsewhere = Address::of_key(&key(2).public_key(), Network::Mainnet);
        assert!(matches!(plan(&[elsewhere], &[1], None), PaymentError::WrongNetwork(..)));
        assert!(matches!(plan(&[address(2)], &[Amount::MAX.units()], None), PaymentError::Overflow));
    }
}
