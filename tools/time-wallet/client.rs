//! A connection to a node's wallet port.
//!
//! One JSON message per WebSocket text. Nothing that arrives is believed here or acted on:
//! a message that nobody waits for is dropped, an `Error` that answers nobody is shown.
//! What memory and time a node can take is bounded.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use time_masternode::limits::DIAL_TIMEOUT;
use time_masternode::net::{ErrorCode, Incoming, NetworkMessage, encode, parse};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use super::report::{printable, remark};

/// Bytes of a message from a node.
const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
/// How long a node may take to answer, and a socket to take a message.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the node could not be talked to.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection came about.
    #[error("cannot connect to {url}: {source}")]
    Connect {
        /// Where to.
        url: String,
        /// Why.
        source: Box<SocketError>,
    },
    /// The node's machine does not answer.
    #[error("cannot connect to {0}: no answer")]
    ConnectTimeout(String),
    /// The connection broke.
    #[error("the connection was lost: {0}")]
    Socket(Box<SocketError>),
    /// The node hung up.
    #[error("the node closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("the node did not answer in time")]
    Timeout,
    /// What came is no message of the protocol.
    #[error("the node sent what is no message: {0}")]
    Malformed(String),
    /// The node answered with an `Error`.
    #[error("the node refused: {code:?}: {message}")]
    Refused {
        /// Its stable code.
        code: ErrorCode,
        /// The same for people.
        message: String,
    },
}

impl ClientError {
    /// Whether the request itself was refused, so that sending it again makes no sense.
    pub const fn is_refusal(&self) -> bool {
        use ErrorCode::{Busy, Internal, RateLimited, TooManyConnections, TooManySubscriptions, UnknownMessage};
        match self {
            Self::Refused { code, .. } => !matches!(
                code,
                Busy | Internal | RateLimited | TooManyConnections | TooManySubscriptions | UnknownMessage
            ),
            _ => false,
        }
    }

    /// Whether no attempt with these arguments can ever succeed.
    pub fn is_bad_address(&self) -> bool {
        use SocketError::{HttpFormat, Url};
        matches!(self, Self::Connect { source, .. } if matches!(**source, Url(_) | HttpFormat(_)))
    }
}

fn lost(error: SocketError) -> ClientError {
    match error {
        SocketError::ConnectionClosed | SocketError::AlreadyClosed => ClientError::Closed,
        error => ClientError::Socket(Box::new(error)),
    }
}

/// A live connection.
pub struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    requests: u64,
    heard: Instant,
}

impl Client {
    /// Connects to a `ws://` address.
    pub async fn connect(url: &str) -> Result<Self, ClientError> {
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let connected = timeout(DIAL_TIMEOUT, connect_async_with_config(url, Some(config), true)).await;
        let (socket, _) = connected
            .map_err(|_| ClientError::ConnectTimeout(url.to_owned()))?
            .map_err(|source| ClientError::Connect { url: url.to_owned(), source: Box::new(source) })?;
        Ok(Self { socket, requests: 0, heard: Instant::now() })
    }

    /// When anything last came from the node, be it a pong.
    pub const fn last_heard(&self) -> Instant {
        self.heard
    }

    async fn put(&mut self, message: Message) -> Result<(), ClientError> {
        timeout(ANSWER_TIMEOUT, self.socket.send(message)).await.map_err(|_| ClientError::Timeout)?.map_err(lost)
    }

    /// Asks for a sign of life.
    pub async fn ping(&mut self) -> Result<(), ClientError> {
        self.put(Message::Ping(Vec::new().into())).await
    }

    /// Sends a message; gives the id that an `Error` in answer to it carries.
    pub async fn send(&mut self, message: &NetworkMessage) -> Result<String, ClientError> {
        self.requests += 1;
        let request_id = format!("wallet-{}", self.requests);
        let text = Utf8Bytes::try_from(encode(message, Some(&request_id)))
            .map_err(|error| ClientError::Malformed(error.to_string()))?;
        self.put(Message::Text(text)).await?;
        Ok(request_id)
    }

    /// The next message; `None` when the time is up. Nothing is lost if it is cancelled.
    pub async fn next(&mut self, until: Instant) -> Result<Option<Incoming>, ClientError> {
        loop {
            let Ok(received) = timeout_at(until, self.socket.next()).await else { return Ok(None) };
            let message = received.ok_or(ClientError::Closed)?.map_err(lost)?;
            self.heard = Instant::now();
            match message {
                Message::Text(text) => match parse(text.as_bytes()) {
                    Ok(incoming) => return Ok(Some(incoming)),
                    // A newer node may say what this wallet has no word for.
                    Err(error) if error.code == ErrorCode::UnknownMessage => {}
                    Err(error) => return Err(ClientError::Malformed(printable(&error.message))),
                },
                Message::Close(_) => return Err(ClientError::Closed),
                Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    }

    /// Sends a request and waits for the answer that `wanted` recognises.
    pub async fn ask<T>(
        &mut self,
        request: &NetworkMessage,
        mut wanted: impl FnMut(NetworkMessage) -> Option<T>,
    ) -> Result<T, ClientError> {
        let request_id = self.send(request).await?;
        let until = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let incoming = self.next(until).await?.ok_or(ClientError::Timeout)?;
            let message = refusal_of(incoming, &request_id)?;
            if let Some(answer) = message.and_then(&mut wanted) {
                return Ok(answer);
            }
        }
    }
}

/// An `Error` in answer to `request_id` is an error here. `None` is a message that answers
/// another request; an `Error` of that kind has been shown.
pub fn refusal_of(incoming: Incoming, request_id: &str) -> Result<Option<NetworkMessage>, ClientError> {
    let ours = incoming.request_id.as_deref().is_none_or(|id| id == request_id);
    match incoming.message {
        NetworkMessage::Error(error) if incoming.request_id.as_deref() == Some(request_id) => {
            Err(ClientError::Refused { code: error.code, message: printable(&error.message) })
        }
        NetworkMessage::Error(error) => {
            remark(&format!("the node says {:?}: {}", error.code, printable(&error.message)));
            Ok(None)
        }
        message => Ok(ours.then_some(message)),
    }
}

#[cfg(test)]
mod tests {
    use time_masternode::net::{ErrorMessage, Nonce};

    use super::*;

    fn incoming(message: NetworkMessage, id: Option<&str>) -> Incoming {
        Incoming { message, request_id: id.map(Into::into) }
    }

    #[test]
    fn an_answer_belongs_to_its_request() {
        let pong = NetworkMessage::Pong(Nonce { nonce: 1 });
        assert_eq!(refusal_of(incoming(pong.clone(), Some("a")), "a").unwrap(), Some(pong.clone()));
        assert_eq!(refusal_of(incoming(pong.clone(), None), "a").unwrap(), Some(pong.clone()));
        assert_eq!(refusal_of(incoming(pong, Some("b")), "a").unwrap(), None);
        let error = NetworkMessage::Error(ErrorMessage::new(ErrorCode::InvalidAddress, "no"));
        assert!(refusal_of(incoming(error.clone(), Some("a")), "a").unwrap_err().is_refusal());
        assert_eq!(refusal_of(incoming(error.clone(), Some("b")), "a").unwrap(), None);
        assert_eq!(refusal_of(incoming(error, None), "a").unwrap(), None);
        let busy = NetworkMessage::Error(ErrorMessage::new(ErrorCode::Busy, "later"));
        assert!(!refusal_of(incoming(busy, Some("a")), "a").unwrap_err().is_refusal());
    }
}
