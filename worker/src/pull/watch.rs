//! Looking at the consumer from outside, for what its pullers cannot see: that it stands still, or where it stands.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer;
use async_nats::jetstream::context::{ConsumerInfoError, ConsumerInfoErrorKind};
use async_nats::jetstream::stream::{self, Stream};
use shared::ops::Readiness;
use shared::stream::{CONSUMER, NatsSettings, is_fit, lies_beyond, risks};
use tokio::time::sleep;

use super::database::Database;
use super::session::Session;

/// How often.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long messages may wait while this worker asks for some and none is delivered or acknowledged. Somebody paused
/// the consumer, say, or workers that hang hold as much as may be un-acked.
const STANDSTILL: Duration = Duration::from_secs(10);

/// Looks at the consumer in one session after another: where each ends at once, deliveries wait all the same.
pub struct Watch<'a> {
    nats: &'a NatsSettings,
    /// Shows the state.
    pub readiness: &'a Readiness,
    /// Stores the batches.
    pub database: &'a Database,
    moved: Movement,
    /// Why pulling ended last.
    failure: Option<String>,
}

impl<'a> Watch<'a> {
    /// A watch that has seen nothing yet.
    pub fn new(nats: &'a NatsSettings, readiness: &'a Readiness, database: &'a Database) -> Self {
        Watch { nats, readiness, database, moved: Movement::new(), failure: None }
    }

    /// A session begins with this consumer of that stream.
    pub fn begin(&mut self, stream: &stream::Config, consumer: &consumer::Info) {
        self.readiness.set("stream_settings", risks(stream, self.nats));
        self.look(consumer);
    }

    /// A session has ended.
    pub fn end(&mut self, session: &Session) {
        self.failure = session.failure().map(str::to_owned);
    }

    /// Looks for as long as the session lasts. A standstill is told on `/readyz`. A change that makes its acks wrong ends it:
    /// a consumer or stream that is gone, another stream under the same name, a position beyond the stream's end. Settings
    /// that have become unfit end it, too. That also reaches pullers that hold a batch through an outage of PostgreSQL and
    /// ask for nothing. The next session begins by mending what can be.
    pub async fn run(&mut self, stream: &Stream, session: &Session) {
        let fault = |text| self.readiness.set("consumer", Err(text));
        while !session.is_over() {
            sleep(LOOK_EVERY).await;
            // In this order: a consumer is never ahead of a stream that is looked at later.
            let consumer = match stream.consumer_info(CONSUMER).await {
                Ok(consumer) => consumer,
                Err(error) if is_gone(&error) => return session.end(),
                Err(error) => {
                    self.database.metrics().lag(None);
                    fault(format!("JetStream does not tell where it stands: {error}"));
                    continue;
                }
            };
            self.database.metrics().lag(Some(&consumer));
            let info = match stream.get_info().await {
                Ok(info) => info,
                Err(error) => {
                    fault(format!("JetStream does not tell where the stream ends: {error}"));
                    continue;
                }
            };
            let is_another = info.created != stream.cached_info().created;
            let is_unfit = !is_fit(&info.config, &consumer.config, self.nats);
            if is_another || is_unfit || lies_beyond(&consumer, info.state.last_sequence) {
                return session.end();
            }
            self.readiness.set("stream_settings", risks(&info.config, self.nats));
            self.failure = None; // this session pulls
            self.look(&consumer);
        }
    }

    /// Tells whether deliveries move.
    fn look(&mut self, consumer: &consumer::Info) {
        let asks = self.database.is_up() && self.database.is_idle();
        let state = match self.moved.standstill(consumer, asks, Instant::now()) {
            Some(time) => Err(format!(
                "{} deliveries wait, and none has moved for {} s{}",
                consumer.num_pending,
                time.as_secs(),
                cause(consumer, self.failure.as_deref()),
            )),
            None => Ok("ready".into()),
        };
        self.readiness.set("consumer", state);
    }
}

/// Why a consumer stands still, where that can be seen.
fn cause(consumer: &consumer::Info, failure: Option<&str>) -> String {
    let (held, limit) = (consumer.num_ack_pending as i64, consumer.config.max_ack_pending);
    if consumer.paused {
        let left = consumer.pause_remaining.map(|left| format!(" for {} s more", left.as_secs())).unwrap_or_default();
        format!(": the consumer is paused{left}")
    } else if limit > 0 && held >= limit {
        format!(": {held} are with workers that neither store nor hand them back, and no more may be un-acked")
    } else {
        failure.map(|failure| format!(": {failure}")).unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn info(delivered: u64, acknowledged: u64, pending: u64) -> consumer::Info {
        let place = |at: u64| serde_json::json!({ "consumer_seq": at, "stream_seq": at });
        serde_json::from_value(serde_json::json!({
            "stream_name": "SIGNALS", "name": "worker", "created": "2026-11-23T12:00:00Z",
            "config": { "deliver_policy": "all", "ack_policy": "explicit", "replay_policy": "instant" },
            "delivered": place(delivered), "ack_floor": place(acknowledged),
            "num_ack_pending": delivered - acknowledged, "num_redelivered": 0, "num_waiting": 0, "num_pending": pending,
        }))
        .unwrap()
    }

    #[test]
    fn only_who_asks_in_vain_for_long_while_deliveries_wait_stands_still() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut moved = Movement::new();
        assert_eq!(moved.standstill(&info(5, 5, 9), true, at(0)), None, "the first look knows nothing");
        assert_eq!(moved.standstill(&info(5, 5, 9), true, at(9)), None, "not for long");
        assert_eq!(moved.standstill(&info(5, 5, 9), true, at(12)), Some(Duration::from_secs(12)));
        assert_eq!(moved.standstill(&info(5, 5, 9), true, at(60)), Some(Duration::from_secs(60)), "and it lasts");
        assert_eq!(moved.standstill(&info(6, 5, 8), true, at(61)), None, "a delivery is a movement");
        assert_eq!(moved.standstill(&info(6, 6, 8), true, at(71)), None, "so is an ack");
        assert_eq!(moved.standstill(&info(6, 6, 8), false, at(90)), None, "a worker that is busy asks for nothing");
        assert_eq!(moved.standstill(&info(6, 6, 8), true, at(99)), None, "and begins anew");
        assert_eq!(moved.standstill(&info(6, 6, 0), true, at(200)), None, "nothing waits");
    }
}
