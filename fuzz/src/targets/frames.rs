//! Frames: any stream in any pieces gives what a reader of the whole stream would see.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use time_masternode::limits::{MAX_FRAME_BYTES, MAX_HANDSHAKE_FRAME_BYTES};
use time_masternode::net::{FrameError, read_frame, write_frame};
use tokio::io::{AsyncRead, ReadBuf};

use super::Outcome;

/// Room that a reader may ask to have filled at once, whatever length a frame claims.
const MAX_ROOM: usize = 16 * 1024;

/// A stream that comes in pieces of the sizes that the input says; 0 stands for a wait.
struct Pieces<'a> {
    stream: &'a [u8],
    sizes: &'a [u8],
    next: usize,
    waited: bool,
    taken: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        assert!(room.remaining() <= MAX_ROOM, "room for {} bytes is held ready", room.remaining());
        let size = self.sizes.get(self.next % self.sizes.len().max(1)).map_or(usize::MAX, |size| usize::from(*size));
        self.next += 1;
        if size == 0 && !self.waited {
            self.waited = true;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.waited = false;
        let length = size.max(1).min(self.stream.len()).min(room.remaining());
        let (piece, rest) = self.stream.split_at(length);
        room.put_slice(piece);
        self.stream = rest;
        self.taken += length;
        Poll::Ready(Ok(()))
    }
}

/// Runs a future that waits for nothing but its own stream.
fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}

/// What is left of a stream, and what its beginning is.
enum Expected<'a> {
    Frame(&'a [u8], &'a [u8]),
    End,
    BadLength(usize),
    Cut,
}

fn expect(stream: &[u8], limit: usize) -> Expected<'_> {
    let Some((head, rest)) = stream.split_first_chunk::<4>() else {
        return if stream.is_empty() { Expected::End } else { Expected::Cut };
    };
    let length = u32::from_be_bytes(*head) as usize;
    if length == 0 || length > limit {
        return Expected::BadLength(length);
    }
    rest.split_at_checked(length).map_or(Expected::Cut, |(frame, rest)| Expected::Frame(frame, rest))
}

/// The first byte chooses the limit, the second how many of the next are sizes of pieces.
pub fn frames(data: &[u8]) -> Outcome {
    let [limit, sizes, rest @ ..] = data else { return Outcome::Refused };
    let limits = [MAX_FRAME_BYTES, MAX_HANDSHAKE_FRAME_BYTES, 4_096, 255, 16, 1];
    let limit = limits[usize::from(*limit) % limits.len()];
    let (sizes, stream) = rest.split_at(usize::from(sizes % 16).min(rest.len()));
    let mut reader = Pieces { stream, sizes, next: 0, waited: false, taken: 0 };
    let (mut expected_rest, mut written) = (stream, Vec::new());
    let outcome = loop {
        let read = run(read_frame(&mut reader, limit));
        match (expect(expected_rest, limit), read) {
            (Expected::Frame(frame, rest), Ok(Some(body))) => {
                assert_eq!(body, frame);
                assert!((1..=limit).contains(&body.len()));
                run(write_frame(&mut written, &body)).expect("a vector takes everything");
                expected_rest = rest;
                assert_eq!(reader.taken, written.len(), "no byte beyond the frame is read");
                assert_eq!(written, stream[..reader.taken], "a frame is written as it was read");
            }
            (Expected::End, Ok(None)) => break Outcome::Accepted,
            (Expected::BadLength(expected), Err(FrameError::Length { length, limit: said })) => {
                assert_eq!((length, said), (expected, limit));
                assert_eq!(reader.taken, written.len() + 4, "nothing is read after a bad length");
                break Outcome::Refused;
            }
            (Expected::Cut, Err(FrameError::Io(error))) => {
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                break Outcome::Refused;
            }
            (_, read) => panic!("{} bytes in, {read:?}", written.len()),
        }
    };
    if written.is_empty() { Outcome::Refused } else { outcome }
}
