//! What the worker goes on through when the broker is not what it was: a consumer or stream that is gone, another under
//! the same name, files of an earlier day.

use std::path::Path;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::consumer::{PriorityPolicy, PullConsumer, pull};
use async_nats::jetstream::{AckKind, stream};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use local::{NatsOptions, NatsServer, Scratch, ports};
use world::{Post, World, eventually, programs};

use crate::{fixture, setup};

async fn post_and_store(world: &World) {
    let accepted = || async { Some(world.post(fixture!("issue_created")).await).filter(|answer| answer.status == 202) };
    let id = eventually("the gateway to accept", accepted).await.accepted();
    world.stored(&id).await;
}

async fn stream(world: &World) -> stream::Stream {
    world.jetstream().await.get_stream("SIGNALS").await.unwrap()
}

/// How often the worker began anew. One that spins does so hundreds of times a second.
fn begun_anew(world: &World) -> usize {
    world.workers[0].log().matches("pulling again").count()
}

#[tokio::test]
async fn a_deleted_consumer_is_made_again() {
    let world = setup().start().await;
    post_and_store(&world).await;
    stream(&world).await.delete_consumer("worker").await.unwrap();
    post_and_store(&world).await;
    world.all_acknowledged().await;
    assert!(begun_anew(&world) < 10, "{}", world.workers[0].log());
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 2);
}

#[tokio::test]
async fn a_stream_that_is_deleted_and_made_again_is_read_from_its_beginning() {
    let world = setup().start().await;
    for _ in 0..3 {
        post_and_store(&world).await;
    }
    let jetstream = world.jetstream().await;
    let config = stream(&world).await.cached_info().config.clone();
    jetstream.delete_stream("SIGNALS").await.unwrap();
    eventually("the worker to say what is missing", || async {
        let answer = world.workers[0].ops("/readyz").await;
        (answer.status == 503 && answer.json().to_string().contains("stream SIGNALS is not there")).then_some(())
    })
    .await;
    jetstream.create_stream(config).await.unwrap();
    post_and_store(&world).await; // its sequence is one that the old stream had, too
    world.workers[0].ready().await;
    world.all_acknowledged().await;
    assert!(begun_anew(&world) < 10, "{}", world.workers[0].log());
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 4);
}

#[tokio::test]
async fn a_consumer_beyond_the_streams_end_skips_nothing() {
    let mut world = setup().start().await;
    post_and_store(&world).await;
    world.all_acknowledged().await;
    // While the worker runs ...
    stream(&world).await.reset_consumer("worker", Some(1_000)).await.unwrap();
    eventually("the worker to mend it", || async {
        world.workers[0].log().contains("the stream has gone back in time").then_some(())
    })
    .await;
    post_and_store(&world).await;
    // ... and before it starts.
    world.workers[0].kill().await;
    stream(&world).await.reset_consumer("worker", Some(1_000)).await.unwrap();
    world.workers[0].start_again();
    world.workers[0].ready().await;
    post_and_store(&world).await;
    world.all_acknowledged().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 3);
}

#[tokio::test]
async fn what_was_published_before_a_consumer_was_moved_back_is_not_skipped() {
    let mut world = setup().start().await;
    for _ in 0..3 {
        post_and_store(&world).await;
    }
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    // A stream of earlier files takes new deliveries before any worker looks.
    stream(&world).await.reset_consumer("worker", Some(1_000)).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(world.post(fixture!("issue_created")).await.accepted());
    }
    world.on_stream(6).await;
    world.workers[0].start_again();
    for id in &ids {
        world.stored(id).await;
    }
    world.all_acknowledged().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 6);
    let log = world.workers[0].log();
    assert!(log.contains("the stream has gone back in time") && log.contains("from sequence 1"), "{log}");
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

#[tokio::test]
async fn a_store_put_back_to_an_older_copy_is_gone_on_with() {
    let mut world = setup().start().await;
    let store = world.nats.options.dir.join("jetstream");
    let older = world.folder().join("older");
    for _ in 0..5 {
        post_and_store(&world).await;
    }
    world.all_acknowledged().await;
    world.nats.stop().await.unwrap();
    copy(&store, &older);
    world.nats.start_again().await.unwrap();
    for _ in 0..10 {
        post_and_store(&world).await;
    }
    world.nats.stop().await.unwrap();
    std::fs::remove_dir_all(&store).unwrap();
    copy(&older, &store);
    world.nats.start_again().await.unwrap();
    for _ in 0..10 {
        post_and_store(&world).await;
    }
    world.all_acknowledged().await;
    assert_eq!(stream(&world).await.cached_info().state.last_sequence, 15, "sequences were used again");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 25);
}

/// Three servers that are one.
struct Cluster {
    servers: Vec<NatsServer>,
}

impl Cluster {
    async fn start(folder: &Path) -> Cluster {
        let ports: Vec<u16> = (0..3).map(|_| ports::free().unwrap()).collect();
        let routes: Vec<String> = ports.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
        let server = |(number, port): (usize, &u16)| {
            let mut options = NatsOptions::new(folder.join(format!("nats-{number}")));
            options.extra = format!(
                "server_name: n{number}\ncluster {{ name: three, listen: \"127.0.0.1:{port}\", routes: [{}] }}",
                routes.join(", ")
            );
            NatsServer::launch(programs(), options).unwrap()
        };
        let cluster = Cluster { servers: ports.iter().enumerate().map(server).collect() };
        cluster.ready().await;
        cluster
    }

    async fn ready(&self) {
        join_all(self.servers.iter().map(async |server| server.ready().await.unwrap())).await;
    }

    async fn stop(&self) {
        join_all(self.servers.iter().map(async |server| server.stop().await.unwrap())).await;
    }

    async fn start_again(&mut self) {
        for server in &mut self.servers {
            server.launch_again().await.unwrap();
        }
        self.ready().await;
    }

    fn urls(&self) -> String {
        self.servers.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }
}

/// Puts the store back to `older`, but for what is the consumer's: its own folder and that of its Raft log.
fn put_back_all_but_the_consumer(store: &Path, older: &Path) {
    let is_the_consumers = |path: &Path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name == "obs" || name.starts_with("C-R3F-")
    };
    for entry in std::fs::read_dir(store).unwrap().map(|entry| entry.unwrap().path()) {
        let (same, is_dir) = (older.join(entry.file_name().unwrap()), entry.is_dir());
        if is_the_consumers(&entry) {
        } else if is_dir && same.is_dir() {
            put_back_all_but_the_consumer(&entry, &same);
        } else if is_dir {
            std::fs::remove_dir_all(entry).unwrap();
        } else {
            std::fs::remove_file(entry).unwrap();
        }
    }
    for entry in std::fs::read_dir(older).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_file() && !is_the_consumers(&entry) {
            std::fs::copy(&entry, store.join(entry.file_name().unwrap())).unwrap();
        }
    }
}

/// A single server puts such a consumer right when it reads its files; a cluster does not.
#[tokio::test]
async fn a_cluster_whose_stream_went_back_and_whose_consumer_did_not_skips_nothing() {
    let scratch = Scratch::new("cluster").unwrap();
    let mut cluster = Cluster::start(scratch.path()).await;
    let setup = setup().gateway("NATS_REPLICAS", "3").worker("NATS_REPLICAS", "3");
    let world = setup.gateway("NATS_URL", &cluster.urls()).worker("NATS_URL", &cluster.urls()).start().await;
    for _ in 0..5 {
        post_and_store(&world).await;
    }
    cluster.stop().await;
    let folders: Vec<_> = cluster.servers.iter().map(|server| server.options.dir.clone()).collect();
    for folder in &folders {
        copy(&folder.join("jetstream"), &folder.join("older"));
    }
    cluster.start_again().await;
    for _ in 0..10 {
        post_and_store(&world).await;
    }
    cluster.stop().await;
    for folder in &folders {
        put_back_all_but_the_consumer(&folder.join("jetstream"), &folder.join("older"));
    }
    cluster.start_again().await;
    eventually("the worker to mend the consumer", || async {
        world.workers[0].log().contains("the stream has gone back in time").then_some(())
    })
    .await;
    for _ in 0..10 {
        post_and_store(&world).await;
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 25);
    assert_eq!(world.value::<i64>("SELECT max(stream_sequence) FROM ingest.deliveries").await, 15, "used again");
}

#[tokio::test]
async fn a_broker_that_hangs_is_told_and_waited_for() {
    let world = setup().start().await;
    post_and_store(&world).await;
    world.nats.process().freeze().unwrap();
    eventually("the worker to tell", || async { (world.workers[0].ops("/readyz").await.status == 503).then_some(()) })
        .await;
    world.nats.process().thaw().unwrap();
    post_and_store(&world).await;
    world.workers[0].ready().await;
}

#[tokio::test]
async fn a_consumer_that_stands_still_is_told() {
    let world = setup().start().await;
    post_and_store(&world).await;
    let until = SystemTime::now() + Duration::from_secs(3_600);
    stream(&world).await.pause_consumer("worker", until.into()).await.unwrap();
    let id = world.post(fixture!("issue_created")).await.accepted();
    eventually("the worker to tell", || async {
        let answer = world.workers[0].ops("/readyz").await;
        (answer.status == 503 && answer.json().to_string().contains("the consumer is paused")).then_some(())
    })
    .await;
    stream(&world).await.resume_consumer("worker").await.unwrap();
    world.stored(&id).await;
    world.workers[0].ready().await;
}

#[tokio::test]
async fn deliveries_that_others_hold_and_let_nobody_else_have_are_told() {
    let mut world = setup().start().await;
    post_and_store(&world).await;
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    // As many as may be un-acked are with somebody who goes on saying that they are worked on.
    let stream = stream(&world).await;
    stream.delete_consumer("worker").await.unwrap();
    let config = pull::Config {
        durable_name: Some("worker".into()),
        max_ack_pending: 2,
        ack_wait: Duration::from_secs(3),
        ..pull::Config::default()
    };
    let somebody = stream.create_consumer(config).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(world.post(fixture!("issue_created")).await.accepted());
    }
    world.on_stream(4).await;
    let held: Vec<_> = somebody.fetch().max_messages(2).messages().await.unwrap().collect().await;
    world.workers[0].start_again();
    eventually("the worker to tell", || async {
        for message in &held {
            message.as_ref().unwrap().ack_with(AckKind::Progress).await.unwrap();
        }
        let answer = world.workers[0].ops("/readyz").await;
        (answer.status == 503 && answer.json().to_string().contains("2 are with workers that neither store"))
            .then_some(())
    })
    .await;
    assert_eq!(world.workers[0].ops("/healthz").await.status, 200, "it is alive: a restart would mend nothing");
    drop(held); // nobody says so any more: they come to the worker, and it is ready by itself
    for id in &ids {
        world.stored(id).await;
    }
    world.workers[0].ready().await;
}

/// Kills the worker, replaces the consumer by one with these settings, and starts the worker again.
async fn with_consumer(world: &mut World, config: pull::Config) {
    world.workers[0].kill().await;
    let stream = stream(world).await;
    stream.delete_consumer("worker").await.unwrap();
    let config = pull::Config { durable_name: Some("worker".into()), max_ack_pending: 16_384, ..config };
    stream.create_consumer(config).await.unwrap();
    world.workers[0].start_again();
}

#[tokio::test]
async fn limits_of_the_consumer_on_requests_are_held_to_and_told() {
    let mut world = setup().start().await;
    let limits = pull::Config {
        filter_subject: "signals.sentry.*".into(),
        max_batch: 10,
        max_expires: Duration::from_millis(200),
        max_bytes: 100_000,
        ..pull::Config::default()
    };
    with_consumer(&mut world, limits).await;
    let mut ids = Vec::new();
    for _ in 0..30 {
        ids.push(world.post(fixture!("issue_created")).await.accepted());
    }
    // Larger than one request may ask for.
    let large = format!(r#"{{"action":"created","filling":"{}"}}"#, "x".repeat(1 << 20));
    ids.push(world.post(large).await.accepted());
    ids.push(world.post(fixture!("issue_created")).await.accepted());
    for id in &ids {
        world.stored(id).await;
    }
    world.all_acknowledged().await;
    world.workers[0].ready().await;
    assert_eq!(begun_anew(&world), 0, "{}", world.workers[0].log());
    let (log, check) = (world.workers[0].log(), world.worker(&["check"]).await);
    for limit in ["max_batch 10", "max_expires 200ms", "max_bytes 100000"] {
        assert!(log.contains(limit) && check.out.contains(limit), "{limit} in {log} and in {check:?}");
    }
    assert_eq!(check.code, Some(0), "{check:?}");
}

#[tokio::test]
async fn a_consumer_that_refuses_every_request_is_told_for_as_long_as_deliveries_wait() {
    // Requests for messages go to a subject that no program hears. The look at the consumer still works.
    let mappings = r#"mappings = { "$JS.API.CONSUMER.MSG.NEXT.SIGNALS.worker": "nobody.hears.this" }"#;
    let world = setup().nats(|options| options.extra = mappings.into()).launch().await;
    world.gateway.ready().await;
    world.post(fixture!("issue_created")).await.accepted();
    eventually("the worker to tell", || async {
        let answer = world.workers[0].ops("/readyz").await;
        (answer.status == 503 && answer.json().to_string().contains("none has moved")).then_some(())
    })
    .await;
    // It goes on telling, whatever begins anew meanwhile.
    let sessions = async || world.workers[0].metric(r#"worker_retries_total{class="nats_pull"}"#).await;
    let before = sessions().await;
    eventually("a few more sessions", || async {
        assert_eq!(world.workers[0].ops("/readyz").await.status, 503);
        (sessions().await > before + 5.0).then_some(())
    })
    .await;
    assert_eq!(world.workers[0].ops("/healthz").await.status, 200, "it is alive: a restart would mend nothing");
}

#[tokio::test]
async fn a_consumer_that_wants_groups_is_named_and_not_used() {
    let mut world = setup().start().await;
    let groups = pull::Config {
        filter_subject: "signals.sentry.*".into(),
        priority_policy: PriorityPolicy::PinnedClient,
        priority_groups: vec!["a".into()],
        ..pull::Config::default()
    };
    with_consumer(&mut world, groups).await;
    eventually("the worker to tell", || async {
        let answer = world.workers[0].ops("/readyz").await;
        (answer.status == 503 && answer.json().to_string().contains("priority_policy")).then_some(())
    })
    .await;
}

/// A consumer's `backoff` takes the place of its ack wait, delivery by delivery.
#[tokio::test]
async fn a_batch_that_is_held_is_not_redelivered_by_a_consumer_with_a_backoff() {
    let mut world = setup().start().await;
    let backoff = vec![Duration::from_secs(60), Duration::from_secs(9)];
    let config = pull::Config { filter_subject: "signals.sentry.*".into(), backoff, ..pull::Config::default() };
    world.workers[0].kill().await;
    world.execute("BEGIN; LOCK TABLE issues IN SHARE MODE").await; // it can be read, and nothing can be stored
    with_consumer(&mut world, config).await;
    world.workers[0].kill().await;
    let id = world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(1).await;
    // Another client takes the first delivery and hands it back. The second has nine seconds.
    let consumer: PullConsumer = stream(&world).await.get_consumer("worker").await.unwrap();
    let mut first = consumer.batch().max_messages(1).expires(Duration::from_secs(5)).messages().await.unwrap();
    let message = first.next().await.unwrap().unwrap();
    message.ack_with(AckKind::Nak(None)).await.unwrap();
    let spy = async_nats::connect(world.nats.url()).await.unwrap();
    let mut acks = spy.subscribe("$JS.ACK.SIGNALS.worker.>").await.unwrap();
    spy.flush().await.unwrap();
    world.workers[0].start_again();
    for _ in 0..5 {
        let progress = tokio::time::timeout(Duration::from_secs(60), acks.next()).await;
        let progress = progress.expect("progress is told three times in nine seconds").unwrap();
        assert_eq!(&progress.payload[..], b"+WPI", "{progress:?}");
        assert!(progress.subject.starts_with("$JS.ACK.SIGNALS.worker.2."), "the second delivery still: {progress:?}");
    }
    world.execute("ROLLBACK").await;
    world.stored(&id).await;
}

#[tokio::test]
async fn bodies_that_fill_a_batch_and_one_that_is_larger_are_stored() {
    let world = setup().nats(|options| options.extra = "max_payload: 33554432".into()).start().await;
    // Five of 8 MiB through the gateway, where a batch has 16 MiB.
    let large = format!(r#"{{"action":"created","filling":"{}"}}"#, "x".repeat((8 << 20) - 100));
    for _ in 0..5 {
        Post::signed(large.clone()).send(world.port()).await.accepted();
    }
    // One of 20 MiB that somebody else published.
    let larger = format!(r#"{{"action":"created","filling":"{}"}}"#, "x".repeat(20 << 20));
    let jetstream = world.jetstream().await;
    jetstream.publish("signals.sentry.issue", larger.into()).await.unwrap().await.unwrap();
    world.until("SELECT count(*) FROM signals", 6_i64).await;
    world.all_acknowledged().await;
}
