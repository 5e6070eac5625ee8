//! A row that PostgreSQL refuses for a reason that the worker does not know waits alone. Its batch is stored, and it is
//! stored once the cause is gone. It never becomes a dead letter.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::pull;
use futures_util::{FutureExt as _, StreamExt as _};
use world::{Connection, Post, RawClient, World, eventually};

use crate::setup;

/// A trigger that fails in ways that are no verdict on the data.
const TRIGGER: &str = "
    CREATE FUNCTION unclear() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        CASE NEW.signal_payload ->> 'fails'
            WHEN 'LP001' THEN RAISE EXCEPTION 'hunter2' USING ERRCODE = 'LP001';
            WHEN 'P0002' THEN RAISE EXCEPTION 'hunter2' USING ERRCODE = 'P0002';
            WHEN 'XX000' THEN RAISE EXCEPTION 'hunter2' USING ERRCODE = 'XX000';
            WHEN '42883' THEN PERFORM public.no_such_function();
            WHEN 'none' THEN RETURN NULL;
            ELSE
        END CASE;
        RETURN NEW;
    END $$;
    CREATE TRIGGER unclear BEFORE INSERT ON issues FOR EACH ROW EXECUTE FUNCTION unclear()";

fn body(fails: &str) -> String {
    format!(r#"{{"fails":"{fails}"}}"#)
}

/// The check `rows` of the first worker's `/readyz`; none while there is no such check.
async fn rows(world: &World) -> Option<(bool, String)> {
    let list = world.workers[0].ops("/readyz").await.json();
    let check = list.as_array().unwrap().iter().find(|entry| entry["name"] == "rows")?.clone();
    assert_eq!(check["degraded"].as_bool().unwrap_or(false), !check["ok"].as_bool().unwrap(), "{check}");
    Some((check["ok"].as_bool().unwrap(), check["detail"].as_str().unwrap().to_owned()))
}

async fn signals(world: &World) -> i64 {
    world.value("SELECT count(*) FROM signals").await
}

/// Five bad ones among twenty.
async fn twenty(concurrency: &str) {
    const CODES: [&str; 5] = ["LP001", "P0002", "XX000", "42883", "none"];
    let world = setup().worker("WORKER_CONCURRENCY", concurrency).start().await;
    world.execute(TRIGGER).await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    let mut bad = Vec::new();
    for number in 0..20 {
        let fails = CODES.get(number / 4).filter(|_| number % 4 == 1);
        let id = connection.send(&Post::signed(body(fails.unwrap_or(&"")))).await.unwrap().accepted();
        bad.extend(fails.map(|_| id));
    }
    world.until("SELECT count(*) FROM signals", 15_i64).await;
    let told = eventually("all five to be told", async || {
        let (ok, detail) = rows(&world).await?;
        (!ok && detail.starts_with("5 deliveries")).then_some(detail)
    })
    .await;
    for code in &CODES[..4] {
        assert!(told.contains(&format!("SQLSTATE {code}")), "{told}");
        let metric = format!("worker_deliveries_set_back{{sqlstate=\"{code}\"}}");
        assert_eq!(world.workers[0].metric(&metric).await, 1.0);
    }
    assert!(told.contains("public.issues"), "the row that a trigger drops has no SQLSTATE: {told}");
    assert_eq!(world.workers[0].metric("worker_deliveries_set_back{sqlstate=\"none\"}").await, 1.0);
    let log = world.workers[0].log();
    for id in &bad {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(id.as_str()) && line.contains("WARN")).collect();
        assert!(lines.iter().any(|line| line.contains("set back") && line.contains("trigger")), "{id}: {lines:?}");
    }
    assert!(!log.contains("hunter2") && !told.contains("hunter2"), "a trigger's words may be the payload's");
    // Others go on meanwhile.
    let later = world.post(body("")).await.accepted();
    world.stored(&later).await;
    assert_eq!(world.workers[0].ops("/readyz").await.status, 200, "degraded");

    world.execute("DROP TRIGGER unclear ON issues").await;
    world.until("SELECT count(*) FROM signals", 21_i64).await;
    world.all_acknowledged().await;
    world.until_confirmed().await;
    eventually("the check to be well again", async || rows(&world).await?.0.then_some(())).await;
    assert_eq!(world.workers[0].metric("worker_deliveries_set_back{sqlstate=\"none\"}").await, 0.0);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM issues").await, 21);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
}

#[tokio::test]
async fn a_row_that_is_refused_for_an_unknown_reason_waits_alone() {
    tokio::join!(twenty("1"), twenty("2"), twenty("8"));
}

#[tokio::test]
async fn a_thousand_such_rows_do_not_keep_the_others_out() {
    let world = setup().start().await;
    world.execute(TRIGGER).await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    for number in 0..1_200 {
        let fails = if number % 6 == 5 { "" } else { "LP001" };
        connection.send(&Post::signed(body(fails))).await.unwrap().accepted();
    }
    world.until("SELECT count(*) FROM signals", 200_i64).await;
    let later = world.post(body("")).await.accepted();
    world.stored(&later).await;
    world.execute("DROP TRIGGER unclear ON issues").await;
    world.until("SELECT count(*) FROM signals", 1_201_i64).await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
    world.all_acknowledged().await;
}

#[tokio::test]
async fn more_such_rows_than_half_of_what_may_be_unacknowledged_are_an_outage() {
    let mut world = setup().workers(0).worker("WORKER_BATCH_MAX", "5").start().await;
    let stream = eventually("the stream", || async { world.jetstream().await.get_stream("SIGNALS").await.ok() }).await;
    let config = pull::Config { durable_name: Some("worker".into()), max_ack_pending: 40, ..Default::default() };
    stream.create_consumer(config).await.unwrap();
    world.start_worker().await;
    world.execute(TRIGGER).await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    for number in 0..60 {
        let fails = if number % 6 == 5 { "" } else { "LP001" };
        connection.send(&Post::signed(body(fails))).await.unwrap().accepted();
    }
    eventually("an outage that names the cause", async || {
        let list = world.workers[0].ops("/readyz").await.json();
        let check = list.as_array().unwrap().iter().find(|entry| entry["name"] == "database").unwrap().clone();
        let detail = check["detail"].as_str().unwrap();
        (check["ok"] == false && detail.contains("LP001") && detail.contains("max_ack_pending")).then_some(())
    })
    .await;
    let held = stream.consumer_info("worker").await.unwrap().num_ack_pending;
    assert!(held <= 20 + 3 * 5, "half of 40, the batch that passed it, and a batch for each puller: {held}");
    let stored = signals(&world).await;
    assert!(stored < 10, "{stored}");
    world.execute("DROP TRIGGER unclear ON issues").await;
    world.until("SELECT count(*) FROM signals", 60_i64).await;
    world.all_acknowledged().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
}

#[tokio::test]
async fn a_table_that_takes_no_row_any_more_is_told_also_while_an_older_row_waits() {
    let world = setup().start().await;
    world.execute(TRIGGER).await;
    world.post(body("LP001")).await.accepted();
    eventually("the first to wait", async || (!rows(&world).await?.0).then_some(())).await;
    world.stored(&world.post(body("")).await.accepted()).await;
    let database = async || {
        let list = world.workers[0].ops("/readyz").await.json();
        let check = list.as_array().unwrap().iter().find(|entry| entry["name"] == "database").unwrap().clone();
        (check["ok"].as_bool().unwrap(), check["detail"].as_str().unwrap().to_owned())
    };
    eventually("one row to be taken", async || database().await.0.then_some(())).await;
    world.execute("CREATE FUNCTION drops() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$").await;
    world.execute("CREATE TRIGGER drops BEFORE INSERT ON signals FOR EACH ROW EXECUTE FUNCTION drops()").await;
    world.post(body("")).await.accepted();
    eventually("the worker to say so", async || {
        let (ok, detail) = database().await;
        (!ok && detail.contains("taken no row") && detail.starts_with("PostgreSQL")).then_some(())
    })
    .await;
    world.execute("DROP TRIGGER drops ON signals").await;
    world.until("SELECT count(*) FROM signals", 2_i64).await;
    eventually("a row to be taken again", async || database().await.0.then_some(())).await;
}

#[tokio::test]
async fn a_batch_of_all_that_may_be_unacknowledged_does_not_wait_for_one_such_row() {
    let mut world = setup().workers(0).start().await;
    let stream = eventually("the stream", || async { world.jetstream().await.get_stream("SIGNALS").await.ok() }).await;
    let config = pull::Config { durable_name: Some("worker".into()), max_ack_pending: 20, ..Default::default() };
    stream.create_consumer(config).await.unwrap();
    assert_eq!(world.worker(&["migrate"]).await.code, Some(0));
    world.execute(TRIGGER).await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    for number in 0..20 {
        let fails = if number == 7 { "LP001" } else { "" };
        connection.send(&Post::signed(body(fails))).await.unwrap().accepted();
    }
    world.on_stream(20).await;
    world.start_worker().await;
    world.until("SELECT count(*) FROM signals", 19_i64).await;
    world.execute("DROP TRIGGER unclear ON issues").await;
    world.until("SELECT count(*) FROM signals", 20_i64).await;
    world.all_acknowledged().await;
}

#[tokio::test]
async fn a_row_that_waits_does_not_make_each_lost_connection_read_the_stream_again() {
    const UNREADABLE: &[u8] = b"NATS/1.0\r\nX: a\rb\r\n\r\n";
    let world = setup().start().await;
    world.execute(TRIGGER).await;
    let spy = async_nats::connect(world.nats.url()).await.unwrap();
    let mut pulled = spy.subscribe("$JS.API.CONSUMER.MSG.NEXT.>").await.unwrap();
    let mut fetched = spy.subscribe("$JS.API.STREAM.MSG.GET.>").await.unwrap();
    spy.flush().await.unwrap();
    let mut connection = Connection::open(world.port()).await.unwrap();
    for number in 0..400 {
        let fails = if number == 0 { "LP001" } else { "" };
        connection.send(&Post::signed(body(fails))).await.unwrap().accepted();
    }
    world.until("SELECT count(*) FROM signals", 399_i64).await;
    // The worker loses its connection over what another program sends to it. Nothing on the stream is unreadable.
    let inbox = pulled.next().await.unwrap().reply.unwrap();
    let mut hostile = RawClient::connect(world.nats.port()).await;
    hostile.publish(inbox.as_str(), UNREADABLE, b"").await;
    hostile.flush().await;
    for _ in 0..400 {
        tokio::time::timeout(Duration::from_secs(60), fetched.next())
            .await
            .expect("the stream to be looked at")
            .unwrap();
    }
    // From here on it knows all but what comes now.
    hostile.publish("signals.sentry.issue", UNREADABLE, b"").await;
    hostile.flush().await;
    world.until("SELECT count(*) FROM ingest.dead_letters", 1_i64).await;
    let mut more = 0;
    while fetched.next().now_or_never().is_some() {
        more += 1;
    }
    assert!(more < 100, "{more} messages were fetched again");
    let later = world.post(body("")).await.accepted();
    world.stored(&later).await;
}

#[tokio::test]
async fn a_table_that_drops_all_rows_is_told_and_nothing_is_acknowledged() {
    let world = setup().start().await;
    world
        .execute(
            "CREATE FUNCTION drops() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
             CREATE TRIGGER drops BEFORE INSERT ON signals FOR EACH ROW EXECUTE FUNCTION drops()",
        )
        .await;
    for _ in 0..5 {
        world.post(body("")).await.accepted();
    }
    eventually("the worker to say so", async || {
        let answer = world.workers[0].ops("/readyz").await;
        let list = answer.json();
        let check = list.as_array().unwrap().iter().find(|entry| entry["name"] == "database").unwrap().clone();
        let detail = check["detail"].as_str().unwrap();
        (check["ok"] == false && detail.contains("public.signals") && detail.contains("returns NULL")).then_some(())
    })
    .await;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        assert_eq!(world.metric("gateway_deliveries_unconfirmed").await, 5.0, "nothing is receipted");
        assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.deliveries").await, 0);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    world.execute("DROP TRIGGER drops ON signals").await;
    world.until("SELECT count(*) FROM signals", 5_i64).await;
    world.until_confirmed().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM issues").await, 5);
}
