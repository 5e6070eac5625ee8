//! A message read: the row it is to become, or the dead letter it is. The same for what is pulled, replayed and tried
//! again.
//!
//! Reading runs over bytes of strangers. A panic in it is isolated here, once for all callers: the message becomes a dead
//! letter, and no other suffers for it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use async_nats::Message;
use shared::delivery::{DELIVERY_ID, Delivery, DeliveryId};
use time::OffsetDateTime;

use crate::dead_letters::DeadLetter;
use crate::interpret::interpret;
use crate::payload::payload;
use crate::store::{Origin, Record};

/// Reads the message at `stream_sequence`, which the stream stored at `stored_at` and has delivered `attempts` times.
///
/// # Errors
/// The dead letter that the message is: its body is no JSON, or reading it made this program panic.
pub fn read_message(
    message: &Message,
    stream_sequence: u64,
    stored_at: OffsetDateTime,
    attempts: i64,
) -> Result<Record, Box<DeadLetter>> {
    let origin = origin(message, attempts);
    isolated(message, stream_sequence, &origin, || {
        let delivery = Delivery::from_message(message, stream_sequence, stored_at);
        read(&delivery, stream_sequence, origin.clone())
    })
}

/// The id of a message: its header's, or else one of its place and body.
pub fn id(message: &Message, stream_sequence: u64) -> DeliveryId {
    id_in_header(message).unwrap_or_else(|| DeliveryId::of_foreign_message(stream_sequence, &message.payload))
}

/// The id in a message's header; none in a message that another program put on the stream.
pub fn id_in_header(message: &Message) -> Option<DeliveryId> {
    DeliveryId::parse(message.headers.as_ref()?.get(DELIVERY_ID)?.as_str())
}

/// The message as a dead letter keeps it.
pub fn origin(message: &Message, attempts: i64) -> Origin {
    Origin {
        subject: message.subject.to_string(),
        headers: message.headers.clone().unwrap_or_default(),
        body: message.payload.clone(),
        attempts,
    }
}

/// The row that a delivery at `stream_sequence` is to become, by what its body says. `origin` is the message it came
/// in.
///
/// # Errors
/// The dead letter that it is, where the body is no JSON.
pub fn read(delivery: &Delivery, stream_sequence: u64, origin: Origin) -> Result<Record, Box<DeadLetter>> {
    let meaning = interpret(&delivery.body).and_then(|meaning| Ok((meaning, payload(&delivery.body)?.into_owned())));
    match meaning {
        Ok((meaning, payload)) => Ok(Record {
            signal_id: delivery.id.signal_id(),
            issue_id: delivery.id.issue_id(),
            delivery_id: delivery.id.to_string(),
            stream_sequence,
            resource: delivery.resource.as_str().to_owned(),
            received_at: delivery.received_at,
            severity: meaning.severity.as_str(),
            priority: meaning.severity.priority(),
            kind: meaning.kind,
            title: meaning.title,
            source_id: meaning.source_id,
            payload,
            origin,
        }),
        Err(not_json) => Err(Box::new(DeadLetter {
            delivery_id: delivery.id.to_string(),
            stream_sequence,
            origin,
            reason: format!("the body is {not_json}"),
            failed_at: OffsetDateTime::now_utc(),
        })),
    }
}

/// Runs `read`. A message that makes it panic is a dead letter.
fn isolated(
    message: &Message,
    stream_sequence: u64,
    origin: &Origin,
    read: impl FnOnce() -> Result<Record, Box<DeadLetter>>,
) -> Result<Record, Box<DeadLetter>> {
    // Unwind safety: reading is a pure function of the message, so there is no state that it could leave half done.
    let read = catch_unwind(AssertUnwindSafe(read));
    read.unwrap_or_else(|_| {
        Err(Box::new(DeadLetter {
            delivery_id: id(message, stream_sequence).to_string(),
            stream_sequence,
            origin: origin.clone(),
            reason: "reading it made this program panic, which is a fault of the program; its log says where"
                .to_owned(),
            failed_at: OffsetDateTime::now_utc(),
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(body: &'static str) -> Message {
        Message {
            subject: "signals.sentry.issue".into(),
            reply: None,
            payload: bytes::Bytes::from_static(body.as_bytes()),
            headers: None,
            status: None,
            description: None,
            length: body.len(),
        }
    }

    #[test]
    fn a_panic_is_the_dead_letter_of_one_message() {
        let message = message(r#"{"a":1}"#);
        let letter = isolated(&message, 7, &origin(&message, 3), || panic!("a panic that is meant")).unwrap_err();
        assert_eq!((letter.stream_sequence, letter.origin.attempts), (7, 3));
        assert_eq!(&letter.origin.body[..], br#"{"a":1}"#);
        assert!(letter.reason.contains("panic") && !letter.reason.contains("meant"), "{}", letter.reason);
        // Its identity is that which reading it would have given it.
        let record = read_message(&message, 7, OffsetDateTime::UNIX_EPOCH, 1).unwrap();
        assert_eq!(letter.delivery_id, record.delivery_id);
    }

    #[test]
    fn a_body_that_is_no_json_is_a_dead_letter() {
        let letter = read_message(&message("no JSON"), 2, OffsetDateTime::UNIX_EPOCH, 1).unwrap_err();
        assert_eq!(letter.stream_sequence, 2);
    }
}
