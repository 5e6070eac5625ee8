//! One delivery is one signal and one issue, however often it comes.

use futures_util::future::join_all;
use world::{Connection, Post, World};

use crate::{fixture, setup};

async fn counts(world: &World) -> (i64, i64, i64, i64) {
    let sql = "SELECT (SELECT count(*) FROM signals), (SELECT count(*) FROM issues), (SELECT count(*) FROM ingest.deliveries),
        (SELECT last_value FROM issues_number_seq)";
    let row = &world.query(sql, &[]).await[0];
    (row.get(0), row.get(1), row.get(2), row.get(3))
}

#[tokio::test]
async fn the_same_request_twice_is_one_delivery() {
    let world = setup().start().await;
    let post = Post::signed(fixture!("issue_created"));
    let first = post.send(world.port()).await;
    let again = post.send(world.port()).await;
    assert_eq!(first.accepted(), again.accepted());
    assert_eq!(first.json(), again.json());
    let other = post.clone().header("Request-ID", "another attempt").send(world.port()).await;
    assert_ne!(first.accepted(), other.accepted());
    let without = post.clone().without("Request-ID");
    let (one, two) = (without.send(world.port()).await.accepted(), without.send(world.port()).await.accepted());
    assert_ne!(one, two, "without a Request-ID nothing says that two requests are one");
    for id in [first.accepted(), other.accepted(), one, two] {
        world.stored(&id).await;
    }
    assert_eq!(counts(&world).await, (4, 4, 4, 4));
}

/// 10,000 deliveries in, 10,000 rows out; the stream read again from its start changes nothing and draws no number.
#[tokio::test]
async fn ten_thousand_deliveries_are_ten_thousand_rows_also_when_they_come_again() {
    const SENDERS: usize = 16;
    const EACH: usize = 625;
    let world = setup().workers(2).start().await;
    let send = |sender: usize| {
        let port = world.port();
        async move {
            let mut connection = Connection::open(port).await.unwrap();
            for number in 0..EACH {
                let title = format!("sender {sender}, number {number}");
                let body = serde_json::json!({ "data": { "issue": { "id": "1", "title": title } } }).to_string();
                connection.send(&Post::signed(body)).await.unwrap().accepted();
            }
        }
    };
    join_all((0..SENDERS).map(send)).await;
    let all = (SENDERS * EACH) as i64;
    world.until("SELECT count(*) FROM ingest.deliveries", all).await;
    world.all_acknowledged().await;
    assert_eq!(counts(&world).await, (all, all, all, all));
    let sql = "SELECT count(DISTINCT title) FROM issues";
    assert_eq!(world.value::<i64>(sql).await, all, "each one its own");

    // Without its consumer the workers make a new one, and that begins at the start of the stream.
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    stream.delete_consumer("worker").await.unwrap();
    let redelivered = || async {
        let info = stream.consumer_info("worker").await.ok()?;
        (info.delivered.stream_sequence >= all.unsigned_abs()).then_some(())
    };
    world::eventually("the stream to be delivered again", redelivered).await;
    world.all_acknowledged().await;
    assert_eq!(counts(&world).await, (all, all, all, all));
}

#[tokio::test]
async fn a_message_that_is_stored_twice_on_the_stream_is_stored_once() {
    let world = setup().start().await;
    let id = world.post(fixture!("issue_created")).await.accepted();
    let before = world.stored(&id).await;
    let jetstream = world.jetstream().await;
    let stream = jetstream.get_stream("SIGNALS").await.unwrap();
    let message = stream.get_raw_message(1).await.unwrap();
    for number in 1..=3 {
        let mut headers = message.headers.clone();
        headers.insert("Nats-Msg-Id", format!("{id}.{number}"));
        let published = jetstream.publish_with_headers(message.subject.clone(), headers, message.payload.clone());
        assert!(!published.await.unwrap().await.unwrap().duplicate);
    }
    world.all_acknowledged().await;
    assert_eq!(counts(&world).await, (1, 1, 1, 1));
    assert_eq!(world.stored(&id).await.issue, before.issue);
}
