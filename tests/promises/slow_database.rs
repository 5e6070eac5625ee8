//! A statement that takes long while PostgreSQL answers everything else is waited for, and told as what it is. If it waits
//! for a lock, the lock's holder is named. Silence is told as silence.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{PullConsumer, pull};
use futures_util::future::join_all;
use tokio_postgres::{Client, NoTls};
use world::{Post, World, eventually};

use crate::{fixture, setup};

/// One check of the first worker's `/readyz`.
async fn check(world: &World, name: &str) -> (bool, String) {
    let list = world.workers[0].ops("/readyz").await.json();
    let check = list.as_array().unwrap().iter().find(|entry| entry["name"] == name).unwrap().clone();
    (check["ok"].as_bool().unwrap(), check["detail"].as_str().unwrap().to_owned())
}

/// Another session of the database, with its process id.
async fn session(world: &World, name: &str) -> (Client, i32) {
    let url = format!("{}?application_name={name}", world.database_url);
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    tokio::spawn(connection);
    let pid = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    (client, pid)
}

/// The consumer, with an ack wait so short that what gets no progress acks is delivered again soon.
async fn short_ack_wait(world: &World) -> PullConsumer {
    let stream = eventually("the stream", || async { world.jetstream().await.get_stream("SIGNALS").await.ok() }).await;
    let ack_wait = Duration::from_secs(3);
    let config =
        pull::Config { durable_name: Some("worker".into()), ack_wait, max_ack_pending: 16_384, ..Default::default() };
    stream.create_consumer(config).await.unwrap()
}

/// A world whose worker has that concurrency. It starts after its consumer.
async fn world(concurrency: &str) -> (World, PullConsumer) {
    let setup = setup().workers(0).worker("WORKER_CONCURRENCY", concurrency);
    let mut world = setup.start().await;
    let consumer = short_ack_wait(&world).await;
    world.start_worker().await;
    (world, consumer)
}

async fn post(world: &World, count: usize) {
    join_all((0..count).map(|_| async { world.post(fixture!("issue_created")).await.accepted() })).await;
}

/// Everything is stored, once, and no message was given to the worker a second time.
async fn settled(world: &World, consumer: &PullConsumer, count: i64) {
    world.until("SELECT count(*) FROM signals", count).await;
    world.all_acknowledged().await;
    for table in ["signals", "issues", "ingest.deliveries WHERE state = 'stored'"] {
        assert_eq!(world.value::<i64>(&format!("SELECT count(*) FROM {table}")).await, count, "{table}");
    }
    let delivered = consumer.get_info().await.unwrap().delivered;
    assert_eq!(delivered.consumer_sequence, delivered.stream_sequence, "progress acks kept what was in hand");
}

/// A table is locked for half a minute.
async fn locked(concurrency: &str) {
    let (world, consumer) = world(concurrency).await;
    let (mut locker, pid) = session(&world, "night_job").await;
    let lock = locker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE issues").await.unwrap();
    let begin = Instant::now();
    post(&world, 20).await;
    let holder = format!("a lock held by pid {pid} (application night_job");
    let (mut named_after, mut last) = (None, String::new());
    // Past the moment at which second tries are under way: after 15 s.
    while begin.elapsed() < Duration::from_secs(32) {
        let (ok, detail) = check(&world, "database").await;
        assert!(
            !detail.contains("has not answered") && !detail.contains("no connection"),
            "after {:?}: {detail}",
            begin.elapsed()
        );
        if !ok && detail.contains(&holder) {
            named_after.get_or_insert(begin.elapsed());
            last = detail;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let named_after = named_after.expect("the holder is named");
    assert!(named_after < Duration::from_secs(15), "{named_after:?}"); // 10 s on a machine that is not busy
    assert!(last.contains("a batch of") && last.contains("idle in transaction"), "{last}");
    eprintln!("concurrency {concurrency}: after {named_after:?}: {last}");
    lock.rollback().await.unwrap();
    settled(&world, &consumer, 20).await;
    eventually("the worker to be ready again", async || check(&world, "database").await.0.then_some(())).await;
    let log = world.workers[0].log();
    assert!(log.contains(&holder) && !log.contains("has not answered"), "the log tells it as well");
}

#[tokio::test]
async fn the_holder_of_a_lock_is_named_and_is_no_silence() {
    tokio::join!(locked("1"), locked("2"), locked("8"));
}

#[tokio::test]
async fn a_role_that_may_not_see_other_sessions_still_names_the_holder() {
    let name = format!("limited_{}", uuid::Uuid::new_v4().simple());
    let url = world::postgres().await.create_database(&name).await.unwrap();
    worker::store::Store::new(&url.parse().unwrap(), 1).migrate().await.unwrap();
    let (mut locker, connection) =
        tokio_postgres::connect(&format!("{url}?application_name=night_job"), NoTls).await.unwrap();
    tokio::spawn(connection);
    let pid: i32 = locker.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let grants = "CREATE ROLE ROLE LOGIN; GRANT SELECT, INSERT ON issues, signals TO ROLE;
        GRANT USAGE ON SCHEMA ingest TO ROLE; GRANT SELECT, INSERT, UPDATE ON ingest.deliveries TO ROLE;
        GRANT SELECT, INSERT, DELETE ON ingest.dead_letters TO ROLE; GRANT USAGE ON SEQUENCE issues_number_seq TO ROLE";
    locker
        .batch_execute(&grants.replace("ROLE", &name).replace(&format!("CREATE {name}"), "CREATE ROLE"))
        .await
        .unwrap();
    let limited = url.replace("loop@", &format!("{name}@"));
    let world = setup().worker("DATABASE_URL", &limited).worker("WORKER_MIGRATE", "off").start().await;
    let lock = locker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE issues").await.unwrap();
    world.post(fixture!("issue_created")).await.accepted();
    let holder =
        format!("a lock held by pid {pid} (application night_job, role loop; GRANT pg_read_all_stats TO {name} to");
    eventually("the holder to be named", async || check(&world, "database").await.1.contains(&holder).then_some(()))
        .await;
    lock.rollback().await.unwrap();
    world.all_acknowledged().await;
}

/// Rows that take as long as their payload says, and bodies of 8 MiB beside small ones.
const SLOW: &str = "
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep((NEW.signal_payload ->> 'seconds')::float8); RETURN NEW; END $$;
    CREATE TRIGGER slow BEFORE INSERT ON issues FOR EACH ROW EXECUTE FUNCTION slow()";

fn slow_body(seconds: u32, filling: usize) -> String {
    format!(r#"{{"seconds":{seconds},"filling":"{}"}}"#, "x".repeat(filling))
}

async fn slow(concurrency: &str) {
    let (world, consumer) = world(concurrency).await;
    world.execute(SLOW).await;
    let begin = Instant::now();
    // Every puller has a batch that takes longer than PostgreSQL may be silent.
    let pullers: i64 = concurrency.parse().unwrap();
    for busy in 1..=pullers {
        Post::signed(slow_body(42, 10)).send(world.port()).await.accepted();
        let sleeping =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
        world.until(sleeping, busy).await;
    }
    let posts = [(4, 8_000_000), (4, 8_000_000), (1, 10), (0, 10)];
    for (seconds, filling) in posts {
        Post::signed(slow_body(seconds, filling)).send(world.port()).await.accepted();
    }
    let all = pullers + 4;
    let mut told = false;
    while world.value::<i64>("SELECT count(*) FROM signals").await < all {
        let (ok, detail) = check(&world, "database").await;
        assert!(ok, "a slow statement is no outage: {detail}");
        told |= detail.contains("a batch of") && detail.contains("PgSleep");
        assert!(begin.elapsed() < Duration::from_secs(170), "never stored");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(told, "a slow statement is told");
    settled(&world, &consumer, all).await;
    eprintln!("concurrency {concurrency}: stored after {:?}", begin.elapsed());
}

#[tokio::test]
async fn a_batch_that_needs_most_of_a_minute_is_stored() {
    tokio::join!(slow("1"), slow("2"), slow("8"));
}

#[tokio::test]
async fn a_statement_beyond_its_time_limit_is_split() {
    let (world, consumer) = world("2").await;
    world.execute(SLOW).await;
    // One statement would take 64 s, its limit is 60: alone each row takes 2.
    let (mut locker, _) = session(&world, "holder").await;
    let lock = locker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE issues").await.unwrap();
    Post::signed(slow_body(0, 10)).send(world.port()).await.accepted();
    Post::signed(slow_body(0, 10)).send(world.port()).await.accepted();
    eventually("both pullers to be busy", async || {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        (world.value::<i64>(waiting).await > 0).then_some(())
    })
    .await;
    for _ in 0..32 {
        Post::signed(slow_body(2, 10)).send(world.port()).await.accepted();
    }
    world.on_stream(34).await;
    lock.rollback().await.unwrap();
    let begin = Instant::now();
    // A minute until the limit, another one where the second try was abandoned amid its statement, and the rows.
    while world.value::<i64>("SELECT count(*) FROM signals").await < 34 {
        assert!(begin.elapsed() < Duration::from_secs(400), "never stored");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    settled(&world, &consumer, 34).await;
}

#[tokio::test]
async fn silence_beside_a_slow_statement_is_found() {
    let mut world = setup().own_postgres().start().await;
    world.execute(SLOW).await;
    Post::signed(slow_body(8, 10)).send(world.port()).await.accepted();
    eventually("the statement to be told", async || {
        let (_, detail) = check(&world, "database").await;
        detail.contains("PgSleep").then_some(())
    })
    .await;
    let begin = Instant::now();
    // Every process of the server, as when the machine hangs: a backend that goes on sleeping would end well.
    world.postgres.as_ref().unwrap().process().freeze().unwrap();
    eventually("the silence to be told", async || {
        let (ok, detail) = check(&world, "database").await;
        (!ok && detail.contains("has not answered")).then_some(())
    })
    .await;
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed()); // 10 s, and a busy machine
    world.postgres.as_ref().unwrap().process().thaw().unwrap();
    world.connect_sql().await;
    world.until("SELECT count(*) FROM signals", 1_i64).await;
    world.workers[0].ready().await;
}

#[tokio::test]
async fn a_wait_for_a_lock_is_not_called_over_while_postgresql_is_silent() {
    let mut world = setup().own_postgres().start().await;
    let (mut locker, pid) = session(&world, "night_job").await;
    let lock = locker.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE issues").await.unwrap();
    world.post(fixture!("issue_created")).await.accepted();
    let told = async |words: &str| check(&world, "database").await.1.contains(words).then_some(());
    let holder = format!("a lock held by pid {pid}");
    eventually("the holder to be named", async || told(&holder).await).await;
    world.postgres.as_ref().unwrap().process().freeze().unwrap();
    eventually("the silence to be told", async || told("has not answered").await).await;
    let over = "no batch waits for a lock any more";
    assert!(!world.workers[0].log().contains(over), "PostgreSQL has not said so");
    world.postgres.as_ref().unwrap().process().thaw().unwrap();
    drop(lock);
    drop(locker); // the lock goes with the session
    world.connect_sql().await;
    world.until("SELECT count(*) FROM signals", 1_i64).await;
    world.workers[0].ready().await;
}
