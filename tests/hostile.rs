//! Strangers, liars and idlers against a running network.
//!
//! Each test is one kind of attack. What the node has to do is say the right thing,
//! hang up where there is nothing more to say, and go on as if nothing had been: the same
//! commit, the same place in the change log, no more memory, and the next payment final.

#![allow(clippy::unwrap_used, reason = "a test fails where it unwraps")]

mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Coin, Link, TestNet, hello, until, within};
use time_masternode::consensus::{Certificate, Committee, SignedVote, Vote, VoteBatch, VoteKind, sign_batch};
use time_masternode::limits::{
    BAD_MESSAGES, MAX_ADDRESSES_PER_QUERY, MAX_FRAME_BYTES, MAX_HANDSHAKE_FRAME_BYTES, MAX_OUTPOINTS_PER_QUERY,
    MAX_PENDING_HANDSHAKES_PER_IP, MAX_SUBSCRIPTION_FILTERS, MAX_SUBSCRIPTIONS_PER_CONNECTION, MAX_TEXT,
    MAX_TRANSACTIONS_PER_REQUEST, MAX_VOTES_PER_BATCH, MAX_WALLET_MESSAGE_BYTES, SIGNATURE_FAILURES,
};
use time_masternode::net::{
    Authenticate, CertifiedTransaction, ErrorCode, ErrorMessage, Finalized, GetTransactions, Hello, NetworkMessage,
    Nonce, RejectionMessage, Role, Status, TransactionRejected, TransactionStatusKind, Transactions, UTXOStateQuery,
    UTXOSubscribe,
};
use time_masternode::types::{
    Address, Amount, Genesis, Network, OutPoint, Output, RawGenesis, SecretKey, Signature, Transaction, Txid,
};

const MEBIBYTE: u64 = 1 << 20;

/// A network under attack, and how node 0 was before it.
struct Target {
    net: TestNet,
    coin: Coin,
    before: Value,
    resident: u64,
    /// Connections that are kept open until the end.
    stuck: Vec<Link>,
}

impl Target {
    async fn new(nodes: u16) -> Self {
        Self::of(TestNet::without_blocks(nodes)).await
    }

    async fn of(net: TestNet) -> Self {
        let coin = net.coins().remove(0);
        let mut target = Self { net, coin, before: Value::Null, resident: 0, stuck: Vec::new() };
        target.pay().await;
        target.mark();
        target
    }

    /// A payment as a patient wallet makes it: what is busy is asked again.
    async fn pay(&mut self) {
        let to = self.net.address(&self.coin.key);
        let payment = self.net.pay(&self.coin, &to, 1_000);
        let mut wallet = self.net.wallet(0).await;
        wallet.broadcast(&payment).await;
        within("a payment", async {
            loop {
                match wallet.client.next().await.unwrap() {
                    NetworkMessage::Error(error) if error.code == ErrorCode::Busy => wallet.broadcast(&payment).await,
                    NetworkMessage::TransactionStatus(status) => {
                        let accepted = status.status == TransactionStatusKind::Pending || status.status.is_final();
                        assert!(accepted, "{:?}", status.rejection);
                        if status.status.is_final() {
                            return;
                        }
                    }
                    other => panic!("{other:?}"),
                }
            }
        })
        .await;
        self.coin = TestNet::outputs(&payment, &self.coin.key).remove(1);
        until("nothing is in flight", || (self.net.status(0)["in_flight"] == 0).then_some(()));
    }

    fn state(&self) -> Value {
        let status = self.net.status(0);
        json!({ "commit": status["commit"], "sequence": status["sequence"], "voting": status["voting"] })
    }

    fn mark(&mut self) {
        self.before = self.state();
        self.resident = self.net.resident(0);
    }

    fn assert_unchanged(&self, what: &str) {
        assert_eq!(self.state(), self.before, "{what}");
        assert_eq!(self.before["voting"], "Active", "{what}");
        let grown = self.net.resident(0).saturating_sub(self.resident);
        assert!(grown <= 64 * MEBIBYTE, "{what}: the node has grown by {} MiB", grown / MEBIBYTE);
    }

    /// Nothing has changed, and the next payment becomes final.
    async fn assert_unharmed(&mut self, what: &str) {
        self.assert_unchanged(what);
        self.pay().await;
        self.mark();
    }
}

fn random_bytes(length: usize) -> Vec<u8> {
    (0..length).map(|_| rand::random()).collect()
}

/// The node still answers on this connection.
async fn assert_alive(link: &mut Link, what: &str) {
    let nonce = rand::random::<u32>().into();
    link.send(&NetworkMessage::Ping(Nonce { nonce })).await;
    link.wait_for(what, |message| (message == NetworkMessage::Pong(Nonce { nonce })).then_some(())).await;
}

async fn assert_refused(link: &mut Link, what: &str, text: &str, code: ErrorCode) -> ErrorMessage {
    link.say(text).await;
    let error = link.error(what).await;
    assert_eq!(error.code, code, "{what}: {}", error.message);
    error
}

/// Sends bytes and nothing more, and reads whatever comes until the node hangs up.
fn blast(address: &str, bytes: &[u8]) -> Vec<u8> {
    talk(address, bytes, true)
}

/// Sends bytes and reads whatever comes until the node hangs up.
fn request(address: &str, bytes: &[u8]) -> Vec<u8> {
    talk(address, bytes, false)
}

fn talk(address: &str, bytes: &[u8], end: bool) -> Vec<u8> {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(support::DEADLINE)).unwrap();
    // The node may hang up in the midst of it.
    let sent = stream.write_all(bytes).is_ok();
    if sent && end {
        let _ended = stream.shutdown(std::net::Shutdown::Write).is_ok();
    }
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    }
    answer
}

#[tokio::test]
async fn noise_on_every_port() {
    let mut target = Target::new(1).await;
    let node = target.net.devnet.nodes[0].clone();
    for address in [&node.p2p_address, &node.websocket_address, &node.http_address] {
        for length in [0, 1, 3, 4, 5, 100, 5_000, 100_000] {
            for _ in 0..4 {
                blast(address, &random_bytes(length));
            }
        }
    }
    target.assert_unharmed("random bytes").await;
    // Frames of a good length with nothing good in them.
    for length in [1, 2, 100, MAX_HANDSHAKE_FRAME_BYTES] {
        let mut link = Link::frames(&target.net, 0).await;
        link.raw(&u32::try_from(length).unwrap().to_be_bytes()).await;
        link.raw(&random_bytes(length)).await;
        link.sent_away("a frame of noise", ErrorCode::Malformed).await;
    }
    let head = format!("GET /status HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 * 1024));
    assert!(!request(&node.http_address, head.as_bytes()).starts_with(b"HTTP/1.1 200"));
    let answer = request(
        &node.http_address,
        b"POST /status HTTP/1.1\r\nConnection: close\r\nContent-Length: 9999999999\r\n\r\n",
    );
    assert!(answer.starts_with(b"HTTP/1.1 405"), "{}", String::from_utf8_lossy(&answer));
    let answer = request(&node.http_address, b"GET /../../etc/passwd HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with(b"HTTP/1.1 404"), "{}", String::from_utf8_lossy(&answer));
    let answer = request(&node.websocket_address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(!answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
    target.assert_unharmed("noise in good clothes").await;
}

#[tokio::test]
async fn frames_of_bad_length_are_refused_before_anything_is_allocated() {
    let mut target = Target::new(1).await;
    let limit = u32::try_from(MAX_FRAME_BYTES).unwrap();
    let early_limit = u32::try_from(MAX_HANDSHAKE_FRAME_BYTES).unwrap();
    for length in [0, early_limit + 1, limit, limit + 1, u32::MAX] {
        let mut link = Link::frames(&target.net, 0).await;
        link.raw(&length.to_be_bytes()).await;
        link.sent_away(&format!("{length} bytes before the handshake"), ErrorCode::TooLarge).await;
    }
    for length in [0, limit + 1, u32::MAX] {
        let mut link = Link::wallet(&target.net, 0).await;
        link.raw(&length.to_be_bytes()).await;
        link.sent_away(&format!("{length} bytes"), ErrorCode::TooLarge).await;
    }
    // The limit itself is a frame like any other.
    let mut link = Link::wallet(&target.net, 0).await;
    let text = format!("{}{}", " ".repeat(MAX_FRAME_BYTES - 22), "{\"Ping\": {\"nonce\": 7}}");
    assert_eq!(text.len(), MAX_FRAME_BYTES);
    link.say(&text).await;
    assert_eq!(link.message().await, Some(NetworkMessage::Pong(Nonce { nonce: 7 })));
    // Many announce the largest frame; some stop after the head, some a little later.
    target.mark();
    let mut links = Vec::new();
    for i in 0..60 {
        let mut link = Link::wallet(&target.net, 0).await;
        link.raw(&limit.to_be_bytes()).await;
        link.raw(&vec![b' '; 1024 * (i % 3)]).await;
        links.push(link);
    }
    target.assert_unharmed("frames that do not come").await;
    // One goes on in small pieces, to the end, and is heard.
    let text = text.as_bytes();
    for piece in text[1024 * (59 % 3)..].chunks(100_000) {
        links[59].raw(piece).await;
    }
    assert_eq!(links[59].message().await, Some(NetworkMessage::Pong(Nonce { nonce: 7 })));
    drop(links);
    target.assert_unharmed("frames that stop").await;
}

/// A WebSocket frame, masked with zeros.
fn web_socket_frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = match u16::try_from(payload.len()) {
        Ok(short @ 0..=125) => vec![0x80 | short.to_be_bytes()[1]],
        Ok(medium) => [&[0x80 | 126][..], &medium.to_be_bytes()].concat(),
        Err(_) => [&[0x80 | 127][..], &(payload.len() as u64).to_be_bytes()].concat(),
    };
    [&[first][..], &length, &[0; 4], payload].concat()
}

#[tokio::test]
async fn noise_after_a_good_upgrade() {
    let mut target = Target::new(1).await;
    let net = &target.net;
    let ends: [(&str, Vec<u8>, Option<ErrorCode>); 7] = [
        ("a binary frame", web_socket_frame(0x82, b"{}"), Some(ErrorCode::Malformed)),
        ("no UTF-8", web_socket_frame(0x81, &[0xff, 0xfe, 0xc0, 0x80]), Some(ErrorCode::Malformed)),
        ("half a character at the end", web_socket_frame(0x81, &[b'"', 0xe2, 0x82]), Some(ErrorCode::Malformed)),
        ("a frame without a mask", vec![0x81, 2, b'{', b'}'], None),
        ("a reserved opcode", web_socket_frame(0x83, b"{}"), None),
        ("reserved bits", web_socket_frame(0xf1, b"{}"), None),
        (
            "a length of 2^63-1",
            [&[0x81, 0xff][..], &i64::MAX.to_be_bytes(), &[0; 4]].concat(),
            Some(ErrorCode::TooLarge),
        ),
    ];
    for (what, bytes, code) in ends {
        let mut link = Link::web_socket(net, 0).await;
        link.raw(&bytes).await;
        match code {
            Some(code) => link.sent_away(what, code).await,
            None => link.hung_up(what).await,
        }
    }
    // A message over the limit, in one piece and in several.
    let mut link = Link::web_socket(net, 0).await;
    link.say(&" ".repeat(MAX_WALLET_MESSAGE_BYTES + 1)).await;
    link.sent_away("a large message", ErrorCode::TooLarge).await;
    let mut link = Link::web_socket(net, 0).await;
    link.raw(&web_socket_frame(0x01, &[b' '; 1_000])).await;
    for _ in 0..=MAX_WALLET_MESSAGE_BYTES / 1_000 {
        link.raw(&web_socket_frame(0x00, &[b' '; 1_000])).await;
    }
    link.sent_away("a large message in pieces", ErrorCode::TooLarge).await;
    // Texts that are no messages are refused one by one, and the connection stays.
    let mut link = Link::web_socket(net, 0).await;
    let deep = "[".repeat(100_000);
    let deep_objects = "{\"Ping\":".repeat(20_000);
    let deep_unknown = format!("{{\"Ping\": {{\"nonce\": 1, \"x\": {deep}");
    let long_tag = format!("{{\"{}\": {{}}}}", "é".repeat(50_000));
    let texts = [
        ("nothing", String::new(), ErrorCode::Malformed),
        ("a zero", "\0".into(), ErrorCode::Malformed),
        ("a number", "1e999999999".into(), ErrorCode::Malformed),
        ("deep arrays", deep, ErrorCode::Malformed),
        ("deep objects", deep_objects, ErrorCode::Malformed),
        ("a deep unknown field", deep_unknown, ErrorCode::Malformed),
        ("two messages", "{\"Ping\": {\"nonce\": 1}} {}".into(), ErrorCode::Malformed),
        ("a unit", "\"Ping\"".into(), ErrorCode::Malformed),
        ("an unknown message", "{\"Pink\": {\"nonce\": 1}}".into(), ErrorCode::UnknownMessage),
        ("a long unknown message", long_tag, ErrorCode::UnknownMessage),
        ("what only members may say", "{\"Blocks\": {\"blocks\": []}}".into(), ErrorCode::NotAuthorized),
    ];
    for (what, text, code) in texts {
        let error = assert_refused(&mut link, what, &text, code).await;
        assert!(error.message.len() < 2_000, "{what}: the refusal is not as long as what it refuses");
    }
    let with_id = "{\"Pink\": {\"request_id\": \"r\"}}";
    let error = assert_refused(&mut link, "an id", with_id, ErrorCode::UnknownMessage).await;
    assert_eq!(error.request_id.as_deref(), Some("r"));
    assert_alive(&mut link, "the connection stays").await;
    target.assert_unharmed("noise over WebSocket").await;
}

#[tokio::test]
async fn whoever_only_talks_nonsense_is_sent_away() {
    let mut target = Target::new(1).await;
    for mut link in [Link::web_socket(&target.net, 0).await, Link::wallet(&target.net, 0).await] {
        let mut refused = 0;
        loop {
            link.say("nonsense").await;
            let error = link.error("a refusal").await;
            if error.code == ErrorCode::RateLimited {
                break;
            }
            assert_eq!(error.code, ErrorCode::Malformed);
            refused += 1;
        }
        assert!(refused >= BAD_MESSAGES, "so many are forgiven");
        link.hung_up("the end").await;
    }
    target.assert_unharmed("nonsense").await;
}

/// 200 connect and say nothing. As many as may be greeted at once are told after their
/// five seconds, the others at once; a wallet that is there already feels nothing.
#[tokio::test]
async fn silence_is_not_waited_for() {
    const SILENT: usize = 200;
    let mut target = Target::new(1).await;
    let mut wallet = target.net.wallet(0).await;
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        silent.push(Link::frames(&target.net, 0).await);
    }
    let payment = target.net.split(&target.coin, 1);
    wallet.pay(&payment).await;
    target.coin = TestNet::outputs(&payment, &target.coin.key).remove(0);
    target.mark();
    let (mut timed_out, mut turned_away) = (0, 0);
    for link in &mut silent {
        match link.error("the end of patience").await.code {
            ErrorCode::HandshakeTimeout => timed_out += 1,
            ErrorCode::TooManyConnections => turned_away += 1,
            other => panic!("{other:?}"),
        }
        link.hung_up("the end").await;
    }
    assert_eq!(timed_out + turned_away, SILENT);
    assert!(timed_out >= MAX_PENDING_HANDSHAKES_PER_IP, "{timed_out} were waited for");
    target.assert_unharmed("silence").await;
    // Those that stop somewhere on the way.
    let mut half_head = Link::frames(&target.net, 0).await;
    half_head.raw(&[0, 0]).await;
    let mut half_frame = Link::frames(&target.net, 0).await;
    half_frame.raw(&[0, 0, 1, 0, b'{']).await;
    for link in [&mut half_head, &mut half_frame] {
        link.sent_away("half a Hello", ErrorCode::HandshakeTimeout).await;
    }
    let web = &target.net.devnet.nodes[0].websocket_address;
    let mut streams: Vec<_> = (0..40).map(|_| std::net::TcpStream::connect(web).unwrap()).collect();
    for stream in &mut streams {
        stream.set_read_timeout(Some(support::DEADLINE)).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    }
    for mut stream in streams {
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap_or(0), 0, "half an upgrade has no answer");
    }
    let http = &target.net.devnet.nodes[0].http_address;
    let idle: Vec<_> = (0..100).map(|_| std::net::TcpStream::connect(http).unwrap()).collect();
    target.assert_unharmed("half-open connections").await;
    drop(idle);
}

/// Three of four run, so that the fourth's key is free to use.
async fn three_of_four() -> (Target, SecretKey) {
    let mut net = TestNet::with_interval(4, 3_600_000);
    for node in 0..3 {
        net.start(node);
    }
    net.wait_ready(&[0, 1, 2]);
    let key = net.member_key(3);
    (Target::of(net).await, key)
}

#[tokio::test]
async fn a_handshake_that_is_wrong_ends_with_its_reason() {
    let (mut target, key) = three_of_four().await;
    let net = &target.net;
    let stranger = SecretKey::generate();
    let masternode = |key: Option<&SecretKey>| hello(net, Role::Masternode, key);
    let wallet = || hello(net, Role::Wallet, None);
    let own = net.member_key(0);
    let hellos: [(&str, Hello, ErrorCode); 10] = [
        ("another network", Hello { network: Network::Testnet, ..wallet() }, ErrorCode::WrongNetwork),
        (
            "another genesis",
            Hello { genesis_hash: TestNet::new(1).genesis.hash(), ..wallet() },
            ErrorCode::WrongGenesis,
        ),
        ("version 2", Hello { protocol_version: 2, ..wallet() }, ErrorCode::UnsupportedVersion),
        ("version 0", Hello { protocol_version: 0, ..wallet() }, ErrorCode::UnsupportedVersion),
        (
            "a member of another genesis",
            { Hello { genesis_hash: TestNet::new(1).genesis.hash(), ..masternode(Some(&key)) } },
            ErrorCode::WrongGenesis,
        ),
        ("a stranger's key", masternode(Some(&stranger)), ErrorCode::NotMember),
        ("a masternode without a key", masternode(None), ErrorCode::NotMember),
        ("the node's own key", masternode(Some(&own)), ErrorCode::DuplicateIdentity),
        ("a long name", Hello { user_agent: "x".repeat(MAX_TEXT + 1), ..wallet() }, ErrorCode::Malformed),
        ("a long address", Hello { listen_address: Some("x".repeat(MAX_TEXT + 1)), ..wallet() }, ErrorCode::Malformed),
    ];
    for (what, hello, code) in hellos {
        let mut link = Link::frames(net, 0).await;
        link.send(&NetworkMessage::Hello(hello)).await;
        link.sent_away(what, code).await;
    }
    let early = [
        ("a ping before the Hello", NetworkMessage::Ping(Nonce { nonce: 1 })),
        ("a proof before the Hello", NetworkMessage::Authenticate(Authenticate { signature: key.sign(b"") })),
        ("votes before the Hello", votes(&key, &net.committee(), 1)),
        ("a payment before the Hello", NetworkMessage::TransactionBroadcast(net.split(&target.coin, 2).to_raw())),
    ];
    for (what, message) in early {
        let mut link = Link::frames(net, 0).await;
        link.send(&message).await;
        link.sent_away(what, ErrorCode::Malformed).await;
    }
    proofs(net, &key, &stranger).await;
    // Once the handshake is over there is no second one, and no other role to be had.
    let mut link = Link::wallet(net, 0).await;
    for again in [wallet(), masternode(Some(&key))] {
        link.send(&NetworkMessage::Hello(again)).await;
        assert_eq!(link.error("a second Hello").await.code, ErrorCode::Malformed);
    }
    link.send(&NetworkMessage::Authenticate(Authenticate { signature: key.sign(b"") })).await;
    assert_eq!(link.error("a proof that nobody wants").await.code, ErrorCode::Malformed);
    link.send(&votes(&key, &net.committee(), 1)).await;
    assert_eq!(link.error("votes").await.code, ErrorCode::NotAuthorized);
    assert!(!net.status(0)["peers"].as_array().unwrap().contains(&json!(net.devnet.nodes[3].id)));
    target.assert_unharmed("bad handshakes").await;
}

/// A member's key in the `Hello`, and no proof, or one that proves nothing.
async fn proofs(net: &TestNet, key: &SecretKey, stranger: &SecretKey) {
    let ours = hello(net, Role::Masternode, Some(key));
    let mut link = Link::frames(net, 0).await;
    let theirs = link.greet(net, &ours).await;
    link.authenticate(net, &ours, &theirs, stranger).await;
    link.sent_away("a stranger's signature", ErrorCode::BadSignature).await;
    // A proof that was good on another connection, as somebody may have heard it.
    let mut good = Link::frames(net, 0).await;
    let heard = good.greet(net, &ours).await;
    let mut link = Link::frames(net, 0).await;
    link.greet(net, &ours).await;
    link.authenticate(net, &ours, &heard, key).await;
    link.sent_away("a proof of another connection", ErrorCode::BadSignature).await;
    // One that was made for another node, and is passed on by it.
    let mut elsewhere = Link::frames(net, 1).await;
    let other = elsewhere.greet(net, &ours).await;
    let mut link = Link::frames(net, 0).await;
    let theirs = link.greet(net, &ours).await;
    let passed_on = Hello { nonce: theirs.nonce, ..other };
    link.authenticate(net, &ours, &passed_on, key).await;
    link.sent_away("a proof for another node", ErrorCode::BadSignature).await;
    let instead = [
        ("a ping instead of a proof", NetworkMessage::Ping(Nonce { nonce: 1 }), ErrorCode::Malformed),
        ("a second Hello instead of a proof", NetworkMessage::Hello(ours.clone()), ErrorCode::Malformed),
        ("votes instead of a proof", votes(key, &net.committee(), 1), ErrorCode::Malformed),
    ];
    for (what, message, code) in instead {
        let mut link = Link::frames(net, 0).await;
        link.greet(net, &ours).await;
        link.send(&message).await;
        link.sent_away(what, code).await;
    }
    good.sent_away("no proof at all", ErrorCode::HandshakeTimeout).await;
}

fn random_vote() -> Vote {
    Vote { kind: VoteKind::Commit, txid: Txid::from_bytes(rand::random()) }
}

/// A well signed batch of votes on transactions that nobody knows.
fn votes(key: &SecretKey, committee: &Committee, n: usize) -> NetworkMessage {
    let batch = sign_batch(key, committee, (0..n).map(|_| random_vote()).collect()).unwrap();
    NetworkMessage::Votes(Arc::new(batch.get().wire().clone()))
}

/// A payment of a coin that never was: sound in form, and it can lock nothing.
fn phantom(net: &TestNet) -> Transaction {
    let coin = Coin {
        outpoint: OutPoint { txid: Txid::from_bytes(rand::random()), vout: 0 },
        amount: Amount::from_units(5_000).unwrap(),
        key: SecretKey::generate(),
    };
    let output = Output { amount: Amount::from_units(1).unwrap(), address: net.address(&coin.key) };
    net.sign(&[coin], vec![output], 0)
}

/// A certificate of these members on one transaction, each vote in a batch of its own.
fn certificate(committee: &Committee, txid: Txid, keys: &[&SecretKey]) -> Certificate {
    let vote = Vote { kind: VoteKind::Commit, txid };
    let signed = |key: &&SecretKey| {
        let batch = sign_batch(key, committee, vec![vote]).unwrap();
        let wire = batch.get().wire();
        SignedVote { voter: wire.voter, signature: wire.signature, index: 0, batch_size: 1, path: Vec::new() }
    };
    Certificate { kind: VoteKind::Commit, txid, epoch: 0, votes: keys.iter().map(signed).collect() }
}

/// What only members may say, said by everybody else, with votes that real members have
/// really signed.
#[tokio::test]
async fn strangers_have_no_say() {
    let mut target = Target::new(1).await;
    let net = &target.net;
    let member = net.member_key(0);
    let payment = net.split(&target.coin, 2);
    let proof = certificate(&net.committee(), payment.txid(), &[&member]);
    proof.clone().verify(&net.committee()).unwrap();
    let entry = CertifiedTransaction { transaction: payment.to_raw(), certificate: Some(proof) };
    let rejection = RejectionMessage { code: "InputSpent".into(), message: String::new(), by: None };
    let messages = [
        votes(&member, &net.committee(), 3),
        NetworkMessage::Transactions(Transactions { transactions: vec![entry.clone()] }),
        NetworkMessage::Finalized(Finalized { entries: vec![entry], next: None }),
        NetworkMessage::Status(Status { height: 9, in_flight: vec![payment.txid()] }),
        NetworkMessage::TransactionRejected(TransactionRejected { txid: payment.txid(), rejection }),
    ];
    let mut observer = Link::frames(net, 0).await;
    // An observer may name a member's key; it has not proved it.
    observer.greet(net, &hello(net, Role::Observer, Some(&member))).await;
    for mut link in [Link::web_socket(net, 0).await, Link::wallet(net, 0).await, observer] {
        for message in &messages {
            let mut text = serde_json::to_value(message).unwrap();
            let (name, body) = text.as_object_mut().unwrap().iter_mut().next().unwrap();
            body["request_id"] = json!(name);
            let name = name.clone();
            let error = assert_refused(&mut link, &name, &text.to_string(), ErrorCode::NotAuthorized).await;
            assert_eq!(error.request_id, Some(name));
        }
        // Answers that nobody asked for are passed over.
        link.send(&NetworkMessage::Pong(Nonce { nonce: 1 })).await;
        link.send(&NetworkMessage::Error(ErrorMessage::new(ErrorCode::Internal, "you are ill"))).await;
        assert_alive(&mut link, "the connection stays").await;
    }
    let status = net.wallet(0).await.query(payment.txid()).await;
    assert_eq!(status.status, TransactionStatusKind::Unknown);
    target.assert_unharmed("strangers").await;
}

/// A member's key in the wrong hands: what it says is checked all the same.
#[tokio::test]
async fn a_lying_member_is_refused() {
    let (mut target, key) = three_of_four().await;
    let net = &target.net;
    let committee = net.committee();
    let stranger = SecretKey::generate();
    let mut link = Link::member(net, 0, &key).await;
    let batch = |n: usize| VoteBatch {
        voter: key.public_key(),
        epoch: 0,
        votes: (0..n).map(|_| random_vote()).collect(),
        signature: Signature::from_bytes([1; 64]),
    };
    let NetworkMessage::Votes(good) = votes(&key, &committee, 4) else { panic!("votes") };
    let NetworkMessage::Votes(foreign) = votes(&key, &elsewhere(net), 4) else { panic!("votes") };
    let mut edited = VoteBatch::clone(&good);
    edited.votes[2].kind = VoteKind::Approve;
    let mut swapped = VoteBatch::clone(&good);
    swapped.votes.swap(0, 1);
    let of_another = VoteBatch { voter: net.member_key(1).public_key(), ..VoteBatch::clone(&good) };
    let batches = [
        ("votes of a stranger", VoteBatch { voter: stranger.public_key(), ..batch(1) }, ErrorCode::NotMember),
        ("another epoch", VoteBatch { epoch: 1, ..batch(1) }, ErrorCode::Malformed),
        ("no votes", batch(0), ErrorCode::Malformed),
        ("a vote too many", batch(MAX_VOTES_PER_BATCH + 1), ErrorCode::Malformed),
        ("a bad signature", batch(MAX_VOTES_PER_BATCH), ErrorCode::BadSignature),
        ("votes on another network", VoteBatch::clone(&foreign), ErrorCode::BadSignature),
        ("a vote that was changed", edited, ErrorCode::BadSignature),
        ("votes in another order", swapped, ErrorCode::BadSignature),
        ("votes put into another's mouth", of_another, ErrorCode::BadSignature),
    ];
    for (what, batch, code) in batches {
        link.send(&NetworkMessage::Votes(Arc::new(batch))).await;
        let error = link.error(what).await;
        assert_eq!(error.code, code, "{what}: {}", error.message);
    }
    let body = phantom(net);
    let txid = body.txid();
    let keys = [net.member_key(1), net.member_key(2)];
    let quorum = certificate(&committee, txid, &[&key, &keys[0], &keys[1]]);
    quorum.clone().verify(&committee).unwrap();
    let edit = |change: &dyn Fn(&mut Certificate)| {
        let mut certificate = quorum.clone();
        change(&mut certificate);
        certificate
    };
    let certificates = [
        ("a vote short", edit(&|c| c.votes.truncate(2)), ErrorCode::Malformed),
        ("a member twice", edit(&|c| c.votes[1] = c.votes[0].clone()), ErrorCode::Malformed),
        ("a stranger among them", edit(&|c| c.votes[1].voter = stranger.public_key()), ErrorCode::Malformed),
        ("another epoch", edit(&|c| c.epoch = 1), ErrorCode::Malformed),
        ("a place beyond the batch", edit(&|c| c.votes[1].index = 1), ErrorCode::Malformed),
        ("approvals for commits", edit(&|c| c.kind = VoteKind::Approve), ErrorCode::BadSignature),
        ("a forged signature", edit(&|c| c.votes[1].signature = c.votes[0].signature), ErrorCode::BadSignature),
        ("another network", certificate(&elsewhere(net), txid, &[&key, &keys[0], &keys[1]]), ErrorCode::BadSignature),
        ("another transaction", certificate(&committee, phantom(net).txid(), &[&key]), ErrorCode::Malformed),
    ];
    for (what, certificate, code) in certificates {
        let entry = CertifiedTransaction { transaction: body.to_raw(), certificate: Some(certificate) };
        // In both messages that carry certificates.
        let entries = vec![entry];
        for message in [
            NetworkMessage::Transactions(Transactions { transactions: entries.clone() }),
            NetworkMessage::Finalized(Finalized { entries, next: Some(7) }),
        ] {
            link.send(&message).await;
            let error = link.error(what).await;
            assert_eq!(error.code, code, "{what}: {}", error.message);
        }
    }
    target.assert_unchanged("lies");
    // Sound votes on what nobody knows are kept for a while, a bounded number of them.
    for _ in 0..8 {
        link.send(&votes(&key, &committee, MAX_VOTES_PER_BATCH)).await;
    }
    let in_flight = (0..40_000).map(|_| Txid::from_bytes(rand::random())).collect();
    link.send(&NetworkMessage::Status(Status { height: u64::MAX, in_flight })).await;
    assert_alive(&mut link, "a member that only lies is still a member").await;
    target.assert_unharmed("a lying member").await;
}

/// Votes on what is settled decide nothing, so nobody checks who signed them, unless they are
/// said to be this node's own.
#[tokio::test]
async fn votes_on_what_is_settled_are_passed_over() {
    let (mut target, key) = three_of_four().await;
    let payment = target.net.split(&target.net.coins().remove(1), 2);
    target.net.wallet(0).await.pay(&payment).await;
    target.mark();
    let net = &target.net;
    let settled = || Vote { kind: VoteKind::Commit, txid: payment.txid() };
    let forged = |voter: &SecretKey, votes: Vec<Vote>| {
        let signature = Signature::from_bytes([1; 64]);
        NetworkMessage::Votes(Arc::new(VoteBatch { voter: voter.public_key(), epoch: 0, votes, signature }))
    };
    let mut link = Link::member(net, 0, &key).await;
    link.send(&forged(&key, vec![settled()])).await;
    link.send(&forged(&key, vec![Vote { kind: VoteKind::Approve, ..settled() }, settled()])).await;
    let refused = [
        ("one of two is not settled", forged(&key, vec![settled(), random_vote()])),
        ("its own", forged(&net.member_key(0), vec![settled()])),
    ];
    let malformed = [("no votes", vec![]), ("a vote too many", vec![settled(); MAX_VOTES_PER_BATCH + 1])];
    for (what, votes) in malformed {
        link.send(&forged(&key, votes)).await;
        assert_eq!(link.error(what).await.code, ErrorCode::Malformed, "{what}");
    }
    for (what, message) in &refused {
        link.send(message).await;
        assert_eq!(link.error(what).await.code, ErrorCode::BadSignature, "{what}");
    }
    link.send(&NetworkMessage::Ping(Nonce { nonce: 1 })).await;
    let answer = |message| match message {
        NetworkMessage::Error(error) => panic!("one error too many: {error:?}"),
        message => (message == NetworkMessage::Pong(Nonce { nonce: 1 })).then_some(()),
    };
    link.wait_for("no error for the first two", answer).await;
    target.assert_unharmed("votes on what is settled").await;
}

/// The same members on a network that began a second later.
fn elsewhere(net: &TestNet) -> Committee {
    let text = std::fs::read(net.directory().join(&net.devnet.genesis_file)).unwrap();
    let mut genesis: RawGenesis = serde_json::from_slice(&text).unwrap();
    genesis.timestamp += 1;
    Committee::of_genesis(&Genesis::try_from(genesis).unwrap())
}

#[tokio::test]
async fn too_many_bad_signatures_end_a_connection() {
    let (mut target, key) = three_of_four().await;
    let net = &target.net;
    let NetworkMessage::Votes(foreign) = votes(&key, &elsewhere(net), 1) else { panic!("votes") };
    let mut badly_signed = net.split(&target.coin, 2).to_raw();
    badly_signed.inputs[0].signature = Signature::from_bytes([7; 64]);
    let attacks = [
        ("votes", Link::member(net, 0, &key).await, NetworkMessage::Votes(foreign)),
        ("payments", Link::web_socket(net, 0).await, NetworkMessage::TransactionBroadcast(badly_signed.clone())),
        ("payments", Link::wallet(net, 0).await, NetworkMessage::TransactionBroadcast(badly_signed)),
    ];
    for (what, mut link, message) in attacks {
        let mut refused = 0;
        loop {
            link.send(&message).await;
            let told = link
                .wait_for(what, |message| match message {
                    NetworkMessage::Error(error) => Some(error.code),
                    NetworkMessage::TransactionStatus(status) => {
                        assert_eq!(status.rejection.unwrap().code, "InvalidSignature");
                        Some(ErrorCode::BadSignature)
                    }
                    _ => None,
                })
                .await;
            if told == ErrorCode::RateLimited {
                break;
            }
            assert_eq!(told, ErrorCode::BadSignature, "{what}");
            refused += 1;
        }
        assert!(refused >= SIGNATURE_FAILURES, "{what}: {refused} are forgiven");
        link.hung_up(what).await;
    }
    target.assert_unharmed("bad signatures").await;
}

/// Somebody starts a member's key a second time. The one that is there stays, as long as
/// it answers; if it does not, the new one takes its place.
#[tokio::test]
async fn a_second_instance_of_a_key_is_refused() {
    let (mut target, key) = three_of_four().await;
    let running = target.net.member_key(1);
    // While the members found each other a superfluous connection may have ended.
    let before = target.net.log(0).len();
    let mut twin = Link::member(&target.net, 0, &running).await;
    twin.sent_away("a twin of a running node", ErrorCode::DuplicateIdentity).await;
    let log = target.net.log(0).split_off(before);
    let left = format!("member disconnected peer={}", target.net.devnet.nodes[1].id);
    assert!(!plain(&log).contains(&left), "the first connection stays");
    target.assert_unharmed("a twin of a running node").await;
    // One that only answers pings lives too.
    let mut first = Link::member(&target.net, 0, &key).await;
    assert_alive(&mut first, "the first instance").await;
    for _ in 0..8 {
        let mut twin = Link::member(&target.net, 0, &key).await;
        tokio::select! {
            () = twin.sent_away("a twin", ErrorCode::DuplicateIdentity) => {}
            () = first.hung_up("the first") => panic!("the first instance was replaced although it answers"),
        }
    }
    assert_alive(&mut first, "the first instance stays").await;
    // From here on it is silent.
    let mut second = Link::member(&target.net, 0, &key).await;
    assert_alive(&mut second, "the second has taken its place").await;
    first.hung_up("the silent one").await;
    target.assert_unharmed("a silent twin").await;
}

/// A log without its colours.
fn plain(log: &str) -> String {
    log.split('\u{1b}').map(|part| part.split_once('m').map_or(part, |(_, text)| text)).collect()
}

#[tokio::test]
async fn one_address_gets_so_many_connections() {
    const PLACES: usize = 8;
    let mut net = TestNet::with_interval(1, 3_600_000);
    net.set_environment("TIME_MAX_CONNECTIONS_PER_IP", &PLACES.to_string());
    net.start_all();
    let mut target = Target::of(net).await;
    let net = &target.net;
    let web = format!("ws://{}", net.devnet.nodes[0].websocket_address);
    let connections = || net.status(0)["connections"].as_u64().unwrap();
    until("the connection of before is gone", || (connections() == 0).then_some(()));
    let mut links = Vec::new();
    for i in 0..PLACES {
        let link = if i % 2 == 0 { Link::web_socket(net, 0).await } else { Link::wallet(net, 0).await };
        links.push(link);
    }
    for link in &mut links {
        assert_alive(link, "within the limit").await;
    }
    for _ in 0..20 {
        let mut link = Link::frames(net, 0).await;
        link.sent_away("one too many", ErrorCode::TooManyConnections).await;
        match within("an upgrade", tokio_tungstenite::connect_async(&web)).await {
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => assert_eq!(response.status(), 503),
            other => panic!("{:?}", other.map(|_| "let in")),
        }
    }
    for link in &mut links {
        assert_alive(link, "those that are in stay").await;
    }
    drop(links);
    until("places are free again", || (connections() == 0).then_some(()));
    target.assert_unharmed("many connections").await;
}

fn subscribe(id: &str, outpoints: Vec<String>, addresses: Vec<String>) -> NetworkMessage {
    NetworkMessage::UTXOSubscribe(UTXOSubscribe {
        outpoints,
        addresses,
        subscriber_id: id.into(),
        resume_token: None,
        resume_from: None,
        log_id: None,
    })
}

#[tokio::test]
async fn requests_have_their_limits() {
    let mut target = Target::new(1).await;
    let net = &target.net;
    let txid = "00".repeat(32);
    let outpoints = |n: usize| (0..n).map(|vout| format!("{txid}:{vout}")).collect::<Vec<_>>();
    let address = net.address(&target.coin.key).to_string();
    let testnet = Address::of_key(&target.coin.key.public_key(), Network::Testnet).to_string();
    let mut mixed = address.clone();
    mixed.replace_range(8..9, &address[8..9].to_uppercase());
    if mixed == address {
        mixed.replace_range(0..1, "D");
    }
    let states = |text: &str| NetworkMessage::UTXOStateQuery(UTXOStateQuery { outpoints: vec![text.into()] });
    let coins = |addresses: Vec<String>, after: Option<&str>| {
        let after = after.map(str::to_owned);
        NetworkMessage::AddressQuery(time_masternode::net::AddressQuery { addresses, after, limit: 1 })
    };
    let mut requests = vec![
        ("too many filters", subscribe("x", outpoints(MAX_SUBSCRIPTION_FILTERS + 1), vec![]), ErrorCode::TooLarge),
        (
            "too many filters of two kinds",
            subscribe("x", outpoints(MAX_SUBSCRIPTION_FILTERS), vec![address.clone()]),
            ErrorCode::TooLarge,
        ),
        ("no name", subscribe("", vec![], vec![]), ErrorCode::Malformed),
        ("a long name", subscribe(&"x".repeat(MAX_TEXT + 1), vec![], vec![]), ErrorCode::Malformed),
        (
            "too many outpoints",
            NetworkMessage::UTXOStateQuery(UTXOStateQuery { outpoints: outpoints(MAX_OUTPOINTS_PER_QUERY + 1) }),
            ErrorCode::TooLarge,
        ),
        ("too many addresses", coins(vec![address.clone(); MAX_ADDRESSES_PER_QUERY + 1], None), ErrorCode::TooLarge),
        ("no place to go on from", coins(vec![address.clone()], Some("7")), ErrorCode::InvalidOutpoint),
        (
            "too many transactions",
            NetworkMessage::GetTransactions(GetTransactions {
                txids: vec![Txid::from_bytes([0; 32]); MAX_TRANSACTIONS_PER_REQUEST + 1],
                bodies_only: false,
            }),
            ErrorCode::TooLarge,
        ),
    ];
    let long = "x".repeat(100_000);
    for text in
        ["", ":", "7", &txid, &format!("{txid}:-1"), &format!("{txid}:07"), &format!("{txid}:4294967296"), &long]
    {
        requests.push(("no outpoint", states(text), ErrorCode::InvalidOutpoint));
        requests.push(("no outpoint", subscribe("x", vec![text.into()], vec![]), ErrorCode::InvalidOutpoint));
    }
    for text in ["", "dtime1", &testnet, &mixed, &address[..address.len() - 1], &format!("{address}q"), &long] {
        requests.push(("no address", coins(vec![text.into()], None), ErrorCode::InvalidAddress));
        requests.push(("no address", subscribe("x", vec![], vec![text.into()]), ErrorCode::InvalidAddress));
    }
    let mut socket = Link::web_socket(net, 0).await;
    let mut tcp = Link::wallet(net, 0).await;
    for (what, request, code) in requests {
        let text = serde_json::to_string(&request).unwrap();
        let error = assert_refused(&mut tcp, what, &text, code).await;
        assert!(error.message.len() < 1_000, "{what}: the refusal is not as long as what it refuses");
        if text.len() <= MAX_WALLET_MESSAGE_BYTES {
            assert_refused(&mut socket, what, &text, code).await;
        }
    }
    assert_eq!(net.status(0)["subscriptions"], 0);
    target.assert_unchanged("bad requests");
    for i in 0..MAX_SUBSCRIPTIONS_PER_CONNECTION {
        socket.send(&subscribe(&format!("s-{i}"), vec![], vec![])).await;
        let answer = socket.message().await;
        assert!(matches!(answer, Some(NetworkMessage::UTXOSubscribed(_))), "{i}: {answer:?}");
    }
    socket.send(&subscribe("one-more", vec![], vec![])).await;
    assert_eq!(socket.error("one too many").await.code, ErrorCode::TooManySubscriptions);
    // Elsewhere there is room, also for the same name, which nobody got.
    tcp.send(&subscribe("one-more", vec![], vec![address])).await;
    assert!(matches!(tcp.message().await, Some(NetworkMessage::UTXOSubscribed(_))));
    assert_eq!(net.status(0)["subscriptions"], MAX_SUBSCRIPTIONS_PER_CONNECTION + 1);
    target.before = target.state();
    target.assert_unharmed("limits").await;
}

/// Asks where `txid` stands so often, in one piece.
fn questions(txid: Txid, n: usize) -> Vec<u8> {
    let query = json!({ "TransactionStatusQuery": { "txid": txid } }).to_string();
    web_socket_frame(0x81, query.as_bytes()).repeat(n)
}

/// A wallet that reads asks so often, and again what the node was too busy for.
async fn ask(reader: &mut Link, txid: Txid, n: usize) {
    reader.raw(&questions(txid, n)).await;
    let mut left = n;
    while left > 0 {
        match reader.message().await.unwrap() {
            NetworkMessage::TransactionStatus(_) => left -= 1,
            NetworkMessage::Error(error) if error.code == ErrorCode::Busy => reader.raw(&questions(txid, 1)).await,
            other => panic!("{other:?}"),
        }
    }
}

/// Wallets that ask as fast as they can and never read an answer. One that does read may
/// be told `Busy`, which is no fault of its own: it asks again, and gets every answer.
#[tokio::test]
async fn a_wallet_is_served_while_others_flood() {
    const FLOODING: usize = 12;
    const QUESTIONS: usize = 12_000;
    let mut target = Target::new(4).await;
    let txid = target.coin.outpoint.txid;
    let flood = questions(txid, QUESTIONS);
    let mut unread = Vec::new();
    for _ in 0..FLOODING {
        unread.push(Link::narrow_web_socket(&target.net, 0).await);
    }
    let mut reader = Link::web_socket(&target.net, 0).await;
    let answers = async {
        for _ in 0..QUESTIONS / 100 {
            ask(&mut reader, txid, 100).await;
        }
    };
    let flooding = futures_util::future::join_all(unread.iter_mut().map(|link| link.raw(&flood)));
    tokio::join!(answers, async { tokio::time::timeout(Duration::from_secs(30), flooding).await.is_ok() });
    target.assert_unharmed("a flood").await;
    drop((unread, reader));
}

/// The same more cleverly: never so much at once that the node would be busy. Each answer
/// carries a finality proof, and none is read; they must not pile up in the node.
#[tokio::test]
async fn answers_that_nobody_reads_do_not_pile_up() {
    const ASKING: usize = 6;
    let mut target = Target::new(4).await;
    let txid = target.coin.outpoint.txid;
    let some = questions(txid, 500);
    let mut unread = Vec::new();
    for _ in 0..ASKING {
        unread.push(Link::narrow_web_socket(&target.net, 0).await);
    }
    let mut reader = Link::web_socket(&target.net, 0).await;
    for _ in 0..80 {
        let mut taken = Vec::new();
        for mut link in unread {
            // Once the node does not take any more, that one is stuck for good.
            if tokio::time::timeout(Duration::from_secs(1), link.raw(&some)).await.is_ok() {
                taken.push(link);
            } else {
                target.stuck.push(link);
            }
        }
        unread = taken;
        ask(&mut reader, txid, 1).await;
    }
    target.assert_unharmed("unread answers").await;
    drop((unread, reader));
}
