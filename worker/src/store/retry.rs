//! `worker dead-letters retry` and `discard`: what becomes of a dead letter, each in one transaction with the ledger.

use async_nats::HeaderMap;
use async_nats::header::{HeaderName, HeaderValue};
use bytes::Bytes;
use serde_json::Value;
use shared::delivery::{DELIVERY_ID, RECEIVED_AT, trace_of_message};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};
use tracing::field::display;

use super::rows::{Claim, Statements};
use super::{LEDGER, Origin, Outage, SETTINGS, Store, StoreError, Tx, UNLESS_THERE, savepoint, within};
use crate::dead_letters::{self, DeadLetter};
use crate::migrate;
use crate::read::read_message;

/// Takes a letter out; two who want the same one take turns, and the second finds none.
const TAKE: &str = "\
    DELETE FROM ingest.dead_letters WHERE delivery_id = $1
    RETURNING stream_sequence, subject, headers::text, body, reason, attempts, failed_at";

/// What [`LEDGER`] does with a delivery that it has as dead.
const IF_DEAD: &str = "DO UPDATE SET state = EXCLUDED.state, signal_id = EXCLUDED.signal_id,
        issue_id = EXCLUDED.issue_id, resource = EXCLUDED.resource, severity = EXCLUDED.severity,
        type = EXCLUDED.type, source_id = EXCLUDED.source_id, received_at = EXCLUDED.received_at, stored_at = now()
    WHERE deliveries.state = 'dead'";

/// Leaves the tombstone of a discarded letter. An insert, should the ledger have been lost.
const DISCARD: &str = "\
    INSERT INTO ingest.deliveries (delivery_id, state, stream_sequence) VALUES ($1, 'discarded', $2)
    ON CONFLICT (delivery_id) DO UPDATE SET state = 'discarded' WHERE deliveries.state = 'dead'";

/// What became of a dead letter that was tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Retried {
    /// It is stored; the letter is gone.
    Stored,
    /// It still cannot be stored, for this reason. The letter has it, one attempt more and the time of it.
    StillDead(String),
    /// The ledger has it as stored or discarded: the letter was left over, and is gone now.
    Settled,
    /// There is no such letter.
    NotThere,
}

impl Store {
    /// Tries a dead letter again, with today's reading of it.
    ///
    /// # Errors
    /// [`StoreError::Outage`]; nothing was changed then.
    pub async fn retry(&self, delivery_id: &str) -> Result<Retried, StoreError> {
        self.transact(SETTINGS, |tx| async move { retry(&tx, delivery_id).await }).await
    }

    /// Gives a dead letter up: the letter goes, the ledger keeps the id as `discarded`, so that neither a redelivery
    /// nor a replay brings it back. False where there is no such letter.
    ///
    /// # Errors
    /// [`StoreError::Outage`]; nothing was changed then.
    pub async fn discard(&self, delivery_id: &str) -> Result<bool, StoreError> {
        let discard = |tx: Tx| async move {
            let sql = "DELETE FROM ingest.dead_letters WHERE delivery_id = $1 RETURNING stream_sequence";
            let Some(row) = within(tx.query_opt(sql, &[&delivery_id])).await? else { return Ok(false) };
            let sequence: i64 = row.try_get(0).map_err(|err| StoreError::from_sql(&err))?;
            within(tx.execute(DISCARD, &[&delivery_id, &sequence])).await?;
            Ok(true)
        };
        self.transact(SETTINGS, discard).await
    }
}

/// Forgets that letters were discarded.
const FORGET: &str = "DELETE FROM ingest.deliveries WHERE delivery_id = ANY ($1) AND state = 'discarded'";

impl Store {
    /// Takes back that these deliveries were discarded: to the ledger they are new. The caller stores them at once.
    /// Should it end before, they are missing, and any replay stores them.
    ///
    /// # Errors
    /// [`StoreError::Outage`]; nothing was changed then.
    pub async fn forget_discarded(&self, delivery_ids: &[String]) -> Result<(), StoreError> {
        let forget = |tx: Tx| async move { within(tx.execute(FORGET, &[&delivery_ids])).await.map(drop) };
        self.transact(SETTINGS, forget).await
    }
}

async fn retry(tx: &Tx, delivery_id: &str) -> Result<Retried, StoreError> {
    let ledger = LEDGER.map(|sql| sql.replace("DO NOTHING", IF_DEAD));
    let statements = Statements { ledger, ..Statements::new(UNLESS_THERE) };
    // A row that would be refused at COMMIT has to be refused while its savepoint is open.
    within(tx.batch_execute("SET CONSTRAINTS ALL IMMEDIATE")).await?;
    let Some(letter) = take(tx, delivery_id).await? else { return Ok(Retried::NotThere) };
    let attempts = letter.origin.attempts + 1;
    let trace = trace_of_message(Some(&letter.origin.headers)).map(|trace| display(trace.trace_id()));
    let read = tokio::task::spawn_blocking(move || read_again(letter)).await.expect("reading isolates its panics");
    let mut dead = match read {
        Ok(record) => {
            let store = async {
                let claimed = !statements.claim(tx, vec![Claim::stored(&record)]).await?.is_empty();
                if claimed {
                    statements.insert(tx, &[&record]).await?;
                }
                Ok(claimed)
            };
            match savepoint(tx, store).await {
                Ok(claimed) => {
                    tracing::debug!(delivery.id = delivery_id, trace.id = trace, "stored what was a dead letter");
                    return Ok(if claimed { Retried::Stored } else { Retried::Settled });
                }
                // It stays a dead letter, whether or not the cause is in what it says.
                Err(StoreError::Refused(reason) | StoreError::Outage(Outage { reason, of_row: Some(_), .. })) => {
                    migrate::fits(tx).await.map_err(StoreError::from_check)?;
                    DeadLetter::of(&record, reason)
                }
                Err(error @ (StoreError::Outage(_) | StoreError::Denied(_))) => return Err(error),
            }
        }
        Err(dead) => *dead,
    };
    dead.origin.attempts = attempts;
    dead_letters::bury(tx, &[&dead]).await?;
    tracing::debug!(delivery.id = delivery_id, trace.id = trace, reason = dead.reason, "still a dead letter");
    Ok(Retried::StillDead(dead.reason))
}

async fn take(tx: &Tx, delivery_id: &str) -> Result<Option<DeadLetter>, StoreError> {
    let Some(row) = within(tx.query_opt(TAKE, &[&delivery_id])).await? else { return Ok(None) };
    let letter = || {
        let sequence: i64 = row.try_get(0)?;
        let attempts: i32 = row.try_get(5)?;
        Ok(DeadLetter {
            delivery_id: delivery_id.to_owned(),
            stream_sequence: sequence.unsigned_abs(),
            origin: Origin {
                subject: row.try_get(1)?,
                headers: headers(row.try_get(2)?),
                body: Bytes::from(row.try_get::<_, Vec<u8>>(3)?),
                attempts: i64::from(attempts),
            },
            reason: row.try_get(4)?,
            failed_at: row.try_get(6)?,
        })
    };
    letter().map(Some).map_err(|err: tokio_postgres::Error| StoreError::from_sql(&err))
}

/// The letter's message, read as if it came now. What a foreign message lacks, the time, is that of its failure.
fn read_again(letter: DeadLetter) -> Result<super::Record, Box<DeadLetter>> {
    let Origin { subject, mut headers, body, attempts } = letter.origin;
    if letter.delivery_id.parse::<HeaderValue>().is_ok() {
        headers.insert(DELIVERY_ID, letter.delivery_id.as_str()); // the ledger's id, in place of one in the headers
    }
    let message = async_nats::Message {
        subject: subject.into(),
        reply: None,
        length: body.len(),
        payload: body,
        headers: Some(headers),
        status: None,
        description: None,
    };
    let stored_at = received_at(&message, letter.failed_at).unwrap_or(letter.failed_at);
    read_message(&message, letter.stream_sequence, stored_at, attempts)
}

/// The time in the message's header. `None` unless it lies in the ten years before `failed_at`: a letter may fail again and
/// again for years.
fn received_at(message: &async_nats::Message, failed_at: OffsetDateTime) -> Option<OffsetDateTime> {
    let text = message.headers.as_ref()?.get(RECEIVED_AT)?.as_str();
    let at = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    (failed_at.saturating_sub(Duration::days(10 * 365))..=failed_at).contains(&at).then_some(at)
}

/// Back from what [`dead_letters`] made of them. What can be no header any more is left out.
fn headers(json: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let Ok(Value::Object(members)) = serde_json::from_str(json) else { return headers };
    for (name, values) in &members {
        let values = values.as_array().into_iter().flatten().filter_map(Value::as_str);
        for value in values.filter_map(|value| value.parse::<HeaderValue>().ok()) {
            if let Ok(name) = name.parse::<HeaderName>() {
                headers.append(name, value);
            }
        }
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_went() {
        let read = headers(r#"{"Delivery-Id":["a","b"],"X":["\"c\""],"bad name\n":["x"],"Y":["a\r\nb"],"Z":1}"#);
        let values = |name: &str| read.get_all(name).map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!((values("Delivery-Id"), values("X")), (vec!["a".into(), "b".into()], vec!["\"c\"".to_owned()]));
        assert_eq!(read.len(), 2);
        assert!(headers("[]").is_empty());
    }

    #[test]
    fn a_letter_is_read_under_the_id_that_the_ledger_has() {
        let origin = Origin { subject: "signals.sentry.error".into(), body: "{}".into(), ..Origin::default() };
        let letter = DeadLetter {
            delivery_id: "abc".into(),
            stream_sequence: 7,
            origin,
            reason: String::new(),
            failed_at: OffsetDateTime::UNIX_EPOCH,
        };
        let record = read_again(letter).unwrap();
        assert_eq!(
            (record.delivery_id.as_str(), record.stream_sequence, record.resource.as_str()),
            ("abc", 7, "error")
        );
        assert_eq!(record.received_at, OffsetDateTime::UNIX_EPOCH);
    }
}
