//! What memory the gateway takes, and whether a delivery costs more where there are many already.
//!
//! - Memory is the most the process ever took (`VmHWM`): under the usual load with the broker there, and with a
//!   thousand senders of a megabyte each at once. There `GATEWAY_MAX_BYTES_IN_FLIGHT` turns some away, so 503 counts as
//!   an answer.
//! - A backlog grows to a million while the broker is away: memory at its end against its beginning, and the CPU that a
//!   delivery costs then and there. (CPU, not time: the disk has its moods over gigabytes.)
//! - One worker stores into tables of 10^4 and of 10^6 rows, filled by SQL, each run into a fresh copy of them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use super::accept::sustained;
use super::persist::by_worker;
use super::{Bench, CONNECTIONS, Moment, Sample, absolutes, ratios, spread};
use crate::bodies::Deliveries;
use crate::database;
use crate::load;
use crate::load::closed::Load;
use crate::process;
use crate::report::{Goal, Line, Report};
use crate::servers::{Database, Nats, Server, no_nats};
use crate::stats::Rounds;
use crate::stream::{MAX_BYTES, Stream};

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    usual(bench, &mut report).await?;
    crowd(bench, &mut report).await?;
    backlog(bench, &mut report).await?;
    tables(bench, &mut report).await?;
    Ok(report)
}

async fn usual(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let deliveries = Arc::new(Deliveries::of_size(16 << 10, 9));
    let mut samples = vec![];
    for _ in 0..bench.rounds() {
        let span = bench.size(Duration::from_millis(500), Duration::from_secs(5));
        samples.push(sustained(bench, &deliveries, span).await?.sample);
    }
    let what = format!("gateway RSS, 16 KB x {CONNECTIONS} connections");
    memory(report, &what, Goal::AtMost(20.0), samples.iter().map(|sample| sample.rss));
    Ok(())
}

async fn crowd(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let deliveries = Arc::new(Deliveries::of_size(1 << 20, 10));
    let connections = bench.size(50, 1000);
    let (mut peaks, mut answers) = (vec![], load::Answers::new());
    for _ in 0..bench.rounds() {
        let nats = Nats::start("").await?;
        let server = Server::gateway(&bench.built, &nats.url(), &[("NATS_MAX_BYTES", MAX_BYTES)]).await?;
        let load = Load::start(server.port, &deliveries, connections, Some(2 * connections as u64));
        for (status, count) in load.finish().await? {
            if !matches!(status, 202 | 503) {
                bail!("{count} answers of status {status}");
            }
            *answers.entry(status).or_default() += count;
        }
        ensure!(answers.contains_key(&202), "nothing was accepted");
        peaks.push(process::peak_rss(server.pid()));
    }
    report.note(format!("1 MB from each of {connections} connections, answers by status: {answers:?}"));
    memory(report, &format!("gateway RSS, 1 MB x {connections} connections"), Goal::AtMost(200.0), peaks);
    Ok(())
}

/// A line of the report, where the system tells how much memory a process takes.
fn memory(report: &mut Report, what: &str, goal: Goal, values: impl IntoIterator<Item = Option<f64>>) {
    match values.into_iter().collect::<Option<Vec<f64>>>() {
        Some(values) => report.line(Line::new(what, goal, "MB", Rounds::of(values))),
        None => report.note(format!("{what}: SKIPPED, this system does not tell")),
    }
}

async fn backlog(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let deliveries = Arc::new(Deliveries::of_size(2 << 10, 11));
    let (few, many) = bench.size((1000, 20_000), (10_000, 1_000_000));
    let (mut early, mut late) = (vec![], vec![]);
    for _ in 0..bench.rounds() {
        let server = Server::gateway(&bench.built, &no_nats()?, &[]).await?;
        let load = Load::start(server.port, &deliveries, CONNECTIONS, None);
        early.push(window(&server, &load, few, 3 * few).await?);
        late.push(window(&server, &load, many - 2 * few, many).await?);
        load::all_accepted(&load.stop().await?)?;
        ensure!(server.backlog().await? >= many as f64, "the backlog is not in the journal");
    }
    report.note(absolutes(&format!("2 KB, gateway, with a backlog of {few}"), &early));
    report.note(absolutes(&format!("2 KB, gateway, with a backlog of {many}"), &late));
    let values =
        |of: fn(&Sample) -> Option<f64>, samples: &[Sample]| samples.iter().map(of).collect::<Option<Vec<_>>>();
    let pairs = [
        ("gateway RSS", 1.2, values(|sample| sample.rss, &late).zip(values(|sample| sample.rss, &early))),
        ("CPU a delivery", 1.3, values(|sample| sample.cpu_us, &late).zip(values(|sample| sample.cpu_us, &early))),
    ];
    for (what, goal, values) in pairs {
        let what = format!("{what}, a backlog of {many} / of {few}");
        match values {
            Some((late, early)) => report.line(Line::new(what, Goal::AtMost(goal), "x", ratios(late, early))),
            None => report.note(format!("{what}: SKIPPED, this system does not tell")),
        }
    }
    Ok(())
}

/// What a load does between two counts of answers.
async fn window(server: &Server, load: &Load, from: u64, to: u64) -> anyhow::Result<Sample> {
    const PATIENCE: Duration = Duration::from_secs(300);
    let reached = async |count| server.until_within(PATIENCE, "loaded", async || Ok(load.answered() >= count)).await;
    reached(from).await?;
    let before = Moment::now(server, load);
    reached(to).await?;
    Ok(Moment::now(server, load).since(before, process::rss(server.pid())))
}

async fn tables(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let (nats, database) = (Nats::start("").await?, Database::start().await?);
    let stream = Stream::on(&nats.url()).await?;
    let count = bench.size(1000, 20_000);
    stream.publish(&Arc::new(Deliveries::of_size(2 << 10, 12)), count).await?;
    let sizes = bench.size([1000, 20_000], [10_000, 1_000_000]);
    let mut filled = vec![];
    for rows in sizes {
        let url = database.empty(&bench.built).await?;
        let client = database::connect(&url).await?;
        client.batch_execute(&fill(rows)).await.with_context(|| format!("cannot fill tables with {rows} rows"))?;
        filled.push(url);
    }
    let mut rates = [vec![], vec![]];
    for _ in 0..bench.rounds() {
        for (rates, filled) in rates.iter_mut().zip(&filled) {
            let url = database.copy(filled).await?;
            rates.push(by_worker(bench, &nats, &stream, &url, count).await?.0.rate);
            database.remove(&url).await?;
        }
    }
    let [few, many] = rates;
    for (rows, rates) in sizes.into_iter().zip([&few, &many]) {
        report.note(format!("2 KB, one worker, tables of {rows} rows: {}/s", spread(rates.iter().copied())));
    }
    let what = format!("time a delivery is stored in, tables of {} / of {} rows", sizes[1], sizes[0]);
    report.line(Line::new(what, Goal::AtMost(1.3), "x", ratios(few, many)));
    Ok(())
}

/// Rows as deliveries leave them, but for their payload; ids without order, as the real ones.
fn fill(rows: u64) -> String {
    format!(
        "INSERT INTO ingest.deliveries
             (delivery_id, state, signal_id, issue_id, stream_sequence, resource, severity, type, source_id, received_at)
         SELECT md5(n::text)::uuid::text, 'stored', 's' || left(md5('s' || n), 23), 'i' || left(md5('i' || n), 23), n,
                'error', 'high', 'created', n::text, now()
         FROM generate_series(1, {rows}) AS n;
         INSERT INTO public.issues (id, title, type, status, priority, signal_source, signal_payload)
         SELECT 'i' || left(md5('i' || n), 23), 'Sentry: an error (1 events)', 'signal', 'triage', 2, 'sentry', '{{}}'
         FROM generate_series(1, {rows}) AS n;
         INSERT INTO public.signals (id, source, source_id, type, severity, payload, issue_id)
         SELECT 's' || left(md5('s' || n), 23), 'sentry', n::text, 'created', 'high', '{{}}', 'i' || left(md5('i' || n), 23)
         FROM generate_series(1, {rows}) AS n;
         ANALYZE ingest.deliveries, public.issues, public.signals;"
    )
}
