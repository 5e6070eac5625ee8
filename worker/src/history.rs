//! History: what was acknowledged stays in the stream for replays, for as long as there is room.
//!
//! The stream refuses what is new when it is full, rather than drop what no worker has read. So workers make room:
//! above 80 % of a limit of the stream (bytes or messages) they purge the oldest deliveries, down to 70 %. They never purge
//! one that the consumer has not acknowledged. Only one worker does it at a time, the one that gets an advisory lock; that
//! saves work and is no more than that. Two that purge at once do no harm, nor does a worker that cannot ask PostgreSQL for
//! the lock. Each purges up to a sequence that was acknowledged, and purging that twice changes nothing.
//!
//! A stream may hold subjects of others, and others may read deliveries there. Then only deliveries are purged, and none
//! that a consumer of the others has not read. A consumer that stands still keeps the stream full: the log names it.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::stream::{Config, Info, State, Stream};
use futures_util::TryStreamExt as _;
use shared::hostile::StoredMessage;
use shared::stream::{CONSUMER, SUBJECTS, filters, is_shared, lies_beyond, overlap};
use tokio::time::sleep;

use crate::metrics::Metrics;
use crate::pull::{Database, Session};
use crate::store::{Store, StoreError, Tx, within};

/// How often the stream's size is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Above this, in hundredths of a limit, room is made ...
const HIGH: u64 = 80;
/// ... down to this.
const LOW: u64 = 70;
/// Most bytes in one purge, by the average size. The server looks at each message's subject, and takes none meanwhile.
const STEP_BYTES: u64 = 64 << 20;
/// The advisory lock of whoever purges (the bytes of "loophist").
const LOCK: i64 = 0x6c6f_6f70_6869_7374;

/// For the transaction that holds the lock. A worker that hangs, or that the network has cut off, must not keep the lock:
/// PostgreSQL may notice after hours. Making room may take longer; then another worker begins beside it.
const SETTINGS: &str = "\
    SET LOCAL search_path = pg_catalog, pg_temp;
    SET LOCAL idle_in_transaction_session_timeout = '30s'";

/// Makes room whenever it is needed. Never returns.
pub async fn keep_room(stream: &Stream, session: &Session, store: &Store, database: &Database) {
    let room = Room { stream, session, metrics: database.metrics() };
    let mut told = String::new();
    loop {
        sleep(LOOK_EVERY).await;
        let Ok(info) = stream.get_info().await else { continue }; // NATS is away: nothing to do
        if !is_above(&info.state, &info.config, HIGH) {
            told.clear();
            continue;
        }
        let made = match database.is_up() {
            false => room.make().await,
            true => room.make_alone(store).await,
        };
        let Err(error) = made else { continue };
        let error = format!("{error:#}");
        if error != told {
            tracing::warn!(stream = info.config.name, "cannot make room in the stream: {error}");
            told = error;
        }
    }
}

/// The stream in which room is made, and the worker that makes it.
struct Room<'a> {
    stream: &'a Stream,
    session: &'a Session,
    metrics: &'a Metrics,
}

impl Room<'_> {
    /// Makes room where no other worker is doing it. The lock goes with its transaction, so it also works behind a
    /// connection pooler.
    async fn make_alone(&self, store: &Store) -> anyhow::Result<()> {
        let alone = |tx: Tx| async move {
            let mine = within(tx.query_one("SELECT pg_try_advisory_xact_lock($1)", &[&LOCK])).await?;
            match mine.try_get(0).map_err(|err| StoreError::from_sql(&err))? {
                true => Ok::<_, StoreError>(self.make().await),
                false => Ok(Ok(())),
            }
        };
        match store.transact(SETTINGS, alone).await {
            Ok(made) => made,
            Err(error) => {
                tracing::debug!("history waits for the lock: {error}");
                Ok(())
            }
        }
    }

    /// Purges in small steps, looking again before each, until there is room or all that is left is unread.
    ///
    /// # Errors
    /// Something that only an operator mends keeps the stream full.
    async fn make(&self) -> anyhow::Result<()> {
        let mut purged = 0;
        let ended = loop {
            match self.step().await {
                Ok(0) => break Ok(()),
                Ok(more) => purged += more,
                Err(error) => break Err(error),
            }
        };
        self.metrics.purged(purged);
        if purged > 0 {
            tracing::info!(messages = purged, "made room in the stream: purged the oldest of what is acknowledged");
        }
        ended
    }

    /// One step: the number of messages that are purged.
    async fn step(&self) -> anyhow::Result<u64> {
        // In this order: what was acknowledged before the stream was looked at lies in the stream that is seen.
        let Ok(consumer) = self.stream.consumer_info(CONSUMER).await else { return Ok(0) };
        let Ok(Info { state, config, .. }) = self.stream.get_info().await else { return Ok(0) };
        if lies_beyond(&consumer, state.last_sequence) {
            return Ok(0); // its position is of another stream, and says nothing of what was read in this one
        }
        let acknowledged = consumer.ack_floor.stream_sequence;
        let (mut first, others) = match is_shared(&config) {
            false => (state.first_sequence, None),
            true => (self.first_delivery(&config).await?, self.first_unread_by_others(&state).await?),
        };
        let unread = others.as_ref().map_or(u64::MAX, |(_, sequence)| *sequence);
        while let Some(keep_from) = cut(&state, &config, first, unread.min(acknowledged + 1)) {
            let done =
                self.stream.purge().sequence(keep_from).filter(SUBJECTS).await.context("cannot purge history")?;
            if done.purged > 0 {
                return Ok(done.purged);
            }
            // Others once wrote into the stream, and their messages come first.
            let delivery = self.first_delivery(&config).await?;
            if delivery <= first {
                break;
            }
            first = delivery;
        }
        match others.filter(|_| cut(&state, &config, first, acknowledged + 1).is_some()) {
            Some((name, _)) => anyhow::bail!(
                "consumer {name} has not read the oldest deliveries; let it read, or delete it (`nats consumer rm {} {name}`)",
                config.name
            ),
            None => Ok(0),
        }
    }

    /// The sequence of the first delivery in a stream that begins with messages of others.
    async fn first_delivery(&self, config: &Config) -> anyhow::Result<u64> {
        let first = StoredMessage::first(self.session.context(), &config.name, SUBJECTS, 1).await?;
        Ok(first.map_or(u64::MAX, |message| message.sequence))
    }

    /// The first delivery that a consumer of the others may not have read, and the consumer.
    async fn first_unread_by_others(&self, state: &State) -> anyhow::Result<Option<(String, u64)>> {
        if state.consumer_count <= 1 {
            return Ok(None); // that one is ours
        }
        let consumers = self.stream.consumers().try_collect::<Vec<_>>().await.with_context(|| {
            let stream = &self.stream.cached_info().config.name;
            format!(
                "cannot see how far other consumers have read (the right to publish to $JS.API.CONSUMER.LIST.{stream})"
            )
        })?;
        let behind = consumers.into_iter().filter(|consumer| {
            consumer.name != CONSUMER
                && (consumer.num_pending > 0 || consumer.num_ack_pending > 0)
                && filters(&consumer.config).iter().any(|filter| overlap(filter, SUBJECTS).is_some())
        });
        let first = behind.min_by_key(|consumer| consumer.ack_floor.stream_sequence);
        Ok(first.map(|consumer| (consumer.name, consumer.ack_floor.stream_sequence + 1)))
    }
}

fn is_above(state: &State, config: &Config, percent: u64) -> bool {
    is_over(state.bytes, config.max_bytes, percent) || is_over(state.messages, config.max_messages, percent)
}

fn is_over(used: u64, limit: i64, percent: u64) -> bool {
    // No limit is written as 0 or -1.
    u64::try_from(limit)
        .is_ok_and(|limit| limit > 0 && u128::from(used) * 100 >= u128::from(limit) * u128::from(percent))
}

/// The sequence below which to purge now; `None` where there is room, or nothing more that may go. `first` is the first
/// delivery, and `unread` the first that stays in any case. It purges a quarter of what the average size
/// promises: the oldest may be larger than the average, and history is not to be cut deeper than needed.
fn cut(state: &State, config: &Config, first: u64, unread: u64) -> Option<u64> {
    if !is_above(state, config, LOW) {
        return None;
    }
    let above = |used: u64, limit: i64| match u64::try_from(limit) {
        Ok(limit) if limit > 0 => used.saturating_sub(limit / 100 * LOW),
        _ => 0,
    };
    let average = (state.bytes / state.messages.max(1)).max(1);
    let messages = above(state.bytes, config.max_bytes) / average;
    let oldest = messages.max(above(state.messages, config.max_messages)) / 4 + 1;
    let oldest = oldest.min(STEP_BYTES / average + 1);
    let keep_from = first.saturating_add(oldest).min(unread);
    (keep_from > first).then_some(keep_from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a server tells it.
    fn state(first_sequence: u64, messages: u64, bytes: u64) -> State {
        serde_json::from_value(serde_json::json!({
            "messages": messages, "bytes": bytes, "consumer_count": 1,
            "first_seq": first_sequence, "first_ts": "2026-11-01T00:00:00Z",
            "last_seq": first_sequence + messages - 1, "last_ts": "2026-11-02T00:00:00Z",
        }))
        .unwrap()
    }

    fn limited(max_bytes: i64, max_messages: i64) -> Config {
        Config { max_bytes, max_messages, ..Config::default() }
    }

    #[test]
    fn room_is_made_only_where_there_is_a_limit_that_is_near() {
        let full = state(1, 100, 10_000);
        let (above, room) =
            (|config: &Config| is_above(&full, config, HIGH), |config: &Config| cut(&full, config, 1, 101).is_some());
        for none in [limited(-1, -1), limited(0, 0), limited(1_000_000, 1_000)] {
            assert!(!above(&none) && !room(&none), "{none:?}");
        }
        for near in [limited(10_000, -1), limited(12_500, -1), limited(-1, 100), limited(0, 125)] {
            assert!(above(&near) && room(&near), "{near:?}");
        }
        for between in [limited(12_600, -1), limited(14_000, -1), limited(-1, 140)] {
            assert!(!above(&between) && room(&between), "{between:?}");
        }
        assert!(!room(&limited(14_300, 143)));
    }

    #[test]
    fn what_is_unread_is_never_purged() {
        for acknowledged in 0..=120 {
            for config in [limited(10_000, -1), limited(-1, 100)] {
                let kept_from = cut(&state(51, 100, 10_000), &config, 51, acknowledged + 1);
                assert!(kept_from.is_none_or(|from| from <= acknowledged + 1 && from > 51), "{kept_from:?}");
                assert_eq!(kept_from.is_some(), acknowledged >= 51);
            }
        }
    }

    #[test]
    fn steps_of_even_messages_end_just_below_the_mark() {
        for config in [limited(10_000, -1), limited(-1, 1_000)] {
            let (mut first, mut left) = (1, 1000);
            while let Some(keep_from) = cut(&state(first, left, left * 10), &config, first, 1001) {
                left -= keep_from - first;
                first = keep_from;
            }
            assert!((690..=700).contains(&left), "{left}");
        }
    }

    #[test]
    fn one_step_holds_the_server_up_for_moments_only() {
        let (gigabyte, limit) = (1 << 30, limited(10 << 30, -1));
        let full = state(1, 1_000_000, 10 * gigabyte);
        let messages = cut(&full, &limit, 1, u64::MAX).unwrap() - 1;
        assert!((1..=64 << 20).contains(&(messages * 10 * gigabyte / 1_000_000 - 10_737)), "{messages}");
    }

    #[test]
    fn a_stream_without_a_delivery_has_nothing_to_purge() {
        assert_eq!(cut(&state(1, 100, 10_000), &limited(10_000, -1), u64::MAX, 101), None);
    }
}
