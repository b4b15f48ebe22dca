//! Every bound of the program, named.
//!
//! What a stranger can make the program hold, wait for or repeat is bounded here. Those
//! that an operator may want to change are defaults of the configuration.

use std::time::Duration;

// --- Transactions and votes (protocol §3, §5) ---

/// Inputs of a transaction.
pub const MAX_INPUTS: usize = 256;
/// Outputs of a transaction.
pub const MAX_OUTPUTS: usize = 256;
/// Bytes of a `TransactionBroadcast`.
pub const MAX_TRANSACTION_BYTES: usize = 256 * 1024;
/// Votes under one signature.
pub const MAX_VOTES_PER_BATCH: usize = 4_096;

// --- Blocks (protocol §7) ---

/// Transactions and aborts of a block.
pub const MAX_BLOCK_ENTRIES: usize = 16_384;
/// Aborts of a block.
pub const MAX_BLOCK_ABORTS: usize = 1_024;
/// Inputs and outputs of a block's transactions: what one atomic commit can bear.
pub const MAX_BLOCK_PLACES: usize = 131_072;
/// How far a fresh block's timestamp may be ahead of the receiver's clock.
pub const MAX_CLOCK_AHEAD_MS: u64 = 10_000;
/// How long a certified transaction is in flight before a block may settle it.
pub const STUCK_AFTER_MS: u64 = 2_000;
/// Blocks that are put forward in one round and looked at; an honest proposer makes one.
pub const MAX_BLOCKS_OF_A_ROUND: usize = 3;
/// Consensus messages of later heights that the agreement keeps.
pub const MAX_CONSENSUS_BACKLOG: usize = 256;
/// How often it is looked whether there is something to put into a block.
pub const LOOK_FOR_CONTENT_MS: u64 = 50;
/// How long what a proposed block lacks is asked of its proposer alone.
pub const ASK_EVERYBODY_AFTER_MS: u64 = 400;

// --- Catching up (protocol §8) ---

/// Blocks of one answer.
pub const MAX_BLOCKS_PER_REQUEST: usize = 256;
/// Entries of the decided blocks that wait for their transactions' bodies.
pub const MAX_QUEUED_ENTRIES: usize = 32_768;
/// Bodies that are asked for at once.
pub const MAX_BODIES_ASKED: usize = 4_096;
/// Questions for bodies that one member has to answer at a time.
pub const MAX_LOTS_OF_A_MEMBER: usize = 2;
/// How long an answer may take before another member is asked.
pub const SYNC_ANSWER_MS: u64 = 3_000;
/// After how long a silence an answer of bodies that lacks some counts as cut.
pub const SYNC_CUT_MS: u64 = 300;
/// How long a member that served a bad history is not asked.
pub const SYNC_DISTRUST_MS: u64 = 60_000;
/// How often a node asks again whether there are new blocks.
pub const SYNC_POLL_MS: u64 = 500;
/// Entries of decided blocks that one commit executes.
pub const MAX_ENTRIES_PER_COMMIT: usize = 2_048;

/// How long a member may take for a page of what it names to be fenced.
pub const FENCE_ANSWER_MS: u64 = 5_000;
/// Outpoints and transactions that one member may name to be fenced, all together.
pub const MAX_FENCED_PER_ANSWER: usize = 50_000_000;
/// Outpoints and transactions on a page of such an answer.
pub const MAX_FENCED_PER_PAGE: usize = 16_384;

/// Outputs that are remembered beside the trees, for the ledger's thread and for wallets' questions
/// (about 150 bytes each).
pub const MAX_RECENT_OUTPUTS: usize = 98_304;
/// Rows of outputs that it remembers, so that it can write them anew (about 400 bytes each).
pub const MAX_RECENT_OUTPUT_ROWS: usize = 16_384;
/// Inputs and outputs of transactions that it remembers, and whose bodies readers share (about
/// 150 bytes each).
pub const MAX_RECENT_PLACES: usize = 49_152;
/// Votes of finality proofs that stay in memory (about 450 bytes each).
pub const MAX_RECENT_PROOF_VOTES: usize = 24_576;

// --- The core's waiting rooms ---

/// How long a transaction waits for its parents before it is `UnknownInput`.
pub const PARENT_WAIT_MS: u64 = 5_000;
/// How long after a conflict is known a member votes `Abort`.
pub const CONFLICT_WAIT_MS: u64 = 1_000;
/// Transactions in flight; beyond this, wallets are told `Busy`.
pub const MAX_IN_FLIGHT: usize = 200_000;
/// The same while finality takes long.
pub const MAX_IN_FLIGHT_WHEN_SLOW: usize = 2_048;
/// From how many milliseconds on, on the average, finality takes long.
pub const SLOW_FINALITY_MS: u64 = 500;
/// Transactions that wait for their parents.
pub const MAX_WAITING_FOR_PARENTS: usize = 4_096;
/// Transactions known by one member's votes only, for each member.
pub const MAX_UNKNOWN_PER_MEMBER: usize = 16_384;
/// Contradicting transactions kept as evidence, for each member.
pub const MAX_EVIDENCE_PER_MEMBER: usize = 4_096;
/// How long votes on an unknown transaction wait before its body is asked for.
pub const UNKNOWN_BODY_WAIT_MS: u64 = 300;
/// How old a transaction in flight is when its votes are first sent again.
pub const RESEND_AFTER_MS: u64 = 1_000;
/// The same on a network so loaded that finality takes long.
pub const SLOWEST_RESEND_MS: u64 = 4_000;
/// How long after that they are sent once more; if nobody contradicts them, the pause doubles
/// with each time.
pub const RESEND_EVERY_MS: u64 = 3_000;
/// How often it doubles.
pub const MAX_RESEND_DOUBLINGS: u32 = 2;
/// Transactions that one tick sends again.
pub const MAX_RESENDS_PER_TICK: usize = 1_024;
/// About how many bytes one tick, or one greeting, sends again to a member; far below
/// what may wait for its socket.
pub const MAX_RESEND_BYTES: usize = 8 * 1024 * 1024;
/// How often the core looks at its timers.
pub const TICK: Duration = Duration::from_millis(100);

// --- The ledger ---

/// Payments and requests of wallets that wait for the verify pool or the ledger; when
/// they are as many, wallets are told `Busy`.
pub const LEDGER_QUEUE: usize = 2_048;
/// The same of payments while there is no room in flight for another one, or they wait too long.
pub const LEDGER_QUEUE_WHEN_FULL: usize = 64;
/// Payments of wallets that wait longer than this wait too long.
pub const LONG_WAIT: Duration = Duration::from_millis(500);
/// Events that one commit takes together.
pub const MAX_EVENTS_PER_COMMIT: usize = 1_024;
/// So many payments within [`RUSH_TIME`] come faster than one after the other can.
pub const RUSH_PAYMENTS: usize = 5;
/// See [`RUSH_PAYMENTS`].
pub const RUSH_TIME: Duration = Duration::from_millis(10);
/// The least time from one commit to the next while they do.
pub const BETWEEN_COMMITS: Duration = Duration::from_millis(6);
/// How long a commit of which nobody would be told waits for one that somebody waits for.
pub const UNAWAITED_COMMIT: Duration = Duration::from_millis(10);
/// Values of members that wait for the verify pool or the ledger; each member has an
/// equal share of them.
pub const VERIFY_QUEUE: usize = 8_192;
/// How long a worker lets signatures gather while payments rush in.
pub const VERIFY_APART: Duration = Duration::from_millis(3);
/// Values whose signatures are checked together.
pub const VERIFY_BATCH: usize = 64;
/// Reads of the database that may run at once for wallets and strangers, and as many for
/// members.
pub const MAX_CONCURRENT_READS: usize = 16;

// --- The database ---

/// Bytes of a value in sled; longer records are split into rows.
pub const MAX_ROW_BYTES: usize = 4 * 1024;
/// Bytes that a row has beside its value in sled's leaves, at most: its key, and its lengths.
const ROW_OVERHEAD: usize = 128;
/// Rows that a leaf of sled's may have, with much to spare: 17 until it is split, and at most three
/// with each other one that is merged into it meanwhile.
const ROWS_IN_LEAF: usize = 31;
/// From so many bytes on a leaf of sled's is a blob, in a file that is never synced.
const BLOB_BYTES: usize = 512 * 1024 / 4 - 20;
const _: () = assert!(ROWS_IN_LEAF * (MAX_ROW_BYTES + ROW_OVERHEAD) < BLOB_BYTES);

/// Megabytes on disk from which on a running node makes its database compact.
pub const COMPACT_ABOVE_MB: u64 = 256;

/// Blocks whose spent outputs, certificates and changes are kept: about a week of them.
pub const RETENTION_BLOCKS: u64 = 604_800;
/// Entries at the end of the change log that are held against the rest at each start.
pub const MAX_CHECKED_AT_START: u64 = 100_000;
/// Rows at the end of a tree that are walked both ways at each start.
pub const MAX_LINKED_ROWS: usize = 8_192;
/// Outputs around which the rows are walked both ways at each start.
pub const MAX_LINKED_OUTPUTS: usize = 8_192;
/// Rows that one commit forgets.
pub const MAX_PRUNED_PER_COMMIT: usize = 256;

// --- Frames and messages (protocol §8, §9) ---

/// Bytes of a peer's frame.
pub const MAX_FRAME_BYTES: usize = 4 * 1024 * 1024;
/// Bytes of a frame before the handshake is done.
pub const MAX_HANDSHAKE_FRAME_BYTES: usize = 64 * 1024;
/// Bytes of a wallet's WebSocket message.
pub const MAX_WALLET_MESSAGE_BYTES: usize = 256 * 1024;
/// Bytes at which a paged answer is cut.
pub const MAX_PAGE_BYTES: usize = 2 * 1024 * 1024;
/// How long a handshake may stand still.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may be silent.
pub const SILENCE_TIMEOUT: Duration = Duration::from_secs(90);
/// How often a silent connection is pinged.
pub const PING_EVERY: Duration = Duration::from_secs(30);
/// How long the older of two live instances of a key has to answer a ping.
pub const DUPLICATE_PROBE: Duration = Duration::from_secs(5);
/// How long a write may stand still before the connection is closed.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(90);
/// Characters of a `request_id`, a `subscriber_id`, a `user_agent`.
pub const MAX_TEXT: usize = 128;

// --- Connections ---

/// Connections of wallets and strangers, all together.
pub const MAX_CONNECTIONS: usize = 4_096;
/// Connections from one IP address.
pub const MAX_CONNECTIONS_PER_IP: usize = 256;
/// Connections of one port whose handshake is not done.
pub const MAX_PENDING_HANDSHAKES: usize = 512;
/// The same from one IP address.
pub const MAX_PENDING_HANDSHAKES_PER_IP: usize = 128;
/// HTTP connections.
pub const MAX_HTTP_CONNECTIONS: usize = 64;
/// Bytes of an HTTP request's head.
pub const MAX_HTTP_HEAD_BYTES: usize = 16 * 1024;
/// Messages that wait for a member's socket; when it is full, the member is disconnected.
pub const PEER_QUEUE: usize = 16_384;
/// Bytes that wait for a member's socket.
pub const PEER_QUEUE_BYTES: usize = 64 * 1024 * 1024;
/// Messages that wait for a wallet's socket; whoever adds to a full one waits.
pub const WALLET_QUEUE: usize = 32;
/// Bytes that wait for a wallet's socket; one longer message may wait alone.
pub const WALLET_QUEUE_BYTES: usize = 128 * 1024;
/// Statuses that wait for a wallet's socket before nothing more is read from it.
pub const WALLET_UNREAD_STATUSES: usize = 4_096;
/// The same by about how many bytes they have.
pub const WALLET_UNREAD_STATUS_BYTES: usize = 2 * 1024 * 1024;
/// Bytes of strangers' frames above the handshake's size that are being received at once,
/// all together.
pub const STRANGERS_FRAME_BYTES: usize = 32 * 1024 * 1024;
/// Transactions of which one connection hears every change of status.
pub const MAX_WATCHED_PER_CONNECTION: usize = 8_192;
/// Final transactions of which one connection waits to hear that they are in a block.
pub const MAX_SETTLED_WATCHED_PER_CONNECTION: usize = 65_536;
/// Messages a second from a wallet; a long one counts as one more for each KiB.
pub const WALLET_MESSAGES_PER_SECOND: u32 = 20_000;
/// Bad signatures that a connection may send before it is closed; it earns one back a second.
pub const SIGNATURE_FAILURES: u32 = 32;
/// Messages that say nothing (malformed, unknown) before a connection is closed.
pub const BAD_MESSAGES: u32 = 256;
/// The first wait before a member is dialled again.
pub const DIAL_BACKOFF_MIN: Duration = Duration::from_millis(100);
/// The longest wait before a member is dialled again.
pub const DIAL_BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How long a dial may take.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often members tell each other what they have in flight.
pub const STATUS_EVERY: Duration = Duration::from_secs(3);
/// How often an observer asks members for what is final.
pub const OBSERVE_EVERY: Duration = Duration::from_millis(500);
/// Transactions that one `Status` names.
pub const MAX_STATUS_IN_FLIGHT: usize = 4_096;
/// Transactions that one `GetTransactions` asks for.
pub const MAX_TRANSACTIONS_PER_REQUEST: usize = 1_024;
/// Entries of one page of `GetFinalized`.
pub const MAX_FINALIZED_PER_PAGE: usize = 1_000;

// --- The wallets' feed (protocol §9) ---

/// Outpoints of one `UTXOStateQuery`.
pub const MAX_OUTPOINTS_PER_QUERY: usize = 4_096;
/// Addresses of one `AddressQuery`.
pub const MAX_ADDRESSES_PER_QUERY: usize = 1_024;
/// UTXOs of one page of `AddressQuery`.
pub const MAX_UTXOS_PER_PAGE: usize = 1_000;
/// Addresses and outpoints of one subscription.
pub const MAX_SUBSCRIPTION_FILTERS: usize = 4_096;
/// Subscriptions that are remembered, all together.
pub const MAX_SUBSCRIPTIONS: usize = 200_000;
/// Addresses and outpoints of all live subscriptions of one connection.
pub const MAX_FILTERS_PER_CONNECTION: usize = 16_384;
/// Live subscriptions of one connection.
pub const MAX_SUBSCRIPTIONS_PER_CONNECTION: usize = 1_024;
/// Changes that wait in memory for a live subscription; behind that it reads the log.
pub const FEED_QUEUE: usize = 128;
/// Change-log entries that are read at once.
pub const FEED_READ: usize = 2_048;
/// How old the note of a subscription's use may become while it is being used.
pub const SUBSCRIPTION_REFRESH: Duration = Duration::from_secs(24 * 3600);
/// How long an abandoned subscription is remembered.
pub const SUBSCRIPTION_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
