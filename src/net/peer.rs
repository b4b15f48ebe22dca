//! Connections over TCP: the handshake from both sides, then frames.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::connection::{Express, Received, Sent, Sink, Source, run};
use super::frame::{FrameError, read_frame, read_length, read_some, write_frame};
use super::handshake::{HandshakeError, Hello, check_hello, check_proof, handshake_message};
use super::message::{Authenticate, ErrorCode, ErrorMessage, NetworkMessage, Nonce, encode, parse};
use super::peer_manager::{Link, PeerManager, PendingHandshake, Registered};
use crate::consensus::MemberIndex;
use crate::limits::{DUPLICATE_PROBE, HANDSHAKE_TIMEOUT, MAX_FRAME_BYTES, MAX_HANDSHAKE_FRAME_BYTES};

/// Why a connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the peer refused: {0:?}: {1}")]
    Refused(ErrorCode, String),
    #[error("the peer hung up")]
    HungUp,
    #[error("no room for another connection")]
    NoRoom,
}

struct Frames {
    stream: BufReader<OwnedReadHalf>,
    /// What a stranger's long frames take their room from; members have room.
    strangers: Option<Arc<Semaphore>>,
    /// The room of the frame that was read last.
    room: Option<OwnedSemaphorePermit>,
}

impl Frames {
    /// Takes room for more bytes of a long frame, as they come: an announcement alone costs
    /// nobody anything.
    fn make_room(&mut self, received: usize, more: usize) -> bool {
        let Some(strangers) = self.strangers.as_ref().filter(|_| received + more > MAX_HANDSHAKE_FRAME_BYTES) else {
            return true;
        };
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        match (Arc::clone(strangers).try_acquire_many_owned(more), &mut self.room) {
            (Ok(permit), Some(room)) => {
                room.merge(permit);
                true
            }
            (Ok(permit), room) => {
                *room = Some(permit);
                true
            }
            (Err(_), _) => false,
        }
    }
}

impl Source for Frames {
    async fn next(&mut self) -> Result<Option<Received>, Option<ErrorMessage>> {
        // The frame before has been handled by now.
        self.room = None;
        let error = |error: FrameError| match error {
            FrameError::Length { .. } => Some(ErrorMessage::new(ErrorCode::TooLarge, error.to_string())),
            FrameError::Io(_) => None,
        };
        let Some(length) = read_length(&mut self.stream, MAX_FRAME_BYTES).await.map_err(error)? else {
            return Ok(None);
        };
        let mut body = Vec::new();
        while body.len() < length {
            let before = body.len();
            read_some(&mut self.stream, &mut body, length).await.map_err(error)?;
            if !self.make_room(before, body.len() - before) {
                return Err(Some(ErrorMessage::new(ErrorCode::Busy, "no room for so long a frame now")));
            }
        }
        Ok(Some(Received::Message(body.into())))
    }
}

/// Bytes that are gathered before they go to the socket.
pub(super) const GATHERED: usize = 16 * 1024;

/// The writing half of a socket, and what it has not taken yet.
#[derive(Debug)]
struct Socket {
    half: OwnedWriteHalf,
    unsent: BytesMut,
}

impl Socket {
    fn put_frame(&mut self, message: &[u8]) -> io::Result<()> {
        let length = u32::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.unsent.put_u32(length);
        self.unsent.put_slice(message);
        Ok(())
    }

    async fn send(&mut self) -> io::Result<()> {
        self.half.write_all_buf(&mut self.unsent).await?;
        if self.unsent.capacity() > 2 * GATHERED {
            self.unsent = BytesMut::with_capacity(GATHERED);
        }
        Ok(())
    }
}

/// Where frames go: to the writer's task, and to whoever sends at once.
#[derive(Debug, Clone)]
pub(super) struct FrameSink(Arc<Mutex<Socket>>);

impl FrameSink {
    pub(super) fn new(half: OwnedWriteHalf) -> Self {
        Self(Arc::new(Mutex::new(Socket { half, unsent: BytesMut::with_capacity(GATHERED) })))
    }
}

impl Sink for FrameSink {
    async fn write(&mut self, message: Bytes) -> io::Result<()> {
        let mut socket = self.0.lock().await;
        socket.put_frame(&message)?;
        if socket.unsent.len() < GATHERED { Ok(()) } else { socket.send().await }
    }

    async fn ping(&mut self, nonce: Nonce) -> io::Result<()> {
        self.write(encode(&NetworkMessage::Ping(nonce), None)).await
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.0.lock().await.send().await
    }

    async fn close(&mut self) {
        let mut socket = self.0.lock().await;
        // Nothing can be done for a peer that does not take the end.
        let _ended = socket.send().await.is_ok() && socket.half.shutdown().await.is_ok();
    }
}

impl Express for FrameSink {
    fn try_send(&self, message: &[u8]) -> Sent {
        let Ok(mut socket) = self.0.try_lock() else { return Sent::Nothing };
        if !socket.unsent.is_empty() || message.len() > GATHERED || socket.put_frame(message).is_err() {
            return Sent::Nothing;
        }
        let Socket { half, unsent } = &mut *socket;
        match half.try_write(unsent) {
            Ok(taken) => unsent.advance(taken),
            // There is no room, or the socket is broken: the writer waits, and finds out.
            Err(_) => {
                unsent.clear();
                return Sent::Nothing;
            }
        }
        if unsent.is_empty() { Sent::Whole } else { Sent::Part }
    }
}

/// Handshake and life of one TCP connection. If this node dialled, only the member that it
/// `expected` may answer; who came by himself holds a place among those that are greeted.
pub(super) async fn serve(
    manager: &Arc<PeerManager>,
    stream: TcpStream,
    address: SocketAddr,
    expected: Option<MemberIndex>,
    pending: Option<PendingHandshake>,
) -> Result<(), PeerError> {
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    let mut reader = BufReader::with_capacity(16 * 1024, read);
    let mut writer = BufWriter::with_capacity(16 * 1024, write);
    let greeted = timeout(HANDSHAKE_TIMEOUT, handshake(manager, &mut reader, &mut writer)).await;
    let (hello, member) = match greeted.unwrap_or(Err(PeerError::Handshake(HandshakeError::Timeout))) {
        Ok(greeted) => greeted,
        Err(error) => {
            say_why(&mut writer, &error).await;
            return Err(error);
        }
    };
    let dialled = expected.is_some();
    if dialled && member != expected {
        let error = PeerError::Handshake(HandshakeError::NotMember);
        say_why(&mut writer, &error).await;
        return Err(error);
    }
    drop(pending);
    let place = if member.is_none() { manager.place_of_stranger(address.ip()) } else { None };
    if member.is_none() && place.is_none() {
        let error = PeerError::NoRoom;
        say_why(&mut writer, &error).await;
        return Err(error);
    }
    let (connection, receiver) = manager.make_connection(member, address);
    if let Some(member) = member {
        let link = Link { connection: Arc::clone(&connection), instance: hello.instance, dialled_by_us: dialled };
        if let Err(error) = admit(manager, member, link).await {
            say_why(&mut writer, &error).await;
            return Err(error);
        }
        tracing::info!(peer = %manager.committee().member(member).id, %address, dialled, "member connected");
    }
    // The handshake has flushed what it wrote.
    let sink = FrameSink::new(writer.into_inner());
    if member.is_some() {
        connection.send_through(Box::new(sink.clone()));
    }
    manager.came(&connection);
    let strangers = member.is_none().then(|| Arc::clone(&manager.frame_bytes));
    let source = Frames { stream: reader, strangers, room: None };
    run(manager, connection, source, sink, receiver).await;
    Ok(())
}

/// Of two connections between two keys one stays; a second live instance is refused.
async fn admit(manager: &Arc<PeerManager>, member: MemberIndex, link: Link) -> Result<(), PeerError> {
    loop {
        let old = match manager.register_member(member, &link) {
            Registered::Yes => return Ok(()),
            Registered::Superfluous => return Err(PeerError::HungUp),
            Registered::OtherInstance(old) => old,
        };
        let peer = &manager.committee().member(member).id;
        let heard = old.heard();
        old.send_now(encode(&NetworkMessage::Ping(Nonce { nonce: old.age_ms() }), None));
        // It lives if it says anything after the question.
        let answered = async {
            while old.heard() == heard && !old.is_closed() {
                tokio::time::sleep(DUPLICATE_PROBE / 50).await;
            }
        };
        let silent = timeout(DUPLICATE_PROBE, answered).await.is_err();
        if !silent && !old.is_closed() {
            tracing::warn!(%peer, "a second live instance of a member's key");
            return Err(HandshakeError::DuplicateIdentity.into());
        }
        tracing::warn!(%peer, "a silent connection is replaced");
        old.close(None);
    }
}

async fn say_why(writer: &mut BufWriter<OwnedWriteHalf>, error: &PeerError) {
    let message = match error {
        PeerError::Handshake(error) => ErrorMessage::new(error.code(), error.to_string()),
        PeerError::Frame(error @ FrameError::Length { .. }) => {
            ErrorMessage::new(ErrorCode::TooLarge, error.to_string())
        }
        PeerError::NoRoom => ErrorMessage::new(ErrorCode::TooManyConnections, error.to_string()),
        _ => return,
    };
    let farewell = async {
        write_frame(writer, &encode(&NetworkMessage::Error(message), None)).await?;
        writer.shutdown().await
    };
    // The peer may be gone already; there is nobody else to tell.
    let _told = timeout(std::time::Duration::from_secs(1), farewell).await.is_ok();
}

/// Both sides say `Hello`; each masternode then proves its key.
async fn handshake(
    manager: &Arc<PeerManager>,
    reader: &mut BufReader<OwnedReadHalf>,
    writer: &mut BufWriter<OwnedWriteHalf>,
) -> Result<(Hello, Option<MemberIndex>), PeerError> {
    let ours = manager.hello();
    send(writer, &NetworkMessage::Hello(ours.clone())).await?;
    let theirs = match receive(reader).await? {
        NetworkMessage::Hello(hello) => hello,
        _ => return Err(HandshakeError::Malformed("the first message has to be a Hello").into()),
    };
    let member = check_hello(&theirs, &ours, manager.committee())?;
    if let (Some(key), Some(own)) = (manager.key(), ours.public_key) {
        let message =
            handshake_message(&ours.genesis_hash, &theirs.nonce, &ours.nonce, theirs.public_key.as_ref(), &own);
        send(writer, &NetworkMessage::Authenticate(Authenticate { signature: key.sign(&message) })).await?;
    }
    if member.is_some() {
        match receive(reader).await? {
            NetworkMessage::Authenticate(Authenticate { signature }) => check_proof(&theirs, &ours, &signature)?,
            _ => return Err(HandshakeError::Malformed("a masternode has to Authenticate").into()),
        }
    }
    Ok((theirs, member))
}

async fn send(writer: &mut BufWriter<OwnedWriteHalf>, message: &NetworkMessage) -> Result<(), PeerError> {
    write_frame(writer, &encode(message, None)).await?;
    writer.flush().await?;
    Ok(())
}

async fn receive(reader: &mut BufReader<OwnedReadHalf>) -> Result<NetworkMessage, PeerError> {
    let frame = read_frame(reader, MAX_HANDSHAKE_FRAME_BYTES).await?.ok_or(PeerError::HungUp)?;
    match parse(&frame) {
        Ok(incoming) => match incoming.message {
            NetworkMessage::Error(error) => Err(PeerError::Refused(error.code, error.message)),
            message => Ok(message),
        },
        Err(_) => Err(HandshakeError::Malformed("not a message").into()),
    }
}
