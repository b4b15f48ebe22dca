//! What a watch remembers between runs, and how it follows the node's change log.
//!
//! The state file is JSON `{subscriber_id, resume_token, addresses, log_id, sequence}`, mode
//! 0600 because the token is the right to resume and to cancel, and replaced by rename. It is
//! saved before the first subscription, so that an answer that is lost does no harm: the
//! node then knows the token that the file has. No I/O but for that file; no token is printed.

use std::path::Path;

use serde::{Deserialize, Serialize};
use time_masternode::net::{NetworkMessage, UTXOSubscribe, UTXOSubscribed};
use time_masternode::types::Address;

use time_masternode::files::{self, FileError};

/// Bytes that a state file may have.
const MAX_BYTES: u64 = 1024 * 1024;

/// Why there is no state to go on from.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not a state file.
    #[error("not a state file of `watch` (line {line}, column {column})")]
    Format {
        /// Where the parser stopped.
        line: usize,
        /// Where the parser stopped.
        column: usize,
    },
    /// A position without its log or the other way round.
    #[error("the state file has a sequence without a log_id or a log_id without a sequence")]
    HalfPosition,
    /// Resuming with other addresses would miss what they had before.
    #[error("the state file is of other addresses; use another file for these")]
    OtherAddresses,
}

/// A place in a node's change log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Which log.
    pub log_id: String,
    /// The last change that was seen.
    pub sequence: u64,
}

#[derive(Serialize, Deserialize)]
struct RawState {
    subscriber_id: String,
    resume_token: String,
    addresses: Vec<Address>,
    log_id: Option<String>,
    sequence: Option<u64>,
}

/// How a subscription began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// Changes go on where they stopped.
    Resumed,
    /// The first time: a snapshot comes.
    Fresh,
    /// What was known is void: a snapshot comes.
    Reset,
    /// The node neither goes on from the position nor says that it is void.
    Broken,
}

/// A subscription's identity and position.
pub struct WatchState {
    subscriber_id: String,
    resume_token: String,
    addresses: Vec<Address>,
    position: Option<Position>,
    /// Where the snapshot that is arriving belongs; it becomes the position with its end.
    arriving: Option<Position>,
}

impl WatchState {
    /// A new subscription with a token of the wallet's own choice.
    pub fn new(addresses: Vec<Address>) -> Self {
        Self {
            subscriber_id: format!("wallet-{}", hex::encode(rand::random::<[u8; 16]>())),
            resume_token: hex::encode(rand::random::<[u8; 32]>()),
            addresses,
            position: None,
            arriving: None,
        }
    }

    /// Reads a state; `None` if there is no file yet.
    pub fn load(path: &Path, addresses: &[Address]) -> Result<Option<Self>, StateError> {
        if !path.exists() {
            return Ok(None);
        }
        let bytes = files::read_secret(path, MAX_BYTES)?;
        // The parser's own message could quote the token.
        let raw: RawState = serde_json::from_slice(&bytes)
            .map_err(|error| StateError::Format { line: error.line(), column: error.column() })?;
        if raw.addresses != addresses {
            return Err(StateError::OtherAddresses);
        }
        let position = match (raw.log_id, raw.sequence) {
            (Some(log_id), Some(sequence)) => Some(Position { log_id, sequence }),
            (None, None) => None,
            _ => return Err(StateError::HalfPosition),
        };
        let (subscriber_id, resume_token) = (raw.subscriber_id, raw.resume_token);
        Ok(Some(Self { subscriber_id, resume_token, addresses: raw.addresses, position, arriving: None }))
    }

    /// Replaces the file; durable on return.
    pub fn save(&self, path: &Path) -> Result<(), StateError> {
        let raw = RawState {
            subscriber_id: self.subscriber_id.clone(),
            resume_token: self.resume_token.clone(),
            addresses: self.addresses.clone(),
            log_id: self.position.as_ref().map(|position| position.log_id.clone()),
            sequence: self.position.as_ref().map(|position| position.sequence),
        };
        let mut bytes = serde_json::to_vec_pretty(&raw).map_err(|_| StateError::HalfPosition)?;
        bytes.push(b'\n');
        Ok(files::replace(path, &bytes)?)
    }

    /// The subscription's name.
    pub fn subscriber_id(&self) -> &str {
        &self.subscriber_id
    }

    /// Up to where everything has been seen.
    pub const fn position(&self) -> Option<&Position> {
        self.position.as_ref()
    }

    /// The request to begin or to go on.
    pub fn request(&self) -> NetworkMessage {
        NetworkMessage::UTXOSubscribe(UTXOSubscribe {
            outpoints: Vec::new(),
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            subscriber_id: self.subscriber_id.clone(),
            resume_token: Some(self.resume_token.clone()),
            resume_from: self.position.as_ref().map(|position| position.sequence),
            log_id: self.position.as_ref().map(|position| position.log_id.clone()),
        })
    }

    /// Takes the answer to [`Self::request`].
    pub fn begin(&mut self, answer: &UTXOSubscribed) -> Beginning {
        let start = Position { log_id: answer.log_id.clone(), sequence: answer.sequence };
        self.resume_token.clone_from(&answer.resume_token);
        self.arriving = None;
        match self.position.take() {
            Some(position) if !answer.reset => {
                // The node promises all after the wallet's own position, whichever number it
                // names; a smaller one, another log or a state contradict that.
                let promised = position.log_id == start.log_id && position.sequence <= start.sequence;
                if promised && answer.utxos.is_empty() && !answer.more {
                    self.position = Some(position);
                    return Beginning::Resumed;
                }
                // Without a position the next attempt gets a snapshot, which misses nothing.
                Beginning::Broken
            }
            before => {
                self.arriving = Some(start);
                if !answer.more {
                    self.snapshot_ends();
                }
                if before.is_some() || answer.reset { Beginning::Reset } else { Beginning::Fresh }
            }
        }
    }

    /// The snapshot is complete: from here on its position is the wallet's.
    pub fn snapshot_ends(&mut self) {
        if let Some(position) = self.arriving.take() {
            self.position = Some(position);
        }
    }

    /// Takes a change's number; `false` if it was seen before.
    pub fn advance(&mut self, sequence: u64) -> bool {
        match self.position.as_mut().or(self.arriving.as_mut()) {
            Some(position) if sequence > position.sequence => {
                position.sequence = sequence;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use time_masternode::types::{Network, SecretKey};

    use super::*;

    fn addresses() -> Vec<Address> {
        vec![Address::of_key(&SecretKey::from_seed([1; 32]).public_key(), Network::Devnet)]
    }

    fn answer(state: &WatchState, sequence: u64, reset: bool, more: bool) -> UTXOSubscribed {
        UTXOSubscribed {
            subscriber_id: state.subscriber_id.clone(),
            resume_token: state.resume_token.clone(),
            log_id: "log".into(),
            sequence,
            reset,
            utxos: Vec::new(),
            more,
        }
    }

    fn asked(state: &WatchState) -> UTXOSubscribe {
        match state.request() {
            NetworkMessage::UTXOSubscribe(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_restart_goes_on_with_the_same_token_and_position() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        assert!(WatchState::load(&path, &addresses()).unwrap().is_none());
        let state = WatchState::new(addresses());
        let first = asked(&state);
        assert_eq!((first.resume_token.as_ref().map(String::len), first.resume_from), (Some(64), None));
        state.save(&path).unwrap();

        // A crash before the answer: the same token and no position.
        let mut state = WatchState::load(&path, &addresses()).unwrap().unwrap();
        assert_eq!(asked(&state), first);
        assert_eq!(state.begin(&answer(&state, 5, false, false)), Beginning::Fresh);
        assert!(state.advance(7));
        state.save(&path).unwrap();

        let state = WatchState::load(&path, &addresses()).unwrap().unwrap();
        let again = asked(&state);
        assert_eq!((again.resume_from, again.log_id.as_deref()), (Some(7), Some("log")));
        assert_eq!((again.resume_token, again.subscriber_id), (first.resume_token, first.subscriber_id));
        assert!(matches!(WatchState::load(&path, &[]), Err(StateError::OtherAddresses)));
    }

    #[test]
    fn a_change_counts_once() {
        let mut state = WatchState::new(addresses());
        assert!(!state.advance(1), "before the answer nothing counts");
        state.begin(&answer(&state, 5, false, false));
        assert!(!state.advance(5));
        assert!(state.advance(6));
        assert!(!state.advance(6));
        assert!(state.advance(9), "the numbers between are other wallets' changes");
        assert_eq!(state.begin(&answer(&state, 9, false, false)), Beginning::Resumed);
        assert!(!state.advance(9));
    }

    #[test]
    fn a_snapshot_counts_only_when_it_is_complete() {
        let mut state = WatchState::new(addresses());
        assert_eq!(state.begin(&answer(&state, 5, false, true)), Beginning::Fresh);
        assert_eq!(asked(&state).resume_from, None);
        assert_eq!(
            state.begin(&answer(&state, 6, false, true)),
            Beginning::Fresh,
            "lost in the middle: from the start"
        );
        state.snapshot_ends();
        assert_eq!(asked(&state).resume_from, Some(6));
    }

    #[test]
    fn a_reset_and_a_contradiction_lose_the_position() {
        let mut state = WatchState::new(addresses());
        state.begin(&answer(&state, 5, false, false));
        assert_eq!(state.begin(&answer(&state, 9, false, false)), Beginning::Resumed);
        assert_eq!(asked(&state).resume_from, Some(5), "6 to 9 are still to come");
        assert_eq!(state.begin(&answer(&state, 4, false, false)), Beginning::Broken, "the log went back");
        assert_eq!(asked(&state).resume_from, None);
        state.begin(&answer(&state, 9, false, false));
        assert_eq!(state.begin(&answer(&state, 2, true, true)), Beginning::Reset);
        assert_eq!(asked(&state).resume_from, None, "until the snapshot is complete");
        state.snapshot_ends();
        assert_eq!(asked(&state).resume_from, Some(2));
    }
}
