//! Lies about transactions: votes for everything or for one member only, certificates
//! shown to one, claims to have locked what contradicts, bodies under other keys.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use time_masternode::consensus::{
    Certificate, CountedVote, MemberBatch, SignedVote, Verified, Vote, VoteBatch, VoteKind, sign_batch,
};
use time_masternode::net::{CertifiedTransaction, GetTransactions, NetworkMessage, Transactions};
use time_masternode::types::{OutPoint, RawTransaction, SecretKey, Transaction, Txid, sighash};

use super::{HistoryLie, Mind, Rng};

/// What the liars do about a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CoinLie {
    /// One of the others, chosen by the transaction.
    Mixed,
    /// Approve it, commit to it and abort it, and tell everybody.
    Everything,
    /// Approve it and commit to it, and tell one member only.
    OneMember,
    /// Say nothing until a quorum needs only the liars, then show that certificate to one
    /// member only: C(T), F(T) and A(T) as they come.
    HiddenCertificate,
    /// Claim to have locked a different rival towards each member.
    Ghosts,
    /// Spread the body under a key that does not own the coin, with what is true about it.
    WrongKeys,
    /// Say nothing.
    Silence,
}

impl CoinLie {
    const EACH: [Self; 6] =
        [Self::Everything, Self::OneMember, Self::HiddenCertificate, Self::Ghosts, Self::WrongKeys, Self::Silence];
}

/// What the liars know of transactions.
#[derive(Debug, Default)]
pub(super) struct Coins {
    pub(super) bodies: BTreeMap<Txid, RawTransaction>,
    pub(super) spenders: BTreeMap<OutPoint, BTreeSet<Txid>>,
    votes: BTreeMap<(VoteKind, Txid), BTreeMap<usize, SignedVote>>,
    asked: BTreeSet<Txid>,
    shown: BTreeSet<(VoteKind, Txid)>,
    /// Rivals that nobody has seen yet.
    pub(super) ghosts: Vec<Transaction>,
}

impl Mind {
    pub(super) fn coin_lie(&self, txid: &Txid) -> CoinLie {
        match self.lies.coins {
            None => CoinLie::Silence,
            Some(CoinLie::Mixed) => Rng::about(self.seed, txid.as_bytes()).pick(&CoinLie::EACH),
            Some(lie) => lie,
        }
    }

    /// The one member that is told what the others are not.
    fn confidant(&self, txid: &Txid) -> usize {
        Rng::about(self.seed ^ 1, txid.as_bytes()).pick(&self.honest)
    }

    pub(super) fn hear_transaction(&mut self, raw: RawTransaction) {
        let txid = raw.txid;
        if self.coins.bodies.contains_key(&txid) {
            return;
        }
        for input in &raw.inputs {
            self.coins.spenders.entry(input.previous_output).or_default().insert(txid);
        }
        self.coins.bodies.insert(txid, raw.clone());
        if self.lies.coins.is_some() {
            self.show_ghosts(&raw);
            self.lie_about_transaction(&raw);
        }
    }

    fn rivals(&self, raw: &RawTransaction) -> Vec<Txid> {
        let spenders = raw.inputs.iter().filter_map(|input| self.coins.spenders.get(&input.previous_output)).flatten();
        let rivals: BTreeSet<Txid> = spenders.copied().collect();
        rivals.into_iter().collect()
    }

    fn show_ghosts(&mut self, raw: &RawTransaction) {
        let contradicts = |ghost: &Transaction| {
            ghost.spends().any(|outpoint| raw.inputs.iter().any(|input| input.previous_output == outpoint))
        };
        let (shown, kept) = std::mem::take(&mut self.coins.ghosts).into_iter().partition(contradicts);
        self.coins.ghosts = kept;
        let shown: Vec<Transaction> = shown;
        for ghost in shown {
            let member = self.confidant(&ghost.txid());
            self.say(member, &NetworkMessage::TransactionBroadcast(ghost.to_raw()));
            self.vote(&[VoteKind::Approve], ghost.txid(), &[member]);
            self.deeds.did("ghosts");
            self.hear_transaction(ghost.to_raw());
        }
    }

    fn lie_about_transaction(&mut self, raw: &RawTransaction) {
        let (txid, honest) = (raw.txid, self.honest.clone());
        match self.coin_lie(&txid) {
            CoinLie::Everything => self.vote(&VoteKind::ALL, txid, &honest),
            CoinLie::OneMember => {
                let member = self.confidant(&txid);
                self.vote(&[VoteKind::Approve, VoteKind::Commit], txid, &[member]);
            }
            CoinLie::Ghosts => {
                let rivals = self.rivals(raw);
                for (i, &member) in honest.iter().enumerate() {
                    let rival = rivals[i % rivals.len()];
                    let body = self.coins.bodies[&rival].clone();
                    self.say(member, &NetworkMessage::TransactionBroadcast(body));
                    self.vote(&[VoteKind::Approve], rival, &[member]);
                }
                self.deeds.did("rivals locked");
            }
            CoinLie::WrongKeys => {
                self.vote(&[VoteKind::Approve], txid, &honest);
                let forged = self.under_another_key(raw);
                for &member in &honest {
                    self.say(member, &NetworkMessage::TransactionBroadcast(forged.clone()));
                }
                self.deeds.did("wrong keys");
            }
            CoinLie::HiddenCertificate | CoinLie::Silence | CoinLie::Mixed => {}
        }
    }

    /// The same transaction, with the same txid and a valid signature, by a key that owns
    /// none of its coins: the txid does not cover keys.
    pub(super) fn under_another_key(&self, raw: &RawTransaction) -> RawTransaction {
        let thief = SecretKey::from_seed([7; 32]);
        let signature = thief.sign(&sighash(&self.genesis.hash(), &raw.txid));
        let mut forged = raw.clone();
        for input in &mut forged.inputs {
            input.public_key = thief.public_key();
            input.signature = signature;
        }
        forged
    }

    /// Every liar votes, in a batch for itself, towards these members.
    fn vote(&mut self, kinds: &[VoteKind], txid: Txid, members: &[usize]) {
        let votes: Vec<Vote> = kinds.iter().map(|&kind| Vote { kind, txid }).collect();
        for (i, liar) in self.liars.iter().enumerate() {
            let batch = sign_batch(&liar.key, &self.committee, votes.clone()).unwrap();
            let message = NetworkMessage::Votes(Arc::new(batch.get().wire().clone()));
            members.iter().for_each(|&member| self.say_as(i, member, &message));
        }
        self.deeds.did("votes");
    }

    pub(super) fn hear_votes(&mut self, from: u64, batch: VoteBatch) {
        let Ok(batch) = MemberBatch::new(batch, &self.committee) else { return };
        let Ok(batch) = Verified::check(batch).map(Arc::new) else { return };
        let member = batch.get().member().get();
        for (index, vote) in batch.get().votes().iter().enumerate() {
            let counted = CountedVote { batch: Arc::clone(&batch), index };
            let of_kind = self.coins.votes.entry((vote.kind, vote.txid)).or_default();
            of_kind.entry(member).or_insert_with(|| counted.to_signed());
        }
        let txids: Vec<Txid> = batch.get().votes().iter().map(|vote| vote.txid).collect();
        for vote in batch.get().votes() {
            self.show_certificate(vote.kind, vote.txid);
        }
        self.ask_for_bodies(from, txids);
    }

    pub(super) fn ask_for_bodies(&mut self, from: u64, txids: Vec<Txid>) {
        let coins = &mut self.coins;
        let unknown = |txid: &Txid| !coins.bodies.contains_key(txid) && coins.asked.insert(*txid);
        let txids: Vec<Txid> = txids.into_iter().filter(unknown).collect();
        for txids in txids.chunks(500) {
            self.answer(
                from,
                &NetworkMessage::GetTransactions(GetTransactions { txids: txids.to_vec(), bodies_only: false }),
            );
        }
    }

    /// Whether honest votes and the liars' own make a certificate together. Honest members
    /// give the liars' batches back to them; those do not count.
    pub(super) fn is_proven(&self, kind: VoteKind, txid: Txid) -> bool {
        let votes = self.coins.votes.get(&(kind, txid));
        let honest = votes.into_iter().flatten().filter(|(place, _)| self.honest.contains(place)).count();
        honest + self.liars.len() >= self.quorum()
    }

    /// That certificate.
    pub(super) fn certificate(&self, kind: VoteKind, txid: Txid) -> Option<Certificate> {
        let votes = self.coins.votes.get(&(kind, txid)).filter(|_| self.is_proven(kind, txid))?;
        let honest = votes.iter().filter(|(place, _)| self.honest.contains(place));
        let own = self.liars.iter().map(|liar| {
            let batch = sign_batch(&liar.key, &self.committee, vec![Vote { kind, txid }]).unwrap();
            CountedVote { batch: Arc::new(batch), index: 0 }.to_signed()
        });
        let votes = honest.map(|(_, vote)| vote.clone()).chain(own).collect();
        Some(Certificate { kind, txid, epoch: self.committee.epoch(), votes })
    }

    fn show_certificate(&mut self, kind: VoteKind, txid: Txid) {
        let lie = self.coin_lie(&txid);
        if !matches!(lie, CoinLie::HiddenCertificate | CoinLie::WrongKeys) || self.coins.shown.contains(&(kind, txid)) {
            return;
        }
        let Some(body) = self.coins.bodies.get(&txid).cloned() else { return };
        let Some(certificate) = self.certificate(kind, txid) else { return };
        self.coins.shown.insert((kind, txid));
        let body = if lie == CoinLie::WrongKeys { self.under_another_key(&body) } else { body };
        // Twice: the certificate makes a place for the body that comes after it.
        let entry = CertifiedTransaction { transaction: body, certificate: Some(certificate) };
        let message = NetworkMessage::Transactions(Transactions { transactions: vec![entry.clone(), entry] });
        self.say(self.confidant(&txid), &message);
        self.deeds.did(match lie {
            CoinLie::WrongKeys => "certificates with wrong keys",
            _ => "hidden certificates",
        });
    }

    /// Bodies are served as they are lied about: with the certificates, under other keys,
    /// or not at all.
    pub(super) fn serve_bodies(&mut self, to: u64, txids: &[Txid]) {
        let mut transactions = Vec::new();
        for txid in txids {
            let lie = match self.lies.coins {
                _ if self.history_lie(to) == HistoryLie::WrongKeys => CoinLie::WrongKeys,
                None => CoinLie::Everything,
                Some(_) => self.coin_lie(txid),
            };
            let Some(body) = self.coins.bodies.get(txid) else { continue };
            let best = self.certificate(VoteKind::Commit, *txid).or_else(|| self.certificate(VoteKind::Approve, *txid));
            let entry = |transaction: &RawTransaction, certificate| CertifiedTransaction {
                transaction: transaction.clone(),
                certificate,
            };
            match lie {
                CoinLie::Silence | CoinLie::OneMember => {}
                CoinLie::WrongKeys => {
                    let forged = self.under_another_key(body);
                    transactions.extend([entry(&forged, best.clone()), entry(&forged, best)]);
                    self.deeds.did("bodies with wrong keys");
                }
                _ => {
                    transactions.push(entry(body, best));
                    let abort = self.certificate(VoteKind::Abort, *txid);
                    transactions.extend(abort.map(|abort| entry(body, Some(abort))));
                }
            }
        }
        if !transactions.is_empty() {
            self.answer(to, &NetworkMessage::Transactions(Transactions { transactions }));
        }
    }
}
