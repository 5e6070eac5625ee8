//! How fast a backlog goes to the stream once NATS is back, against async-nats publishing from memory.
//!
//! The gateway takes the backlog while the broker is away; then the broker is started. Both are timed by the stream's
//! own clock, from its first message to its last: when the gateway notices that the broker is back is a note, not part
//! of the rate. Alone, async-nats publishes the same messages with as many in flight, from bodies that lie in memory;
//! the gateway reads them from its journal, and marks each as published. Before both, twice as much memory is used once
//! as the stream will take (see [`process::warm_memory`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use local::ports;

use super::{Bench, CONNECTIONS, ratios, spread};
use crate::bodies::Deliveries;
use crate::load;
use crate::load::closed::Load;
use crate::process;
use crate::report::{Goal, Line, Report};
use crate::servers::{Nats, Server};
use crate::stream::{MAX_BYTES, Stream};

/// Bytes of a body.
const SIZE: usize = 16 << 10;
/// How long the backlog may take to go.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let deliveries = Arc::new(Deliveries::of_size(SIZE, 6));
    let count = bench.size(2000, 200_000);
    let (mut alone, mut drained, mut noticed, mut cpu) = (vec![], vec![], vec![], vec![]);
    for _ in 0..bench.rounds() {
        process::warm_memory(2 * count * SIZE as u64);
        let nats = Nats::start("").await?;
        let stream = Stream::on(&nats.url()).await?;
        stream.publish(&deliveries, count).await?;
        let filled = stream.filled().await?;
        ensure!(filled.messages == count, "{} of {count} messages are on the stream", filled.messages);
        alone.push(filled.rate());
        drop((stream, nats));
        let drain = drain(bench, &deliveries, count).await?;
        drained.push(drain.rate);
        noticed.push(drain.noticed.as_secs_f64());
        cpu.extend(drain.cpu_us);
    }
    report.note(format!("16 KB, async-nats alone: {}/s", spread(alone.iter().copied())));
    let used = if cpu.is_empty() { String::new() } else { format!(", {} us CPU each", spread(cpu)) };
    report.note(format!("16 KB, gateway, a backlog of {count}: {}/s{used}", spread(drained.iter().copied())));
    report.note(format!("the gateway's first message came {} s after NATS was back", spread(noticed)));
    let what = format!("drain {count} x 16 KB / async-nats alone");
    report.line(Line::new(what, Goal::AtLeast(0.7), "x", ratios(drained, alone)));
    Ok(report)
}

struct Drain {
    rate: f64,
    noticed: Duration,
    cpu_us: Option<f64>,
}

async fn drain(bench: &Bench, deliveries: &Arc<Deliveries>, count: u64) -> anyhow::Result<Drain> {
    let port = ports::free()?;
    let url = format!("nats://127.0.0.1:{port}");
    let gateway = Server::gateway(&bench.built, &url, &[("NATS_MAX_BYTES", MAX_BYTES)]).await?;
    let load = Load::start(gateway.port, deliveries, CONNECTIONS, Some(count));
    load::all_accepted(&load.finish().await?)?;
    ensure!(gateway.backlog().await? == count as f64, "not all that was accepted is in the journal");
    process::warm_memory(2 * count * SIZE as u64);
    let cpu = process::cpu(gateway.pid());
    let nats = Nats::start_at(port).await?;
    let back = Instant::now();
    let begun = async || Ok(gateway.backlog().await? < count as f64);
    gateway.until("publishing", begun).await?;
    let noticed = back.elapsed();
    gateway.until_within(PATIENCE, "drained", async || Ok(gateway.backlog().await? == 0.0)).await?;
    let cpu = process::cpu(gateway.pid()).zip(cpu).map(|(after, before)| after.saturating_sub(before));
    let filled = Stream::on(&nats.url()).await?.filled().await.context("the stream is not there")?;
    ensure!(filled.messages == count, "{} messages are on the stream, not {count}", filled.messages);
    Ok(Drain { rate: filled.rate(), noticed, cpu_us: cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / count as f64) })
}
