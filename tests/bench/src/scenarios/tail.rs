//! The time that the slowest answers take when 32 connections send as fast as they are answered.
//!
//! Gateway and broker share the machine's disk: the gateway syncs each batch, the broker writes what is published. Beside
//! it a gateway that most people would write: it answers when JetStream has acknowledged, and syncs nothing. Both in turns,
//! each with a broker of its own.
//!
//! A connection that waits for a slow answer sends nothing meanwhile, so the closed loop sees a stall once where many
//! senders would have. The histogram is corrected for that: an answer that took n mean times counts as n answers that
//! waited for one time less each (HdrHistogram, `clone_correct`).

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, CONNECTIONS, ratios, spread};
use crate::bodies::Deliveries;
use crate::load;
use crate::load::closed::Load;
use crate::report::{Goal, Line, Report};
use crate::servers::{Nats, Server};
use crate::stream::MAX_BYTES;

/// Quantiles that are told.
const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("longest", 1.0)];

/// Milliseconds at each of [`QUANTILES`], and deliveries a second.
struct Sample {
    ms: [f64; QUANTILES.len()],
    rate: f64,
}

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let deliveries = Arc::new(Deliveries::of_size(16 << 10, 6));
    let (mut gateway, mut minimal) = (vec![], vec![]);
    for _ in 0..bench.rounds() {
        let nats = Nats::start("").await?;
        let server = Server::minimal_gateway(&bench.built, &nats.url()).await?;
        minimal.push(sample(bench, &server, &deliveries).await?);
        drop((server, nats));
        let nats = Nats::start("").await?;
        let server = Server::gateway(&bench.built, &nats.url(), &[("NATS_MAX_BYTES", MAX_BYTES)]).await?;
        gateway.push(sample(bench, &server, &deliveries).await?);
    }
    for (name, samples) in [("gateway", &gateway), ("a gateway that waits for JetStream", &minimal)] {
        let at = |place: usize| spread(samples.iter().map(|sample| sample.ms[place]));
        let told: Vec<_> = (0..).zip(QUANTILES).map(|(place, (name, _))| format!("{name} {} ms", at(place))).collect();
        let rate = spread(samples.iter().map(|sample| sample.rate));
        report.note(format!("16 KB, 32 connections, {name}: {rate}/s, {}", told.join(", ")));
    }
    for (place, (name, _)) in (0..).zip(QUANTILES).take(3).skip(1) {
        let ms = |samples: &[Sample]| samples.iter().map(|sample| sample.ms[place]).collect::<Vec<_>>();
        let reached = ratios(ms(&gateway), ms(&minimal));
        let what = format!("an answer at saturation, {name} / a gateway that waits for JetStream");
        report.line(Line::new(what, Goal::AtMost(3.0), "x", reached));
    }
    Ok(report)
}

async fn sample(bench: &Bench, server: &Server, deliveries: &Arc<Deliveries>) -> anyhow::Result<Sample> {
    let measure = bench.size(Duration::from_millis(500), Duration::from_secs(15));
    let load = Load::start(server.port, deliveries, CONNECTIONS, None);
    tokio::time::sleep(measure).await;
    let ended = load.end().await?;
    let count = load::all_accepted(&ended.answers)?;
    let rate = count as f64 / measure.as_secs_f64();
    let mean = Duration::from_secs_f64(CONNECTIONS as f64 / rate);
    let corrected = ended.took.clone_correct(u64::try_from(mean.as_nanos())?);
    let ms = QUANTILES.map(|(_, quantile)| corrected.value_at_quantile(quantile) as f64 / 1e6);
    Ok(Sample { ms, rate })
}
