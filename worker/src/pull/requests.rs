//! Asking the consumer for batches: as many messages as there is room for, and only when there is room.
//!
//! The client library's own stream asks ahead, and holds messages that nobody works on yet. Here nothing is prefetched:
//! what was delivered is one batch in the hands of its puller, which can keep it alive, hand it back and bound its
//! memory. A request is one-shot (`no_wait` with `expires`): the server answers it as soon as there is anything, with
//! all there is up to the limits. So an idle worker gets one message at once, and one that is behind gets full batches.
//! (<https://docs.nats.io/reference/reference-protocols/nats_api_reference>, "Fetch From a Consumer")

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::pull::BatchConfig;
use async_nats::jetstream::consumer::{Config, PullConsumer};
use async_nats::jetstream::{Context, Message};
use async_nats::{StatusCode, Subject, Subscriber};
use futures_util::StreamExt as _;
use tokio::time::{sleep, timeout};

use super::pulled::Pulled;
use super::session::Session;
use crate::metrics::Metrics;

/// Most bytes of messages in one batch, so that memory stays bounded when bodies are large.
const BATCH_BYTES: usize = 16 << 20;
/// How long the server keeps a request when there is nothing to answer it with; a stop waits for as long.
const EXPIRES: Duration = Duration::from_secs(1);
/// How much later than that its word may come. A request that got none (its server died, say) is made again.
const LATE: Duration = Duration::from_secs(2);
/// A request that was answered with nothing sooner than this was refused for now: others are waiting for the same
/// few messages, or too many are un-acked.
const REFUSED: Duration = Duration::from_millis(500);
/// How long to leave the server alone then.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// Why a consumer can no longer be asked. Looking at it again, and making it where it is gone, is right for each.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    /// Nobody hears requests: the consumer or its stream is not there, or JetStream is not.
    #[error("the consumer does not answer")]
    NoAnswer,
    /// The server says that it ended.
    #[error("the server ended it: {0}")]
    Ended(String),
    /// The client has gone.
    #[error("cannot ask for messages: {0}")]
    Client(String),
}

/// The limits of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    messages: usize,
    bytes: usize,
    expires: Duration,
}

impl Limits {
    /// As much as a batch may hold, and no more than the consumer allows in one request: it refuses a larger one at once.
    fn of(consumer: &Config, batch_max: usize) -> Limits {
        let within = |own: usize, limit: i64| match usize::try_from(limit) {
            Ok(limit) if limit > 0 => own.min(limit),
            _ => own, // no limit is written as 0
        };
        let expires = if consumer.max_expires.is_zero() { EXPIRES } else { EXPIRES.min(consumer.max_expires) };
        Limits {
            messages: within(batch_max, consumer.max_batch),
            bytes: within(BATCH_BYTES, consumer.max_bytes),
            expires,
        }
    }
}

/// A puller's requests, one at a time.
pub(super) struct Requests {
    consumer: PullConsumer,
    context: Context,
    metrics: Metrics,
    /// Everything that is answered comes here; each request has a subject of its own in it, so that a word on an older
    /// one is not taken for the present one's.
    inbox: Subscriber,
    prefix: String,
    asked: u64,
    /// The present request may still be answered.
    pending: bool,
    limits: Limits,
    /// What has been delivered and not been returned yet. Here, so that a call of `next` that is dropped loses nothing.
    arrived: Vec<Pulled>,
    /// The next message alone is larger than a batch may be.
    oversized: bool,
}

impl Requests {
    pub(super) async fn open(
        session: &Session,
        consumer: PullConsumer,
        batch_max: usize,
        metrics: &Metrics,
    ) -> Result<Requests, Lost> {
        let (client, context, metrics) = (session.client(), session.context().clone(), metrics.clone());
        let prefix = client.new_inbox();
        let inbox = client.subscribe(format!("{prefix}.*")).await.map_err(|error| Lost::Client(error.to_string()))?;
        let limits = Limits::of(&consumer.cached_info().config, batch_max);
        let (asked, pending, arrived, oversized) = (0, false, vec![], false);
        Ok(Requests { consumer, context, metrics, inbox, prefix, asked, pending, limits, arrived, oversized })
    }

    /// Waits for messages, and gives all there are, up to a batch: never none. May be dropped at any time.
    pub(super) async fn next(&mut self) -> Result<Vec<Pulled>, Lost> {
        loop {
            let asked_at = Instant::now();
            self.ask().await?;
            let answered = timeout(self.limits.expires + LATE, self.gather()).await;
            self.pending = false;
            // What came before a loss is worth storing; the loss will be there again.
            if !self.arrived.is_empty() {
                return Ok(std::mem::take(&mut self.arrived));
            }
            if let Ok(Err(lost)) = answered {
                return Err(lost);
            }
            if asked_at.elapsed() < REFUSED && !self.oversized {
                sleep(REFUSED_PAUSE).await;
            }
        }
    }

    /// Asks no more; gives what was delivered in the meantime.
    ///
    /// The present request is left to end by itself. An inbox that is given up before, drained or not, may lose what was
    /// just sent to it, which then waits for the ack wait to pass: JetStream does not see at once that nobody listens any
    /// more (<https://github.com/nats-io/nats.go/issues/898>), and async-nats 0.51 forgets a drained subscription before
    /// the server has answered.
    pub(super) async fn close(mut self) -> Vec<Pulled> {
        if self.pending {
            let _ = timeout(self.limits.expires + LATE, self.gather()).await;
        }
        self.arrived
    }

    async fn ask(&mut self) -> Result<(), Lost> {
        self.asked += 1;
        let oversized = std::mem::take(&mut self.oversized);
        let request = BatchConfig {
            batch: if oversized { 1 } else { self.limits.messages },
            max_bytes: if oversized { 0 } else { self.limits.bytes }, // 0: whatever it has
            expires: Some(self.limits.expires),
            no_wait: true,
            ..BatchConfig::default()
        };
        let answers = Subject::from(self.subject());
        self.consumer.request_batch(request, answers).await.map_err(|error| Lost::Client(error.to_string()))?;
        self.pending = true;
        Ok(())
    }

    fn subject(&self) -> String {
        format!("{}.{}", self.prefix, self.asked)
    }

    /// Collects until the present request is answered in full.
    async fn gather(&mut self) -> Result<(), Lost> {
        let present = self.subject();
        while self.arrived.len() < self.limits.messages {
            let message = self.inbox.next().await.ok_or_else(|| Lost::Client("it has stopped".into()))?;
            // A message of the stream bears the stream's subject, whatever its headers say; the server's word on a request
            // comes to the request's own subject. Anything else was sent here by another program.
            if !message.subject.starts_with(&self.prefix) {
                match Pulled::of(Message { message, context: self.context.clone() }) {
                    Some(pulled) if pulled.is_delivery() => self.arrived.push(pulled),
                    Some(other) => {
                        // The consumer has no filter, and its stream has just been given more subjects.
                        self.metrics.ignored();
                        let _ = other.message.ack().await; // the consumer is the workers' alone
                    }
                    None => self.metrics.ignored(),
                }
                continue;
            }
            let Some(status) = message.status else {
                self.metrics.ignored();
                continue;
            };
            if message.subject.as_str() != present {
                continue;
            }
            let words = message.description.as_deref().unwrap_or_default();
            match status {
                StatusCode::IDLE_HEARTBEAT => {}
                // No more messages now, or none for as long as the request may wait.
                StatusCode::NOT_FOUND | StatusCode::TIMEOUT => return Ok(()),
                StatusCode::NO_RESPONDERS => return Err(Lost::NoAnswer),
                StatusCode::REQUEST_TERMINATED => return self.terminated(words),
                other => return Err(Lost::Ended(format!("{other} {words}"))),
            }
        }
        Ok(())
    }

    /// 409: what it means stands only in its words (nats-server `consumer.go`).
    fn terminated(&mut self, words: &str) -> Result<(), Lost> {
        let said = |what: &str| words.to_ascii_lowercase().contains(what);
        if said("message size exceeds") {
            self.oversized = self.arrived.is_empty();
            Ok(())
        } else if said("batch completed") || said("maxackpending") || said("maxwaiting") {
            Ok(())
        } else {
            Err(Lost::Ended(words.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_asks_for_no_more_than_the_consumer_allows() {
        let none = Limits { messages: 256, bytes: BATCH_BYTES, expires: EXPIRES };
        assert_eq!(Limits::of(&Config::default(), 256), none);
        let wide = Config { max_batch: 1_000, max_bytes: 1 << 40, max_expires: EXPIRES * 2, ..Config::default() };
        assert_eq!(Limits::of(&wide, 256), none);
        let expires = Duration::from_millis(5);
        let narrow = Config { max_batch: 10, max_bytes: 1_000, max_expires: expires, ..Config::default() };
        assert_eq!(Limits::of(&narrow, 256), Limits { messages: 10, bytes: 1_000, expires });
    }
}
