//! A program that may publish `signals.sentry.*` puts hostile messages on the stream.
//!
//! Each message is met once: it becomes a dead letter with its raw bytes, and what comes behind it is stored.

use std::time::Duration;

use async_nats::jetstream::consumer::pull::Config;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use world::{RawClient, Setup, World, eventually};

use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");
const SUBJECT: &str = "signals.sentry.issue";

/// Header blocks that the client library cannot read: it drops the connection, or its task panics.
const UNREADABLE: [(&str, &[u8]); 5] = [
    ("a carriage return in a value", b"NATS/1.0\r\nX: a\rb\r\n\r\n"),
    ("no colon", b"NATS/1.0\r\nno header\r\n\r\n"),
    ("bytes that are no UTF-8", b"NATS/1.0\r\nX: \xff\xfe\r\n\r\n"),
    ("a name with a space", b"NATS/1.0\r\nX Y: a\r\n\r\n"),
    ("another version", b"HTTP/1.1\r\nX: a\r\n\r\n"),
];

/// A world in which a message that no worker acknowledges comes again after two seconds instead of thirty.
async fn impatient(setup: Setup) -> World {
    let mut world = setup.workers(0).start().await;
    let jetstream = world.jetstream().await;
    let stream = eventually("the stream", || async { jetstream.get_stream("SIGNALS").await.ok() }).await;
    let consumer = Config {
        durable_name: Some("worker".into()),
        ack_wait: Duration::from_secs(2),
        max_ack_pending: 16_384,
        ..Config::default()
    };
    stream.create_consumer(consumer).await.unwrap();
    world.start_worker().await;
    world
}

/// Waits until each of these deliveries is stored.
async fn all_stored(world: &World, ids: &[String]) {
    for id in ids {
        world.stored(id).await;
    }
}

#[tokio::test]
async fn header_blocks_that_the_client_cannot_read_become_dead_letters() {
    let world = impatient(setup()).await;
    let mut hostile = RawClient::connect(world.nats.port()).await;
    let mut genuine = Vec::new();
    for (name, block) in UNREADABLE {
        genuine.push(world.post(BODY).await.accepted());
        hostile.publish(SUBJECT, block, name.as_bytes()).await;
        hostile.flush().await;
        genuine.push(world.post(BODY).await.accepted());
    }
    all_stored(&world, &genuine).await;
    world.until("SELECT count(*) FROM ingest.dead_letters", UNREADABLE.len() as i64).await;
    world.all_acknowledged().await;
    let letters =
        world.query("SELECT body, headers::text, reason FROM ingest.dead_letters ORDER BY stream_sequence", &[]);
    for (row, (name, block)) in letters.await.iter().zip(UNREADABLE) {
        assert_eq!(row.get::<_, &[u8]>(0), name.as_bytes());
        let headers: serde_json::Value = serde_json::from_str(row.get(1)).unwrap();
        assert_eq!(headers["Unreadable-Header-Block"][0], STANDARD.encode(block), "{name}: the raw bytes are kept");
        assert!(row.get::<_, &str>(2).contains("headers cannot be read"), "{name}: {}", row.get::<_, &str>(2));
    }
    // Never met again: what comes now finds the same connection.
    let id = world.post(BODY).await.accepted();
    world.stored(&id).await;
    assert!(world.workers[0].process().is_alive());
    assert_eq!(world.workers[0].metric("worker_messages_unreadable_total").await, UNREADABLE.len() as f64);
    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!(audit.code, Some(0), "{audit:?}");
    let counts = audit.json();
    assert_eq!((&counts["stored"], &counts["dead_letters"]), (&(genuine.len() + 1).into(), &UNREADABLE.len().into()));
}

#[tokio::test]
async fn replay_and_audit_pass_over_what_the_client_cannot_read() {
    let world = setup().workers(0).start().await;
    let migrated = world.worker(&["migrate"]).await;
    assert_eq!(migrated.code, Some(0), "{migrated:?}");
    let mut hostile = RawClient::connect(world.nats.port()).await;
    let mut genuine = Vec::new();
    for (name, block) in UNREADABLE {
        hostile.publish(SUBJECT, block, name.as_bytes()).await;
        hostile.flush().await;
        genuine.push(world.post(BODY).await.accepted());
        world.on_stream(2 * genuine.len() as u64).await;
    }
    let messages = 2 * UNREADABLE.len();
    let dry = world.worker(&["replay", "--dry-run"]).await;
    assert_eq!((dry.code, dry.number("  would insert")), (Some(1), genuine.len() as u64), "{dry:?}");
    assert_eq!(dry.number("  would become a dead letter"), UNREADABLE.len() as u64, "{dry:?}");
    for since in [&[][..], &["--since", "1h"]] {
        let audit = world.worker(&[&["audit", "--json"], since].concat()).await;
        assert_eq!((audit.code, &audit.json()["messages"]), (Some(0), &messages.into()), "{audit:?}");
        assert_eq!(audit.json()["pending"], messages, "no consumer has acknowledged anything: {audit:?}");
    }
    let first = world.worker(&["replay", "--dry-run", "--until", "1"]).await;
    assert_eq!((first.code, first.number("  would become a dead letter")), (Some(1), 1), "{first:?}");
    assert_eq!(first.number("  would insert"), 0, "{first:?}");
    let replay = world.worker(&["replay"]).await;
    assert_eq!((replay.code, replay.number("  inserted")), (Some(1), genuine.len() as u64), "{replay:?}");
    all_stored(&world, &genuine).await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, UNREADABLE.len() as i64);
    let again = world.worker(&["replay"]).await;
    assert_eq!((again.code, again.number("  inserted")), (Some(0), 0), "{again:?}");
}

#[tokio::test]
async fn times_that_no_calendar_has_are_held_to_the_streams_clock() {
    let world = impatient(setup()).await;
    let mut hostile = RawClient::connect(world.nats.port()).await;
    let times =
        ["9999-12-31T23:59:59-23:59", "0000-01-01T00:00:00+23:59", "1970-01-01T00:00:00Z", "2200-01-01T00:00:00Z"];
    for (n, time) in times.iter().enumerate() {
        let block = format!("NATS/1.0\r\nDelivery-Id: far-{n}\r\nReceived-At: {time}\r\n\r\n");
        hostile.publish(SUBJECT, block.as_bytes(), BODY.as_bytes()).await;
    }
    hostile.flush().await;
    let id = world.post(BODY).await.accepted();
    world.stored(&id).await;
    for n in 0..times.len() {
        world.stored(&format!("far-{n}")).await;
    }
    let far = "SELECT count(*) FROM ingest.deliveries
        WHERE received_at NOT BETWEEN now() - interval '41 days' AND now() + interval '11 minutes'";
    assert_eq!(world.value::<i64>(far).await, 0);
    assert!(world.workers[0].process().is_alive());
    world.all_acknowledged().await;
    let audit = world.worker(&["audit"]).await;
    assert_eq!(audit.code, Some(0), "{audit:?}");
}

#[tokio::test]
async fn a_subject_that_is_no_utf_8_stops_no_worker() {
    let world = impatient(setup()).await;
    let mut hostile = RawClient::connect(world.nats.port()).await;
    for subject in
        [&b"signals.sentry.\xff\xfe"[..], "signals.sentry.a\u{a0}b".as_bytes(), "signals.sentry.\u{2003}".as_bytes()]
    {
        hostile.publish(subject, b"", b"a").await;
        hostile.publish(subject, b"NATS/1.0\r\nX: a\r\n\r\n", b"b").await;
    }
    hostile.flush().await;
    let id = world.post(BODY).await.accepted();
    world.stored(&id).await;
    world.all_acknowledged().await;
    assert_eq!(world.worker(&["audit"]).await.code, Some(0));
}

#[tokio::test]
async fn reading_the_stream_harms_no_broker_and_ends() {
    let world = setup().workers(0).start().await;
    assert_eq!(world.worker(&["migrate"]).await.code, Some(0));
    let mut hostile = RawClient::connect(world.nats.port()).await;
    // The server itself ends over the first where a consumer leaves bodies out; the library reads none of the others.
    hostile.publish(SUBJECT, b"X", b"a").await;
    hostile.publish(SUBJECT, b"NATS/1.0", b"b").await;
    hostile.publish("signals.sentry.a\u{a0}b", b"", b"c").await;
    hostile.publish("signals.sentry.a\u{fffd}b", b"", b"{}").await;
    hostile.flush().await;
    let genuine = world.post(BODY).await.accepted();
    world.on_stream(5).await;
    for command in [&["audit"][..], &["replay", "--dry-run"], &["replay"], &["audit"]] {
        let ran = world.worker(command).await;
        assert!(matches!(ran.code, Some(0 | 1)) && ran.out.starts_with("read 5 messages"), "{command:?}: {ran:?}");
        assert!(world.nats.process().is_alive(), "{}", world.nats.process().last_words());
    }
    world.stored(&genuine).await;
}

/// The worker's own way: a scan after each lost connection, also where several are lost at once.
#[tokio::test]
async fn a_storm_of_unreadable_messages_is_buried_and_costs_no_delivery() {
    let mut world = impatient(setup().worker("WORKER_BATCH_MAX", "20")).await;
    world.start_worker().await;
    let mut hostile = RawClient::connect(world.nats.port()).await;
    let mut genuine = Vec::new();
    for n in 0..60 {
        let (_, block) = UNREADABLE[n % UNREADABLE.len()];
        hostile.publish(SUBJECT, block, format!("{n}").as_bytes()).await;
        hostile.flush().await;
        genuine.push(world.post(BODY).await.accepted());
    }
    all_stored(&world, &genuine).await;
    world.until("SELECT count(*) FROM ingest.dead_letters", 60_i64).await;
    world.all_acknowledged().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 60);
}

#[tokio::test]
async fn reading_from_an_unreadable_message_stays_in_its_span_and_costs_few_connections() {
    let world = setup().workers(0).start().await;
    assert_eq!(world.worker(&["migrate"]).await.code, Some(0));
    let mut hostile = RawClient::connect(world.nats.port()).await;
    // More than one request behind each of them.
    for n in 1..=6_000 {
        let block: &[u8] = if [5, 2_500, 3_700].contains(&n) { UNREADABLE[1].1 } else { b"" };
        hostile.publish(SUBJECT, block, b"{}").await;
    }
    hostile.flush().await;
    world.on_stream(6_000).await;
    let dry = world.worker(&["replay", "--dry-run", "--from-seq", "5"]).await;
    assert_eq!((dry.code, dry.number("  would insert")), (Some(1), 5_993), "{dry:?}");
    assert_eq!(dry.number("  would become a dead letter"), 3, "{dry:?}");
    // Each lost connection leaves a consumer behind. The log counts those after the tenth.
    let more = dry.err.lines().find_map(|line| line.split(" more lines like").next()?.rsplit(' ').next()?.parse().ok());
    let lost = dry.err.matches("lost the connection").count() + more.unwrap_or(0);
    assert!((3..100).contains(&lost), "{lost} connections lost: {dry:?}");
}

/// The scan needs a right that a login of an earlier version may lack.
#[tokio::test]
async fn a_login_that_may_fetch_no_message_holds_no_worker_up() {
    let denied = r#"authorization {
        users = [ { user: all, password: all, permissions: { publish: { deny: "$JS.API.STREAM.MSG.GET.>" } } } ]
    }
    no_auth_user: all"#;
    let mut world = setup().nats(|options| options.extra = denied.into()).start().await;
    // The worker holds 200 messages that it cannot store, and then loses its connection.
    world.execute("BEGIN; LOCK TABLE issues IN ACCESS EXCLUSIVE MODE").await;
    world.workers[0].process().freeze().unwrap();
    let jetstream = world.jetstream().await;
    let consumer = || async {
        let stream = jetstream.get_stream("SIGNALS").await.ok()?;
        stream.consumer_info("worker").await.ok()
    };
    eventually("its requests to end", || async { consumer().await.filter(|info| info.num_waiting == 0) }).await;
    let mut ids = Vec::new();
    for _ in 0..200 {
        ids.push(world.post(BODY).await.accepted());
    }
    world.on_stream(200).await;
    world.workers[0].process().thaw().unwrap();
    let all = || async { consumer().await.filter(|info| info.delivered.stream_sequence == 200) };
    eventually("the worker to hold them", all).await;
    world.nats.stop().await.unwrap();
    world.nats.start_again().await.unwrap();
    world.execute("ROLLBACK").await;
    // A new delivery waits for a few missing answers, and not for 200.
    ids.push(world.post(BODY).await.accepted());
    all_stored(&world, &ids).await;
}
