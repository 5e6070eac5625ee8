//! A 202 reaches PostgreSQL exactly once, whatever happens behind the gateway, and without a command from anybody.
//!
//! Each drill has a short form, run by the suite. `DRILLS=long` makes each the size that its promise speaks of:
//! `DRILLS=long cargo test --release -p tests --test promises journal:: -- --test-threads 1`.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use futures_util::StreamExt as _;
use world::{Connection, Post, RawClient, SmallDisk, World, eventually};

use crate::load::{Load, copy, exactly_once, percentile, post, repeats, size, watchful};
use crate::{fixture, setup};

#[tokio::test]
async fn nats_killed_under_load_and_away_changes_nothing_for_the_sender() {
    let mut world = watchful().start().await;
    let load = Load::start(&world, 8);
    tokio::time::sleep(Duration::from_millis(size(1500, 20_000) as u64)).await; // how long the load lasts
    let mut up = load.stop().await;
    world.nats.kill().await;
    let load = Load::start(&world, 8);
    tokio::time::sleep(Duration::from_millis(size(1500, 20_000) as u64)).await;
    let mut down = load.stop().await;
    for sent in [&up, &down] {
        assert_eq!((sent.refused, sent.broken), (0, 0), "every request is a 202");
    }
    let (up_p99, down_p99) = (percentile(&mut up.took, 99), percentile(&mut down.took, 99));
    println!("p99 with NATS up {up_p99:?} ({}), away {down_p99:?} ({})", up.took.len(), down.took.len());
    world.nats.start_again().await.unwrap();
    let accepted = [up.accepted, down.accepted].concat();
    exactly_once(&world, &accepted, 0).await;
}

#[tokio::test]
async fn a_gateway_killed_again_and_again_loses_and_doubles_nothing() {
    // Small segments: a start after a crash reads the last one to its end, which takes a debug build seconds.
    let mut world = watchful().gateway("GATEWAY_JOURNAL_MAX_BYTES", "128MiB").start().await;
    let (mut accepted, mut broken) = (Vec::new(), 0);
    for nats in [true, false] {
        if !nats {
            world.nats.kill().await;
        }
        let load = Load::start(&world, 8);
        let mut random = 1_u64;
        for round in 0..size(6, 50) {
            // At a moment of no meaning: somewhere in the next tenth of a second or two.
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            tokio::time::sleep(Duration::from_millis((random >> 33) % 200)).await;
            world.gateway.kill().await;
            world.gateway.start_again();
            // Every other time it may die before it has read its journal.
            let listens = || async { Connection::open(world.port()).await.ok().map(|_| ()) };
            eventually("the gateway to listen again", listens).await;
            if round % 2 == 0 {
                let answers = || async { Post::get("/").try_send(world.port()).await.ok() };
                eventually("the gateway to answer again", answers).await;
            }
        }
        let sent = load.stop().await;
        if !nats {
            world.nats.start_again().await.unwrap();
        }
        assert!(sent.accepted.len() > 10, "the drill was one");
        println!("{} answered, {} broken", sent.accepted.len(), sent.broken);
        accepted.extend(sent.accepted);
        broken += sent.broken;
        // A request that was on disk when the gateway died was not answered, and is delivered all the same.
        exactly_once(&world, &accepted, broken).await;
    }
}

#[tokio::test]
async fn a_broker_put_back_to_an_older_copy_loses_nothing() {
    let mut world = watchful().start().await;
    let mut ids = post(&world, 30).await;
    world.all_acknowledged().await;
    world.nats.stop().await.unwrap();
    let (store, older) = (world.folder().join("nats"), world.folder().join("older"));
    copy(&store, &older);
    world.nats.start_again().await.unwrap();
    // Published, acknowledged, and forgotten again, before a worker saw it.
    world.workers[0].kill().await;
    ids.extend(post(&world, 40).await);
    let published =
        || async { (world.metric("gateway_journal_entries{state=\"journalled\"}").await == 0.0).then_some(()) };
    eventually("all to be published", published).await;
    world.nats.kill().await;
    copy(&older, &store);
    world.nats.start_again().await.unwrap();
    ids.extend(post(&world, 20).await); // these use the sequences again
    world.workers[0].start_again();
    exactly_once(&world, &ids, 0).await;
    assert!(repeats(&world).await >= 40.0);
}

#[tokio::test]
async fn a_stream_that_is_purged_or_deleted_loses_nothing() {
    let mut world = watchful().start().await;
    let mut ids = post(&world, 10).await;
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    for deleted in [false, true] {
        ids.extend(post(&world, 25).await);
        let published =
            || async { (world.metric("gateway_journal_entries{state=\"journalled\"}").await == 0.0).then_some(()) };
        eventually("all to be published", published).await;
        let jetstream = world.jetstream().await;
        if deleted {
            jetstream.delete_stream("SIGNALS").await.unwrap();
        } else {
            jetstream.get_stream("SIGNALS").await.unwrap().purge().await.unwrap();
        }
        ids.extend(post(&world, 5).await);
    }
    world.workers[0].start_again();
    exactly_once(&world, &ids, 0).await;
}

#[tokio::test]
async fn a_consumer_that_is_moved_ahead_by_hand_loses_nothing() {
    let mut world = watchful().start().await;
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    let ids = post(&world, 30).await;
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    eventually("all to be published", || async { (stream.get_info().await.ok()?.state.messages == 30).then_some(()) })
        .await;
    stream.delete_consumer("worker").await.unwrap();
    let ahead = pull::Config {
        durable_name: Some("worker".into()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        max_deliver: -1,
        ..pull::Config::default()
    };
    // It skips: acknowledged are the first twenty, and nobody stored them.
    let consumer: PullConsumer = stream.create_consumer(ahead).await.unwrap();
    let mut messages = consumer.fetch().max_messages(20).messages().await.unwrap();
    while let Some(message) = messages.next().await {
        message.unwrap().double_ack().await.unwrap();
    }
    world.workers[0].start_again();
    exactly_once(&world, &ids, 0).await;
    assert!(repeats(&world).await >= 20.0);
}

#[tokio::test]
async fn postgresql_away_for_longer_than_the_confirm_time_publishes_nothing_twice() {
    let mut world = watchful().own_postgres().start().await;
    post(&world, 5).await;
    world.until_confirmed().await;
    world.postgres.as_ref().unwrap().kill().await;
    post(&world, 50).await;
    let begin = Instant::now();
    let rounds = size(4, 60) as u64;
    eventually("several confirm times to pass", || async {
        (begin.elapsed() > Duration::from_secs(rounds)).then_some(())
    })
    .await;
    assert_eq!(world.metric("gateway_deliveries_unconfirmed").await, 50.0);
    world.postgres.as_mut().unwrap().start_again().await.unwrap();
    world.connect_sql().await;
    world.until("SELECT count(*) FROM signals", 55_i64).await;
    world.until_confirmed().await;
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    assert_eq!(stream.cached_info().state.messages, 55, "each was published once");
    assert_eq!(repeats(&world).await, 0.0);
}

#[tokio::test]
async fn several_gateways_and_workers_confirm_each_their_own() {
    let world = watchful().workers(3).start().await;
    let other = world.another_gateway().await;
    let mut ids = Vec::new();
    for _ in 0..50 {
        ids.push(Post::signed(fixture!("issue_created")).send(world.port()).await.accepted());
        ids.push(Post::signed(fixture!("error_created")).send(other.port).await.accepted());
    }
    let confirmed = || async {
        let text = String::from_utf8(other.ops("/metrics").await.body.to_vec()).unwrap();
        text.contains("\ngateway_deliveries_unconfirmed 0").then_some(())
    };
    eventually("the other gateway's deliveries to be confirmed", confirmed).await;
    exactly_once(&world, &ids, 0).await;
    // Receipts that are repeated, foreign, late or nonsense change nothing.
    let client = async_nats::connect(world.nats.url()).await.unwrap();
    let status = world.gateway_command(&["journal", "status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status.1).unwrap();
    let subject = format!("receipts.{}", status["gateway"].as_str().unwrap());
    for nonsense in ["1.0.00000000", "999999.1.abcdef01", "", "\n\n", "not a place\n1.2", "\u{ff}"] {
        client.publish(subject.clone(), nonsense.into()).await.unwrap();
    }
    client.flush().await.unwrap();
    let id = world.post(fixture!("issue_created")).await.accepted();
    world.stored(&id).await;
    world.until_confirmed().await;
}

#[tokio::test]
async fn a_delivery_that_nats_refuses_for_its_size_delays_no_other_and_goes_when_the_limit_is_raised() {
    let small = watchful().nats(|nats| nats.max_payload = Some("64KB".into()));
    let mut world = small.start().await;
    let large = format!(r#"{{"data":{{"issue":{{"id":"1","title":"{}"}}}}}}"#, "x".repeat(100_000));
    let large = world.post(large).await.accepted();
    let others = post(&world, 20).await;
    for id in &others {
        world.stored(id).await;
    }
    let aside = || async { (world.metric("gateway_journal_entries{state=\"set_aside\"}").await == 1.0).then_some(()) };
    eventually("the large one to be set aside", aside).await;
    // The command reads what the gateway has written of it, which it does once a second.
    let shown = || async {
        let (code, status, _) = world.gateway_command(&["journal", "status"]);
        assert_eq!(code, Some(0));
        status.lines().any(|line| line.starts_with("set_aside") && line.contains(" 1 ")).then_some(())
    };
    eventually("the command to show it", shown).await;
    world.nats.stop().await.unwrap();
    world.nats.options.max_payload = None;
    world.nats.start_again().await.unwrap();
    world.stored(&large).await;
    world.until_confirmed().await;
}

/// A configuration in which whoever says no name is `door`, who may not publish some subjects.
fn denying(subjects: &str) -> String {
    let user = format!("{{ user: door, password: door, permissions: {{ publish: {{ deny: [{subjects}] }} }} }}");
    format!("no_auth_user: door\nauthorization {{ users: [{user}] }}")
}

#[tokio::test]
async fn a_delivery_that_this_account_may_not_publish_delays_no_other_and_goes_when_it_may() {
    let mut world = watchful().nats(|nats| nats.extra = denying("signals.sentry.error")).start().await;
    let error = Post::signed(fixture!("error_created")).header("Sentry-Hook-Resource", "error");
    let denied = error.send(world.port()).await.accepted();
    for id in &post(&world, 20).await {
        world.stored(id).await;
    }
    let aside = || async { (world.metric("gateway_journal_entries{state=\"set_aside\"}").await == 1.0).then_some(()) };
    eventually("the denied one to be set aside", aside).await;
    let log = world.gateway.log();
    assert!(log.contains("may not publish to signals.sentry.error") && log.contains("permission"), "{log}");
    world.nats.stop().await.unwrap();
    world.nats.options.extra = denying("");
    world.nats.start_again().await.unwrap();
    world.stored(&denied).await;
    world.until_confirmed().await;
}

/// The server's refusal of a publish answers nothing, so each takes its whole time limit and a place in the client.
#[tokio::test]
async fn many_deliveries_that_this_account_may_not_publish_cost_no_client_and_are_refused_once() {
    let world = watchful().nats(|nats| nats.extra = denying("signals.sentry.error")).start().await;
    post_errors(&world, 1100).await;
    world.gateway.until_metric("gateway_journal_entries{state=\"set_aside\"}", 1100.0).await;
    for id in &post(&world, 5).await {
        world.stored(id).await;
    }
    assert_eq!(world.metric("gateway_nats_clients_replaced_total").await, 0.0);
    assert_eq!(world.metric("gateway_publish_refusals_total{kind=\"permission\"}").await, 1100.0);
}

#[tokio::test]
async fn a_broker_whose_disk_is_full_delays_and_loses_nothing() {
    let mut world = watchful().start().await;
    world.nats.stop().await.unwrap();
    let Some(disk) = SmallDisk::mount(&world.nats.options.dir.join("jetstream"), "24m") else {
        let test = "a_broker_whose_disk_is_full_delays_and_loses_nothing";
        return world::skipped(test, "this process may not mount a tmpfs");
    };
    world.nats.start_again().await.unwrap(); // on an empty disk: the stream is made anew
    let mut ids = post(&world, 1).await;
    world.stored(&ids[0]).await;
    for number in 0..400 {
        let body = format!(r#"{{"data":{{"issue":{{"id":"{number}","title":"{}"}}}}}}"#, "x".repeat(100_000));
        ids.push(world.post(body).await.accepted());
    }
    let full = || async { disk.is_full().then_some(()) };
    eventually("the broker's disk to be full", full).await;
    ids.extend(post(&world, 5).await);
    assert!(world.metric("gateway_deliveries_unconfirmed").await > 100.0);
    disk.resize("200m");
    // NATS goes on only after a restart; until then its stream is broken.
    world.nats.kill().await;
    world.nats.start_again().await.unwrap();
    exactly_once(&world, &ids, 0).await;
}

#[tokio::test]
async fn a_stream_that_is_full_delays_and_loses_nothing() {
    let world = watchful().gateway("NATS_MAX_BYTES", "100000").start().await;
    let ids = post(&world, 120).await; // about 200 kB
    let full = || async { (world.metric("gateway_journal_entries{state=\"journalled\"}").await > 0.0).then_some(()) };
    eventually("the stream to be full", full).await;
    let jetstream = world.jetstream().await;
    world.all_acknowledged().await;
    let mut config = jetstream.get_stream("SIGNALS").await.unwrap().cached_info().config.clone();
    config.max_bytes = 10_000_000;
    jetstream.update_stream(config).await.unwrap();
    exactly_once(&world, &ids, 0).await;
}

#[tokio::test]
async fn a_full_journal_is_503_and_makes_room_by_itself() {
    let small = watchful().gateway("GATEWAY_JOURNAL_MAX_BYTES", "4MiB").gateway("GATEWAY_MAX_BODY_BYTES", "1MiB");
    let mut world = small.start().await;
    world.nats.kill().await;
    let mut ids = Vec::new();
    let body =
        |number: usize| format!(r#"{{"data":{{"issue":{{"id":"{number}","title":"{}"}}}}}}"#, "x".repeat(60_000));
    let refused = loop {
        let answer = world.post(body(ids.len())).await;
        if answer.status != 202 {
            break answer;
        }
        ids.push(answer.accepted());
        assert!(ids.len() < 200, "4 MiB are full sooner");
    };
    assert_eq!(refused.status, 503);
    assert!(refused.headers.contains_key("retry-after"));
    refused.error();
    assert_eq!(world.gateway.ops("/readyz").await.status, 503);
    world.nats.start_again().await.unwrap();
    let room = || async { Some(world.post(body(0)).await).filter(|answer| answer.status == 202) };
    ids.push(eventually("room in the journal", room).await.accepted());
    world.gateway.ready().await;
    exactly_once(&world, &ids, 0).await;
}

#[tokio::test]
async fn a_second_gateway_is_kept_out_of_a_journal_in_use() {
    let world = setup().workers(0).start().await;
    let ports = (local::ports::free().unwrap().to_string(), local::ports::free().unwrap().to_string());
    let (listen, ops) = (format!("127.0.0.1:{}", ports.0), format!("127.0.0.1:{}", ports.1));
    let (code, _, stderr) = world.gateway_command(&["--listen", &listen, "--ops-listen", &ops]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr.contains("in use by process") && stderr.contains(&world.gateway.process().pid().to_string()),
        "{stderr}"
    );
}

#[tokio::test]
async fn an_orphaned_journal_is_drained_and_a_journal_is_redriven() {
    let mut world =
        setup().gateway("GATEWAY_JOURNAL_RETAIN", "1h").gateway("GATEWAY_CONFIRM_AFTER", "1s").start().await;
    world.nats.kill().await;
    let ids = post(&world, 30).await;
    world.gateway.kill().await;
    world.nats.start_again().await.unwrap();
    world.workers[0].ready().await;
    let (code, stdout, stderr) = world.gateway_command_async(&["journal", "drain"]).await;
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    world.until("SELECT count(*) FROM signals", 30_i64).await;

    // The database loses what it had; the journal still has it, for an hour.
    world.execute("TRUNCATE signals, issues, ingest.deliveries").await;
    let since = ["journal", "redrive", "--since", "1h"];
    let (code, stdout, stderr) = world.gateway_command_async(&[&since[..], &["--dry-run"]].concat()).await;
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("30 deliveries"), "{stdout}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 0);
    let (code, stdout, stderr) = world.gateway_command_async(&since).await;
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    for id in &ids {
        world.stored(id).await;
    }
}

#[tokio::test]
async fn a_redrive_passes_over_what_the_gateway_lets_go_meanwhile() {
    let world = setup().workers(0).start().await;
    post(&world, 3).await;
    world.on_stream(3).await;
    world.gateway.stop().await;
    world.nats.process().freeze().unwrap();
    let mut redrive = world.gateway_process(&["journal", "redrive", "--since", "1h"]);
    eventually("the redrive to have looked", || async { redrive.out().contains("3 deliveries").then_some(()) }).await;
    // As a gateway does once each entry in it is confirmed.
    std::fs::remove_file(world.folder().join("gateway-0/000000000001.journal")).unwrap();
    world.nats.process().thaw().unwrap();
    let ran = redrive.ended().await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.contains("published 0") && ran.out.contains("3 let go by the gateway meanwhile"), "{ran:?}");
}

#[tokio::test]
async fn large_bodies_that_the_stream_has_no_room_for_delay_no_others() {
    // Nobody reads, so what is on the stream stays there: one of the large ones, and all of the small.
    let world = setup().workers(0).gateway("NATS_MAX_BYTES", "4000000").start().await;
    let body =
        |number: usize, bytes| format!(r#"{{"data":{{"issue":{{"id":"{number}","title":"{}"}}}}}}"#, "x".repeat(bytes));
    let large: Vec<_> = (0..4).map(|number| body(number, 3_000_000)).collect();
    for body in &large {
        world.post(body.clone()).await.accepted();
    }
    world.gateway.until_metric("gateway_journal_entries{state=\"published\"}", 1.0).await;
    for number in 4..54 {
        world.post(body(number, 100)).await.accepted();
    }
    world.gateway.until_metric("gateway_journal_entries{state=\"published\"}", 51.0).await;
    assert_eq!(world.metric("gateway_journal_entries{state=\"journalled\"}").await, 3.0, "they wait for room");

    let jetstream = world.jetstream().await;
    let stream = jetstream.get_stream("SIGNALS").await.unwrap();
    let mut config = stream.cached_info().config.clone();
    config.max_bytes = 100_000_000;
    jetstream.update_stream(config).await.unwrap();
    world.gateway.until_metric("gateway_journal_entries{state=\"published\"}", 54.0).await;
    let mut late = Vec::new();
    for sequence in 52..55 {
        late.push(stream.get_raw_message(sequence).await.unwrap().payload);
    }
    late.sort();
    let first = stream.get_raw_message(1).await.unwrap().payload;
    let mut expected: Vec<_> = large.into_iter().map(bytes::Bytes::from).filter(|body| *body != first).collect();
    expected.sort();
    assert!(late == expected, "a body that is read again for another try is the one that came");
}

#[tokio::test]
async fn a_backlog_of_more_segments_than_files_may_be_open_is_taken_and_published() {
    // Segments of 1 MiB, and 128 descriptors. The gateway cannot allow itself more.
    const FEW: &[&str] = &["/bin/sh", "-c", "ulimit -n 128 && exec \"$0\" \"$@\""];
    let few = watchful().gateway_under(FEW).gateway("GATEWAY_MAX_CONNECTIONS", "20");
    let mut world = few.gateway("GATEWAY_JOURNAL_MAX_BYTES", "256MiB").start().await;
    world.nats.kill().await;
    let body =
        |number: usize| format!(r#"{{"data":{{"issue":{{"id":"{number}","title":"{}"}}}}}}"#, "x".repeat(800_000));
    let mut ids = Vec::new();
    let mut connection = Connection::open(world.port()).await.unwrap();
    for number in 0..150 {
        ids.push(connection.send(&Post::signed(body(number))).await.unwrap().accepted());
    }
    world.gateway.kill().await;
    world.gateway.start_again();
    world.gateway.ready().await;
    let (code, status, errors) = world.gateway_command(&["journal", "status"]);
    assert_eq!(code, Some(0), "{status}{errors}");
    world.nats.start_again().await.unwrap();
    exactly_once(&world, &ids, 0).await;
}

/// A stream that takes no deliveries of `error`, beside a subscriber that takes them and never answers: a publish of one
/// gets no acknowledgement.
async fn without_acknowledgements_of_errors(world: &World) -> RawClient {
    let mut subscriber = RawClient::connect(world.nats.port()).await;
    subscriber.subscribe("signals.sentry.error").await;
    let jetstream = world.jetstream().await;
    let mut config = jetstream.get_stream("SIGNALS").await.unwrap().cached_info().config.clone();
    config.subjects = vec!["signals.sentry.issue".into()];
    jetstream.update_stream(config).await.unwrap();
    subscriber
}

/// Reads what comes, so that the server does not close the connection.
fn read_all(mut subscriber: RawClient) {
    tokio::spawn(async move {
        loop {
            subscriber.next().await;
        }
    });
}

/// Posts that many deliveries of `error`.
async fn post_errors(world: &World, count: usize) -> Vec<String> {
    let mut connection = Connection::open(world.port()).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..count {
        let error = Post::signed(fixture!("error_created")).header("Sentry-Hook-Resource", "error");
        ids.push(connection.send(&error).await.unwrap().accepted());
    }
    ids
}

async fn acknowledge_errors(world: &World) {
    let jetstream = world.jetstream().await;
    let mut config = jetstream.get_stream("SIGNALS").await.unwrap().cached_info().config.clone();
    config.subjects = vec!["signals.sentry.*".into()];
    jetstream.update_stream(config).await.unwrap();
}

#[tokio::test]
async fn deliveries_that_are_tried_again_and_again_hold_up_no_others_and_are_told() {
    let world = watchful().start().await;
    read_all(without_acknowledgements_of_errors(&world).await);
    let mut ids = post_errors(&world, 400).await;
    let tried = || async {
        let again = world.metric("gateway_publish_retries_total{cause=\"timed_out\"}").await;
        (again >= 400.0).then_some(())
    };
    eventually("each to be tried in vain", tried).await;
    let others = post(&world, 20).await;
    for id in &others {
        world.stored(id).await;
    }
    let told = || async {
        let checks = world.gateway.ops("/readyz").await.json();
        let check = checks.as_array()?.iter().find(|check| check["name"] == "publishing")?.clone();
        (check["degraded"] == true && check["detail"].as_str()?.contains("400 are not acknowledged")).then_some(())
    };
    eventually("the gateway to say that they are not acknowledged", told).await;
    assert_eq!(world.metric("gateway_publish_overdue{cause=\"timed_out\"}").await, 400.0);
    acknowledge_errors(&world).await;
    ids.extend(others);
    exactly_once(&world, &ids, 0).await;
    assert_eq!(world.metric("gateway_publish_overdue{cause=\"timed_out\"}").await, 0.0);
}

/// Connections of this process to a port of this machine.
fn connections(pid: u32, port: u16) -> usize {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let sockets: HashSet<_> = descriptors
        .filter_map(|descriptor| {
            let target = std::fs::read_link(descriptor.ok()?.path()).ok()?;
            Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    // `sl local rem_address st ... inode`: 01 is ESTABLISHED (proc_pid_net(5)).
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap();
    let is_one = |line: &&str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields[2].ends_with(&format!(":{port:04X}")) && fields[3] == "01" && sockets.contains(fields[9])
    };
    table.lines().skip(1).filter(is_one).count()
}

#[tokio::test]
async fn publishes_without_an_answer_do_not_pile_up_in_the_client() {
    let world = watchful().start().await;
    read_all(without_acknowledgements_of_errors(&world).await);
    let mut ids = post_errors(&world, 600).await;
    let replaced = || async { (world.metric("gateway_nats_clients_replaced_total").await >= 1.0).then_some(()) };
    eventually("a new client", replaced).await;
    let (pid, port) = (world.gateway.process().pid(), world.nats.port());
    eventually("the old client to end", || async { (connections(pid, port) == 1).then_some(()) }).await;
    acknowledge_errors(&world).await;
    ids.extend(post(&world, 5).await);
    exactly_once(&world, &ids, 0).await; // receipts, too, come over the new connection
    let log = world.gateway.log();
    assert!(log.contains("requests to NATS had no answer"), "{log}");
    assert!(!log.contains("lost the connection to NATS"), "the old client leaves without a word: {log}");
}

/// A new client is no new limit: what NATS has refused for good is not tried again for it.
#[tokio::test]
async fn a_client_that_is_replaced_has_nothing_tried_again_that_nats_refused() {
    let small = watchful().nats(|nats| nats.max_payload = Some("64KB".into()));
    let world = small.start().await;
    let large = format!(r#"{{"data":{{"issue":{{"id":"1","title":"{}"}}}}}}"#, "x".repeat(100_000));
    world.post(large).await.accepted();
    world.gateway.until_metric("gateway_journal_entries{state=\"set_aside\"}", 1.0).await;
    read_all(without_acknowledgements_of_errors(&world).await);
    world.post(fixture!("issue_created")).await.accepted();
    let refusals = || world.metric("gateway_publish_refusals_total{kind=\"too_large\"}");
    // The stream was changed, which is a reason to try again.
    eventually("the changed stream to be looked at", || async { (refusals().await == 2.0).then_some(()) }).await;
    post_errors(&world, 600).await;
    let replaced = || async { (world.metric("gateway_nats_clients_replaced_total").await >= 1.0).then_some(()) };
    eventually("a new client", replaced).await;
    for id in &post(&world, 5).await {
        world.stored(id).await;
    }
    assert_eq!(refusals().await, 2.0);
}

#[tokio::test]
async fn a_drain_refuses_a_directory_that_holds_no_journal() {
    let world = setup().workers(0).start().await;
    for (name, make) in [("no-such", false), ("empty", true)] {
        let dir = world.folder().join(name);
        if make {
            std::fs::create_dir(&dir).unwrap();
        }
        let named = dir.display().to_string();
        let (code, out, err) = world.gateway_command_async(&["journal", "drain", "--dir", &named]).await;
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains(&named) && !out.contains("can go"), "{out}{err}");
        let found = std::fs::read_dir(&dir).map(Iterator::count);
        assert_eq!(found.ok(), make.then_some(0), "nothing was made there");
    }
}

#[tokio::test]
async fn a_drain_ends_with_the_directory_and_what_became_of_its_deliveries() {
    let mut world = setup().start().await;
    world.nats.kill().await;
    post(&world, 30).await;
    world.gateway.kill().await;
    world.nats.start_again().await.unwrap();
    let dir = world.folder().join("gateway-0").display().to_string();
    let (code, out, err) = world.gateway_command_async(&["journal", "drain", "--dir", &dir]).await;
    assert_eq!(code, Some(0), "{out}{err}");
    let last = out.lines().last().unwrap();
    for part in [dir.as_str(), "published 30", "confirmed 30"] {
        assert!(last.contains(part), "{part} in {last}");
    }
    world.until("SELECT count(*) FROM signals", 30_i64).await;
}

#[tokio::test]
async fn a_drain_tries_what_nats_refused_under_the_limits_of_today() {
    let small = watchful().nats(|nats| nats.max_payload = Some("64KB".into()));
    let mut world = small.start().await;
    let large = format!(r#"{{"data":{{"issue":{{"id":"1","title":"{}"}}}}}}"#, "x".repeat(100_000));
    let large = world.post(large).await.accepted();
    world.gateway.until_metric("gateway_journal_entries{state=\"set_aside\"}", 1.0).await;
    assert_eq!(world.gateway.stop().await, Some(0));
    // Under the same limits it is refused again, and told.
    let (code, out, err) = world.gateway_command_async(&["journal", "drain"]).await;
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(err.contains("1 refused by NATS"), "{out}{err}");
    world.nats.stop().await.unwrap();
    world.nats.options.max_payload = None;
    world.nats.start_again().await.unwrap();
    let (code, out, err) = world.gateway_command_async(&["journal", "drain"]).await;
    assert_eq!(code, Some(0), "{out}{err}");
    world.stored(&large).await;
}

#[tokio::test]
async fn a_redrive_has_many_publishes_on_their_way_at_once() {
    let world = setup().gateway("GATEWAY_JOURNAL_RETAIN", "1h").start().await;
    let ids = post_errors(&world, 20).await;
    exactly_once(&world, &ids, 0).await;
    let mut subscriber = without_acknowledgements_of_errors(&world).await;
    // One after the other, the second would be sent only when the first has waited for its acknowledgement in vain.
    let _redrive = world.gateway_process(&["journal", "redrive", "--since", "1h"]);
    let all = async {
        for _ in 0..20 {
            subscriber.next().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("20 time-outs in a row take 100 s");
}
