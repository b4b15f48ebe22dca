//! Who is there (protocol §8): `Hello` of both sides, then the proof of a member's key.

use serde::{Deserialize, Serialize};

use super::message::ErrorCode;
use crate::consensus::{Committee, MemberIndex};
use crate::limits::MAX_TEXT;
use crate::types::{GenesisHash, Hash32, Height, Network, PublicKey, Signature, UnixSeconds, tagged_hash};

/// The version of the protocol that this program speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// What a node says that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// A member, which proves its key.
    Masternode,
    /// Follows the network and does not vote.
    Observer,
    /// Sends payments and asks questions.
    Wallet,
}

/// The first message of both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// 1.
    pub protocol_version: u32,
    /// Which network.
    pub network: Network,
    /// Which one exactly.
    pub genesis_hash: GenesisHash,
    /// What the sender is.
    pub role: Role,
    /// A masternode's key.
    pub public_key: Option<PublicKey>,
    /// Where the sender can be dialled.
    pub listen_address: Option<String>,
    /// Random, for the proof.
    pub nonce: Hash32,
    /// Random for each start of the program.
    pub instance: Hash32,
    /// Program and version.
    pub user_agent: String,
    /// The height of the sender's chain.
    pub height: Height,
    /// The sender's clock.
    pub timestamp: UnixSeconds,
}

/// Why a handshake fails; each has its code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Another network.
    #[error("this is {ours}, not {theirs}")]
    WrongNetwork {
        /// This node's network.
        ours: Network,
        /// The peer's.
        theirs: Network,
    },
    /// Another genesis.
    #[error("another genesis")]
    WrongGenesis,
    /// Another protocol version.
    #[error("protocol version {0} is not spoken here")]
    UnsupportedVersion(u32),
    /// The key is no member's, or a masternode has none.
    #[error("the key is not a member's")]
    NotMember,
    /// The proof does not verify.
    #[error("the signature does not prove the key")]
    BadSignature,
    /// The peer claims this node's own key.
    #[error("another instance has this key")]
    DuplicateIdentity,
    /// Something else was said, or too much.
    #[error("{0}")]
    Malformed(&'static str),
    /// It stood still.
    #[error("the handshake took too long")]
    Timeout,
}

impl HandshakeError {
    /// The code of the `Error` that is sent before the connection is closed.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::WrongNetwork { .. } => ErrorCode::WrongNetwork,
            Self::WrongGenesis => ErrorCode::WrongGenesis,
            Self::UnsupportedVersion(_) => ErrorCode::UnsupportedVersion,
            Self::NotMember => ErrorCode::NotMember,
            Self::BadSignature => ErrorCode::BadSignature,
            Self::DuplicateIdentity => ErrorCode::DuplicateIdentity,
            Self::Malformed(_) => ErrorCode::Malformed,
            Self::Timeout => ErrorCode::HandshakeTimeout,
        }
    }
}

/// What a masternode signs to prove its key to the one whose nonce is in it.
pub fn handshake_message(
    genesis_hash: &GenesisHash,
    peer_nonce: &Hash32,
    own_nonce: &Hash32,
    peer_key: Option<&PublicKey>,
    own_key: &PublicKey,
) -> [u8; 32] {
    let peer_key = peer_key.map_or([0; 32], |key| *key.as_bytes());
    tagged_hash(
        "TIME/handshake",
        &[genesis_hash.as_bytes(), peer_nonce.as_bytes(), own_nonce.as_bytes(), &peer_key, own_key.as_bytes()],
    )
}

/// Checks a peer's `Hello`; `Some` is the member that it still has to prove to be.
pub(super) fn check_hello(
    theirs: &Hello,
    ours: &Hello,
    committee: &Committee,
) -> Result<Option<MemberIndex>, HandshakeError> {
    if theirs.protocol_version != ours.protocol_version {
        return Err(HandshakeError::UnsupportedVersion(theirs.protocol_version));
    }
    if theirs.network != ours.network {
        return Err(HandshakeError::WrongNetwork { ours: ours.network, theirs: theirs.network });
    }
    if theirs.genesis_hash != ours.genesis_hash {
        return Err(HandshakeError::WrongGenesis);
    }
    let too_long = theirs.user_agent.len() > MAX_TEXT
        || theirs.listen_address.as_ref().is_some_and(|address| address.len() > MAX_TEXT);
    if too_long {
        return Err(HandshakeError::Malformed("a text of the Hello is too long"));
    }
    match (theirs.role, theirs.public_key) {
        (Role::Masternode, Some(key)) if Some(key) == ours.public_key => Err(HandshakeError::DuplicateIdentity),
        (Role::Masternode, Some(key)) => committee.index_of(&key).map(Some).ok_or(HandshakeError::NotMember),
        (Role::Masternode, None) => Err(HandshakeError::NotMember),
        (Role::Observer | Role::Wallet, _) => Ok(None),
    }
}

/// Checks the proof of the key in `theirs`.
pub(super) fn check_proof(theirs: &Hello, ours: &Hello, signature: &Signature) -> Result<(), HandshakeError> {
    let key = theirs.public_key.ok_or(HandshakeError::NotMember)?;
    let message = handshake_message(&ours.genesis_hash, &ours.nonce, &theirs.nonce, ours.public_key.as_ref(), &key);
    if key.verify(&message, signature) { Ok(()) } else { Err(HandshakeError::BadSignature) }
}
