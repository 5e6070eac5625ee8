//! The stream keeps history for as long as there is room, makes room by itself, never at the cost of the unread.

use std::cell::Cell;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use world::{Post, eventually};

use crate::setup;

/// `bytes` in bodies of 16 KB through a stream that holds `limit`, with a worker that stores nothing until it is full.
async fn lag_and_catch_up(limit: u64, bytes: u64) {
    let world = setup().gateway("NATS_MAX_BYTES", &limit.to_string()).start().await;
    let (mut locker, connection) = tokio_postgres::connect(&world.database_url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let lock = locker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE issues").await.unwrap();
    let count = bytes / 16_000;
    let port = world.port();
    let mut senders = JoinSet::new();
    for sender in 0..8 {
        senders.spawn(async move {
            for n in 0..count / 8 {
                let body = format!(r#"{{"action":"created","n":[{sender},{n}],"x":"{}"}}"#, "x".repeat(16_000));
                // The same request until it is accepted, so it is one delivery.
                let post = Post::signed(body);
                let begin = Instant::now();
                while post.send(port).await.status != 202 {
                    assert!(begin.elapsed() < Duration::from_secs(300), "a delivery is refused for five minutes");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        });
    }
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    let full = Cell::new(None);
    eventually("the stream to be full for a while", async || {
        let state = stream.get_info().await.unwrap().state;
        // 0: nothing has arrived yet.
        assert!(state.first_sequence <= 1, "nothing is acknowledged, so nothing is purged: {state:?}");
        if state.bytes > limit / 100 * 95 && full.get().is_none() {
            full.set(Some(Instant::now()));
        }
        // The worker looks once a second whether there is anything to purge.
        full.get().filter(|since| since.elapsed() > Duration::from_secs(3))
    })
    .await;

    lock.rollback().await.unwrap();
    let freed = Instant::now();
    while !senders.is_empty() {
        assert!(freed.elapsed() < Duration::from_secs(300), "the senders are not done: {} are left", senders.len());
        // Looked at in this order, no message that is gone can have been unread.
        let first = stream.get_info().await.unwrap().state.first_sequence;
        let acknowledged = stream.consumer_info("worker").await.unwrap().ack_floor.stream_sequence;
        assert!(first <= acknowledged + 1, "{first} is the oldest, {acknowledged} the last that was acknowledged");
        if let Ok(Some(sent)) = tokio::time::timeout(Duration::from_millis(20), senders.join_next()).await {
            sent.unwrap();
        }
    }
    world.settled(usize::try_from(count / 8 * 8).unwrap()).await;
    eventually("room in the stream", async || {
        let state = stream.get_info().await.unwrap().state;
        (state.bytes <= limit / 100 * 80).then_some(())
    })
    .await;
    let state = stream.get_info().await.unwrap().state;
    assert!(state.bytes > limit / 100 * 55, "history is not cut deeper than it has to be: {state:?}");
}

#[tokio::test]
async fn a_full_stream_loses_nothing_unread_and_takes_deliveries_again_by_itself() {
    lag_and_catch_up(4 << 20, 16 << 20).await;
}

/// `cargo test -p tests a_full_stream_under_many_times_its_size -- --ignored`
#[tokio::test]
#[ignore = "takes minutes"]
async fn a_full_stream_under_many_times_its_size() {
    lag_and_catch_up(64 << 20, 500 << 20).await;
}
