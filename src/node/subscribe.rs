//! Subscriptions: made, resumed, cancelled; whose they are.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::feed::Filter;
use super::ledger::{Input, NotYours, SubscriptionDone, SubscriptionRequest, Work, unix_now};
use super::protocol::{Refusal, UTXOProtocolHandler, busy, parse_addresses, parse_outpoints, refusal};
use crate::db::{Durable, Snapshot, Subscription, SubscriptionKey};
use crate::limits::{
    MAX_SUBSCRIPTION_FILTERS, MAX_SUBSCRIPTIONS, MAX_SUBSCRIPTIONS_PER_CONNECTION, MAX_TEXT, MAX_UTXOS_PER_PAGE,
    SUBSCRIPTION_RETENTION,
};
use crate::net::{
    Connection, ErrorCode, NetworkMessage, RequestId, UTXOSnapshot, UTXOSubscribe, UTXOSubscribed, UTXOUnsubscribe,
    UTXOUnsubscribed,
};
use crate::types::{Hash32, UnixSeconds, tagged_hash};

fn token_hash(token: &Hash32) -> [u8; 32] {
    tagged_hash("TIME/resume-token", &[token.as_bytes()])
}

fn parse_token(text: Option<&str>) -> Result<Option<Hash32>, Refusal> {
    let parse =
        |text: &str| text.parse().map_err(|_| refusal(ErrorCode::Malformed, "a resume_token is 32 bytes in hex"));
    text.map(parse).transpose()
}

fn not_yours() -> Refusal {
    refusal(ErrorCode::NotYourSubscription, "the subscription belongs to whoever holds its resume_token")
}

impl UTXOProtocolHandler {
    pub(super) async fn subscribe(
        &self,
        connection: &Arc<Connection>,
        request: UTXOSubscribe,
        request_id: Option<RequestId>,
    ) -> Result<(), Refusal> {
        if request.subscriber_id.is_empty() || request.subscriber_id.len() > MAX_TEXT {
            return Err(refusal(ErrorCode::Malformed, format!("a subscriber_id has 1 to {MAX_TEXT} bytes")));
        }
        if request.outpoints.len() + request.addresses.len() > MAX_SUBSCRIPTION_FILTERS {
            let text = format!("at most {MAX_SUBSCRIPTION_FILTERS} addresses and outpoints");
            return Err(refusal(ErrorCode::TooLarge, text));
        }
        let outpoints = parse_outpoints(&request.outpoints)?;
        let addresses = parse_addresses(&request.addresses, self.ledger.rules().network)?;
        let token = parse_token(request.resume_token.as_deref())?;
        let token = token.unwrap_or_else(|| Hash32::from_bytes(rand::random()));
        let key = SubscriptionKey::of(&request.subscriber_id);
        self.room_for(connection, &key)?;
        let subscription = Subscription {
            subscriber_id: request.subscriber_id.clone(),
            token_hash: token_hash(&token),
            outpoints,
            addresses,
            last_used: unix_now(),
        };
        // From here on whoever lacks the token is refused, whatever is running.
        let done = self.store(key, Some(subscription.clone()), Some(token_hash(&token))).await?;
        if !done.existed {
            self.feed.stored.fetch_add(1, Ordering::Relaxed);
        }
        let resumed = self.resumes_at(&request)?;
        let (sequence, utxos) = match resumed {
            Some(sequence) => (sequence, Vec::new()),
            None => {
                let (addresses, outpoints) = (subscription.addresses.clone(), subscription.outpoints.clone());
                let snapshot = self.read(connection, move |reader| reader.snapshot(&addresses, &outpoints)).await?;
                let Snapshot { sequence, utxos } = snapshot.into_inner();
                (sequence, utxos)
            }
        };
        let reset = request.resume_from.is_some() && resumed.is_none();
        let mut pages = utxos.chunks(MAX_UTXOS_PER_PAGE);
        let first = pages.next().unwrap_or_default().to_vec();
        let mut left = pages.len();
        let answer = NetworkMessage::UTXOSubscribed(UTXOSubscribed {
            subscriber_id: request.subscriber_id.clone(),
            resume_token: token.to_string(),
            log_id: hex::encode(self.ledger.reader().network().log_id),
            sequence,
            reset,
            utxos: first,
            more: left > 0,
        });
        let mut sent = connection.answer(&answer, request_id.as_deref()).await;
        for page in pages {
            left -= 1;
            let subscriber_id = request.subscriber_id.clone();
            let more =
                NetworkMessage::UTXOSnapshot(UTXOSnapshot { subscriber_id, utxos: page.to_vec(), more: left > 0 });
            if sent.is_ok() {
                sent = connection.answer(&more, None).await;
            }
        }
        if sent.is_ok() {
            self.feed.begin(key, Filter::of(&subscription), sequence, connection);
        }
        Ok(())
    }

    fn room_for(&self, connection: &Arc<Connection>, key: &SubscriptionKey) -> Result<(), Refusal> {
        let here = self.feed.is_session_of(key, connection.id());
        if !here && self.feed.sessions_of(connection.id()) >= MAX_SUBSCRIPTIONS_PER_CONNECTION {
            let text = format!("at most {MAX_SUBSCRIPTIONS_PER_CONNECTION} on one connection");
            return Err(refusal(ErrorCode::TooManySubscriptions, text));
        }
        if !here && self.feed.stored.load(Ordering::Relaxed) >= MAX_SUBSCRIPTIONS {
            return Err(refusal(ErrorCode::TooManySubscriptions, "the node remembers as many as it can"));
        }
        Ok(())
    }

    /// Where a returning wallet goes on; `None` if it has to begin anew, because the log
    /// does not reach back so far or is another one.
    fn resumes_at(&self, request: &UTXOSubscribe) -> Result<Option<u64>, Refusal> {
        let Some(from) = request.resume_from else { return Ok(None) };
        let reader = self.ledger.reader();
        let same_log = request.log_id.as_ref().is_none_or(|id| *id == hex::encode(reader.network().log_id));
        let first = reader.first_sequence().map_err(|error| {
            tracing::error!(%error, "cannot read the change log");
            refusal(ErrorCode::Internal, "the node could not read its database")
        })?;
        let reaches = from + 1 >= first && from <= reader.durable_head().sequence;
        Ok((same_log && reaches && request.resume_token.is_some()).then_some(from))
    }

    pub(super) async fn unsubscribe(
        &self,
        connection: &Arc<Connection>,
        request: UTXOUnsubscribe,
    ) -> Result<Durable<NetworkMessage>, Refusal> {
        let key = SubscriptionKey::of(&request.subscriber_id);
        let token = parse_token(request.resume_token.as_deref())?;
        let own = self.feed.is_session_of(&key, connection.id());
        let token_hash = match token {
            Some(token) => Some(token_hash(&token)),
            None if own => None,
            None => return Err(not_yours()),
        };
        let (done, durable) = self.store_durable(key, None, token_hash).await?;
        if !done.existed {
            return Err(not_yours());
        }
        self.feed.stored.fetch_sub(1, Ordering::Relaxed);
        self.feed.cancel(&key);
        let subscriber_id = request.subscriber_id;
        Ok(durable.map(|()| NetworkMessage::UTXOUnsubscribed(UTXOUnsubscribed { subscriber_id })))
    }

    async fn store(
        &self,
        key: SubscriptionKey,
        subscription: Option<Subscription>,
        token_hash: Option<[u8; 32]>,
    ) -> Result<SubscriptionDone, Refusal> {
        self.store_durable(key, subscription, token_hash).await.map(|(done, _)| done)
    }

    async fn store_durable(
        &self,
        key: SubscriptionKey,
        subscription: Option<Subscription>,
        token_hash: Option<[u8; 32]>,
    ) -> Result<(SubscriptionDone, Durable<()>), Refusal> {
        let permit = self.pool.permit().map_err(|_| busy())?;
        let (done, stored) = oneshot::channel();
        let request = SubscriptionRequest { key, subscription, token_hash, done };
        let work = Work { input: Input::Subscription(request), permit: Some(permit) };
        self.ledger.inputs().send(work).map_err(|_| busy())?;
        let stored = stored.await.map_err(|_| busy())?;
        let (answer, durable) = stored.split(|answer| (answer, ()));
        match answer.into_inner() {
            Ok(done) => Ok((done, durable)),
            Err(NotYours) => Err(not_yours()),
        }
    }

    /// Forgets subscriptions that nobody used for a long time.
    pub(super) async fn expire_subscriptions(&self, now: UnixSeconds) {
        let retention = i64::try_from(SUBSCRIPTION_RETENTION.as_secs()).unwrap_or(i64::MAX);
        let old = self.read_for_house(move |reader| {
            reader
                .subscriptions()
                .filter(|s| s.as_ref().is_ok_and(|s| s.last_used < now - retention))
                .collect::<Result<Vec<_>, _>>()
        });
        let Ok(old) = old.await else { return };
        for subscription in old.into_inner() {
            let key = SubscriptionKey::of(&subscription.subscriber_id);
            if self.feed.has_session(&key) {
                continue;
            }
            // The token's own hash: if it was replaced meanwhile, it is not this one's.
            if self.store(key, None, Some(subscription.token_hash)).await.is_ok_and(|done| done.existed) {
                self.feed.stored.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}
