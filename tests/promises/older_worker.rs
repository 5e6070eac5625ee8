//! Workers of two versions at once, as in every upgrade that goes worker by worker.
//!
//! `OLD_WORKER=/path/to/worker cargo test -p tests --test promises older_worker:: -- --ignored`

use std::process::Command;

use local::ports;
use local::process::Process;
use nix::sys::signal::Signal;
use world::{Post, eventually};

use crate::load::{Load, exactly_once};
use crate::setup;

#[tokio::test]
#[ignore = "needs the program of an older version: OLD_WORKER"]
async fn an_older_worker_and_this_one_store_each_delivery_once() {
    let old = std::env::var("OLD_WORKER").expect("OLD_WORKER names the program of an older worker");
    let mut world = setup().workers(0).gateway("GATEWAY_CONFIRM_AFTER", "1s").start().await;
    let port = ports::free().unwrap();
    let mut command = Command::new(&old);
    command.env_clear().env("NATS_URL", world.nats.url()).env("DATABASE_URL", &world.database_url);
    command.env("WORKER_OPS_LISTEN", format!("127.0.0.1:{port}"));
    let log = world.folder().join("older-worker.log");
    let older = Process::spawn("older worker", command, &log, Signal::SIGKILL).unwrap();
    // It makes the tables and the consumer.
    let ready = async || Post::get("/readyz").try_send(port).await.ok().filter(|answer| answer.status == 200);
    eventually("the older worker to be ready", ready).await;
    world.start_worker().await;
    let mut accepted = Vec::new();
    for round in 1..=3 {
        let load = Load::start(&world, 4);
        world.until_at_least("SELECT count(*) FROM signals", round * 100).await;
        world.workers[0].kill().await;
        world.workers[0].start_again();
        accepted.extend(load.stop().await.accepted);
        world.workers[0].ready().await;
    }
    assert!(older.is_alive(), "{}", older.last_words());
    // The stream delivers what the killed workers held after the ack wait of 30 s.
    exactly_once(&world, &accepted, 0).await;
}
