//! Rows as PostgreSQL takes them fastest: a statement gets one array a column.

use std::collections::HashSet;
use std::error::Error;

use bytes::{BufMut, BytesMut};
use time::OffsetDateTime;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use super::{ISSUES, LEDGER, Record, SIGNALS, Statement, StoreError, Tx, in_order, taken};
use crate::dead_letters::DeadLetter;

/// How many bytes of payload one statement carries; a larger record goes alone. PostgreSQL takes messages of up to
/// 1 GiB (`PQ_LARGE_MESSAGE_LIMIT`); the limit here is time: each statement has to end within `statement_timeout`, on a
/// server that takes 20 s for the largest body.
const STATEMENT_BYTES: usize = 8 << 20;

/// JSON text as a `jsonb` parameter, unparsed: the binary form of jsonb is a version byte, 1, and the text
/// (`jsonb_recv` in PostgreSQL's `jsonb.c`).
#[derive(Debug)]
pub(crate) struct JsonText<'a>(pub(crate) &'a str);

impl ToSql for JsonText<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.reserve(1 + self.0.len());
        out.put_u8(1);
        out.put_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }

    to_sql_checked!();
}

/// A row of the ledger.
pub(super) struct Claim<'a> {
    delivery_id: &'a str,
    stream_sequence: u64,
    /// `None`: a dead letter, of which the ledger keeps the id alone. What it says may be what PostgreSQL refused.
    stored: Option<&'a Record>,
}

impl<'a> Claim<'a> {
    pub(super) fn stored(record: &'a Record) -> Claim<'a> {
        Claim { delivery_id: &record.delivery_id, stream_sequence: record.stream_sequence, stored: Some(record) }
    }

    pub(super) fn dead(letter: &'a DeadLetter) -> Claim<'a> {
        Claim { delivery_id: &letter.delivery_id, stream_sequence: letter.stream_sequence, stored: None }
    }
}

/// The statements of this module's parent, in one of their variants.
pub(super) struct Statements {
    pub(super) ledger: Statement,
    pub(super) issues: Statement,
    pub(super) signals: Statement,
}

impl Statements {
    /// `on_conflict` is appended to the statements that write Loop's tables.
    pub(super) fn new(on_conflict: &str) -> Statements {
        let with = |sql: &str| format!("{sql}{on_conflict}");
        Statements { ledger: LEDGER.map(str::to_owned), issues: ISSUES.map(with), signals: SIGNALS.map(with) }
    }

    /// The delivery ids that were claimed now. All others are in the ledger.
    pub(super) async fn claim(&self, tx: &Tx, mut claims: Vec<Claim<'_>>) -> Result<HashSet<String>, StoreError> {
        claims.sort_unstable_by_key(|claim| claim.delivery_id);
        let records = || claims.iter().map(|claim| claim.stored);
        let ids: Vec<&str> = claims.iter().map(|claim| claim.delivery_id).collect();
        let states: Vec<&str> = records().map(|record| record.map_or("dead", |_| "stored")).collect();
        let signals: Vec<Option<&str>> = records().map(|record| Some(record?.signal_id.as_str())).collect();
        let issues: Vec<Option<&str>> = records().map(|record| Some(record?.issue_id.as_str())).collect();
        let sequences: Vec<i64> = claims.iter().map(|claim| bigint(claim.stream_sequence)).collect();
        let resources: Vec<Option<&str>> = records().map(|record| Some(record?.resource.as_str())).collect();
        let severities: Vec<Option<&str>> = records().map(|record| Some(record?.severity)).collect();
        let kinds: Vec<Option<&str>> = records().map(|record| Some(record?.kind.as_str())).collect();
        let sources: Vec<Option<&str>> = records().map(|record| record?.source_id.as_deref()).collect();
        let received: Vec<Option<OffsetDateTime>> = records().map(|record| Some(record?.received_at)).collect();
        let columns: [&(dyn ToSql + Sync); 10] =
            [&ids, &states, &signals, &issues, &sequences, &resources, &severities, &kinds, &sources, &received];
        let fresh = self.ledger.query(tx, &columns).await?;
        let fresh = fresh.iter().map(|row| row.try_get(0).map_err(|err| StoreError::from_sql(&err)));
        let fresh: HashSet<String> = fresh.collect::<Result<_, _>>()?;
        let known: Vec<&str> = ids.iter().copied().filter(|id| !fresh.contains(*id)).collect();
        taken::DELIVERIES.has_taken(tx, 0, &known).await?;
        Ok(fresh)
    }

    /// The issues and signals of `records`, which are fresh, in their order.
    pub(super) async fn insert(&self, tx: &Tx, mut records: &[&Record]) -> Result<(), StoreError> {
        while !records.is_empty() {
            let (part, rest) = records.split_at(statement_len(records));
            Box::pin(self.insert_part(tx, part)).await?; // large
            records = rest;
        }
        Ok(())
    }

    async fn insert_part(&self, tx: &Tx, records: &[&Record]) -> Result<(), StoreError> {
        // The second reads what the first wrote.
        let (issues, signals) = (self.write_issues(tx, records), self.write_signals(tx, records));
        let (issues, signals) = in_order(issues, signals).await?;
        taken::ISSUES.has_taken(tx, issues, &issue_ids(records)).await?;
        taken::SIGNALS.has_taken(tx, signals, &signal_ids(records)).await
    }

    /// Without their signals.
    pub(super) async fn insert_issues(&self, tx: &Tx, records: &[&Record]) -> Result<(), StoreError> {
        let written = self.write_issues(tx, records).await?;
        taken::ISSUES.has_taken(tx, written, &issue_ids(records)).await
    }

    async fn write_issues(&self, tx: &Tx, records: &[&Record]) -> Result<u64, StoreError> {
        let ids = issue_ids(records);
        let titles: Vec<&str> = records.iter().map(|record| record.title.as_str()).collect();
        let priorities: Vec<i32> = records.iter().map(|record| record.priority).collect();
        let payloads: Vec<JsonText<'_>> = records.iter().map(|record| JsonText(&record.payload)).collect();
        let received: Vec<OffsetDateTime> = records.iter().map(|record| record.received_at).collect();
        self.issues.execute(tx, &[&ids, &titles, &priorities, &payloads, &received]).await
    }

    async fn write_signals(&self, tx: &Tx, records: &[&Record]) -> Result<u64, StoreError> {
        let (ids, issues) = (signal_ids(records), issue_ids(records));
        let sources: Vec<Option<&str>> = records.iter().map(|record| record.source_id.as_deref()).collect();
        let kinds: Vec<&str> = records.iter().map(|record| record.kind.as_str()).collect();
        let severities: Vec<&str> = records.iter().map(|record| record.severity).collect();
        self.signals.execute(tx, &[&ids, &issues, &sources, &kinds, &severities]).await
    }
}

pub(super) fn issue_ids<'a>(records: &[&'a Record]) -> Vec<&'a str> {
    records.iter().map(|record| record.issue_id.as_str()).collect()
}

pub(super) fn signal_ids<'a>(records: &[&'a Record]) -> Vec<&'a str> {
    records.iter().map(|record| record.signal_id.as_str()).collect()
}

/// How many of `records`, from the first, one statement carries: at least one.
pub(super) fn statement_len(records: &[&Record]) -> usize {
    let mut bytes = 0;
    let fits = |record: &&&Record| {
        bytes += record.payload.len();
        bytes <= STATEMENT_BYTES
    };
    records.iter().take_while(fits).count().max(1)
}

/// A stream sequence as PostgreSQL's signed type holds it; NATS would need 292 years at a billion a second to pass it.
pub(crate) fn bigint(sequence: u64) -> i64 {
    i64::try_from(sequence).unwrap_or(i64::MAX)
}
