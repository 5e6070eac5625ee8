//! A captured body is seen when it comes again: counted, named with its source, and on request taken only once.

use serde_json::{Value, json};
use world::{Connection, Post, Program, SECRET, World, sign};

use crate::setup;

const COUNTED: &str = "gateway_repeated_bodies_total";

/// The same body under a `Request-ID` of its own, as a replayer sends it.
fn again(post: &Post) -> Post {
    post.clone().header("Request-ID", &uuid::Uuid::new_v4().simple().to_string())
}

fn body(number: usize) -> String {
    json!({ "data": { "issue": { "id": "1", "title": format!("number {number}") } } }).to_string()
}

async fn issues(world: &World) -> i64 {
    world.all_acknowledged().await;
    world.value("SELECT count(*) FROM issues").await
}

/// The warnings about repeated bodies, once the gateway has stopped: one, or two where a minute ended in between.
async fn warnings(gateway: &Program) -> Vec<Value> {
    gateway.stop().await;
    let lines = gateway.log().lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>();
    lines.into_iter().filter(|line| !line["repeated_bodies"].is_null()).collect()
}

#[tokio::test]
async fn a_repeated_body_is_taken_counted_and_named_with_its_source() {
    let world = setup().gateway("LOG_FORMAT", "json").start().await;
    let captured = Post::signed(body(0));
    let first = captured.send(world.port()).await.accepted();
    assert_eq!(captured.send(world.port()).await.accepted(), first, "a proxy's resend");
    world.post(body(1)).await.accepted();
    world.gateway.until_metric(COUNTED, 0.0).await;
    for _ in 0..3 {
        assert_ne!(again(&captured).send(world.port()).await.accepted(), first);
    }
    world.gateway.until_metric(COUNTED, 3.0).await;
    world.on_stream(5).await;
    assert_eq!(issues(&world).await, 5);
    let warnings = warnings(&world.gateway).await;
    assert_eq!(warnings.iter().map(|line| line["repeated_bodies"].as_u64().unwrap()).sum::<u64>(), 3, "{warnings:?}");
    for line in &warnings {
        assert_eq!(
            (&line["level"], &line["sources"]),
            (&"WARN".into(), &format!("127.0.0.1 {}", line["repeated_bodies"]).into())
        );
    }
}

#[tokio::test]
async fn once_answers_a_repeated_body_with_the_first_delivery() {
    let world = setup().gateway("GATEWAY_DUPLICATE_BODIES", "once").start().await;
    let captured = Post::signed(body(0));
    let first = captured.send(world.port()).await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    for _ in 0..100 {
        let repeat = connection.send(&again(&captured)).await.unwrap();
        assert_eq!((repeat.accepted(), repeat.json()), (first.accepted(), first.json()));
    }
    let other = world.post(body(1)).await.accepted();
    world.stored(&first.accepted()).await;
    world.stored(&other).await;
    world.gateway.until_metric(COUNTED, 100.0).await;
    assert_eq!(issues(&world).await, 2);
    world.gateway.until_metric("gateway_journal_append_seconds_count", 2.0).await;
}

/// The canonical form does not see the difference between these bodies: one captured signature is right for both.
#[tokio::test]
async fn a_captured_signature_over_altered_bytes_is_a_repeat() {
    let world = setup().workers(0).gateway("GATEWAY_DUPLICATE_BODIES", "once").start().await;
    let signed = |body: &str| Post::unsigned(body.to_owned()).header("Sentry-Hook-Signature", &sign(SECRET, b"[null]"));
    let first = signed("[null]").send(world.port()).await.accepted();
    assert_eq!(signed("[1e400]").send(world.port()).await.accepted(), first);
    world.gateway.until_metric(COUNTED, 1.0).await;
    world.gateway.until_metric("gateway_signatures_total{form=\"raw\"}", 1.0).await;
    world.gateway.until_metric("gateway_signatures_total{form=\"canonical\"}", 1.0).await;
}

#[tokio::test]
async fn a_body_that_was_answered_503_is_no_repeat() {
    let once = setup().workers(0).gateway("GATEWAY_DUPLICATE_BODIES", "once");
    let small = once.gateway("GATEWAY_JOURNAL_MAX_BYTES", "1MiB").gateway("GATEWAY_MAX_BODY_BYTES", "100KiB");
    let world = small.start().await;
    world.nats.kill().await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    let mut taken = Vec::new();
    let refused = loop {
        let post = Post::signed(format!("\"{}{}\"", taken.len(), "x".repeat(40_000)));
        match connection.send(&post).await.unwrap().status {
            202 => taken.push(post),
            503 => break post,
            status => panic!("{status}"),
        }
        assert!(taken.len() < 100, "the journal holds 1 MiB");
    };
    // 503 again, or 202: the journal may have room by now. Neither is a repeat.
    connection.send(&again(&refused)).await.unwrap();
    assert_eq!(connection.send(&again(&taken[0])).await.unwrap().status, 202, "it is on disk");
    world.gateway.until_metric(COUNTED, 1.0).await;
}
