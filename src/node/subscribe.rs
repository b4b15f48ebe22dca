//! Subscriptions: made, resumed, cancelled; whose they are.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::clock::unix_now;
use super::feed::Filter;
use super::input::{Input, NotYours, SubscriptionDone, SubscriptionRequest, Work};
use super::protocol::{Refusal, UTXOProtocolHandler, busy, parse_addresses, parse_outpoints, refusal};
use crate::db::{Durable, Reader, Snapshot, Subscription, SubscriptionKey};
use crate::limits::{
    MAX_FILTERS_PER_CONNECTION, MAX_SUBSCRIPTION_FILTERS, MAX_SUBSCRIPTIONS, MAX_SUBSCRIPTIONS_PER_CONNECTION,
    MAX_TEXT, MAX_UTXOS_PER_PAGE, SUBSCRIPTION_REFRESH, SUBSCRIPTION_RETENTION,
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
        self.room_for(connection, &key, outpoints.len() + addresses.len()).await?;
        let subscription = Subscription {
            subscriber_id: request.subscriber_id.clone(),
            token_hash: token_hash(&token),
            outpoints,
            addresses,
            last_used: unix_now(),
        };
        // From here on whoever lacks the token is refused, whatever is running; and what was
        // running is silent before the new snapshot is taken.
        let hash = token_hash(&token);
        let (done, _) = self.store(key, Some(subscription.clone()), hash).await?;
        if !done.existed {
            self.feed.stored.fetch_add(1, Ordering::Relaxed);
        }
        let filters = subscription.addresses.len() + subscription.outpoints.len();
        let claimed = self.feed.claim(key, done.number, hash, filters, connection).await;
        let mut claim = claimed.ok_or_else(not_yours)?;
        // A wallet that does not read its answer cannot hold up whoever comes after it.
        let begun = tokio::select! {
            begun = self.tell_state(connection, &request, &subscription, &token, request_id) => begun,
            () = claim.lost() => Err(not_yours()),
        };
        match begun {
            Ok(Some(sequence)) => {
                self.feed.begin(claim, Filter::of(&subscription), sequence, connection);
                Ok(())
            }
            Ok(None) => {
                self.feed.end(&claim);
                Ok(())
            }
            Err(refused) => {
                self.feed.end(&claim);
                Err(refused)
            }
        }
    }

    /// Answers a subscription with the state from which its stream goes on; gives that
    /// place in the log, `None` if the wallet has gone.
    async fn tell_state(
        &self,
        connection: &Arc<Connection>,
        request: &UTXOSubscribe,
        subscription: &Subscription,
        token: &Hash32,
        request_id: Option<RequestId>,
    ) -> Result<Option<u64>, Refusal> {
        let resumed = self.resumes_at(connection, request).await?;
        let (sequence, utxos) = match resumed {
            Some(sequence) => (sequence, Vec::new()),
            None => {
                let (addresses, outpoints) = (subscription.addresses.clone(), subscription.outpoints.clone());
                let snapshot = self.look(connection, move |reader| reader.snapshot(&addresses, &outpoints)).await?;
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
        Ok(sent.is_ok().then_some(sequence))
    }

    async fn room_for(&self, connection: &Connection, key: &SubscriptionKey, filters: usize) -> Result<(), Refusal> {
        let too_many = |text: String| Err(refusal(ErrorCode::TooManySubscriptions, text));
        let here = self.feed.session_of(key, connection.id()).is_some();
        if !here && self.feed.sessions_of(connection.id()) >= MAX_SUBSCRIPTIONS_PER_CONNECTION {
            return too_many(format!("at most {MAX_SUBSCRIPTIONS_PER_CONNECTION} on one connection"));
        }
        if self.feed.filters_of(connection.id(), key) + filters > MAX_FILTERS_PER_CONNECTION {
            return too_many(format!("at most {MAX_FILTERS_PER_CONNECTION} addresses and outpoints on one connection"));
        }
        let full = self.feed.stored.load(Ordering::Relaxed) >= MAX_SUBSCRIPTIONS;
        // Whoever is remembered may come back, however full it is.
        if full {
            let sought = *key;
            if self.peek(connection, move |reader| reader.subscription(&sought)).await?.is_none() {
                return too_many("the node remembers as many as it can".into());
            }
        }
        Ok(())
    }

    /// Where a returning wallet goes on; `None` if it has to begin anew, because the log
    /// does not reach back so far or is another one.
    async fn resumes_at(&self, connection: &Connection, request: &UTXOSubscribe) -> Result<Option<u64>, Refusal> {
        let Some(from) = request.resume_from else { return Ok(None) };
        let reader = self.ledger.reader();
        let same_log = request.log_id.as_ref().is_none_or(|id| *id == hex::encode(reader.network().log_id));
        let first = self.peek(connection, Reader::first_sequence).await?;
        let reaches = from <= reader.durable_head().sequence && from + 1 >= first;
        Ok((same_log && reaches && request.resume_token.is_some()).then_some(from))
    }

    pub(super) async fn unsubscribe(
        &self,
        connection: &Arc<Connection>,
        request: UTXOUnsubscribe,
    ) -> Result<Durable<NetworkMessage>, Refusal> {
        let key = SubscriptionKey::of(&request.subscriber_id);
        let token = parse_token(request.resume_token.as_deref())?;
        // On the connection that has it, the token with which it was taken counts.
        let shown = token.as_ref().map(token_hash);
        let hash = shown.or_else(|| self.feed.session_of(&key, connection.id())).ok_or_else(not_yours)?;
        let (done, durable) = self.store(key, None, hash).await?;
        if !done.existed {
            return Err(not_yours());
        }
        self.feed.stored.fetch_sub(1, Ordering::Relaxed);
        self.feed.cancel(&key, done.number).await;
        let subscriber_id = request.subscriber_id;
        Ok(durable.map(|()| NetworkMessage::UTXOUnsubscribed(UTXOUnsubscribed { subscriber_id })))
    }

    async fn store(
        &self,
        key: SubscriptionKey,
        subscription: Option<Subscription>,
        token_hash: [u8; 32],
    ) -> Result<(SubscriptionDone, Durable<()>), Refusal> {
        let place = self.pool.place().map_err(|_| busy())?;
        let (done, stored) = oneshot::channel();
        let request = SubscriptionRequest { key, subscription, token_hash, last_used_before: None, done };
        let work = Work { input: Input::Subscription(request), place: Some(place) };
        self.ledger.inputs().wallets.send(work).map_err(|_| busy())?;
        let stored = stored.await.map_err(|_| busy())?;
        let (answer, durable) = stored.split(|answer| (answer, ()));
        match answer.into_inner() {
            Ok(done) => Ok((done, durable)),
            Err(NotYours) => Err(not_yours()),
        }
    }

    /// Forgets subscriptions that nobody used for a long time, and writes down of those
    /// that are being used that they are.
    pub(super) async fn tend_subscriptions(&self, now: UnixSeconds) {
        let seconds = |duration: std::time::Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        let (expired, stale) = (now - seconds(SUBSCRIPTION_RETENTION), now - seconds(SUBSCRIPTION_REFRESH));
        let streamed: std::collections::BTreeSet<_> = self.feed.streamed().into_iter().collect();
        let old = self.read_for_house(move |reader| {
            let old = |s: &Result<Subscription, _>| s.as_ref().map_or(true, |s| s.last_used < stale);
            reader.subscriptions().filter(old).collect::<Result<Vec<_>, _>>()
        });
        let Ok(old) = old.await else { return };
        for subscription in old.into_inner() {
            let key = SubscriptionKey::of(&subscription.subscriber_id);
            let token_hash = subscription.token_hash;
            let last_used_before = Some(subscription.last_used + 1);
            let renewed = match (streamed.contains(&key), subscription.last_used < expired) {
                (true, _) => Some(Subscription { last_used: now, ..subscription }),
                (false, true) => None,
                (false, false) => continue,
            };
            let forgotten = renewed.is_none();
            let (done, stored) = oneshot::channel();
            let request = SubscriptionRequest { key, subscription: renewed, token_hash, last_used_before, done };
            self.ledger.tell(Input::Subscription(request));
            let Ok(stored) = stored.await else { return };
            if forgotten && stored.into_inner().is_ok_and(|done| done.existed) {
                self.feed.stored.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}
