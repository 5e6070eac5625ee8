//! A message read: the row it is to become, or the dead letter it is. The same for what is pulled, replayed and tried
//! again.

use shared::delivery::Delivery;
use time::OffsetDateTime;

use crate::dead_letters::DeadLetter;
use crate::interpret::interpret;
use crate::payload::payload;
use crate::store::{Origin, Record};

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
