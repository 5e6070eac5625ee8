//! Deliveries that cannot become a row. Nothing of them is lost: `ingest.dead_letters` keeps the message as it came,
//! with the reason, and the ledger keeps its id, so that a redelivery changes nothing.

pub(crate) mod command;
mod letters;

use async_nats::HeaderMap;
use serde_json::{Map, Value};
use time::OffsetDateTime;
use tokio_postgres::types::{ToSql, Type};

use crate::store::{DEAD_LETTERS, JsonText, Origin, Record, Statement, StoreError, Tx, bigint};

/// Writes dead letters whose ledger rows were claimed in this transaction: one each time. A letter is there already where
/// the ledger was lost and the letters were not. It is kept as it is.
const BURY: Statement = Statement::new(
    "\
    INSERT INTO ingest.dead_letters
        (delivery_id, stream_sequence, subject, headers, body, reason, attempts, failed_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
    ON CONFLICT (delivery_id) DO NOTHING",
    &[Type::TEXT, Type::INT8, Type::TEXT, Type::JSONB, Type::BYTEA, Type::TEXT, Type::INT4, Type::TIMESTAMPTZ],
);

/// A delivery that cannot become a row.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// The identity: the ledger's key.
    pub delivery_id: String,
    /// Its place in the stream.
    pub stream_sequence: u64,
    /// The message as it came.
    pub origin: Origin,
    /// Why, for a person, without anything of what it says.
    pub reason: String,
    /// When that was found out.
    pub failed_at: OffsetDateTime,
}

impl DeadLetter {
    /// A record that PostgreSQL has refused just now.
    pub(crate) fn of(record: &Record, reason: String) -> DeadLetter {
        DeadLetter {
            delivery_id: record.delivery_id.clone(),
            stream_sequence: record.stream_sequence,
            origin: record.origin.clone(),
            reason,
            failed_at: OffsetDateTime::now_utc(),
        }
    }
}

/// Writes `letters`, which are fresh. One at a time: they are few, and each may be 8 MiB.
pub(crate) async fn bury(tx: &Tx, letters: &[&DeadLetter]) -> Result<(), StoreError> {
    for letter in letters {
        let Origin { subject, headers, body, attempts } = &letter.origin;
        let values: [&(dyn ToSql + Sync); 8] = [
            &letter.delivery_id,
            &bigint(letter.stream_sequence),
            &storable(subject),
            &JsonText(&headers_json(headers)),
            &body.as_ref(),
            &storable(&letter.reason),
            &i32::try_from(*attempts).unwrap_or(i32::MAX),
            &letter.failed_at,
        ];
        let written = BURY.execute(tx, &values).await?;
        DEAD_LETTERS.has_taken(tx, written, &[&letter.delivery_id]).await?;
    }
    Ok(())
}

/// The one character that PostgreSQL's text cannot hold, replaced: a dead letter is the last resort and must go in.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// `{"Name": ["value", ...]}`, as a header may be there several times.
fn headers_json(headers: &HeaderMap) -> String {
    let text = |value: &dyn ToString| storable(&value.to_string());
    let members = headers.iter().map(|(name, values)| {
        let values = values.iter().map(|value| Value::String(text(value))).collect();
        (text(name), Value::Array(values))
    });
    Value::Object(members.collect::<Map<_, _>>()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_become_json_that_postgresql_takes() {
        let mut headers = HeaderMap::new();
        headers.append("Delivery-Id", "a\0b");
        headers.append("Delivery-Id", "\"c\"");
        assert_eq!(headers_json(&headers), r#"{"Delivery-Id":["a�b","\"c\""]}"#);
        assert_eq!(headers_json(&HeaderMap::new()), "{}");
    }
}
