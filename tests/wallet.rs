//! What a wallet is promised: it hears of every change of its coins, in order, exactly
//! once, whatever happens to its connection or to the node; nobody else can touch its
//! subscription; it costs the node nothing when it is slow; and what it is told about
//! finality it can prove to anybody.
//!
//! The tests rebuild the wallet's coins from a snapshot and the notifications after it.
//! Every change of the ledger concerns one of the subscribed addresses, so the sequence
//! has to go up by one each time: a gap or a duplicate cannot hide.

#![allow(clippy::unwrap_used, reason = "a test fails where it unwraps")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;
use support::{Coin, Link, TestNet, Wallet, until, within};
use time_masternode::consensus::{Certificate, CertificateError, Committee, VoteKind};
use time_masternode::limits::{MAX_SUBSCRIPTION_FILTERS, MAX_UTXOS_PER_PAGE};
use time_masternode::net::{
    AddressQuery, ErrorCode, FinalityProof, NetworkMessage, Nonce, TransactionStatusKind, UTXOStateNotification,
    UTXOStateNotificationMessage, UTXOSubscribe, UTXOSubscribed, UTXOUnsubscribe,
};
use time_masternode::types::{
    Address, Amount, Genesis, Hash32, OutPoint, Output, RawGenesis, SecretKey, Transaction, Txid, UTXOState, UtxoEntry,
};

/// A token that the wallet chooses itself.
fn token(byte: u8) -> String {
    hex::encode([byte; 32])
}

fn request(id: &str, addresses: &[Address]) -> UTXOSubscribe {
    UTXOSubscribe {
        outpoints: Vec::new(),
        addresses: addresses.iter().map(ToString::to_string).collect(),
        subscriber_id: id.into(),
        resume_token: None,
        resume_from: None,
        log_id: None,
    }
}

/// The same subscription of a wallet that returns.
fn resumption(request: &UTXOSubscribe, answer: &UTXOSubscribed, from: u64) -> UTXOSubscribe {
    UTXOSubscribe {
        resume_token: Some(answer.resume_token.clone()),
        resume_from: Some(from),
        log_id: Some(answer.log_id.clone()),
        ..request.clone()
    }
}

/// A wallet's coins as it knows them from its subscription.
struct Account {
    answer: UTXOSubscribed,
    /// The snapshot, then kept up with the notifications.
    coins: BTreeMap<OutPoint, (Output, UTXOState)>,
    sequence: u64,
    pages: Vec<usize>,
}

impl Account {
    /// Subscribes; afterwards the snapshot and what came with it are in the account.
    async fn open(link: &mut Link, request: &UTXOSubscribe) -> Self {
        link.send(&NetworkMessage::UTXOSubscribe(request.clone())).await;
        let answer = link
            .wait_for("the subscription", |message| match message {
                NetworkMessage::UTXOSubscribed(answer) => Some(answer),
                NetworkMessage::Error(error) => panic!("{error:?}"),
                _ => None,
            })
            .await;
        assert_eq!(answer.subscriber_id, request.subscriber_id);
        let mut account =
            Self { sequence: answer.sequence, coins: BTreeMap::new(), pages: vec![answer.utxos.len()], answer };
        account.add(account.answer.utxos.clone());
        let (mut more, mut early) = (account.answer.more, Vec::new());
        while more {
            match link.message().await.unwrap() {
                NetworkMessage::UTXOSnapshot(page) => {
                    assert_eq!(page.subscriber_id, request.subscriber_id);
                    account.pages.push(page.utxos.len());
                    account.add(page.utxos);
                    more = page.more;
                }
                NetworkMessage::UTXOStateNotification(notification) => early.push(notification),
                other => panic!("{other:?}"),
            }
        }
        early.into_iter().for_each(|notification| account.apply(notification));
        account
    }

    fn add(&mut self, utxos: Vec<UtxoEntry>) {
        for UtxoEntry { outpoint, output, state } in utxos {
            assert!(self.coins.insert(outpoint, (output, state)).is_none(), "{outpoint} stands twice in the snapshot");
        }
    }

    /// The next change: neither a gap nor a duplicate, and it fits what was known.
    fn apply(&mut self, message: UTXOStateNotificationMessage) {
        let UTXOStateNotificationMessage { sequence, notification } = message;
        assert_eq!(sequence, self.sequence + 1, "{notification:?}");
        self.sequence = sequence;
        let UTXOStateNotification { outpoint, output, old_state, new_state, .. } = notification;
        let known = self.coins.insert(outpoint, (output, new_state));
        // What is spent is no coin of the account any more; a block may still confirm it.
        let expected = old_state.filter(UTXOState::is_live).map(|state| (output, state));
        assert_eq!(known, expected, "{sequence}: {outpoint}");
        if !new_state.is_live() {
            self.coins.remove(&outpoint);
        }
    }

    /// Follows the stream up to a sequence.
    async fn follow(&mut self, link: &mut Link, to: u64) {
        while self.sequence < to {
            self.apply(notification(link).await);
        }
        assert_eq!(self.sequence, to);
    }

    fn total(&self) -> Amount {
        Amount::checked_sum(self.coins.values().map(|(output, _)| output.amount)).unwrap()
    }
}

/// The next notification; statuses are dropped.
async fn notification(link: &mut Link) -> UTXOStateNotificationMessage {
    link.wait_for("a notification", |message| match message {
        NetworkMessage::UTXOStateNotification(notification) => Some(notification),
        NetworkMessage::Error(error) => panic!("{error:?}"),
        _ => None,
    })
    .await
}

/// All live outputs of some addresses with their sum, page by page, and the last change.
/// Nothing may change meanwhile.
async fn holdings(
    wallet: &mut Wallet,
    addresses: &[Address],
) -> (BTreeMap<OutPoint, (Output, UTXOState)>, Amount, u64) {
    let (mut coins, mut after) = (BTreeMap::new(), None);
    loop {
        let addresses = addresses.iter().map(ToString::to_string).collect();
        let query = AddressQuery { addresses, after, limit: u32::MAX };
        wallet.send(&NetworkMessage::AddressQuery(query)).await;
        let page = wallet
            .wait_for("a page", |message| match message {
                NetworkMessage::AddressResponse(response) => Some(response),
                _ => None,
            })
            .await;
        assert!(page.utxos.len() <= MAX_UTXOS_PER_PAGE);
        coins.extend(page.utxos.into_iter().map(|u| (u.outpoint, (u.output, u.state))));
        after = page.next;
        if after.is_none() {
            return (coins, page.total, page.sequence);
        }
    }
}

/// Sends all at once, then waits until each is final.
async fn pay_all(wallet: &mut Wallet, payments: &[Transaction]) {
    for payment in payments {
        wallet.broadcast(payment).await;
    }
    let mut open: BTreeSet<Txid> = payments.iter().map(Transaction::txid).collect();
    while !open.is_empty() {
        let status = wallet
            .wait_for("finality", |message| match message {
                NetworkMessage::TransactionStatus(status) => Some(status),
                _ => None,
            })
            .await;
        assert_ne!(status.status, TransactionStatusKind::Rejected, "{:?}", status.rejection);
        if status.status.is_final() {
            open.remove(&status.txid);
        }
    }
}

/// Splits a coin into `n` of the same key.
async fn split(net: &TestNet, wallet: &mut Wallet, coin: &Coin, n: u64) -> Vec<Coin> {
    let split = net.split(coin, n);
    wallet.pay(&split).await;
    TestNet::outputs(&split, &coin.key)
}

/// Gives one key 256 coins for each of `n` coins.
async fn many_coins(net: &TestNet, wallet: &mut Wallet, coin: &Coin, n: u64) -> Vec<Coin> {
    let splits: Vec<_> = split(net, wallet, coin, n).await.iter().map(|coin| net.split(coin, 256)).collect();
    pay_all(wallet, &splits).await;
    splits.iter().flat_map(|split| TestNet::outputs(split, &coin.key)).collect()
}

/// The feed of a node that nobody follows sleeps. Whoever comes first wakes it, and hears of a
/// change after which there is no other.
#[tokio::test]
async fn the_first_to_follow_hears_of_the_only_change() {
    let mut net = TestNet::without_blocks(4);
    for node in 1..4 {
        net.kill(node);
    }
    for (round, payer) in net.coins().into_iter().take(3).enumerate() {
        let mut link = Link::web_socket(&net, 0).await;
        let account = Account::open(&mut link, &request(&format!("till-{round}"), &[net.address(&payer.key)])).await;
        let payment = net.pay(&payer, &net.address(&payer.key), 1_000);
        // Without the others nothing comes of it but the lock.
        net.wallet(0).await.broadcast(&payment).await;
        let heard = notification(&mut link).await;
        assert_eq!((heard.sequence, heard.notification.outpoint), (account.sequence + 1, payer.outpoint));
        assert_eq!(heard.notification.new_state.name(), "Locked");
    }
}

#[tokio::test]
async fn a_payment_is_heard_of_step_by_step() {
    let net = TestNet::without_blocks(4);
    let payer = net.coins().remove(0);
    let payee = SecretKey::generate();
    let addresses = [net.address(&payer.key), net.address(&payee)];
    let mut link = Link::web_socket(&net, 0).await;
    let account = Account::open(&mut link, &request("till", &addresses)).await;
    assert_eq!(account.coins.keys().copied().collect::<Vec<_>>(), [payer.outpoint]);
    assert!(!account.answer.reset);
    let payment = net.pay(&payer, &addresses[1], 1_000);
    let received = TestNet::outputs(&payment, &payee).remove(0);
    let onward = net.sign(
        std::slice::from_ref(&TestNet::outputs(&payment, &payer.key)[1]),
        vec![Output { amount: Amount::from_units(5).unwrap(), address: addresses[1] }],
        0,
    );
    let mut wallet = net.wallet(0).await;
    wallet.pay(&payment).await;
    wallet.pay(&onward).await;
    // Each step: which output, where it stood, where it stands, by the names of the states.
    let change = OutPoint { txid: payment.txid(), vout: 1 };
    let expected = [
        (payer.outpoint, Some("Unspent"), "Locked"),
        (payer.outpoint, Some("Locked"), "SpentFinalized"),
        (received.outpoint, None, "Unspent"),
        (change, None, "Unspent"),
        (change, Some("Unspent"), "Locked"),
        (change, Some("Locked"), "SpentFinalized"),
        (OutPoint { txid: onward.txid(), vout: 0 }, None, "Unspent"),
    ];
    for (sequence, (outpoint, old, new)) in (account.sequence + 1..).zip(expected) {
        let heard = notification(&mut link).await;
        assert_eq!(heard.sequence, sequence);
        let step = heard.notification;
        let old_state = step.old_state.as_ref().map(UTXOState::name);
        assert_eq!((step.outpoint, old_state, step.new_state.name()), (outpoint, old, new));
        assert_eq!(step.originator, net.devnet.nodes[0].id);
        let by = if outpoint == payer.outpoint { payment.txid() } else { onward.txid() };
        assert_eq!(step.new_state.txid(), (new != "Unspent").then_some(by));
    }
    // A wallet at another node hears the same of its own coin.
    let mut other = net.wallet(2).await;
    other.until_final(onward.txid()).await;
    let (_, total, _) = holdings(&mut other, &addresses[1..]).await;
    assert_eq!(total.units(), 1_005);
}

/// Wallets subscribe while payments go on; whatever moment each of them catches, its
/// snapshot and stream add up to the truth. One of them subscribes again and again on
/// the same connection, which begins anew each time.
#[tokio::test]
async fn a_snapshot_and_its_stream_have_no_gap_and_no_duplicate() {
    let net = TestNet::without_blocks(1);
    let mut payer = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let coins = many_coins(&net, &mut payer, &coin, 10).await;
    let payee = net.address(&SecretKey::generate());
    let addresses = [net.address(&coin.key), payee];
    // Payments go on until the last wallet has subscribed.
    let watched = std::cell::Cell::new(false);
    let pay = async {
        for coins in coins.chunks(20) {
            let payments: Vec<_> = coins.iter().map(|coin| net.pay(coin, &payee, 1_000)).collect();
            pay_all(&mut payer, &payments).await;
            if watched.get() {
                return;
            }
        }
        panic!("the wallets came too late");
    };
    let watch = async {
        let mut open = Vec::new();
        let mut again = Link::web_socket(&net, 0).await;
        let mut last = None;
        for i in 0..8 {
            let mut link = Link::web_socket(&net, 0).await;
            let account = Account::open(&mut link, &request(&format!("wallet-{i}"), &addresses)).await;
            open.push((link, account));
            let first = UTXOSubscribe { resume_token: Some(token(1)), ..request("again", &addresses) };
            let mut account = Account::open(&mut again, &first).await;
            account.follow(&mut again, account.answer.sequence + 20).await;
            last = Some(account);
        }
        open.push((again, last.unwrap()));
        watched.set(true);
        open
    };
    let (mut open, ()) = tokio::join!(watch, pay);
    let (truth, total, sequence) = holdings(&mut payer, &addresses).await;
    for (link, account) in &mut open {
        account.follow(link, sequence).await;
        assert_eq!(account.coins, truth);
        assert_eq!(account.total(), total);
    }
}

/// One payment after the other, and each is heard of to its end before the next is made:
/// the feed must not sleep on a change until another one wakes it. Several networks at
/// once keep the machine so busy that the feed's threads come late.
#[tokio::test]
async fn the_last_change_is_heard_without_another_one() {
    let nets: Vec<TestNet> = (0..6).map(|_| TestNet::without_blocks(1)).collect();
    let shop = |net: TestNet| async move {
        let mut payer = net.wallet(0).await;
        let mut coin = net.coins().remove(0);
        let addresses = [net.address(&coin.key)];
        let mut link = Link::web_socket(&net, 0).await;
        let mut account = Account::open(&mut link, &request("till", &addresses)).await;
        for _ in 0..800 {
            let payment = net.split(&coin, 1);
            payer.broadcast(&payment).await;
            account.follow(&mut link, account.sequence + 3).await;
            coin = TestNet::outputs(&payment, &coin.key).remove(0);
        }
        assert_eq!(account.total(), coin.amount);
    };
    futures_util::future::join_all(nets.into_iter().map(shop)).await;
}

/// The files that are read, written and watched are others from one change to the next.
#[tokio::test]
async fn a_wallet_hears_every_change_while_the_database_is_made_compact() {
    let mut net = TestNet::with_interval(1, 3_600_000);
    net.set_environment("TIME_COMPACT_ABOVE_MB", "1");
    net.start_all();
    let mut payer = net.wallet(0).await;
    let mut coins = net.coins().into_iter();
    let (mut coin, other) = (coins.next().unwrap(), coins.next().unwrap());
    let compactions = || {
        let (_, text) = net.http(0, "/metrics")?;
        text.lines().find_map(|line| line.strip_prefix("time_database_compactions_total ")?.parse::<u64>().ok())
    };
    assert_eq!(compactions(), Some(0));
    many_coins(&net, &mut payer, &other, 8).await;
    let addresses = [net.address(&coin.key)];
    let mut link = Link::web_socket(&net, 0).await;
    let mut account = Account::open(&mut link, &request("till", &addresses)).await;
    let began = std::time::Instant::now();
    let mut more = 50;
    while more > 0 {
        let paying = std::time::Instant::now();
        let payment = net.split(&coin, 1);
        payer.broadcast(&payment).await;
        account.follow(&mut link, account.sequence + 3).await;
        coin = TestNet::outputs(&payment, &coin.key).remove(0);
        if compactions() == Some(0) {
            assert!(began.elapsed() < support::DEADLINE, "{}", net.log(0));
            // So that the node has little to do, also on a slow machine.
            tokio::time::sleep((6 * paying.elapsed()).max(std::time::Duration::from_millis(40))).await;
        } else {
            more -= 1;
        }
    }
    assert_eq!(account.coins, holdings(&mut payer, &addresses).await.0);
    net.stop(0);
    assert_eq!(change_log(&net, 0).keys().last(), Some(&account.sequence));
}

/// What the change log of a stopped node says: sequence, outpoint and new state.
fn change_log(net: &TestNet, node: usize) -> BTreeMap<u64, (String, Value)> {
    let entry = |row: &Value| {
        let step = &row["value"]["Transition"];
        let outpoint = &step["outpoint"];
        let text = format!("{}:{}", outpoint["txid"].as_str().unwrap(), outpoint["vout"]);
        (row["key"].as_str().unwrap().parse().unwrap(), (text, step["new_state"].clone()))
    };
    net.dump(node, "changes").iter().map(entry).collect()
}

#[tokio::test]
async fn a_returning_wallet_gets_exactly_what_it_missed_even_after_kill_9() {
    let mut net = TestNet::without_blocks(1);
    let mut wallet = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let coins = split(&net, &mut wallet, &coin, 20).await;
    let payee = net.address(&SecretKey::generate());
    let addresses = [net.address(&coin.key), payee];
    let first = request("phone", &addresses);
    let mut link = Link::web_socket(&net, 0).await;
    let mut account = Account::open(&mut link, &first).await;
    let payments: Vec<_> = coins.iter().map(|coin| net.pay(coin, &payee, 1_000)).collect();
    pay_all(&mut wallet, &payments[..5]).await;
    account.follow(&mut link, account.sequence + 7).await;
    drop(link);
    pay_all(&mut wallet, &payments[5..10]).await;
    let acknowledged = net.status(0)["sequence"].as_u64().unwrap();
    net.kill(0);
    net.start(0);
    net.wait_ready(&[0]);
    let resumed = resumption(&first, &account.answer, account.sequence);
    for round in 0..2 {
        // The second time it comes by another connection and with the same place: it
        // gets the same once more, for the place is the wallet's to remember.
        let mut link = Link::web_socket(&net, 0).await;
        let answer = Account::open(&mut link, &resumed).await.answer;
        assert_eq!((answer.reset, answer.more, answer.utxos.len()), (false, false, 0), "round {round}");
        assert_eq!(answer.sequence, account.sequence);
        assert_eq!((&answer.log_id, &answer.resume_token), (&account.answer.log_id, &account.answer.resume_token));
        for sequence in account.sequence + 1..=acknowledged {
            assert_eq!(notification(&mut link).await.sequence, sequence);
        }
    }
    let mut link = Link::web_socket(&net, 0).await;
    Account::open(&mut link, &resumed).await;
    let mut wallet = net.wallet(0).await;
    pay_all(&mut wallet, &payments[10..]).await;
    let (truth, _, sequence) = holdings(&mut wallet, &addresses).await;
    let mut heard = BTreeMap::new();
    while account.sequence < sequence {
        let message = notification(&mut link).await;
        let step = &message.notification;
        heard.insert(message.sequence, (step.outpoint.to_string(), serde_json::to_value(step.new_state).unwrap()));
        account.apply(message);
    }
    assert_eq!(account.coins, truth);
    // The log itself says the same.
    net.stop(0);
    let log = change_log(&net, 0);
    assert_eq!(log.keys().last(), Some(&sequence));
    for (sequence, entry) in &heard {
        assert_eq!(log.get(sequence), Some(entry));
    }
}

#[tokio::test]
async fn a_place_that_the_log_does_not_have_begins_anew() {
    let net = TestNet::without_blocks(1);
    let mut wallet = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let coins = split(&net, &mut wallet, &coin, 5).await;
    let addresses = [net.address(&coin.key)];
    let first = request("phone", &addresses);
    let mut link = Link::web_socket(&net, 0).await;
    let account = Account::open(&mut link, &first).await;
    let head = account.sequence;
    let good = resumption(&first, &account.answer, head);
    let resets = [
        ("a sequence that is to come", UTXOSubscribe { resume_from: Some(head + 1), ..good.clone() }),
        ("a sequence far away", UTXOSubscribe { resume_from: Some(1 << 60), ..good.clone() }),
        ("the greatest number", UTXOSubscribe { resume_from: Some(u64::MAX), ..good.clone() }),
        ("another log", UTXOSubscribe { log_id: Some("00".repeat(16)), ..good.clone() }),
        ("another log's text", UTXOSubscribe { log_id: Some("?".into()), ..good.clone() }),
    ];
    for (what, request) in resets {
        let mut link = Link::web_socket(&net, 0).await;
        let fresh = Account::open(&mut link, &request).await;
        assert!(fresh.answer.reset, "{what}");
        assert_eq!((fresh.sequence, &fresh.coins), (head, &account.coins), "{what}");
    }
    // A subscription that nobody knows has no place either, whatever is said of one.
    let stranger = UTXOSubscribe { subscriber_id: "new".into(), resume_token: None, ..good.clone() };
    let mut link = Link::web_socket(&net, 0).await;
    assert!(Account::open(&mut link, &stranger).await.answer.reset);
    // The head itself is a place, and the stream goes on after a reset too.
    let mut link = Link::web_socket(&net, 0).await;
    let mut resumed = Account::open(&mut link, &good).await;
    assert!(!resumed.answer.reset && resumed.coins.is_empty());
    resumed.coins.clone_from(&account.coins);
    let payment = net.pay(&coins[0], &addresses[0], 1_000);
    wallet.pay(&payment).await;
    resumed.follow(&mut link, head + 4).await;
}

async fn unsubscribe(link: &mut Link, id: &str, resume_token: Option<String>) -> Result<(), ErrorCode> {
    let request = UTXOUnsubscribe { subscriber_id: id.into(), resume_token };
    link.send(&NetworkMessage::UTXOUnsubscribe(request)).await;
    link.wait_for("an answer", |message| match message {
        NetworkMessage::UTXOUnsubscribed(done) => {
            assert_eq!(done.subscriber_id, id);
            Some(Ok(()))
        }
        NetworkMessage::Error(error) => Some(Err(error.code)),
        _ => None,
    })
    .await
}

async fn refused(link: &mut Link, what: &str, request: UTXOSubscribe) -> ErrorCode {
    link.send(&NetworkMessage::UTXOSubscribe(request)).await;
    link.wait_for(what, |message| match message {
        NetworkMessage::Error(error) => Some(error.code),
        NetworkMessage::UTXOSubscribed(_) => panic!("{what}: it was taken over"),
        _ => None,
    })
    .await
}

#[tokio::test]
async fn a_subscription_belongs_to_whoever_holds_its_token() {
    let net = TestNet::without_blocks(1);
    let mut wallet = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let coins = split(&net, &mut wallet, &coin, 8).await;
    let addresses = [net.address(&coin.key)];
    let mine = request("mine", &addresses);
    let mut owner = Link::web_socket(&net, 0).await;
    let mut account = Account::open(&mut owner, &mine).await;
    // Over TCP, too, the token is what counts.
    for mut thief in [Link::web_socket(&net, 0).await, Link::wallet(&net, 0).await] {
        let wrong = UTXOSubscribe { resume_token: Some(token(7)), resume_from: Some(0), ..mine.clone() };
        for attempt in [mine.clone(), wrong.clone(), UTXOSubscribe { addresses: vec![], ..wrong }] {
            assert_eq!(refused(&mut thief, "resuming", attempt).await, ErrorCode::NotYourSubscription);
        }
        assert_eq!(unsubscribe(&mut thief, "mine", None).await, Err(ErrorCode::NotYourSubscription));
        assert_eq!(unsubscribe(&mut thief, "mine", Some(token(7))).await, Err(ErrorCode::NotYourSubscription));
        assert_eq!(unsubscribe(&mut thief, "nobody's", Some(token(7))).await, Err(ErrorCode::NotYourSubscription));
        assert_eq!(unsubscribe(&mut thief, "mine", Some("7".into())).await, Err(ErrorCode::Malformed));
    }
    wallet.pay(&net.pay(&coins[0], &addresses[0], 1_000)).await;
    account.follow(&mut owner, account.answer.sequence + 4).await;
    // The owner may go on elsewhere; the old connection then has no rights any more.
    let mut elsewhere = Link::wallet(&net, 0).await;
    let resumed = resumption(&mine, &account.answer, account.sequence);
    assert!(!Account::open(&mut elsewhere, &resumed).await.answer.reset);
    assert_eq!(unsubscribe(&mut owner, "mine", None).await, Err(ErrorCode::NotYourSubscription));
    wallet.pay(&net.pay(&coins[1], &addresses[0], 1_000)).await;
    account.follow(&mut elsewhere, account.sequence + 4).await;
    // On the connection that has it no token is needed; then it is gone, and free.
    assert_eq!(unsubscribe(&mut elsewhere, "mine", None).await, Ok(()));
    assert_eq!(unsubscribe(&mut elsewhere, "mine", None).await, Err(ErrorCode::NotYourSubscription));
    assert_eq!(net.status(0)["subscriptions"], 0);
    Account::open(&mut owner, &mine).await;
}

/// Many want the same new id at once: one gets it, all others are told that it is not
/// theirs, and only the one hears anything.
#[tokio::test]
async fn of_many_who_want_one_id_at_once_one_gets_it() {
    let net = TestNet::without_blocks(1);
    let mut wallet = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let mut links = Vec::new();
    for _ in 0..24 {
        links.push(Link::web_socket(&net, 0).await);
    }
    let addresses = [net.address(&coin.key)];
    for round in 0..5 {
        let id = format!("id-{round}");
        for link in &mut links {
            link.send(&NetworkMessage::UTXOSubscribe(request(&id, &addresses))).await;
        }
        let mut owners = Vec::new();
        for (i, link) in links.iter_mut().enumerate() {
            match link.message().await.unwrap() {
                NetworkMessage::UTXOSubscribed(answer) => owners.push((i, answer)),
                NetworkMessage::Error(error) => assert_eq!(error.code, ErrorCode::NotYourSubscription),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(owners.len(), 1, "round {round}");
        let (owner, _) = owners.remove(0);
        assert_eq!(net.status(0)["subscriptions"], 1);
        assert_eq!(unsubscribe(&mut links[(owner + 1) % 24], &id, None).await, Err(ErrorCode::NotYourSubscription));
        assert_eq!(unsubscribe(&mut links[owner], &id, None).await, Ok(()));
    }
    drop(links);
    wallet.pay(&net.split(&coin, 2)).await;
}

/// A thief subscribes under many names and does not read the answers, so that the node
/// is stuck in the midst of one of them. Then he gives that name up by its token, on
/// another connection, and somebody else takes it. When the thief reads on, the node
/// finishes the old request: it must not end the new owner's stream, nor give the thief a
/// right to cancel it.
#[tokio::test]
async fn a_request_that_is_overtaken_takes_nothing_over() {
    const NAMES: usize = 60;
    let net = TestNet::without_blocks(1);
    let mut wallet = net.wallet(0).await;
    let [rich, coin, ..] = <[Coin; 4]>::try_from(net.coins()).unwrap_or_else(|_| panic!("four coins"));
    many_coins(&net, &mut wallet, &rich, 12).await;
    let theirs = |i: usize| UTXOSubscribe {
        resume_token: Some(token(9)),
        ..request(&format!("name-{i}"), &[net.address(&rich.key)])
    };
    let mut thief = Link::narrow_web_socket(&net, 0).await;
    for i in 0..NAMES {
        thief.send(&NetworkMessage::UTXOSubscribe(theirs(i))).await;
    }
    // The node gets stuck when it has taken some of the names and then takes no more.
    let stored = || net.status(0)["subscriptions"].as_u64().unwrap() as usize;
    let mut seen = (0, 0);
    let taken = until("the node is stuck", || {
        let now = stored();
        seen = if now == seen.0 { (now, seen.1 + 1) } else { (now, 0) };
        (now > 0 && seen.1 >= 50).then_some(now)
    });
    assert!(taken < NAMES, "the node is not stuck; the story needs more names");
    let name = format!("name-{}", taken - 1);
    let mut accomplice = Link::web_socket(&net, 0).await;
    assert_eq!(unsubscribe(&mut accomplice, &name, Some(token(9))).await, Ok(()));
    let mut victim = Link::web_socket(&net, 0).await;
    let mine = UTXOSubscribe { resume_token: Some(token(3)), ..request(&name, &[net.address(&coin.key)]) };
    Account::open(&mut victim, &mine).await;
    // The thief reads until the node is through with all of his names.
    let mut answers = 0;
    while answers < NAMES {
        match thief.message().await.unwrap() {
            NetworkMessage::UTXOSubscribed(_) | NetworkMessage::Error(_) => answers += 1,
            _ => {}
        }
    }
    thief.send(&NetworkMessage::TransactionBroadcast(net.split(&coin, 2).to_raw())).await;
    let first = notification(&mut victim).await;
    assert_eq!(first.notification.outpoint, coin.outpoint, "the owner still hears of the coin");
    assert_eq!(unsubscribe(&mut thief, &name, None).await, Err(ErrorCode::NotYourSubscription));
    assert_eq!(unsubscribe(&mut victim, &name, None).await, Ok(()));
}

/// Some wallets stop reading with more than 30,000 notifications due to each. Then most of
/// them come back on new connections, have everything due once more, and do not read
/// again. The outputs that come into being take some 60 MiB in the node's caches; if it kept
/// what the wallets do not read, it would be 140.
#[tokio::test]
async fn slow_wallets_cost_nothing_and_lose_nothing() {
    const SLOW: usize = 12;
    const PATIENT: usize = 2;
    const PAYMENTS: u64 = 120;
    let net = TestNet::without_blocks(1);
    let mut payer = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let coins = split(&net, &mut payer, &coin, PAYMENTS).await;
    let payee = net.address(&SecretKey::generate());
    let addresses = [net.address(&coin.key), payee];
    let mut slow = Vec::new();
    for i in 0..SLOW {
        let mut link = Link::narrow_web_socket(&net, 0).await;
        let account = Account::open(&mut link, &request(&format!("slow-{i}"), &addresses)).await;
        slow.push((link, account));
    }
    let mut link = Link::web_socket(&net, 0).await;
    let mut quick = Account::open(&mut link, &request("quick", &addresses)).await;
    let (begin, first) = (quick.sequence, quick.coins.clone());
    let end = begin + PAYMENTS * 258;
    let before = net.resident(0);
    let assert_small = || {
        let grown = net.resident(0).saturating_sub(before);
        assert!(grown <= 96 << 20, "the node has grown by {} MiB", grown >> 20);
    };
    for coin in &coins {
        let units = (coin.amount.units() - net.genesis.min_fee().units()) / 256;
        let output = Output { amount: Amount::from_units(units).unwrap(), address: payee };
        let payment = net.sign(std::slice::from_ref(coin), vec![output; 256], 0);
        payer.broadcast(&payment).await;
        // The quick one is served while nobody else reads: locked, spent, 256 new ones.
        quick.follow(&mut link, quick.sequence + 258).await;
    }
    assert_eq!(quick.sequence, end);
    assert_small();
    // Some of them read on where they are.
    let mut returning = slow.split_off(PATIENT);
    for (link, account) in &mut slow {
        account.follow(link, end).await;
        assert_eq!(account.coins, quick.coins);
    }
    // The others come back, and again do not read.
    for (i, (link, account)) in (PATIENT..).zip(&mut returning) {
        let resumed = resumption(&request(&format!("slow-{i}"), &addresses), &account.answer, begin);
        *link = Link::narrow_web_socket(&net, 0).await;
        account.answer = Account::open(link, &resumed).await.answer;
        assert!(!account.answer.reset);
    }
    // One who reads gets the whole log meanwhile.
    let resumed = resumption(&request("quick", &addresses), &quick.answer, begin);
    let mut again = Account::open(&mut link, &resumed).await;
    again.coins = first;
    again.follow(&mut link, end).await;
    assert_eq!(again.coins, quick.coins);
    assert_small();
    for (link, account) in &mut returning {
        account.follow(link, end).await;
        assert_eq!(account.coins, quick.coins);
    }
}

#[tokio::test]
async fn a_large_snapshot_comes_in_pages() {
    let net = TestNet::without_blocks(1);
    let mut wallet = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let coins = many_coins(&net, &mut wallet, &coin, 10).await;
    let addresses = [net.address(&coin.key)];
    let (truth, total, _) = holdings(&mut wallet, &addresses).await;
    assert_eq!(truth.len(), 2_560);
    for mut link in [Link::web_socket(&net, 0).await, Link::wallet(&net, 0).await] {
        let id = format!("pages-{}", net.status(0)["subscriptions"]);
        let account = Account::open(&mut link, &request(&id, &addresses)).await;
        assert_eq!(account.pages, [1_000, 1_000, 560]);
        assert_eq!((&account.coins, account.total()), (&truth, total));
    }
    // As many outpoints as a subscription may have: some exist, one is spent, one comes.
    let payment = net.pay(&coins[0], &addresses[0], 1_000);
    let to_come = OutPoint { txid: payment.txid(), vout: 1 };
    let others = coins[1..].iter().map(|coin| coin.outpoint);
    let never = (0..).map(|vout| OutPoint { txid: Txid::from_bytes([5; 32]), vout });
    let wanted: Vec<OutPoint> = [to_come, coin.outpoint].into_iter().chain(others).chain(never).take(4_096).collect();
    assert_eq!(wanted.len(), MAX_SUBSCRIPTION_FILTERS);
    let request =
        UTXOSubscribe { outpoints: wanted.iter().map(ToString::to_string).collect(), ..request("outpoints", &[]) };
    let mut link = Link::wallet(&net, 0).await;
    let account = Account::open(&mut link, &request).await;
    assert_eq!(account.coins.len(), 2_560, "all but the first of the many, and the one that was spent");
    assert_eq!(account.coins[&coin.outpoint].1.name(), "SpentFinalized");
    // Neither the coin that is spent nor the first output is among them; the second is.
    wallet.pay(&payment).await;
    let heard = notification(&mut link).await;
    assert_eq!((heard.notification.outpoint, heard.notification.old_state), (to_come, None));
    assert_eq!(heard.sequence, account.sequence + 4, "locked, spent, the first output, this one");
    let next = net.pay(&TestNet::outputs(&payment, &coin.key)[1], &addresses[0], 1);
    wallet.pay(&next).await;
    for name in ["Locked", "SpentFinalized"] {
        let heard = notification(&mut link).await.notification;
        assert_eq!((heard.outpoint, heard.new_state.name()), (to_come, name));
    }
}

#[tokio::test]
async fn what_is_unsubscribed_is_silent() {
    let net = TestNet::without_blocks(1);
    let mut wallet = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let coins = split(&net, &mut wallet, &coin, 4).await;
    let addresses = [net.address(&coin.key)];
    let mut link = Link::web_socket(&net, 0).await;
    Account::open(&mut link, &request("first", &addresses)).await;
    let mut account = Account::open(&mut link, &request("second", &addresses)).await;
    assert_eq!(unsubscribe(&mut link, "first", None).await, Ok(()));
    // The second hears of each change, and nobody else on this connection does: the
    // account would find a duplicate.
    for coin in &coins {
        wallet.pay(&net.pay(coin, &addresses[0], 1_000)).await;
    }
    account.follow(&mut link, account.sequence + 16).await;
    assert_eq!(unsubscribe(&mut link, "second", None).await, Ok(()));
    wallet.pay(&net.split(&net.coins()[1], 2)).await;
    link.send(&NetworkMessage::Ping(Nonce { nonce: 5 })).await;
    assert_eq!(link.message().await, Some(NetworkMessage::Pong(Nonce { nonce: 5 })));
}

/// Proofs of a network of four, and what becomes of them when somebody edits them.
#[tokio::test]
async fn a_finality_proof_verifies_offline_and_a_forged_one_does_not() {
    let net = TestNet::without_blocks(4);
    let mut wallet = net.wallet(0).await;
    let coin = net.coins().remove(0);
    let coins = split(&net, &mut wallet, &coin, 60).await;
    let payments: Vec<_> = coins.iter().map(|coin| net.pay(coin, &net.address(&coin.key), 1_000)).collect();
    pay_all(&mut wallet, &payments).await;
    let committee = net.committee();
    let mut forged = 0;
    for payment in &payments {
        let status = wallet.query(payment.txid()).await;
        let Some(FinalityProof::Commit(proof)) = status.finality_proof else { panic!("no proof: {status:?}") };
        assert_eq!((proof.kind, proof.txid), (VoteKind::Commit, payment.txid()));
        // What a wallet keeps is text.
        let text = serde_json::to_string(&proof).unwrap();
        serde_json::from_str::<Certificate>(&text).unwrap().verify(&committee).unwrap();
        forged += forgeries(&net, &proof, &committee, payments[0].txid());
    }
    assert!(forged > 0, "at least one vote stood in a batch of several");
}

/// Edits a good proof in every way; gives how many of its votes stood in large batches.
fn forgeries(net: &TestNet, proof: &Certificate, committee: &Committee, other: Txid) -> usize {
    let refused = |what: &str, expected: CertificateError, edit: &dyn Fn(&mut Certificate)| {
        let mut forged = proof.clone();
        edit(&mut forged);
        assert_eq!(forged.verify(committee).err(), Some(expected), "{what}");
    };
    let stranger = SecretKey::generate();
    refused("another epoch", CertificateError::WrongEpoch, &|c| c.epoch = 1);
    refused("a voter who is no member", CertificateError::NotMember, &|c| c.votes[0].voter = stranger.public_key());
    refused("a member twice", CertificateError::Repeated, &|c| c.votes[1] = c.votes[0].clone());
    let extra = |c: &mut Certificate| c.votes.push(c.votes[0].clone());
    refused("a member twice beside a quorum", CertificateError::Repeated, &extra);
    let short = CertificateError::NoQuorum { weight: 2, quorum: 3 };
    refused("a vote short", short, &|c| c.votes.truncate(2));
    refused("no votes", CertificateError::NoQuorum { weight: 0, quorum: 3 }, &|c| c.votes.clear());
    refused("approvals", CertificateError::BadSignature, &|c| c.kind = VoteKind::Approve);
    if other != proof.txid {
        refused("another transaction", CertificateError::BadSignature, &|c| c.txid = other);
    }
    let swapped = |c: &mut Certificate| {
        let (first, second) = (c.votes[0].signature, c.votes[1].signature);
        (c.votes[0].signature, c.votes[1].signature) = (second, first);
    };
    refused("signatures of each other", CertificateError::BadSignature, &swapped);
    refused("a place beyond the batch", CertificateError::BadPath, &|c| c.votes[0].index = c.votes[0].batch_size);
    refused("no batch", CertificateError::BadPath, &|c| c.votes[0].batch_size = 0);
    refused("a huge batch", CertificateError::BadPath, &|c| c.votes[0].batch_size = u32::MAX);
    refused("a longer path", CertificateError::BadPath, &|c| c.votes[0].path.push(Hash32::from_bytes([1; 32])));
    // The same members on a network that began a second later.
    let text = std::fs::read(net.directory().join(&net.devnet.genesis_file)).unwrap();
    let mut genesis: RawGenesis = serde_json::from_slice(&text).unwrap();
    genesis.timestamp += 1;
    let elsewhere = Committee::of_genesis(&Genesis::try_from(genesis).unwrap());
    assert_eq!(proof.clone().verify(&elsewhere).err(), Some(CertificateError::BadSignature), "another network");
    let deep = |vote: usize| !proof.votes[vote].path.is_empty();
    for vote in (0..proof.votes.len()).filter(|vote| deep(*vote)) {
        let wrong = |c: &mut Certificate| c.votes[vote].path[0] = Hash32::from_bytes([1; 32]);
        refused("a wrong path", CertificateError::BadSignature, &wrong);
        let shorter = |c: &mut Certificate| c.votes[vote].path.truncate(proof.votes[vote].path.len() - 1);
        refused("a shorter path", CertificateError::BadPath, &shorter);
    }
    (0..proof.votes.len()).filter(|vote| deep(*vote)).count()
}

/// A wallet that was told `Finalized` by one node gets the same proof from any other.
#[tokio::test]
async fn every_node_proves_the_same_payment() {
    let net = TestNet::without_blocks(4);
    let coin = net.coins().remove(0);
    let payment = net.pay(&coin, &net.address(&SecretKey::generate()), 1_000);
    net.wallet(3).await.pay(&payment).await;
    for node in 0..4 {
        let status = net.wallet(node).await.until_final(payment.txid()).await;
        let Some(FinalityProof::Commit(proof)) = status.finality_proof else { panic!("no proof") };
        assert_eq!(proof.txid, payment.txid());
        within("a check", async { Arc::unwrap_or_clone(proof).verify(&net.committee()).unwrap() }).await;
    }
}
