//! A member: its disk, which stays, and its process, which comes and goes. The process is
//! what `src/node` is in the program: it feeds the core, commits what that decides, and
//! answers questions from the database.

use std::collections::BTreeMap;
use std::sync::Arc;

use time_masternode::consensus::{
    Ballot, Changes, Event, Machine, MemberBatch, MemberIndex, Now, Suspension, Verified, VoteKind, Voting,
};
use time_masternode::db::{Database, DatabaseError, MemoryDisk, Opened, Owner, Reader, RecoveredState};
use time_masternode::types::{Height, PublicKey, SecretKey, Txid};

use super::book::Book;
use super::core_net::Setting;
use super::network::{Entry, Message};
use super::planted::Planted;

/// Blocks of one page, few so that pages are turned.
const BLOCKS_OF_A_PAGE: usize = 4;
/// Entries of one page of what is final.
const FINALIZED_OF_A_PAGE: usize = 3;

/// How far a member's list of what is final has been read, as the node keeps it.
#[derive(Debug, Default, Clone, Copy)]
pub struct Read {
    pub after: Option<u64>,
    pub asked: bool,
}

/// What a running member has in memory.
#[derive(Debug)]
pub struct Process {
    pub database: Database,
    pub reader: Reader,
    pub machine: Machine,
    pub ballot: Option<Ballot>,
    /// Signed for durable votes and not counted yet.
    pub own_batches: Vec<Arc<Verified<MemberBatch>>>,
    /// The last step left something to do at once.
    pub more: bool,
    /// Connections that came and went.
    pub inbox: Vec<Event>,
    pub reads: BTreeMap<usize, Read>,
    pub began_ms: u64,
    pub status_at_ms: u64,
}

/// A member of the committee that runs the program.
#[derive(Debug)]
pub struct Member {
    pub own: MemberIndex,
    pub key: SecretKey,
    pub public_key: PublicKey,
    pub disk: MemoryDisk,
    pub book: Book,
    /// A commit of which the member was not told whether it is durable.
    pub unsure: Option<Changes>,
    pub process: Option<Process>,
    /// A liar runs the program too, to know what it lies about; what it says is another
    /// matter, and nothing that it does is checked.
    pub honest: bool,
    /// Its disk was put back to an older state: it must find out by itself, and not vote.
    pub is_rolled_back: bool,
    /// Its disk has never been opened.
    pub is_new: bool,
}

impl Member {
    pub fn new(setting: &Setting, i: usize, honest: bool) -> Self {
        Self {
            own: setting.member(i),
            key: setting.keys[i].clone(),
            public_key: setting.committee.member(setting.member(i)).public_key,
            disk: MemoryDisk::new(),
            book: Book::new(&setting.genesis, false),
            unsure: None,
            process: None,
            honest,
            is_rolled_back: false,
            is_new: true,
        }
    }

    pub const fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// Opens the database and makes the machine from what it holds. Gives the commit that
    /// was cut off, if it happened all the same.
    pub fn start(
        &mut self,
        setting: &Setting,
        first_start: bool,
        interval_ms: u64,
        now: Now,
        began_ms: u64,
        planted: Planted,
    ) -> Result<Option<Changes>, DatabaseError> {
        let owner = Owner { genesis: &setting.genesis, public_key: Some(self.public_key), first_start };
        let Opened { database, recovered } = Database::open_in_memory(&self.disk, owner)?;
        let reader = database.reader();
        let entered = self.settle_unsure(&reader, &recovered);
        if self.honest {
            let expected = self.is_rolled_back.then_some(Suspension::GuardMismatch);
            ensure!(
                recovered.suspension == expected,
                "member {} opens with {:?}",
                self.own.get(),
                recovered.suspension
            );
            self.book.check_recovered(&reader, &recovered);
        }
        let mut machine = Machine::new(Arc::clone(&setting.committee), setting.rules, Some(self.own));
        if self.honest {
            planted.plant(&mut machine);
        }
        if let Some(reason) = recovered.suspension {
            machine.suspend(reason);
        }
        if let Some((state, fenced)) = recovered.fence {
            machine.stand_behind(state, fenced);
        }
        machine.follow_from(recovered.tip, recovered.unconfirmed, interval_ms);
        machine.recover(recovered.in_flight, now);
        let ballot = Some(Ballot { key: self.key.clone(), log: recovered.agreement });
        self.process = Some(Process {
            database,
            reader,
            machine,
            ballot,
            own_batches: Vec::new(),
            more: true,
            inbox: Vec::new(),
            reads: BTreeMap::new(),
            began_ms,
            status_at_ms: began_ms,
        });
        Ok(entered)
    }

    /// A commit that was cut off has happened or has not; the database's head says which.
    fn settle_unsure(&mut self, reader: &Reader, recovered: &RecoveredState) -> Option<Changes> {
        let head = reader.durable_head();
        let unsure = self.unsure.take();
        if std::mem::take(&mut self.is_new) {
            (self.book.commit, self.book.sequence) = (head.commit, head.sequence);
        }
        if !self.honest {
            return None;
        }
        // Each start of a member that must not vote writes that down, so its head does not say.
        if self.is_rolled_back {
            let fence = recovered.fence.map(|(state, _)| state);
            let happened = unsure.filter(|changes| self.book.lacks_what_is_there(reader, fence, changes));
            if let Some(changes) = &happened {
                self.book.enter(changes);
            }
            self.book.commit = head.commit;
            return happened;
        }
        match (head.commit.checked_sub(self.book.commit), unsure) {
            (Some(0), _) => None,
            (Some(1), Some(changes)) => {
                self.book.enter(&changes);
                Some(changes)
            }
            (ahead, _) => super::violation::violated(format!("the database comes back {ahead:?} commits ahead")),
        }
    }
}

impl Process {
    pub fn voting(&self) -> Voting {
        self.machine.voting()
    }

    pub fn height(&self) -> Height {
        self.reader.durable_head().height
    }

    /// A body with F, else C, else A.
    fn entry(&self, txid: &Txid) -> Result<Option<Entry>, DatabaseError> {
        if !self.reader.is_final(txid)? && !self.reader.is_in_flight(txid)? {
            return Ok(None);
        }
        let best = self.reader.certificate(txid, VoteKind::Commit)?;
        let certificate = match best {
            Some(certificate) => Some(certificate),
            None => self.reader.certificate(txid, VoteKind::Abort)?,
        };
        Ok(Some(Entry { txid: *txid, certificate }))
    }

    /// The same, and A once more beside C.
    fn entries(&self, txid: &Txid) -> Result<Vec<Entry>, DatabaseError> {
        let Some(first) = self.entry(txid)? else { return Ok(Vec::new()) };
        let only_approved = first.certificate.as_ref().is_some_and(|c| c.kind == VoteKind::Approve);
        let abort = if only_approved { self.reader.certificate(txid, VoteKind::Abort)? } else { None };
        let second = abort.map(|abort| Entry { txid: *txid, certificate: Some(abort) });
        Ok(std::iter::once(first).chain(second).collect())
    }

    /// What is final here, as it is sent to whoever still sends it.
    pub fn settled(&self, txid: &Txid) -> Result<Option<Message>, DatabaseError> {
        if !self.reader.is_final(txid)? {
            return Ok(None);
        }
        let certificate = self.reader.certificate(txid, VoteKind::Commit)?;
        Ok(Some(Message::Transactions(vec![Entry { txid: *txid, certificate }])))
    }

    /// Decided blocks in order, a page of them.
    pub fn blocks(&self, from_height: Height, limit: usize) -> Result<Message, DatabaseError> {
        let (mut blocks, mut height) = (Vec::new(), from_height.max(1));
        while blocks.len() < limit && height <= self.height() {
            let Some(decided) = self.reader.block(height)? else { break };
            blocks.push(Arc::new(decided));
            height += 1;
        }
        Ok(Message::Blocks(blocks))
    }

    fn finalized(&self, after: Option<u64>) -> Result<Message, DatabaseError> {
        let mut entries = Vec::new();
        let end = self.reader.durable_head().sequence;
        let after = after.filter(|after| *after <= end).unwrap_or(0);
        let mut cursor = after.max(self.reader.unconfirmed_from()?.saturating_sub(1));
        while cursor < end && entries.len() < FINALIZED_OF_A_PAGE {
            let (txids, last) = self.reader.unconfirmed(cursor, end, 8)?;
            if last == cursor {
                break;
            }
            for txid in txids {
                entries.extend(self.entry(&txid)?);
            }
            cursor = last;
        }
        let next = (cursor < end || !entries.is_empty()).then_some(cursor);
        Ok(Message::Finalized { entries, next })
    }

    /// The answers to a question that only reads.
    pub fn answer(&self, question: &Message, fence_page: usize) -> Result<Vec<Message>, DatabaseError> {
        Ok(match question {
            Message::GetTransactions(txids) => {
                let found: Result<Vec<_>, _> = txids.iter().map(|txid| self.entries(txid)).collect();
                vec![Message::Transactions(found?.concat())]
            }
            Message::GetFinalized { after } => vec![self.finalized(*after)?],
            Message::GetBlocks { from_height } => vec![self.blocks(*from_height, BLOCKS_OF_A_PAGE)?],
            // Whoever lost votes itself does not know what was voted on.
            Message::GetFence { after } if self.voting() == Voting::Active => {
                vec![Message::Fence(self.reader.fence_page(after.as_deref(), fence_page)?)]
            }
            Message::Status { in_flight, .. } => {
                let (mut settled, mut unknown) = (Vec::new(), Vec::new());
                for txid in in_flight {
                    if self.reader.is_final(txid)? {
                        settled.extend(self.entry(txid)?);
                    } else if !self.reader.is_in_flight(txid)? {
                        unknown.push(*txid);
                    }
                }
                let mut answers = Vec::new();
                if !settled.is_empty() {
                    answers.push(Message::Transactions(settled));
                }
                if !unknown.is_empty() {
                    answers.push(Message::GetTransactions(unknown));
                }
                answers
            }
            _ => Vec::new(),
        })
    }

    /// What to ask a member that has not been asked on its connection, once all blocks are
    /// here.
    pub fn first_request(&mut self, member: usize) -> Option<Message> {
        if self.machine.is_behind() {
            return None;
        }
        let read = self.reads.get_mut(&member).filter(|read| !read.asked)?;
        read.asked = true;
        Some(Message::GetFinalized { after: read.after })
    }

    /// A page of what is final came: what to ask next.
    pub fn next_request(&mut self, member: usize, next: Option<u64>) -> Option<Message> {
        let read = self.reads.entry(member).or_default();
        let next = next.filter(|next| read.after.is_none_or(|after| *next > after))?;
        read.after = Some(next);
        Some(Message::GetFinalized { after: read.after })
    }
}
