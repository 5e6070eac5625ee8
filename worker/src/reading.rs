//! Reading the stream in place, for `worker replay` and `worker audit`: an ordered consumer of the command's own, which
//! the server forgets afterwards. Nothing is published, acknowledged or moved, so workers go on beside it.
//!
//! A message that the client library cannot read ends the connection ([`shared::hostile`]). So where nothing comes any
//! more, the next message is fetched unparsed. One that cannot be read is given out as what it is, and for a while each
//! message behind it is fetched singly, as such messages seldom come alone.
//!
//! What a [`Span`] reads is fixed when it is opened: what the gateway adds afterwards is the workers' and not read.
//! Times are the stream's, the time at which JetStream stored a message: the server can seek to those. A delivery that
//! the gateway received at T is on the stream at T or later, never earlier, so "since T" holds all received since T.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::pull::{Ordered, OrderedConfig};
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{ErrorCode, Message};
use futures_util::{FutureExt as _, StreamExt as _};
use shared::delivery::{Delivery, DeliveryId, Resource};
use shared::hostile::StoredMessage;
use shared::link::Link;
use shared::stream::{SUBJECT_PREFIX, SUBJECTS};
use time::OffsetDateTime;

use crate::dead_letters::DeadLetter;
use crate::pull::{Session, unreadable_letter};
use crate::read::{self, read_message};
use crate::store::Record;

/// Most bytes in one pull and in one batch. Above the largest message that the servers here take.
const BATCH_BYTES: usize = 32 << 20;
/// How many messages are asked for ahead.
const AHEAD: i64 = 1_000;
/// How long a batch that has begun waits for more.
const FILL_WITHIN: Duration = Duration::from_millis(20);
/// After this long without a message it is asked whether there are any more.
const ASK_AFTER: Duration = Duration::from_secs(2);
/// After so many vain beginnings messages are fetched singly, whatever they look like.
const BEGIN_AGAIN: u32 = 2;
/// Pause while NATS is away.
const AWAY: Duration = Duration::from_millis(200);
/// Longest wait for NATS. PostgreSQL has as long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Messages behind an unreadable one that are fetched singly.
const SINGLY: usize = 500;

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
    /// The dead letter that it is, where the client library cannot read it.
    unreadable: Option<Box<DeadLetter>>,
}

impl Entry {
    fn of(stored: &StoredMessage) -> Entry {
        let message = stored.to_message().unwrap_or_else(|_| stored.to_raw_message());
        let unreadable = unreadable_letter(stored).map(Box::new);
        Entry { message, sequence: stored.sequence, stored_at: stored.stored_at, unreadable }
    }

    /// When the gateway received the delivery.
    pub fn received_at(&self) -> OffsetDateTime {
        Delivery::from_message(&self.message, self.sequence, self.stored_at).received_at
    }

    /// The delivery's id.
    pub fn id(&self) -> DeliveryId {
        read::id(&self.message, self.sequence)
    }

    /// The delivery's body, byte for byte.
    pub fn body(&self) -> &[u8] {
        &self.message.payload
    }

    /// The row that the message is to become. It was read once, by us.
    ///
    /// # Errors
    /// The dead letter that it is.
    pub fn read(&self) -> Result<Record, Box<DeadLetter>> {
        match &self.unreadable {
            Some(letter) => Err(letter.clone()),
            None => read_message(&self.message, self.sequence, self.stored_at, 1),
        }
    }
}

/// A span of the stream being read.
pub struct Reading {
    link: &'static Link,
    stream: Stream,
    subject: String,
    /// None while messages are fetched singly.
    messages: Option<Ordered>,
    /// The connection on which `messages` began.
    session: Session,
    /// Messages that are still to be fetched singly.
    singly: usize,
    /// How many messages there are to read, as the server counted them at the beginning.
    pub total: u64,
    last: u64,
    before: Option<OffsetDateTime>,
    /// The lowest sequence that was not given out yet.
    next: u64,
    /// Times that reading was begun again since the last message.
    begun_again: u32,
    /// Time of the first failure to fetch a message, until one succeeds.
    away: Option<Instant>,
    ended: bool,
}

impl Reading {
    /// Begins to read `span` of the stream called `name`.
    ///
    /// # Errors
    /// Where there is no such stream, or NATS does not answer.
    pub async fn open(link: &'static Link, name: &str, span: &Span) -> anyhow::Result<Reading> {
        let session = Session::begin(link.current());
        let stream = session.context().get_stream(name).await;
        let stream = stream.with_context(|| format!("cannot look at stream {name}"))?;
        let state = &stream.cached_info().state;
        let (newest, newest_at) = (state.last_sequence, state.last_timestamp);
        let subject = match &span.resource {
            Some(resource) => format!("{SUBJECT_PREFIX}.{}", resource.as_str()),
            None => SUBJECTS.to_owned(),
        };
        let from = match span.from {
            From::Oldest => DeliverPolicy::All,
            From::Sequence(first) => from_sequence(first),
            From::Time(start_time) => DeliverPolicy::ByStartTime { start_time },
        };
        let beyond = match span.until {
            Until::Sequence(last) if last < newest => Some(from_sequence(last + 1)),
            Until::Time(start_time) if start_time <= newest_at => Some(DeliverPolicy::ByStartTime { start_time }),
            Until::Newest | Until::Sequence(_) | Until::Time(_) => None,
        };
        let count = async |policy| {
            let probe = stream.create_consumer(config(&subject, policy)).await;
            let probe = probe.context("cannot read the stream")?;
            let info = probe.cached_info();
            // Best effort: the server forgets it by itself, only later.
            let _ = stream.delete_consumer(&info.name).await;
            anyhow::Ok(info.num_pending)
        };
        let unread = match beyond {
            Some(beyond) => count(beyond).await?,
            None => 0,
        };
        // Given a time after its newest message, the server begins with the oldest.
        let none = matches!(span.from, From::Time(since) if since > newest_at);
        let consumer = stream.create_consumer(config(&subject, from)).await;
        let consumer = consumer.context("cannot read the stream")?;
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
            // The server has found the first message of that time.
            From::Time(_) => consumer.cached_info().delivered.stream_sequence + 1,
            From::Oldest => 1,
        };
        let messages = Some(consumer.messages().await.context("cannot read the stream")?);
        let (singly, begun_again, away, ended) = (0, 0, None, total == 0);
        Ok(Reading {
            link,
            stream,
            subject,
            messages,
            session,
            singly,
            total,
            last,
            before,
            next,
            begun_again,
            away,
            ended,
        })
    }

    /// The next messages, in their order: at most `most`, and not much more than 32 MiB. None at the end. A short outage of
    /// NATS is waited for.
    ///
    /// # Errors
    /// Where the stream can no longer be read: it was deleted, say, or NATS is away for longer than [`PATIENCE`].
    pub async fn batch(&mut self, most: usize) -> anyhow::Result<Option<Vec<Entry>>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while !self.ended && batch.len() < most && bytes < BATCH_BYTES {
            let patience = if batch.is_empty() { ASK_AFTER } else { FILL_WITHIN };
            let entry = match &mut self.messages {
                None => self.fetch_next().await?,
                Some(messages) => {
                    let message = match messages.next().now_or_never() {
                        Some(message) => Some(message),
                        None => tokio::select! {
                            message = tokio::time::timeout(patience, messages.next()) => message.ok(),
                            // The library would begin again at once, with a consumer each time, and meet the same message.
                            () = self.session.over() => Some(None),
                        },
                    };
                    match message {
                        Some(Some(Ok(message))) => self.entry(message).await?,
                        None if !batch.is_empty() => break,
                        // Silence, an error or the end: the client may have met what it cannot read.
                        None | Some(None | Some(Err(_))) => self.fetch_next().await?,
                    }
                }
            };
            batch.extend(entry.inspect(|entry| bytes += entry.message.length));
        }
        Ok(if batch.is_empty() { None } else { Some(batch) })
    }

    /// `message`, where it still belongs to the span.
    async fn entry(&mut self, message: Message) -> anyhow::Result<Option<Entry>> {
        let info = message.info().map_err(|error| anyhow::anyhow!("a message without its place: {error}"))?;
        let (sequence, stored_at) = (info.stream_sequence, info.published);
        if sequence < self.next {
            // The library began again too early, with what was given out or is before the span.
            return self.fetch_next().await;
        }
        self.ended = info.pending == 0;
        let entry = Entry { message: message.message, sequence, stored_at, unreadable: None };
        Ok(self.within(entry))
    }

    /// `entry`, where it still belongs to the span.
    fn within(&mut self, entry: Entry) -> Option<Entry> {
        (self.next, self.begun_again) = (entry.sequence + 1, 0);
        self.ended |= entry.sequence >= self.last;
        if entry.sequence > self.last || self.before.is_some_and(|before| entry.stored_at >= before) {
            self.ended = true;
            return None;
        }
        Some(entry)
    }

    /// Fetches the next message by itself, whatever its headers. Goes back to reading many at once where there is nothing
    /// to be afraid of any more. None where there is no message to give out now: at the end, or while NATS is away.
    async fn fetch_next(&mut self) -> anyhow::Result<Option<Entry>> {
        // It would ask for messages beside this, and may meet the next unreadable one.
        self.messages = None;
        let linked = self.link.current();
        let name = &self.stream.cached_info().config.name;
        let message = match StoredMessage::first(&linked.context, name, &self.subject, self.next).await {
            Ok(Some(message)) => {
                self.away = None;
                message
            }
            Ok(None) => {
                self.ended = true; // what was to come may have been purged
                return Ok(None);
            }
            Err(error) => {
                let get = format!("$JS.API.STREAM.MSG.GET.{name}");
                if linked.is_denied(&get) {
                    return Err(error).context("cannot fetch the next message by itself");
                }
                // NATS is away, and waited for; a stream that is gone is not.
                if let Err(error) = linked.context.get_stream(name).await
                    && is_final(&error)
                {
                    return Err(error).context("reading the stream ended too early");
                }
                let since = *self.away.get_or_insert_with(|| {
                    tracing::warn!("will try again: NATS does not give the next message: {error}");
                    Instant::now()
                });
                if since.elapsed() >= PATIENCE {
                    let words = format!("NATS has not given the next message for {} s", PATIENCE.as_secs());
                    return Err(error).context(words);
                }
                tokio::time::sleep(AWAY).await;
                return Ok(None);
            }
        };
        let entry = Entry::of(&message);
        if entry.unreadable.is_some() || self.begun_again >= BEGIN_AGAIN {
            self.singly = SINGLY;
        }
        if self.singly == 0 {
            // It can be read, and was only late, or belongs to another client now.
            self.open_again().await;
            return Ok(None);
        }
        self.singly -= 1;
        Ok(self.within(entry))
    }

    /// Reads many at once again, from the next message on. Without an answer of NATS there is nothing to read from until
    /// the next try.
    async fn open_again(&mut self) {
        self.begun_again += 1;
        let linked = self.link.current();
        self.session = Session::begin(linked.clone());
        let name = &self.stream.cached_info().config.name;
        let open = async {
            let stream = linked.context.get_stream(name).await?;
            let config = config(&self.subject, from_sequence(self.next));
            anyhow::Ok((stream.create_consumer(config).await?.messages().await?, stream))
        };
        match open.await {
            Ok((messages, stream)) => (self.messages, self.stream) = (Some(messages), stream),
            Err(_) => tokio::time::sleep(AWAY).await,
        }
    }
}

/// The consumer by which a command reads the stream. The server forgets it afterwards.
fn config(subject: &str, deliver_policy: DeliverPolicy) -> OrderedConfig {
    OrderedConfig {
        filter_subject: subject.to_owned(),
        deliver_policy,
        max_batch: AHEAD,
        max_bytes: i64::try_from(BATCH_BYTES).expect("32 MiB"),
        ..OrderedConfig::default()
    }
}

fn from_sequence(first: u64) -> DeliverPolicy {
    DeliverPolicy::ByStartSequence { start_sequence: first.max(1) }
}

/// Returns `true` for an error that waiting does not mend: the stream is gone.
fn is_final(error: &GetStreamError) -> bool {
    matches!(error.kind(), GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}
