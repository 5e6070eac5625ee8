//! What the database lost comes back out of the stream, exactly that, and an audit proves it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use local::Postgres;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shared::delivery::Delivery;
use shared::receipt::ReceiptTo;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use world::{Connection, Post, Ran, World, eventually};

use crate::{fixture, setup};

/// Puts `count` deliveries on the stream, as the gateway does. Their ids.
async fn publish(world: &World, count: usize) -> Vec<String> {
    let jetstream = world.jetstream().await;
    let mut ids = Vec::new();
    let mut acks = Vec::new();
    for place in 0..count {
        let body = Bytes::from_static(fixture!("issue_created").as_bytes());
        let delivery = Delivery::received(body, None, Some(b"issue"), None);
        let (subject, headers) = (delivery.subject(), delivery.headers(0, &ReceiptTo::new("nobody", place)));
        acks.push(jetstream.publish_with_headers(subject, headers, delivery.body.clone()).await.unwrap());
        ids.push(delivery.id.to_string());
    }
    for ack in join_all(acks.into_iter().map(IntoFuture::into_future)).await {
        ack.unwrap();
    }
    ids
}

async fn post(world: &World, count: usize) -> Vec<String> {
    let mut connection = Connection::open(world.port()).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(connection.send(&Post::signed(fixture!("error_created"))).await.unwrap().accepted());
    }
    ids
}

/// Ids and times of all rows, without the issues' numbers.
async fn rows(world: &World) -> HashMap<String, String> {
    let sql = "SELECT s.id, (to_jsonb(s)::text || (to_jsonb(i) - 'number')::text)
        FROM signals s JOIN issues i ON i.id = s.issue_id";
    world.query(sql, &[]).await.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// How far issue numbers are drawn.
async fn drawn(world: &World) -> i64 {
    world.value("SELECT coalesce(pg_sequence_last_value('issues_number_seq'), 0)").await
}

fn copy(from: &PathBuf, to: &PathBuf) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

#[tokio::test]
async fn a_database_restored_from_an_older_copy_gets_back_exactly_what_it_lacks() {
    let mut world = setup().own_postgres().start().await;
    post(&world, 30).await;
    world.on_stream(30).await;
    world.all_acknowledged().await;
    // The copy is taken while 20 more wait on the stream.
    assert_eq!(world.workers[0].stop().await, Some(0));
    post(&world, 20).await;
    world.on_stream(50).await;
    let data = world.postgres.as_ref().unwrap().home().join("data");
    let backup = data.with_file_name("backup");
    world.postgres.as_ref().unwrap().stop().await.unwrap();
    copy(&data, &backup);
    start(&mut world).await;
    world.workers[0].start_again();
    world.workers[0].ready().await;
    post(&world, 10).await;
    world.on_stream(60).await;
    world.all_acknowledged().await;
    let before = rows(&world).await;
    assert_eq!(before.len(), 60);
    assert_eq!(world.worker(&["audit"]).await.code, Some(0));

    // The worker's connections would keep the server from stopping in order; and nobody else is to store anything.
    assert_eq!(world.workers[0].stop().await, Some(0));
    world.postgres.as_ref().unwrap().stop().await.unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    copy(&backup, &data);
    start(&mut world).await;
    assert_eq!(rows(&world).await.len(), 30);

    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!(audit.code, Some(1), "{audit:?}");
    let counts = audit.json();
    assert_eq!((&counts["missing"], &counts["stored"], &counts["messages"]), (&30.into(), &30.into(), &60.into()));
    assert_eq!(counts["missing_first"].as_array().unwrap().len(), 20, "the first 20 are named");
    let first = counts["missing_first"][0]["stream_sequence"].as_u64().unwrap();
    assert_eq!(first, 31);
    let named = world.worker(&["audit", "--verbose"]).await;
    assert_eq!((named.number("missing"), named.code), (30, Some(1)), "{named:?}");

    let numbers = drawn(&world).await;
    let foreseen = world.worker(&["replay", "--dry-run"]).await;
    assert_eq!(foreseen.code, Some(0), "{foreseen:?}");
    assert_eq!((foreseen.number("would insert"), foreseen.number("already there")), (30, 30), "{foreseen:?}");
    assert_eq!((rows(&world).await.len(), drawn(&world).await), (30, numbers), "a dry run changes nothing");

    let replay = world.worker(&["replay", "--from-seq", &first.to_string()]).await;
    assert_eq!(replay.code, Some(0), "{replay:?}");
    assert_eq!((replay.number("inserted"), replay.number("already there")), (30, 0), "{replay:?}");
    assert_eq!(rows(&world).await, before, "with their ids and times");
    assert_eq!(drawn(&world).await, numbers + 30);
    assert_eq!(world.worker(&["audit"]).await.code, Some(0));

    let again = world.worker(&["replay"]).await;
    assert_eq!((again.number("inserted"), again.number("already there")), (0, 60), "{again:?}");
    assert_eq!(drawn(&world).await, numbers + 30, "what is there draws no number");
}

/// Starts this world's PostgreSQL again.
async fn start(world: &mut World) {
    let postgres: &mut Postgres = world.postgres.as_mut().unwrap();
    postgres.start_again().await.unwrap();
    world.connect_sql().await;
}

#[tokio::test]
async fn what_a_user_deleted_stays_deleted_until_it_is_asked_for() {
    let world = setup().start().await;
    let ids = post(&world, 6).await;
    world.on_stream(6).await;
    world.all_acknowledged().await;
    let before = rows(&world).await;
    let of = |id: &str, table: &str| {
        let column = if table == "signals" { "signal_id" } else { "issue_id" };
        format!("(SELECT {column} FROM ingest.deliveries WHERE delivery_id = '{id}')")
    };
    for (table, id) in [("signals", &ids[0]), ("issues", &ids[0]), ("signals", &ids[1]), ("issues", &ids[2])] {
        world.execute(&format!("DELETE FROM {table} WHERE id = {}", of(id, table))).await;
    }
    // What is left of the second was edited since, and is to stay as it is.
    let edit = "UPDATE issues SET title = 'mine', status = 'done', signal_payload = NULL WHERE id = ";
    world.execute(&format!("{edit}{}", of(&ids[1], "issues"))).await;

    let replay = world.worker(&["replay"]).await;
    assert_eq!((replay.code, replay.number("deleted by a user")), (Some(0), 3), "{replay:?}");
    assert_eq!(rows(&world).await.len(), 3, "deleted rows stay deleted");
    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!((audit.code, &audit.json()["deleted_by_a_user"]), (Some(0), &3.into()), "{audit:?}");
    for (named, id) in audit.json()["deleted_first"].as_array().unwrap().iter().zip(&ids[..3]) {
        assert_eq!(named["delivery_id"], id.as_str());
    }

    let foreseen = world.worker(&["replay", "--dry-run", "--restore-deleted"]).await;
    assert_eq!(foreseen.number("would be restored"), 3, "{foreseen:?}");
    assert_eq!(rows(&world).await.len(), 3);
    let restore = world.worker(&["replay", "--restore-deleted"]).await;
    assert_eq!((restore.code, restore.number("restored")), (Some(0), 3), "{restore:?}");
    let after = rows(&world).await;
    let signal_of_edited: String = world.value(&format!("SELECT {}", of(&ids[1], "signals"))).await;
    for (signal, row) in &before {
        let same = after.get(signal) == Some(row);
        assert_eq!(same, *signal != signal_of_edited, "{row} became {:?}", after.get(signal));
    }
    let edited = world.stored(&ids[1]).await;
    assert_eq!((&edited.issue["title"], &edited.issue["status"]), (&"mine".into(), &"done".into()));
    assert_eq!(edited.signal["payload"]["action"], "created", "the signal is the delivery's, not the edited issue's");
    assert_eq!(world.worker(&["audit", "--json"]).await.json()["deleted_by_a_user"], 0);
    let again = world.worker(&["replay", "--restore-deleted"]).await;
    assert_eq!((again.number("restored"), again.number("already there")), (0, 6), "{again:?}");
}

#[tokio::test]
async fn a_replay_can_be_interrupted_and_goes_on_where_it_was() {
    let world = setup().workers(0).start().await;
    assert_eq!(world.worker(&["migrate"]).await.code, Some(0));
    let ids = publish(&world, 2_000).await;
    let replay = world.worker_command(&["replay", "--rate", "400", "--resource", "issue"]).spawn().unwrap();
    eventually("its second batch", || async {
        (world.value::<i64>("SELECT count(*) FROM signals").await > 400).then_some(())
    })
    .await;
    kill(Pid::from_raw(replay.id().unwrap().try_into().unwrap()), Signal::SIGINT).unwrap();
    let first = Ran::of(replay.wait_with_output().await.unwrap());
    assert_eq!(first.code, Some(130), "{first:?}");
    let stored: i64 = world.value("SELECT count(*) FROM signals").await;
    assert!((1..2_000).contains(&stored), "{stored}");

    let go_on = first.err.split("go on with: worker ").nth(1).unwrap_or_else(|| panic!("{first:?}"));
    let go_on: Vec<&str> = go_on.split_whitespace().collect();
    let sequence: i64 = go_on[2].parse().unwrap();
    assert_eq!(go_on, ["replay", "--from-seq", go_on[2], "--resource", "issue", "--rate", "400"]);
    // A batch that was under way when the signal came may be in the database and not counted.
    assert!((sequence - 1..=sequence - 1 + 400).contains(&stored), "{stored} stored, {first:?}");
    let second = world.worker(&go_on[..5]).await;
    assert_eq!(second.code, Some(0), "{second:?}");
    assert_eq!(second.number("inserted") + stored.unsigned_abs(), 2_000, "{second:?}");
    let in_order = "SELECT array_agg(l.delivery_id ORDER BY i.number) = $1::text[] FROM issues i
        JOIN ingest.deliveries l ON l.issue_id = i.id";
    assert!(world.query(in_order, &[&ids]).await[0].get::<_, bool>(0), "numbers follow the stream");
}

#[tokio::test]
async fn a_replay_runs_beside_workers() {
    let mut world = setup().start().await;
    world.workers[0].kill().await;
    publish(&world, 1_500).await;
    world.workers[0].start_again();
    let (replay, other) = tokio::join!(world.worker(&["replay"]), world.worker(&["replay"]));
    assert_eq!((replay.code, other.code), (Some(0), Some(0)), "{replay:?} {other:?}");
    world.until("SELECT count(*) FROM issues", 1_500_i64).await;
    world.all_acknowledged().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 1_500);
    assert_eq!(drawn(&world).await, 1_500, "nobody drew a number for what another had stored");
    assert!(!world.workers[0].log().contains("dead letter"));
}

#[tokio::test]
async fn a_dry_run_draws_no_number_and_no_worker_waits_for_it() {
    let mut world = setup().start().await;
    world.workers[0].kill().await;
    publish(&world, 3_000).await;
    // Frozen amid its transaction, with whatever locks it has.
    let dry_run = world.worker_command(&["replay", "--dry-run"]).spawn().unwrap();
    let pid = Pid::from_raw(dry_run.id().unwrap().try_into().unwrap());
    // Its temporary tables, which nobody else can see yet, are the only thing that it locks so.
    let holds = "FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid AND l.mode = 'AccessExclusiveLock'
        WHERE a.datname = current_database() AND a.application_name = 'loop-worker' AND a.state = 'idle in transaction'";
    let for_a_while = "clock_timestamp() - a.state_change > interval '100 ms'";
    let for_a_while: String = format!("SELECT count(*) {holds} AND {for_a_while}");
    let active = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'loop-worker' AND state = 'active'";
    eventually("the dry run to be frozen amid a transaction", || async {
        kill(pid, Signal::SIGSTOP).unwrap();
        // PostgreSQL may still be at what it was sent before.
        world.until(active, 0_i64).await;
        while world.value::<i64>(&format!("SELECT count(*) {holds}")).await > 0 {
            if world.value::<i64>(&for_a_while).await > 0 {
                return Some(());
            }
        }
        kill(pid, Signal::SIGCONT).unwrap();
        None
    })
    .await;
    world.workers[0].start_again();
    world.until("SELECT count(*) FROM signals", 3_000_i64).await;
    world.all_acknowledged().await;
    assert!(world.value::<i64>(&for_a_while).await > 0, "it still holds what it held");
    assert_eq!(drawn(&world).await, 3_000);
    kill(pid, Signal::SIGCONT).unwrap();
    let dry_run = Ran::of(dry_run.wait_with_output().await.unwrap());
    assert_eq!(dry_run.code, Some(0), "{dry_run:?}");
    assert_eq!(dry_run.number("would insert") + dry_run.number("already there"), 3_000, "{dry_run:?}");
    assert_eq!(drawn(&world).await, 3_000, "it drew none");
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_read_differently_today() {
    let world = setup().start().await;
    let ids = post(&world, 3).await;
    world.on_stream(3).await;
    world.all_acknowledged().await;
    let first = format!("(SELECT signal_id FROM ingest.deliveries WHERE delivery_id = '{}')", ids[0]);
    world.execute(&format!("UPDATE signals SET severity = 'low' WHERE id = {first}")).await;
    let dry_run = world.worker(&["replay", "--dry-run", "--verbose"]).await;
    let line = dry_run.out.lines().find(|line| line.contains(&ids[0])).unwrap();
    assert!(line.starts_with("1  ") && line.contains("severity low -> high"), "{line}");
    assert_eq!(dry_run.number("already there"), 2, "{dry_run:?}");
    let replay = world.worker(&["replay"]).await;
    assert_eq!(replay.number("already there"), 3, "{replay:?}");
    assert_eq!(world.stored(&ids[0]).await.signal["severity"], "low", "a replay touches nothing that is there");
}

#[tokio::test]
async fn a_replay_goes_on_after_an_outage_of_the_database() {
    let mut world = setup().workers(0).own_postgres().start().await;
    assert_eq!(world.worker(&["migrate"]).await.code, Some(0));
    let ids = publish(&world, 2_000).await;
    let replay = world.worker_command(&["replay", "--rate", "400"]).spawn().unwrap();
    eventually("its second batch", || async {
        (world.value::<i64>("SELECT count(*) FROM signals").await > 400).then_some(())
    })
    .await;
    world.postgres.as_ref().unwrap().kill().await;
    // Long enough for it to meet the outage: it has a batch each second.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    start(&mut world).await;
    let replay = Ran::of(replay.wait_with_output().await.unwrap());
    assert_eq!(replay.code, Some(0), "{replay:?}");
    assert!(replay.err.contains("will try again"), "it met the outage: {replay:?}");
    assert_eq!(replay.number("inserted") + replay.number("already there"), 2_000, "{replay:?}");
    for table in ["signals", "issues", "ingest.deliveries WHERE state = 'stored'"] {
        assert_eq!(world.value::<i64>(&format!("SELECT count(*) FROM {table}")).await, 2_000, "{table}");
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
    let in_order = "SELECT array_agg(l.delivery_id ORDER BY i.number) = $1::text[] FROM issues i
        JOIN ingest.deliveries l ON l.issue_id = i.id";
    assert!(world.query(in_order, &[&ids]).await[0].get::<_, bool>(0), "numbers follow the stream");
    assert_eq!(world.worker(&["audit"]).await.code, Some(0));
}

#[tokio::test]
async fn a_replay_tells_that_nats_is_away_and_goes_on_afterwards() {
    let mut world = setup().workers(0).start().await;
    assert_eq!(world.worker(&["migrate"]).await.code, Some(0));
    publish(&world, 4_000).await;
    let mut replay = world.worker_command(&["replay", "--rate", "400"]).spawn().unwrap();
    eventually("its first batch", || async {
        (world.value::<i64>("SELECT count(*) FROM signals").await > 0).then_some(())
    })
    .await;
    world.nats.kill().await;
    let mut lines = BufReader::new(replay.stderr.take().unwrap()).lines();
    let told = async { while !lines.next_line().await.unwrap().unwrap().contains("will try again: NATS") {} };
    tokio::time::timeout(Duration::from_secs(40), told).await.expect("it says what it waits for");
    world.nats.start_again().await.unwrap();
    let replay = Ran::of(replay.wait_with_output().await.unwrap());
    assert_eq!(replay.code, Some(0), "{replay:?}");
    assert_eq!(replay.number("inserted"), 4_000, "{replay:?}");
}

#[tokio::test]
async fn a_replay_ends_although_letters_outlived_the_ledger_and_a_row_is_refused() {
    let world = setup().start().await;
    let dead = world.post("not JSON").await.accepted();
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    post(&world, 3).await;
    let refused = world.post(r#"{"fails":"LP001"}"#).await.accepted();
    world.on_stream(5).await;
    world
        .execute(
            "TRUNCATE ingest.deliveries;
             CREATE FUNCTION unclear() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN RAISE EXCEPTION 'hunter2' USING ERRCODE = 'LP001'; END $$;
             CREATE TRIGGER unclear BEFORE INSERT ON issues FOR EACH ROW
                 WHEN (NEW.signal_payload ? 'fails') EXECUTE FUNCTION unclear()",
        )
        .await;
    let replay = world.worker(&["replay", "--verbose"]).await;
    assert_eq!(replay.code, Some(1), "{replay:?}");
    let counts = ["inserted", "became a dead letter", "could not be stored"].map(|what| replay.number(what));
    assert_eq!(counts, [3, 1, 1], "{replay:?}");
    let line = |id: &str| replay.out.lines().find(|line| line.contains(id)).unwrap().to_owned();
    assert!(line(&refused).contains("SQLSTATE LP001") && !replay.out.contains("hunter2"), "{replay:?}");
    assert!(line(&dead).contains("became a dead letter"), "{replay:?}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 1);

    world.execute("DROP TRIGGER unclear ON issues").await;
    let again = world.worker(&["replay"]).await;
    assert_eq!((again.code, again.number("inserted")), (Some(0), 1), "{again:?}");
}

#[tokio::test]
async fn a_deleted_row_that_is_refused_for_an_unclear_reason_keeps_no_other_out() {
    let world = setup().start().await;
    let mut ids = post(&world, 3).await;
    let refused = world.post(r#"{"fails":"LP001"}"#).await.accepted();
    ids.push(refused.clone());
    for id in &ids {
        world.stored(id).await;
    }
    world.all_acknowledged().await;
    world
        .execute(
            "DELETE FROM signals; DELETE FROM issues;
             CREATE FUNCTION unclear() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN RAISE EXCEPTION 'hunter2' USING ERRCODE = 'LP001'; END $$;
             CREATE TRIGGER unclear BEFORE INSERT ON issues FOR EACH ROW
                 WHEN (NEW.signal_payload ? 'fails') EXECUTE FUNCTION unclear()",
        )
        .await;
    let replay = world.worker(&["replay", "--restore-deleted", "--verbose"]).await;
    let counts = ["restored", "could not be restored"].map(|what| replay.number(what));
    assert_eq!((replay.code, counts), (Some(1), [3, 1]), "{replay:?}");
    let line = replay.out.lines().find(|line| line.contains(&refused)).unwrap();
    assert!(line.contains("SQLSTATE LP001") && !replay.out.contains("hunter2"), "{replay:?}");

    world.execute("DROP TRIGGER unclear ON issues").await;
    let again = world.worker(&["replay", "--restore-deleted"]).await;
    assert_eq!((again.code, again.number("restored")), (Some(0), 1), "{again:?}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 4);
}

#[tokio::test]
async fn a_dry_run_names_a_row_that_is_refused_for_an_unclear_reason_and_goes_on() {
    let world = setup().start().await;
    let deleted = world.post(r#"{"fails":"deleted"}"#).await.accepted();
    world.stored(&deleted).await;
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    post(&world, 3).await;
    let refused = world.post(r#"{"fails":"LP001"}"#).await.accepted();
    world.on_stream(5).await;
    world
        .execute(
            "DELETE FROM signals; DELETE FROM issues;
             CREATE FUNCTION unclear(body jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
                 BEGIN
                     IF body ? 'fails' THEN RAISE EXCEPTION 'hunter2' USING ERRCODE = 'LP001'; END IF;
                     RETURN true;
                 END $$;
             ALTER TABLE issues ADD CONSTRAINT unclear CHECK (unclear(signal_payload))",
        )
        .await;
    let dry_run = world.worker(&["replay", "--dry-run", "--restore-deleted", "--verbose"]).await;
    let counts = ["would insert", "could not be stored", "could not be restored"].map(|what| dry_run.number(what));
    assert_eq!((dry_run.code, counts), (Some(1), [3, 1, 1]), "{dry_run:?}");
    for id in [&deleted, &refused] {
        let line = dry_run.out.lines().find(|line| line.contains(id)).unwrap();
        assert!(line.contains("SQLSTATE LP001") && !dry_run.out.contains("hunter2"), "{dry_run:?}");
    }
}

#[tokio::test]
async fn a_dry_run_of_a_role_without_temporary_tables_ends_at_once() {
    let name = format!("limited_{}", uuid::Uuid::new_v4().simple());
    let url = world::postgres().await.create_database(&name).await.unwrap();
    worker::store::Store::new(&url.parse().unwrap(), 1).migrate().await.unwrap();
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let grants = format!(
        "CREATE ROLE {name} LOGIN; GRANT SELECT, INSERT ON issues, signals TO {name};
         GRANT USAGE ON SCHEMA ingest TO {name}; GRANT SELECT, INSERT, UPDATE ON ingest.deliveries TO {name};
         GRANT SELECT, INSERT, DELETE ON ingest.dead_letters TO {name};
         GRANT USAGE ON SEQUENCE issues_number_seq TO {name}; REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC"
    );
    client.batch_execute(&grants).await.unwrap();
    let limited = url.replace("loop@", &format!("{name}@"));
    let world = setup().workers(0).worker("DATABASE_URL", &limited).start().await;
    post(&world, 2).await;
    world.on_stream(2).await;
    let dry_run = world.worker(&["replay", "--dry-run"]).await;
    assert_eq!(dry_run.code, Some(2), "{dry_run:?}");
    let grant = format!("GRANT TEMPORARY ON DATABASE {name} TO {name}");
    assert!(dry_run.err.contains(&grant) && !dry_run.err.contains("will try again"), "{dry_run:?}");
}
