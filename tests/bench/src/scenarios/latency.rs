//! How long it takes from the POST to the COMMIT, at a modest rate.
//!
//! Everything is there: gateway, broker, one worker, a PostgreSQL that waits for its disk. Requests have their times
//! (an open loop), and a delivery's time runs from when its request was to be sent until PostgreSQL recorded its COMMIT
//! (`pg_xact_commit_timestamp`), by the same machine's clock; asking the table again and again would disturb what is
//! measured. PostgreSQL takes that time just before it flushes the commit record, so what a flush takes here is
//! measured at the end, and added.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use tokio_postgres::Client;

use super::{Bench, CONNECTIONS, spread};
use crate::bodies::Deliveries;
use crate::database;
use crate::load;
use crate::load::open::{self, Latencies, Plan};
use crate::report::{Goal, Line, Report};
use crate::servers::{Database, Nats, Server};
use crate::stats::Rounds;

/// Deliveries a second.
const RATE: f64 = 200.0;

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let (nats, database) = (Nats::start("").await?, Database::start().await?);
    let url = database.empty(&bench.built).await?;
    let gateway = Server::gateway(&bench.built, &nats.url(), &[]).await?;
    let worker = Server::worker(&bench.built, &nats.url(), &url, &[])?;
    worker.ready().await?;
    let client = database::connect(&url).await?;
    let deliveries = Arc::new(Deliveries::of_size(16 << 10, 4));
    let plan = Plan {
        rate: RATE,
        connections: u32::try_from(CONNECTIONS)?,
        warm_up: bench.size(Duration::ZERO, Duration::from_secs(2)),
        measure: bench.size(Duration::from_secs(1), Duration::from_secs(10)),
    };
    let (mut p50, mut p99, mut answered, mut flushes) = (vec![], vec![], vec![], vec![]);
    for _ in 0..bench.rounds() {
        let clocks = (Instant::now(), SystemTime::now());
        let latencies = open::run(gateway.port, &deliveries, plan).await?;
        load::all_accepted(&latencies.answers)?;
        worker.until("done", async || Ok(gateway.metric("gateway_deliveries_unconfirmed").await? == 0.0)).await?;
        let flush = flush(&client, bench.size(20, 200)).await?;
        let stored = until_committed(&client, &latencies, clocks, flush).await?;
        p50.push(stored.value_at_quantile(0.5) as f64 / 1e6);
        p99.push(stored.value_at_quantile(0.99) as f64 / 1e6);
        answered.push(latencies.ms(0.99));
        flushes.push(flush.as_secs_f64() * 1e3);
    }
    report.note(format!("16 KB at {RATE}/s, answered 202: p99 {} ms", spread(answered)));
    report.note(format!("16 KB at {RATE}/s, the flush of a commit record: {} ms", spread(flushes)));
    report.line(Line::new("POST to COMMIT at 200/s, p50", Goal::AtMost(8.0), "ms", Rounds::of(p50)));
    report.line(Line::new("POST to COMMIT at 200/s, p99", Goal::AtMost(40.0), "ms", Rounds::of(p99)));
    Ok(report)
}

/// What the flush of a commit record takes: the median of small transactions that wait for it, less that of such that
/// do not.
async fn flush(client: &Client, count: usize) -> anyhow::Result<Duration> {
    client.batch_execute("CREATE TABLE IF NOT EXISTS public.bench_flush (n integer)").await?;
    let mut medians = vec![];
    for wait in ["on", "off"] {
        client.batch_execute(&format!("SET synchronous_commit = {wait}")).await?;
        let mut took = vec![];
        for _ in 0..count {
            let begin = Instant::now();
            client.batch_execute("INSERT INTO public.bench_flush VALUES (1)").await?;
            took.push(begin.elapsed().as_secs_f64());
        }
        medians.push(Rounds::of(took).median());
    }
    client.batch_execute("RESET synchronous_commit").await?;
    Ok(Duration::from_secs_f64((medians[0] - medians[1]).max(0.0)))
}

/// Nanoseconds from when each delivery was to be sent until it was committed. `clocks` are the two clocks at one
/// moment.
async fn until_committed(
    client: &Client,
    latencies: &Latencies,
    clocks: (Instant, SystemTime),
    flush: Duration,
) -> anyhow::Result<Histogram<u64>> {
    let sql = "SELECT delivery_id, pg_xact_commit_timestamp(xmin) FROM ingest.deliveries";
    let rows = client.query(sql, &[]).await?;
    let committed = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    let committed = committed.collect::<Result<HashMap<String, SystemTime>, tokio_postgres::Error>>()?;
    let mut histogram = Histogram::new_with_bounds(1000, 60_000_000_000, 3)?;
    for (intended, answer) in &latencies.sent {
        let answer: serde_json::Value = serde_json::from_slice(answer).context("the gateway answers in JSON")?;
        let id = answer["data"]["deliveryId"].as_str().context("a 202 names its delivery")?;
        let at = committed.get(id).with_context(|| format!("delivery {id} was accepted and is not stored"))?;
        let sent = clocks.1 + intended.duration_since(clocks.0);
        let took = at.duration_since(sent).unwrap_or_default() + flush;
        histogram.saturating_record(u64::try_from(took.as_nanos())?);
    }
    Ok(histogram)
}
