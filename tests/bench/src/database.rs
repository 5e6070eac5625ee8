//! What the database has of a run: how many rows, and how fast they were committed.

use anyhow::{Context as _, ensure};
use tokio_postgres::{Client, NoTls};

/// A connection to a database, which lives as long as the client.
pub(crate) async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.context("cannot connect to PostgreSQL")?;
    tokio::spawn(connection);
    Ok(client)
}

/// Rows committed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Committed {
    /// Deliveries in the ledger beside the first `before` of them.
    pub(crate) deliveries: u64,
    /// Of them, committed a second, from the first COMMIT on to the last.
    pub(crate) rate: f64,
}

/// What was committed to the ledger after a moment of the server's own clock.
///
/// # Errors
/// Where signals and issues are not as many as ledger rows: then whatever was timed, it was not the storing of
/// deliveries.
pub(crate) async fn committed(client: &Client, since: std::time::SystemTime) -> anyhow::Result<Committed> {
    // The rows of the first COMMIT lie before the span that is measured.
    const SQL: &str = "
        WITH rows AS (SELECT pg_xact_commit_timestamp(xmin) AS at FROM ingest.deliveries),
             run AS (SELECT * FROM rows WHERE at >= $1),
             ends AS (SELECT min(at) AS first, max(at) AS last FROM run)
        SELECT count(*), count(*) FILTER (WHERE at > first), extract(epoch FROM max(last) - min(first))::float8,
               (SELECT count(*) FROM ingest.deliveries), (SELECT count(*) FROM public.signals),
               (SELECT count(*) FROM public.issues)
        FROM run, ends";
    let row = client.query_one(SQL, &[&since]).await?;
    let (all, later, seconds): (i64, i64, Option<f64>) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let (ledger, signals, issues): (i64, i64, i64) = (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?);
    ensure!(ledger == signals && ledger == issues, "{ledger} deliveries, {signals} signals, {issues} issues");
    let seconds = seconds.filter(|seconds| *seconds > 0.0).context("too few COMMITs to tell a rate")?;
    Ok(Committed { deliveries: all.unsigned_abs(), rate: later as f64 / seconds })
}

/// The server's clock now.
pub(crate) async fn now(client: &Client) -> anyhow::Result<std::time::SystemTime> {
    Ok(client.query_one("SELECT clock_timestamp()", &[]).await?.try_get(0)?)
}
