//! From a seed to a run: what kind of network, what happens to it and when, and what has to
//! be true once it has healed.

use std::collections::BTreeSet;

use time_masternode::types::{OutPoint, Txid, UTXOState};

use super::core_net::Rng;
use super::coverage::Coverage;
use super::network::{CALM, Weather};
use super::planted::Planted;
use super::setting::setting_of;
use super::violation::{Violation, catch};
use super::wallets::Wallets;
use super::world::{Shape, World, short};

/// How long a healed network may take for all that is open.
const HEALING_MS: u64 = 120_000;

/// What happens how often in a run, as weights of a lot.
#[derive(Debug)]
struct Habits {
    steps: usize,
    pass: u64,
    pay: u64,
    send_again: u64,
    crash: u64,
    start: u64,
    silence: u64,
    funnel: u64,
    lag: u64,
    clear: u64,
    reconnect: u64,
    lie: u64,
    lose_disk: u64,
    image: u64,
    ambush: u64,
    duel: u64,
    disinherit: u64,
    payments: usize,
}

/// Everything that a seed decides before the first step.
fn shape_of(rng: &mut Rng) -> Shape {
    let weights: Vec<u64> = match rng.below(20) {
        0 => vec![1],
        1..=12 => vec![1; 4],
        13..=16 => vec![1; 7],
        17 => vec![2, 1, 1, 1],
        18 => vec![3, 3, 2, 2, 1],
        _ => vec![1, 2, 2, 2, 2, 1],
    };
    let total: u64 = weights.iter().sum();
    let mut liars = BTreeSet::new();
    if rng.chance(600) {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        rng.shuffle(&mut order);
        let (mut weight, most) = (0, (total - 1) / 3);
        for i in order {
            if weight + weights[i] <= most {
                weight += weights[i];
                liars.insert(i);
            }
        }
    }
    let weather = Weather {
        loss: rng.pick(&[0, 30, 150, 300]),
        duplicate: rng.pick(&[0, 100]),
        max_delay_ms: rng.pick(&[20, 100, 600, 2_000]),
    };
    Shape {
        weights,
        liars,
        puppets: rng.chance(500),
        weather,
        interval_ms: rng.pick(&[100, 300, 1_000, 4_000]),
        power_cut: rng.pick(&[0, 0, 5, 20]),
        events_per_commit: rng.pick(&[1, 4, 16]),
        retention: rng.pick(&[None, None, Some(0), Some(2)]),
        fence_page: rng.pick(&[2, 5, 1_000]),
    }
}

fn habits_of(rng: &mut Rng, shape: &Shape) -> Habits {
    // A member's votes may be lost only where the others are a quorum without it.
    let can_lose = shape.weights.len() > 3;
    let crashes = rng.pick(&[0, 2, 6]);
    Habits {
        steps: 60 + rng.below(120),
        pass: 40,
        pay: rng.pick(&[6, 12, 20]),
        send_again: rng.pick(&[0, 6]),
        crash: crashes,
        start: 2 * crashes + 1,
        silence: rng.pick(&[0, 2, 6]),
        funnel: rng.pick(&[0, 1, 3]),
        lag: rng.pick(&[0, 2]),
        clear: 3,
        reconnect: rng.pick(&[1, 4]),
        lie: rng.pick(&[5, 20]),
        lose_disk: if can_lose { rng.pick(&[0, 1, 3]) } else { 0 },
        image: if can_lose { rng.pick(&[0, 2]) } else { 0 },
        ambush: rng.pick(&[0, 1, 3]),
        duel: rng.pick(&[0, 4, 10]),
        disinherit: if can_lose { rng.pick(&[0, 0, 1]) } else { 0 },
        payments: 6 + rng.below(14),
    }
}

/// Plays one seed to its end.
pub fn play(seed: u64, planted: Planted, trace: bool) -> Result<Coverage, Violation> {
    catch(|| {
        let mut rng = Rng::new(seed);
        let shape = shape_of(&mut rng);
        let habits = habits_of(&mut rng, &shape);
        let coins = 1 + u32::try_from(rng.below(4)).expect("below 4");
        let setting = setting_of(&shape.weights, coins, planted.is(Planted::ShortQuorum));
        let mut wallets = Wallets::new(&setting, coins, rng.pick(&[100, 400, 700]), rng.pick(&[100, 400, 700]));
        let speak = rng.chance(700);
        let mut world = World::new(setting, shape, planted, rng.next(), trace);
        world.liars.speak = speak;
        world.note(|| format!("{:?}", world.shape));
        chaos(&mut world, &mut wallets, &habits);
        heal(&mut world);
        settle(&mut world, &mut wallets);
        finish(world)
    })
}

fn chaos(world: &mut World, wallets: &mut Wallets, habits: &Habits) {
    let lot = [
        habits.pass,
        habits.pay,
        habits.send_again,
        habits.crash,
        habits.start,
        habits.silence,
        habits.funnel,
        habits.lag,
        habits.clear,
        habits.reconnect,
        habits.lie,
        habits.lose_disk,
        habits.image,
        habits.ambush,
        habits.duel,
        habits.disinherit,
    ];
    let (mut sent, mut contested): (Vec<Txid>, usize) = (Vec::new(), 0);
    for _ in 0..habits.steps {
        let n = world.members.len();
        let honest: Vec<usize> = world.honest().collect();
        let i = world.rng.pick(&honest);
        match draw(&mut world.rng, &lot) {
            0 => {
                let most = if world.rng.chance(80) { 1_500 } else { 150 };
                let ms = 10 + world.rng.below(most) as u64;
                world.pass(ms);
            }
            1 if sent.len() + contested < habits.payments => {
                if let Some(txid) = wallets.pay(world) {
                    sent.push(txid);
                    // Some are left to the liars to spread.
                    for _ in 0..world.rng.pick(&[0, 1, 1, 1, 1, 2]) {
                        let to = world.rng.pick(&honest);
                        world.submit(to, txid);
                    }
                }
            }
            2 if !sent.is_empty() => {
                let txid = world.rng.pick(&sent);
                world.submit(i, txid);
            }
            3 => {
                if world.rng.chance(500) {
                    world.crash(i);
                } else {
                    world.cut_power(i);
                }
            }
            4 => {
                world.start(i);
                world.connect_all();
            }
            5 if world.rng.chance(300) => split(world),
            5 => {
                let (from, to) = (world.rng.below(n), world.rng.below(n));
                world.network.silence(from, to);
            }
            6 => funnel(world, i, habits.lose_disk > 0),
            13 => ambush(world, wallets, i, habits.lose_disk > 0),
            14 if sent.len() + contested < habits.payments => contested += duel(world, wallets),
            15 => disinherit(world, wallets, i),
            7 => (0..n).for_each(|from| world.network.silence(from, i)),
            8 => world.network.unsilence(),
            9 => {
                let (a, b) = (world.rng.below(n), world.rng.below(n));
                world.disconnect(a, b);
                world.connect_all();
            }
            10 => world.lie(),
            11 => lose_votes(world, i),
            12 => world.take_image(i),
            _ => {}
        }
        tend(world);
    }
}

/// One of the numbered things, by its weight.
fn draw(rng: &mut Rng, lot: &[u64]) -> usize {
    let mut at = rng.next() % lot.iter().sum::<u64>();
    for (thing, weight) in lot.iter().enumerate() {
        if at < *weight {
            return thing;
        }
        at -= weight;
    }
    0
}

/// What operators do all the time: start what has stopped, and repair what was rolled back.
fn tend(world: &mut World) {
    for i in 0..world.members.len() {
        if !world.is_up(i) && world.rng.chance(60) {
            world.start(i);
            world.connect_all();
        }
        if world.members[i].is_rolled_back && world.rng.chance(100) {
            world.repair(i);
            world.start(i);
            world.connect_all();
        }
    }
}

/// A member loses its votes: its disk is gone, or comes back at an older state, or was put
/// back with its guard, which is repaired before it starts.
fn lose_votes(world: &mut World, i: usize) {
    if world.votes_lost.is_some() || !can_be_fenced(world, i) {
        return;
    }
    if world.imaged().is_some_and(|imaged| can_be_fenced(world, imaged)) && world.rng.chance(500) {
        return world.roll_back();
    }
    world.lose_disk(i);
    if world.rng.chance(700) {
        world.start(i);
        world.connect_all();
    }
}

/// Whether the others are a quorum.
fn can_be_fenced(world: &World, i: usize) -> bool {
    let total: u64 = world.shape.weights.iter().sum();
    total - world.shape.weights[i] > 2 * total / 3
}

/// For a while one member hears everybody and nobody else hears anybody: it comes to know
/// certificates that nobody else knows. Then it may lose all that.
fn funnel(world: &mut World, i: usize, loses: bool) {
    world.only_hears(i);
    let ms = 300 + world.rng.below(3_000) as u64;
    world.pass(ms);
    world.network.unsilence();
    if loses && world.rng.chance(500) {
        lose_votes(world, i);
    }
}

/// One member alone decides a block, goes on to the next, and may lose its votes before
/// anybody has heard of either.
fn ambush(world: &mut World, wallets: &mut Wallets, i: usize, loses: bool) {
    let everybody = |world: &mut World, wallets: &mut Wallets| {
        if let Some(txid) = wallets.fresh(world).map(|coin| wallets.spend(world, &[coin])) {
            (0..world.members.len()).for_each(|to| world.submit(to, txid));
        }
    };
    world.ambush = Some(i);
    everybody(world, wallets);
    for _ in 0..20 {
        world.pass(150);
        if world.ambush.is_none() {
            break;
        }
    }
    if world.ambush.take().is_some() {
        return;
    }
    world.pass(100);
    everybody(world, wallets);
    let ms = 2_500 + world.rng.below(2_500) as u64;
    world.pass(ms);
    world.network.unsilence();
    if loses && world.votes_lost.is_none() && can_be_fenced(world, i) {
        world.lose_disk(i);
        world.start(i);
        world.connect_all();
        let ms = 500 + world.rng.below(4_000) as u64;
        world.pass(ms);
    }
}

/// The network falls into two parts, and nothing passes between them.
fn split(world: &mut World) {
    let n = world.members.len();
    let side: Vec<bool> = (0..n).map(|_| world.rng.chance(500)).collect();
    let pairs = (0..n).flat_map(|from| (0..n).map(move |to| (from, to)));
    pairs.filter(|(from, to)| side[*from] != side[*to]).for_each(|(from, to)| world.network.silence(from, to));
}

/// A payment and one that spends its output are made in quick succession; a member that may
/// have voted on both loses its votes before a block has either, and is then asked to vote on
/// something else that spends that output.
fn disinherit(world: &mut World, wallets: &mut Wallets, i: usize) {
    if world.votes_lost.is_some() || !can_be_fenced(world, i) {
        return;
    }
    let Some(coin) = wallets.fresh(world) else { return };
    let all = 0..world.members.len();
    let parent = wallets.spend(world, &[coin]);
    all.clone().for_each(|to| world.submit(to, parent));
    let ms = 100 + world.rng.below(600) as u64;
    world.pass(ms);
    let output = OutPoint { txid: parent, vout: 0 };
    if !wallets.is_worth_spending(&output) {
        return;
    }
    let child = wallets.spend(world, &[output]);
    all.for_each(|to| world.submit(to, child));
    let ms = 50 + world.rng.below(600) as u64;
    world.pass(ms);
    world.lose_disk(i);
    world.start(i);
    world.connect_all();
    let rival = wallets.spend(world, &[output]);
    for _ in 0..3 {
        let ms = 50 + world.rng.below(500) as u64;
        world.pass(ms);
        world.submit(i, rival);
    }
}

/// One coin is spent several times in one instant, at different members.
fn duel(world: &mut World, wallets: &mut Wallets) -> usize {
    let Some(coin) = wallets.fresh(world) else { return 0 };
    world.coverage.duels += 1;
    let mut at: Vec<usize> = world.honest().collect();
    world.rng.shuffle(&mut at);
    let most = 2 + world.rng.below(3);
    let rivals: Vec<_> = at.into_iter().take(most).map(|to| (to, wallets.spend(world, &[coin]))).collect();
    rivals.iter().for_each(|(to, txid)| world.submit(*to, *txid));
    rivals.len()
}

/// Everything is mended. Only liars go on as they are.
fn heal(world: &mut World) {
    world.note(|| "the network heals".into());
    world.calm = true;
    world.network.unsilence();
    world.network.weather = CALM;
    // What only memory knows must neither be needed nor be in the way.
    let restart = world.rng.chance(300);
    for i in 0..world.members.len() {
        if world.members[i].is_rolled_back {
            world.repair(i);
        }
        // No write is about to fail any more: all that was written is synced.
        world.members[i].disk.lose_power(true);
        if restart {
            world.crash(i);
        }
        world.start(i);
    }
    world.connect_all();
}

/// Lets a calm network run until `done`, with liars that go on lying.
fn run_until(world: &mut World, most_ms: u64, mut done: impl FnMut(&World) -> bool) -> bool {
    let end = world.now_ms + most_ms;
    while !done(world) {
        if world.now_ms >= end {
            return false;
        }
        world.pass(200);
        world.connect_all();
        if world.rng.chance(300) {
            world.lie();
        }
    }
    true
}

/// What is open at an honest member, if anything is.
fn open(world: &World) -> Option<String> {
    let height = world.history.height();
    for i in world.honest() {
        let book = &world.members[i].book;
        if book.height < height {
            return Some(format!("member {i} has {} of {height} blocks", book.height));
        }
        if let Some(txid) = book.in_flight.keys().next() {
            return Some(format!("{} is in flight at member {i}", short(txid)));
        }
        let locked = book.utxos.iter().find(|(_, utxo)| matches!(utxo.state, UTXOState::Locked { .. }));
        if let Some((outpoint, _)) = locked {
            return Some(format!("{outpoint} is locked at member {i}"));
        }
        if let Some(txid) = book.unconfirmed.first() {
            return Some(format!("{} is in no block at member {i}", short(txid)));
        }
    }
    None
}

/// Liveness. Without a quorum of honest members whose votes count, nothing is promised.
fn settle(world: &mut World, wallets: &mut Wallets) {
    let total: u64 = world.shape.weights.iter().sum();
    if world.sound_weight() <= 2 * total / 3 {
        world.pass(3_000);
        return;
    }
    world.coverage.live_seeds += 1;
    let promised: Vec<Txid> = promised(world);
    if !run_until(world, HEALING_MS, |world| open(world).is_none()) {
        let what = open(world).unwrap_or_default();
        super::violation::violated(format!("long after healing, {what}"));
    }
    for txid in promised {
        ensure!(
            world.history.is_confirmed(&txid),
            "{txid} was acknowledged, nobody contradicts it, and it is in no block"
        );
    }
    if world.rng.chance(400) {
        contest_everything(world, wallets);
    }
    spend_everything(world, wallets);
    if !world.liars.speak || world.shape.liars.is_empty() {
        // The last members may be in the middle of saying what was decided.
        world.pass(3_000);
        let before = world.coverage.block_messages;
        world.pass(6_000);
        ensure!(
            world.coverage.block_messages == before,
            "there is nothing to put into a block, and members talk of one"
        );
    }
}

/// Conflicts come to an end, also on coins on which there was one before.
fn contest_everything(world: &mut World, wallets: &mut Wallets) {
    for _ in 0..2 {
        let before = world.coverage.duels;
        for _ in 0..3 {
            duel(world, wallets);
        }
        if !run_until(world, HEALING_MS, |world| open(world).is_none()) {
            let what = open(world).unwrap_or_default();
            super::violation::violated(format!("long after a conflict on a calm network, {what}"));
        }
        if world.coverage.duels == before {
            return;
        }
    }
}

/// Every coin that nobody has spent can be spent: by a payment of it, or by a rival that
/// liars bring to light. What rivals abort together is tried again.
fn spend_everything(world: &mut World, wallets: &mut Wallets) {
    let unspent = world.history.unspent().keys().copied();
    let mut coins: Vec<OutPoint> = unspent.filter(|coin| wallets.owns(coin)).collect();
    while !coins.is_empty() {
        let height = world.history.height();
        let mut payments = Vec::new();
        for coin in coins.drain(..) {
            let txid = wallets.spend(world, &[coin]);
            let rivals = world.history.rivals(&txid);
            let contradicted = rivals.iter().any(|rival| !world.history.is_dead(rival, height));
            let honest: Vec<usize> = world.honest().collect();
            let to = world.rng.pick(&honest);
            world.submit(to, txid);
            payments.push((coin, txid, contradicted));
        }
        let dead = |world: &World, txid: &Txid| world.history.is_dead(txid, world.history.height());
        let ended = |world: &World, txid: &Txid| world.history.is_confirmed(txid) || dead(world, txid);
        let over = |world: &World| payments.iter().all(|(_, txid, _)| ended(world, txid)) && open(world).is_none();
        if !run_until(world, HEALING_MS, over) {
            let stuck = payments.iter().find(|(_, txid, _)| !ended(world, txid));
            let stuck = stuck.map(|(coin, txid, _)| format!("{coin} is unspent and {} does not spend it", short(txid)));
            super::violation::violated(stuck.or_else(|| open(world)).unwrap_or_default());
        }
        for (coin, txid, contradicted) in payments {
            ensure!(
                contradicted || !dead(world, &txid),
                "{} spends {coin}, is contradicted by nobody, and is dead",
                short(&txid)
            );
            if world.history.unspent().contains_key(&coin) {
                coins.push(coin);
            }
        }
    }
}

/// What an honest member holds locks for and nobody contradicts.
fn promised(world: &World) -> Vec<Txid> {
    let books = world.honest().map(|i| &world.members[i].book);
    let locked = books.flat_map(|book| book.in_flight.iter().filter(|(_, row)| row.locked_at.is_some()));
    let txids: BTreeSet<Txid> = locked.map(|(txid, _)| *txid).collect();
    txids.into_iter().filter(|txid| world.history.is_uncontradicted(txid)).collect()
}

fn finish(mut world: World) -> Coverage {
    for i in world.honest().collect::<Vec<_>>() {
        let member = &world.members[i];
        if let Some(process) = &member.process {
            member.book.check_log(&process.reader);
        }
    }
    let history = &world.history;
    let children = |txid: &&Txid| history.bodies[txid].spends().any(|at| history.bodies.contains_key(&at.txid));
    let confirmed = history.bodies.keys().filter(|txid| history.is_confirmed(txid));
    let confirmed_children = confirmed.clone().filter(children).count() as u64;
    let dead = history.bodies.keys().filter(|txid| history.is_dead(txid, u64::MAX)).count();
    let coverage = &mut world.coverage;
    coverage.confirmed += confirmed.count() as u64;
    coverage.confirmed_children += confirmed_children;
    coverage.chain_aborts += history.aborts() as u64;
    coverage.killed_by_inclusion += (dead - history.aborts().min(dead)) as u64;
    coverage.seeds += 1;
    world.coverage
}
