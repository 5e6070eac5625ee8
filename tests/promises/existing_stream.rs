//! A stream or consumer that is there already is used as it is, or not at all; never changed.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, PersistenceMode, RetentionPolicy};
use world::{Post, World, eventually};

use crate::load::post;
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

/// Waits until the gateway names this setting of the stream, and posts: nothing may be published.
async fn nothing_is_published_while(world: &World, setting: &str) -> Vec<String> {
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    let before = stream.cached_info().state.last_sequence;
    eventually("the gateway to say what is wrong", || async {
        let checks = world.gateway.ops("/readyz").await.json();
        let check = checks.as_array()?.iter().find(|check| check["name"] == "stream")?.clone();
        (check["ok"] == false && check["detail"].as_str()?.contains(setting)).then_some(())
    })
    .await;
    let ids = post(world, 20).await; // published, the first would be on the stream long before the last is answered
    let state = stream.get_info().await.unwrap().state;
    assert_eq!(state.last_sequence, before, "published to a stream that drops what no worker has read");
    ids
}

#[tokio::test]
async fn a_stream_that_is_made_unfit_while_the_gateway_runs_is_not_published_to() {
    let world = setup().start().await;
    let mut ids = vec![world.post(fixture!("issue_created")).await.accepted()];
    world.stored(&ids[0]).await;
    let jetstream = world.jetstream().await;
    let fit = jetstream.get_stream("SIGNALS").await.unwrap().cached_info().config.clone();
    for (setting, unfit) in [
        ("discard", Config { discard: DiscardPolicy::Old, ..fit.clone() }),
        ("max_messages_per_subject", Config { max_messages_per_subject: 1, ..fit.clone() }),
    ] {
        jetstream.update_stream(unfit).await.unwrap();
        ids.extend(nothing_is_published_while(&world, setting).await);
        jetstream.update_stream(fit.clone()).await.unwrap();
        for id in &ids {
            world.stored(id).await;
        }
    }
}

#[tokio::test]
async fn after_an_outage_nothing_is_published_before_the_stream_is_looked_at() {
    let mut world = setup().start().await;
    let mut ids = vec![world.post(fixture!("issue_created")).await.accepted()];
    world.stored(&ids[0]).await;
    let fit = world.jetstream().await.get_stream("SIGNALS").await.unwrap().cached_info().config.clone();
    world.nats.stop().await.unwrap();
    ids.extend(post(&world, 20).await);
    // The gateway sees the broker again only when its stream is another one.
    world.gateway.process().freeze().unwrap();
    world.nats.start_again().await.unwrap();
    let jetstream = world.jetstream().await;
    jetstream.update_stream(Config { discard: DiscardPolicy::Old, ..fit.clone() }).await.unwrap();
    world.gateway.process().thaw().unwrap();
    ids.extend(nothing_is_published_while(&world, "discard").await);
    let state = jetstream.get_stream("SIGNALS").await.unwrap().cached_info().state.clone();
    assert_eq!(state.last_sequence, 1, "nothing came by the old look at the stream");
    jetstream.update_stream(fit).await.unwrap();
    for id in &ids {
        world.stored(id).await;
    }
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

/// The check `name` of `/readyz`: its status, degraded or not, and the detail.
async fn check(program: &world::Program, name: &str) -> Option<(u16, bool, String)> {
    let answer = program.ops("/readyz").await;
    let list = answer.json();
    let check = list.as_array()?.iter().find(|check| check["name"] == name)?.clone();
    Some((answer.status, check["degraded"] == true, check["detail"].as_str()?.to_owned()))
}

/// Waits until gateway and worker tell this of the check, with that status.
async fn both_tell(world: &World, check_name: &str, degraded: bool, words: &[&str]) {
    for program in [&world.gateway, &world.workers[0]] {
        eventually(&format!("{words:?} in {check_name}"), || async {
            let (_, is, detail) = check(program, check_name).await?;
            (is == degraded && words.iter().all(|word| detail.contains(word))).then_some(())
        })
        .await;
    }
}

/// Limits by which a stream drops what no worker has read, or by which it fills and stays full.
#[tokio::test]
async fn limits_that_endanger_a_promise_are_degraded_and_named_with_the_command_that_mends_them() {
    let world = setup().start().await;
    let jetstream = world.jetstream().await;
    let stream = eventually("the stream", || async { jetstream.get_stream("SIGNALS").await.ok() }).await;
    let good = stream.cached_info().config.clone();
    both_tell(&world, "stream_settings", false, &["ready"]).await;
    let risky = [
        (
            Config { max_age: Duration::from_secs(3_600), ..good.clone() },
            ["max_age 1h", "nats stream edit SIGNALS --max-age=720h"],
        ),
        (Config { allow_rollup: true, ..good.clone() }, ["allow_rollup", "nats stream edit SIGNALS --no-allow-rollup"]),
        (
            Config { max_messages_per_subject: 9, discard_new_per_subject: true, ..good.clone() },
            [
                "max_messages_per_subject 9",
                "nats stream edit SIGNALS --no-discard-per-subject --max-msgs-per-subject=-1",
            ],
        ),
    ];
    for (config, words) in risky {
        jetstream.update_stream(config).await.unwrap();
        both_tell(&world, "stream_settings", true, &words).await;
        world.gateway.ready().await;
        world.workers[0].ready().await;
        let (worker, (code, gateway, _)) =
            (world.worker(&["check"]).await, world.gateway_command_async(&["check"]).await);
        for (of, said) in [(worker.code, &worker.out), (code, &gateway)] {
            assert_eq!(of, Some(0), "a warning: {said}");
            assert!(said.contains(words[1]), "{words:?} in {said}");
        }
        jetstream.update_stream(good.clone()).await.unwrap();
        both_tell(&world, "stream_settings", false, &["ready"]).await;
    }
    // Two that cannot be taken back; the second only comes with a new stream.
    jetstream.update_stream(Config { deny_purge: true, ..good.clone() }).await.unwrap();
    both_tell(&world, "stream_settings", true, &["deny_purge", "NATS_STREAM"]).await;
    jetstream.delete_stream("SIGNALS").await.unwrap();
    let async_writes = Config { persist_mode: Some(PersistenceMode::Async), ..good };
    if jetstream.create_stream(async_writes).await.is_ok() {
        // Otherwise the gateway was quicker and has made the stream: the unit test has this one, too.
        both_tell(&world, "stream_settings", true, &["persist_mode", "NATS_STREAM"]).await;
    }
}

#[tokio::test]
async fn a_stream_that_drops_the_oldest_of_a_subject_is_not_used_until_it_is_mended() {
    let world = setup().gateway("GATEWAY_CONFIRM_AFTER", "1s").start().await;
    let jetstream = world.jetstream().await;
    let stream = eventually("the stream", || async { jetstream.get_stream("SIGNALS").await.ok() }).await;
    let good = stream.cached_info().config.clone();
    // Although it refuses what is new when it is full.
    jetstream.update_stream(Config { max_messages_per_subject: 9, ..good.clone() }).await.unwrap();
    let words = ["max_messages_per_subject 9", "nats stream edit SIGNALS --max-msgs-per-subject=-1"];
    for (program, name) in [(&world.gateway, "stream"), (&world.workers[0], "consumer")] {
        eventually("both to say what is wrong", || async {
            let (_, _, detail) = check(program, name).await?;
            words.iter().all(|word| detail.contains(word)).then_some(())
        })
        .await;
    }
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(world.post(fixture!("issue_created")).await.accepted()); // safe in the journal
    }
    jetstream.update_stream(good).await.unwrap();
    for id in &ids {
        world.stored(id).await;
    }
}
