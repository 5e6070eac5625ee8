//! A worker that can be killed, multiplied and left without what it needs: nothing is lost, doubled or given up, and it
//! goes on by itself.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{PullConsumer, pull};
use futures_util::StreamExt as _;
use local::{Postgres, PostgresOptions, Scratch};
use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use world::{Connection, Post, SmallDisk, World, eventually, programs};

use crate::{fixture, setup};

/// Time that the stream waits for an ack before it delivers a message again.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// `SHUTDOWN_GRACE` where nothing else is set.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(25);

/// Deliveries on their way to the gateway.
struct Load {
    accepted: Arc<AtomicUsize>,
    senders: JoinSet<()>,
}

impl Load {
    /// Sends `count` deliveries over a few connections, each until it is accepted.
    fn of(count: usize, port: u16, body: &'static str) -> Load {
        const CONNECTIONS: usize = 8;
        let accepted = Arc::new(AtomicUsize::new(0));
        let begun = Arc::new(AtomicUsize::new(0));
        let mut senders = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (accepted, begun) = (accepted.clone(), begun.clone());
            senders.spawn(async move {
                let mut connection = None;
                while begun.fetch_add(1, Ordering::Relaxed) < count {
                    // The same request each time, so however often it is sent it is one delivery.
                    let post = Post::signed(body);
                    let begin = Instant::now();
                    while !is_accepted(&mut connection, port, &post).await {
                        assert!(begin.elapsed() < Duration::from_secs(60), "a delivery is refused for a minute");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    accepted.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Load { accepted, senders }
    }

    async fn accepted(&self, count: usize) {
        eventually(&format!("{count} deliveries to be accepted"), || async {
            (self.accepted.load(Ordering::Relaxed) >= count).then_some(())
        })
        .await;
    }

    async fn end(self) {
        self.senders.join_all().await;
    }
}

/// Whether the gateway took it. A connection that broke is opened again at the next call.
async fn is_accepted(connection: &mut Option<Connection>, port: u16, post: &Post) -> bool {
    if connection.is_none() {
        *connection = Connection::open(port).await.ok();
    }
    let Some(open) = connection else { return false };
    let answer = open.send(post).await;
    if answer.is_err() {
        *connection = None;
    }
    answer.is_ok_and(|answer| answer.status == 202)
}

/// Makes the consumer with a short ack wait, so that a test need not wait half a minute for what a killed worker held.
async fn short_ack_wait(world: &mut World) {
    let stream = eventually("the stream", || async { world.jetstream().await.get_stream("SIGNALS").await.ok() }).await;
    for worker in &world.workers {
        worker.kill().await;
    }
    let _ = stream.delete_consumer("worker").await; // in case it was made already
    let ack_wait = Duration::from_secs(2);
    let config = pull::Config {
        durable_name: Some("worker".into()),
        ack_wait,
        max_ack_pending: 16_384,
        ..pull::Config::default()
    };
    stream.create_consumer(config).await.unwrap();
    for worker in &mut world.workers {
        worker.start_again();
    }
    for worker in &world.workers {
        worker.ready().await;
    }
}

/// Everything fails in turn while deliveries come in.
async fn chaos(count: usize) {
    const BATCH: usize = 64;
    let setup = setup().own_postgres().workers(2).worker("WORKER_BATCH_MAX", &BATCH.to_string());
    let mut world = setup.start().await;
    short_ack_wait(&mut world).await;
    let load = Load::of(count, world.port(), fixture!("issue_created"));
    let part = |tenths: usize| count * tenths / 20;
    for (step, what) in ["database", "0", "1", "database", "nats", "0", "1", "database"].into_iter().enumerate() {
        load.accepted(part(2 * step + 2)).await;
        match what {
            "database" => {
                world.postgres.as_ref().unwrap().kill().await;
                load.accepted(part(2 * step + 3)).await; // some come in while it is away
                world.postgres.as_mut().unwrap().start_again().await.unwrap();
            }
            "nats" => {
                world.nats.kill().await;
                world.nats.start_again().await.unwrap();
            }
            worker => {
                let worker = &mut world.workers[worker.parse::<usize>().unwrap()];
                worker.kill().await;
                worker.start_again();
            }
        }
    }
    load.end().await;
    world.connect_sql().await;
    world.settled(count).await;
    // A killed server forgets up to 32 numbers that it had set aside, and rolls back what each of 4 connections was
    // doing; a killed worker leaves its 2.
    let explained = 3 * (32 + 4 * BATCH) + 4 * 2 * BATCH;
    let highest: i32 = world.value("SELECT max(number) FROM issues").await;
    assert!(usize::try_from(highest).unwrap() - count <= explained, "{highest} numbers for {count} issues");
    let audit = world.worker(&["audit"]).await;
    assert_eq!(audit.code, Some(0), "{}{}", audit.out, audit.err);
}

#[tokio::test]
async fn kills_of_everything_lose_and_double_nothing() {
    chaos(4_000).await;
}

/// `cargo test -p tests kills_of_everything_at_length -- --ignored`
#[tokio::test]
#[ignore = "takes minutes"]
async fn kills_of_everything_at_length() {
    chaos(20_000).await;
}

/// The resident memory of a process, in KiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The state of one check of a worker's `/readyz`, and what it says.
async fn check(world: &World, worker: usize, name: &str) -> (bool, String) {
    let list = world.workers[worker].ops("/readyz").await.json();
    let check = list.as_array().unwrap().iter().find(|entry| entry["name"] == name).unwrap().clone();
    (check["ok"].as_bool().unwrap(), check["detail"].as_str().unwrap().to_owned())
}

/// Waits until the worker is not ready because of the database, and has said this of it in its log.
async fn wait_for_outage(world: &World, reason: &str) {
    eventually(&format!("the worker to tell of the outage: {reason}"), || async {
        let (ok, detail) = check(world, 0, "database").await;
        (!ok && !detail.is_empty() && world.workers[0].log().contains(reason)).then_some(())
    })
    .await;
    assert_eq!(world.workers[0].ops("/readyz").await.status, 503);
}

/// PostgreSQL keeps its connections and answers nothing, for so long.
async fn hang(time: Duration) {
    let body: &'static str = format!(r#"{{"action":"created","filling":"{}"}}"#, "x".repeat(100_000)).leak();
    let mut world = setup().own_postgres().start().await;
    let first = Load::of(200, world.port(), body);
    first.end().await;
    world.until("SELECT count(*) FROM signals", 200_i64).await;
    let pid = world.workers[0].process().pid();
    let (begin, before) = (Instant::now(), resident(pid));

    world.postgres.as_ref().unwrap().process().freeze().unwrap();
    let load = Load::of(1_000, world.port(), body); // 100 MB
    wait_for_outage(&world, "answered").await;
    let noticed = begin.elapsed();
    assert!(noticed < Duration::from_secs(15), "an outage is known within seconds, this took {noticed:?}");
    load.end().await;
    let mut highest = 0;
    while begin.elapsed() < time {
        highest = highest.max(resident(pid));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Two batches of at most 16 MiB each, as messages and as rows.
    assert!(highest < before + 100 * 1024, "from {before} KiB to {highest} KiB");
    world.postgres.as_ref().unwrap().process().thaw().unwrap();

    let thawed = Instant::now();
    world.connect_sql().await;
    world.until("SELECT count(*) FROM signals", 1_200_i64).await;
    eprintln!("noticed after {noticed:?}, {before} -> {highest} KiB, caught up {:?} after the end", thawed.elapsed());
    assert!(thawed.elapsed() < Duration::from_secs(20), "{:?}", thawed.elapsed());
    world.workers[0].ready().await;
    world.all_acknowledged().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
}

#[tokio::test]
async fn a_database_that_hangs_is_an_outage() {
    hang(Duration::from_secs(12)).await;
}

/// `cargo test -p tests a_database_that_hangs_for_a_minute -- --ignored --nocapture`
#[tokio::test]
#[ignore = "takes over a minute"]
async fn a_database_that_hangs_for_a_minute() {
    hang(Duration::from_secs(60)).await;
}

/// The primary hangs and the standby takes its place.
#[tokio::test]
async fn a_primary_that_hangs_is_left_for_the_one_that_took_its_place() {
    let scratch = Scratch::new("failover").unwrap();
    let server = async |name: &str| {
        let options = PostgresOptions::for_tests(scratch.path().join(name));
        let server = Postgres::start(programs(), options).await.unwrap();
        let url = server.create_database("door").await.unwrap();
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        (server, url, client)
    };
    let (primary, _, _) = server("primary").await;
    let (standby, url, looking) = server("standby").await;
    // What replication would have brought. The rows are missing, which this test does not look at.
    worker::store::Store::new(&url.parse().unwrap(), 1).migrate().await.unwrap();
    looking.batch_execute("ALTER DATABASE door SET default_transaction_read_only = on").await.unwrap();
    let hosts = format!("127.0.0.1:{},127.0.0.1:{}", primary.port(), standby.port());
    let world = setup().worker("DATABASE_URL", &format!("postgres://loop@{hosts}/door")).start().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.all_acknowledged().await;

    primary.process().freeze().unwrap();
    let begin = Instant::now();
    let id = world.post(fixture!("issue_created")).await.accepted();
    // Nobody takes its place at once: by now the worker has found nobody that does.
    wait_for_outage(&world, "").await;
    looking.batch_execute("ALTER DATABASE door RESET default_transaction_read_only").await.unwrap();
    eventually("the new primary to have it", || async {
        let stored = "SELECT 1 FROM ingest.deliveries WHERE delivery_id = $1";
        looking.query_opt(stored, &[&id]).await.unwrap()
    })
    .await;
    eprintln!("stored at the new primary after {:?}", begin.elapsed());
}

#[tokio::test]
async fn what_the_server_says_of_itself_is_waited_out() {
    let mut world = setup().own_postgres().start().await;
    world.stored(&world.post(fixture!("issue_created")).await.accepted()).await;

    // Read-only, as a primary becomes that is demoted.
    world.execute("ALTER SYSTEM SET default_transaction_read_only = on").await;
    world.execute("SELECT pg_reload_conf()").await;
    eventually("the server to be read-only", || async {
        (world.value::<String>("SHOW default_transaction_read_only").await == "on").then_some(())
    })
    .await;
    let read_only = world.post(fixture!("issue_created")).await.accepted();
    wait_for_outage(&world, "25006").await;
    world.execute("SET default_transaction_read_only = off").await; // for this connection, which mends it
    world.execute("ALTER SYSTEM RESET default_transaction_read_only").await;
    world.execute("SELECT pg_reload_conf()").await;
    world.stored(&read_only).await;
    world.workers[0].ready().await;

    // A statement that somebody cancels, as `statement_timeout` does.
    let (mut locker, connection) = tokio_postgres::connect(&world.database_url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let lock = locker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE issues").await.unwrap();
    let canceled = world.post(fixture!("issue_created")).await.accepted();
    let cancel = "SELECT count(*) FROM (SELECT pg_cancel_backend(pid) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND application_name = 'loop-worker') AS canceled";
    eventually("a statement to cancel", || async { (world.value::<i64>(cancel).await > 0).then_some(()) }).await;
    wait_for_outage(&world, "57014").await;
    lock.rollback().await.unwrap();
    world.stored(&canceled).await;

    // No connection left, after a restart that the worker's own did not survive.
    let postgres = world.postgres.as_mut().unwrap();
    postgres.options.max_connections = 10;
    postgres.stop().await.unwrap();
    postgres.start_again().await.unwrap();
    let mut taken = Vec::new();
    let url = &world.database_url;
    while let Ok((client, connection)) = tokio_postgres::connect(url, tokio_postgres::NoTls).await {
        tokio::spawn(connection);
        // Whatever the worker has got back goes to the next of these.
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'loop-worker'";
        client.batch_execute(others).await.unwrap();
        taken.push(client);
    }
    let refused = world.post(fixture!("issue_created")).await.accepted();
    wait_for_outage(&world, "53300").await;
    drop(taken);
    world.connect_sql().await;
    world.stored(&refused).await;
    world.workers[0].ready().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
}

#[tokio::test]
async fn a_worker_that_stops_hands_its_batch_to_the_others_at_once() {
    let world = setup().workers(4).worker("WORKER_BATCH_MAX", "50").start().await;
    let (mut locker, connection) = tokio_postgres::connect(&world.database_url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let lock = locker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE issues").await.unwrap();
    Load::of(600, world.port(), fixture!("issue_created")).end().await;
    let waiting = "SELECT count(*) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND application_name = 'loop-worker' AND datname = current_database()";
    world.until(waiting, 8_i64).await; // four workers with two batches each, all in the middle of them

    let asked = Instant::now();
    assert_eq!(world.workers[0].stop().await, Some(0), "{}", world.workers[0].log());
    assert!(asked.elapsed() < SHUTDOWN_GRACE, "{:?}", asked.elapsed());
    lock.rollback().await.unwrap();
    let free = Instant::now();
    world.until("SELECT count(*) FROM signals", 600_i64).await;
    assert!(free.elapsed() < ACK_WAIT / 2, "the ack wait is 30 s, this took {:?}", free.elapsed());
    world.settled(600).await;
}

#[tokio::test]
async fn what_is_on_its_way_to_a_worker_that_stops_is_not_left_to_the_ack_wait() {
    let mut world = setup().start().await;
    for _ in 0..20 {
        world.workers[0].ready().await;
        let id = world.post(fixture!("issue_created")).await.accepted();
        // The message is delivered about now, while the worker ceases to ask.
        assert_eq!(world.workers[0].stop().await, Some(0), "{}", world.workers[0].log());
        world.workers[0].start_again();
        let free = Instant::now();
        world.stored(&id).await;
        assert!(free.elapsed() < ACK_WAIT / 2, "the ack wait is 30 s, this took {:?}", free.elapsed());
    }
    world.settled(20).await;
}

#[tokio::test]
async fn a_worker_stops_in_order_while_postgresql_is_down() {
    let mut world = setup().own_postgres().start().await;
    world.postgres.as_ref().unwrap().kill().await;
    let id = world.post(fixture!("issue_created")).await.accepted();
    wait_for_outage(&world, "").await;
    let asked = Instant::now();
    assert_eq!(world.workers[0].stop().await, Some(0), "{}", world.workers[0].log());
    assert!(asked.elapsed() < SHUTDOWN_GRACE, "{:?}", asked.elapsed());
    // Handed back, not left to the ack wait of 30 s.
    world.postgres.as_mut().unwrap().start_again().await.unwrap();
    world.connect_sql().await;
    let begin = Instant::now();
    world.workers[0].start_again();
    world.stored(&id).await;
    assert!(begin.elapsed() < ACK_WAIT * 2 / 3, "{:?}", begin.elapsed());
    world.settled(1).await;
}

#[tokio::test]
async fn what_a_worker_holds_through_an_outage_is_delivered_to_nobody_else() {
    let mut world = setup().own_postgres().start().await;
    short_ack_wait(&mut world).await;
    world.postgres.as_ref().unwrap().kill().await;
    let ids = [world.post(fixture!("issue_created")).await.accepted(), world.post("{}").await.accepted()];
    wait_for_outage(&world, "").await;
    let begin = Instant::now();
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    let another: PullConsumer = stream.get_consumer("worker").await.unwrap();
    while begin.elapsed() < Duration::from_secs(6) {
        // Three ack waits long, somebody else asks for what is not worked on.
        let mut messages = another.fetch().max_messages(10).messages().await.unwrap();
        assert!(messages.next().await.is_none(), "progress acks keep what is held");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    world.postgres.as_mut().unwrap().start_again().await.unwrap();
    world.connect_sql().await;
    for id in &ids {
        world.stored(id).await;
    }
    world.settled(2).await;
}

#[tokio::test]
async fn a_worker_that_was_stopped_for_longer_than_the_ack_wait_stores_nothing_twice() {
    let mut world = setup().workers(2).worker("WORKER_BATCH_MAX", "50").start().await;
    short_ack_wait(&mut world).await;
    let (mut locker, connection) = tokio_postgres::connect(&world.database_url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let lock = locker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE issues").await.unwrap();
    Load::of(300, world.port(), fixture!("issue_created")).end().await;
    let waiting = "SELECT count(*) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND application_name = 'loop-worker' AND datname = current_database()";
    world.until(waiting, 4_i64).await; // both workers with two batches each, all in the middle of them
    world.workers[0].process().signal(Signal::SIGSTOP);
    lock.rollback().await.unwrap();
    // Its transactions hold their claims until PostgreSQL ends them, half a minute later. The other worker gets their
    // messages after the ack wait.
    world.until("SELECT count(*) FROM signals", 300_i64).await;
    world.workers[0].process().signal(Signal::SIGCONT);
    world.all_acknowledged().await;
    let last = world.post(fixture!("issue_created")).await.accepted();
    world.stored(&last).await;
    for worker in &world.workers {
        worker.ready().await;
    }
    world.all_acknowledged().await;
    for table in ["signals", "issues", "ingest.deliveries WHERE state = 'stored'"] {
        assert_eq!(world.value::<i64>(&format!("SELECT count(*) FROM {table}")).await, 301, "{table}");
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
}

#[tokio::test]
async fn a_database_whose_disk_is_full_is_waited_for() {
    let world = setup().own_postgres().start().await;
    let folder = world.folder().join("small");
    let Some(disk) = SmallDisk::mount(&folder, "24m") else {
        return world::skipped("a_database_whose_disk_is_full_is_waited_for", "may not mount a tmpfs");
    };
    // PostgreSQL wants the folder to be its own.
    let home = world.postgres.as_ref().unwrap().home().join("data");
    assert!(Command::new("chown").arg("--reference").args([&home, &folder]).status().unwrap().success());
    world.execute(&format!("CREATE TABLESPACE small LOCATION '{}'", folder.display())).await;
    for table in ["public.signals", "public.issues"] {
        world.execute(&format!("ALTER TABLE {table} SET TABLESPACE small")).await;
    }
    // Nothing that compresses: some hundred of these fill the disk.
    let body = || {
        let noise: String = (0..2_000).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
        format!(r#"{{"data":{{"issue":{{"id":"1","title":"T","noise":"{noise}"}}}}}}"#)
    };
    let mut ids = Vec::new();
    for _ in 0..400 {
        ids.push(world.post(body()).await.accepted());
    }
    wait_for_outage(&world, "53100").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
    disk.resize("400m");
    world.settled(ids.len()).await;
}
