//! Looking at the consumer from outside, for what its pullers cannot see: that it stands still, or where it stands.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer;
use async_nats::jetstream::context::{ConsumerInfoError, ConsumerInfoErrorKind};
use async_nats::jetstream::stream::Stream;
use shared::ops::Readiness;
use shared::stream::{CONSUMER, lies_beyond};
use tokio::time::sleep;

use super::database::Database;
use super::session::Session;

/// How often.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long messages may wait while this worker asks for some and none is delivered or acknowledged. Somebody paused
/// the consumer, say, or workers that hang hold as much as may be un-acked.
const STANDSTILL: Duration = Duration::from_secs(10);

/// Looks for as long as the session lasts. A standstill is told on `/readyz`. What makes its acks wrong ends it,
/// also for pullers that hold a batch through an outage of PostgreSQL and ask for nothing: a consumer or stream that is
/// gone, another stream under the same name, a position beyond the stream's end. The next session begins by mending
/// what can be.
pub async fn watch(stream: &Stream, session: &Session, database: &Database, readiness: &Readiness) {
    let mut moved = Movement::new();
    while !session.is_over() {
        sleep(LOOK_EVERY).await;
        // In this order: a consumer is never ahead of a stream that is looked at later.
        let consumer = match stream.consumer_info(CONSUMER).await {
            Ok(consumer) => consumer,
            Err(error) if is_gone(&error) => return session.end(),
            Err(error) => {
                database.metrics().lag(None);
                readiness.set("consumer", Err(format!("JetStream does not tell where it stands: {error}")));
                continue;
            }
        };
        database.metrics().lag(Some(&consumer));
        let info = match stream.get_info().await {
            Ok(info) => info,
            Err(error) => {
                readiness.set("consumer", Err(format!("JetStream does not tell where the stream ends: {error}")));
                continue;
            }
        };
        let is_another = info.created != stream.cached_info().created;
        if is_another || lies_beyond(&consumer, info.state.last_sequence) {
            return session.end();
        }
        let asks = database.is_up() && database.is_idle();
        let state = match moved.standstill(&consumer, asks, Instant::now()) {
            Some(time) => Err(format!(
                "{} deliveries wait, and none has moved for {} s{}",
                consumer.num_pending,
                time.as_secs(),
                if consumer.paused { ": the consumer is paused" } else { "" },
            )),
            None => Ok("ready".into()),
        };
        readiness.set("consumer", state);
    }
}

fn is_gone(error: &ConsumerInfoError) -> bool {
    matches!(error.kind(), ConsumerInfoErrorKind::NotFound | ConsumerInfoErrorKind::StreamNotFound)
}

/// How far the consumer was, and since when.
struct Movement {
    /// Deliveries and acks so far, and when either last changed or it was nothing to worry about.
    last: Option<((u64, u64), Instant)>,
}

impl Movement {
    fn new() -> Movement {
        Movement { last: None }
    }

    /// For how long it has stood still with messages waiting, if longer than it may.
    fn standstill(&mut self, info: &consumer::Info, asks: bool, now: Instant) -> Option<Duration> {
        let place = (info.delivered.consumer_sequence, info.ack_floor.consumer_sequence);
        match self.last {
            Some((last, since)) if last == place && info.num_pending > 0 && asks => {
                Some(now.duration_since(since)).filter(|time| *time >= STANDSTILL)
            }
            _ => {
                self.last = Some((place, now));
                None
            }
        }
    }
}
