//! A stream that holds other subjects beside Sentry's, and other consumers: the door uses its own part and touches no other.

use std::time::Duration;

use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use world::{Post, RawClient, Setup, World, eventually};

use crate::{fixture, setup};

/// The subject of another tool.
pub(crate) const FOREIGN: &str = "signals.github.push";

/// A world whose stream holds `signals.>`.
async fn wider(setup: Setup) -> (World, Stream) {
    let world = setup.start().await;
    let stream = widen(&world).await;
    (world, stream)
}

/// Lets the stream of a world that runs hold `signals.>`.
pub(crate) async fn widen(world: &World) -> Stream {
    let jetstream = world.jetstream().await;
    let stream = eventually("the stream", || async { jetstream.get_stream("SIGNALS").await.ok() }).await;
    let mut config = stream.cached_info().config.clone();
    config.subjects = vec!["signals.>".into()];
    jetstream.update_stream(config).await.unwrap();
    jetstream.get_stream("SIGNALS").await.unwrap()
}

/// Messages of another tool, unsigned, in the shape of a delivery.
pub(crate) async fn publish_foreign(world: &World, count: usize) {
    let jetstream = world.jetstream().await;
    for _ in 0..count {
        jetstream.publish(FOREIGN, fixture!("issue_created").into()).await.unwrap().await.unwrap();
    }
}

/// Number of messages on the stream whose subject matches.
pub(crate) async fn messages(stream: &Stream, filter: &str) -> usize {
    let counts = stream.info_with_subjects(filter).await.unwrap();
    counts.try_fold(0, async |sum, (_, count)| Ok(sum + count)).await.unwrap()
}

/// Waits until the consumer has nothing left to deliver and nothing to acknowledge.
async fn settled(stream: &Stream) {
    eventually("the consumer to be done", || async {
        let info = stream.consumer_info("worker").await.ok()?;
        (info.num_pending == 0 && info.num_ack_pending == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn only_the_subjects_of_sentry_become_signals() {
    let (world, stream) = wider(setup().gateway("GATEWAY_CONFIRM_AFTER", "1s")).await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        publish_foreign(&world, 3).await;
        ids.push(world.post(fixture!("error_created")).await.accepted());
    }
    publish_foreign(&world, 4).await;
    for id in &ids {
        world.stored(id).await;
    }
    settled(&stream).await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 5);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.deliveries").await, 5);
    world.until_confirmed().await;

    let audit = world.worker(&["audit", "--json"]).await;
    let counts = audit.json();
    let number = |what: &str| counts[what].as_u64().unwrap();
    assert_eq!((audit.code, ["messages", "stored", "pending"].map(number)), (Some(0), [5, 5, 0]), "{counts}");
    for since in ["1h", "2999-01-01T00:00:00Z"] {
        let messages = if since == "1h" { 5 } else { 0 };
        let audit = world.worker(&["audit", "--since", since, "--json"]).await;
        assert_eq!(audit.json()["messages"], messages, "{audit:?}");
    }
    let replay = world.worker(&["replay"]).await;
    assert_eq!((replay.code, replay.number("already there")), (Some(0), 5), "{replay:?}");
    assert_eq!(replay.number("inserted"), 0, "{replay:?}");
    let status = world.worker(&["status", "--json"]).await.json();
    assert_eq!(
        (&status["nats"]["stream"]["messages"], &status["nats"]["stream"]["deliveries"]),
        (&24.into(), &5.into())
    );
    assert_eq!(status["nats"]["consumer"]["oldest_pending_at"], serde_json::Value::Null, "{status}");
    let status = world.worker(&["status"]).await;
    assert!(status.out.contains("5 of them are deliveries") && status.out.contains("nothing pending"), "{status:?}");

    // Deliveries that the database lost come back; messages of others stay theirs.
    world.execute("TRUNCATE ingest.deliveries, signals, issues").await;
    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!((audit.code, &audit.json()["missing"]), (Some(1), &5.into()), "{audit:?}");
    let replay = world.worker(&["replay"]).await;
    assert_eq!((replay.code, replay.number("inserted")), (Some(0), 5), "{replay:?}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 5);
}

/// The gateway goes by sequences, which have gaps here.
#[tokio::test]
async fn a_delivery_that_waits_between_foreign_messages_is_not_published_again() {
    let (mut world, stream) = wider(setup().gateway("GATEWAY_CONFIRM_AFTER", "500ms").workers(0)).await;
    world.start_worker().await;
    let mut ids = Vec::new();
    for round in 0..3 {
        publish_foreign(&world, 7).await;
        ids.push(world.post(fixture!("error_created")).await.accepted());
        if round == 0 {
            world.stored(&ids[0]).await;
            world.until_confirmed().await;
            world.workers[0].kill().await;
        }
    }
    publish_foreign(&world, 7).await;
    // The gateway looks at both messages several times.
    let asked = "$JS.API.STREAM.MSG.GET.SIGNALS";
    let spy = async_nats::connect(world.nats.url()).await.unwrap();
    let mut looks = spy.subscribe(asked).await.unwrap();
    for _ in 0..8 {
        tokio::time::timeout(Duration::from_secs(60), looks.next()).await.expect("the gateway looks");
    }
    assert_eq!(messages(&stream, "signals.sentry.*").await, 3, "none is published again");
    world.workers[0].start_again();
    for id in &ids {
        world.stored(id).await;
    }
    world.until_confirmed().await;
    assert_eq!(messages(&stream, "signals.sentry.*").await, 3, "none is published again");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 3);
}

#[tokio::test]
async fn unreadable_messages_of_others_become_no_dead_letters() {
    const UNREADABLE: &[u8] = b"NATS/1.0\r\nX: a\rb\r\n\r\n";
    let (world, stream) = wider(setup()).await;
    let mut hostile = RawClient::connect(world.nats.port()).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        hostile.publish(FOREIGN, UNREADABLE, b"theirs").await;
        hostile.publish("signals.sentry.issue", UNREADABLE, b"ours").await;
        hostile.publish(FOREIGN, UNREADABLE, b"theirs").await;
        hostile.flush().await;
        ids.push(world.post(fixture!("error_created")).await.accepted());
    }
    for id in &ids {
        world.stored(id).await;
    }
    settled(&stream).await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters WHERE body = 'ours'").await, 3);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.deliveries").await, 6);
    let audit = world.worker(&["audit", "--json"]).await;
    let counts = audit.json();
    let number = |what: &str| counts[what].as_u64().unwrap();
    assert_eq!((audit.code, ["messages", "stored", "dead_letters"].map(number)), (Some(0), [6, 3, 3]), "{counts}");
}

/// A durable consumer as workers made it before it had a filter.
fn unfiltered() -> pull::Config {
    pull::Config { durable_name: Some("worker".into()), max_ack_pending: 16_384, ..pull::Config::default() }
}

#[tokio::test]
async fn a_consumer_without_a_filter_is_used_only_in_a_stream_of_sentrys_alone() {
    let mut world = setup().workers(0).start().await;
    let jetstream = world.jetstream().await;
    let stream = eventually("the stream", || async { jetstream.get_stream("SIGNALS").await.ok() }).await;
    stream.create_consumer(unfiltered()).await.unwrap();
    world.start_worker().await;
    world.stored(&world.post(fixture!("error_created")).await.accepted()).await;
    settled(&stream).await;

    // An operator widens the stream while the worker runs.
    let mut config = stream.cached_info().config.clone();
    config.subjects = vec!["signals.>".into()];
    jetstream.update_stream(config).await.unwrap();
    publish_foreign(&world, 20).await;
    eventually("the worker to say what is wrong", || async {
        let answer = world.workers[0].ops("/readyz").await;
        let told = answer.json().to_string();
        let named =
            told.contains("filter") && told.contains("nats consumer edit SIGNALS worker --filter 'signals.sentry.*'");
        (answer.status == 503 && named).then_some(())
    })
    .await;
    let check = world.worker(&["check"]).await;
    assert_eq!(check.code, Some(1), "{check:?}");
    assert!(check.out.contains("nats consumer edit SIGNALS worker --filter 'signals.sentry.*'"), "{check:?}");
    let id = world.post(fixture!("error_created")).await.accepted();
    publish_foreign(&world, 5).await;
    world.on_stream(27).await;
    let info = stream.consumer_info("worker").await.unwrap();
    assert_eq!(info.config.filter_subject, "", "nothing is changed silently");

    stream.update_consumer(pull::Config { filter_subject: "signals.sentry.*".into(), ..unfiltered() }).await.unwrap();
    world.stored(&id).await;
    settled(&stream).await;
    world.workers[0].ready().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.deliveries").await, 2);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 2);
}

/// Posts bodies of 16 KB until `bytes` are accepted; each as often as it takes.
async fn fill(world: &World, bytes: usize) -> usize {
    let count = bytes / 16_000;
    for n in 0..count {
        let post = Post::signed(format!(r#"{{"action":"created","n":{n},"x":"{}"}}"#, "x".repeat(16_000)));
        eventually("a 202", || async { (post.send(world.port()).await.status == 202).then_some(()) }).await;
    }
    count
}

#[tokio::test]
async fn making_room_removes_no_message_that_another_consumer_has_not_read() {
    let setup = setup().gateway("NATS_MAX_BYTES", "4MiB").gateway("GATEWAY_CONFIRM_AFTER", "1h");
    let (world, stream) = wider(setup).await;
    let named = |name: &str, filter: &str| pull::Config {
        durable_name: Some(name.into()),
        filter_subject: filter.into(),
        ..pull::Config::default()
    };
    // One reads another tool's messages alone and is behind; one reads everything.
    stream.create_consumer(named("github", "signals.github.>")).await.unwrap();
    let everything: PullConsumer = stream.create_consumer(named("everything", "signals.>")).await.unwrap();
    publish_foreign(&world, 10).await;
    let first = fill(&world, 3_600_000).await;
    publish_foreign(&world, 10).await;
    let all = i64::try_from(first).unwrap();
    world.until("SELECT count(*) FROM signals", all).await;
    settled(&stream).await;
    // Above the mark, and all of Sentry's is acknowledged: only the other consumer's reading is missing.
    eventually("the worker to say what holds it up", || async {
        let log = world.workers[0].log();
        (log.contains("cannot make room") && log.contains("everything")).then_some(())
    })
    .await;
    assert_eq!(messages(&stream, "signals.sentry.*").await, first, "the other consumer has read none of them");

    let mut unread = everything.messages().await.unwrap();
    for _ in 0..first + 20 {
        let message = tokio::time::timeout(Duration::from_secs(60), unread.next()).await.unwrap().unwrap().unwrap();
        message.double_ack().await.unwrap();
    }
    eventually("room in the stream", || async {
        (stream.get_info().await.unwrap().state.bytes <= (4 << 20) / 10 * 8).then_some(())
    })
    .await;
    let left = messages(&stream, "signals.sentry.*").await;
    assert!((first / 2..first).contains(&left), "the oldest go, and not more than needed: {left} of {first}");
    assert_eq!(messages(&stream, FOREIGN).await, 20, "what others wrote stays");
    assert_eq!(stream.consumer_info("github").await.unwrap().num_pending, 20, "and can be read");
    assert_eq!(world.worker(&["audit"]).await.code, Some(0));
}

/// Their messages come before the deliveries, though its subjects are Sentry's alone by now.
#[tokio::test]
async fn a_stream_that_others_have_used_makes_room_all_the_same() {
    let (world, stream) = wider(setup().gateway("NATS_MAX_BYTES", "4MiB")).await;
    publish_foreign(&world, 100).await;
    let mut config = stream.cached_info().config.clone();
    config.subjects = vec!["signals.sentry.*".into()];
    world.jetstream().await.update_stream(config).await.unwrap();
    let all = fill(&world, 4_500_000).await;
    world.until("SELECT count(*) FROM signals", i64::try_from(all).unwrap()).await;
    eventually("room in the stream", || async {
        (stream.get_info().await.unwrap().state.bytes <= (4 << 20) / 10 * 8).then_some(())
    })
    .await;
    assert_eq!(messages(&stream, FOREIGN).await, 100, "what others wrote stays");
}
