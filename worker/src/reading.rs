//! Reading the stream in place, for `worker replay` and `worker audit`: an ordered consumer of the command's own, which
//! the server forgets afterwards. Nothing is published, acknowledged or moved, so workers go on beside it.
//!
//! What a [`Span`] reads is fixed when it is opened: what the gateway adds afterwards is the workers' and not read.
//! Times are the stream's, the time at which JetStream stored a message: the server can seek to those. A delivery that
//! the gateway received at T is on the stream at T or later, never earlier, so "since T" holds all received since T.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::{Ordered, OrderedConfig};
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use async_nats::jetstream::{self, Message};
use futures_util::{FutureExt as _, StreamExt as _};
use shared::delivery::{DELIVERY_ID, Delivery, DeliveryId, Resource};
use shared::stream::SUBJECT_PREFIX;
use time::OffsetDateTime;

use crate::store::Origin;

/// Most bytes in one pull and in one batch. Above the largest message that the servers here take.
const BATCH_BYTES: usize = 32 << 20;
/// How many messages are asked for ahead.
const AHEAD: i64 = 1_000;
/// How long a batch that has begun waits for more.
const FILL_WITHIN: Duration = Duration::from_millis(20);
/// After this long without a message it is asked whether there are any more.
const ASK_AFTER: Duration = Duration::from_secs(2);

/// Where reading begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// At the oldest message that the stream has.
    Oldest,
    /// At this sequence, or the first after it.
    Sequence(u64),
    /// At the first message that the stream stored at this time or later.
    Time(OffsetDateTime),
}

/// Where reading ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// At what was the newest message when reading began.
    Newest,
    /// After this sequence.
    Sequence(u64),
    /// Before the first message that the stream stored at this time or later.
    Time(OffsetDateTime),
}

/// What is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// From here,
    pub from: From,
    /// to there,
    pub until: Until,
    /// of this resource alone, or of all.
    pub resource: Option<Resource>,
}

/// One message of the stream.
#[derive(Debug, Clone)]
pub struct Entry {
    message: async_nats::Message,
    /// Its place in the stream.
    pub sequence: u64,
    /// When the stream stored it.
    pub stored_at: OffsetDateTime,
}

impl Entry {
    /// The delivery in it.
    pub fn delivery(&self) -> Delivery {
        Delivery::from_message(&self.message, self.sequence, self.stored_at)
    }

    /// The id in its header; none in a message that somebody else put on the stream.
    pub fn id_in_header(&self) -> Option<DeliveryId> {
        DeliveryId::parse(self.message.headers.as_ref()?.get(DELIVERY_ID)?.as_str())
    }

    /// The delivery's id, without the rest of it.
    pub fn id(&self) -> DeliveryId {
        self.id_in_header().unwrap_or_else(|| DeliveryId::of_foreign_message(self.sequence, &self.message.payload))
    }

    /// The delivery's body, byte for byte. Empty where only headers are read.
    pub fn body(&self) -> &[u8] {
        &self.message.payload
    }

    /// The message as a dead letter keeps it. It was read once, by us.
    pub fn origin(&self) -> Origin {
        Origin {
            subject: self.message.subject.to_string(),
            headers: self.message.headers.clone().unwrap_or_default(),
            body: self.message.payload.clone(),
            attempts: 1,
        }
    }
}

/// A span of the stream being read.
pub struct Reading {
    stream: Stream,
    subject: String,
    messages: Ordered,
    /// How many messages there are to read, as the server counted them at the beginning.
    pub total: u64,
    last: u64,
    before: Option<OffsetDateTime>,
    /// The lowest sequence that was not given out yet.
    next: u64,
    ended: bool,
}

impl Reading {
    /// Begins to read `span` of the stream called `name`. With `headers_only` the bodies stay where they are.
    ///
    /// # Errors
    /// Where there is no such stream, or NATS does not answer.
    pub async fn open(
        context: &jetstream::Context,
        name: &str,
        span: &Span,
        headers_only: bool,
    ) -> anyhow::Result<Reading> {
        let stream = context.get_stream(name).await.with_context(|| format!("cannot look at stream {name}"))?;
        let state = &stream.cached_info().state;
        let (newest, newest_at) = (state.last_sequence, state.last_timestamp);
        let subject = match &span.resource {
            Some(resource) => format!("{SUBJECT_PREFIX}.{}", resource.as_str()),
            None => format!("{SUBJECT_PREFIX}.*"),
        };
        let config = |deliver_policy| OrderedConfig {
            filter_subject: subject.clone(),
            deliver_policy,
            headers_only,
            max_batch: AHEAD,
            max_bytes: i64::try_from(BATCH_BYTES).expect("32 MiB"),
            ..OrderedConfig::default()
        };
        let from = match span.from {
            From::Oldest => DeliverPolicy::All,
            From::Sequence(first) => DeliverPolicy::ByStartSequence { start_sequence: first.max(1) },
            From::Time(start_time) => DeliverPolicy::ByStartTime { start_time },
        };
        let beyond = match span.until {
            Until::Sequence(last) if last < newest => Some(DeliverPolicy::ByStartSequence { start_sequence: last + 1 }),
            Until::Time(start_time) if start_time <= newest_at => Some(DeliverPolicy::ByStartTime { start_time }),
            Until::Newest | Until::Sequence(_) | Until::Time(_) => None,
        };
        let unread = match beyond {
            Some(beyond) => {
                let probe = stream.create_consumer(config(beyond)).await.context("cannot read the stream")?;
                let info = probe.cached_info();
                // Best effort: the server forgets it by itself, only later.
                let _ = stream.delete_consumer(&info.name).await;
                info.num_pending
            }
            None => 0,
        };
        let consumer = stream.create_consumer(config(from)).await.context("cannot read the stream")?;
        // Given a time after its newest message, the server begins with the oldest.
        let none = matches!(span.from, From::Time(since) if since > newest_at);
        let total = if none { 0 } else { consumer.cached_info().num_pending.saturating_sub(unread) };
        let last = match span.until {
            Until::Sequence(last) => last.min(newest),
            Until::Newest | Until::Time(_) => newest,
        };
        let before = match span.until {
            Until::Time(before) => Some(before),
            Until::Newest | Until::Sequence(_) => None,
        };
        let next = match span.from {
            From::Sequence(first) => first,
            From::Oldest | From::Time(_) => 1,
        };
        let messages = consumer.messages().await.context("cannot read the stream")?;
        Ok(Reading { stream, subject, messages, total, last, before, next, ended: total == 0 })
    }

    /// The next messages, in their order: at most `most`, and not much more than 32 MiB. None at the end. NATS away is
    /// waited for.
    ///
    /// # Errors
    /// Where the stream can no longer be read: it was deleted, say.
    pub async fn batch(&mut self, most: usize) -> anyhow::Result<Option<Vec<Entry>>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while !self.ended && batch.len() < most && bytes < BATCH_BYTES {
            let patience = if batch.is_empty() { ASK_AFTER } else { FILL_WITHIN };
            let message = match self.messages.next().now_or_never() {
                Some(message) => message,
                None => match tokio::time::timeout(patience, self.messages.next()).await {
                    Ok(message) => message,
                    Err(_) if !batch.is_empty() => break,
                    Err(_) => {
                        self.ended = !self.has_more().await;
                        continue;
                    }
                },
            };
            let message = message.context("reading the stream ended too early")?.context("cannot read the stream")?;
            let entry = self.entry(message)?;
            batch.extend(entry.inspect(|entry| bytes += entry.message.length));
        }
        Ok(if batch.is_empty() { None } else { Some(batch) })
    }

    /// `message`, where it still belongs to the span.
    fn entry(&mut self, message: Message) -> anyhow::Result<Option<Entry>> {
        let info = message.info().map_err(|error| anyhow::anyhow!("a message without its place: {error}"))?;
        let (sequence, stored_at) = (info.stream_sequence, info.published);
        self.ended = info.pending == 0 || sequence >= self.last;
        self.next = sequence + 1;
        if sequence > self.last || self.before.is_some_and(|before| stored_at >= before) {
            self.ended = true;
            return Ok(None);
        }
        Ok(Some(Entry { message: message.message, sequence, stored_at }))
    }

    /// Whether the stream still has a message of the span that was not read: what was to come may have been purged.
    async fn has_more(&self) -> bool {
        match self.stream.get_first_raw_message_by_subject(&self.subject, self.next).await {
            Ok(message) => message.sequence <= self.last,
            Err(error) => error.kind() != LastRawMessageErrorKind::NoMessageFound, // else NATS is away: wait
        }
    }

    /// The id of `entry`. Where only the body tells it, in a message of somebody else's, the body is fetched.
    ///
    /// # Errors
    /// Where that cannot be fetched.
    pub async fn id(stream: &Stream, entry: &Entry) -> anyhow::Result<DeliveryId> {
        if let Some(id) = entry.id_in_header() {
            return Ok(id);
        }
        let sequence = entry.sequence;
        let whole = stream.get_raw_message(sequence).await;
        let whole = whole.with_context(|| format!("cannot fetch message {sequence} of the stream"))?;
        Ok(DeliveryId::of_foreign_message(sequence, &whole.payload))
    }

    /// The stream that is read.
    pub fn stream(&self) -> Stream {
        self.stream.clone()
    }
}
