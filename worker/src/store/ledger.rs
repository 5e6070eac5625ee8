//! What the database has of deliveries: look-ups that change nothing.

use std::collections::HashMap;

use tokio_postgres::types::Type;

use super::{SETTINGS, Statement, Store, StoreError};

/// How many ids to look up at a time, for those who have many: with half as many a replay was 7 % slower.
pub(crate) const LOOK_UP: usize = 1_000;

/// Looks deliveries up by id. The two joins are look-ups by key; payloads are not touched.
const QUERY: Statement = Statement::new(
    "\
    SELECT l.delivery_id, l.state, l.stream_sequence, s.id IS NOT NULL, i.id IS NOT NULL, s.severity::text, i.title
    FROM ingest.deliveries AS l
    LEFT JOIN public.signals AS s ON s.id = l.signal_id
    LEFT JOIN public.issues AS i ON i.id = l.issue_id
    WHERE l.delivery_id = ANY ($1)",
    &[Type::TEXT_ARRAY],
);

/// What became of a delivery that the ledger knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is stored, and both its rows are there.
    Stored {
        /// `signals.severity`, as it stands there now.
        severity: String,
        /// `issues.title`, as it stands there now.
        title: String,
    },
    /// It was stored, and its signal or its issue or both were deleted since.
    Deleted,
    /// It is a dead letter.
    Dead,
    /// It was a dead letter, which somebody discarded.
    Discarded,
}

/// A delivery in the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// What became of it.
    pub fate: Fate,
    /// From which message of the stream.
    pub stream_sequence: u64,
}

impl Store {
    /// What the ledger has of these deliveries, by id. One that is not in the answer was never stored.
    ///
    /// # Errors
    /// [`StoreError::Outage`]
    pub async fn look_up(&self, ids: &[String]) -> Result<HashMap<String, Known>, StoreError> {
        let rows = self.transact(SETTINGS, |tx| async move { QUERY.query(&tx, &[&ids]).await }).await?;
        rows.iter().map(|row| known(row).map_err(|err| StoreError::from_sql(&err))).collect()
    }
}

/// A row of [`QUERY`].
fn known(row: &tokio_postgres::Row) -> Result<(String, Known), tokio_postgres::Error> {
    let (signal, issue): (bool, bool) = (row.try_get(3)?, row.try_get(4)?);
    let fate = match row.try_get::<_, &str>(1)? {
        "dead" => Fate::Dead,
        "discarded" => Fate::Discarded,
        // The ledger's CHECK allows no other.
        _stored if signal && issue => Fate::Stored { severity: row.try_get(5)?, title: row.try_get(6)? },
        _stored => Fate::Deleted,
    };
    let sequence: i64 = row.try_get(2)?;
    Ok((row.try_get(0)?, Known { fate, stream_sequence: sequence.unsigned_abs() }))
}
