//! A program that stops says so first, finishes what it has, and cuts nobody off.

use nix::sys::signal::Signal;
use world::{Connection, Post, eventually};

use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");

#[tokio::test]
async fn a_gateway_that_stops_is_taken_out_before_it_goes() {
    let setup = setup().workers(0).gateway("GATEWAY_SHUTDOWN_DELAY", "15s").gateway("SHUTDOWN_GRACE", "50s");
    let world = setup.start().await;
    let mut kept = Connection::open(world.port()).await.unwrap();
    kept.send(&Post::signed(BODY)).await.unwrap().accepted();
    world.gateway.process().signal(Signal::SIGTERM);
    // Load balancers are told at once, and what they send until they know is taken.
    let told = eventually("the gateway to say that it stops", || async {
        Some(world.gateway.ops("/readyz").await).filter(|answer| answer.status == 503)
    });
    let told = told.await.json().to_string();
    assert!(told.contains("asked to stop"), "{told}");
    assert_eq!(world.gateway.ops("/healthz").await.status, 200, "it is alive");
    for answer in [Post::signed(BODY).send(world.port()).await, kept.send(&Post::signed(BODY)).await.unwrap()] {
        assert_eq!(answer.headers["connection"], "close", "and the proxy is told not to use the connection again");
        answer.accepted();
    }
    assert!(kept.send(&Post::signed(BODY)).await.is_err(), "it was closed as announced");
    assert_eq!(world.gateway.stop().await, Some(0), "{}", world.gateway.log());
}

#[tokio::test]
async fn who_has_connected_before_the_listener_closes_is_answered() {
    let world = setup().workers(0).start().await;
    // The gateway does not run while they connect: the kernel takes them for it.
    world.gateway.process().freeze().unwrap();
    let mut senders = Vec::new();
    let burst = if cfg!(target_os = "linux") { 400 } else { 100 }; // others keep 128
    for _ in 0..burst {
        let mut connection = Connection::open(world.port()).await.unwrap();
        senders.push(tokio::spawn(async move { connection.send(&Post::signed(BODY)).await }));
    }
    world.gateway.process().signal(Signal::SIGTERM);
    world.gateway.process().thaw().unwrap();
    for sender in senders {
        sender.await.unwrap().expect("an answer, not a reset").accepted();
    }
    assert_eq!(world.gateway.stop().await, Some(0), "{}", world.gateway.log());
}
