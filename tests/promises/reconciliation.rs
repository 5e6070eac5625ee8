//! Entries without a receipt are looked after: in bounded memory, soon, and without copies of what the stream has already.

use std::time::Duration;

use async_nats::jetstream::stream;
use futures_util::future::join_all;
use serde_json::Value;
use world::{Connection, Post, World, eventually};

use crate::attacks::{MIB, peak_memory};
use crate::load::{exactly_once, post, repeats, size, watchful};
use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");

/// The number of messages that the stream holds.
async fn messages(world: &World) -> u64 {
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    stream.cached_info().state.messages
}

/// Waits until the journal's marks say that so many entries are published: what the next start finds.
async fn checkpointed(world: &World, entries: u64) {
    eventually(&format!("{entries} entries to have a checkpoint"), || async {
        let (_, status, _) = world.gateway_command_async(&["journal", "status", "--json"]).await;
        let status: Value = serde_json::from_str(&status).ok()?;
        (status["states"]["published"]["entries"] == entries).then_some(())
    })
    .await;
}

/// The check `reconciliation` of the gateway.
async fn check(world: &World) -> Option<Value> {
    let checks = world.gateway.ops("/readyz").await.json();
    checks.as_array()?.iter().find(|check| check["name"] == "reconciliation").cloned()
}

/// The stream's answer holds the whole body: 16 of 8 MiB at once were more than the server sends to a client.
#[tokio::test]
async fn large_bodies_without_a_receipt_cost_bounded_memory_and_no_connection() {
    let count = size(20, 64);
    let setup = setup().workers(0).gateway("GATEWAY_CONFIRM_AFTER", "2s").gateway("RUST_LOG", "info");
    let mut world = setup.start().await;
    let body = format!(r#"{{"data":{{"issue":{{"title":"{}"}}}}}}"#, "x".repeat((8 * MIB - 100) as usize));
    for _ in 0..count {
        world.post(body.clone()).await.accepted();
    }
    world.on_stream(count as u64).await;
    // Begun anew, so that the peak is that of looking after them, and not of taking them.
    checkpointed(&world, count as u64).await;
    world.gateway.kill().await;
    world.gateway.start_again();
    world.gateway.ready().await;
    eventually("each to be looked after, and some again", || async {
        world.post(BODY).await.accepted();
        (world.metric("gateway_reconciled_total").await >= 1.2 * count as f64).then_some(())
    })
    .await;
    let published =
        || async { (world.metric("gateway_journal_entries{state=\"journalled\"}").await == 0.0).then_some(()) };
    eventually("small deliveries to be published meanwhile", published).await;
    println!("{} MiB at most", peak_memory(&world) / MIB);
    assert!(peak_memory(&world) < 80 * MIB, "{} MiB", peak_memory(&world) / MIB);
    let log = world.gateway.log();
    assert!(!log.contains("lost the connection to NATS"), "{log}");
    assert_eq!(repeats(&world).await, 0.0);
}

/// The server recognises a repeat for as long as its duplicate window says. A crash loop lasts longer.
async fn without_duplicate_window() -> World {
    let mut world = setup().workers(0).start().await;
    let jetstream = world.jetstream().await;
    let stream = eventually("the stream", || async { jetstream.get_stream("SIGNALS").await.ok() }).await;
    world.gateway.stop().await;
    let config = stream.cached_info().config.clone();
    let short = stream::Config { duplicate_window: Duration::from_millis(100), ..config };
    jetstream.update_stream(&short).await.unwrap();
    world.gateway.start_again();
    world.gateway.ready().await;
    world
}

#[tokio::test]
async fn a_crash_loop_without_postgresql_puts_no_copies_on_the_stream() {
    let mut world = without_duplicate_window().await;
    let ids = post(&world, 200).await;
    world.on_stream(200).await;
    checkpointed(&world, 200).await;
    for _ in 0..20 {
        world.gateway.kill().await;
        world.gateway.start_again();
        world.gateway.ready().await;
        let published =
            || async { (world.metric("gateway_journal_entries{state=\"published\"}").await == 200.0).then_some(()) };
        eventually("the stream to be asked for them", published).await;
    }
    assert_eq!(messages(&world).await, 200);
    world.start_worker().await;
    exactly_once(&world, &ids, 0).await;
}

/// The usual settings: what an earlier process published is due at once, and what is due is not paced by the confirm time.
#[tokio::test]
async fn a_stream_purged_while_the_gateway_was_down_is_filled_again_soon() {
    let count = size(6_000, 20_000);
    let mut world = setup().workers(0).gateway("RUST_LOG", "info").start().await;
    let each = count / 20;
    let send = |_| async {
        let mut connection = Connection::open(world.port()).await.unwrap();
        let mut ids = Vec::new();
        for _ in 0..each {
            ids.push(connection.send(&Post::signed(BODY)).await.unwrap().accepted());
        }
        ids
    };
    let ids = join_all((0..20).map(send)).await.concat();
    world.on_stream(count as u64).await;
    checkpointed(&world, count as u64).await;
    world.gateway.kill().await;
    world.jetstream().await.get_stream("SIGNALS").await.unwrap().purge().await.unwrap();
    let begin = std::time::Instant::now();
    world.gateway.start_again();
    eventually("all to be published again", || async { (messages(&world).await == count as u64).then_some(()) }).await;
    println!("{count} published again in {:?}", begin.elapsed());
    assert_eq!(repeats(&world).await, count as f64);
    world.start_worker().await;
    exactly_once(&world, &ids, 0).await;
}

/// Permissions of the one login that every program has.
fn permissions(deny: &str) -> String {
    format!(
        r#"authorization {{
            users = [ {{ user: all, password: all, permissions: {{ publish: {{ deny: "{deny}" }} }} }} ]
        }}
        no_auth_user: all"#
    )
}

/// Waits until the check tells a failure, and gives it.
async fn degraded(world: &World) -> Value {
    let degraded = || async { check(world).await.filter(|check| check["degraded"] == true) };
    eventually("the gateway to tell", degraded).await
}

async fn a_missing_right_is_told(subject: &str) {
    let setup = watchful().workers(0).nats(|options| options.extra = permissions(subject));
    let mut world = setup.start().await;
    let ids = post(&world, 20).await;
    world.on_stream(20).await;
    let told = degraded(&world).await;
    assert!(told["detail"].as_str().unwrap().contains(subject), "{told}");
    assert!(told["detail"].as_str().unwrap().contains("allow this login to publish"), "{told}");
    assert_eq!(world.gateway.ops("/readyz").await.status, 200, "deliveries are taken all the same");
    assert!(world.metric("gateway_reconciliation_errors_total{cause=\"permission\"}").await >= 1.0);
    let lines = world.gateway.log().lines().filter(|line| line.contains("WARN") && line.contains(subject)).count();
    assert!((1..20).contains(&lines), "{lines} lines");
    // Nor is anything published again at a start: it waits for the answer.
    checkpointed(&world, 20).await;
    world.gateway.kill().await;
    world.gateway.start_again();
    degraded(&world).await;
    assert_eq!(world.metric("gateway_journal_unverified").await, 20.0);
    // With the right, it heals by itself.
    world.nats.stop().await.unwrap();
    world.nats.options.extra = String::new();
    world.nats.start_again().await.unwrap();
    world.jetstream().await.get_stream("SIGNALS").await.unwrap().purge().await.unwrap();
    world.start_worker().await;
    exactly_once(&world, &ids, 0).await;
    assert_eq!(world.metric("gateway_journal_unverified").await, 0.0);
    eventually("the check to be well", || async { check(&world).await.filter(|check| check["ok"] == true) }).await;
}

#[tokio::test]
async fn a_login_that_may_not_fetch_messages_is_told() {
    a_missing_right_is_told("$JS.API.STREAM.MSG.GET.SIGNALS").await;
}

#[tokio::test]
async fn a_login_that_may_not_look_at_the_consumer_is_told() {
    a_missing_right_is_told("$JS.API.CONSUMER.INFO.SIGNALS.worker").await;
}

/// The stream takes the second for a duplicate of the first, whose receipt settles the first alone. Usual settings: the
/// confirm time is five minutes.
#[tokio::test]
async fn a_request_sent_twice_is_settled_soon_and_without_alarm() {
    let world = setup().start().await;
    let other = world.another_gateway().await; // a proxy may send a request again to another one
    let request = Post::signed(BODY);
    let id = request.send(world.port()).await.accepted();
    for port in [world.port(), world.port(), other.port] {
        assert_eq!(request.send(port).await.accepted(), id);
    }
    other.until_metric("gateway_deliveries_unconfirmed", 0.0).await;
    exactly_once(&world, &[id], 0).await;
    for log in [world.gateway.log(), other.log()] {
        assert!(!log.contains("WARN"), "{log}");
    }
}
