//! One grep for a trace id shows the way of a delivery, from POST to COMMIT, through both processes and whatever happens on
//! the way.

use async_nats::HeaderMap;
use world::{Answer, Post, SECRET, World, eventually, sign};

use crate::contract::{head, raw};
use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

/// The headers of a message of the stream, once it is there.
async fn headers(world: &World, sequence: u64) -> HeaderMap {
    world.on_stream(sequence).await;
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    stream.get_raw_message(sequence).await.unwrap().headers
}

fn value<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).unwrap_or_else(|| panic!("no {name} in {headers:?}")).as_str()
}

/// The trace, the span and the flags of a message; they must be well formed.
fn parts(headers: &HeaderMap) -> (String, String, String) {
    let traceparent = value(headers, "traceparent");
    let fields: Vec<&str> = traceparent.split('-').collect();
    let [version, trace, span, flags] = fields[..] else { panic!("{traceparent}") };
    let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    assert!(fields.iter().all(|field| is_hex(field)), "{traceparent}");
    assert_eq!((version, trace.len(), span.len(), flags.len()), ("00", 32, 16, 2), "{traceparent}");
    assert!(trace.bytes().any(|byte| byte != b'0') && span.bytes().any(|byte| byte != b'0'), "{traceparent}");
    (trace.into(), span.into(), flags.into())
}

/// The lines of a log that have this in them.
fn grep(log: &str, what: &str) -> Vec<String> {
    log.lines().filter(|line| line.contains(what)).map(str::to_owned).collect()
}

/// Waits until a line of the log has all of these in it.
async fn logged(program: &world::Program, words: &[&str]) {
    let found = async || program.log().lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(());
    eventually(&format!("a line with {words:?}"), found).await;
}

#[tokio::test]
async fn one_grep_shows_the_way_from_post_to_commit() {
    let world = setup().start().await;
    let parent = format!("00-{TRACE}-{SPAN}-01");
    let traced = Post::signed(BODY).header("traceparent", &parent).header("tracestate", "vendor=1,other=2");
    let id = traced.send(world.port()).await.accepted();
    let other = world.post(BODY).await.accepted();
    for id in [&id, &other] {
        world.stored(id).await;
        for words in ["accepted a delivery", "published a delivery"] {
            logged(&world.gateway, &[id, words]).await;
        }
        logged(&world.workers[0], &[id, "stored a delivery"]).await;
    }

    let of_trace = [grep(&world.gateway.log(), TRACE), grep(&world.workers[0].log(), TRACE)];
    let of_delivery = [grep(&world.gateway.log(), &id), grep(&world.workers[0].log(), &id)];
    assert_eq!(of_trace, of_delivery, "every line about the delivery names both, and no other does");
    assert!(of_trace[0].len() >= 2 && !of_trace[1].is_empty(), "{of_trace:?}");

    let sent = headers(&world, 1).await;
    let (trace, span, flags) = parts(&sent);
    assert_eq!((trace.as_str(), flags.as_str(), value(&sent, "tracestate")), (TRACE, "01", "vendor=1,other=2"));
    assert_ne!(span, SPAN, "what follows, follows from the gateway's own operation");
    // Who sends no trace gets one, and finds it in both logs.
    let (begun, ..) = parts(&headers(&world, 2).await);
    assert_ne!(begun, TRACE);
    assert_eq!(grep(&world.gateway.log(), &begun), grep(&world.gateway.log(), &other));
    assert_eq!(grep(&world.workers[0].log(), &begun), grep(&world.workers[0].log(), &other));
}

#[tokio::test]
async fn a_traceparent_that_does_not_hold_begins_a_trace() {
    let world = setup().workers(0).start().await;
    let bad = [
        format!("traceparent: 00-{}-{SPAN}-01\r\n", "0".repeat(32)),
        format!("traceparent: 00-{TRACE}-{}-01\r\n", "0".repeat(16)),
        format!("traceparent: 00-{}-{SPAN}-01\r\n", TRACE.to_uppercase()),
        format!("traceparent: 00-{TRACE}-{SPAN}-01-more\r\n"),
        format!("traceparent: ff-{TRACE}-{SPAN}-01\r\n"),
        format!("traceparent: {TRACE}\r\n"),
        "traceparent: \u{e9}\r\n".to_owned(),
        format!("traceparent: 00-{TRACE}-{SPAN}-01\r\ntraceparent: 00-{TRACE}-{SPAN}-01\r\n"),
    ];
    let later = format!("traceparent: cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like\r\n");
    let mut traces = std::collections::HashSet::new();
    for (sequence, lines) in (1..).zip(bad.iter().chain([&later])) {
        let signature = sign(SECRET, BODY.as_bytes());
        let lines = format!("{lines}tracestate: vendor=1\r\nContent-Length: {}\r\n", BODY.len());
        let (_socket, answer) = raw(world.port(), &[&head(&signature, &lines)[..], BODY.as_bytes()].concat()).await;
        assert!(answer.starts_with("HTTP/1.1 202 "), "{lines}: {answer}");
        let sent = headers(&world, sequence).await;
        let (trace, ..) = parts(&sent);
        let is_later = lines.starts_with(later.as_str());
        assert_eq!((trace == TRACE, sent.get("tracestate").is_some()), (is_later, is_later), "{lines}");
        assert!(traces.insert(trace), "each begins one of its own");
    }
}

#[tokio::test]
async fn replay_dead_letters_and_redrive_keep_the_trace() {
    let retain = setup().gateway("GATEWAY_JOURNAL_RETAIN", "1h").worker("RUST_LOG", "info,worker=debug");
    let world = retain.start().await;
    world.execute("ALTER TABLE issues ADD CONSTRAINT no_poison CHECK (title NOT LIKE '%poison%')").await;
    let post = |title: &str| {
        let body = format!(r#"{{"data":{{"issue":{{"id":"1","title":"{title}"}}}}}}"#);
        Post::signed(body).header("traceparent", &format!("00-{TRACE}-{SPAN}-00"))
    };
    let id = |answer: Answer| answer.accepted();
    let (good, dead) = (id(post("good").send(world.port()).await), id(post("poison").send(world.port()).await));
    world.stored(&good).await;
    world.until("SELECT count(*) FROM ingest.dead_letters", 1_i64).await;
    logged(&world.workers[0], &[&dead, TRACE, "WARN"]).await;
    let sent = [headers(&world, 1).await, headers(&world, 2).await];
    let sent =
        sent.map(|headers| (value(&headers, "Delivery-Id").to_owned(), value(&headers, "traceparent").to_owned()));
    let letter = world.worker(&["dead-letters", "show", "--json", &dead]).await.json();
    let traceparent = &sent.iter().find(|(id, _)| *id == dead).unwrap().1;
    assert_eq!(letter["headers"]["traceparent"][0], traceparent.as_str());

    for still in [true, false] {
        let retried = world.worker(&["dead-letters", "retry", &dead]).await;
        assert_eq!(retried.code, Some(i32::from(still)), "{retried:?}");
        assert!(grep(&retried.err, TRACE).iter().any(|line| line.contains(&dead)), "{retried:?}");
        world.execute("ALTER TABLE issues DROP CONSTRAINT IF EXISTS no_poison").await;
    }

    world.until_confirmed().await;
    let (code, _, stderr) = world.gateway_command_async(&["journal", "redrive", "--since", "1h"]).await;
    assert_eq!(code, Some(0), "{stderr}");
    for sequence in [3, 4] {
        let again = headers(&world, sequence).await;
        let again = (value(&again, "Delivery-Id").to_owned(), value(&again, "traceparent").to_owned());
        assert!(sent.contains(&again), "{again:?} is none of {sent:?}");
    }

    world.all_acknowledged().await;
    world.execute("TRUNCATE ingest.deliveries; DELETE FROM signals; DELETE FROM issues").await;
    let replayed = world.worker(&["replay"]).await;
    assert_eq!(replayed.code, Some(0), "{replayed:?}");
    for id in [&good, &dead] {
        assert!(grep(&replayed.err, TRACE).iter().any(|line| line.contains(id.as_str())), "{replayed:?}");
    }
}
