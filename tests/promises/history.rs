//! The stream keeps history for as long as there is room, makes room by itself, never at the cost of the unread.

use std::cell::Cell;
use std::time::{Duration, Instant};

use shared::hostile::StoredMessage;
use tokio::task::JoinSet;
use world::{Post, World, eventually};

use crate::wider_stream::{FOREIGN, messages, publish_foreign, widen};
use crate::{fixture, setup};

/// `bytes` in bodies of 16 KB through a stream that holds `limit`, with a worker that stores nothing until it is full.
/// The messages of others, of which `foreign` are there before, stay.
async fn lag_and_catch_up(limit: u64, bytes: u64, foreign: usize) {
    let world = setup().gateway("NATS_MAX_BYTES", &limit.to_string()).start().await;
    if foreign > 0 {
        widen(&world).await;
        publish_foreign(&world, foreign).await;
    }
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
        assert!(
            state.first_sequence <= 1 && state.messages == state.last_sequence,
            "nothing is acknowledged, so nothing is purged: {state:?}"
        );
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
        let first = first_delivery(&world).await;
        let acknowledged = stream.consumer_info("worker").await.unwrap().ack_floor.stream_sequence;
        let kept = acknowledged.max(foreign as u64) + 1; // the messages of others come first
        assert!(
            first == u64::MAX || first <= kept,
            "{first} is the oldest, {acknowledged} the last that was acknowledged"
        );
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
    assert_eq!(messages(&stream, FOREIGN).await, foreign, "what others wrote stays");
}

/// The sequence of the first delivery on the stream.
async fn first_delivery(world: &World) -> u64 {
    let first = StoredMessage::first(&world.jetstream().await, "SIGNALS", "signals.sentry.*", 1).await.unwrap();
    first.map_or(u64::MAX, |message| message.sequence)
}

#[tokio::test]
async fn a_full_stream_loses_nothing_unread_and_takes_deliveries_again_by_itself() {
    lag_and_catch_up(4 << 20, 16 << 20, 0).await;
}

#[tokio::test]
async fn a_full_stream_that_holds_messages_of_others_makes_room_from_deliveries_alone() {
    lag_and_catch_up(4 << 20, 8 << 20, 50).await;
}

/// `cargo test -p tests a_full_stream_under_many_times_its_size -- --ignored`
#[tokio::test]
#[ignore = "takes minutes"]
async fn a_full_stream_under_many_times_its_size() {
    lag_and_catch_up(64 << 20, 500 << 20, 0).await;
}

/// Posts one body of 16 KB until it is accepted. Its id.
async fn post_16_kb(world: &World) -> String {
    let post = Post::signed(format!(r#"{{"action":"created","x":"{}"}}"#, "x".repeat(16_000)));
    eventually("a 202", || async { Some(post.send(world.port()).await).filter(|answer| answer.status == 202) })
        .await
        .accepted()
}

/// No worker can ask PostgreSQL for the lock, so all of them purge: up to what is acknowledged, and no further.
#[tokio::test]
async fn several_workers_make_room_while_postgresql_is_down_and_never_take_what_is_unread() {
    let limit = 4_u64 << 20;
    let setup = setup().own_postgres().workers(3).gateway("NATS_MAX_BYTES", &limit.to_string());
    let mut world = setup.start().await;
    let mut ids = Vec::new();
    for _ in 0..190 {
        ids.push(post_16_kb(&world).await); // 75 %: nothing is purged yet
    }
    world.on_stream(190).await;
    world.all_acknowledged().await;
    world.postgres.as_ref().unwrap().kill().await;
    for _ in 0..40 {
        ids.push(post_16_kb(&world).await); // above 80 %
    }
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    eventually("room", async || {
        let state = stream.get_info().await.unwrap().state;
        assert!(state.first_sequence <= 191, "what is unread stays: {state:?}");
        (state.last_sequence == 230 && state.bytes <= limit / 100 * 80 && state.first_sequence > 1).then_some(())
    })
    .await;
    world.postgres.as_mut().unwrap().start_again().await.unwrap();
    world.connect_sql().await;
    for id in &ids {
        world.stored(id).await;
    }
    world.all_acknowledged().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 230);
}

#[tokio::test]
async fn a_stream_that_is_limited_by_a_number_of_messages_takes_deliveries_again_by_itself() {
    let world = setup().start().await;
    let jetstream = world.jetstream().await;
    let stream = eventually("the stream", || async { jetstream.get_stream("SIGNALS").await.ok() }).await;
    let mut config = stream.cached_info().config.clone();
    config.max_messages = 100;
    jetstream.update_stream(config).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..250 {
        ids.push(world.post(fixture!("error_created")).await.accepted());
    }
    for id in &ids {
        world.stored(id).await;
    }
    world.all_acknowledged().await;
    eventually("room", async || (stream.get_info().await.unwrap().state.messages <= 80).then_some(())).await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 250);
}

#[tokio::test]
async fn a_worker_that_hangs_while_it_makes_room_keeps_no_other_from_it() {
    let world = setup().gateway("NATS_MAX_BYTES", "1MiB").start().await;
    // The first delivery waits, and all behind it with it: the worker tries to make room every second, in vain.
    world
        .execute(
            "CREATE FUNCTION unclear() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'LP001'; END $$;
             CREATE TRIGGER unclear BEFORE INSERT ON issues FOR EACH ROW
                 WHEN (NEW.signal_payload ? 'fails') EXECUTE FUNCTION unclear()",
        )
        .await;
    world.post(r#"{"fails":1}"#).await.accepted();
    for _ in 0..54 {
        post_16_kb(&world).await; // 85 %
    }
    world.until("SELECT count(*) FROM signals", 54_i64).await;
    let locks = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
        WHERE l.locktype = 'advisory' AND d.datname = current_database()";
    // NATS hangs again and again, until the worker has the lock meanwhile. Then the worker hangs as well.
    eventually("the worker to hang with the lock", async || {
        world.nats.process().freeze().unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let held = world.value::<i64>(locks).await == 1;
        if held {
            world.workers[0].process().freeze().unwrap();
        }
        world.nats.process().thaw().unwrap();
        held.then_some(())
    })
    .await;
    assert_eq!(world.value::<i64>(locks).await, 1, "it hangs with the lock");
    world.until(locks, 0_i64).await;
    world.workers[0].process().thaw().unwrap();
    world.execute("DROP TRIGGER unclear ON issues").await;
    world.until("SELECT count(*) FROM signals", 55_i64).await;
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    eventually("room", async || (stream.get_info().await.unwrap().state.bytes <= (1 << 20) / 10 * 8).then_some(()))
        .await;
}
