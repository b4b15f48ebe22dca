//! Pays: finds coins, checks them, sends, and waits until the payment is proved final.
//!
//! The node is asked and never trusted. It cannot make the wallet spend more than it shows
//! (parents are hashed) nor believe in a finality that is none (the proof is verified). What
//! it can do is to hide coins and to sit on a payment.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use serde_json::json;
use time_masternode::consensus::{Committee, Rejection};
use time_masternode::net::{NetworkMessage, TransactionStatus, TransactionStatusKind};
use time_masternode::types::{Address, Amount, Genesis, OutPoint, Transaction, Txid, UTXOState};
use tokio::time::Instant;

use super::client::{Client, ClientError, refusal_of};
use super::coins::{self, Coin, CoinsError};
use super::payment::{PaymentError, Plan};
use super::proof::{self, ProofError, Proven};
use super::query::{self, QueryError};
use super::report::{Report, printable, remark};

/// How long to wait before a lost connection is dialled again.
const REDIAL: Duration = Duration::from_millis(500);

/// Why a payment was not made, or is not known to be.
#[derive(Debug, thiserror::Error)]
pub enum PayError {
    /// A question to the node.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// The connection.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The coins.
    #[error(transparent)]
    Coins(#[from] CoinsError),
    /// The payment itself.
    #[error(transparent)]
    Payment(#[from] PaymentError),
    /// The proof of finality.
    #[error("{txid}: {source}")]
    Proof {
        /// The payment.
        txid: Txid,
        /// What is wrong with its proof.
        source: ProofError,
    },
    /// The node refused it; nothing has changed.
    #[error("rejected: {code}: {message}")]
    Rejected {
        /// The rule's stable code.
        code: String,
        /// The same for people.
        message: String,
    },
    /// It lost against a conflicting transaction.
    #[error("{0} was aborted and can never become valid; its coins are free again")]
    Aborted(Txid),
    /// Not settled in time.
    #[error(
        "{txid} is not final after {seconds} s and may still become so; do not pay again before `time-wallet status {txid}` says what became of it"
    )]
    Late {
        /// The payment.
        txid: Txid,
        /// How long was waited.
        seconds: u64,
    },
    /// The connection was lost after it was sent.
    #[error(
        "{txid} was sent, but then: {source}; do not pay again before `time-wallet status {txid}` says what became of it"
    )]
    Lost {
        /// The payment.
        txid: Txid,
        /// What happened.
        source: ClientError,
    },
    /// A named coin that the owner does not have.
    #[error("{0} is not among the live coins of the key's address")]
    UnknownCoin(OutPoint),
    /// A named coin that is in use.
    #[error("{0} is locked for {1}")]
    Locked(OutPoint, Txid),
    /// A named coin that no hash vouches for.
    #[error("{0} has no parent transaction, as coins paid from fees; its amount cannot be checked, so it is not spent")]
    Uncheckable(OutPoint),
    /// Standard output.
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

impl PayError {
    /// Whether the payment was refused, as opposed to not made or not known.
    pub const fn is_refusal(&self) -> bool {
        match self {
            Self::Query(error) => error.is_refusal(),
            Self::Client(error) => error.is_refusal(),
            Self::Proof { source, .. } => source.is_refusal(),
            Self::Coins(_) | Self::Rejected { .. } | Self::Aborted(_) => true,
            Self::UnknownCoin(_) | Self::Locked(..) | Self::Uncheckable(_) => true,
            Self::Payment(_) | Self::Late { .. } | Self::Lost { .. } | Self::Output(_) => false,
        }
    }
}

impl From<Rejection> for PayError {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected { code: rejection.code().into(), message: rejection.to_string() }
    }
}

/// Coins of the genesis, which need no node; `None` if one of them is not its.
pub fn genesis_coins(named: &[OutPoint], genesis: &Genesis, owner: Address) -> Result<Option<Vec<Coin>>, PayError> {
    let created: BTreeMap<OutPoint, _> = genesis.transaction().creates().collect();
    if named.is_empty() || named.iter().any(|outpoint| outpoint.txid != genesis.transaction().txid()) {
        return Ok(None);
    }
    let coin = |outpoint: &OutPoint| {
        let output = created.get(outpoint).filter(|output| output.address == owner);
        output.map(|output| Coin { outpoint: *outpoint, output: *output }).ok_or(PayError::UnknownCoin(*outpoint))
    };
    named.iter().map(coin).collect::<Result<_, _>>().map(Some)
}

/// Picks coins of `owner` that cover `needed`, each checked against its parent.
pub async fn pick(
    client: &mut Client,
    genesis: &Genesis,
    owner: Address,
    needed: Amount,
    named: &[OutPoint],
) -> Result<Vec<Coin>, PayError> {
    let live = query::live_coins(client, owner).await?;
    if !named.is_empty() {
        return pick_named(
            client,
            genesis,
            live.iter().map(|c| (c.outpoint, (c.output, c.state))).collect(),
            needed,
            named,
        )
        .await;
    }
    let unspent = live.iter().filter(|coin| coin.state == UTXOState::Unspent);
    let mut claims: Vec<Coin> = unspent.map(|c| Coin { outpoint: c.outpoint, output: c.output }).collect();
    let locked = live.len() - claims.len();
    let mut known: BTreeMap<Txid, Transaction> = BTreeMap::new();
    loop {
        let picked = coins::select(&claims, needed).inspect_err(|_| {
            if locked > 0 {
                remark(&format!("locked coins, which cannot be spent now: {locked}"));
            }
        })?;
        let unasked = picked.iter().map(|coin| coin.outpoint.txid).filter(|txid| !known.contains_key(txid));
        known.extend(query::parents(client, genesis, unasked.collect()).await?);
        let skipped = check_all(&picked, &known)?;
        if skipped.is_empty() {
            return Ok(picked);
        }
        let list: Vec<String> = skipped.iter().map(ToString::to_string).collect();
        remark(&format!("skipped, for no parent vouches for their amounts: {}", list.join(" ")));
        claims.retain(|coin| !skipped.contains(&coin.outpoint));
    }
}

/// Holds every coin to its parent; gives those that have none.
fn check_all(picked: &[Coin], known: &BTreeMap<Txid, Transaction>) -> Result<BTreeSet<OutPoint>, CoinsError> {
    let mut orphans = BTreeSet::new();
    for coin in picked {
        match known.get(&coin.outpoint.txid) {
            Some(parent) => coins::check_claim(coin, parent)?,
            None => {
                orphans.insert(coin.outpoint);
            }
        }
    }
    Ok(orphans)
}

async fn pick_named(
    client: &mut Client,
    genesis: &Genesis,
    live: BTreeMap<OutPoint, (time_masternode::types::Output, UTXOState)>,
    needed: Amount,
    named: &[OutPoint],
) -> Result<Vec<Coin>, PayError> {
    let mut picked = Vec::with_capacity(named.len());
    for outpoint in named {
        let (output, state) = live.get(outpoint).ok_or(PayError::UnknownCoin(*outpoint))?;
        if let Some(by) = state.txid() {
            return Err(PayError::Locked(*outpoint, by));
        }
        picked.push(Coin { outpoint: *outpoint, output: *output });
    }
    let picked = coins::take_named(picked, needed)?;
    let parents = query::parents(client, genesis, picked.iter().map(|coin| coin.outpoint.txid).collect()).await?;
    match check_all(&picked, &parents)?.first() {
        Some(orphan) => Err(PayError::Uncheckable(*orphan)),
        None => Ok(picked),
    }
}

/// Says what is about to be sent, so that the txid is known whatever happens then.
pub fn announce(report: Report, transaction: &Transaction, plan: &Plan) -> Result<(), PayError> {
    let txid = transaction.txid();
    let paid: Vec<_> = plan.payments().iter().map(|p| format!("{} TIME to {}", p.amount, p.address)).collect();
    let payments: Vec<_> = plan.payments().iter().map(|p| json!({"amount": p.amount, "address": p.address})).collect();
    let text =
        format!("{txid}  pays {}, fee {} TIME, {} inputs", paid.join(", "), plan.fee(), transaction.inputs().len());
    let inputs: Vec<_> = transaction.spends().map(|outpoint| outpoint.to_string()).collect();
    let json = json!({"event": "Signed", "txid": txid, "payments": payments, "fee": plan.fee(), "inputs": inputs});
    Ok(report.result(&text, &json)?)
}

/// How a payment is delivered.
pub struct Delivery<'a> {
    /// The node's address, for another attempt when the connection is lost.
    pub node: &'a str,
    /// What finality is verified against.
    pub genesis: &'a Genesis,
    /// Where results go.
    pub report: Report,
    /// How long to wait for finality.
    pub timeout: Duration,
    /// Whether to wait for it at all.
    pub wait: bool,
}

/// What a status says, once its proof is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing yet.
    Unknown,
    /// Durably stored by the node.
    Pending,
    /// Proved final.
    Final(Proven),
}

/// Reads a status: a claim of finality counts only with a proof that holds.
pub fn judge(status: &TransactionStatus, committee: &Committee) -> Result<Standing, PayError> {
    let txid = status.txid;
    match status.status {
        TransactionStatusKind::Unknown => Ok(Standing::Unknown),
        TransactionStatusKind::Pending => Ok(Standing::Pending),
        TransactionStatusKind::Aborted => Err(PayError::Aborted(txid)),
        TransactionStatusKind::Rejected => Err(match &status.rejection {
            Some(why) => PayError::Rejected { code: printable(&why.code), message: printable(&why.message) },
            None => PayError::Rejected { code: "Rejected".into(), message: "the node gives no reason".into() },
        }),
        TransactionStatusKind::Finalized | TransactionStatusKind::Confirmed => {
            let proof = status.finality_proof.as_ref().ok_or(ProofError::Missing);
            let proven = proof.and_then(|proof| proof::verify(proof, committee, Some(txid)));
            proven.map(Standing::Final).map_err(|source| PayError::Proof { txid, source })
        }
    }
}

impl Delivery<'_> {
    /// Sends a transaction and follows it. A lost connection is dialled again until the time
    /// is up: sending an accepted transaction once more is not an error.
    pub async fn deliver(&self, mut client: Client, transaction: &Transaction) -> Result<(), PayError> {
        let txid = transaction.txid();
        let started = Instant::now();
        let deadline = started + self.timeout;
        let mut pending_said = false;
        loop {
            let source = match self.follow(&mut client, transaction, started, &mut pending_said).await {
                Err(PayError::Client(error)) if !matches!(error, ClientError::Refused { .. }) => error,
                other => return other,
            };
            remark(&format!("{source}; trying again"));
            client = loop {
                if Instant::now() >= deadline {
                    return Err(PayError::Lost { txid, source });
                }
                tokio::time::sleep(REDIAL).await;
                if let Ok(client) = Client::connect(self.node).await {
                    break client;
                }
            };
        }
    }

    async fn follow(
        &self,
        client: &mut Client,
        transaction: &Transaction,
        started: Instant,
        pending_said: &mut bool,
    ) -> Result<(), PayError> {
        let txid = transaction.txid();
        let committee = Committee::of_genesis(self.genesis);
        let request_id = client.send(&NetworkMessage::TransactionBroadcast(transaction.to_raw())).await?;
        loop {
            let Some(incoming) = client.next(started + self.timeout).await? else {
                return Err(PayError::Late { txid, seconds: self.timeout.as_secs() });
            };
            let standing = match &incoming.message {
                NetworkMessage::TransactionStatus(status) if status.txid == txid => judge(status, &committee)?,
                _ => {
                    refusal_of(incoming, &request_id)?;
                    continue;
                }
            };
            let milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            match standing {
                Standing::Unknown => {}
                Standing::Pending if *pending_said => {}
                Standing::Pending => {
                    *pending_said = true;
                    let json = json!({"event": "Pending", "txid": txid, "milliseconds": milliseconds});
                    self.report.result(&format!("{txid}  pending after {milliseconds} ms"), &json)?;
                    if !self.wait {
                        return Ok(());
                    }
                }
                Standing::Final(proven) => return self.say_final(&proven, milliseconds),
            }
        }
    }

    fn say_final(&self, proven: &Proven, milliseconds: u64) -> Result<(), PayError> {
        let text = format!(
            "{}  final after {milliseconds} ms: proof verified, weight {} of {} (quorum {})",
            proven.txid, proven.weight, proven.total_weight, proven.quorum
        );
        let mut json = proven.json();
        if let Some(map) = json.as_object_mut() {
            map.insert("event".into(), "Finalized".into());
            map.insert("milliseconds".into(), milliseconds.into());
        }
        Ok(self.report.result(&text, &json)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use time_masternode::consensus::{Certificate, SignedVote, Vote, VoteKind, sign_batch};
    use time_masternode::net::{FinalityProof, RejectionMessage};
    use time_masternode::types::{Allocation, Network, RawGenesis, RawMasternode, SecretKey};

    use super::*;

    fn key(n: u8) -> SecretKey {
        SecretKey::from_seed([n; 32])
    }

    fn genesis() -> Genesis {
        let address = |n| Address::of_key(&key(n).public_key(), Network::Devnet).to_string();
        let member = |n| RawMasternode {
            id: format!("m{n}"),
            public_key: key(n).public_key(),
            weight: 1,
            p2p_address: String::new(),
            payout_address: address(n),
        };
        Genesis::try_from(RawGenesis {
            network: Network::Devnet,
            timestamp: 1,
            block_interval_ms: 1,
            min_fee: 1,
            masternodes: (1..=4).map(member).collect(),
            allocations: vec![Allocation { address: address(9), amount: 100 }],
        })
        .unwrap()
    }

    fn proof(kind: VoteKind, txid: Txid, voters: u8) -> FinalityProof {
        let committee = Committee::of_genesis(&genesis());
        let votes = (1..=voters).map(|n| {
            let batch = sign_batch(&key(n), &committee, vec![Vote { kind, txid }]).unwrap();
            let (voter, signature) = (batch.get().wire().voter, batch.get().wire().signature);
            SignedVote { voter, signature, index: 0, batch_size: 1, path: Vec::new() }
        });
        FinalityProof::Commit(Arc::new(Certificate { kind, txid, epoch: 0, votes: votes.collect() }))
    }

    fn status(status: TransactionStatusKind, finality_proof: Option<FinalityProof>) -> Result<Standing, PayError> {
        let txid = Txid::from_bytes([7; 32]);
        let why = RejectionMessage { code: "InputSpent".into(), message: "late\u{7}".into(), by: None };
        let status = TransactionStatus {
            txid,
            status,
            rejection: Some(why),
            approvals: 4,
            commits: 4,
            total_masternodes: 4,
            block_height: None,
            finality_proof,
        };
        judge(&status, &Committee::of_genesis(&genesis()))
    }

    #[test]
    fn finality_is_believed_only_with_its_proof() {
        use TransactionStatusKind::{Aborted, Confirmed, Finalized, Pending, Rejected, Unknown};
        let txid = Txid::from_bytes([7; 32]);
        let good = proof(VoteKind::Commit, txid, 3);
        for kind in [Finalized, Confirmed] {
            assert!(matches!(status(kind, Some(good.clone())), Ok(Standing::Final(Proven { members: 3, .. }))));
            let bad = [
                None,
                Some(proof(VoteKind::Commit, txid, 2)),
                Some(proof(VoteKind::Approve, txid, 4)),
                Some(proof(VoteKind::Commit, Txid::from_bytes([8; 32]), 4)),
            ];
            for bad in bad {
                assert!(status(kind, bad).unwrap_err().is_refusal());
            }
        }
        assert!(
            matches!(status(Pending, Some(good.clone())), Ok(Standing::Pending)),
            "the status decides what to wait for"
        );
        assert!(matches!(status(Unknown, None), Ok(Standing::Unknown)));
        assert!(matches!(status(Aborted, Some(good)), Err(PayError::Aborted(_))));
        assert_eq!(status(Rejected, None).unwrap_err().to_string(), "rejected: InputSpent: late?");
    }

    #[test]
    fn coins_of_the_genesis_need_no_node() {
        let genesis = genesis();
        let owner = Address::of_key(&key(9).public_key(), Network::Devnet);
        let first = OutPoint { txid: genesis.transaction().txid(), vout: 0 };
        let elsewhere = OutPoint { txid: Txid::from_bytes([1; 32]), vout: 0 };
        let coins = genesis_coins(&[first], &genesis, owner).unwrap().unwrap();
        assert_eq!(coins[0].output, genesis.transaction().outputs()[0]);
        assert!(genesis_coins(&[], &genesis, owner).unwrap().is_none());
        assert!(genesis_coins(&[first, elsewhere], &genesis, owner).unwrap().is_none());
        let stranger = Address::of_key(&key(8).public_key(), Network::Devnet);
        assert!(genesis_coins(&[first], &genesis, stranger).is_err());
        assert!(genesis_coins(&[OutPoint { vout: 1, ..first }], &genesis, owner).is_err());
    }
}
