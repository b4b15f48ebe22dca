//! What `shim.c` wrote down: changes of files, syncs, and what left through sockets, in the
//! order in which they happened.

use std::collections::BTreeMap;
use std::path::PathBuf;

use time_masternode::net::{NetworkMessage, parse};

/// One call of the node.
#[derive(Debug, Clone)]
pub enum Record {
    /// A process began; descriptors of before mean nothing any more.
    Start,
    Open {
        fd: i32,
        path: PathBuf,
        created: bool,
        truncated: bool,
    },
    Close(i32),
    Write {
        fd: i32,
        offset: u64,
        bytes: Vec<u8>,
    },
    Sync(i32),
    Truncate {
        fd: i32,
        length: u64,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    /// Two names were exchanged in one step.
    Exchange(PathBuf, PathBuf),
    Unlink(PathBuf),
    MakeDir(PathBuf),
    RemoveDir(PathBuf),
    /// Bytes left through a socket.
    Send {
        fd: i32,
        bytes: Vec<u8>,
    },
    /// The shim made a call fail.
    Fault {
        number: u64,
        call: String,
    },
}

/// The records of a trace from `from` on, and where the next ones will begin. A record that
/// was cut off with its process is left for then.
pub fn read_trace(path: &std::path::Path, from: u64) -> (Vec<Record>, u64) {
    let mut bytes = std::fs::read(path).unwrap_or_default();
    bytes.drain(..usize::try_from(from).unwrap().min(bytes.len()));
    let (mut records, mut at) = (Vec::new(), 0);
    while let Some(length) = bytes.get(at..at + 4) {
        let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
        let Some(body) = bytes.get(at + 4..at + 4 + length) else { break };
        records.push(record(body));
        at += 4 + length;
    }
    (records, from + at as u64)
}

fn record(body: &[u8]) -> Record {
    let number = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
    let fd = i32::from_le_bytes(body[1..5].try_into().unwrap());
    let (a, b) = (number(5), number(13));
    let text_length = u32::from_le_bytes(body[21..25].try_into().unwrap()) as usize;
    let text = String::from_utf8(body[25..25 + text_length].to_vec()).unwrap();
    let bytes = body[25 + text_length..].to_vec();
    let path = PathBuf::from(&text);
    match body[0] {
        1 => Record::Start,
        2 => Record::Open { fd, path, created: b & 1 == 1, truncated: b & 2 == 2 },
        3 => Record::Close(fd),
        4 => Record::Write { fd, offset: a, bytes },
        5 => Record::Sync(fd),
        6 => Record::Truncate { fd, length: a },
        7 => Record::Rename { from: path, to: PathBuf::from(String::from_utf8(bytes).unwrap()) },
        13 => Record::Exchange(path, PathBuf::from(String::from_utf8(bytes).unwrap())),
        8 => Record::Unlink(path),
        9 => Record::MakeDir(path),
        10 => Record::RemoveDir(path),
        11 => Record::Send { fd, bytes },
        12 => Record::Fault { number: a, call: text },
        kind => panic!("no such record: {kind}"),
    }
}

/// A connection of the node, as far as the node has spoken on it.
#[derive(Debug, Default)]
struct Stream {
    bytes: Vec<u8>,
    /// The upgrade of a wallet's connection has been answered.
    upgraded: bool,
}

impl Stream {
    /// The next whole message, if there is one.
    fn next(&mut self) -> Option<Vec<u8>> {
        const UPGRADED: &[u8] = b"HTTP/1.1 101";
        if self.upgraded {
            return self.next_web_socket();
        }
        if self.bytes.starts_with(UPGRADED) {
            let end = self.bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
            self.bytes.drain(..end + 4);
            self.upgraded = true;
            return self.next_web_socket();
        }
        // The operator's port says nothing that has to be durable.
        if self.bytes.starts_with(b"HTTP/") {
            self.bytes.clear();
            return None;
        }
        let length = u32::from_be_bytes(self.bytes.get(..4)?.try_into().unwrap()) as usize;
        let message = self.bytes.get(4..4 + length)?.to_vec();
        self.bytes.drain(..4 + length);
        Some(message)
    }

    fn next_web_socket(&mut self) -> Option<Vec<u8>> {
        const TEXT: u8 = 1;
        loop {
            let (kind, short) = (*self.bytes.first()? & 0x0f, usize::from(*self.bytes.get(1)?));
            let (head, length) = match short {
                126 => (4, usize::from(u16::from_be_bytes(self.bytes.get(2..4)?.try_into().unwrap()))),
                127 => (10, usize::try_from(u64::from_be_bytes(self.bytes.get(2..10)?.try_into().unwrap())).unwrap()),
                short => (2, short),
            };
            let payload = self.bytes.get(head..head + length)?.to_vec();
            self.bytes.drain(..head + length);
            if kind == TEXT {
                return Some(payload);
            }
        }
    }
}

/// Takes the node's messages out of the bytes that left it.
#[derive(Debug, Default)]
pub struct Listener {
    streams: BTreeMap<i32, Stream>,
}

impl Listener {
    /// The messages that are whole with this record. What is not of interest is left out:
    /// it need not be durable.
    pub fn hear(&mut self, record: &Record) -> Vec<NetworkMessage> {
        match record {
            Record::Start => self.streams.clear(),
            Record::Close(fd) => {
                self.streams.remove(fd);
            }
            Record::Send { fd, bytes } => {
                let stream = self.streams.entry(*fd).or_default();
                stream.bytes.extend_from_slice(bytes);
                let mut heard = Vec::new();
                while let Some(message) = stream.next() {
                    if is_of_interest(&message) {
                        heard.push(parse(&message).expect("what a node says is a message").message);
                    }
                }
                return heard;
            }
            _ => {}
        }
        Vec::new()
    }
}

fn is_of_interest(message: &[u8]) -> bool {
    const TAGS: [&[u8]; 6] = [
        b"{\"Votes\"",
        b"{\"Consensus\"",
        b"{\"TransactionStatus\"",
        b"{\"UTXOSubscribed\"",
        b"{\"UTXOStateNotification\"",
        b"{\"BlockNotification\"",
    ];
    TAGS.iter().any(|tag| message.starts_with(tag))
}
