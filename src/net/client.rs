//! The wallet's side of a WebSocket connection.

use std::io;

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{self, Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::message::{NetworkMessage, encode, parse};

/// Why a conversation with a node ended.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection.
    #[error("{0}")]
    WebSocket(#[from] Box<tungstenite::Error>),
    /// The node closed it.
    #[error("the node closed the connection")]
    Closed,
    /// The node said something that is no message.
    #[error("the node said something that is no message: {0}")]
    NoMessage(String),
}

impl From<tungstenite::Error> for ClientError {
    fn from(error: tungstenite::Error) -> Self {
        Self::WebSocket(Box::new(error))
    }
}

/// A connection to a node, as a wallet has it.
#[derive(Debug)]
pub struct WalletClient {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl WalletClient {
    /// Connects to `host:port` of a node's WebSocket.
    pub async fn connect(address: &str) -> Result<Self, ClientError> {
        let (stream, _) = tokio_tungstenite::connect_async(format!("ws://{address}")).await?;
        if let MaybeTlsStream::Plain(tcp) = stream.get_ref() {
            tcp.set_nodelay(true).map_err(tungstenite::Error::Io)?;
        }
        Ok(Self { stream })
    }

    /// Sends one message.
    pub async fn send(&mut self, message: &NetworkMessage) -> Result<(), ClientError> {
        let text =
            Utf8Bytes::try_from(encode(message, None)).map_err(|e| tungstenite::Error::Io(io::Error::other(e)))?;
        Ok(self.stream.send(Message::Text(text)).await?)
    }

    /// Sends any text, also one that is no message.
    pub async fn send_text(&mut self, text: String) -> Result<(), ClientError> {
        Ok(self.stream.send(Message::text(text)).await?)
    }

    /// The next message; pings are answered on the way.
    pub async fn next(&mut self) -> Result<NetworkMessage, ClientError> {
        loop {
            match self.stream.next().await {
                Some(Ok(Message::Text(text))) => {
                    let parsed = parse(text.as_bytes()).map(|incoming| incoming.message);
                    match parsed.map_err(|error| ClientError::NoMessage(error.message))? {
                        NetworkMessage::Ping(nonce) => self.send(&NetworkMessage::Pong(nonce)).await?,
                        message => return Ok(message),
                    }
                }
                Some(Ok(Message::Close(_))) | None => return Err(ClientError::Closed),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.into()),
            }
        }
    }

    /// The first message for which `wanted` gives something; others are dropped.
    pub async fn wait_for<T>(&mut self, mut wanted: impl FnMut(NetworkMessage) -> Option<T>) -> Result<T, ClientError> {
        loop {
            if let Some(found) = wanted(self.next().await?) {
                return Ok(found);
            }
        }
    }
}
