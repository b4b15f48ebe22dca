//! What a node says, read no further than the measurement needs.
//!
//! A final status has a kilobyte of proof: skipping it costs a fraction of what parsing it
//! into certificates would, and the measuring shares its cores with the nodes.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;
use time_masternode::net::{ErrorCode, TransactionStatusKind};
use time_masternode::types::Txid;

use super::load::Status;

/// A message of a node.
#[derive(Debug, Deserialize)]
pub enum Heard<'a> {
    #[serde(borrow)]
    TransactionStatus(HeardStatus<'a>),
    #[serde(borrow)]
    Error(HeardError<'a>),
    UTXOSubscribed(IgnoredAny),
    UTXOSnapshot(IgnoredAny),
    UTXOUnsubscribed(IgnoredAny),
    #[serde(borrow)]
    UTXOStateNotification(HeardNotification<'a>),
    BlockNotification(IgnoredAny),
}

/// Where a transaction stands.
#[derive(Debug, Deserialize)]
pub struct HeardStatus<'a> {
    txid: Txid,
    status: TransactionStatusKind,
    #[serde(borrow)]
    rejection: Option<HeardRejection<'a>>,
    finality_proof: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
struct HeardRejection<'a> {
    #[serde(borrow)]
    code: Cow<'a, str>,
}

/// A refusal.
#[derive(Debug, Deserialize)]
pub struct HeardError<'a> {
    pub code: ErrorCode,
    #[serde(borrow)]
    pub message: Cow<'a, str>,
    #[serde(borrow)]
    pub request_id: Option<Cow<'a, str>>,
}

/// A step of an output.
#[derive(Debug, Deserialize)]
pub struct HeardNotification<'a> {
    pub sequence: u64,
    #[serde(borrow)]
    pub notification: HeardStep<'a>,
}

/// Which output, and whether it is a new one.
#[derive(Debug, Deserialize)]
pub struct HeardStep<'a> {
    pub outpoint: HeardOutpoint,
    #[serde(borrow)]
    pub output: HeardOutput<'a>,
    pub old_state: Option<IgnoredAny>,
}

/// The transaction that made it.
#[derive(Debug, Deserialize)]
pub struct HeardOutpoint {
    pub txid: Txid,
}

/// Whose it is.
#[derive(Debug, Deserialize)]
pub struct HeardOutput<'a> {
    #[serde(borrow)]
    pub address: Cow<'a, str>,
}

impl HeardStatus<'_> {
    /// What the load has to know of it.
    pub fn status(&self) -> Status<'_> {
        Status {
            txid: self.txid,
            kind: self.status,
            code: self.rejection.as_ref().map(|rejection| &*rejection.code),
            proved: self.finality_proof.is_some(),
        }
    }
}

/// Reads a message.
pub fn read(text: &str) -> anyhow::Result<Heard<'_>> {
    let said = || text.chars().take(200).collect::<String>();
    serde_json::from_str(text)
        .map_err(|error| anyhow::anyhow!("a node said what was not expected: {error}: {}", said()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use time_masternode::consensus::{Certificate, VoteKind};
    use time_masternode::net::{
        ErrorMessage, FinalityProof, NetworkMessage, RejectionMessage, TransactionStatus, UTXOStateNotification,
        UTXOStateNotificationMessage, encode,
    };
    use time_masternode::types::{Address, Amount, Network, OutPoint, Output, SecretKey, UTXOState};

    use super::*;

    fn text(message: &NetworkMessage, request_id: Option<&str>) -> String {
        String::from_utf8(encode(message, request_id).to_vec()).unwrap()
    }

    #[test]
    fn statuses_are_read_as_the_node_writes_them() {
        let txid = Txid::from_bytes([7; 32]);
        let certificate = Certificate { kind: VoteKind::Commit, txid, epoch: 0, votes: Vec::new() };
        let status = TransactionStatus {
            txid,
            status: TransactionStatusKind::Finalized,
            rejection: None,
            approvals: 3,
            commits: 3,
            total_masternodes: 4,
            block_height: None,
            finality_proof: Some(FinalityProof::Commit(Arc::new(certificate))),
        };
        let rejection = RejectionMessage { code: "InputLocked".into(), message: "a \"quoted\" text".into(), by: None };
        let rejected = TransactionStatus {
            status: TransactionStatusKind::Rejected,
            rejection: Some(rejection),
            finality_proof: None,
            ..status.clone()
        };
        for (status, code, proved) in [(status, None, true), (rejected, Some("InputLocked"), false)] {
            let kind = status.status;
            let text = text(&NetworkMessage::TransactionStatus(Box::new(status)), Some("17"));
            let Heard::TransactionStatus(heard) = read(&text).unwrap() else { panic!("{text}") };
            let heard = heard.status();
            assert_eq!((heard.txid, heard.kind, heard.code, heard.proved), (txid, kind, code, proved));
        }
    }

    #[test]
    fn refusals_and_notifications_too() {
        let mut error = ErrorMessage::new(ErrorCode::Busy, "no room");
        error.request_id = Some("17".into());
        let text_of_error = text(&NetworkMessage::Error(error), Some("17"));
        let Heard::Error(heard) = read(&text_of_error).unwrap() else { panic!("{text_of_error}") };
        assert_eq!((heard.code, heard.request_id.as_deref()), (ErrorCode::Busy, Some("17")));

        let address = Address::of_key(&SecretKey::from_seed([1; 32]).public_key(), Network::Devnet);
        let txid = Txid::from_bytes([7; 32]);
        for old_state in [None, Some(UTXOState::Unspent)] {
            let notification = UTXOStateNotification {
                outpoint: OutPoint { txid, vout: 1 },
                output: Output { amount: Amount::from_units(5).unwrap(), address },
                old_state,
                new_state: UTXOState::Locked { txid, locked_at: 1 },
                timestamp: 1,
                originator: "m".into(),
            };
            let message = UTXOStateNotificationMessage { sequence: 9, notification };
            let text = text(&NetworkMessage::UTXOStateNotification(message), None);
            let Heard::UTXOStateNotification(heard) = read(&text).unwrap() else { panic!("{text}") };
            assert_eq!((heard.sequence, heard.notification.outpoint.txid), (9, txid));
            assert_eq!(heard.notification.output.address, address.to_string());
            assert_eq!(heard.notification.old_state.is_none(), old_state.is_none());
        }
        assert!(read("{\"Nonsense\": {}}").is_err());
    }
}
