//! Memory does not grow with what waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use world::{Connection, Post, World};

use crate::load::size;
use crate::setup;

/// What a gateway may hold in memory.
const LIMIT_KIB: u64 = 64 * 1024;

#[tokio::test]
async fn a_million_deliveries_that_wait_for_nats_fit_into_64_mb_of_memory() {
    let count = size(20_000, 1_000_000);
    // A log line a delivery would be most of the work.
    let quiet = setup().gateway("RUST_LOG", "info").worker("RUST_LOG", "info");
    let mut world = quiet.gateway("GATEWAY_CONFIRM_AFTER", "10m").start().await;
    world.nats.kill().await;
    let begin = Instant::now();
    post(&world, count).await;
    println!("{count} deliveries of 2 KB journalled in {:?}; {}", begin.elapsed(), memory(&world));
    assert!(world.metric("gateway_deliveries_unconfirmed").await as usize == count);
    assert_fits(&world);
    world.nats.start_again().await.unwrap();
    let begin = Instant::now();
    let mut told = begin;
    loop {
        let left = world.metric("gateway_deliveries_unconfirmed").await;
        assert_fits(&world);
        if left == 0.0 {
            break;
        }
        if told.elapsed() > Duration::from_secs(10) {
            println!("{left} left after {:?}; {}", begin.elapsed(), memory(&world));
            told = Instant::now();
        }
        assert!(begin.elapsed() < Duration::from_secs(600), "{left} are not confirmed");
        tokio::time::sleep(Duration::from_millis(100)).await; // between two looks
    }
    println!("stored and confirmed in {:?}; {}", begin.elapsed(), memory(&world));
    let sql = "SELECT (SELECT count(*) FROM signals) = $1 AND (SELECT count(DISTINCT id) FROM signals) = $1";
    let row = &world.query(sql, &[&i64::try_from(count).unwrap()]).await[0];
    assert!(row.get::<_, bool>(0), "each is there once");
}

/// Posts that many deliveries of 2 KB over a few connections; each must be taken.
async fn post(world: &World, count: usize) {
    let left = Arc::new(AtomicUsize::new(count));
    let port = world.port();
    let body = format!(r#"{{"data":{{"issue":{{"id":"1","title":"t","culprit":"{}"}}}}}}"#, "x".repeat(2000));
    let sender = |_| {
        let (left, body) = (left.clone(), body.clone());
        tokio::spawn(async move {
            let mut connection = Connection::open(port).await.unwrap();
            let take = |left: usize| left.checked_sub(1);
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
                connection.send(&Post::signed(body.clone())).await.unwrap().accepted();
            }
        })
    };
    for sender in (0..64).map(sender).collect::<Vec<_>>() {
        sender.await.unwrap();
    }
}

/// Lines of `/proc/PID/status`: what the gateway holds now, and the most it ever held.
fn memory(world: &World) -> String {
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.gateway.process().pid())).unwrap();
    let lines = status.lines().filter(|line| line.starts_with("VmRSS") || line.starts_with("VmHWM"));
    lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(", ")
}

fn assert_fits(world: &World) {
    let memory = memory(world);
    let most =
        memory.split(", ").find_map(|line| line.strip_prefix("VmHWM: ")?.strip_suffix(" kB")?.parse::<u64>().ok());
    assert!(most.unwrap() < LIMIT_KIB, "{memory}");
}
