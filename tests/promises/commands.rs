//! The commands tell the state of things, say clearly what is wrong with how they were called, and end when they are told
//! to.

use std::time::Duration;

use async_nats::jetstream::AckKind;
use async_nats::jetstream::consumer::PullConsumer;
use futures_util::StreamExt as _;
use nix::sys::signal::Signal;
use shared::delivery::Delivery;
use shared::receipt::ReceiptTo;
use world::{RawClient, Running, Setup, World, eventually};

use crate::load::post;
use crate::{fixture, setup};

/// Each command, asked to stop once it handles signals, ends within its time.
async fn every_command_ends(world: &World, state: &str, worker: &[&[&str]]) {
    let stop = async |mut running: Running, signal| {
        running.signal(signal).await;
        let ended = tokio::time::timeout(std::time::Duration::from_secs(20), running.ended()).await;
        ended.unwrap_or_else(|_| panic!("{state}: it goes on after {signal}: {}", running.out()))
    };
    for (arguments, signal) in worker.iter().zip([Signal::SIGINT, Signal::SIGTERM].into_iter().cycle()) {
        let ran = stop(world.worker_process(arguments), signal).await;
        assert_eq!(ran.code, Some(130), "{state}: worker {arguments:?} after {signal}: {ran:?}");
    }
    for (arguments, begun, signal) in [
        (&["journal", "redrive", "--since", "1h"][..], "3 deliveries", Signal::SIGINT),
        (&["journal", "redrive", "--since", "1h"], "3 deliveries", Signal::SIGTERM),
        (&["journal", "drain"], "3 deliveries are not confirmed yet", Signal::SIGINT),
    ] {
        let running = world.gateway_process(arguments);
        eventually(begun, || async { running.out().contains(begun).then_some(()) }).await;
        let ran = stop(running, signal).await;
        assert_eq!(ran.code, Some(1), "{state}: gateway {arguments:?} after {signal}: {ran:?}");
        assert!(ran.err.contains("stopped"), "{state}: {ran:?}");
    }
}

#[tokio::test]
async fn every_command_ends_at_a_signal_while_the_servers_hang() {
    let world = setup().own_postgres().start().await;
    world.nats.process().freeze().unwrap();
    world.postgres.as_ref().unwrap().process().freeze().unwrap();
    post(&world, 3).await;
    world.gateway.kill().await;
    let worker: [&[&str]; 8] = [
        &["audit"],
        &["replay"],
        &["replay", "--dry-run"],
        &["status"],
        &["check"],
        &["dead-letters", "list"],
        &["dead-letters", "retry", "--all"],
        &["migrate"],
    ];
    every_command_ends(&world, "hanging", &worker).await;
    let mut check = world.gateway_process(&["check"]);
    check.signal(Signal::SIGTERM).await;
    assert_eq!(check.ended().await.code, Some(130));
    world.nats.process().thaw().unwrap();
    world.postgres.as_ref().unwrap().process().thaw().unwrap();
}

#[tokio::test]
async fn every_command_ends_at_a_signal_while_the_servers_are_away() {
    let world = setup().own_postgres().start().await;
    world.nats.kill().await;
    world.postgres.as_ref().unwrap().kill().await;
    post(&world, 3).await;
    world.gateway.kill().await;
    // The others end by themselves at the first refused connection.
    every_command_ends(&world, "away", &[&["audit"], &["replay"], &["status"]]).await;
}

#[tokio::test]
async fn status_tells_what_it_can() {
    let mut world = setup().own_postgres().start().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.post("no JSON").await.accepted();
    world.on_stream(2).await;
    world.all_acknowledged().await;
    let status = world.worker(&["status", "--json"]).await;
    assert_eq!(status.code, Some(0), "{status:?}");
    let status = status.json();
    assert_eq!((&status["nats"]["stream"]["messages"], &status["postgresql"]["dead_letters"]), (&2.into(), &1.into()));
    assert_eq!(status["nats"]["consumer"]["oldest_pending_at"], serde_json::Value::Null);
    let hour = status["postgresql"]["stored_in_the_last_hour"].as_object().unwrap();
    assert_eq!(hour.values().filter_map(serde_json::Value::as_u64).sum::<u64>(), 1);

    world.workers[0].kill().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(3).await;
    let status = world.worker(&["status", "--json"]).await.json();
    assert_eq!(status["nats"]["consumer"]["not_delivered"], 1);
    assert!(status["nats"]["consumer"]["oldest_pending_seconds"].as_u64().unwrap() < 60);

    world.postgres.as_ref().unwrap().kill().await;
    let status = world.worker(&["status"]).await;
    assert_eq!(status.code, Some(1), "{status:?}");
    assert!(status.out.contains("3 messages") && status.out.contains("PostgreSQL  away"), "{status:?}");
    world.postgres.as_mut().unwrap().start_again().await.unwrap();
    world.nats.kill().await;
    let status = world.worker(&["status", "--json"]).await;
    assert_eq!(status.code, Some(1), "{status:?}");
    assert_eq!(status.json()["postgresql"]["dead_letters"], 1);
    assert!(status.json()["nats"]["error"].as_str().unwrap().contains("NATS_URL"), "{status:?}");
}

#[tokio::test]
async fn an_audit_accounts_for_what_waits_for_repeats_and_for_messages_of_others() {
    let world = setup().start().await;
    let jetstream = world.jetstream().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(1).await;
    // The gateway publishes again what it got no receipt for; somebody else publishes without any of our headers.
    let twice = Delivery::received(fixture!("error_created").into(), Some(b"r"), Some(b"error"), None);
    for repeat in 0..2 {
        let headers = twice.headers(repeat, &ReceiptTo::new("nobody", repeat));
        let ack = jetstream.publish_with_headers(twice.subject(), headers, twice.body.clone()).await.unwrap();
        ack.await.unwrap();
    }
    jetstream.publish("signals.sentry.issue", "{}".into()).await.unwrap().await.unwrap();
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(5).await;

    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!(audit.code, Some(0), "what waits is not missing: {audit:?}");
    let counts = audit.json();
    let number = |what: &str| counts[what].as_u64().unwrap();
    assert_eq!(["messages", "stored", "repeats", "pending", "missing"].map(number), [5, 3, 1, 1, 0], "{counts}");
    let dry_run = world.worker(&["replay", "--dry-run"]).await;
    assert_eq!((dry_run.number("would insert"), dry_run.number("already there")), (1, 4), "{dry_run:?}");

    world.execute("TRUNCATE ingest.deliveries, signals, issues").await;
    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!(audit.code, Some(1), "{audit:?}");
    let counts = audit.json();
    let number = |what: &str| counts[what].as_u64().unwrap();
    assert_eq!(["stored", "repeats", "pending", "missing"].map(number), [0, 1, 1, 3], "{counts}");
    let dry_run = world.worker(&["replay", "--dry-run"]).await;
    assert_eq!((dry_run.number("would insert"), dry_run.number("already there")), (4, 1), "{dry_run:?}");
    let replay = world.worker(&["replay"]).await;
    assert_eq!((replay.number("inserted"), replay.number("already there")), (4, 1), "{replay:?}");
    assert_eq!(world.worker(&["audit"]).await.code, Some(0));

    let since = world.worker(&["audit", "--since", "1h", "--json"]).await;
    assert_eq!(since.json()["messages"], 5);
    let none = world.worker(&["audit", "--since", "2999-01-01T00:00:00Z", "--json"]).await;
    assert_eq!((none.code, &none.json()["messages"]), (Some(0), &0.into()));
    let until = world.worker(&["replay", "--until", "2"]).await;
    assert_eq!(until.number("already there"), 2, "{until:?}");
    let resource = world.worker(&["replay", "--resource", "error", "--until", "2999-01-01T00:00:00Z"]).await;
    assert_eq!(resource.number("already there"), 2, "{resource:?}");
    let before = world.worker(&["replay", "--until", "1h"]).await;
    assert_eq!((before.code, before.number("already there")), (Some(0), 0), "{before:?}");
}

#[tokio::test]
async fn a_wrong_call_is_64_and_a_server_that_is_away_is_2() {
    let world = setup().servers_later().workers(0).launch().await;
    for wrong in [
        &["replay", "--since", "yesterday"][..],
        &["replay", "--since", "2h", "--from-seq", "1"],
        &["dead-letters", "retry"],
        &["dead-letters"],
        &["audit", "--no-such"],
        &["status", "--nats-stream", "a b"],
        &["no-such-command"],
    ] {
        let ran = world.worker(wrong).await;
        assert_eq!(ran.code, Some(64), "{wrong:?}: {ran:?}");
        assert!(!ran.err.is_empty(), "{wrong:?}: {ran:?}");
    }
    for away in [&["replay"][..], &["audit"], &["status"], &["dead-letters", "list"]] {
        let ran = world.worker(away).await;
        assert_eq!(ran.code, Some(2), "{away:?}: {ran:?}");
        assert!(ran.err.contains(&format!("worker {}: ", away[0])), "{away:?}: {ran:?}");
    }
}

/// One message is with a worker, and its neighbours are acknowledged: those cannot be pending, too.
#[tokio::test]
async fn an_audit_beside_a_held_message_tells_what_is_missing_above_it() {
    let mut world = setup().start().await;
    world.workers[0].kill().await;
    let mut ids = Vec::new();
    for _ in 0..41 {
        ids.push(world.post(fixture!("issue_created")).await.accepted());
    }
    world.on_stream(41).await;
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    let consumer: PullConsumer = stream.get_consumer("worker").await.unwrap();
    let mut held = consumer.batch().max_messages(1).expires(Duration::from_secs(5)).messages().await.unwrap();
    let held = held.next().await.unwrap().unwrap();
    world.workers[0].start_again();
    let others = async || {
        held.ack_with(AckKind::Progress).await.unwrap();
        let info = stream.consumer_info("worker").await.unwrap();
        (info.num_pending == 0 && info.num_ack_pending == 1 && info.ack_floor.stream_sequence == 0).then_some(())
    };
    eventually("the others to be acknowledged", others).await;
    world.workers[0].kill().await;
    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!((audit.code, &audit.json()["pending"]), (Some(0), &1.into()), "{audit:?}");
    world.execute("TRUNCATE ingest.deliveries, signals, issues").await;
    // One more that no worker has been given.
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(42).await;
    held.ack_with(AckKind::Progress).await.unwrap();

    let audit = world.worker(&["audit", "--json"]).await;
    let counts = audit.json();
    let number = |what: &str| counts[what].as_u64().unwrap();
    assert_eq!((audit.code, ["messages", "pending", "missing"].map(number)), (Some(1), [42, 2, 40]), "{counts}");
    assert_eq!(counts["missing_among_first"][0]["delivery_id"], ids[0].as_str(), "{counts}");
    let audit = world.worker(&["audit"]).await;
    assert!(audit.out.contains("40 of these 41") && audit.out.contains(&ids[1]), "{audit:?}");
    assert!(audit.out.contains("worker replay --from-seq 1"), "{audit:?}");
}

/// A broker on which any client may do everything but publish to these subjects.
fn denying(setup: Setup, subjects: &str) -> Setup {
    let denied = format!(
        "authorization {{ users = [ {{ user: all, password: all, permissions: {{ publish: {{ deny: [{subjects}] }} }} }} ] }}
        no_auth_user: all"
    );
    setup.nats(|options| options.extra = denied)
}

#[tokio::test]
async fn a_status_that_may_fetch_no_message_says_so_and_not_that_nothing_is_pending() {
    let world = denying(setup(), r#""$JS.API.STREAM.MSG.GET.>""#).start().await;
    world.workers[0].kill().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(1).await;
    let status = world.worker(&["status"]).await;
    let named = |said: &str| said.contains("may not publish to $JS.API.STREAM.MSG.GET.SIGNALS");
    assert!(named(&status.out) && !status.out.contains("nothing pending"), "{status:?}");
    let status = world.worker(&["status", "--json"]).await.json();
    assert!(named(status["nats"]["consumer"]["oldest_pending_error"].as_str().unwrap()), "{status}");

    // A reader fetches singly what the client library cannot read.
    RawClient::connect(world.nats.port())
        .await
        .publish("signals.sentry.issue", b"NATS/1.0\r\nbad\r\n\r\n", b"{}")
        .await;
    world.on_stream(2).await;
    for command in [&["audit"][..], &["replay", "--dry-run"]] {
        let ran = world.worker(command).await;
        assert!(ran.code == Some(2) && named(&ran.err), "{command:?}: {ran:?}");
    }
}

#[tokio::test]
async fn a_command_that_may_make_no_consumer_names_the_right_that_it_lacks() {
    let world = denying(setup().workers(0), r#""$JS.API.CONSUMER.CREATE.>""#).start().await;
    assert_eq!(world.worker(&["migrate"]).await.code, Some(0));
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(1).await;
    for command in [&["audit"][..], &["replay"], &["replay", "--dry-run"]] {
        let ran = world.worker(command).await;
        let named = ran.err.contains("may not publish to $JS.API.CONSUMER.CREATE.SIGNALS");
        assert!(ran.code == Some(2) && named && !ran.err.contains("timed out"), "{command:?}: {ran:?}");
    }
}

#[tokio::test]
async fn the_last_hour_is_counted_without_reading_the_whole_ledger() {
    let world = setup().workers(0).start().await;
    assert_eq!(world.worker(&["migrate"]).await.code, Some(0));
    world
        .execute(
            "INSERT INTO ingest.deliveries (delivery_id, state, severity, stream_sequence, stored_at)
                 SELECT 'd' || n, 'stored', 'high', n, now() - (200001 - n) * interval '1 minute'
                 FROM generate_series(1, 200000) AS n",
        )
        .await;
    world.execute("VACUUM ANALYZE ingest.deliveries").await;
    let status = world.worker(&["status", "--json"]).await;
    assert_eq!(status.json()["postgresql"]["stored_in_the_last_hour"]["high"], 59, "{status:?}");
    let counted = "EXPLAIN SELECT count(*) FILTER (WHERE severity = 'high') FROM ingest.deliveries
        WHERE state = 'stored' AND stored_at > now() - interval '1 hour'";
    let plan: Vec<String> = world.query(counted, &[]).await.iter().map(|row| row.get(0)).collect();
    assert!(plan.iter().any(|line| line.contains("deliveries_stored_at")), "{plan:#?}");
}

#[tokio::test]
async fn a_command_of_the_gateways_outlives_the_reader_of_its_output() {
    let mut world = setup().workers(0).start().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(1).await;
    for arguments in [&["check"][..], &["journal", "status"], &["journal", "status", "--json"]] {
        let (code, err) = world.gateway_command_unread(arguments).await;
        assert!(code == Some(0) && !err.contains("panicked"), "{arguments:?}: {code:?} {err}");
    }
    world.gateway.kill().await;
    world.start_worker().await;
    for arguments in [&["journal", "redrive", "--since", "1h"][..], &["journal", "drain"]] {
        let (code, err) = world.gateway_command_unread(arguments).await;
        assert!(code == Some(0) && !err.contains("panicked"), "{arguments:?}: {code:?} {err}");
    }
}
