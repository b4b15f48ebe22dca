//! Lies about blocks: no proposal, two at once, nonsense; votes for everything or for
//! different blocks towards different members. To put forward blocks that are valid, the
//! liars follow the chain and its UTXO set as any member does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use time_masternode::consensus::{ConsensusMessage, ConsensusVote, Proposal, VoteKind, check_form};
use time_masternode::net::{GetBlocks, GetTransactions, NetworkMessage};
use time_masternode::types::{
    Block, BlockHash, ConsensusStep, DecidedBlock, Genesis, Height, OutPoint, Output, Transaction, Txid, UtxoDigest,
    consensus_vote_message, proposal_message,
};

use super::{Mind, Rng};

/// How long the liars wait for an answer before they ask somebody else.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What the liars do in the agreement on blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockLie {
    /// One of the others, chosen by height and round.
    Mixed,
    /// Nothing when it is a liar's turn, and no votes.
    Withhold,
    /// Two valid blocks in one round, each shown to a half of the members and voted for
    /// towards them; other members' blocks are voted for towards one half, against towards
    /// the other.
    Equivocate,
    /// Blocks that cannot be, and both votes on everything towards everybody.
    Nonsense,
    /// None when it is a liar's turn, and otherwise what the first honest member votes.
    Help,
    /// A valid block for one member only, which is told that it is voted for.
    OneMember,
}

impl BlockLie {
    const EACH: [Self; 4] = [Self::Withhold, Self::Equivocate, Self::Nonsense, Self::OneMember];
}

/// The chain as the liars know it.
pub(super) struct Chain {
    pub(super) decided: Vec<DecidedBlock>,
    /// How many of them are executed here.
    pub(super) executed: usize,
    executed_at: Instant,
    outputs: BTreeMap<OutPoint, Output>,
    digest: UtxoDigest,
    ended: BTreeSet<Txid>,
    claimed: Height,
    asked_at: Instant,
    /// Who was heard in which round of the open height.
    rounds: BTreeMap<u32, BTreeSet<usize>>,
    turns_taken: BTreeSet<(Height, u32)>,
    voted: BTreeSet<(Height, u32, BlockHash)>,
    echoed: BTreeSet<(Height, u32, bool)>,
}

impl Chain {
    pub(super) fn of_genesis(genesis: &Genesis) -> Self {
        let outputs: BTreeMap<_, _> = genesis.transaction().creates().collect();
        let mut digest = UtxoDigest::new();
        outputs.iter().for_each(|(outpoint, output)| digest.add(outpoint, output));
        Self {
            decided: Vec::new(),
            executed: 0,
            executed_at: Instant::now(),
            outputs,
            digest,
            ended: BTreeSet::new(),
            claimed: 0,
            asked_at: Instant::now(),
            rounds: BTreeMap::new(),
            turns_taken: BTreeSet::new(),
            voted: BTreeSet::new(),
            echoed: BTreeSet::new(),
        }
    }

    fn tip(&self) -> Option<&DecidedBlock> {
        self.executed.checked_sub(1).and_then(|last| self.decided.get(last))
    }

    fn open_height(&self) -> Height {
        self.executed as Height + 1
    }

    /// The latest round of the open height in which anybody was heard.
    fn round(&self) -> u32 {
        self.rounds.last_key_value().map_or(0, |(round, _)| *round)
    }
}

impl Mind {
    fn block_lie(&self, height: Height, round: u32) -> BlockLie {
        let thing = [height.to_le_bytes(), u64::from(round).to_le_bytes()].concat();
        match self.lies.blocks {
            BlockLie::Mixed => Rng::about(self.seed ^ 2, &thing).pick(&BlockLie::EACH),
            lie => lie,
        }
    }

    pub(super) fn hear_height(&mut self, height: Height) {
        self.chain.claimed = self.chain.claimed.max(height);
    }

    pub(super) fn hear_blocks(&mut self, blocks: Vec<DecidedBlock>) {
        for decided in blocks {
            if decided.block.height == self.chain.decided.len() as Height + 1 {
                self.chain.decided.push(decided);
            }
        }
    }

    /// Executes what is decided and asks for what is missing; then, if it is a liar's turn
    /// and there is something to lie about, takes it.
    pub(super) fn follow_chain(&mut self) {
        while let Some(decided) = self.chain.decided.get(self.chain.executed).cloned() {
            if !self.execute(&decided) {
                break;
            }
        }
        let (height, now) = (self.chain.open_height(), Instant::now());
        let behind = self.chain.claimed >= height;
        if behind && now.duration_since(self.chain.asked_at) > ASK_AGAIN {
            self.chain.asked_at = now;
            let member = self.rng.pick(&self.honest);
            let decided = self.chain.decided.get(self.chain.executed);
            let missing = |txid: &&Txid| !self.coins.bodies.contains_key(txid);
            let txids: Vec<Txid> =
                decided.iter().flat_map(|d| &d.block.transactions).filter(missing).copied().collect();
            if txids.is_empty() {
                let from_height = self.chain.decided.len() as Height + 1;
                self.say_as(0, member, &NetworkMessage::GetBlocks(GetBlocks { from_height, limit: 50 }));
            }
            for txids in txids.chunks(500) {
                self.say_as(
                    0,
                    member,
                    &NetworkMessage::GetTransactions(GetTransactions { txids: txids.to_vec(), bodies_only: false }),
                );
            }
        }
        let due = self.chain.executed_at + Duration::from_millis(self.genesis.block_interval_ms());
        let round = self.chain.round();
        if !behind && (now >= due || round > 0) && self.liar_of_turn(height, round).is_some() {
            self.take_turn(height, round);
        }
    }

    fn transaction(&self, txid: &Txid) -> Option<Transaction> {
        let rules =
            time_masternode::consensus::Rules { network: self.genesis.network(), min_fee: self.genesis.min_fee() };
        check_form(self.coins.bodies.get(txid)?.clone(), &rules).ok()
    }

    /// Whether the bodies were here.
    fn execute(&mut self, decided: &DecidedBlock) -> bool {
        let bodies: Option<Vec<_>> = decided.block.transactions.iter().map(|txid| self.transaction(txid)).collect();
        let Some(bodies) = bodies else { return false };
        let chain = &mut self.chain;
        let (mut spent, mut paid) = (0, 0);
        for transaction in &bodies {
            for outpoint in transaction.spends() {
                let output = chain.outputs.remove(&outpoint).expect("a decided block spends what is there");
                chain.digest.remove(&outpoint, &output);
                chain.ended.extend(self.coins.spenders.get(&outpoint).into_iter().flatten());
                spent += output.amount.units();
            }
            for (outpoint, output) in transaction.creates() {
                chain.digest.add(&outpoint, &output);
                chain.outputs.insert(outpoint, output);
                paid += output.amount.units();
            }
        }
        if spent > paid {
            let maker = self.committee.index_of(&decided.block.proposer).unwrap();
            let address = self.committee.member(maker).payout_address;
            let output = Output { amount: time_masternode::types::Amount::from_units(spent - paid).unwrap(), address };
            let txid = Txid::from_bytes(*decided.certificate.block_hash.as_bytes());
            let outpoint = OutPoint { txid, vout: 0 };
            chain.digest.add(&outpoint, &output);
            chain.outputs.insert(outpoint, output);
        }
        chain.ended.extend(&decided.block.aborts);
        chain.executed += 1;
        chain.executed_at = Instant::now();
        chain.rounds.clear();
        true
    }

    fn proposer(&self, height: Height, round: u32) -> usize {
        let members = self.committee.members().len() as u64;
        usize::try_from((height + u64::from(round)) % members).unwrap()
    }

    fn liar_of_turn(&self, height: Height, round: u32) -> Option<usize> {
        self.liars.iter().position(|liar| liar.place == self.proposer(height, round))
    }

    pub(super) fn hear_consensus(&mut self, from: usize, message: &ConsensusMessage) {
        let height = message.height();
        self.hear_height(height - 1);
        if height != self.chain.open_height() {
            return;
        }
        let round = match message {
            ConsensusMessage::Proposal(proposal) => {
                let hash = proposal.block.hash(&self.genesis.hash());
                self.vote_on(height, proposal.round, hash);
                proposal.round
            }
            ConsensusMessage::Vote(vote) => {
                self.echo(vote);
                vote.round
            }
            ConsensusMessage::Polka(polka) => polka.round,
            ConsensusMessage::RoundChange(change) => change.round + u32::from(!change.skip),
        };
        self.chain.rounds.entry(round).or_default().insert(from);
    }

    fn echo(&mut self, vote: &ConsensusVote) {
        let (at, step) = ((vote.height, vote.round), vote.step);
        let first = self.chain.echoed.insert((at.0, at.1, step == ConsensusStep::Precommit));
        if first && self.block_lie(at.0, at.1) == BlockLie::Help {
            self.vote_on_block(step, at, vote.block_hash, &self.honest);
        }
    }

    fn vote_on_block(&self, step: ConsensusStep, at: (Height, u32), block: Option<BlockHash>, members: &[usize]) {
        let (height, round) = at;
        let message = consensus_vote_message(step, &self.genesis.hash(), height, round, block.as_ref());
        for (i, liar) in self.liars.iter().enumerate() {
            let (voter, signature) = (liar.key.public_key(), liar.key.sign(&message));
            let vote = ConsensusVote { step, height, round, block_hash: block, voter, signature };
            let message = NetworkMessage::Consensus(Arc::new(ConsensusMessage::Vote(vote)));
            members.iter().for_each(|&member| self.say_as(i, member, &message));
        }
    }

    fn vote_for(&self, at: (Height, u32), block: Option<BlockHash>, members: &[usize]) {
        self.vote_on_block(ConsensusStep::Prevote, at, block, members);
        self.vote_on_block(ConsensusStep::Precommit, at, block, members);
    }

    /// The honest members in two halves; which are which changes with height and round.
    fn halves(&self, height: Height, round: u32) -> [Vec<usize>; 2] {
        let mut members = self.honest.clone();
        let thing = [height.to_le_bytes(), u64::from(round).to_le_bytes()].concat();
        Rng::about(self.seed ^ 3, &thing).shuffle(&mut members);
        let other = members.split_off(members.len() / 2);
        [members, other]
    }

    /// A block of another member.
    fn vote_on(&mut self, height: Height, round: u32, hash: BlockHash) {
        if !self.chain.voted.insert((height, round, hash)) {
            return;
        }
        let (at, [some, others]) = ((height, round), self.halves(height, round));
        match self.block_lie(height, round) {
            BlockLie::Withhold | BlockLie::Mixed => return,
            BlockLie::Help => return,
            BlockLie::Equivocate => {
                self.vote_for(at, Some(hash), &some);
                self.vote_for(at, None, &others);
            }
            BlockLie::Nonsense => {
                for block in [Some(hash), None] {
                    self.vote_for(at, block, &self.honest);
                }
            }
            BlockLie::OneMember => self.vote_for(at, Some(hash), &some[..1]),
        }
        self.deeds.did("votes on blocks");
    }

    /// It is a liar's turn to put a block forward.
    fn take_turn(&mut self, height: Height, round: u32) {
        if self.chain.turns_taken.contains(&(height, round)) || height != self.chain.open_height() {
            return;
        }
        let (lie, at) = (self.block_lie(height, round), (height, round));
        let (rather_settle, rather_abort) = (self.make_block(true), self.make_block(false));
        let (Some(first), Some(mut second)) = (rather_settle, rather_abort) else { return };
        self.chain.turns_taken.insert(at);
        if first == second {
            second.timestamp_ms += 1;
        }
        let [some, others] = self.halves(height, round);
        match lie {
            BlockLie::Withhold | BlockLie::Help | BlockLie::Mixed => self.deeds.did("withheld proposals"),
            BlockLie::Equivocate => {
                for (block, members) in [(first, &some), (second, &others)] {
                    let hash = self.propose(at, block, members);
                    self.vote_for(at, Some(hash), members);
                }
                self.deeds.did("two proposals in a round");
            }
            BlockLie::OneMember => {
                let hash = self.propose(at, first, &some[..1]);
                self.vote_for(at, Some(hash), &some[..1]);
                self.deeds.did("proposals for one member");
            }
            BlockLie::Nonsense => {
                let honest = self.honest.clone();
                for block in self.nonsense(first) {
                    let hash = self.propose(at, block, &honest);
                    self.vote_for(at, Some(hash), &honest);
                }
                self.deeds.did("nonsense proposals");
            }
        }
    }

    fn propose(&self, (height, round): (Height, u32), block: Block, members: &[usize]) -> BlockHash {
        let liar = self.liar_of_turn(height, round).expect("it is a liar's turn");
        let (key, proposer) = (&self.liars[liar].key, self.liars[liar].key.public_key());
        let block = Arc::new(Block { proposer, ..block });
        let hash = block.hash(&self.genesis.hash());
        let signature = key.sign(&proposal_message(&self.genesis.hash(), height, round, &hash, -1));
        let proposal = Proposal { height, round, block, valid_round: -1, proposer, signature };
        let message = NetworkMessage::Consensus(Arc::new(ConsensusMessage::Proposal(proposal)));
        members.iter().for_each(|&member| self.say_as(liar, member, &message));
        hash
    }

    /// A valid block of all that the liars can prove. Where they can prove both, it either
    /// rather settles a transaction or rather aborts it. `None` if there is nothing.
    fn make_block(&self, rather_settle: bool) -> Option<Block> {
        let (mut transactions, mut aborts) = (Vec::new(), Vec::new());
        let (mut spent, mut created) = (BTreeSet::new(), BTreeSet::new());
        let mut open: Vec<(Txid, Transaction)> = Vec::new();
        for txid in self.coins.bodies.keys().filter(|txid| !self.chain.ended.contains(txid)) {
            let proven = |kind| self.is_proven(kind, *txid);
            let abort = proven(VoteKind::Abort);
            let settle = (proven(VoteKind::Commit) || proven(VoteKind::Approve)) && (rather_settle || !abort);
            let Some(transaction) = self.transaction(txid).filter(|_| settle || abort) else { continue };
            let list = if settle { &mut open } else { &mut aborts };
            list.push((*txid, transaction));
        }
        let mut more = true;
        while std::mem::take(&mut more) {
            open.retain(|(txid, transaction)| {
                let here =
                    |outpoint: &OutPoint| self.chain.outputs.contains_key(outpoint) || created.contains(outpoint);
                let takes = transaction.spends().all(|outpoint| here(&outpoint) && !spent.contains(&outpoint));
                if takes {
                    transactions.push(*txid);
                    spent.extend(transaction.spends());
                    created.extend(transaction.creates().map(|(outpoint, _)| outpoint));
                    more = true;
                }
                !takes
            });
        }
        let unspent = |outpoint: OutPoint| self.chain.outputs.contains_key(&outpoint) && !spent.contains(&outpoint);
        let aborts: Vec<Txid> =
            aborts.into_iter().filter(|(_, t)| t.spends().all(unspent)).map(|(txid, _)| txid).collect();
        if transactions.is_empty() && aborts.is_empty() {
            return None;
        }
        let tip = self.chain.tip();
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let genesis = BlockHash::from_bytes(*self.genesis.hash().as_bytes());
        let height = self.chain.open_height();
        Some(Block {
            height,
            previous_hash: tip.map_or(genesis, |tip| tip.certificate.block_hash),
            timestamp_ms: u64::try_from(now_ms).unwrap().max(tip.map_or(0, |tip| tip.block.timestamp_ms + 1)),
            // Whoever puts it forward is written into it then.
            proposer: self.liars[0].key.public_key(),
            state_digest: self.chain.digest.digest(),
            transactions,
            aborts,
        })
    }

    /// Blocks that cannot be, more than one round has room for.
    fn nonsense(&mut self, block: Block) -> Vec<Block> {
        let unheard_of: Vec<Txid> = (0..50).map(|_| Txid::from_bytes(rand::random())).collect();
        let with = |change: &dyn Fn(&mut Block)| {
            let mut changed = block.clone();
            change(&mut changed);
            changed
        };
        let mut blocks = vec![
            with(&|block| block.transactions.extend(&unheard_of)),
            with(&|block| block.aborts.extend(&unheard_of)),
            with(&|block| block.state_digest = UtxoDigest::new().digest()),
            with(&|block| block.previous_hash = BlockHash::from_bytes([9; 32])),
            with(&|block| block.timestamp_ms += 3_600_000),
            with(&|block| block.timestamp_ms = 1),
            with(&|block| block.transactions.reverse()),
            with(&|block| block.aborts.extend(block.transactions.clone())),
            with(&|block| block.transactions.extend(block.transactions.clone())),
        ];
        self.rng.shuffle(&mut blocks);
        blocks
    }
}
