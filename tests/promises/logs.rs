//! Logs: a line for what fails, none for what works, nothing of what people send, and no flood of lines for a flood of
//! failures.

use std::time::Instant;

use serde_json::Value;
use world::{Connection, Post, Program, SECRET, Setup, World, eventually, sign};

use crate::contract::{head, raw};
use crate::{fixture, setup};

/// What must never be found in anything that a program writes: in bodies, in headers, in targets, in a password.
const IN_BODIES: &str = "zqbody";
const IN_HEADERS: &str = "zqhead";
const IN_TARGETS: &str = "zqpath";
const PASSWORD: &str = "zqpassword";

/// What refuses some of the bodies below, quoting them.
const OBSTACLES: &str = "
    ALTER TABLE issues ADD CONSTRAINT no_poison CHECK (title NOT LIKE '%poison%');
    ALTER TABLE signals ADD CONSTRAINT weight CHECK ((payload ->> 'weight')::integer < 100);
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'no %', NEW.payload; END $$;
    CREATE TRIGGER refuses BEFORE INSERT ON signals FOR EACH ROW WHEN (NEW.source_id = 'refused')
        EXECUTE FUNCTION refuse()";

/// A body that says it in every place that is read, and in some that are not.
fn body(title: &str, source: &str, weight: &str) -> String {
    let issue =
        format!(r#"{{"id":"{source}","title":"{IN_BODIES} {title}","level":"{IN_BODIES}","culprit":"{IN_BODIES}"}}"#);
    format!(r#"{{"action":"{IN_BODIES}","weight":{weight},"{IN_BODIES}":1.0,"data":{{"issue":{issue}}}}}"#)
}

/// With headers that say it, too.
fn marked(post: Post) -> Post {
    let names = ["Sentry-Hook-Timestamp", "User-Agent", "Authorization", "Cookie", "traceparent", "X-Forwarded-For"];
    let post = names.iter().fold(post, |post, name| post.header(name, &format!("{IN_HEADERS} {name}")));
    post.header("Sentry-Hook-Resource", &format!("{IN_HEADERS}.*"))
        .header("Request-ID", &format!("{IN_HEADERS}-{}", fastrand::u64(..)))
}

fn signed(body: &str) -> Post {
    marked(Post::signed(body.to_owned()))
}

#[tokio::test]
async fn nothing_of_what_people_send_is_in_anything_that_is_written() {
    let everything = "trace,tokio_postgres=trace,tokio_postgres::query=trace"; // everybody's, not only ours
    let world = setup()
        .gateway("RUST_LOG", everything)
        .gateway("GATEWAY_JOURNAL_RETAIN", "1h")
        .gateway("GATEWAY_MAX_BODY_BYTES", "400000")
        .gateway("GATEWAY_MAX_BYTES_IN_FLIGHT", "400000")
        .worker("RUST_LOG", everything)
        .nats(|nats| nats.max_payload = Some("200KB".to_owned()))
        .start()
        .await;
    world.execute(OBSTACLES).await;
    let canonical = sign(SECRET, body("canonical", "1", "1").replace("1.0", "1").as_bytes());
    let nul = body("nul", "2", "1").replace("culprit\":\"", "culprit\":\"\\u0000\\ud800");
    let good = [body("good", "3", "1"), nul, format!("[\"{IN_BODIES}\"]"), format!("\"{IN_BODIES}\"")];
    let poison = [
        format!("{{\"{IN_BODIES}\": {IN_BODIES}"),
        format!("{IN_BODIES} is no JSON"),
        body("poison", "4", "1"),
        body("a trigger's", "refused", "1"),
        body("heavy", "5", &format!("\"{IN_BODIES}\"")),
    ];
    let deep = format!("{}\"{IN_BODIES}\"{}", "[".repeat(40_000), "]".repeat(40_000));
    let mut ids = Vec::new();
    for body in good.iter().chain([&deep]).chain(&poison) {
        ids.push(signed(body).send(world.port()).await.accepted());
    }
    let by_canonical = Post::unsigned(body("canonical", "1", "1")).header("Sentry-Hook-Signature", &canonical);
    ids.push(marked(by_canonical).send(world.port()).await.accepted());
    // NATS does not take it, the gateway does.
    let large = body(&"x".repeat(300_000), "6", "1");
    let set_aside = signed(&large).send(world.port()).await.accepted();

    let wrong = sign("another secret", good[0].as_bytes());
    let refused = [
        (signed(&good[0]).header("Sentry-Hook-Signature", &wrong), 401),
        (signed(&good[0]).header("Sentry-Hook-Signature", IN_HEADERS), 401),
        (signed(&good[0]).without("Sentry-Hook-Signature"), 401),
        (signed(&good[0]).to(&format!("/{IN_TARGETS}?{IN_TARGETS}=1")), 404),
        (signed(&good[0]).to(&format!("/api/signals/sentry?{IN_TARGETS}")).method(hyper::Method::PUT), 405),
        (signed(&body(&"x".repeat(500_000), "7", "1")), 413),
        (signed(&good[0]).header("X-Large", &IN_HEADERS.repeat(4000)), 431),
    ];
    for (post, status) in &refused {
        assert_eq!(post.send(world.port()).await.status, *status);
    }
    let broken = format!("{IN_HEADERS} {IN_HEADERS}: \u{7}\r\nContent-Length: 2\r\n");
    let (_socket, answer) = raw(world.port(), &head(&canonical, &broken)).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");

    world.until("SELECT count(*) FROM ingest.dead_letters", 5_i64).await;
    world.until("SELECT count(*) FROM ingest.deliveries WHERE state = 'stored'", 6_i64).await;
    world.gateway.until_metric("gateway_journal_entries{state=\"set_aside\"}", 1.0).await;

    let dead = ids[5].as_str();
    let mut written = Vec::new();
    let commands: [(&[&str], bool); 9] = [
        (&["status"], true),
        (&["audit", "--verbose"], true),
        (&["replay", "--dry-run", "--verbose"], true),
        (&["dead-letters", "list"], true),
        (&["dead-letters", "show", dead], false), // shows the headers that it came with
        (&["dead-letters", "retry", "--all"], true),
        (&["replay", "--verbose"], true),
        (&["dead-letters", "discard", dead], true),
        (&["migrate"], true),
    ];
    for (arguments, no_headers) in commands {
        let ran = world.worker(arguments).await;
        assert!(matches!(ran.code, Some(0 | 1)), "{arguments:?}: {ran:?}");
        written.push((format!("{arguments:?}"), ran.out + &ran.err, no_headers));
    }
    // The one that prints a body, because it was asked to.
    let shown = world.worker(&["dead-letters", "show", "--body", &ids[7]]).await;
    assert_eq!(shown.out, poison[2]);
    written.push(("show --body".to_owned(), shown.err, true));
    for url in [with_password(&world.database_url), format!("postgres://loop:{PASSWORD}@127.0.0.1:1/loop")] {
        let mut command = world.worker_command(&["status"]);
        let ran = world::Ran::of(command.env("DATABASE_URL", url).output().await.unwrap());
        written.push(("status with a password".to_owned(), ran.out + &ran.err, true));
    }
    for arguments in [&["journal", "status"][..], &["journal", "redrive", "--since", "1h"]] {
        let (_, out, err) = world.gateway_command_async(arguments).await;
        written.push((format!("{arguments:?}"), out + &err, true));
    }
    let metrics = world.gateway.ops("/metrics").await.body;
    written.push(("metrics".to_owned(), String::from_utf8(metrics.to_vec()).unwrap(), true));
    written.push(("readyz".to_owned(), format!("{:?}", world.gateway.ops("/readyz").await), true));
    world.gateway.stop().await;
    world.workers[0].stop().await;
    written.push(("the gateway".to_owned(), world.gateway.log(), true));
    written.push(("the worker".to_owned(), world.workers[0].log(), true));

    for (who, text, no_headers) in &written {
        let mut secrets = vec![IN_BODIES, IN_TARGETS, PASSWORD, SECRET, &canonical, &wrong, "another secret"];
        if *no_headers {
            secrets.push(IN_HEADERS);
        }
        for secret in secrets {
            let line = text.lines().find(|line| line.contains(secret));
            assert!(line.is_none(), "{who} wrote {secret}: {line:?}");
        }
    }
    // What should have been told was: this looked at logs that have something in them.
    let (gateway, worker) = (world.gateway.log(), world.workers[0].log());
    for reason in ["signature_wrong", "signature_malformed", "signature_missing", "not_found", "body_too_large"] {
        assert!(gateway.lines().any(|line| line.contains("refused a request") && line.contains(reason)), "{reason}");
    }
    assert!(gateway.lines().any(|line| line.contains("NATS refuses a delivery") && line.contains(&set_aside)));
    for id in &ids[5..10] {
        let told = |line: &str| line.contains("became a dead letter") && line.contains(id.as_str());
        assert_eq!(worker.lines().filter(|line| told(line)).count(), 1, "one line for {id}");
    }
}

fn with_password(url: &str) -> String {
    let (user, host) = url
        .strip_prefix("postgresql://")
        .or_else(|| url.strip_prefix("postgres://"))
        .and_then(|rest| rest.split_once('@'))
        .unwrap();
    format!("postgres://{}:{PASSWORD}@{host}", user.split(':').next().unwrap())
}

/// The lines of a log in JSON: each must be one object with what every line has.
fn lines(program: &Program) -> Vec<Value> {
    let line = |line: &str| {
        let json: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for field in ["timestamp", "level", "message", "target"] {
            assert!(json[field].is_string(), "no {field} in {line}");
        }
        json
    };
    program.log().lines().map(line).collect()
}

fn with_message<'a>(lines: &'a [Value], words: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["message"].as_str().unwrap().contains(words)).collect()
}

/// The lines of one kind, and those that say how many more of it there were.
fn of_kind<'a>(lines: &'a [Value], words: &str) -> (Vec<&'a Value>, Vec<&'a Value>) {
    with_message(lines, words).into_iter().partition(|line| line["suppressed"].is_null())
}

/// The sum of a field that counts.
fn sum<'a>(lines: impl IntoIterator<Item = &'a Value>, field: &str) -> u64 {
    lines.into_iter().map(|line| line[field].as_u64().unwrap_or_else(|| panic!("no {field} in {line}"))).sum()
}

#[tokio::test]
async fn for_machines_each_line_is_one_object() {
    let json = [("LOG_FORMAT", "json"), ("RUST_LOG", "debug")];
    let world = json.iter().fold(setup(), |setup, (name, value)| setup.gateway(name, value).worker(name, value));
    let mut world = world.start().await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let traced =
        |body: &str| Post::signed(body.to_owned()).header("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"));
    let id = traced("no JSON\n\u{1b}[31m\"").send(world.port()).await.accepted();
    world.until("SELECT count(*) FROM ingest.dead_letters", 1_i64).await;
    assert_eq!(Post::unsigned("{}").send(world.port()).await.status, 401);
    world.nats.kill().await;
    let noticed = |program: &Program| program.log().contains("lost the connection");
    eventually("both to notice", async || (noticed(&world.gateway) && noticed(&world.workers[0])).then_some(())).await;
    world.nats.start_again().await.unwrap();
    let stored = world.post(fixture!("issue_created")).await.accepted();
    world.stored(&stored).await;
    world.gateway.stop().await;
    world.workers[0].stop().await;

    let (gateway, worker) = (lines(&world.gateway), lines(&world.workers[0]));
    for (lines, words) in [(&gateway, "accepted a delivery"), (&worker, "became a dead letter")] {
        let told = with_message(lines, words);
        assert_eq!((&told[0]["delivery.id"], &told[0]["trace.id"]), (&id.as_str().into(), &trace.into()));
    }
    let summaries = with_message(&gateway, "summary");
    assert_eq!((sum(summaries.clone(), "accepted"), sum(summaries.clone(), "refused")), (2, 1), "{summaries:?}");
    let summaries = with_message(&worker, "summary");
    assert_eq!((sum(summaries.clone(), "stored"), sum(summaries.clone(), "dead")), (1, 1), "{summaries:?}");
}

/// A world as it is by default, but for the form of its logs.
async fn ordinary(change: impl FnOnce(world::Setup) -> world::Setup) -> World {
    let both = [("LOG_FORMAT", "json"), ("RUST_LOG", "info")];
    let setup = both.iter().fold(setup(), |setup, (name, value)| setup.gateway(name, value).worker(name, value));
    change(setup).start().await
}

/// At most that many lines of one kind may have been written since then: ten a minute, and what was held back.
fn lines_since(begin: Instant) -> usize {
    11 * (2 + usize::try_from(begin.elapsed().as_secs() / 60).unwrap())
}

#[tokio::test]
async fn what_works_has_no_line() {
    let world = ordinary(|setup| setup).await;
    let before = lines(&world.gateway).len() + lines(&world.workers[0]).len();
    let mut connection = Connection::open(world.port()).await.unwrap();
    for number in 0..100 {
        let body = format!(r#"{{"data":{{"issue":{{"id":"{number}"}}}}}}"#); // the same again would be a warning
        connection.send(&Post::signed(body)).await.unwrap().accepted();
        assert_eq!(connection.send(&Post::unsigned("{}")).await.unwrap().status, 401);
    }
    world.until_confirmed().await;
    world.gateway.stop().await;
    world.workers[0].stop().await;
    let (gateway, worker) = (lines(&world.gateway), lines(&world.workers[0]));
    let ends =
        ["summary", "stopping", "stopped"].map(|words| [&gateway, &worker].map(|log| with_message(log, words).len()));
    let others = gateway.len() + worker.len() - before - ends.iter().flatten().sum::<usize>();
    assert_eq!(others, 0, "{gateway:?} {worker:?}");
    let summaries = with_message(&gateway, "summary");
    for (field, expected) in [("accepted", 100), ("refused", 100), ("published", 100), ("confirmed", 100)] {
        assert_eq!(sum(summaries.clone(), field), expected, "{field} in {summaries:?}");
    }
    assert_eq!(summaries.last().unwrap()["unconfirmed"], 0);
    assert_eq!(summaries.last().unwrap()["reasons"], "signature_missing 100");
    let summaries = with_message(&worker, "summary");
    assert_eq!((sum(summaries.clone(), "stored"), sum(summaries, "dead")), (100, 0));
}

#[tokio::test]
async fn who_finds_the_door_full_is_told_in_the_log() {
    let begin = Instant::now();
    let world = ordinary(|setup| setup.workers(0).gateway("GATEWAY_MAX_CONNECTIONS", "1")).await;
    let mut kept = Connection::open(world.port()).await.unwrap();
    kept.send(&Post::signed(fixture!("issue_created"))).await.unwrap().accepted();
    for _ in 0..40 {
        // Each is answered; the answer may be there before the request is sent, and the connection be gone with it.
        let _ = Post::signed("{}").try_send(world.port()).await;
    }
    let counted = "gateway_answers_total{status=\"503\",reason=\"too_many_connections\"}";
    world.gateway.until_metric(counted, 40.0).await;
    drop(kept);
    world.gateway.stop().await;
    let log = lines(&world.gateway);
    let (written, more) = of_kind(&log, "a request was answered 503: too many connections");
    assert!(written.len() + more.len() <= lines_since(begin), "{written:?}");
    assert_eq!(written.len() as u64 + sum(more.clone(), "suppressed"), 40, "{more:?}");
}

#[tokio::test]
async fn a_full_journal_under_thousands_of_deliveries_is_a_few_lines_and_their_number() {
    let begin = Instant::now();
    let small =
        |setup: Setup| setup.gateway("GATEWAY_JOURNAL_MAX_BYTES", "1MiB").gateway("GATEWAY_MAX_BODY_BYTES", "100KiB");
    let world = ordinary(|setup| small(setup.workers(0))).await;
    world.nats.kill().await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    let filler = format!("\"{}\"", "x".repeat(40_000));
    let (mut accepted, mut refused) = (0, 0);
    while refused < 2000 {
        match connection.send(&Post::signed(filler.clone())).await.unwrap().status {
            202 => accepted += 1,
            503 => refused += 1,
            status => panic!("{status}"),
        }
        assert!(accepted < 100, "the journal holds 1 MiB");
    }
    let held_back = world.gateway.metric("log_lines_suppressed_total").await;
    world.gateway.stop().await;
    let log = lines(&world.gateway);
    let (written, more) = of_kind(&log, "a delivery could not be journalled");
    assert!(written.len() + more.len() <= lines_since(begin), "{written:?} {more:?}");
    let suppressed = sum(more.clone(), "suppressed");
    assert_eq!(written.len() as u64 + suppressed, refused, "each is written or counted: {more:?}");
    assert_eq!(held_back, suppressed as f64);
    assert!(written.iter().all(|line| line["delivery.id"].is_string() && line["trace.id"].is_string()), "{written:?}");
    let summaries = with_message(&log, "summary");
    assert_eq!((sum(summaries.clone(), "accepted"), sum(summaries.clone(), "refused")), (accepted, refused));
    assert!(
        summaries.iter().any(|line| line["reasons"].as_str().unwrap().contains("not_journalled ")),
        "{summaries:?}"
    );
}

#[tokio::test]
async fn a_thousand_dead_letters_are_a_few_lines_and_the_first_of_another_kind_is_told() {
    let begin = Instant::now();
    let world = ordinary(|setup| setup).await;
    world.execute("ALTER TABLE issues ADD CONSTRAINT no_poison CHECK (title NOT LIKE '%poison%')").await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    for number in 0..1000 {
        connection.send(&Post::signed(format!("no JSON {number}"))).await.unwrap().accepted();
    }
    world.until("SELECT count(*) FROM ingest.dead_letters", 1000_i64).await;
    let another = world.post(r#"{"data":{"issue":{"title":"poison"}}}"#).await.accepted();
    world.until("SELECT count(*) FROM ingest.dead_letters", 1001_i64).await;
    world.until_confirmed().await;
    world.workers[0].stop().await;
    let log = lines(&world.workers[0]);
    let (written, more) = of_kind(&log, "a delivery became a dead letter");
    assert!(written.len() + more.len() <= lines_since(begin) + 1, "{written:?} {more:?}");
    assert_eq!(written.len() as u64 + sum(more.clone(), "suppressed"), 1001, "{more:?}");
    let told = written.iter().find(|line| line["delivery.id"] == another.as_str());
    assert!(told.expect("the first of its kind")["reason"].as_str().unwrap().contains("23514"), "{told:?}");
    let summaries = with_message(&log, "summary");
    assert_eq!((sum(summaries.clone(), "dead"), sum(summaries, "stored")), (1001, 0));
}
