//! History: what was acknowledged stays in the stream for replays, for as long as there is room.
//!
//! The stream refuses what is new when it is full, rather than drop what nobody has read. So somebody has to make room:
//! above 80 % of the stream's `max_bytes` the oldest messages are purged, down to 70 %, but never one that the consumer
//! has not acknowledged. Only one worker does it at a time, the one that gets an advisory lock; that saves work and is
//! no more than that. Two that purge at once, or a worker that cannot ask PostgreSQL for the lock, do no harm: each
//! purges up to a sequence that was acknowledged, and purging that twice changes nothing.

use std::time::Duration;

use async_nats::jetstream::stream::{Info, State, Stream};
use shared::stream::{CONSUMER, lies_beyond};
use tokio::time::sleep;

use crate::metrics::Metrics;
use crate::pull::Database;
use crate::store::{SEARCH_PATH, Store, StoreError, Tx, within};

/// How often the stream's size is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Above this, in hundredths of `max_bytes`, room is made ...
const HIGH: u64 = 80;
/// ... down to this.
const LOW: u64 = 70;
/// The advisory lock of whoever purges (the bytes of "loophist").
const LOCK: i64 = 0x6c6f_6f70_6869_7374;

/// Makes room whenever it is needed. Never returns.
pub async fn keep_room(stream: &Stream, store: &Store, database: &Database) {
    loop {
        sleep(LOOK_EVERY).await;
        let Ok(info) = stream.get_info().await else { continue }; // NATS is away: nothing to do
        if !is_above(&info.state, info.config.max_bytes, HIGH) {
            continue;
        }
        if !database.is_up() {
            make_room(stream, database.metrics()).await;
        } else if let Err(error) = make_room_alone(stream, store, database.metrics()).await {
            tracing::debug!("history waits for the lock: {error}");
        }
    }
}

/// The same, where no other worker is doing it. The lock goes with its transaction, so it also works behind a
/// connection pooler, and a worker that dies holds it no longer than PostgreSQL needs to notice.
async fn make_room_alone(stream: &Stream, store: &Store, metrics: &Metrics) -> Result<(), StoreError> {
    let alone = |tx: Tx| async move {
        let mine = within(tx.query_one("SELECT pg_try_advisory_xact_lock($1)", &[&LOCK])).await?;
        if mine.try_get(0).map_err(|err| StoreError::from_sql(&err))? {
            make_room(stream, metrics).await;
        }
        Ok(())
    };
    store.transact(SEARCH_PATH, alone).await
}

/// Purges in small steps, looking again before each, until there is room or all that is left is unread.
async fn make_room(stream: &Stream, metrics: &Metrics) {
    let mut purged = 0;
    loop {
        // In this order: what was acknowledged before the stream was looked at lies in the stream that is seen.
        let Ok(consumer) = stream.consumer_info(CONSUMER).await else { break };
        let Ok(Info { state, config, .. }) = stream.get_info().await else { break };
        if lies_beyond(&consumer, state.last_sequence) {
            break; // its position is of another stream, and says nothing of what was read in this one
        }
        let Some(keep_from) = cut(&state, config.max_bytes, consumer.ack_floor.stream_sequence) else { break };
        match stream.purge().sequence(keep_from).await {
            Ok(done) => {
                purged += done.purged;
                metrics.purged(done.purged);
            }
            Err(error) => {
                tracing::warn!(stream = config.name, "cannot purge history: {error}");
                break;
            }
        }
    }
    if purged > 0 {
        tracing::info!(messages = purged, "made room in the stream: purged the oldest of what is acknowledged");
    }
}

fn is_above(state: &State, max_bytes: i64, percent: u64) -> bool {
    // No limit is written as 0 or -1.
    u64::try_from(max_bytes).is_ok_and(|limit| limit > 0 && state.bytes / percent >= limit.div_ceil(100))
}

/// The sequence below which to purge now; `None` where there is room, or nothing more that may go. A quarter of what
/// the average size promises, because the oldest may be larger than the average, and history is not to be cut deeper
/// than it has to be.
fn cut(state: &State, max_bytes: i64, acknowledged: u64) -> Option<u64> {
    if !is_above(state, max_bytes, LOW) {
        return None;
    }
    let target = u64::try_from(max_bytes).ok()? / 100 * LOW;
    let average = (state.bytes / state.messages.max(1)).max(1);
    let oldest = state.bytes.saturating_sub(target) / average / 4 + 1;
    let keep_from = (state.first_sequence + oldest).min(acknowledged + 1);
    (keep_from > state.first_sequence).then_some(keep_from)
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

    #[test]
    fn room_is_made_only_where_there_is_a_limit_that_is_near() {
        let full = state(1, 100, 10_000);
        for (max_bytes, high, low) in [(-1, false, false), (0, false, false), (1_000_000, false, false)] {
            assert_eq!((is_above(&full, max_bytes, HIGH), cut(&full, max_bytes, 100).is_some()), (high, low));
        }
        assert!(is_above(&full, 10_000, HIGH) && is_above(&full, 12_500, HIGH) && !is_above(&full, 12_600, HIGH));
        assert!(cut(&full, 14_000, 100).is_some() && cut(&full, 14_300, 100).is_none());
    }

    #[test]
    fn what_is_unread_is_never_purged() {
        for acknowledged in 0..=120 {
            let kept_from = cut(&state(51, 100, 10_000), 10_000, acknowledged);
            assert!(kept_from.is_none_or(|from| from <= acknowledged + 1 && from > 51), "{acknowledged} {kept_from:?}");
            assert_eq!(kept_from.is_some(), acknowledged >= 51);
        }
    }

    #[test]
    fn steps_of_even_messages_end_just_below_the_mark() {
        let (mut first, mut left) = (1, 1000);
        while let Some(keep_from) = cut(&state(first, left, left * 10), 10_000, 1000) {
            left -= keep_from - first;
            first = keep_from;
        }
        assert!((690..=700).contains(&left), "{left}");
    }
}
