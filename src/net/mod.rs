//! Speaks: frames, messages, handshakes, peers, WebSocket.
//!
//! The only room that owns sockets. It never meets the database: what it sends was made
//! durable by whoever hands it over, and what it receives goes to a [`Handler`]. Every
//! queue in it is bounded (see [`crate::limits`]), and a slow or hostile peer costs
//! nobody else anything.

mod client;
mod connection;
mod frame;
mod handshake;
mod message;
mod peer;
mod peer_manager;
mod websocket;

pub use client::{ClientError, WalletClient};
pub use connection::{Closed, Connection, ConnectionId, Mailbox};
pub use frame::{FrameError, read_frame, write_frame};
pub use handshake::{HandshakeError, Hello, PROTOCOL_VERSION, Role, handshake_message};
pub use message::{
    AddressQuery, AddressResponse, Authenticate, BlockNotification, Blocks, CertifiedTransaction, ErrorCode,
    ErrorMessage, Fence, FinalityProof, Finalized, GetBlocks, GetFence, GetFinalized, GetTransactions, Incoming,
    NetworkMessage, Nonce, RejectionMessage, RequestId, StateEntry, Status, TransactionRejected, TransactionStatus,
    TransactionStatusKind, TransactionStatusQuery, Transactions, UTXOSnapshot, UTXOStateNotification,
    UTXOStateNotificationMessage, UTXOStateQuery, UTXOStateResponse, UTXOSubscribe, UTXOSubscribed, UTXOUnsubscribe,
    UTXOUnsubscribed, encode, parse,
};
pub use peer_manager::{Handler, Handling, PeerConfig, PeerManager, Traffic};
