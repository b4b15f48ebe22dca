//! Connections of wallets: one message in each WebSocket text frame.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::connection::{Received, Sink, Source, run};
use super::handshake::HandshakeError;
use super::message::{ErrorCode, ErrorMessage, Nonce};
use super::peer::PeerError;
use super::peer_manager::{PeerManager, PendingHandshake, Place};
use crate::limits::{HANDSHAKE_TIMEOUT, MAX_WALLET_MESSAGE_BYTES};

type Stream = WebSocketStream<TcpStream>;

struct Texts(SplitStream<Stream>);

impl Source for Texts {
    async fn next(&mut self) -> Result<Option<Received>, Option<ErrorMessage>> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Text(text))) => return Ok(Some(Received::Message(text.into()))),
                Some(Ok(Message::Binary(_))) => {
                    return Err(Some(ErrorMessage::new(ErrorCode::Malformed, "messages are text")));
                }
                // tungstenite answers pings by itself; here they only say that somebody lives.
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => return Ok(Some(Received::Alive)),
                Some(Ok(Message::Frame(_))) => {}
                Some(Ok(Message::Close(_))) | None => return Ok(None),
                Some(Err(Error::Capacity(error))) => {
                    return Err(Some(ErrorMessage::new(ErrorCode::TooLarge, error.to_string())));
                }
                Some(Err(Error::Utf8(_))) => {
                    return Err(Some(ErrorMessage::new(ErrorCode::Malformed, "messages are UTF-8")));
                }
                Some(Err(_)) => return Err(None),
            }
        }
    }
}

struct TextSink(SplitSink<Stream, Message>);

impl Sink for TextSink {
    async fn write(&mut self, message: Bytes) -> io::Result<()> {
        // The encoder writes JSON, which is UTF-8.
        let text = Utf8Bytes::try_from(message).map_err(io::Error::other)?;
        self.0.feed(Message::Text(text)).await.map_err(io::Error::other)
    }

    /// A ping of WebSocket's own: every client library answers it by itself.
    async fn ping(&mut self, nonce: Nonce) -> io::Result<()> {
        let payload = Bytes::copy_from_slice(&nonce.nonce.to_be_bytes());
        self.0.feed(Message::Ping(payload)).await.map_err(io::Error::other)
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.0.flush().await.map_err(io::Error::other)
    }

    async fn close(&mut self) {
        // Nothing can be done for a wallet that does not take the end.
        let _ended = self.0.close().await.is_ok();
    }
}

/// Upgrade and life of one WebSocket connection.
pub(super) async fn serve(
    manager: &Arc<PeerManager>,
    stream: TcpStream,
    address: SocketAddr,
    pending: PendingHandshake,
    place: Place,
) -> Result<(), PeerError> {
    stream.set_nodelay(true)?;
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_WALLET_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_WALLET_MESSAGE_BYTES))
        .read_buffer_size(4 * 1024)
        .write_buffer_size(4 * 1024);
    let upgrade = tokio_tungstenite::accept_async_with_config(stream, Some(config));
    let upgraded = timeout(HANDSHAKE_TIMEOUT, upgrade).await.map_err(|_| HandshakeError::Timeout)?;
    let (sink, source) = upgraded.map_err(io::Error::other)?.split();
    drop(pending);
    let (connection, receiver) = manager.make_connection(None, address);
    manager.came(&connection);
    run(manager, connection, Texts(source), TextSink(sink), receiver).await;
    drop(place);
    Ok(())
}
