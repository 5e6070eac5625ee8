//! Disks that hang: a system call on the journal does not come back for minutes. Sentry counts each answer that it waits for
//! in vain, and silences every delivery after enough of them, so the gateway answers 503 instead.

use nix::sys::signal::Signal;
use world::{Post, World, eventually, sign};

use super::disk::{body, until_not_ready};
use super::faults::{Faults, KEEPER, WRITER};
use crate::contract::{head, raw};
use crate::fixture;
use crate::load::{exactly_once, post, watchful};

/// Longer than any test waits.
const HANG: &str = "delay_enter=600000000";
const BODY: &str = fixture!("issue_created");

#[tokio::test]
async fn a_disk_that_hangs_is_told_and_deliveries_are_refused_until_it_goes_on() {
    const DRILL: &str = "a_disk_that_hangs_is_told_and_deliveries_are_refused_until_it_goes_on";
    let world = watchful().start().await;
    let mut accepted = post(&world, 1).await;
    for (call, named) in [("fdatasync", "a sync"), ("pwrite64", "a write")] {
        let Some(faults) = Faults::begin(DRILL, &world, &format!("{call}:{HANG}")).await else { return };
        let port = world.port();
        let waiting = tokio::spawn(async move { Post::signed(BODY).send(port).await });
        let told = until_not_ready(&world).await;
        assert!(told.contains(&format!("has not finished {named} for ")), "{told}");
        refuses_before_the_body(&world).await;
        let waited = waiting.await.unwrap();
        assert_eq!(waited.status, 503, "the one that waits for the disk is answered while the disk hangs");
        assert!(waited.headers.contains_key("retry-after"));
        faults.end().await;
        world.gateway.ready().await;
        accepted.extend(post(&world, 5).await);
    }
    // Two were refused whose records are on disk all the same.
    exactly_once(&world, &accepted, 2).await;
    let warnings = |words| {
        let log = world.gateway.log();
        log.lines().filter(|line| line.contains("WARN") && line.contains(words)).count()
    };
    let both_ends = || async { (warnings("deliveries are taken again") == 2).then_some(()) };
    eventually("a line when each ends", both_ends).await;
    assert_eq!(warnings("deliveries are answered 503 until it has"), 2, "one line when each begins");
}

#[tokio::test]
async fn a_disk_that_hangs_while_a_segment_is_made_is_told_and_deliveries_are_refused_until_it_goes_on() {
    const DRILL: &str = "a_disk_that_hangs_while_a_segment_is_made_is_told_and_deliveries_are_refused_until_it_goes_on";
    // Segments of 1 MiB.
    let world = watchful().gateway("GATEWAY_JOURNAL_MAX_BYTES", "64MiB").start().await;
    let Some(faults) = Faults::begin_in(&[WRITER, KEEPER], DRILL, &world, &format!("fsync:{HANG}")).await else {
        return;
    };
    let mut accepted = Vec::new();
    let refused = loop {
        let answer = world.post(body(100_000)).await;
        if answer.status != 202 {
            break answer;
        }
        accepted.push(answer.accepted());
        assert!(accepted.len() < 100, "the segments that are there are full sooner");
    };
    assert_eq!(refused.status, 503);
    let told = until_not_ready(&world).await;
    assert!(told.contains("has not finished a new segment for "), "{told}");
    refuses_before_the_body(&world).await;
    faults.end().await;
    world.gateway.ready().await;
    accepted.extend(post(&world, 5).await);
    exactly_once(&world, &accepted, 1).await;
}

#[tokio::test]
async fn a_gateway_whose_disk_hangs_stops_inside_its_grace_period() {
    const DRILL: &str = "a_gateway_whose_disk_hangs_stops_inside_its_grace_period";
    let mut world = watchful().gateway("SHUTDOWN_GRACE", "5s").start().await;
    let accepted = post(&world, 3).await;
    let Some(faults) = Faults::begin(DRILL, &world, &format!("fdatasync:{HANG}")).await else { return };
    let port = world.port();
    let waiting = tokio::spawn(async move { Post::signed(BODY).send(port).await });
    until_not_ready(&world).await;
    let process = world.gateway.process();
    process.signal(Signal::SIGTERM);
    // Until strace lets go of its thread, the process that has ended is a zombie.
    let ended = || async {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
        stat.contains(") Z ").then_some(())
    };
    eventually("the gateway to end while its disk hangs", ended).await;
    assert_eq!(waiting.await.unwrap().status, 503);
    faults.end().await;
    assert_eq!(process.ended().await.code(), Some(0), "{}", world.gateway.log());
    world.gateway.start_again();
    world.gateway.ready().await;
    exactly_once(&world, &accepted, 1).await;
}

#[tokio::test]
async fn a_drain_whose_disk_hangs_can_be_interrupted() {
    const DRILL: &str = "a_drain_whose_disk_hangs_can_be_interrupted";
    let world = watchful().workers(0).start().await;
    post(&world, 3).await;
    world.gateway.kill().await;
    let mut drain = world.gateway_process(&["journal", "drain"]);
    let begun = async || drain.out().contains("3 deliveries are not confirmed yet").then_some(());
    eventually("the drain to wait for receipts", begun).await;
    let fault = format!("fdatasync,fsync,write,pwrite64:{HANG}");
    let faults = Faults::begin_in_process(drain.pid(), &[WRITER, KEEPER], DRILL, &world, &fault).await;
    let Some(faults) = faults else { return };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(drain.pid().cast_signed()), Signal::SIGINT).unwrap();
    // Until strace lets go of its threads, the process that has ended is a zombie.
    let ended = || async {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", drain.pid())).unwrap();
        stat.contains(") Z ").then_some(())
    };
    eventually("the drain to end while its disk hangs", ended).await;
    faults.end().await;
    let drain = drain.ended().await;
    assert_eq!(drain.code, Some(1), "{drain:?}");
    assert!(drain.err.contains("3 not confirmed yet"), "{drain:?}");
}

/// A delivery is answered before its body is there.
async fn refuses_before_the_body(world: &World) {
    let (_socket, answer) = raw(world.port(), &head(&sign(world::SECRET, b"{}"), "Content-Length: 2\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("retry-after: "), "{answer}");
}
