//! A stream or consumer that is there already is used as it is, or not at all; never changed.

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy};
use world::{Post, eventually};

use crate::{fixture, setup};

fn config() -> Config {
    Config {
        name: "SIGNALS".into(),
        subjects: vec!["signals.>".into()],
        discard: DiscardPolicy::New,
        max_bytes: 1 << 20,
        ..Config::default()
    }
}

#[tokio::test]
async fn harmless_differences_are_told_and_left() {
    let mut world = setup().launch().await;
    world.gateway.kill().await;
    let jetstream = world.jetstream().await;
    let _ = jetstream.delete_stream("SIGNALS").await; // in case it was made already
    jetstream.create_stream(config()).await.unwrap();
    world.gateway.start_again();
    world.gateway.ready().await;
    world.stored(&world.post(fixture!("issue_created")).await.accepted()).await;
    let stream = jetstream.get_stream("SIGNALS").await.unwrap();
    assert_eq!(stream.cached_info().config.max_bytes, 1 << 20);
    assert_eq!(stream.cached_info().config.subjects, ["signals.>"]);
    let log = world.gateway.log();
    assert!(log.contains("max_bytes") && log.contains("1048576"), "{log}");
}

#[tokio::test]
async fn a_stream_that_would_break_a_promise_is_named_and_not_used_until_it_is_mended() {
    let mut world = setup().launch().await;
    world.gateway.kill().await;
    let jetstream = world.jetstream().await;
    let _ = jetstream.delete_stream("SIGNALS").await; // in case it was made already
    jetstream.create_stream(Config { discard: DiscardPolicy::Old, ..config() }).await.unwrap();
    world.gateway.start_again();
    eventually("the gateway to say what is wrong", || async {
        let answer = world.gateway.ops("/readyz").await;
        answer.json().to_string().contains("discard").then_some(())
    })
    .await;
    let id = world.post(fixture!("issue_created")).await.accepted(); // safe in the journal
    let found = jetstream.get_stream("SIGNALS").await.unwrap();
    assert_eq!(found.cached_info().config.discard, DiscardPolicy::Old, "nothing is changed silently");
    assert_eq!(found.cached_info().state.messages, 0, "and nothing is published into it");
    jetstream.update_stream(config()).await.unwrap();
    world.stored(&id).await;
}

#[tokio::test]
async fn a_work_queue_is_no_stream_for_deliveries() {
    let mut world = setup().launch().await;
    world.gateway.kill().await;
    let jetstream = world.jetstream().await;
    let _ = jetstream.delete_stream("SIGNALS").await; // in case it was made already
    jetstream.create_stream(Config { retention: RetentionPolicy::WorkQueue, ..config() }).await.unwrap();
    world.gateway.start_again();
    for program in [&world.gateway, &world.workers[0]] {
        eventually("both to say what is wrong", || async {
            let answer = program.ops("/readyz").await;
            answer.json().to_string().contains("retention").then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_consumer_that_would_skip_is_named_and_not_used_until_it_is_mended() {
    let mut world = setup().start().await;
    world.workers[0].kill().await;
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    stream.delete_consumer("worker").await.unwrap();
    let skipping = pull::Config {
        durable_name: Some("worker".into()),
        ack_policy: AckPolicy::Explicit,
        deliver_policy: DeliverPolicy::New,
        max_deliver: 5,
        ..pull::Config::default()
    };
    stream.create_consumer(skipping).await.unwrap();
    world.workers[0].start_again();
    eventually("the worker to say what is wrong", || async {
        let answer = world.workers[0].ops("/readyz").await;
        let told = answer.json().to_string();
        (answer.status == 503 && told.contains("max_deliver") && told.contains("deliver_policy")).then_some(())
    })
    .await;
    let id = Post::signed(fixture!("issue_created")).send(world.port()).await.accepted();
    assert_eq!(stream.consumer_info("worker").await.unwrap().delivered.stream_sequence, 0, "nothing was pulled");
    stream.delete_consumer("worker").await.unwrap();
    world.stored(&id).await;
}
