//! A program that stops says so first, finishes what it has, and cuts nobody off.

use std::fs;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use world::{Connection, Post, Program, eventually};

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

/// The command that makes a program process 1 of a namespace of its own, as a container does.
#[cfg(target_os = "linux")]
const AS_PROCESS_1: &[&str] = &["unshare", "--pid", "--fork", "--kill-child"];

/// The kernel drops every signal for process 1 that it does not handle, and no shell handles any for it.
/// <https://man7.org/linux/man-pages/man7/pid_namespaces.7.html>
#[cfg(target_os = "linux")]
#[tokio::test]
async fn both_programs_stop_in_order_as_process_1() {
    let mut attempt = Command::new(AS_PROCESS_1[0]);
    if !attempt.args(&AS_PROCESS_1[1..]).arg("/bin/true").output().is_ok_and(|done| done.status.success()) {
        return world::skipped("both_programs_stop_in_order_as_process_1", "may not make a PID namespace");
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let world = setup().gateway_under(AS_PROCESS_1).worker_under(AS_PROCESS_1).start().await;
        let id = world.post(BODY).await.accepted();
        world.stored(&id).await;
        for program in [&world.gateway, &world.workers[0]] {
            kill(only_child(program), signal).unwrap();
            let ended = tokio::time::timeout(std::time::Duration::from_secs(60), program.process().ended()).await;
            let status = ended.unwrap_or_else(|_| panic!("{signal} ended nothing: {}", program.log()));
            assert_eq!(status.code(), Some(0), "{}", program.log());
        }
    }
}

/// The process that `unshare` started.
#[cfg(target_os = "linux")]
fn only_child(program: &Program) -> Pid {
    let parent = program.process().pid();
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    Pid::from_raw(children.trim().parse().unwrap())
}
