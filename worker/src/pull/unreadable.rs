//! Messages that the client library cannot read.
//!
//! Such a message ends the connection on which it comes, or the client ([`shared::hostile`]). Nothing tells which message
//! it was. So after a connection that was lost, a worker fetches what the consumer has given out and not seen
//! acknowledged, one message at a time and unparsed. One that cannot be read becomes a dead letter with its raw bytes. It
//! is then acknowledged in the worker's name, so that no worker meets it again.

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

/// Finds unreadable messages, in one session after another.
#[derive(Debug, Default)]
pub struct UnreadableScan {
    /// Every message up to this sequence is readable, or a dead letter whose ack was confirmed. 0 after a scan that found
    /// nothing, because the stream's files may have gone back in time since.
    done: u64,
}

impl UnreadableScan {
    /// Makes dead letters of what cannot be read among the messages that the consumer has given out.
    ///
    /// # Errors
    /// NATS gives no answer. Messages that were found are dead letters; the others are looked at after the next loss.
    pub async fn bury(&mut self, stream: &Stream, session: &Session, database: &Database) -> anyhow::Result<()> {
        let consumer = stream.consumer_info(CONSUMER).await?;
        let info = stream.get_info().await?;
        let (floor, delivered) = (consumer.ack_floor.stream_sequence, consumer.delivered.stream_sequence);
        if info.state.last_sequence < self.done {
            self.done = 0;
        }
        let name = &info.config.name;
        let (mut next, last) = (floor.max(self.done) + 1, delivered.min(info.state.last_sequence));
        let (mut found, mut whole) = (false, true);
        while next <= last && !session.is_over() {
            // A stream may hold messages of others between deliveries.
            let message = StoredMessage::first(session.context(), name, SUBJECTS, next).await?;
            let Some(message) = message.filter(|message| message.sequence <= last) else { break };
            if let Some(letter) = unreadable_letter(&message) {
                found = true;
                whole &= set_apart(letter, message.stored_at, name, session, database).await;
            }
            if whole {
                self.done = message.sequence;
            }
            next = message.sequence + 1;
        }
        if !found && !session.is_over() {
            self.done = 0;
        }
        Ok(())
    }
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
