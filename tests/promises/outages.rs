//! What starts before what it needs waits for it; what loses it waits again.

use world::{Post, World, eventually};

use crate::load::{Load, exactly_once, watchful};
use crate::{fixture, setup};

async fn state(world: &World, program: usize, check: &str) -> Option<bool> {
    let program = if program == 0 { &world.gateway } else { &world.workers[program - 1] };
    let list = program.ops("/readyz").await.json();
    list.as_array()?.iter().find(|entry| entry["name"] == check)?["ok"].as_bool()
}

#[tokio::test]
async fn both_programs_start_without_nats_and_postgresql_and_wait() {
    let mut world = setup().servers_later().launch().await;
    assert_eq!(world.gateway.ops("/healthz").await.status, 200);
    assert_eq!(world.workers[0].ops("/healthz").await.status, 200);
    assert_eq!(world.gateway.ops("/readyz").await.status, 200, "deliveries are taken, and wait on disk");
    assert_eq!(world.workers[0].ops("/readyz").await.status, 503);
    assert_eq!(state(&world, 0, "nats").await, Some(false));
    assert_eq!(state(&world, 1, "database").await, Some(false));
    let early = world.post(fixture!("issue_created")).await.accepted();

    world.nats.start_again().await.unwrap();
    world.postgres.as_mut().unwrap().start_again().await.unwrap();
    world.gateway.ready().await;
    world.workers[0].ready().await;
    world.connect_sql().await;
    world.stored(&early).await;
    world.stored(&world.post(fixture!("issue_created")).await.accepted()).await;
    for (log, what) in [(world.gateway.log(), "NATS"), (world.workers[0].log(), "database")] {
        assert!(log.contains(what), "{log}");
    }
}

#[tokio::test]
async fn nats_away_changes_nothing_for_the_sender() {
    // Watchful: a receipt that is sent before the gateway hears again is lost, and nobody here waits for five minutes.
    let mut world = watchful().start().await;
    let mut ids = vec![world.post(fixture!("issue_created")).await.accepted()];
    world.nats.kill().await;
    eventually("the gateway to notice", || async { (state(&world, 0, "nats").await == Some(false)).then_some(()) })
        .await;
    let told = world.gateway.ops("/readyz").await;
    assert_eq!(told.status, 200, "and stays ready");
    let degraded = told.json().as_array().unwrap().iter().any(|it| it["name"] == "nats" && it["degraded"] == true);
    assert!(degraded, "and says so: {told:?}");
    assert_eq!(world.gateway.ops("/healthz").await.status, 200);
    for _ in 0..20 {
        ids.push(world.post(fixture!("issue_created")).await.accepted());
    }
    world.nats.start_again().await.unwrap();
    for id in &ids {
        world.stored(id).await;
    }
    world.until_confirmed().await;
    world.settled(21).await;
}

#[tokio::test]
async fn a_broker_that_hangs_changes_nothing_for_the_sender() {
    let world = watchful().start().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.nats.process().freeze().unwrap();
    let id = world.post(fixture!("issue_created")).await.accepted();
    world.nats.process().thaw().unwrap();
    world.stored(&id).await;
    world.until_confirmed().await;
    world.settled(2).await;
}

#[tokio::test]
async fn postgresql_killed_and_back_loses_and_doubles_nothing() {
    let mut world = setup().own_postgres().start().await;
    let mut ids = vec![world.post(fixture!("issue_created")).await.accepted()];
    world.stored(&ids[0]).await;
    world.postgres.as_ref().unwrap().kill().await;
    for _ in 0..50 {
        ids.push(world.post(fixture!("error_created")).await.accepted());
    }
    eventually("the worker to notice", || async { world.workers[0].log().contains("not stored yet").then_some(()) })
        .await;
    world.postgres.as_mut().unwrap().start_again().await.unwrap();
    world.connect_sql().await;
    for id in &ids {
        world.stored(id).await;
    }
    world.settled(51).await;
}

/// Kills a worker five times while it stores, with so many batches at a time.
async fn kill_a_worker_amid_its_work(concurrency: &str) {
    let mut world = watchful().worker("WORKER_CONCURRENCY", concurrency).worker("WORKER_BATCH_MAX", "4").start().await;
    let mut accepted = Vec::new();
    for round in 0..5 {
        let load = Load::start(&world, 4);
        world.until_at_least("SELECT count(*) FROM signals", 20 * (round + 1)).await;
        world.workers[0].kill().await;
        accepted.extend(load.stop().await.accepted);
        world.workers[0].start_again();
    }
    // The stream delivers what the killed worker held after the ack wait. A new consumer does not wait for that.
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    stream.delete_consumer("worker").await.unwrap();
    exactly_once(&world, &accepted, 0).await;
}

#[tokio::test]
async fn a_worker_killed_amid_its_work_loses_and_doubles_nothing() {
    kill_a_worker_amid_its_work("2").await;
}

#[tokio::test]
async fn a_worker_with_one_batch_at_a_time_loses_and_doubles_nothing() {
    kill_a_worker_amid_its_work("1").await;
}

#[tokio::test]
async fn a_worker_with_eight_batches_at_a_time_loses_and_doubles_nothing() {
    kill_a_worker_amid_its_work("8").await;
}

#[tokio::test]
async fn a_stop_answers_what_is_in_flight_and_exits_0() {
    let world = setup().start().await;
    let sending: Vec<_> = (0..20)
        .map(|_| {
            let port = world.port();
            tokio::spawn(async move { Post::signed(fixture!("issue_created")).try_send(port).await })
        })
        .collect();
    let mut answered = Vec::new();
    let first = sending.into_iter();
    let stopped = world.gateway.stop();
    for sent in first {
        // A connection that came too late was refused; one that was taken is answered.
        if let Ok(answer) = sent.await.unwrap() {
            answered.push(answer.accepted());
        }
    }
    assert_eq!(stopped.await, Some(0), "{}", world.gateway.log());
    for id in &answered {
        world.stored(id).await;
    }
    world.settled(answered.len()).await;
    assert_eq!(world.workers[0].stop().await, Some(0), "{}", world.workers[0].log());
}
