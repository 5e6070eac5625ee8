//! How many deliveries a second are accepted, against servers that do less.
//!
//! **NATS away**: the gateway, journal synced, against a bare hyper server that reads the body and forgets it, and
//! against the same with the raw signature checked. Same hyper, same runtime, same load, one after the other in turns,
//! each time a fresh process. What the gateway does more: the signature, ids, limits, and one synced write a batch of
//! requests.
//!
//! **Publishing at the same time**: with a broker that has no worker behind it. A gateway that merely let its backlog
//! grow would accept as fast as without a broker, and prove nothing. So the load holds back while more than [`BACKLOG`]
//! deliveries wait to be published, and the rate over the whole time is one that could go on for ever. For the same
//! reason the stream's oldest messages are purged all the time, as workers do near its size limit: a virtual machine
//! whose host takes back unused memory pays for each page by which the broker's files grow beyond two or three
//! gigabytes, and who publishes most comes there first. Beside it the usual alternative, an aiohttp server that answers
//! when nats-py has the broker's acknowledgement, with the broker as it comes (it syncs every two minutes: an acknowledged
//! message may be lost) and with one that syncs each message, which is what a 202 of the gateway promises. It has the same
//! time, in which a broker's work for a message grows by a quarter (its garbage collector goes over what the duplicate window
//! remembers), and its stream is purged alike.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Bench, CONNECTIONS, Moment, Sample, absolutes, enough, ratios, spread, throughput, throughput_while};
use crate::bodies::Deliveries;
use crate::load;
use crate::load::closed::Load;
use crate::process;
use crate::python::Python;
use crate::report::{Goal, Line, Report};
use crate::servers::{Nats, Server, no_nats};
use crate::stats::Rounds;
use crate::stream::{MAX_BYTES, Stream};

/// Body sizes, and the goal for each: at least so many times the bare server's rate.
const SIZES: [(usize, f64); 3] = [(2 << 10, 0.55), (16 << 10, 0.65), (128 << 10, 0.45)];
/// How the alternative's broker keeps what it acknowledges, its configuration, and the goal against it.
const SYNC: [(&str, &str, f64); 2] =
    [("NATS syncs every 2 min", "", 2.0), ("NATS syncs each message", "sync_interval: always", 8.0)];
/// What a journal may take while nothing leaves it: more than the fastest disk takes in the time of a measurement. (Its
/// segments are as large as with the default.)
const ROOM: &str = "40GiB";
/// From so many unpublished deliveries on, the load holds back.
const BACKLOG: f64 = 10_000.0;
/// How often the backlog is looked at. (Each look has the gateway write all its metrics.)
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Messages that the stream keeps, and how often it is cut back to them.
const KEPT: u64 = 100_000;
const PURGE_EVERY: Duration = Duration::from_millis(500);

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    for (size, goal) in SIZES {
        journalled(bench, size, goal, &mut report).await?;
    }
    published(bench, &mut report).await?;
    Ok(report)
}

async fn journalled(bench: &Bench, size: usize, goal: f64, report: &mut Report) -> anyhow::Result<()> {
    let deliveries = Arc::new(Deliveries::of_size(size, 1));
    let (warm_up, measure) = times(bench);
    let (mut bare, mut verifying, mut gateway) = (vec![], vec![], vec![]);
    for _ in 0..bench.rounds() {
        for (samples, verify) in [(&mut bare, false), (&mut verifying, true)] {
            let server = Server::bare_hyper(&bench.built, verify).await?;
            samples.push(throughput(&server, &deliveries, CONNECTIONS, warm_up, measure).await?);
        }
        let server = Server::gateway(&bench.built, &no_nats()?, &[("GATEWAY_JOURNAL_MAX_BYTES", ROOM)]).await?;
        gateway.push(throughput(&server, &deliveries, CONNECTIONS, warm_up, measure).await?);
    }
    let kb = size >> 10;
    report.note(absolutes(&format!("{kb} KB, bare hyper"), &bare));
    report.note(absolutes(&format!("{kb} KB, bare hyper + raw HMAC"), &verifying));
    report.note(absolutes(&format!("{kb} KB, gateway, NATS away"), &gateway));
    let reached = ratios(rates(&gateway), rates(&bare));
    report.line(Line::new(format!("accept {kb} KB, NATS away / bare hyper"), Goal::AtLeast(goal), "x", reached));
    Ok(())
}

async fn published(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let deliveries = Arc::new(Deliveries::of_size(16 << 10, 2));
    let (warm_up, measure) = times(bench);
    let span = bench.size(Duration::from_millis(500), Duration::from_secs(30));
    let python = Python::find_or_fetch().await;
    if let Err(error) = &python {
        report.note(format!("aiohttp + nats-py: SKIPPED, they are not here and could not be fetched: {error:#}"));
    }
    let (mut bare, mut gateway, mut backlogs, mut broker) = (vec![], vec![], vec![], vec![]);
    let mut python_samples = SYNC.map(|_| vec![]);
    for _ in 0..bench.rounds() {
        let server = Server::bare_hyper(&bench.built, false).await?;
        bare.push(throughput(&server, &deliveries, CONNECTIONS, warm_up, measure).await?);
        drop(server);
        let sustained = sustained(bench, &deliveries, span).await?;
        gateway.push(sustained.sample);
        backlogs.push(sustained.longest);
        broker.extend(sustained.broker_us);
        for (samples, (_, jetstream, _)) in python_samples.iter_mut().zip(SYNC) {
            let Ok(python) = &python else { continue };
            samples.push(alternative(python, jetstream, &deliveries, span).await?);
        }
    }
    report.note(absolutes("16 KB, bare hyper", &bare));
    report.note(absolutes("16 KB, gateway, publishing", &gateway));
    if !broker.is_empty() {
        report.note(format!("16 KB, the broker behind the gateway: {} us CPU each", spread(broker)));
    }
    report.note(format!("the longest backlog under that load was {} deliveries", Rounds::of(backlogs).max()));
    let reached = ratios(rates(&gateway), rates(&bare));
    report.line(Line::new("accept and publish 16 KB / bare hyper", Goal::AtLeast(0.40), "x", reached));
    for (samples, (sync, _, goal)) in python_samples.iter().zip(SYNC).filter(|(samples, _)| !samples.is_empty()) {
        report.note(absolutes(&format!("16 KB, aiohttp + nats-py, {sync}"), samples));
        let reached = ratios(rates(&gateway), rates(samples));
        let what = format!("accept and publish 16 KB / aiohttp + nats-py, {sync}");
        report.line(Line::new(what, Goal::AtLeast(goal), "x", reached));
    }
    Ok(())
}

/// What a gateway does that accepts and publishes.
pub(super) struct Sustained {
    /// Deliveries accepted and published; the CPU is the gateway's, for each accepted.
    pub(super) sample: Sample,
    /// Its longest backlog.
    longest: f64,
    /// CPU of the broker for each accepted, in microseconds, where the system tells.
    broker_us: Option<f64>,
}

/// Has a gateway accept and publish for that time.
pub(super) async fn sustained(
    bench: &Bench,
    deliveries: &Arc<Deliveries>,
    span: Duration,
) -> anyhow::Result<Sustained> {
    let nats = Nats::start("").await?;
    // More than is sent, so that the stream is not what ends it.
    let server = Server::gateway(&bench.built, &nats.url(), &[("NATS_MAX_BYTES", MAX_BYTES)]).await?;
    server.until("publishing", async || Ok(server.metric("gateway_publish_seconds_count").await? >= 0.0)).await?;
    let stream = Stream::on(&nats.url()).await?;
    let load = Load::start(server.port, deliveries, CONNECTIONS, None);
    let (before, mut longest) = (Moment::now(&server, &load), 0_f64);
    let (answered, broker) = (load.answered(), process::cpu(nats.server.pid()));
    let hold_back = async || {
        let backlog = server.backlog().await?;
        load.hold(backlog > BACKLOG);
        longest = longest.max(backlog);
        Ok(())
    };
    wait_and_purge(span, &stream, hold_back).await?;
    load.hold(false);
    enough(&server, &load, before).await?;
    let after = Moment::now(&server, &load);
    let broker = process::cpu(nats.server.pid()).zip(broker).map(|(after, before)| after.saturating_sub(before));
    let broker_us = broker.map(|used| used.as_secs_f64() * 1e6 / (load.answered() - answered) as f64);
    let unpublished = server.backlog().await?;
    load::all_accepted(&load.stop().await?)?;
    let mut sample = after.since(before, process::peak_rss(server.pid()));
    sample.rate -= unpublished / after.seconds_since(before); // what was merely put off does not count
    Ok(Sustained { sample, longest, broker_us })
}

/// Has the usual alternative accept, which is to publish, for that time.
async fn alternative(
    python: &Python,
    jetstream: &str,
    deliveries: &Arc<Deliveries>,
    span: Duration,
) -> anyhow::Result<Sample> {
    let nats = Nats::start(jetstream).await?;
    let server = python.gateway(&nats.url()).await?;
    let stream = Stream::of_others(&nats.url()).await?;
    let lasts = wait_and_purge(span, &stream, async || Ok(()));
    throughput_while(&server, deliveries, CONNECTIONS, Duration::ZERO, lasts).await
}

/// Lets that time pass, in which the stream is cut back now and then, and `look` is called more often.
async fn wait_and_purge(
    span: Duration,
    stream: &Stream,
    mut look: impl AsyncFnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let end = Instant::now() + span;
    let mut purge_at = Instant::now() + PURGE_EVERY;
    while Instant::now() < end {
        look().await?;
        if Instant::now() >= purge_at {
            stream.keep(KEPT).await?;
            purge_at = Instant::now() + PURGE_EVERY;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

fn times(bench: &Bench) -> (Duration, Duration) {
    let ms = Duration::from_millis;
    bench.size((ms(50), ms(200)), (ms(500), ms(3000)))
}

fn rates(samples: &[Sample]) -> impl Iterator<Item = f64> {
    samples.iter().map(|sample| sample.rate)
}
