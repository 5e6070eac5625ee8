//! Disks that are slow, that fail, that are full.

use std::process::Command;
use std::time::{Duration, Instant};

use world::{Answer, Setup, World, eventually};

use super::faults::{Faults, KEEPER};
use crate::load::{Load, exactly_once, percentile, post, size, watchful};

#[tokio::test]
async fn a_slow_disk_delays_and_refuses_nothing() {
    let world = watchful().start().await;
    let mut accepted = Vec::new();
    for delay in [0, 10, 300].map(Duration::from_millis) {
        let fault = format!("fdatasync:delay_enter={}", delay.as_micros());
        let Some(faults) = Faults::begin("a_slow_disk_delays_and_refuses_nothing", &world, &fault).await else {
            return;
        };
        let load = Load::start(&world, 32);
        tokio::time::sleep(Duration::from_millis(size(2000, 20_000) as u64)).await; // how long the load lasts
        let mut sent = load.stop().await;
        faults.end().await;
        assert_eq!((sent.refused, sent.broken), (0, 0), "every request is a 202");
        let (median, p99) = (percentile(&mut sent.took, 50), percentile(&mut sent.took, 99));
        println!("each sync {delay:?} slower: {} answered, median {median:?}, p99 {p99:?}", sent.accepted.len());
        assert!(sent.took[0] >= delay, "an answer was there before the sync was over: {:?}", sent.took[0]);
        accepted.extend(sent.accepted);
    }
    assert!(!world.gateway.log().contains("has not finished"), "a slow disk is no fault");
    exactly_once(&world, &accepted, 0).await;
}

#[tokio::test]
async fn no_delivery_waits_until_the_segment_before_is_sealed() {
    const DRILL: &str = "no_delivery_waits_until_the_segment_before_is_sealed";
    // Segments of 1 MiB. Each is cut to its length when it is sealed, which the thread that answers never does.
    let world = watchful().gateway("GATEWAY_JOURNAL_MAX_BYTES", "64MiB").start().await;
    let Some(faults) = Faults::begin(DRILL, &world, "ftruncate:error=EIO").await else { return };
    let mut accepted = Vec::new();
    for _ in 0..30 {
        accepted.push(world.post(body(100_000)).await.accepted());
    }
    assert_eq!(faults.end().await, 0, "the thread that writes has sealed a segment");
    exactly_once(&world, &accepted, 0).await;
}

#[tokio::test]
async fn a_segment_that_no_later_header_vouches_for_is_synced_when_it_is_sealed() {
    const DRILL: &str = "a_segment_that_no_later_header_vouches_for_is_synced_when_it_is_sealed";
    // Segments of 1 MiB. No worker confirms what is in the first one, so it stays.
    let mut world = watchful().workers(0).gateway("GATEWAY_JOURNAL_MAX_BYTES", "64MiB").start().await;
    let mut accepted = vec![world.post(body(700_000)).await.accepted()];
    let Some(_failing) = Faults::begin(DRILL, &world, "fdatasync:error=EIO").await else { return };
    let Some(keeper) = Faults::begin_in(&[KEEPER], DRILL, &world, "fsync:delay_enter=0").await else { return };
    // It does not fit into the first segment, and the next one cannot be synced.
    assert_eq!(world.post(body(500_000)).await.status, 503);
    assert_eq!(world.gateway.stop().await, Some(0));
    let calls = keeper.calls_on(1).await;
    let at = |call| calls.iter().position(|other| *other == call);
    assert!(at("fdatasync") < at("ftruncate") && at("ftruncate") < at("fsync"), "{calls:?}");
    assert!(at("fdatasync").is_some(), "{calls:?}");
    world.gateway.start_again();
    world.gateway.ready().await;
    accepted.push(world.post(body(1000)).await.accepted());
    world.start_worker().await;
    exactly_once(&world, &accepted, 1).await;
}

#[tokio::test]
async fn a_disk_that_fails_refuses_what_is_not_on_it_and_takes_deliveries_again_by_itself() {
    const DRILL: &str = "a_disk_that_fails_refuses_what_is_not_on_it_and_takes_deliveries_again_by_itself";
    let mut world = watchful().start().await;
    let (mut accepted, mut refused) = (Vec::new(), 0);
    let now_and_then = ["fdatasync:error=EIO:when=3+4", "pwrite64:error=EIO:when=3+4"];
    let for_a_while = ["fdatasync:error=EIO", "pwrite64:error=EIO", "fdatasync,fsync,pwrite64,fallocate:error=ENOSPC"];
    for fault in now_and_then.into_iter().chain(for_a_while) {
        let load = Load::start(&world, 8);
        let Some(faults) = Faults::begin(DRILL, &world, fault).await else { return };
        if for_a_while.contains(&fault) {
            until_not_ready(&world).await;
        }
        tokio::time::sleep(Duration::from_millis(size(1000, 5000) as u64)).await; // how long it lasts
        let failures = faults.end().await;
        world.gateway.ready().await;
        let well = Instant::now();
        world.post(body(1000)).await.accepted();
        let sent = load.stop().await;
        println!(
            "{fault}: {failures} faults, {} accepted, {} refused, well again {:?} after",
            sent.accepted.len(),
            sent.refused,
            well.elapsed()
        );
        assert!(failures > 0 && sent.refused > 0, "the drill was one");
        assert_eq!(sent.broken, 0);
        accepted.extend(sent.accepted);
        refused += sent.refused;
    }
    exactly_once(&world, &accepted, 5).await; // and the five posts above
    // What failed may be on the disk all the same; a start that finds it delivers it, and nothing twice.
    world.gateway.kill().await;
    world.gateway.start_again();
    world.gateway.ready().await;
    exactly_once(&world, &accepted, 5 + refused).await;
    assert_eq!(world.metric("gateway_journal_damaged_files").await, 0.0);
    assert_eq!(world.metric("gateway_journal_damaged_records_total").await, 0.0);
}

#[tokio::test]
async fn every_directory_that_is_made_for_a_journal_is_synced_in_the_one_above() {
    const UNDER: &str = "export GATEWAY_JOURNAL_DIR=\"$GATEWAY_JOURNAL_DIR/b/c\" && \
        exec strace -D -f -y -e trace=fsync -o \"${GATEWAY_JOURNAL_DIR%/b/c}.trace\" \"$0\"";
    let strace = Command::new("strace").args(["-D", "-o", "/dev/null", "/bin/true"]).output();
    if !strace.is_ok_and(|done| done.status.success()) {
        let because = "there is no `strace` on PATH that may trace";
        return world::skipped("every_directory_that_is_made_for_a_journal_is_synced_in_the_one_above", because);
    }
    let world = watchful().workers(0).gateway_under(&["/bin/sh", "-c", UNDER]).start().await;
    let trace = std::fs::read_to_string(world.folder().join("gateway-0.trace")).unwrap();
    for above in [world.folder(), &world.folder().join("gateway-0"), &world.folder().join("gateway-0/b")] {
        let synced =
            trace.lines().any(|line| line.contains("fsync(") && line.contains(&format!("<{}>", above.display())));
        assert!(synced, "{} is not synced: {trace}", above.display());
    }
}

#[tokio::test]
async fn a_disk_of_64_mb_that_fills_up_refuses_loses_nothing_and_heals() {
    let Some(setup) = on_a_disk_of_64_mb(watchful()) else {
        world::skipped(
            "a_disk_of_64_mb_that_fills_up_refuses_loses_nothing_and_heals",
            "this process may not mount a tmpfs",
        );
        return;
    };
    let mut world = setup.start().await;
    world.nats.kill().await;
    // Somebody else's file takes most of what the first segment leaves, and goes.
    let ballast = world.folder().join("gateway-0/ballast");
    let ballast = format!("/proc/{}/root{}", world.gateway.process().pid(), ballast.display());
    std::fs::write(&ballast, vec![1; 24 << 20]).unwrap();
    let mut accepted = fill(&world).await;
    let half = accepted.len();
    std::fs::remove_file(&ballast).unwrap();
    world.gateway.ready().await;
    accepted.extend(fill(&world).await);
    println!("{half} deliveries of 100 kB beside the other file, {} without", accepted.len());
    assert!(half > 200 && accepted.len() > half + half / 3, "the disk is used: {half}, then {}", accepted.len());
    world.nats.start_again().await.unwrap();
    // Room is made by what is in the stream, before anything is confirmed.
    let room = || async { Some(world.post(body(100)).await).filter(|answer| answer.status == 202) };
    accepted.push(eventually("room on the disk", room).await.accepted());
    world.gateway.ready().await;
    exactly_once(&world, &accepted, 0).await;
}

/// Deliveries that wait on disk, and of which memory holds nothing; NATS is away.
async fn on_disk_alone(world: &mut World, count: usize) -> Vec<String> {
    world.nats.kill().await;
    let ids = post(world, count).await;
    world.gateway.kill().await;
    ids
}

#[tokio::test]
async fn what_the_disk_does_not_give_for_a_moment_is_delivered_without_a_restart() {
    const DRILL: &str = "what_the_disk_does_not_give_for_a_moment_is_delivered_without_a_restart";
    let mut world = watchful().start().await;
    let ids = on_disk_alone(&mut world, 3).await;
    world.gateway.start_again();
    world.gateway.ready().await;
    let Some(faults) = Faults::no_reads(DRILL, &world, world.gateway.process().pid()).await else { return };
    world.nats.start_again().await.unwrap();
    let read_in_vain =
        || async { (world.metric("gateway_journal_unreadable_records_total").await >= 3.0).then_some(()) };
    eventually("the disk to refuse the entries", read_in_vain).await;
    faults.end_reads().await;
    for id in &ids {
        world.stored(id).await;
    }
    exactly_once(&world, &ids, 0).await;
}

#[tokio::test]
async fn what_the_disk_does_not_give_is_told_and_holds_no_stop_up() {
    const DRILL: &str = "what_the_disk_does_not_give_is_told_and_holds_no_stop_up";
    let mut world = watchful().gateway("SHUTDOWN_GRACE", "50s").start().await;
    let ids = on_disk_alone(&mut world, 3).await;
    world.gateway.start_again();
    world.gateway.ready().await;
    let Some(faults) = Faults::no_reads(DRILL, &world, world.gateway.process().pid()).await else { return };
    world.nats.start_again().await.unwrap();
    let told = || async {
        let checks = world.gateway.ops("/readyz").await.json();
        let check = checks.as_array()?.iter().find(|check| check["name"] == "journal_reads")?.clone();
        (check["degraded"] == true && check["detail"].as_str()?.contains("3 deliveries")).then_some(())
    };
    eventually("the gateway to say what it cannot read", told).await;
    assert_eq!(world.metric("gateway_journal_unreadable_entries").await, 3.0);
    assert_eq!(world.gateway.stop().await, Some(0));
    let log = world.gateway.log();
    assert!(!log.contains("the grace period is over"), "{log}");
    faults.end_reads().await;
    world.gateway.start_again();
    exactly_once(&world, &ids, 0).await;
}

#[tokio::test]
async fn a_drain_ends_over_what_the_disk_does_not_give() {
    const DRILL: &str = "a_drain_ends_over_what_the_disk_does_not_give";
    let mut world = watchful().start().await;
    let ids = on_disk_alone(&mut world, 3).await;
    let mut drain = world.gateway_process(&["journal", "drain"]);
    let waiting = "3 deliveries are not confirmed yet";
    eventually("the drain to begin", || async { drain.out().contains(waiting).then_some(()) }).await;
    let Some(faults) = Faults::no_reads(DRILL, &world, drain.pid()).await else { return };
    world.nats.start_again().await.unwrap();
    let ran = drain.ended().await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.err.contains("3 not given by the disk"), "{ran:?}");
    faults.end_reads().await;
    world.gateway.start_again();
    exactly_once(&world, &ids, 0).await;
}

/// Posts until the disk is full. Gives what was accepted.
async fn fill(world: &World) -> Vec<String> {
    let mut accepted = Vec::new();
    let refused: Answer = loop {
        let answer = world.post(body(100_000)).await;
        if answer.status != 202 {
            break answer;
        }
        accepted.push(answer.accepted());
        assert!(accepted.len() < 1000, "64 MB are full sooner");
    };
    assert_eq!(refused.status, 503);
    assert!(refused.headers.contains_key("retry-after"));
    refused.error();
    until_not_ready(world).await;
    accepted
}

pub(super) fn body(bytes: usize) -> String {
    format!(r#"{{"data":{{"issue":{{"id":"1","title":"{}"}}}}}}"#, "x".repeat(bytes))
}

/// Waits until the gateway says that it is not ready. Gives what it says.
pub(super) async fn until_not_ready(world: &World) -> String {
    let not_ready = || async { Some(world.gateway.ops("/readyz").await).filter(|answer| answer.status == 503) };
    eventually("the gateway to say that it is not ready", not_ready).await.json().to_string()
}

/// A world whose gateway has its journal on a disk of 64 MB in memory, which nobody else sees and which is gone when it
/// ends, however it ends: a mount in a namespace of its own (unshare(1)). `None` where that is not allowed.
fn on_a_disk_of_64_mb(setup: Setup) -> Option<Setup> {
    const DISK: &str = "mkdir -p \"$GATEWAY_JOURNAL_DIR\" && \
        mount -t tmpfs -o size=64m drill \"$GATEWAY_JOURNAL_DIR\" && exec \"$0\"";
    const AS_ROOT: &[&str] = &["unshare", "--mount", "/bin/sh", "-c", DISK];
    const AS_OTHERS: &[&str] = &["unshare", "--map-root-user", "--mount", "/bin/sh", "-c", DISK];
    let under = if nix::unistd::geteuid().is_root() { AS_ROOT } else { AS_OTHERS };
    let mut attempt = Command::new(under[0]);
    let attempt = attempt.args(&under[1..]).arg("/bin/true").env("GATEWAY_JOURNAL_DIR", "/tmp").output();
    attempt.is_ok_and(|done| done.status.success()).then(|| setup.gateway_under(under))
}
