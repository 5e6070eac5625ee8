//! How fast the canonical form of a body is made, against what one would otherwise make it with.
//!
//! On the same bodies, which are written as Sentry writes them: by the gateway; by reading into serde_json's `Value`
//! and writing that (which gives another text: keys sorted, duplicates gone, numbers as Rust prints them; floats read
//! exactly, as this workspace has it); and by Node, whose `JSON.stringify(JSON.parse(...))` the form is. Node is timed
//! inside Node, warm, from bytes to bytes as a server has them. One thread each.

use std::hint::black_box;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use gateway::canonical::canonical;
use local::Scratch;
use tokio::process::Command;

use super::{Bench, ratios, spread};
use crate::bodies::Deliveries;
use crate::report::{Goal, Line, Report};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/canonical.mjs");
/// How many bodies go around.
const BODIES: u64 = 64;

pub(crate) async fn run(bench: &Bench) -> anyhow::Result<Report> {
    let mut report = Report::default();
    let folder = Scratch::new("bench-canonical")?;
    let node = node().await;
    if node.is_none() {
        report.note("Node: SKIPPED, there is no `node` on PATH");
    }
    let span = bench.size(Duration::from_millis(50), Duration::from_secs(1));
    for kb in [16, 128] {
        let deliveries = Arc::new(Deliveries::of_size(kb << 10, 8));
        let bodies: Vec<Bytes> = (0..BODIES).map(|n| deliveries.body(n)).collect();
        let file = folder.path().join(format!("{kb}.jsonl"));
        std::fs::write(&file, bodies.join(&b'\n'))?;
        let (mut ours, mut values, mut nodes) = (vec![], vec![], vec![]);
        for _ in 0..bench.rounds() {
            ours.push(timed(&bodies, span, |body| canonical(body).map(|form| form.len()).unwrap_or(0)));
            values.push(timed(&bodies, span, |body| {
                let value: Option<serde_json::Value> = serde_json::from_slice(body).ok();
                value.and_then(|value| serde_json::to_vec(&value).ok()).map_or(0, |form| form.len())
            }));
            if let Some(version) = &node {
                nodes.push(in_node(&file, span).await.with_context(|| format!("Node {version}"))?);
            }
        }
        report.note(format!("canonical form of {kb} KB: {} MB/s", spread(ours.iter().copied())));
        report.note(format!("serde_json::Value of {kb} KB: {} MB/s", spread(values.iter().copied())));
        let line = |against, goal, reached| {
            Line::new(format!("canonical form, {kb} KB / {against}"), Goal::AtLeast(goal), "x", reached)
        };
        report.line(line("serde_json::Value", 5.0, ratios(ours.iter().copied(), values)));
        if let Some(version) = &node {
            report.note(format!("Node {version}, {kb} KB: {} MB/s", spread(nodes.iter().copied())));
            report.line(line("Node", 4.0, ratios(ours, nodes)));
        }
    }
    Ok(report)
}

/// MB of bodies a second.
fn timed(bodies: &[Bytes], span: Duration, form: impl Fn(&[u8]) -> usize) -> f64 {
    let (begin, mut bytes) = (Instant::now(), 0);
    while begin.elapsed() < span {
        for body in bodies {
            assert!(black_box(form(black_box(body))) > 0, "a body of the benchmark is JSON");
            bytes += body.len();
        }
    }
    bytes as f64 / begin.elapsed().as_secs_f64() / 1e6
}

/// Its version, where it is there.
async fn node() -> Option<String> {
    let output = Command::new("node").arg("--version").stdin(Stdio::null()).output().await.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

async fn in_node(bodies: &Path, span: Duration) -> anyhow::Result<f64> {
    let mut command = Command::new("node");
    command.arg(SCRIPT).arg(bodies).arg(span.as_millis().to_string()).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
}
