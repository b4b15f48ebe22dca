//! Contested coins, and the chain, on real networks of which some members lie.
//!
//! The story: owners sign transactions that contradict each other, alone, in threes and in
//! chains over several coins, and send them to different members at once. As many members
//! as the protocol bears lie: they vote for everything, show a certificate to one member
//! only, claim to have locked rivals, put two blocks forward in one round or none, and
//! spread bodies under keys that own nothing (`support/liar.rs`). Whatever they do, every
//! contested coin is soon spent in the chain or can be spent by a new transaction, no two
//! rivals are ever final, honest members agree on who has spent what, and none of them
//! stops or falls silent. Nobody helps.
//!
//! `TIME_CONFLICT_ROUNDS=1000` contests more often, `TIME_SEED=17` lies differently.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

#[path = "support/liar.rs"]
mod liar;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use liar::{BlockLie, CoinLie, HistoryLie, Liars, Lies, Rng};
use support::{Coin, Link, TestNet, Wallet, until, within};
use time_masternode::net::{GetBlocks, GetTransactions, NetworkMessage, TransactionStatusKind};
use time_masternode::types::{Amount, DecidedBlock, OutPoint, Output, SecretKey, Transaction, Txid, UTXOState};
use tokio::sync::{Mutex, MutexGuard};

/// Groups of rivals that are contested at once.
const GROUPS_AT_ONCE: usize = 40;

fn seed() -> u64 {
    let seed = std::env::var("TIME_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("TIME_SEED={seed}");
    seed
}

fn rounds() -> usize {
    std::env::var("TIME_CONFLICT_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(GROUPS_AT_ONCE)
}

/// Each network is many processes; two at once would only wait for each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// A network of which some members lie.
struct Contest {
    net: TestNet,
    honest: Vec<usize>,
    liars: Liars,
    rng: Rng,
    /// Given back when everything else is gone.
    _turn: MutexGuard<'static, ()>,
}

/// Coins and what contests them.
struct Group {
    coins: Vec<Coin>,
    rivals: Vec<Transaction>,
    /// Rivals that only the liars have.
    ghosts: Vec<Transaction>,
}

impl Contest {
    async fn new(nodes: u16, liars: &[usize], lies: Lies) -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let seed = seed();
        let mut net = TestNet::new(nodes);
        let honest: Vec<usize> = (0..usize::from(nodes)).filter(|node| !liars.contains(node)).collect();
        let liars = Liars::start(&net, liars, seed, lies).await;
        honest.iter().for_each(|&node| net.start(node));
        net.wait_ready(&honest);
        liars.connected().await;
        Self { _turn: turn, net, honest, liars, rng: Rng::new(seed) }
    }

    /// A wallet at each honest node.
    async fn wallets(&self) -> Vec<Wallet> {
        let mut wallets = Vec::new();
        for &node in &self.honest {
            wallets.push(self.net.wallet(node).await);
        }
        wallets
    }

    /// `n` coins out of one, on all honest nodes.
    async fn split(&self, coin: &Coin, n: usize) -> Vec<Coin> {
        let split = self.net.split(coin, n as u64);
        let mut wallets = self.wallets().await;
        wallets[0].pay(&split).await;
        for wallet in &mut wallets {
            wallet.until_final(split.txid()).await;
        }
        TestNet::outputs(&split, &coin.key)
    }

    /// The greatest coin that the second wallet has.
    async fn free_coin(&self) -> Coin {
        let first = self.net.coins().remove(1);
        let mut wallet = self.net.wallet(self.honest[0]).await;
        let coins = wallet.coins_of(&self.net.address(&first.key)).await.utxos;
        let greatest = coins.into_iter().max_by_key(|coin| coin.output.amount).unwrap();
        Coin { outpoint: greatest.outpoint, amount: greatest.output.amount, key: first.key }
    }

    /// Spends all of `coins`, and pays a stranger.
    fn spend(&self, coins: &[&Coin]) -> Transaction {
        let coins: Vec<Coin> = coins.iter().copied().cloned().collect();
        let sum: u64 = coins.iter().map(|coin| coin.amount.units()).sum();
        let amount = Amount::from_units(sum - self.net.genesis.min_fee().units()).unwrap();
        let output = Output { amount, address: self.net.address(&SecretKey::generate()) };
        self.net.sign(&coins, vec![output], 0)
    }

    fn group(&mut self, coins: &mut Vec<Coin>) -> Group {
        let mut take = |n: usize| coins.split_off(coins.len() - n);
        let kind = self.rng.below(4);
        let coins = take(if kind < 2 { 1 } else { 4 });
        let (rivals, mut ghosts) = match (kind, &coins[..]) {
            (0, [x]) => (vec![self.spend(&[x]), self.spend(&[x])], vec![self.spend(&[x])]),
            (1, [x]) => (vec![self.spend(&[x]), self.spend(&[x]), self.spend(&[x])], vec![self.spend(&[x])]),
            // Each shares a coin with the next.
            (2, [x, y, z, w]) => {
                (vec![self.spend(&[x, y]), self.spend(&[y, z]), self.spend(&[z, w])], vec![self.spend(&[w, x])])
            }
            // One against all, which contradict each other by pairs.
            (_, [x, y, z, w]) => {
                let rivals =
                    vec![self.spend(&[x, y, z, w]), self.spend(&[x, z]), self.spend(&[z, y]), self.spend(&[w])];
                (rivals, vec![self.spend(&[y, w])])
            }
            _ => unreachable!("one coin or four"),
        };
        if self.rng.below(2) == 0 {
            ghosts.clear();
        }
        Group { coins, rivals, ghosts }
    }

    /// The state of each coin on each honest node.
    async fn states(&self, wallets: &mut [Wallet], outpoints: &[OutPoint]) -> Vec<Vec<UTXOState>> {
        let mut by_node = Vec::new();
        for wallet in wallets {
            let states = wallet.states(outpoints).await;
            by_node.push(states.into_iter().map(|entry| entry.state.unwrap()).collect());
        }
        by_node
    }

    /// Contests these groups once; gives how long the slowest coin took to be spent or free,
    /// and how long until all were spent.
    /// Meanwhile one of the honest nodes may be killed and started again.
    async fn contest(&mut self, groups: Vec<Group>, victim: Option<usize>) -> (Duration, Duration) {
        self.liars.give_ghosts(groups.iter().flat_map(|group| group.ghosts.clone()));
        let mut to_node: Vec<Vec<Transaction>> = vec![Vec::new(); self.honest.len()];
        for group in &groups {
            let first = self.rng.below(self.honest.len());
            for (i, rival) in group.rivals.iter().enumerate() {
                to_node[(first + i) % self.honest.len()].push(rival.clone());
            }
        }
        let began = Instant::now();
        let mut sending = Vec::new();
        for (&node, payments) in self.honest.iter().zip(to_node) {
            sending.push(tokio::spawn(send_all(self.net.wallet(node).await, payments)));
        }
        let mut accepted = Vec::new();
        for sent in sending {
            accepted.push(sent.await.unwrap());
        }
        if let Some(victim) = victim {
            // Some time before, within or after the seconds in which it is decided.
            let moment = u64::try_from(self.rng.below(2_500)).unwrap();
            tokio::time::sleep(Duration::from_millis(moment)).await;
            self.net.kill(self.honest[victim]);
            self.net.start(self.honest[victim]);
            self.net.wait_ready(&self.honest);
            // What it had not written down it may have forgotten, and so cannot name.
            accepted[victim].clear();
        }
        let outpoints: Vec<OutPoint> = groups.iter().flat_map(|g| &g.coins).map(|coin| coin.outpoint).collect();
        let coins: BTreeMap<OutPoint, &Coin> =
            groups.iter().flat_map(|g| &g.coins).map(|coin| (coin.outpoint, coin)).collect();
        let mut known: Vec<Transaction> =
            groups.iter().flat_map(|group| group.rivals.iter().chain(&group.ghosts)).cloned().collect();
        let mut wallets = self.wallets().await;
        let mut settled = BTreeMap::new();
        let mut sent_again: BTreeSet<OutPoint> = BTreeSet::new();
        let spent = within("every contested coin to be spent", async {
            loop {
                let by_node = self.states(&mut wallets, &outpoints).await;
                let mut spent = BTreeMap::new();
                for (i, outpoint) in outpoints.iter().enumerate() {
                    let everywhere: Vec<UTXOState> = by_node.iter().map(|states| states[i]).collect();
                    let spender = |state: &UTXOState| match state {
                        UTXOState::Confirmed { txid, .. } => Some(*txid),
                        _ => None,
                    };
                    let spenders: BTreeSet<Option<Txid>> = everywhere.iter().map(spender).collect();
                    let final_ones: BTreeSet<Txid> = everywhere.iter().filter_map(final_spender).collect();
                    assert!(final_ones.len() <= 1, "two rivals are final: {everywhere:?}");
                    let free = everywhere.iter().all(|state| *state == UTXOState::Unspent);
                    if let Some(Some(txid)) = spenders.first().filter(|_| spenders.len() == 1) {
                        spent.insert(*outpoint, *txid);
                        settled.entry(*outpoint).or_insert_with(|| began.elapsed());
                    } else if free {
                        settled.entry(*outpoint).or_insert_with(|| began.elapsed());
                        sent_again.insert(*outpoint);
                        // Free again: a new transaction takes it, unless a liar's ghost does.
                        let again = self.spend(&[coins[outpoint]]);
                        let node = self.rng.below(wallets.len());
                        wallets[node].broadcast(&again).await;
                        known.push(again);
                    }
                }
                if spent.len() == outpoints.len() {
                    return spent;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
        .await;
        let all_spent = began.elapsed();
        self.assert_ends(&mut wallets, &known, &spent, &accepted).await;
        eprintln!("{} coins, {} of them free again before they were spent", outpoints.len(), sent_again.len());
        (settled.into_values().max().unwrap(), all_spent)
    }

    /// Whoever spends is confirmed on every node, and everybody else is dead or was never
    /// taken; the node that took it says why.
    async fn assert_ends(
        &self,
        wallets: &mut [Wallet],
        known: &[Transaction],
        spent: &BTreeMap<OutPoint, Txid>,
        accepted: &[BTreeSet<Txid>],
    ) {
        let winners: BTreeSet<Txid> = spent.values().copied().collect();
        let by_txid: BTreeMap<Txid, &Transaction> = known.iter().map(|t| (t.txid(), t)).collect();
        for (txid, transaction) in &by_txid {
            let won = winners.contains(txid);
            if won {
                let has_all = transaction.spends().all(|outpoint| spent[&outpoint] == *txid);
                assert!(has_all, "{txid} has spent one of its coins and not another");
            }
            let rivals = |other: &Txid| {
                by_txid.get(other).is_some_and(|t| t.spends().any(|a| transaction.spends().any(|b| a == b)))
            };
            for (i, wallet) in wallets.iter_mut().enumerate() {
                let status = wallet.query(*txid).await;
                let expected: &[_] = match won {
                    true => &[TransactionStatusKind::Confirmed],
                    false => &[TransactionStatusKind::Aborted, TransactionStatusKind::Unknown],
                };
                assert!(expected.contains(&status.status), "{txid} at node {}: {status:?}", self.honest[i]);
                if accepted[i].contains(txid) && !won {
                    assert_eq!(status.status, TransactionStatusKind::Aborted, "node {} took {txid}", self.honest[i]);
                    let by = status.rejection.as_ref().and_then(|rejection| rejection.by);
                    assert!(by.as_ref().is_some_and(rivals), "{txid} at node {}: {status:?}", self.honest[i]);
                }
            }
        }
    }

    fn assert_alive(&mut self) {
        for &node in &self.honest {
            assert!(self.net.is_running(node), "node {node} has stopped:\n{}", self.net.log(node));
            assert_eq!(self.net.status(node)["voting"], "Active", "node {node}");
        }
    }

    /// Nothing is in flight, and everything that is final is in the chain, everywhere the
    /// same.
    fn until_idle(&self) {
        until("rest", || {
            let heights: BTreeSet<_> =
                self.honest.iter().map(|&node| self.net.status(node)["height"].as_u64()).collect();
            let idle = self.honest.iter().all(|&node| {
                let metrics = self.net.http(node, "/metrics").map(|answer| answer.1).unwrap_or_default();
                let none = |name: &str| metrics.lines().any(|line| line == format!("{name} 0"));
                none("time_in_flight") && none("time_unconfirmed")
            });
            (heights.len() == 1 && idle).then_some(())
        });
    }

    fn has_met_every_lie(&self) -> bool {
        let deeds = self.liars.deeds();
        EVERY_LIE.iter().all(|lie| deeds.of(lie) > 0)
    }

    /// Waits until all honest nodes have the same chain, and gives it.
    async fn same_chain(&self) -> Vec<DecidedBlock> {
        self.until_idle();
        let first = chain(&self.net, self.honest[0]).await;
        for &node in &self.honest[1..] {
            let hashes = |chain: &[DecidedBlock]| -> Vec<_> {
                chain.iter().map(|decided| decided.certificate.block_hash).collect()
            };
            assert_eq!(hashes(&chain(&self.net, node).await), hashes(&first), "node {node}");
        }
        first
    }
}

/// Who has spent a coin for ever.
fn final_spender(state: &UTXOState) -> Option<Txid> {
    match state {
        UTXOState::SpentFinalized { txid, .. } | UTXOState::Confirmed { txid, .. } => Some(*txid),
        UTXOState::Unspent | UTXOState::Locked { .. } => None,
    }
}

/// Sends all of them at once; gives those that were taken.
async fn send_all(mut wallet: Wallet, payments: Vec<Transaction>) -> BTreeSet<Txid> {
    for payment in &payments {
        wallet.broadcast(payment).await;
    }
    let mut answers = BTreeMap::new();
    while answers.len() < payments.len() {
        match within("an answer", wallet.client.next()).await.unwrap() {
            NetworkMessage::TransactionStatus(status) => {
                answers.entry(status.txid).or_insert(status.status);
            }
            NetworkMessage::Error(error) => panic!("{error:?}"),
            _ => {}
        }
    }
    let taken = answers.into_iter().filter(|(_, status)| *status != TransactionStatusKind::Rejected);
    taken.map(|(txid, _)| txid).collect()
}

/// A node's whole chain.
async fn chain(net: &TestNet, node: usize) -> Vec<DecidedBlock> {
    let mut link = Link::wallet(net, node).await;
    let mut chain: Vec<DecidedBlock> = Vec::new();
    loop {
        let from_height = chain.len() as u64 + 1;
        link.send(&NetworkMessage::GetBlocks(GetBlocks { from_height, limit: 50 })).await;
        let page = link
            .wait_for("blocks", |message| match message {
                NetworkMessage::Blocks(blocks) => Some(blocks.blocks),
                _ => None,
            })
            .await;
        if page.is_empty() {
            return chain;
        }
        chain.extend(page);
    }
}

/// What liars that tell [`Lies::ALL`] come to do sooner or later.
const EVERY_LIE: [&str; 6] =
    ["votes", "hidden certificates", "rivals locked", "wrong keys", "ghosts", "votes on blocks"];

/// Lets conflicts end, as many as are wanted, with honest nodes killed meanwhile or not.
async fn conflicts_end(nodes: u16, liars: &[usize], kill: bool) {
    let mut contest = Contest::new(nodes, liars, Lies::ALL).await;
    let rounds = rounds();
    let mut mothers = Vec::new();
    for coin in contest.net.coins() {
        mothers.extend(contest.split(&coin, rounds.div_ceil(4 * GROUPS_AT_ONCE) + 1).await);
    }
    let (mut done, mut slowest_free, mut slowest_spent) = (0, Duration::ZERO, Duration::ZERO);
    // On a slow machine it takes longer until the liars have told every lie.
    while done < rounds || (!contest.has_met_every_lie() && !mothers.is_empty()) {
        let mother = mothers.pop().unwrap();
        let mut coins = contest.split(&mother, 4 * GROUPS_AT_ONCE).await;
        let groups: Vec<Group> =
            (0..GROUPS_AT_ONCE.min(rounds.max(done + 1) - done)).map(|_| contest.group(&mut coins)).collect();
        done += groups.len();
        let victim = kill.then(|| contest.rng.below(contest.honest.len()));
        let (free, spent) = contest.contest(groups, victim).await;
        (slowest_free, slowest_spent) = (slowest_free.max(free), slowest_spent.max(spent));
        contest.assert_alive();
        eprintln!("{done} of {rounds} groups: free or spent within {free:?}, all spent within {spent:?}");
    }
    eprintln!("the slowest coin was free or spent after {slowest_free:?}; all were spent after {slowest_spent:?}");
    let deeds = contest.liars.deeds();
    eprintln!("what the liars did: {deeds:?}");
    assert!(contest.has_met_every_lie(), "one of {EVERY_LIE:?} was never told: {deeds:?}");
    let chain = contest.same_chain().await;
    let mut seen = BTreeSet::new();
    let twice = chain.iter().flat_map(|decided| &decided.block.transactions).find(|txid| !seen.insert(**txid));
    assert_eq!(twice, None, "no transaction stands in the chain twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_end_on_four_nodes_of_which_one_lies() {
    conflicts_end(4, &[3], false).await;
}

/// `kill -9` of an honest node in the middle of every contest: with the liar that is more
/// than a third, so nothing ends before it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_end_although_nodes_are_killed_and_one_lies() {
    conflicts_end(4, &[1], true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_end_on_seven_nodes_of_which_two_lie() {
    conflicts_end(7, &[2, 3], false).await;
}

/// Payments that nobody contradicts, one after the other, for so many blocks more. With as
/// many blocks as there are members the turn comes to each of them.
async fn chain_goes_on(contest: &Contest, blocks: u64) -> Vec<Transaction> {
    let mut wallets = contest.wallets().await;
    let mut coin = contest.free_coin().await;
    let mut payments = Vec::new();
    let height = |contest: &Contest| contest.net.status(contest.honest[0])["height"].as_u64().unwrap();
    let end = height(contest) + blocks;
    while height(contest) < end {
        let payment = contest.net.pay(&coin, &contest.net.address(&SecretKey::generate()), 10);
        wallets[0].broadcast(&payment).await;
        for wallet in &mut wallets {
            until_confirmed(wallet, payment.txid()).await;
        }
        coin = TestNet::outputs(&payment, &coin.key).remove(1);
        payments.push(payment);
    }
    payments
}

async fn until_confirmed(wallet: &mut Wallet, txid: Txid) {
    within("confirmation", async {
        while wallet.query(txid).await.status != TransactionStatusKind::Confirmed {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

async fn chain_goes_on_with(blocks: BlockLie, deed: &str) {
    let lies = Lies { coins: None, blocks, history: HistoryLie::None };
    let mut contest = Contest::new(4, &[3], lies).await;
    chain_goes_on(&contest, 5).await;
    contest.assert_alive();
    contest.same_chain().await;
    let deeds = contest.liars.deeds();
    eprintln!("what the liar did: {deeds:?}");
    assert!(deeds.of(deed) > 0, "{deeds:?}");
}

#[tokio::test]
async fn the_chain_goes_on_when_proposals_are_withheld() {
    chain_goes_on_with(BlockLie::Withhold, "withheld proposals").await;
}

#[tokio::test]
async fn the_chain_goes_on_when_a_member_puts_two_blocks_forward() {
    chain_goes_on_with(BlockLie::Equivocate, "two proposals in a round").await;
}

#[tokio::test]
async fn the_chain_goes_on_when_a_member_puts_nonsense_forward() {
    chain_goes_on_with(BlockLie::Nonsense, "nonsense proposals").await;
}

#[tokio::test]
async fn the_chain_goes_on_when_a_member_shows_its_block_to_one() {
    chain_goes_on_with(BlockLie::OneMember, "proposals for one member").await;
}

/// An observer's process, with an empty directory.
struct Observer {
    process: std::process::Child,
    websocket: String,
}

impl Observer {
    fn start(net: &TestNet, name: &str) -> Self {
        let port = support::free_base_port(1);
        let address = |offset: u16| format!("127.0.0.1:{}", port + offset);
        let process = std::process::Command::new(env!("CARGO_BIN_EXE_time-masternode"))
            .args(["run", "--id", name, "--p2p-listen", &address(0), "--http-listen", &address(1)])
            .args(["--websocket-listen", &address(2), "--genesis-file"])
            .arg(net.directory().join(&net.devnet.genesis_file))
            .arg("--data-dir")
            .arg(net.directory().join(name))
            .stderr(std::fs::File::create(net.directory().join(format!("{name}.log"))).unwrap())
            .spawn()
            .unwrap();
        Self { process, websocket: address(2) }
    }

    fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone afterwards.
        let _killed = self.process.kill().is_ok() && self.process.wait().is_ok();
    }
}

/// The body of a transaction as a node gives it to a wallet.
async fn body_of(wallet: &mut Wallet, txid: Txid) -> Transaction {
    wallet.send(&NetworkMessage::GetTransactions(GetTransactions { txids: vec![txid], bodies_only: false })).await;
    let raw = wallet
        .wait_for("a body", |message| match message {
            NetworkMessage::Transactions(page) => page.transactions.into_iter().next().map(|entry| entry.transaction),
            _ => None,
        })
        .await;
    let outputs = raw.outputs.iter().map(|output| Output {
        amount: Amount::from_units(output.amount).unwrap(),
        address: output.address.parse().unwrap(),
    });
    Transaction::from_parts(raw.inputs, outputs.collect(), raw.timestamp)
}

/// Observers with empty directories join, and the liar serves each of them another bad
/// history. Each has the whole chain soon, from others, with every body under the keys that
/// own the coins, and goes on following it. The liar is heard once, and not again and
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn observers_catch_up_although_a_member_serves_bad_history() {
    let lies = Lies { history: HistoryLie::Mixed, ..Lies::NONE };
    let mut contest = Contest::new(4, &[3], lies).await;
    let mut payments = chain_goes_on(&contest, 3).await;
    let mut observers = Vec::new();
    for (i, lie) in HistoryLie::EACH.into_iter().enumerate() {
        observers.push((lie, Observer::start(&contest.net, &format!("observer-{i}"))));
        // The next one is told the next lie.
        until("the observer greets the liar", || (contest.liars.observers() > i).then_some(()));
    }
    payments.extend(chain_goes_on(&contest, 3).await);
    let last = payments.last().unwrap().txid();
    for (lie, observer) in &mut observers {
        let mut wallet = Wallet::at(&observer.websocket).await;
        until_confirmed(&mut wallet, last).await;
        for payment in &payments {
            assert_eq!(body_of(&mut wallet, payment.txid()).await, *payment, "{lie:?}");
        }
        assert!(observer.is_running(), "{lie:?}");
    }
    contest.assert_alive();
    let deeds = contest.liars.deeds();
    eprintln!("what the liar did: {deeds:?}");
    for lie in HistoryLie::EACH {
        let heard = deeds.of(lie.name());
        assert!(heard > 0, "{lie:?}: {deeds:?}");
        assert!(heard <= 5 || lie == HistoryLie::WrongKeys, "{lie:?} was heard {heard} times: {deeds:?}");
    }
}

/// The same to a member that was down for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_catches_up_although_another_serves_bad_history() {
    let helpful = Lies { coins: Some(CoinLie::Everything), blocks: BlockLie::Help, history: HistoryLie::None };
    let mut contest = Contest::new(4, &[3], helpful).await;
    let late = contest.honest.remove(0);
    for lie in [HistoryLie::Silent, HistoryLie::Forged, HistoryLie::Stale, HistoryLie::WrongKeys] {
        contest.liars.lie(helpful);
        contest.net.kill(late);
        let payments = chain_goes_on(&contest, 1).await;
        contest.liars.lie(Lies { history: lie, ..Lies::NONE });
        contest.net.start(late);
        let mut wallet = contest.net.wallet(late).await;
        for payment in &payments {
            until_confirmed(&mut wallet, payment.txid()).await;
            assert_eq!(body_of(&mut wallet, payment.txid()).await, *payment, "{lie:?}");
        }
        if lie != HistoryLie::WrongKeys {
            // It claims to have more, so it is asked for that in the end.
            until("the liar to be heard", || (contest.liars.deeds().of(lie.name()) > 0).then_some(()));
        }
        // Without the late one there is no quorum now.
        let payments = chain_goes_on(&contest, 1).await;
        until_confirmed(&mut wallet, payments.last().unwrap().txid()).await;
        assert!(contest.net.is_running(late), "{lie:?}:\n{}", contest.net.log(late));
    }
    contest.honest.insert(0, late);
    contest.assert_alive();
    contest.same_chain().await;
    eprintln!("what the liar did: {:?}", contest.liars.deeds());
}
