//! The two real servers, found or fetched as a person's `cargo run` finds them.

use std::process::Command;
use std::time::Duration;

use local::{NatsOptions, NatsServer, Postgres, PostgresOptions, Programs, Scratch, leftovers};
use tokio_postgres::{Client, NoTls};

fn programs() -> Programs {
    Programs::find_or_fetch(&mut |step| eprintln!("{step}")).expect("the servers' programs")
}

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

fn is_running(pid: u32) -> bool {
    let state = Command::new("ps").args(["-o", "state=", "-p", &pid.to_string()]).output().expect("ps runs").stdout;
    !state.is_empty() && !state.starts_with(b"Z")
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_keeps_its_port_and_data_through_stop_and_kill() {
    let scratch = Scratch::new("nats \"quoted\"").unwrap();
    let programs = programs();
    let options = NatsOptions { monitor: true, ..NatsOptions::new(scratch.path().join("nats")) };
    let mut nats = NatsServer::start(&programs, options).await.unwrap();
    let url = nats.url();
    let store = nats.options.dir.join("jetstream");
    assert!(store.is_dir());
    nats.stop().await.unwrap();
    assert!(!is_running(nats.pid()));
    assert!(local::ports::is_free(nats.port()));
    nats.options.extra = "server_name: again".into();
    nats.start_again().await.unwrap();
    assert_eq!(nats.url(), url);
    nats.kill().await;
    assert!(!nats.process().is_alive());
    nats.start_again().await.unwrap();
    let pid = nats.pid();
    drop(nats);
    assert!(!is_running(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_start_shows_the_end_of_its_log() {
    let scratch = Scratch::new("bad").unwrap();
    let programs = programs();
    let bad = NatsOptions { extra: "no_such_setting: 1".into(), ..NatsOptions::new(scratch.path().join("nats")) };
    let refused = format!("{:#}", NatsServer::start(&programs, bad).await.unwrap_err());
    assert!(refused.contains("nats-server did not start") && refused.contains("no_such_setting"), "{refused}");

    let mut bad = PostgresOptions::for_tests(scratch.path().join("postgres"));
    bad.settings.push(("max_connections".into(), "it's many".into()));
    let refused = format!("{:#}", Postgres::start(&programs, bad).await.err().unwrap());
    assert!(refused.contains("PostgreSQL did not start") && refused.contains("it's many"), "{refused}");

    // A port that was asked for stays that port, and a stranger who listens there is not taken for the server.
    let stranger = NatsServer::start(&programs, NatsOptions::new(scratch.path().join("stranger"))).await.unwrap();
    let taken = NatsOptions { port: Some(stranger.port()), ..NatsOptions::new(scratch.path().join("second")) };
    let refused = format!("{:#}", NatsServer::start(&programs, taken).await.unwrap_err());
    assert!(refused.contains("address already in use"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_keeps_its_port_and_data_through_stop_freeze_and_kill() {
    let scratch = Scratch::new("postgres").unwrap();
    let options = PostgresOptions::for_tests(scratch.path().join("it's here"));
    let mut postgres = Postgres::start(&programs(), options).await.unwrap();
    let url = postgres.create_database("once").await.unwrap();
    assert_eq!(postgres.create_database("once").await.unwrap(), url);
    assert!(postgres.create_database("a\"; DROP").await.is_err());
    let client = connect(&url).await.unwrap();
    client.batch_execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)").await.unwrap();

    postgres.process().freeze().unwrap();
    let asked = tokio::time::timeout(Duration::from_millis(300), client.batch_execute("INSERT INTO kept VALUES (2)"));
    let frozen = asked.await.is_err();
    postgres.process().thaw().unwrap();
    assert!(frozen, "a frozen server answers nothing");
    client.batch_execute("INSERT INTO kept VALUES (3)").await.unwrap();

    postgres.kill().await;
    assert!(client.batch_execute("SELECT 1").await.is_err());
    assert!(connect(&url).await.is_err());
    postgres.options.max_connections = 20;
    postgres.start_again().await.unwrap();
    let client = connect(&url).await.unwrap();
    let kept: i64 = client.query_one("SELECT count(*) FROM kept", &[]).await.unwrap().get(0);
    assert_eq!(kept, 3);
    let limit: String = client.query_one("SHOW max_connections", &[]).await.unwrap().get(0);
    assert_eq!(limit, "20");

    postgres.stop().await.unwrap();
    postgres.start_again().await.unwrap();
    assert!(connect(&url).await.is_ok());
    let pid = postgres.pid();
    drop(postgres);
    assert!(!is_running(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_asked_for_where_one_was_set() {
    let scratch = Scratch::new("password").unwrap();
    let options = PostgresOptions::lasting(scratch.path().join("postgres"));
    let programs = programs();
    let postgres = Postgres::start(&programs, options.clone()).await.unwrap();
    let url = postgres.url();
    let client = connect(&url).await.unwrap();
    let fsync: String = client.query_one("SHOW fsync", &[]).await.unwrap().get(0);
    assert_eq!(fsync, "on");
    let (before, rest) = url.split_once("loop:").unwrap();
    let (password, after) = rest.split_once('@').unwrap();
    assert!(password.len() == 64 && connect(&format!("{before}loop@{after}")).await.is_err());
    let home = postgres.home().to_path_buf();
    drop((client, postgres));

    // The next start has the same one; another in its place is refused and not shown.
    let options = PostgresOptions { port: None, ..options };
    let postgres = Postgres::start(&programs, options.clone()).await.unwrap();
    assert!(postgres.url().contains(password));
    drop(postgres);
    std::fs::write(home.join("password"), "another").unwrap();
    let refused = format!("{:#}", Postgres::start(&programs, options).await.err().unwrap());
    assert!(refused.contains("refuses the password") && !refused.contains("another"), "{refused}");
}

/// To `leftovers` a server of ours is like one that was left: it knows them by their folders alone.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_run_left_is_ended_and_nothing_else() {
    let scratch = Scratch::new("left").unwrap();
    let (nats_dir, postgres_dir) = (scratch.path().join("nats"), scratch.path().join("postgres"));
    let programs = programs();
    let nats = NatsServer::start(&programs, NatsOptions::new(&nats_dir)).await.unwrap();
    let postgres = Postgres::start(&programs, PostgresOptions::for_tests(&postgres_dir)).await.unwrap();
    let other = NatsServer::start(&programs, NatsOptions::new(scratch.path().join("other"))).await.unwrap();
    let client = connect(&postgres.url()).await.unwrap(); // a backend, which names no folder

    let mut expected = [nats.pid(), postgres.pid()];
    let ended = tokio::task::spawn_blocking(move || leftovers::end(&nats_dir, &postgres_dir)).await.unwrap().unwrap();
    expected.sort_unstable();
    assert!(expected.iter().all(|pid| ended.contains(pid)), "{expected:?} must be among {ended:?}");
    assert!(ended.iter().all(|pid| !is_running(*pid)));
    assert!(client.batch_execute("SELECT 1").await.is_err());
    assert!(other.process().is_alive());
    assert!(!postgres.home().join("data/postmaster.pid").exists());
}
