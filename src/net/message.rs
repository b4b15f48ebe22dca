//! The messages of both protocols, as JSON (protocol §8, §9).
//!
//! A [`NetworkMessage`] is serde's externally tagged JSON: `{"Ping": {"nonce": 1}}`.
//! Unknown fields are ignored. A request may carry a `request_id`, which is not part of
//! any message type: [`parse`] takes it out and [`encode`] puts it in.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::handshake::Hello;
use crate::consensus::{Certificate, ConsensusMessage, Rejection, VoteBatch};
use crate::limits::MAX_TEXT;
use crate::types::{
    Amount, BlockHash, DecidedBlock, Height, OutPoint, Output, RawTransaction, Signature, Txid, UTXOState, UnixSeconds,
    UtxoEntry,
};

/// A text that a request carries and its answer repeats.
pub type RequestId = String;

/// Everything that is ever said on a connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum NetworkMessage {
    /// Who one is; the first message of both sides over TCP.
    Hello(Hello),
    /// Proves the key of the `Hello`.
    Authenticate(Authenticate),
    /// A wallet's payment; from a member: "I have locked this".
    TransactionBroadcast(RawTransaction),
    /// A member's votes.
    Votes(Arc<VoteBatch>),
    /// Why a member refused a transaction: advice, without effect.
    TransactionRejected(TransactionRejected),
    /// Asks for bodies.
    GetTransactions(GetTransactions),
    /// Bodies with F, else C, else A.
    Transactions(Transactions),
    /// Asks for what is settled and not in the chain.
    GetFinalized(GetFinalized),
    /// A page of it, in the sender's own order.
    Finalized(Finalized),
    /// What a node is at.
    Status(Status),
    /// Asks for decided blocks.
    GetBlocks(GetBlocks),
    /// Decided blocks with their commit certificates.
    Blocks(Blocks),
    /// Asks what a member that lost votes may have voted on.
    GetFence(GetFence),
    /// A page of it.
    Fence(Fence),
    /// Proposals and votes about the next block.
    Consensus(Arc<ConsensusMessage>),
    /// Are you there?
    Ping(Nonce),
    /// I am.
    Pong(Nonce),
    /// Every refusal.
    Error(ErrorMessage),
    /// Asks where a transaction stands.
    TransactionStatusQuery(TransactionStatusQuery),
    /// Where a transaction stands.
    TransactionStatus(Box<TransactionStatus>),
    /// Asks where outputs stand.
    UTXOStateQuery(UTXOStateQuery),
    /// Where outputs stand.
    UTXOStateResponse(UTXOStateResponse),
    /// Asks for the live outputs of addresses.
    AddressQuery(AddressQuery),
    /// A page of them.
    AddressResponse(AddressResponse),
    /// Follow these outputs and addresses.
    UTXOSubscribe(UTXOSubscribe),
    /// They are followed from here on.
    UTXOSubscribed(UTXOSubscribed),
    /// More of the state at the subscription's beginning.
    UTXOSnapshot(UTXOSnapshot),
    /// Follow them no more.
    UTXOUnsubscribe(UTXOUnsubscribe),
    /// They are followed no more.
    UTXOUnsubscribed(UTXOUnsubscribed),
    /// An output took a step.
    UTXOStateNotification(UTXOStateNotificationMessage),
    /// A block was executed.
    BlockNotification(BlockNotification),
}

impl NetworkMessage {
    /// The tag of [`Self::TransactionBroadcast`].
    pub const TRANSACTION_BROADCAST: &'static str = "TransactionBroadcast";

    /// The tags of all messages.
    pub const NAMES: [&'static str; 31] = [
        "Hello",
        "Authenticate",
        Self::TRANSACTION_BROADCAST,
        "Votes",
        "TransactionRejected",
        "GetTransactions",
        "Transactions",
        "GetFinalized",
        "Finalized",
        "Status",
        "GetBlocks",
        "GetFence",
        "Fence",
        "Blocks",
        "Consensus",
        "Ping",
        "Pong",
        "Error",
        "TransactionStatusQuery",
        "TransactionStatus",
        "UTXOStateQuery",
        "UTXOStateResponse",
        "AddressQuery",
        "AddressResponse",
        "UTXOSubscribe",
        "UTXOSubscribed",
        "UTXOSnapshot",
        "UTXOUnsubscribe",
        "UTXOUnsubscribed",
        "UTXOStateNotification",
        "BlockNotification",
    ];
}

/// A signature over `H("TIME/handshake", ...)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authenticate {
    /// By the key of the `Hello`.
    pub signature: Signature,
}

/// Why a member refused a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransactionRejected {
    /// Which.
    pub txid: Txid,
    /// Why.
    pub rejection: RejectionMessage,
}

/// A [`Rejection`] on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectionMessage {
    /// The stable code of the rule.
    pub code: String,
    /// The same for people.
    pub message: String,
    /// In whose favour.
    pub by: Option<Txid>,
}

impl From<&Rejection> for RejectionMessage {
    fn from(rejection: &Rejection) -> Self {
        Self { code: rejection.code().into(), message: rejection.to_string(), by: rejection.by() }
    }
}

/// Asks for bodies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetTransactions {
    /// Of these.
    pub txids: Vec<Txid>,
    /// The certificates, which are far larger and have to be made, are of no use to the sender.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bodies_only: bool,
}

/// A body with the best certificate that the sender holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertifiedTransaction {
    /// The body.
    pub transaction: RawTransaction,
    /// F, else C, else A, else nothing.
    pub certificate: Option<Certificate>,
}

/// Those of the asked-for bodies that the sender has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transactions {
    /// In the order of the request; unknown ones are left out.
    pub transactions: Vec<CertifiedTransaction>,
}

/// Asks for what is settled and not in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetFinalized {
    /// The `next` of the page before; `null` for the first.
    pub after: Option<u64>,
    /// Entries at most.
    pub limit: u32,
}

/// A page of what is settled and not in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finalized {
    /// In the sender's own order.
    pub entries: Vec<CertifiedTransaction>,
    /// Where the next page begins; `null` at the end.
    pub next: Option<u64>,
}

/// What a node is at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The height of its chain.
    pub height: Height,
    /// What it has in flight; rotates if that is much.
    pub in_flight: Vec<Txid>,
}

/// Asks for decided blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetBlocks {
    /// The first wanted height.
    pub from_height: Height,
    /// Blocks at most.
    pub limit: u32,
}

/// Decided blocks in order of height.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// From the wanted height on.
    pub blocks: Vec<DecidedBlock>,
}

/// Asks what a member that lost votes may have voted on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetFence {
    /// The `next` of the page before; `null` for the first.
    pub after: Option<String>,
    /// Outpoints and transactions at most.
    pub limit: u32,
}

/// What can have been voted on, as far as the sender knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// How long the sender's chain was when it had read the page.
    pub height: Height,
    /// Unspent, locked and fenced outputs.
    pub outpoints: Vec<OutPoint>,
    /// Transactions in flight, or settled and not in the chain.
    pub transactions: Vec<RawTransaction>,
    /// Where the next page begins; `null` at the end.
    pub next: Option<String>,
}

/// A number that comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nonce {
    /// Any.
    pub nonce: u64,
}

/// The stable codes of [`ErrorMessage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ErrorCode {
    /// Not a message.
    Malformed,
    /// More bytes or items than allowed.
    TooLarge,
    /// A tag that this program does not know.
    UnknownMessage,
    /// Another network.
    WrongNetwork,
    /// Another genesis.
    WrongGenesis,
    /// Another protocol version.
    UnsupportedVersion,
    /// The key is no member's.
    NotMember,
    /// A signature that does not verify.
    BadSignature,
    /// The handshake stood still.
    HandshakeTimeout,
    /// Another live instance has this key.
    DuplicateIdentity,
    /// Only authenticated members may send this.
    NotAuthorized,
    /// Too many messages or bad signatures.
    RateLimited,
    /// No room for another connection.
    TooManyConnections,
    /// No room for another request; nothing was done.
    Busy,
    /// No room for another subscription.
    TooManySubscriptions,
    /// The token does not fit.
    NotYourSubscription,
    /// A text that is no outpoint.
    InvalidOutpoint,
    /// A text that is no address of this network.
    InvalidAddress,
    /// The node's own fault.
    Internal,
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorMessage {
    /// The stable code.
    pub code: ErrorCode,
    /// The same for people.
    pub message: String,
    /// The refused request's, if it had one.
    pub request_id: Option<RequestId>,
}

impl ErrorMessage {
    /// A refusal; [`encode`] adds the request's id.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), request_id: None }
    }
}

/// Asks where a transaction stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransactionStatusQuery {
    /// Which.
    pub txid: Txid,
}

/// Where a transaction stands, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransactionStatusKind {
    /// This node knows nothing of it.
    Unknown,
    /// Refused; nothing was changed.
    Rejected,
    /// Stored durably, its inputs locked.
    Pending,
    /// Final, for ever.
    Finalized,
    /// In a block.
    Confirmed,
    /// Dead, for ever.
    Aborted,
}

impl TransactionStatusKind {
    /// Whether it is final, in a block or not.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Finalized | Self::Confirmed)
    }
}

/// What proves that a transaction is final, offline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinalityProof {
    /// F(T).
    Commit(Arc<Certificate>),
    /// A block that contains it, where only a block settled it.
    Block(Arc<DecidedBlock>),
}

/// Where a transaction stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransactionStatus {
    /// Which.
    pub txid: Txid,
    /// In one word.
    pub status: TransactionStatusKind,
    /// Why, if it was rejected or aborted.
    pub rejection: Option<RejectionMessage>,
    /// Members that approved, as far as this node knows.
    pub approvals: u32,
    /// Members that committed, as far as this node knows.
    pub commits: u32,
    /// Members there are.
    pub total_masternodes: u32,
    /// Its block, if confirmed.
    pub block_height: Option<Height>,
    /// The proof, if final.
    pub finality_proof: Option<FinalityProof>,
}

/// Asks where outputs stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOStateQuery {
    /// `txid:vout` each.
    pub outpoints: Vec<String>,
}

/// Where one output stands; nulls where it is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateEntry {
    /// Which.
    pub outpoint: OutPoint,
    /// Amount and owner.
    pub output: Option<Output>,
    /// Where it stands.
    pub state: Option<UTXOState>,
}

/// Where outputs stand, in the order of the query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOStateResponse {
    /// One for each asked outpoint.
    pub states: Vec<StateEntry>,
}

/// Asks for the live outputs of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressQuery {
    /// Of these.
    pub addresses: Vec<String>,
    /// The `next` of the page before; `null` for the first.
    pub after: Option<String>,
    /// UTXOs at most, up to 1,000.
    pub limit: u32,
}

/// Unspent and locked outputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressResponse {
    /// In order of outpoint.
    pub utxos: Vec<UtxoEntry>,
    /// The sum of amounts over all pages.
    pub total: Amount,
    /// Where the next page begins; `null` at the end.
    pub next: Option<String>,
    /// The last change that the page contains.
    pub sequence: u64,
}

/// Follow these outputs and addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOSubscribe {
    /// `txid:vout` each.
    #[serde(default)]
    pub outpoints: Vec<String>,
    /// Addresses of this network.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// A name that the wallet chooses.
    pub subscriber_id: String,
    /// 32 bytes in hex: the right to resume and to cancel it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_token: Option<String>,
    /// The last sequence that the wallet has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_from: Option<u64>,
    /// The log that the sequence is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_id: Option<String>,
}

/// They are followed from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOSubscribed {
    /// The wallet's name for it.
    pub subscriber_id: String,
    /// Keep it: without it nobody resumes or cancels the subscription.
    pub resume_token: String,
    /// The name of this node's change log.
    pub log_id: String,
    /// Notifications go on from the next.
    pub sequence: u64,
    /// Whether what the wallet knew is void, and `utxos` is everything.
    pub reset: bool,
    /// The state at `sequence`.
    pub utxos: Vec<UtxoEntry>,
    /// Whether the state goes on in `UTXOSnapshot` messages.
    pub more: bool,
}

/// More of the state at a subscription's beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOSnapshot {
    /// The wallet's name for it.
    pub subscriber_id: String,
    /// The next part.
    pub utxos: Vec<UtxoEntry>,
    /// Whether there is yet more.
    pub more: bool,
}

/// Follow them no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOUnsubscribe {
    /// The wallet's name for it.
    pub subscriber_id: String,
    /// Not needed on the connection that subscribed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_token: Option<String>,
}

/// They are followed no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOUnsubscribed {
    /// The wallet's name for it.
    pub subscriber_id: String,
}

/// A step of an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOStateNotification {
    /// Which.
    pub outpoint: OutPoint,
    /// Amount and owner.
    pub output: Output,
    /// Where it stood; null when it came into being: an incoming payment.
    pub old_state: Option<UTXOState>,
    /// Where it stands now.
    pub new_state: UTXOState,
    /// When, by the reporting node's clock.
    pub timestamp: UnixSeconds,
    /// The id of the node that reports.
    pub originator: String,
}

/// A step of an output, with its place in the change log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UTXOStateNotificationMessage {
    /// What the wallet resumes from.
    pub sequence: u64,
    /// The step.
    pub notification: UTXOStateNotification,
}

/// A block was executed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockNotification {
    /// What the wallet resumes from.
    pub sequence: u64,
    /// Its height.
    pub height: Height,
    /// Its hash.
    pub block_hash: BlockHash,
    /// Its timestamp.
    pub timestamp_ms: u64,
    /// Those of its transactions that touch the subscription.
    pub transactions: Vec<Txid>,
}

/// A parsed message and the request's id.
#[derive(Debug, Clone, PartialEq)]
pub struct Incoming {
    /// The message.
    pub message: NetworkMessage,
    /// To be repeated in the answer.
    pub request_id: Option<RequestId>,
}

/// Parses one message. On failure, the `Error` to answer with.
pub fn parse(bytes: &[u8]) -> Result<Incoming, ErrorMessage> {
    let request_id = find_request_id(bytes);
    match serde_json::from_slice::<NetworkMessage>(bytes) {
        Ok(_) if !has_object(bytes) => Err(ErrorMessage::new(ErrorCode::Malformed, "a message is an object")),
        Ok(message) => Ok(Incoming { message, request_id }),
        Err(error) => Err(ErrorMessage { request_id, ..describe(bytes, &error) }),
    }
}

fn describe(bytes: &[u8], error: &serde_json::Error) -> ErrorMessage {
    let tagged = serde_json::from_slice::<BTreeMap<String, serde::de::IgnoredAny>>(bytes);
    match tagged.as_ref().map(|map| (map.len(), map.keys().next())) {
        Ok((1, Some(tag))) if !NetworkMessage::NAMES.contains(&tag.as_str()) => {
            let tag: String = tag.chars().take(MAX_TEXT).collect();
            ErrorMessage::new(ErrorCode::UnknownMessage, format!("unknown message {tag:?}"))
        }
        _ => {
            let what: String = error.to_string().chars().take(MAX_TEXT).collect();
            ErrorMessage::new(ErrorCode::Malformed, what)
        }
    }
}

/// Whether what stands behind the tag of a message is an object: a list of its fields in their
/// order would be read as well. The tag is one of the names, so the first colon ends it.
fn has_object(bytes: &[u8]) -> bool {
    let mut body = bytes.iter().skip_while(|byte| **byte != b':').skip(1);
    body.find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{')
}

/// The name of a message, from its first bytes. `None` if that is not all there is to say, as where
/// it is spelled with escapes.
pub(super) fn find_name(bytes: &[u8]) -> Option<&str> {
    let quoted = bytes.trim_ascii_start().strip_prefix(b"{")?.trim_ascii_start().strip_prefix(b"\"")?;
    let end = quoted.iter().take(MAX_TEXT).position(|byte| matches!(byte, b'"' | b'\\'))?;
    let (name, rest) = quoted.split_at(end);
    rest.starts_with(b"\"").then(|| std::str::from_utf8(name).ok()).flatten()
}

/// Looks into the body only where the bytes have the name at all.
pub(super) fn find_request_id(bytes: &[u8]) -> Option<RequestId> {
    const NAME: &[u8] = b"\"request_id\"";
    if !bytes.windows(NAME.len()).any(|window| window == NAME) {
        return None;
    }
    #[derive(Deserialize)]
    struct Body {
        request_id: Option<RequestId>,
    }
    let map: BTreeMap<String, Body> = serde_json::from_slice(bytes).ok()?;
    map.into_values().next()?.request_id.filter(|id| id.len() <= MAX_TEXT)
}

/// The JSON of a message, with the id of the request that it answers.
pub fn encode(message: &NetworkMessage, request_id: Option<&str>) -> bytes::Bytes {
    let plain = || serde_json::to_vec(message).unwrap_or_default();
    let Some(request_id) = request_id else { return plain().into() };
    let tagged = match serde_json::to_value(message) {
        Ok(serde_json::Value::Object(tagged)) => tagged,
        _ => return plain().into(),
    };
    let with_id = |(tag, mut body): (String, serde_json::Value)| {
        if let Some(body) = body.as_object_mut() {
            body.insert("request_id".into(), request_id.into());
        }
        (tag, body)
    };
    let tagged: serde_json::Map<_, _> = tagged.into_iter().map(with_id).collect();
    serde_json::to_vec(&tagged).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_without_reading_the_message() {
        for name in NetworkMessage::NAMES {
            assert_eq!(find_name(format!("{{\"{name}\": {{}}}}").as_bytes()), Some(name));
            assert_eq!(find_name(format!(" \n{{\t\"{name}\"").as_bytes()), Some(name));
        }
        let long = format!("{{\"{}\": 1}}", "x".repeat(MAX_TEXT));
        for text in ["", "{", "{\"", "{\"Ping", "{}", "[\"Ping\"]", "\"Ping\"", "{\"P\\u0069ng\": 1}", &long] {
            assert_eq!(find_name(text.as_bytes()), None, "{text}");
        }
        assert_eq!(find_name(b"{\"\xff\": 1}"), None);
    }

    #[test]
    fn what_is_no_message_gets_a_code() {
        let code = |text: &str| parse(text.as_bytes()).unwrap_err().code;
        assert_eq!(code("{\"NoSuchMessage\": {}}"), ErrorCode::UnknownMessage);
        for text in ["", "{}", "[]", "7", "{\"Ping\": {}}", "{\"Ping\": {\"nonce\": -1}}", "{\"Ping\":", "\u{0}"] {
            assert_eq!(code(text), ErrorCode::Malformed, "{text:?}");
        }
        for text in ["{\"Ping\": [1]}", "{\"Error\": [\"UnknownMessage\", \"a\", \"b\"]}", "{ \"Ping\"\t:\n[1]}"] {
            assert_eq!(code(text), ErrorCode::Malformed, "{text:?}");
        }
        assert_eq!(
            parse(b" {\n\"Ping\"\t:\r{ \"nonce\":1}}").unwrap().message,
            NetworkMessage::Ping(Nonce { nonce: 1 })
        );
        assert_eq!(code("{\"Ping\": {\"nonce\": 1}, \"Pong\": {\"nonce\": 1}}"), ErrorCode::Malformed);
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(code(&deep), ErrorCode::Malformed);
    }

    #[test]
    fn a_request_id_is_found_and_repeated() {
        let incoming = parse(br#"{"Ping": {"nonce": 7, "request_id": "r1", "more": true}}"#).unwrap();
        assert_eq!(incoming.message, NetworkMessage::Ping(Nonce { nonce: 7 }));
        assert_eq!(incoming.request_id.as_deref(), Some("r1"));
        let answer = encode(&NetworkMessage::Pong(Nonce { nonce: 7 }), Some("r1"));
        assert_eq!(&answer[..], br#"{"Pong":{"nonce":7,"request_id":"r1"}}"#);
        assert_eq!(parse(br#"{"Nope": {"request_id": "r2"}}"#).unwrap_err().request_id.as_deref(), Some("r2"));
        let long = format!(r#"{{"Ping": {{"nonce": 7, "request_id": "{}"}}}}"#, "x".repeat(MAX_TEXT + 1));
        assert_eq!(parse(long.as_bytes()).unwrap().request_id, None);
    }

    #[test]
    fn every_name_is_a_message() {
        for name in NetworkMessage::NAMES {
            let error = parse(format!("{{\"{name}\": 7}}").as_bytes()).unwrap_err();
            assert_eq!(error.code, ErrorCode::Malformed, "{name}");
        }
        let error = serde_json::from_str::<NetworkMessage>("{\"X\": 7}").unwrap_err().to_string();
        let listed = error.matches('`').count() / 2 - 1;
        assert_eq!(listed, NetworkMessage::NAMES.len(), "serde knows as many names: {error}");
    }
}
