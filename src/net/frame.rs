//! Length-prefixed frames over a stream: `u32` big-endian, then that many bytes.
//!
//! A frame's length is a claim of somebody unknown. It is checked before anything is
//! allocated, and the buffer grows only as bytes really arrive.

use std::io;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes that are read at once into a growing buffer.
const CHUNK: usize = 16 * 1024;

/// Why no frame came.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A length of zero, or above the limit. The connection cannot go on.
    #[error("a frame of {length} bytes; allowed are 1 to {limit}")]
    Length {
        /// The claimed length.
        length: usize,
        /// What is allowed now.
        limit: usize,
    },
    /// The connection broke, perhaps within a frame.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Reads one frame of at most `limit` bytes; `None` if the stream ended between frames.
pub async fn read_frame<R: AsyncRead + Unpin>(stream: &mut R, limit: usize) -> Result<Option<Bytes>, FrameError> {
    match read_length(stream, limit).await? {
        Some(length) => {
            let mut body = Vec::new();
            while body.len() < length {
                read_some(stream, &mut body, length).await?;
            }
            Ok(Some(body.into()))
        }
        None => Ok(None),
    }
}

/// Reads and checks a frame's length; `None` if the stream ended between frames.
pub(super) async fn read_length<R: AsyncRead + Unpin>(
    stream: &mut R,
    limit: usize,
) -> Result<Option<usize>, FrameError> {
    let mut head = [0; 4];
    let first = stream.read(&mut head).await?;
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut head[first..]).await?;
    let length = u32::from_be_bytes(head) as usize;
    if length == 0 || length > limit {
        return Err(FrameError::Length { length, limit });
    }
    Ok(Some(length))
}

/// Reads some more of a frame's body of `length` bytes, at least one; its length has been
/// checked before. The buffer grows by what came.
pub(super) async fn read_some<R: AsyncRead + Unpin>(
    stream: &mut R,
    body: &mut Vec<u8>,
    length: usize,
) -> Result<(), FrameError> {
    let wanted = (length - body.len()).min(CHUNK) as u64;
    if stream.take(wanted).read_to_end(body).await? == 0 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(())
}

/// Writes one frame. Does not flush.
pub async fn write_frame<W: AsyncWrite + Unpin>(stream: &mut W, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(body).await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8], limit: usize) -> Result<Option<Bytes>, FrameError> {
        let mut stream = bytes;
        read_frame(&mut stream, limit).await
    }

    #[tokio::test]
    async fn frames_come_back() {
        let mut stream = Vec::new();
        for body in [&b"x"[..], &[7; 3 * CHUNK + 5]] {
            write_frame(&mut stream, body).await.unwrap();
        }
        let mut rest = stream.as_slice();
        assert_eq!(read_frame(&mut rest, 1 << 20).await.unwrap().unwrap(), b"x"[..]);
        assert_eq!(read_frame(&mut rest, 1 << 20).await.unwrap().unwrap(), [7; 3 * CHUNK + 5][..]);
        assert!(read_frame(&mut rest, 1 << 20).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_bad_length_or_a_cut_is_an_error() {
        assert!(matches!(read(&[0, 0, 0, 0], 10).await, Err(FrameError::Length { length: 0, .. })));
        assert!(matches!(read(&[0, 0, 0, 11], 10).await, Err(FrameError::Length { length: 11, .. })));
        assert!(matches!(read(&[0xff; 4], 10).await, Err(FrameError::Length { .. })));
        assert!(matches!(read(&[0, 0, 0, 5, 1, 2], 10).await, Err(FrameError::Io(_))));
        assert!(matches!(read(&[0, 0], 10).await, Err(FrameError::Io(_))));
    }
}
