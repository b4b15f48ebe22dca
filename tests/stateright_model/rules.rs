//! The rules of PROTOCOL §6 as a model: all that four members can do, one of whom lies.
//!
//! *The liar* votes for everything, to anybody, at any time: while it is there, a quorum
//! needs one honest vote less. It can stop at any moment ([`Liar::MayLeave`]). What a
//! quorum with its help has committed to counts as final ever after, for the liar may
//! have shown that certificate to a wallet.
//!
//! *Honest members* hear of votes, certificates and blocks with any delay, and in any
//! order but that of the chain. They send each other what they hold: a certificate that
//! one of them has can reach all. Waiting times (the conflict wait) are "any time".
//!
//! *The chain* is a list of single entries; the agreement on it is taken as given. With
//! [`Finality::second_line`], an entry needs a quorum of members that have executed all
//! before it and accept it by §6.5, and a commit is refused beside a rival's (§6.2). The
//! proof in `src/consensus/mod.rs` does not need these two rules, so they can be left out
//! to see that the locks alone carry it.
//!
//! Two reductions keep the state small. Honest members are alike, so they are kept sorted.
//! And what all of them have executed is forgotten, for nothing looks at the votes on it
//! any more; for the same reason nobody hears C(T) or commits once T is final to him.

use stateright::{Model, Property};
use time_masternode::consensus::quorum;

/// Members that follow the rules; the fourth is the liar.
pub const HONEST: usize = 3;
const COINS: usize = 2;
/// Each transaction stands in the chain at most once, and none has more than three.
const CHAIN: usize = 3;

/// Transactions, or coins: one bit each.
type Set = u8;
type Tx = u8;

const fn one(item: u8) -> Set {
    1 << item
}

const fn has(set: Set, item: u8) -> bool {
    set >> item & 1 == 1
}

fn items(set: Set) -> impl Iterator<Item = u8> {
    (0..8).filter(move |item| has(set, *item))
}

/// What the fourth member does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liar {
    /// Nothing at all.
    Silent,
    /// It helps with every quorum, for ever.
    Stays,
    /// The same, and at any moment it can stop for good.
    MayLeave,
}

/// A mistake in the rules, planted to see that it is found (`finality_model.py` has the
/// first six).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Approvals of a quorum are taken for finality.
    VotesFinal,
    /// A member commits to what it voted to abort.
    CommitAfterAbort,
    /// A lock goes away after some time.
    TimeoutUnlock,
    /// A member approves what is dead.
    ApproveAborted,
    /// What is dead is still a reason to abort its rivals.
    DeadStillContradicts,
    /// Who voted to abort a transaction does not approve it any more.
    AbortForbidsApprove,
    /// A quorum is one vote too small.
    QuorumOneShort,
}

/// What can come about, with its name.
pub type Reached = (&'static str, fn(&Finality, &State) -> bool);

/// A setting: what there is to spend, who helps, and which rules hold.
#[derive(Debug, Clone, Copy)]
pub struct Finality {
    /// The coins that each transaction spends.
    pub spends: &'static [Set],
    /// Those that a wallet makes only when everything that contradicts them is dead, and
    /// every honest member has seen it die.
    pub fresh: Set,
    pub liar: Liar,
    /// Blocks are accepted by §6.5, and nobody commits to two rivals.
    pub second_line: bool,
    /// Every member executes a block at once.
    pub lockstep: bool,
    pub bug: Option<Bug>,
    /// What has to be reachable.
    pub reaches: &'static [Reached],
}

/// What an honest member remembers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    approved: Set,
    /// It holds C(T).
    certified: Set,
    committed: Set,
    abort_voted: Set,
    /// It holds F(T).
    finalized: Set,
    /// For each coin the transaction that has locked it.
    locks: [Option<Tx>; COINS],
    /// Entries of the chain.
    executed: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Entry {
    Include(Tx),
    Abort(Tx),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    members: [Member; HONEST],
    chain: [Option<Entry>; CHAIN],
    liar_helps: bool,
}

/// A step of a member (by its place) or of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Approve(usize, Tx),
    HearCertificate(usize, Tx),
    Commit(usize, Tx),
    VoteAbort(usize, Tx),
    HearFinality(usize, Tx),
    Execute(usize),
    Unlock(usize, Tx),
    Include(Tx),
    Abort(Tx),
    LiarLeaves,
}

/// The chain, as far as somebody has executed it.
#[derive(Clone, Copy, Default)]
struct Seen {
    included: Set,
    dead: Set,
}

impl State {
    fn length(&self) -> u8 {
        self.chain.iter().flatten().fold(0, |length, _| length + 1)
    }

    fn any(&self, of: fn(&Member) -> Set, tx: Tx) -> bool {
        self.members.iter().any(|member| has(of(member), tx))
    }
}

impl Member {
    fn holds_lock_for(&self, tx: Tx) -> bool {
        self.locks.contains(&Some(tx))
    }

    fn unlock(&mut self, freed: impl Fn(Tx) -> bool) {
        for lock in &mut self.locks {
            *lock = lock.filter(|tx| !freed(*tx));
        }
    }
}

impl Finality {
    fn transactions(&self) -> impl Iterator<Item = Tx> + use<> {
        (0..).take(self.spends.len())
    }

    fn coins(&self, tx: Tx) -> Set {
        self.spends[usize::from(tx)]
    }

    fn rivals(&self, tx: Tx) -> Set {
        let spend_the_same = |other: &Tx| *other != tx && self.coins(*other) & self.coins(tx) != 0;
        self.transactions().filter(spend_the_same).fold(0, |set, other| set | one(other))
    }

    fn seen(&self, state: &State, executed: u8) -> Seen {
        let mut seen = Seen::default();
        for entry in state.chain.iter().take(usize::from(executed)).flatten() {
            match *entry {
                Entry::Include(tx) => {
                    seen.included |= one(tx);
                    seen.dead |= self.rivals(tx);
                }
                Entry::Abort(tx) => seen.dead |= one(tx),
            }
        }
        seen
    }

    fn is_quorum(&self, votes: usize) -> bool {
        let quorum = quorum(HONEST as u64 + 1) - u64::from(self.bug == Some(Bug::QuorumOneShort));
        votes as u64 >= quorum
    }

    /// Whether votes of a quorum can be had, with the help of the liar if it `helps`.
    fn has_quorum(&self, state: &State, of: fn(&Member) -> Set, tx: Tx, helps: bool) -> bool {
        let honest = state.members.iter().filter(|member| has(of(member), tx)).count();
        self.is_quorum(honest + usize::from(helps))
    }

    /// The votes whose quorum makes a transaction final.
    fn finality_votes(&self) -> fn(&Member) -> Set {
        if self.bug == Some(Bug::VotesFinal) { |member| member.approved } else { |member| member.committed }
    }

    /// Whether F(T) may be in anybody's hands.
    fn is_final(&self, state: &State, tx: Tx) -> bool {
        self.has_quorum(state, self.finality_votes(), tx, self.liar != Liar::Silent)
            || state.any(|member| member.finalized, tx)
    }

    /// Whether C(T) is in the hands of somebody who takes part.
    fn has_certificate(&self, state: &State, tx: Tx) -> bool {
        self.has_quorum(state, |member| member.approved, tx, state.liar_helps)
            || state.any(|member| member.certified, tx)
    }

    /// Whether its wallet has made it.
    fn is_made(&self, state: &State, tx: Tx) -> bool {
        if !has(self.fresh, tx) {
            return true;
        }
        let length = state.length();
        let seen = self.seen(state, length);
        let executed = state.members.iter().all(|member| member.executed == length);
        let free = executed && self.rivals(tx) & !seen.dead == 0;
        free || state.any(|member| member.approved, tx) || has(seen.included, tx)
    }

    /// Whether a member knows that a transaction is contradicted. The liar can show it any
    /// transaction of a wallet; without the liar, the member holds a lock for one side and
    /// another member for the other.
    fn is_contradicted(&self, state: &State, place: usize, dead: Set, tx: Tx) -> bool {
        let dead = if self.bug == Some(Bug::DeadStillContradicts) { 0 } else { dead };
        let locked_by_others = |tx: Tx| {
            let mut others = state.members.iter().enumerate().filter(|(other, _)| *other != place);
            others.any(|(_, member)| member.holds_lock_for(tx))
        };
        let member = &state.members[place];
        items(self.rivals(tx) & !dead).filter(|rival| self.is_made(state, *rival)).any(|rival| {
            state.liar_helps
                || self.bug == Some(Bug::DeadStillContradicts)
                || member.holds_lock_for(tx) && locked_by_others(rival)
                || member.holds_lock_for(rival) && locked_by_others(tx)
        })
    }

    fn steps_of_member(&self, state: &State, place: usize, steps: &mut Vec<Action>) {
        let member = &state.members[place];
        let Seen { included, dead } = self.seen(state, member.executed);
        let settled = included | member.finalized;
        let spent = items(settled).fold(0, |coins, tx| coins | self.coins(tx));
        for tx in self.transactions().filter(|tx| self.is_made(state, *tx)) {
            let unspent = self.coins(tx) & spent == 0;
            let locks = || items(self.coins(tx)).map(|coin| member.locks[usize::from(coin)]);
            // §6.1
            let may_lock = locks().all(|lock| lock.is_none_or(|holder| holder == tx)) && locks().any(|l| l.is_none());
            let alive = !has(dead, tx) || self.bug == Some(Bug::ApproveAborted);
            let barred = self.bug == Some(Bug::AbortForbidsApprove) && has(member.abort_voted, tx);
            if unspent && may_lock && alive && !barred && !has(member.approved, tx) {
                steps.push(Action::Approve(place, tx));
            }
            if has(settled | dead, tx) {
                continue;
            }
            // §6.2
            if !has(member.certified, tx) && self.has_certificate(state, tx) {
                steps.push(Action::HearCertificate(place, tx));
            }
            let barred = has(member.abort_voted, tx) && self.bug != Some(Bug::CommitAfterAbort);
            let rival_committed = self.second_line && member.committed & self.rivals(tx) & !dead != 0;
            if has(member.certified & !member.committed, tx) && unspent && !barred && !rival_committed {
                steps.push(Action::Commit(place, tx));
            }
            // §6.3
            let shown = state.any(|member| member.finalized, tx);
            if shown || self.has_quorum(state, self.finality_votes(), tx, state.liar_helps) {
                steps.push(Action::HearFinality(place, tx));
            }
            // §6.4
            let barred = has(member.abort_voted | member.committed | member.certified, tx);
            if !barred && self.is_contradicted(state, place, dead, tx) {
                steps.push(Action::VoteAbort(place, tx));
            }
        }
        if member.executed < state.length() {
            steps.push(Action::Execute(place));
        }
        if self.bug == Some(Bug::TimeoutUnlock) {
            steps.extend(
                self.transactions().filter(|tx| member.holds_lock_for(*tx)).map(|tx| Action::Unlock(place, tx)),
            );
        }
    }

    /// Whether a quorum decides for a block with this entry.
    fn is_accepted(&self, state: &State, included: Option<Tx>) -> bool {
        let accepts = |member: &&Member| {
            let dead = self.seen(state, member.executed).dead;
            let rivals = included.map_or(0, |tx| self.rivals(tx));
            member.executed == state.length() && member.committed & rivals & !dead == 0
        };
        let honest = state.members.iter().filter(accepts).count();
        !self.second_line || self.is_quorum(honest + usize::from(state.liar_helps))
    }

    /// §6.5
    fn steps_of_chain(&self, state: &State, steps: &mut Vec<Action>) {
        let seen = self.seen(state, state.length());
        for tx in self.transactions().filter(|tx| self.is_made(state, *tx) && !has(seen.included | seen.dead, *tx)) {
            if self.has_certificate(state, tx) && self.is_accepted(state, Some(tx)) {
                steps.push(Action::Include(tx));
            }
            let aborted = self.has_quorum(state, |member| member.abort_voted, tx, state.liar_helps);
            if aborted && self.is_accepted(state, None) {
                steps.push(Action::Abort(tx));
            }
        }
    }

    fn steps(&self, state: &State, steps: &mut Vec<Action>) {
        for place in 0..HONEST {
            // The next one is just like this one, so it gets nowhere else.
            if place == 0 || state.members[place] != state.members[place - 1] {
                self.steps_of_member(state, place, steps);
            }
        }
        self.steps_of_chain(state, steps);
        if state.liar_helps && self.liar == Liar::MayLeave {
            steps.push(Action::LiarLeaves);
        }
    }

    fn settle(&self, member: &mut Member, tx: Tx) {
        for coin in items(self.coins(tx)) {
            member.locks[usize::from(coin)] = None;
        }
    }

    fn execute(&self, state: &mut State, place: usize) {
        let member = &mut state.members[place];
        match state.chain[usize::from(member.executed)] {
            Some(Entry::Include(tx)) => {
                self.settle(member, tx);
                member.unlock(|holder| has(self.rivals(tx), holder));
            }
            Some(Entry::Abort(tx)) => member.unlock(|holder| holder == tx),
            None => unreachable!("only what is in the chain is executed"),
        }
        member.executed += 1;
    }

    fn append(&self, state: &mut State, entry: Entry) {
        state.chain[usize::from(state.length())] = Some(entry);
        if self.lockstep {
            (0..HONEST).for_each(|place| self.execute(state, place));
        }
    }

    fn forget(&self, state: &mut State) {
        let executed = state.members.iter().map(|member| member.executed).min().unwrap_or(0);
        let Seen { included, dead } = self.seen(state, executed);
        let kept = !(included | dead);
        for member in &mut state.members {
            member.approved &= kept;
            member.certified &= kept;
            member.committed &= kept;
            member.abort_voted &= kept;
            member.finalized &= kept;
        }
    }

    /// Nothing more can happen.
    fn is_end(&self, state: &State) -> bool {
        let mut steps = Vec::new();
        self.steps(state, &mut steps);
        steps.is_empty()
    }

    /// Each transaction that was made is in the chain or dead, and everybody knows.
    fn is_decided(&self, state: &State) -> bool {
        let seen = self.seen(state, state.length());
        let executed = state.members.iter().all(|member| member.executed == state.length());
        executed && self.transactions().all(|tx| has(seen.included | seen.dead, tx) || !self.is_made(state, tx))
    }
}

impl Model for Finality {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let members = [Member::default(); HONEST];
        vec![State { members, chain: [None; CHAIN], liar_helps: self.liar != Liar::Silent }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.steps(state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = *last;
        match action {
            Action::Approve(place, tx) => {
                let member = &mut state.members[place];
                member.approved |= one(tx);
                for coin in items(self.coins(tx)) {
                    member.locks[usize::from(coin)] = Some(tx);
                }
            }
            Action::HearCertificate(place, tx) => state.members[place].certified |= one(tx),
            Action::Commit(place, tx) => state.members[place].committed |= one(tx),
            Action::VoteAbort(place, tx) => state.members[place].abort_voted |= one(tx),
            Action::HearFinality(place, tx) => {
                state.members[place].finalized |= one(tx);
                self.settle(&mut state.members[place], tx);
            }
            Action::Execute(place) => self.execute(&mut state, place),
            Action::Unlock(place, tx) => state.members[place].unlock(|holder| holder == tx),
            Action::Include(tx) => self.append(&mut state, Entry::Include(tx)),
            Action::Abort(tx) => self.append(&mut state, Entry::Abort(tx)),
            Action::LiarLeaves => state.liar_helps = false,
        }
        self.forget(&mut state);
        state.members.sort_unstable();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(NO_RIVALS_SETTLED, |model: &Self, state: &State| {
                let included = model.seen(state, state.length()).included;
                let settled = model.transactions().filter(|tx| model.is_final(state, *tx) || has(included, *tx));
                let settled = settled.fold(0, |set, tx| set | one(tx));
                items(settled).all(|tx| settled & model.rivals(tx) == 0)
            }),
            Property::always(FINAL_STAYS, |model: &Self, state: &State| {
                aborts(state).all(|tx| !model.is_final(state, tx))
            }),
            Property::always(UNCONTRADICTED_STAYS, |model: &Self, state: &State| {
                aborts(state).all(|tx| !has(model.fresh, tx) && model.rivals(tx) != 0)
            }),
            Property::always(ONE_WORD, |_, state: &State| {
                state.members.iter().all(|member| member.committed & member.abort_voted == 0)
            }),
            Property::always(NO_LOCK_LEFT, |model: &Self, state: &State| {
                state.members.iter().all(|member| member.locks == [None; COINS]) || !model.is_end(state)
            }),
            // What is decided stays decided, so it is enough to look at the ends.
            Property::eventually(DECIDED, |model: &Self, state: &State| model.is_decided(state)),
        ];
        properties.extend(self.reaches.iter().map(|(name, condition)| Property::sometimes(name, *condition)));
        properties
    }
}

pub const NO_RIVALS_SETTLED: &str = "no two conflicting transactions are settled";
pub const FINAL_STAYS: &str = "nothing final is aborted";
pub const UNCONTRADICTED_STAYS: &str = "what nobody contradicts is never aborted";
pub const ONE_WORD: &str = "no member both commits to a transaction and votes to abort it";
pub const NO_LOCK_LEFT: &str = "no lock is left when nothing more can happen";
pub const DECIDED: &str = "everything is decided everywhere in the end";

fn aborts(state: &State) -> impl Iterator<Item = Tx> {
    state.chain.iter().flatten().filter_map(|entry| match entry {
        Entry::Abort(tx) => Some(*tx),
        Entry::Include(_) => None,
    })
}

/// Reachable, one hopes: what the tests ask of each setting.
pub mod reached {
    use super::{Bug, CHAIN, Entry, Finality, State, Tx, aborts, has};

    fn includes(state: &State) -> impl Iterator<Item = Tx> {
        state.chain.iter().flatten().filter_map(|entry| match entry {
            Entry::Include(tx) => Some(*tx),
            Entry::Abort(_) => None,
        })
    }

    /// Final by votes, before any block.
    pub fn by_votes(_: &Finality, state: &State) -> bool {
        state.length() == 0 && state.members.iter().any(|member| member.finalized != 0)
    }

    /// A block settles what no votes have made final.
    pub fn by_a_block_alone(model: &Finality, state: &State) -> bool {
        state.members.iter().any(|member| member.executed < state.length())
            && includes(state).any(|tx| !model.is_final(state, tx))
    }

    /// One of two rivals is aborted, then the other is settled.
    pub fn by_an_abort(_: &Finality, state: &State) -> bool {
        matches!(state.chain, [Some(Entry::Abort(aborted)), Some(Entry::Include(tx)), ..] if aborted != tx)
    }

    /// Both are aborted.
    pub fn both_aborted(_: &Finality, state: &State) -> bool {
        aborts(state).count() == 2
    }

    /// The freed coin is spent afresh.
    pub fn fresh_spend(model: &Finality, state: &State) -> bool {
        includes(state).any(|tx| has(model.fresh, tx))
    }

    /// F(T) comes to a member that has locked the coin for a rival, and takes the lock away.
    pub fn finality_beats_a_lock(model: &Finality, state: &State) -> bool {
        let beaten = |member: &super::Member| {
            let rivals = super::items(member.finalized).fold(0, |set, tx| set | model.rivals(tx));
            member.approved & rivals != 0
        };
        model.bug != Some(Bug::VotesFinal) && state.length() == 0 && state.members.iter().any(beaten)
    }

    /// All have locked the coin, and approvals alone get nobody further.
    pub fn split(model: &Finality, state: &State) -> bool {
        let locked = state.members.iter().all(|member| member.locks[0].is_some());
        locked && !state.liar_helps && model.transactions().all(|tx| !model.has_certificate(state, tx))
    }

    /// A transaction dies because the chain settled its rival, and so a third one, which
    /// has contradicted only the dead one, is settled too.
    pub fn freed_by_the_chain(_: &Finality, state: &State) -> bool {
        let mut settled: Vec<Tx> = includes(state).collect();
        settled.sort_unstable();
        settled == [0, 2] && state.chain[CHAIN - 1].is_none()
    }
}
