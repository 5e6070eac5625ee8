//! `worker replay --restore-deleted`: rows that somebody deleted are written again.
//!
//! Each row that is missing comes back with its id, its times and what the body says today; only `issues.number` is a
//! new one, as nobody remembers the old. Where one of the two rows is still there it is left as it is, with whatever
//! people changed in it, and only the other is written.

use std::collections::HashSet;

use tokio_postgres::types::{ToSql, Type};

use super::rows::{JsonText, Statements, issue_ids, signal_ids, statement_len};
use super::{Dead, Outage, Record, SETTINGS, Statement, Store, StoreError, Tx, taken};
use crate::migrate;

/// Keeps two restorers apart. No worker waits for it: an `ON CONFLICT DO NOTHING` looks past locks on rows.
const LOCK: &str = "\
    SELECT delivery_id FROM ingest.deliveries WHERE delivery_id = ANY ($1) AND state = 'stored'
    ORDER BY delivery_id FOR UPDATE";

/// Which of these rows are there.
const ISSUES_THERE: &str = "SELECT id FROM public.issues WHERE id = ANY ($1)";
const SIGNALS_THERE: &str = "SELECT id FROM public.signals WHERE id = ANY ($1)";

/// Unlike the ordinary way it does not copy the payload from the issue, which may have been edited.
const SIGNALS: Statement = Statement::new(
    "\
    INSERT INTO public.signals (id, source, source_id, type, severity, payload, issue_id, created_at)
    SELECT id, 'sentry', source_id, type, severity::public.signal_severity, payload, issue_id, received_at
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::text[], $7::timestamptz[])
         AS deleted (id, source_id, type, severity, payload, issue_id, received_at)",
    &[
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::TEXT_ARRAY,
        Type::JSONB_ARRAY,
        Type::TEXT_ARRAY,
        Type::TIMESTAMPTZ_ARRAY,
    ],
);

/// What a restore did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restored {
    /// These deliveries have both rows again. A delivery that had both by now, by somebody else's doing, is in neither
    /// list.
    pub restored: Vec<String>,
    /// PostgreSQL refuses these rows today, for what they say or for an unclear reason.
    pub refused: Vec<Dead>,
}

impl Store {
    /// Writes the missing rows of deliveries that the ledger has as stored; what it does not have so is passed over.
    /// All of it in one transaction, unless PostgreSQL refuses a row: then each in one of its own.
    ///
    /// # Errors
    /// [`StoreError::Outage`]; the same call again settles it.
    pub async fn restore(&self, records: &[&Record]) -> Result<Restored, StoreError> {
        match self.restore_together(records).await {
            Ok(restored) => return Ok(Restored { restored, refused: Vec::new() }),
            Err(error) if error.may_be_of_one_row() => {}
            Err(error) => return Err(error),
        }
        // A refusal is a row's fault only while the tables fit.
        self.transact(SETTINGS, |tx| async move { migrate::fits(&tx).await.map_err(StoreError::from_check) }).await?;
        let mut all = Restored::default();
        for record in records {
            match self.restore_together(&[record]).await {
                Ok(restored) => all.restored.extend(restored),
                Err(StoreError::Refused(reason) | StoreError::Outage(Outage { reason, of_row: Some(_), .. })) => {
                    all.refused.push(Dead { delivery_id: record.delivery_id.clone(), reason });
                }
                Err(error @ (StoreError::Outage(_) | StoreError::Denied(_))) => return Err(error),
            }
        }
        Ok(all)
    }

    async fn restore_together(&self, records: &[&Record]) -> Result<Vec<String>, StoreError> {
        self.transact(SETTINGS, |tx| async move { restore(&tx, records).await }).await
    }
}

/// The deliveries of which a row was written.
async fn restore(tx: &Tx, records: &[&Record]) -> Result<Vec<String>, StoreError> {
    let statements = Statements::new("");
    let ids: Vec<&str> = records.iter().map(|record| record.delivery_id.as_str()).collect();
    let locked = texts(tx, LOCK, &ids).await?;
    let issues_there = texts(tx, ISSUES_THERE, &issue_ids(records)).await?;
    let signals_there = texts(tx, SIGNALS_THERE, &signal_ids(records)).await?;
    let mut seen = HashSet::new();
    let mine: Vec<&Record> = (records.iter().copied())
        .filter(|record| locked.contains(&record.delivery_id) && seen.insert(&record.delivery_id))
        .collect();
    let without = |there: &HashSet<String>, id: fn(&Record) -> &String| {
        mine.iter().copied().filter(|record| !there.contains(id(record))).collect::<Vec<&Record>>()
    };
    let no_issue = without(&issues_there, |record| &record.issue_id);
    let no_signal = without(&signals_there, |record| &record.signal_id);
    for part in parts(&no_issue) {
        statements.insert_issues(tx, part).await?;
    }
    for part in parts(&no_signal) {
        insert_signals(tx, part).await?;
    }
    let written: HashSet<&String> = no_issue.iter().chain(&no_signal).map(|record| &record.delivery_id).collect();
    Ok(mine.iter().map(|record| &record.delivery_id).filter(|id| written.contains(id)).cloned().collect())
}

/// `records` in pieces that a statement carries.
fn parts<'a>(mut records: &'a [&'a Record]) -> impl Iterator<Item = &'a [&'a Record]> {
    std::iter::from_fn(move || {
        if records.is_empty() {
            return None;
        }
        let (part, rest) = records.split_at(statement_len(records));
        records = rest;
        Some(part)
    })
}

async fn texts(tx: &Tx, sql: &'static str, ids: &[&str]) -> Result<HashSet<String>, StoreError> {
    let rows = Statement::new(sql, &[Type::TEXT_ARRAY]).query(tx, &[&ids]).await?;
    rows.iter().map(|row| row.try_get(0).map_err(|err| StoreError::from_sql(&err))).collect()
}

async fn insert_signals(tx: &Tx, records: &[&Record]) -> Result<(), StoreError> {
    let ids = signal_ids(records);
    let sources: Vec<Option<&str>> = records.iter().map(|record| record.source_id.as_deref()).collect();
    let kinds: Vec<&str> = records.iter().map(|record| record.kind.as_str()).collect();
    let severities: Vec<&str> = records.iter().map(|record| record.severity).collect();
    let payloads: Vec<JsonText<'_>> = records.iter().map(|record| JsonText(&record.payload)).collect();
    let issues = issue_ids(records);
    let received: Vec<_> = records.iter().map(|record| record.received_at).collect();
    let columns: [&(dyn ToSql + Sync); 7] = [&ids, &sources, &kinds, &severities, &payloads, &issues, &received];
    let written = SIGNALS.execute(tx, &columns).await?;
    taken::SIGNALS.has_taken(tx, written, &ids).await
}
