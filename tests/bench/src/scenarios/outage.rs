//! What callers notice of an outage of NATS: nothing, it is promised.
//!
//! The same gateway, the same load at half of what it can take with the broker there (found first, in a closed loop
//! that holds the backlog down); its p99 with the broker stopped against its p99 with the broker there. An open loop: a
//! gateway that stalls pays for what should have been sent meanwhile. Each round has a fresh broker and a fresh
//! gateway.

use std::sync::Arc;
use std::time::Duration;

use super::accept::sustained;
use super::{Bench, CONNECTIONS, ratios, spread};
use crate::bodies::Deliveries;
use crate::load;
use crate::load::open::{self, Plan};
use crate::report::{Goal, Line, Report, short};
use crate::servers::{Nats, Server};
use crate::stream::MAX_BYTES;

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let deliveries = Arc::new(Deliveries::of_size(16 << 10, 5));
    let span = bench.size(Duration::from_millis(500), Duration::from_secs(10));
    let most = sustained(bench, &deliveries, span).await?.sample;
    let plan = Plan {
        rate: most.rate / 2.0,
        connections: u32::try_from(CONNECTIONS)?,
        warm_up: bench.size(Duration::from_millis(100), Duration::from_secs(2)),
        measure: bench.size(Duration::from_millis(500), Duration::from_secs(10)),
    };
    let (mut up, mut down) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in 0..bench.rounds() {
        for (away, found) in [(false, &mut up), (true, &mut down)] {
            let nats = Nats::start("").await?;
            let server = Server::gateway(&bench.built, &nats.url(), &[("NATS_MAX_BYTES", MAX_BYTES)]).await?;
            if away {
                nats.server.stop().await?;
            }
            let latencies = open::run(server.port, &deliveries, plan).await?;
            load::all_accepted(&latencies.answers)?;
            for (values, quantile) in found.iter_mut().zip([0.5, 0.99]) {
                values.push(latencies.ms(quantile));
            }
        }
    }
    report.note(format!("16 KB at {}/s, half of the most with NATS there", short(plan.rate)));
    for (name, [p50, p99]) in [("there", &up), ("stopped", &down)] {
        let (p50, p99) = (spread(p50.iter().copied()), spread(p99.iter().copied()));
        report.note(format!("NATS {name}: p50 {p50} ms, p99 {p99} ms"));
    }
    let [_, up] = up;
    let [_, down] = down;
    report.line(Line::new("accept p99, NATS stopped / NATS there", Goal::AtMost(1.2), "x", ratios(down, up)));
    Ok(report)
}
