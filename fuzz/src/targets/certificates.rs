//! Certificates: one is good exactly when distinct members of quorum weight have signed
//! this vote, and it stays good whoever reads it again.

use std::collections::BTreeSet;

use time_masternode::consensus::{Certificate, CertificateError, CheckedCertificate, Vote};
use time_masternode::limits::{MAX_FRAME_BYTES, MAX_VOTES_PER_BATCH};
use time_masternode::types::Hash32;

use super::Outcome;
use super::oracle::{path_length, tagged};
use super::setting::{EQUAL, Setting, WEIGHTED, secret_of};
use super::votes::{batch_message, leaf};

/// The JSON of a certificate, for two committees. Signatures of members whose keys are
/// known are also made anew, so that changed bytes are no wall.
pub fn certificates(data: &[u8]) -> Outcome {
    if data.len() > MAX_FRAME_BYTES {
        return Outcome::Refused;
    }
    let Ok(certificate) = serde_json::from_slice::<Certificate>(data) else { return Outcome::Refused };
    let json = serde_json::to_vec(&certificate).expect("a certificate is JSON");
    assert_eq!(serde_json::from_slice::<Certificate>(&json).expect("it is read again"), certificate);
    let outcomes = [&*EQUAL, &*WEIGHTED].map(|setting| {
        let outcome = check(setting, &certificate);
        if let Some(resigned) = resign(setting, &certificate) {
            let outcome = check(setting, &resigned);
            if outcome == Outcome::Accepted {
                verified_stays_verified(setting, &resigned);
            }
        }
        outcome
    });
    if outcomes.contains(&Outcome::Accepted) { Outcome::Accepted } else { Outcome::Refused }
}

/// What a vote of the certificate has to sign; `None` if its path leads nowhere.
fn message_of(setting: &Setting, certificate: &Certificate, place: usize) -> Option<[u8; 32]> {
    let vote = &certificate.votes[place];
    let (mut index, mut size) = (vote.index as usize, vote.batch_size as usize);
    let expected = (index < size && size <= MAX_VOTES_PER_BATCH).then(|| path_length(index, size));
    if expected != Some(vote.path.len()) {
        return None;
    }
    let mut node = leaf(&Vote { kind: certificate.kind, txid: certificate.txid });
    let mut path = vote.path.iter().map(Hash32::as_bytes);
    while size > 1 {
        if index ^ 1 < size {
            let sibling = path.next()?;
            let (left, right) = if index % 2 == 1 { (*sibling, node) } else { (node, *sibling) };
            node = tagged("TIME/merkle", &[left, right].concat());
        }
        (index, size) = (index / 2, size.div_ceil(2));
    }
    Some(batch_message(setting, certificate.epoch, vote.batch_size as usize, &node))
}

/// Whether the protocol's words call it good, but for the signatures.
fn is_sound(setting: &Setting, certificate: &Certificate) -> bool {
    let members = setting.genesis.masternodes();
    let weight_of = |voter| members.iter().find(|m| m.public_key == voter).map(|m| m.weight);
    let weights: Option<Vec<u64>> = certificate.votes.iter().map(|vote| weight_of(vote.voter)).collect();
    let distinct = certificate.votes.iter().map(|vote| vote.voter).collect::<BTreeSet<_>>().len();
    let total: u64 = members.iter().map(|member| member.weight).sum();
    certificate.epoch == 0
        && distinct == certificate.votes.len()
        && weights.is_some_and(|weights| weights.iter().sum::<u64>() > 2 * total / 3)
        && (0..certificate.votes.len()).all(|place| message_of(setting, certificate, place).is_some())
}

fn check(setting: &Setting, certificate: &Certificate) -> Outcome {
    let sound = is_sound(setting, certificate);
    let checked = certificate.clone().check(&setting.committee);
    assert_eq!(checked.is_ok(), sound, "{certificate:?}: {:?}", checked.err());
    if let Err(error) = &checked {
        assert_ne!(*error, CertificateError::BadSignature, "signatures are not looked at yet");
    }
    let valid = sound
        && certificate.votes.iter().enumerate().all(|(place, vote)| {
            message_of(setting, certificate, place).is_some_and(|message| vote.voter.verify(&message, &vote.signature))
        });
    let verified = certificate.clone().verify(&setting.committee);
    assert_eq!(verified.is_ok(), valid, "it is good exactly when each signature is");
    if let Ok(verified) = verified {
        assert_eq!(CheckedCertificate::certificate(verified.get()), certificate);
        return Outcome::Accepted;
    }
    Outcome::Refused
}

/// The same votes, signed again by those whose keys are known; `None` if that is nobody.
fn resign(setting: &Setting, certificate: &Certificate) -> Option<Certificate> {
    let mut resigned = certificate.clone();
    let mut signed = 0;
    for (place, vote) in resigned.votes.iter_mut().enumerate().take(8) {
        let (Some(key), Some(message)) = (secret_of(&vote.voter), message_of(setting, certificate, place)) else {
            continue;
        };
        vote.signature = key.sign(&message);
        signed += 1;
    }
    (signed > 0).then_some(resigned)
}

fn verified_stays_verified(setting: &Setting, certificate: &Certificate) {
    let verify = |certificate: &Certificate, setting: &Setting| certificate.clone().verify(&setting.committee);
    let mut other = certificate.clone();
    other.votes.reverse();
    assert!(verify(&other, setting).is_ok(), "the order of the votes does not matter");
    let elsewhere = if std::ptr::eq(setting, &*EQUAL) { &*WEIGHTED } else { &*EQUAL };
    assert!(verify(certificate, elsewhere).is_err(), "it proves nothing on another network");
    other.votes.push(certificate.votes[0].clone());
    assert_eq!(verify(&other, setting).err(), Some(CertificateError::Repeated));
    other = certificate.clone();
    let mut bytes = *other.txid.as_bytes();
    bytes[0] ^= 1;
    other.txid = time_masternode::types::Txid::from_bytes(bytes);
    assert!(verify(&other, setting).is_err(), "it proves nothing of another transaction");
    other = certificate.clone();
    while other.votes.pop().is_some() {
        let sound = is_sound(setting, &other);
        assert_eq!(verify(&other, setting).is_ok(), sound, "fewer votes prove it while they are a quorum");
    }
}
