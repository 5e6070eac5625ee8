//! What is measured, a file a question.

pub(crate) mod accept;
pub(crate) mod canonical;
pub(crate) mod drain;
pub(crate) mod latency;
pub(crate) mod memory;
pub(crate) mod outage;
pub(crate) mod persist;
pub(crate) mod replay;
pub(crate) mod tail;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bodies::Deliveries;
use crate::load;
use crate::load::closed::Load;
use crate::process;
use crate::programs::Built;
use crate::report::short;
use crate::servers::Server;
use crate::stats::Rounds;

/// What every scenario gets.
#[derive(Debug, Clone)]
pub(crate) struct Bench {
    pub(crate) built: Built,
    /// Small and short, to show that everything runs. The numbers then mean nothing.
    pub(crate) quick: bool,
}

/// Answers without which no rate is told.
const FEWEST: u64 = 32;
/// Connections of the load, unless a scenario says otherwise.
pub(crate) const CONNECTIONS: usize = 32;

impl Bench {
    /// One value for `--quick`, another in earnest.
    pub(crate) fn size<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// How often each pair is measured, in turns.
    pub(crate) fn rounds(&self) -> usize {
        self.size(1, 5)
    }
}

/// Throughput of a server under a closed loop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Deliveries accepted a second.
    pub(crate) rate: f64,
    /// CPU of the server for each, in microseconds, where the system tells.
    pub(crate) cpu_us: Option<f64>,
    /// Memory of the server, in MB: the most it ever took, unless a scenario says otherwise.
    pub(crate) rss: Option<f64>,
}

/// Loads a server for a while and looks at the part after `warm_up`.
///
/// # Errors
/// Where any answer is not 202.
pub(crate) async fn throughput(
    server: &Server,
    deliveries: &Arc<Deliveries>,
    connections: usize,
    warm_up: Duration,
    measure: Duration,
) -> anyhow::Result<Sample> {
    let lasts = async {
        tokio::time::sleep(measure).await;
        Ok(())
    };
    throughput_while(server, deliveries, connections, warm_up, lasts).await
}

/// The same for as long as `lasts` takes.
///
/// # Errors
/// Where any answer is not 202, and those of `lasts`.
pub(crate) async fn throughput_while(
    server: &Server,
    deliveries: &Arc<Deliveries>,
    connections: usize,
    warm_up: Duration,
    lasts: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<Sample> {
    let load = Load::start(server.port, deliveries, connections, None);
    tokio::time::sleep(warm_up).await;
    let before = Moment::now(server, &load);
    lasts.await?;
    enough(server, &load, before).await?;
    let after = Moment::now(server, &load);
    load::all_accepted(&load.stop().await?)?;
    Ok(after.since(before, process::peak_rss(server.pid())))
}

/// Waits until there are answers enough to tell a rate: on a machine that is busy with other things, the little time of
/// a quick run may pass without any.
///
/// # Errors
/// Where there are none.
pub(crate) async fn enough(server: &Server, load: &Load, before: Moment) -> anyhow::Result<()> {
    server.until("answering", async || Ok(load.answered() >= before.answered + FEWEST)).await
}

/// What the counters say at one time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    at: Instant,
    answered: u64,
    cpu: Option<Duration>,
}

impl Moment {
    pub(crate) fn now(server: &Server, load: &Load) -> Moment {
        Moment { at: Instant::now(), answered: load.answered(), cpu: process::cpu(server.pid()) }
    }

    pub(crate) fn seconds_since(self, before: Moment) -> f64 {
        (self.at - before.at).as_secs_f64()
    }

    /// What happened between two moments.
    pub(crate) fn since(self, before: Moment, rss: Option<f64>) -> Sample {
        let count = (self.answered - before.answered) as f64;
        let cpu = self.cpu.zip(before.cpu).map(|(after, before)| after.saturating_sub(before).as_secs_f64() * 1e6);
        Sample { rate: count / self.seconds_since(before), cpu_us: cpu.map(|cpu| cpu / count), rss }
    }
}

/// The absolute numbers of several rounds, as a sentence.
pub(crate) fn absolutes(name: &str, samples: &[Sample]) -> String {
    let mut text = format!("{name}: {}/s", spread(samples.iter().map(|sample| sample.rate)));
    if let Some(cpu) = samples.iter().map(|sample| sample.cpu_us).collect::<Option<Vec<_>>>() {
        text += &format!(", {} us CPU each", spread(cpu));
    }
    if let Some(rss) = samples.iter().map(|sample| sample.rss).collect::<Option<Vec<_>>>() {
        text += &format!(", RSS {} MB", spread(rss));
    }
    text
}

/// `median (lowest .. highest)`
pub(crate) fn spread(values: impl IntoIterator<Item = f64>) -> String {
    let rounds = Rounds::of(values);
    match rounds.count() {
        1 => short(rounds.median()),
        _ => format!("{} ({} .. {})", short(rounds.median()), short(rounds.min()), short(rounds.max())),
    }
}

/// `a[i] / b[i]`
pub(crate) fn ratios(a: impl IntoIterator<Item = f64>, b: impl IntoIterator<Item = f64>) -> Rounds {
    Rounds::of(a.into_iter().zip(b).map(|(a, b)| a / b))
}
