//! How many deliveries a second one worker stores, against a loop that inserts the same rows from memory.
//!
//! Both write to the same server and the same tables, each run to a database of its own, in batches as large as the
//! worker's default. What the worker does more: it pulls from NATS, reads JSON, acknowledges, and survives. The loop is
//! one, on one connection; beside it, two of them on two connections, as many as the worker has by default: on two cores
//! these leave nothing to anybody, so what the worker and the broker need for themselves is missing from its rate. Rates are of COMMITs, by PostgreSQL's own record of when each was, so starting up is in neither; rows
//! are counted afterwards.

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, ratios, spread};
use crate::bodies::Deliveries;
use crate::database::{self, Committed};
use crate::process;
use crate::report::{Goal, Line, Report};
use crate::servers::{Database, Nats, Server};
use crate::stream::Stream;
use crate::unnest;

/// Loops, each on a connection of its own, and what the table calls them. The second is as many as `WORKER_CONCURRENCY`.
const LOOPS: [(usize, &str); 2] = [(1, "UNNEST loop alone"), (2, "two UNNEST loops alone")];
/// How long storing all of it may take.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let database = Database::start().await?;
    for (kb, count) in [(2, bench.size(2000, 60_000)), (16, bench.size(1000, 20_000))] {
        let nats = Nats::start("").await?;
        let stream = Stream::on(&nats.url()).await?;
        let deliveries = Arc::new(Deliveries::of_size(kb << 10, 3));
        stream.publish(&deliveries, count).await?;
        let (mut worker, mut cpu, mut alone) = (vec![], vec![], LOOPS.map(|_| vec![]));
        for _ in 0..bench.rounds() {
            for (rates, (loops, _)) in alone.iter_mut().zip(LOOPS) {
                let url = database.empty(&bench.built).await?;
                rates.push(by_unnest(&url, &deliveries, count, loops).await?.rate);
            }
            let url = database.empty(&bench.built).await?;
            let (committed, used) = by_worker(bench, &nats, &stream, &url, count).await?;
            worker.push(committed.rate);
            cpu.extend(used.map(|used| used.as_secs_f64() * 1e6 / committed.deliveries as f64));
        }
        let used = if cpu.is_empty() { String::new() } else { format!(", {} us CPU of the worker each", spread(cpu)) };
        report.note(format!("{kb} KB, one worker: {}/s{used}", spread(worker.iter().copied())));
        for (rates, (_, name)) in alone.into_iter().zip(LOOPS) {
            report.note(format!("{kb} KB, {name}: {}/s", spread(rates.iter().copied())));
            let what = format!("persist {kb} KB, one worker / {name}");
            report.line(Line::new(what, Goal::AtLeast(0.9), "x", ratios(worker.iter().copied(), rates)));
        }
    }
    Ok(report)
}

async fn by_unnest(url: &str, deliveries: &Arc<Deliveries>, count: u64, loops: usize) -> anyhow::Result<Committed> {
    let client = database::connect(url).await?;
    let begin = database::now(&client).await?;
    unnest::insert(url, deliveries, count, loops).await?;
    counted(database::committed(&client, begin).await?, count)
}

/// The worker works off the whole stream; its CPU time is of the whole run.
pub(crate) async fn by_worker(
    bench: &Bench,
    nats: &Nats,
    stream: &Stream,
    url: &str,
    count: u64,
) -> anyhow::Result<(Committed, Option<Duration>)> {
    let client = database::connect(url).await?;
    let begin = database::now(&client).await?;
    let worker = Server::worker(&bench.built, &nats.url(), url, &[])?;
    worker.until_within(PATIENCE, "done with the stream", async || stream.is_worked_off().await).await?;
    let cpu = process::cpu(worker.pid());
    drop(worker);
    stream.rewind().await?;
    Ok((counted(database::committed(&client, begin).await?, count)?, cpu))
}

fn counted(committed: Committed, count: u64) -> anyhow::Result<Committed> {
    anyhow::ensure!(committed.deliveries == count, "{} of {count} deliveries were stored", committed.deliveries);
    Ok(committed)
}
