//! The least that storing deliveries can be: a loop that inserts rows from memory, without NATS, without reading JSON,
//! without anything that deals with failure.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::BytesMut;
use futures_util::try_join;
use shared::delivery::Delivery;
use time::OffsetDateTime;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Statement};

use crate::bodies::Deliveries;
use crate::database::connect;
use crate::stream::delivery;

/// The same three inserts as the worker's, into the same tables.
const LEDGER: &str = "
    INSERT INTO ingest.deliveries
        (delivery_id, state, signal_id, issue_id, stream_sequence, resource, severity, type, source_id, received_at)
    SELECT id, 'stored', signal, issue, place, 'error', 'high', kind, source, received
    FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[], $7::timestamptz[])
         AS fresh (id, signal, issue, place, kind, source, received)";
const ISSUES: &str = "
    INSERT INTO public.issues
        (id, title, type, status, priority, signal_source, signal_payload, created_at, updated_at)
    SELECT id, title, 'signal', 'triage', 2, 'sentry', payload, received, received
    FROM unnest($1::text[], $2::text[], $3::jsonb[], $4::timestamptz[]) AS fresh (id, title, payload, received)";
const SIGNALS: &str = "
    INSERT INTO public.signals (id, source, source_id, type, severity, payload, issue_id, created_at)
    SELECT fresh.id, 'sentry', fresh.source, fresh.kind, 'high', issue.signal_payload, issue.id, issue.created_at
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS fresh (id, issue, kind, source)
    JOIN public.issues AS issue ON issue.id = fresh.issue";
/// As the worker, and for its reason: a plan made while the table is empty would read the whole of it.
const BY_KEY: &str = "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off";

/// As the worker's default.
const BATCH: u64 = 256;

/// Rows ready to be sent, but for their payload.
struct Row {
    id: String,
    signal: String,
    issue: String,
    place: i64,
    title: String,
    kind: String,
    source: Option<String>,
    received: OffsetDateTime,
    payload: String,
}

/// Inserts `count` deliveries into a database that has the tables, in as many loops as there are to be connections.
pub(crate) async fn insert(
    database_url: &str,
    deliveries: &Arc<Deliveries>,
    count: u64,
    connections: usize,
) -> anyhow::Result<()> {
    let rows = (0..count).map(|n| row(&delivery(1, n, deliveries.body(n))?, n)).collect::<anyhow::Result<Vec<_>>>()?;
    let (rows, next) = (Arc::new(rows), Arc::new(AtomicU64::new(0)));
    let mut loops = vec![];
    for _ in 0..connections {
        let client = connect(database_url).await?;
        client.batch_execute(BY_KEY).await?;
        let statements = [client.prepare(LEDGER).await?, client.prepare(ISSUES).await?, client.prepare(SIGNALS).await?];
        loops.push(tokio::spawn(work(client, statements, rows.clone(), next.clone())));
    }
    for running in loops {
        running.await??;
    }
    Ok(())
}

/// What is known of a delivery before the clock starts.
fn row(delivery: &Delivery, n: u64) -> anyhow::Result<Row> {
    let meaning = worker::interpret::interpret(&delivery.body)?;
    Ok(Row {
        id: delivery.id.to_string(),
        signal: delivery.id.signal_id(),
        issue: delivery.id.issue_id(),
        place: n.cast_signed(),
        title: meaning.title,
        kind: meaning.kind,
        source: meaning.source_id,
        received: delivery.received_at,
        payload: worker::payload::payload(&delivery.body)?.into_owned(),
    })
}

async fn work(
    mut client: Client,
    [ledger, issues, signals]: [Statement; 3],
    rows: Arc<Vec<Row>>,
    next: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    loop {
        let from = usize::try_from(next.fetch_add(BATCH, Ordering::Relaxed))?;
        let Some(rest) = rows.get(from..).filter(|rest| !rest.is_empty()) else { return Ok(()) };
        let batch = &rest[..rest.len().min(usize::try_from(BATCH)?)];
        fn column<'a, T>(batch: &'a [Row], of: impl Fn(&'a Row) -> T) -> Vec<T> {
            batch.iter().map(of).collect()
        }
        let ids = column(batch, |row| row.id.as_str());
        let signal_ids = column(batch, |row| row.signal.as_str());
        let issue_ids = column(batch, |row| row.issue.as_str());
        let places = column(batch, |row| row.place);
        let titles = column(batch, |row| row.title.as_str());
        let kinds = column(batch, |row| row.kind.as_str());
        let sources = column(batch, |row| row.source.as_deref());
        let received = column(batch, |row| row.received);
        let payloads = column(batch, |row| Json(&row.payload));
        let ledger_columns: [&(dyn ToSql + Sync); 7] =
            [&ids, &signal_ids, &issue_ids, &places, &kinds, &sources, &received];
        let issue_columns: [&(dyn ToSql + Sync); 4] = [&issue_ids, &titles, &payloads, &received];
        let signal_columns: [&(dyn ToSql + Sync); 4] = [&signal_ids, &issue_ids, &kinds, &sources];
        let tx = client.transaction().await?;
        // Sent together; PostgreSQL runs them in this order.
        try_join!(
            tx.execute(&ledger, &ledger_columns),
            tx.execute(&issues, &issue_columns),
            tx.execute(&signals, &signal_columns),
        )?;
        tx.commit().await?;
    }
}

/// Text that PostgreSQL parses as jsonb: version 1 of the binary form is a byte and the text.
#[derive(Debug)]
struct Json<'a>(&'a str);

impl ToSql for Json<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(&[1]);
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::JSONB
    }

    to_sql_checked!();
}
