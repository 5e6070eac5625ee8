//! Messages that the client library cannot read.
//!
//! Such a message ends the connection on which it comes, or the client ([`shared::hostile`]). Nothing tells which message
//! it was. So after a connection that was lost, a worker fetches what the consumer has given out and not seen
//! acknowledged, one message at a time and unparsed. One that cannot be read becomes a dead letter with its raw bytes. It
//! is then acknowledged in the worker's name, so that no worker meets it again.

use std::ops::RangeInclusive;

use async_nats::jetstream::stream::Stream;
use shared::hostile::StoredMessage;
use shared::stream::{CONSUMER, SUBJECTS};
use time::OffsetDateTime;
use tokio::time::{Duration, timeout};

use super::database::Database;
use super::session::Session;
use crate::dead_letters::DeadLetter;
use crate::read;
use crate::store::{Batch, tell};

/// Longest wait for the server to confirm an ack.
const ACK_WITHIN: Duration = Duration::from_secs(1);

/// The newest messages, by sequence, that are looked at before a session pulls. The one that ended the connection before is
/// among them, unless it was given out long ago: see [`UnreadableScan::bury_rest`].
const RECENT: u64 = 16_384;

/// A message by which the stream is known again: its sequence, and when the stream stored it.
type Place = (u64, OffsetDateTime);

/// Finds unreadable messages, in one session after another.
#[derive(Debug, Default)]
pub struct UnreadableScan {
    /// Every message up to this one is readable, or a dead letter whose ack was confirmed.
    done: Option<Place>,
}

/// Older messages that are still to be looked at.
#[derive(Debug)]
pub struct Rest {
    span: RangeInclusive<u64>,
    /// The newest message of those behind the span that are done.
    behind: Option<Place>,
}

impl UnreadableScan {
    /// Makes dead letters of what cannot be read among the newest messages that the consumer has given out. Returns the
    /// older ones, where there are any.
    ///
    /// # Errors
    /// NATS gives no answer. Messages that were found are dead letters; the others are looked at after the next loss.
    pub async fn bury_recent(
        &mut self,
        stream: &Stream,
        session: &Session,
        database: &Database,
    ) -> anyhow::Result<Option<Rest>> {
        let consumer = stream.consumer_info(CONSUMER).await?;
        let info = stream.get_info().await?;
        let name = &info.config.name;
        if let Some((sequence, stored_at)) = self.done {
            // The stream's files may have gone back in time since.
            let message = StoredMessage::at(session.context(), name, sequence).await?;
            self.done = message.filter(|message| message.stored_at == stored_at).and(self.done);
        }
        let done = self.done.map_or(0, |(sequence, _)| sequence);
        let first = consumer.ack_floor.stream_sequence.max(done) + 1;
        let last = consumer.delivered.stream_sequence.min(info.state.last_sequence);
        let recent = first.max((last + 1).saturating_sub(RECENT));
        let mut behind = self.done;
        bury(recent..=last, &mut behind, name, session, database).await?;
        if first < recent {
            return Ok(Some(Rest { span: first..=recent - 1, behind }));
        }
        self.done = behind;
        Ok(None)
    }

    /// The same for older messages. There may be millions, behind a delivery that waits un-acked. So sessions pull
    /// meanwhile. Where the session ends first, the next scan goes on.
    ///
    /// # Errors
    /// As [`UnreadableScan::bury_recent`].
    pub async fn bury_rest(
        &mut self,
        rest: Rest,
        stream: &Stream,
        session: &Session,
        database: &Database,
    ) -> anyhow::Result<()> {
        let name = &stream.cached_info().config.name;
        if bury(rest.span, &mut self.done, name, session, database).await? {
            self.done = self.done.max(rest.behind);
        }
        Ok(())
    }
}

/// Looks at the messages of `span`, and moves `done` on to the last before which all are done. Returns `true` when all are.
async fn bury(
    span: RangeInclusive<u64>,
    done: &mut Option<Place>,
    stream: &str,
    session: &Session,
    database: &Database,
) -> anyhow::Result<bool> {
    let (mut next, last) = span.into_inner();
    let mut whole = true;
    while next <= last {
        if session.is_over() {
            return Ok(false);
        }
        // A stream may hold messages of others between deliveries.
        let message = StoredMessage::first(session.context(), stream, SUBJECTS, next).await?;
        let Some(message) = message.filter(|message| message.sequence <= last) else { break };
        if let Some(letter) = unreadable_letter(&message) {
            whole &= set_apart(letter, message.stored_at, stream, session, database).await;
        }
        if whole {
            *done = Some((message.sequence, message.stored_at));
        }
        next = message.sequence + 1;
    }
    Ok(whole)
}

/// Stores a dead letter and acknowledges its message. Returns `true` when the server has confirmed the ack.
async fn set_apart(
    letter: DeadLetter,
    stored_at: OffsetDateTime,
    stream: &str,
    session: &Session,
    database: &Database,
) -> bool {
    let sequence = letter.stream_sequence;
    let batch = Batch { records: vec![], dead_letters: vec![letter] };
    let Some(stored) = database.persist(&batch, || !session.is_over(), || std::future::ready(false)).await else {
        return false;
    };
    if !stored.dead.is_empty() {
        database.metrics().unreadable();
    }
    tell(&stored, &batch);
    acknowledge(session, stream, sequence, stored_at).await
}

/// The dead letter of a message that cannot be read; `None` for any other.
pub fn unreadable_letter(message: &StoredMessage) -> Option<DeadLetter> {
    let why = message.to_message().err()?;
    let raw = message.to_raw_message();
    Some(DeadLetter {
        delivery_id: read::id(&raw, message.sequence).to_string(),
        stream_sequence: message.sequence,
        origin: read::origin(&raw, 1),
        reason: why.to_string(),
        failed_at: OffsetDateTime::now_utc(),
    })
}

/// Acknowledges a message that never arrived, by the reply subject that it would have had. The server goes by the
/// sequence in it (nats-server `consumer.go`, `processAckMsg`). Returns `true` when the server has confirmed the ack.
async fn acknowledge(session: &Session, stream: &str, sequence: u64, stored_at: OffsetDateTime) -> bool {
    let reply = format!("$JS.ACK.{stream}.{CONSUMER}.1.{sequence}.1.{}.0", stored_at.unix_timestamp_nanos());
    if session.is_over() {
        return false; // on another connection the sequence may be another message's: see `session`
    }
    let confirmed = timeout(ACK_WITHIN, session.client().request(reply, "+ACK".into())).await;
    matches!(confirmed, Ok(Ok(_)))
}
