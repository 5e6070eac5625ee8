//! What drills have in common: a load of deliveries, and what must have become of it.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use world::{Connection, Post, Setup, World};

use crate::{fixture, setup};

/// The short form's number, or the long one's.
pub(crate) fn size(short: usize, long: usize) -> usize {
    if std::env::var("DRILLS").is_ok_and(|form| form == "long") { long } else { short }
}

/// A world in which what has no receipt is looked after soon.
pub(crate) fn watchful() -> Setup {
    setup().gateway("GATEWAY_CONFIRM_AFTER", "1s")
}

/// Senders that post one delivery after the other, until they are told to stop, and remember every 202.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    senders: Vec<JoinHandle<Sent>>,
}

/// What senders saw.
#[derive(Default)]
pub(crate) struct Sent {
    pub(crate) accepted: Vec<String>,
    /// Answers of 503 with a `Retry-After`; there must be no others.
    pub(crate) refused: usize,
    /// Connections that broke, or could not be made.
    pub(crate) broken: usize,
    pub(crate) took: Vec<Duration>,
}

impl Load {
    /// Begins to send; each sender keeps a connection as long as it holds.
    pub(crate) fn start(world: &World, senders: usize) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let sender = |_| tokio::spawn(send_until(world.port(), stop.clone()));
        Load { senders: (0..senders).map(sender).collect(), stop }
    }

    /// Ends it, once what is under way is answered.
    pub(crate) async fn stop(self) -> Sent {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Sent::default();
        for sender in self.senders {
            let sent = sender.await.unwrap();
            all.accepted.extend(sent.accepted);
            all.took.extend(sent.took);
            all.refused += sent.refused;
            all.broken += sent.broken;
        }
        all
    }
}

async fn send_until(port: u16, stop: Arc<AtomicBool>) -> Sent {
    let mut sent = Sent::default();
    let mut connection = None;
    while !stop.load(Ordering::Relaxed) {
        let mut open = match connection.take() {
            Some(open) => open,
            None => match Connection::open(port).await {
                Ok(open) => open,
                Err(_) => {
                    sent.broken += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await; // the gateway is being started
                    continue;
                }
            },
        };
        let begin = Instant::now();
        match open.send(&Post::signed(fixture!("issue_created"))).await {
            Ok(answer) if answer.status == 202 => {
                sent.took.push(begin.elapsed());
                sent.accepted.push(answer.accepted());
                connection = Some(open);
            }
            Ok(answer) => {
                assert_eq!(answer.status, 503, "{answer:?}");
                assert!(answer.headers.contains_key("retry-after"), "{answer:?}");
                sent.refused += 1;
                connection = Some(open);
                tokio::time::sleep(Duration::from_millis(5)).await; // refusing alone must not fill the machine
            }
            Err(_) => sent.broken += 1,
        }
    }
    sent
}

/// Posts that many deliveries; each must be taken.
pub(crate) async fn post(world: &World, count: usize) -> Vec<String> {
    let mut connection = Connection::open(world.port()).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(connection.send(&Post::signed(fixture!("issue_created"))).await.unwrap().accepted());
    }
    ids
}

/// Waits until each of these is one signal and one issue, the gateway knows of it, and nothing is stored that nobody sent
/// (what was on disk and not answered when the gateway was killed may be there, too: `unanswered` at most).
pub(crate) async fn exactly_once(world: &World, accepted: &[String], unanswered: usize) {
    world.until_confirmed().await;
    world.all_acknowledged().await; // what a full journal let go of is in the stream, and nobody else waits for it
    let rows = world.query("SELECT l.delivery_id FROM ingest.deliveries l WHERE l.state = 'stored'", &[]).await;
    let stored: HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let missing: Vec<_> = accepted.iter().filter(|id| !stored.contains(*id)).collect();
    assert!(missing.is_empty(), "{} of {} are missing: {missing:?}", missing.len(), accepted.len());
    let extra = stored.len() - accepted.iter().collect::<HashSet<_>>().len();
    assert!(extra <= unanswered, "{extra} deliveries are stored that nobody was answered");
    let sql = "SELECT (SELECT count(*) FROM signals), (SELECT count(*) FROM issues), (SELECT count(*) FROM ingest.deliveries)";
    let row = &world.query(sql, &[]).await[0];
    let all = i64::try_from(stored.len()).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)), (all, all, all), "each once");
}

/// Of the times that senders saw.
pub(crate) fn percentile(took: &mut [Duration], percent: usize) -> Duration {
    took.sort();
    took[(took.len() - 1) * percent / 100]
}

/// How often the gateway published again, by cause.
pub(crate) async fn repeats(world: &World) -> f64 {
    let text = String::from_utf8(world.gateway.ops("/metrics").await.body.to_vec()).unwrap();
    let lines = text.lines().filter(|line| line.starts_with("gateway_repeats_total{"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// A folder as it is, in place of another.
pub(crate) fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}
