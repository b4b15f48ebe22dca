//! Signatures of an export, checked many at once on all cores.

use crate::consensus::{Signable, Signed, Verified};

/// Signatures that are gathered before they are checked.
const SIGNATURES_AT_ONCE: usize = 8_192;

/// What waits for its signatures to be checked, with the line that it came from.
#[derive(Debug, Default)]
pub(super) struct Seal {
    waiting: Vec<(u64, Signable)>,
    signatures: usize,
}

impl Seal {
    /// Takes something in; checks all that has been gathered once it is enough. On failure
    /// the line of a forgery.
    pub(super) fn add(&mut self, line: u64, value: Signable) -> Result<(), u64> {
        self.signatures += value.signature_items().len();
        self.waiting.push((line, value));
        if self.signatures < SIGNATURES_AT_ONCE {
            return Ok(());
        }
        self.check()
    }

    /// Checks what has been gathered.
    pub(super) fn check(&mut self) -> Result<(), u64> {
        self.signatures = 0;
        let mut rest = std::mem::take(&mut self.waiting);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let share = rest.len().div_ceil(cores).max(1);
        let mut shares = Vec::with_capacity(cores);
        while !rest.is_empty() {
            let more = rest.split_off(rest.len().min(share));
            shares.push(std::mem::replace(&mut rest, more));
        }
        let forged = std::thread::scope(|scope| {
            let threads: Vec<_> = shares.into_iter().map(|share| scope.spawn(|| forgery(share))).collect();
            // A thread that came apart has checked nothing.
            threads.into_iter().find_map(|thread| thread.join().unwrap_or(Some(0)))
        });
        forged.map_or(Ok(()), Err)
    }
}

fn forgery(share: Vec<(u64, Signable)>) -> Option<u64> {
    let (lines, values): (Vec<u64>, Vec<Signable>) = share.into_iter().unzip();
    let checked = Verified::check_all(values);
    lines.into_iter().zip(checked).find_map(|(line, value)| value.is_err().then_some(line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::SignedTransaction;
    use crate::types::{GenesisHash, Input, OutPoint, SecretKey, Signature, Transaction, Txid, sighash};

    fn signed(number: u8, forged: bool) -> Signable {
        let key = SecretKey::from_seed([number; 32]);
        let genesis = GenesisHash::from_bytes([7; 32]);
        let body = |signature| {
            let previous_output = OutPoint { txid: Txid::from_bytes([number; 32]), vout: 0 };
            Transaction::from_parts(vec![Input { previous_output, public_key: key.public_key(), signature }], vec![], 0)
        };
        let txid = body(Signature::from_bytes([0; 64])).txid();
        let signature = if forged { key.sign(b"else") } else { key.sign(&sighash(&genesis, &txid)) };
        Signable::Transaction(SignedTransaction::new(body(signature), genesis))
    }

    #[test]
    fn a_forgery_is_found_with_its_line() {
        for forged in [None, Some(1), Some(7), Some(20)] {
            let mut seal = Seal::default();
            for number in 1..=20 {
                seal.add(u64::from(number), signed(number, forged == Some(number))).unwrap();
            }
            assert_eq!(seal.check(), forged.map_or(Ok(()), |number| Err(u64::from(number))));
            assert_eq!(seal.check(), Ok(()), "and what was checked is checked once");
        }
    }
}
