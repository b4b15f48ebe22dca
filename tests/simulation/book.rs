//! What a member's database must hold: everything that its commits wrote, kept beside it.
//!
//! A commit is checked when it is entered here (each output starts where it stands and
//! takes a legal step, what is written is what the change log says), and afterwards the
//! tables are checked against each other and against what the database reads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use time_masternode::consensus::{
    AgreementRecord, Certificate, Changes, Dead, FenceState, Finalized, InFlight, LogEntry, Utxo, Vote, VoteKind,
};
use time_masternode::db::{Reader, RecoveredState};
use time_masternode::types::{BlockHash, Genesis, Height, OutPoint, Txid, UTXOState};

/// The durable half of a member, as far as it was told that it is durable.
#[derive(Debug, Clone)]
pub struct Book {
    pub utxos: BTreeMap<OutPoint, Utxo>,
    pub in_flight: BTreeMap<Txid, InFlight>,
    /// This member's votes on what is in flight.
    pub votes: BTreeMap<Txid, BTreeSet<VoteKind>>,
    /// C(T) or F(T), and (`true`) A(T).
    pub certificates: BTreeMap<(Txid, bool), Arc<Certificate>>,
    pub finalized: BTreeMap<Txid, Finalized>,
    /// What is final and in no block, in the order in which it became final.
    pub unconfirmed: Vec<Txid>,
    pub confirmed: BTreeMap<Txid, Height>,
    pub dead: BTreeMap<Txid, Dead>,
    pub height: Height,
    pub tip: BlockHash,
    pub agreement: Vec<AgreementRecord>,
    pub fenced: BTreeSet<OutPoint>,
    pub fence: Option<FenceState>,
    /// Votes that a repaired database has kept.
    kept_votes: BTreeMap<Txid, BTreeSet<VoteKind>>,
    pub sequence: u64,
    pub commit: u64,
    allocations: u64,
}

/// A second copy of what a step wants written.
pub fn copy(changes: &Changes) -> Changes {
    Changes {
        utxos: changes.utxos.clone(),
        log: changes.log.clone(),
        in_flight: changes.in_flight.clone(),
        votes: changes.votes.clone(),
        certificates: changes.certificates.clone(),
        finalized: changes.finalized.clone(),
        confirmed: changes.confirmed.clone(),
        dead: changes.dead.clone(),
        blocks: changes.blocks.clone(),
        tip: changes.tip.clone(),
        agreement: changes.agreement.clone(),
        fence: changes.fence.clone(),
        fence_state: changes.fence_state,
    }
}

impl Book {
    /// The book of a database that was just made; `fenced` if votes may have been lost.
    pub fn new(genesis: &Genesis, fenced: bool) -> Self {
        let utxos: BTreeMap<_, _> = genesis
            .transaction()
            .creates()
            .map(|(at, output)| (at, Utxo { output, state: UTXOState::Unspent }))
            .collect();
        Self {
            allocations: utxos.values().map(|utxo| utxo.output.amount.units()).sum(),
            fenced: if fenced { utxos.keys().copied().collect() } else { BTreeSet::new() },
            fence: fenced.then_some(FenceState::Asking),
            kept_votes: BTreeMap::new(),
            sequence: utxos.len() as u64,
            utxos,
            in_flight: BTreeMap::new(),
            votes: BTreeMap::new(),
            certificates: BTreeMap::new(),
            finalized: BTreeMap::new(),
            unconfirmed: Vec::new(),
            confirmed: BTreeMap::new(),
            dead: BTreeMap::new(),
            height: 0,
            tip: BlockHash::from_bytes(*genesis.hash().as_bytes()),
            agreement: Vec::new(),
            commit: 0,
        }
    }

    pub fn state(&self, outpoint: &OutPoint) -> Option<UTXOState> {
        self.utxos.get(outpoint).map(|utxo| utxo.state)
    }

    pub fn has_vote(&self, vote: &Vote) -> bool {
        self.votes.get(&vote.txid).is_some_and(|kinds| kinds.contains(&vote.kind))
    }

    /// Whether this member votes without a fence.
    pub const fn is_sound(&self) -> bool {
        matches!(self.fence, None | Some(FenceState::Down))
    }

    /// The database was put behind the fence where it is: nothing else about it has changed.
    pub fn put_behind_fence(&mut self, reader: &Reader) {
        let head = reader.durable_head();
        (self.commit, self.sequence, self.fence) = (head.commit, head.sequence, Some(FenceState::Asking));
        // What was said of the next block is forgotten: the fence says from which one on it takes part.
        self.agreement.clear();
        self.kept_votes.clone_from(&self.votes);
        let live = self.utxos.iter().filter(|(_, utxo)| !matches!(utxo.state, UTXOState::Confirmed { .. }));
        let mut fenced: BTreeSet<OutPoint> = live.map(|(outpoint, _)| *outpoint).collect();
        let settled = self.unconfirmed.iter().map(|txid| &self.finalized[txid].transaction);
        for transaction in settled.chain(self.in_flight.values().map(|row| &row.transaction)) {
            fenced.extend(transaction.spends());
            fenced.extend(transaction.creates().map(|(outpoint, _)| outpoint));
        }
        for outpoint in &fenced {
            ensure!(reader.is_fenced(outpoint).ok() == Some(true), "{outpoint} is not behind the fence of a repair");
        }
        // What was fenced before stays so.
        self.fenced.append(&mut fenced);
    }

    /// Enters one atomic commit.
    pub fn enter(&mut self, changes: &Changes) {
        let mut reached = BTreeMap::new();
        for entry in &changes.log {
            let LogEntry::Transition(step) = entry else { continue };
            let stands = reached.get(&step.outpoint).copied().or_else(|| self.state(&step.outpoint));
            ensure!(stands == step.old_state, "a step of {} does not start where it stands", step.outpoint);
            let legal = UTXOState::may_follow(step.old_state.as_ref(), &step.new_state);
            ensure!(legal, "{} goes from {:?} to {:?}", step.outpoint, step.old_state, step.new_state);
            reached.insert(step.outpoint, step.new_state);
        }
        let written: BTreeMap<_, _> = changes.utxos.iter().map(|(at, utxo)| (*at, utxo.state)).collect();
        ensure!(written == reached, "what is written is not what the change log says");
        self.utxos.extend(changes.utxos.iter().map(|(at, utxo)| (*at, *utxo)));
        self.sequence += changes.log.len() as u64;
        self.commit += 1;
        self.enter_finalized(changes);
        self.enter_chain(changes);
        self.enter_in_flight(changes);
        for (outpoint, fenced) in &changes.fence {
            if *fenced {
                self.fenced.insert(*outpoint);
            } else {
                self.fenced.remove(outpoint);
            }
        }
        if let Some(state) = changes.fence_state {
            self.fence = Some(state);
        }
    }

    fn enter_finalized(&mut self, changes: &Changes) {
        for (txid, finalized) in &changes.finalized {
            let known = self.finalized.insert(*txid, finalized.clone());
            ensure!(known.is_none(), "{txid} becomes final twice");
        }
        // The order is that of the change log, which is how the database finds it again.
        for entry in &changes.log {
            let LogEntry::Transition(step) = entry else { continue };
            if let UTXOState::SpentFinalized { txid, .. } = step.new_state
                && !self.unconfirmed.contains(&txid)
            {
                self.unconfirmed.push(txid);
            }
        }
    }

    fn enter_chain(&mut self, changes: &Changes) {
        for (txid, height) in &changes.confirmed {
            let known = self.confirmed.insert(*txid, *height);
            ensure!(known.is_none(), "{txid} is confirmed twice");
            self.unconfirmed.retain(|other| other != txid);
        }
        self.dead.extend(changes.dead.iter().map(|(txid, dead)| (*txid, *dead)));
        if let Some(tip) = &changes.tip {
            (self.height, self.tip) = (tip.height, tip.hash);
            self.agreement.clear();
        }
        let open = self.height + 1;
        let records = changes.agreement.iter().filter(|(height, _)| *height == open);
        self.agreement.extend(records.map(|(_, record)| record.clone()));
    }

    fn enter_in_flight(&mut self, changes: &Changes) {
        for vote in &changes.votes {
            // What comes behind the fence later was free when it was voted on.
            let row = changes.in_flight.get(&vote.txid).and_then(Option::as_ref);
            let row = row.or_else(|| self.in_flight.get(&vote.txid));
            let fenced = row.is_some_and(|row| row.transaction.spends().any(|at| self.fenced.contains(&at)));
            ensure!(!fenced, "{vote:?} is on what spends a fenced output");
            let cast = self.votes.entry(vote.txid).or_default().insert(vote.kind);
            ensure!(cast, "{vote:?} is cast twice");
        }
        for ((txid, kind), certificate) in &changes.certificates {
            ensure!(
                (certificate.txid, certificate.kind) == (*txid, *kind),
                "a certificate stands under the name of another"
            );
            self.certificates.insert((*txid, *kind == VoteKind::Abort), Arc::clone(certificate));
        }
        for (txid, row) in &changes.in_flight {
            match row {
                Some(row) => {
                    self.in_flight.insert(*txid, row.clone());
                }
                None => {
                    let ended = changes.finalized.contains_key(txid) || changes.dead.contains_key(txid);
                    ensure!(ended, "{txid} leaves flight neither settled nor dead");
                    self.in_flight.remove(txid);
                    self.votes.remove(txid);
                    self.certificates.remove(&(*txid, false));
                    self.certificates.remove(&(*txid, true));
                }
            }
        }
    }

    /// The links between the tables.
    pub fn check(&self) {
        let live = self.utxos.values().filter(|utxo| utxo.state.is_live()).map(|utxo| utxo.output.amount.units());
        let fees = self.unconfirmed.iter().map(|txid| self.finalized[txid].settled.fee.units());
        let supply = live.sum::<u64>() + fees.sum::<u64>();
        ensure!(supply == self.allocations, "the supply is {supply} and was {}", self.allocations);
        for (outpoint, utxo) in &self.utxos {
            self.check_output(outpoint, utxo.state);
        }
        for (txid, row) in &self.in_flight {
            ensure!(!self.finalized.contains_key(txid), "{txid} is settled and in flight");
            ensure!(!self.dead.contains_key(txid), "{txid} is dead and in flight");
            let approved = self.has_vote(&Vote { kind: VoteKind::Approve, txid: *txid });
            ensure!(approved == row.locked_at.is_some(), "{txid}: approved is not what is locked");
            for outpoint in row.transaction.spends().filter(|_| approved) {
                ensure!(self.locked_or_beaten(&outpoint, txid), "{txid} is approved and does not hold {outpoint}");
            }
        }
        for (txid, kinds) in &self.votes {
            let row = self.in_flight.get(txid);
            ensure!(row.is_some(), "a vote on {txid} has no body beside it");
            ensure!(
                !(kinds.contains(&VoteKind::Commit) && kinds.contains(&VoteKind::Abort)),
                "{txid} is both committed and aborted"
            );
            if kinds.contains(&VoteKind::Commit) {
                ensure!(self.certificates.contains_key(&(*txid, false)), "a commit to {txid} has no C beside it");
            }
        }
        let is_old = |(txid, kinds): (_, &BTreeSet<VoteKind>)| {
            self.kept_votes.get(txid).is_some_and(|kept| kinds.is_subset(kept))
        };
        let asking = self.fence == Some(FenceState::Asking);
        ensure!(!asking || self.votes.iter().all(is_old), "a vote before the fence stands");
    }

    fn check_output(&self, outpoint: &OutPoint, state: UTXOState) {
        match state {
            UTXOState::Locked { txid, locked_at } => {
                let row = self.in_flight.get(&txid);
                ensure!(
                    row.is_some_and(|row| row.locked_at == Some(locked_at)),
                    "{outpoint} is locked for {txid}, which does not say so"
                );
            }
            UTXOState::SpentFinalized { txid, .. } => {
                ensure!(self.unconfirmed.contains(&txid), "{outpoint} is spent by {txid}, which is not final");
            }
            UTXOState::Confirmed { txid, block_height, .. } => {
                ensure!(
                    self.confirmed.get(&txid) == Some(&block_height),
                    "{outpoint} is spent by {txid}, which is in no block"
                );
            }
            UTXOState::Unspent => {}
        }
    }

    /// Whether `outpoint` is locked for `txid`, or was until a final rival spent it.
    pub fn locked_or_beaten(&self, outpoint: &OutPoint, txid: &Txid) -> bool {
        match self.state(outpoint) {
            Some(UTXOState::Locked { txid: by, .. }) => by == *txid,
            Some(UTXOState::SpentFinalized { txid: by, .. }) => by != *txid,
            _ => false,
        }
    }

    /// What a commit touched reads back as it was written, and the log is dense.
    pub fn check_written(&self, reader: &Reader, changes: &Changes) {
        let head = reader.durable_head();
        ensure!(head.sequence == self.sequence, "the log ends at {} and not at {}", head.sequence, self.sequence);
        ensure!((head.commit, head.height) == (self.commit, self.height), "the head is another one: {head:?}");
        let first = self.sequence - changes.log.len() as u64;
        let entries = reader.changes(first, u64::MAX, usize::MAX).expect("the log is read");
        let expected = (first + 1..).zip(changes.log.iter().copied());
        ensure!(entries.into_iter().eq(expected), "the log is not what was written");
        for outpoint in changes.utxos.keys() {
            self.check_utxo_row(reader, outpoint);
        }
        let txids = changes.in_flight.keys().chain(changes.finalized.keys()).chain(changes.dead.keys());
        for txid in txids {
            let rows = (reader.is_in_flight(txid), reader.is_final(txid), reader.dead(txid));
            let (in_flight, settled, dead) = rows;
            ensure!(in_flight.ok() == Some(self.in_flight.contains_key(txid)), "{txid}: in flight or not");
            ensure!(settled.ok() == Some(self.finalized.contains_key(txid)), "{txid}: settled or not");
            ensure!(dead.ok() == Some(self.dead.get(txid).copied()), "{txid}: dead or not");
            ensure!(
                reader.confirmed(txid).ok() == Some(self.confirmed.get(txid).copied()),
                "{txid}: in a block or not"
            );
        }
    }

    fn check_utxo_row(&self, reader: &Reader, outpoint: &OutPoint) {
        let row = reader.utxo(outpoint).expect("an output is read");
        let written = self.utxos.get(outpoint).copied();
        ensure!(row == written, "{outpoint} is {row:?} in the database and was written as {written:?}");
    }

    /// Whether anything of these changes, which are not in the book, is in the database.
    pub fn lacks_what_is_there(&self, reader: &Reader, fence: Option<FenceState>, changes: &Changes) -> bool {
        let is_noted = |txid| reader.is_in_flight(txid).is_ok_and(|noted| noted) && !self.in_flight.contains_key(txid);
        let is_kept = |(txid, kind): &(Txid, VoteKind)| {
            let stored = reader.certificate(txid, *kind).expect("a certificate is read");
            stored.is_some() && !self.certificates.contains_key(&(*txid, *kind == VoteKind::Abort))
        };
        let is_moved = |(outpoint, fenced): (&OutPoint, &bool)| {
            self.fenced.contains(outpoint) != *fenced && reader.is_fenced(outpoint).ok() == Some(*fenced)
        };
        let has_grown = reader.durable_head().sequence > self.sequence;
        let has_stepped = changes.fence_state.is_some() && changes.fence_state == fence && self.fence != fence;
        has_grown
            || has_stepped
            || changes.in_flight.keys().any(is_noted)
            || changes.certificates.keys().any(is_kept)
            || changes.fence.iter().any(is_moved)
    }

    /// A start finds exactly what was durable.
    pub fn check_recovered(&self, reader: &Reader, recovered: &RecoveredState) {
        let rows: Vec<_> = recovered.in_flight.iter().map(|r| r.in_flight.transaction.txid()).collect();
        let expected: Vec<_> = self.in_flight.keys().copied().collect();
        ensure!(rows == expected, "in flight was {expected:?} and comes back as {rows:?}");
        for row in &recovered.in_flight {
            let txid = row.in_flight.transaction.txid();
            let votes: BTreeSet<_> = row.votes.iter().copied().collect();
            ensure!(
                votes == self.votes.get(&txid).cloned().unwrap_or_default(),
                "votes on {txid} come back as {votes:?}"
            );
            ensure!(
                row.in_flight.locked_at == self.in_flight[&txid].locked_at,
                "the lock of {txid} comes back otherwise"
            );
            let of = |abort| self.certificates.get(&(txid, abort)).map(Arc::as_ref);
            let expected: Vec<_> = [of(false), of(true)].into_iter().flatten().collect();
            ensure!(row.certificates.iter().eq(expected), "certificates of {txid} come back otherwise");
        }
        let (height, hash) = (recovered.tip.height, recovered.tip.hash);
        ensure!((height, hash) == (self.height, self.tip), "the tip comes back as {height}");
        ensure!(recovered.unconfirmed == self.unconfirmed, "what is not in a block comes back otherwise");
        ensure!(recovered.agreement == self.agreement, "the agreement's log comes back otherwise");
        let fence = self.fence.map(|state| (state, self.fenced.len() as u64));
        ensure!(recovered.fence == fence, "the fence was {fence:?} and comes back as {:?}", recovered.fence);
        self.utxos.keys().for_each(|outpoint| self.check_utxo_row(reader, outpoint));
        ensure!(reader.durable_head().sequence == self.sequence, "the log comes back shorter or longer");
    }

    /// The whole of the change log that is kept leads to the states, and the index of
    /// addresses has the live outputs.
    pub fn check_log(&self, reader: &Reader) {
        let pruned = reader.pruned().expect("how far it is pruned is read").sequence;
        let entries = reader.changes(0, u64::MAX, usize::MAX).expect("the log is read");
        let numbers = entries.iter().map(|(number, _)| *number);
        ensure!(numbers.eq(pruned + 1..=self.sequence), "the log has gaps");
        let mut reached = BTreeMap::new();
        for (_, entry) in entries {
            let LogEntry::Transition(step) = entry else { continue };
            let before = reached.insert(step.outpoint, step.new_state);
            ensure!(before.is_none() || before == step.old_state, "the log jumps at {}", step.outpoint);
        }
        for (outpoint, state) in reached {
            ensure!(self.state(&outpoint) == Some(state), "the log leaves {outpoint} at {state:?}");
        }
        let addresses: BTreeSet<_> = self.utxos.values().map(|utxo| utxo.output.address).collect();
        let addresses: Vec<_> = addresses.into_iter().collect();
        let found = reader.snapshot(&addresses, &[]).expect("a snapshot is read").into_inner();
        let live = self.utxos.iter().filter(|(_, utxo)| utxo.state.is_live()).map(|(at, utxo)| (*at, utxo.state));
        ensure!(found.utxos.iter().map(|u| (u.outpoint, u.state)).eq(live), "the index of addresses is wrong");
    }
}
