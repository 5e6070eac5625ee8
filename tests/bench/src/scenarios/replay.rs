//! How fast a replay finds out that nothing is missing, against reading the stream and doing nothing with it.
//!
//! All deliveries were stored by a worker before. `worker replay --dry-run` then reads each message, looks its id up in
//! the ledger, and compares what it says with what is stored; it is timed as a person would, the whole process. Alone,
//! an ordered pull consumer of async-nats reads the same messages, as many at a time as it asks for by default.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::jetstream::consumer::pull::OrderedConfig;
use futures_util::TryStreamExt as _;

use super::persist::by_worker;
use super::{Bench, ratios, spread};
use crate::bodies::Deliveries;
use crate::report::{Goal, Line, Report};
use crate::servers::{Database, Nats, worker_command};
use crate::stream::Stream;

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let (nats, database) = (Nats::start("").await?, Database::start().await?);
    let url = database.empty(&bench.built).await?;
    let stream = Stream::on(&nats.url()).await?;
    let count = bench.size(2000, 500_000);
    stream.publish(&Arc::new(Deliveries::of_size(2 << 10, 7)), count).await?;
    by_worker(bench, &nats, &stream, &url, count).await?;
    let (mut alone, mut replays) = (vec![], vec![]);
    for _ in 0..bench.rounds() {
        alone.push(count as f64 / read(&stream, count).await?.as_secs_f64());
        replays.push(count as f64 / replay(bench, &nats, &url, count).await?.as_secs_f64());
    }
    report.note(format!("2 KB, async-nats reading alone: {}/s", spread(alone.iter().copied())));
    report.note(format!("2 KB, worker replay --dry-run: {}/s", spread(replays.iter().copied())));
    let what = format!("replay --dry-run of {count} / reading them");
    report.line(Line::new(what, Goal::AtLeast(0.6), "x", ratios(replays, alone)));
    Ok(report)
}

async fn read(stream: &Stream, count: u64) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    let config = OrderedConfig { filter_subject: "signals.sentry.*".into(), ..OrderedConfig::default() };
    let consumer = stream.stream().await?.create_consumer(config).await?;
    let mut messages = consumer.messages().await?;
    for read in 0..count {
        messages.try_next().await?.with_context(|| format!("the stream ended after {read} messages"))?;
    }
    Ok(begin.elapsed())
}

async fn replay(bench: &Bench, nats: &Nats, url: &str, count: u64) -> anyhow::Result<Duration> {
    let mut command = tokio::process::Command::from(worker_command(&bench.built, &nats.url(), url));
    command.args(["replay", "--dry-run"]).stdin(Stdio::null()).kill_on_drop(true);
    let begin = Instant::now();
    let output = command.output().await?;
    let took = begin.elapsed();
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "worker replay --dry-run failed: {told}{errors}");
    let there = told.lines().find(|line| line.contains("already there")).context("it does not say what is there")?;
    let digits: String = there.chars().filter(char::is_ascii_digit).collect();
    ensure!(digits == count.to_string(), "not all are there: {told}");
    Ok(took)
}
