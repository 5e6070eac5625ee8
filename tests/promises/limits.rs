//! What the public listener puts up with. (Sizes of bodies, and too many at once, are in `contract`.)

use std::time::{Duration, Instant};

use hyper::header::HeaderValue;
use tokio::io::AsyncReadExt as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use world::{Answer, Connection, Post, SECRET, eventually, sign};

use crate::attacks::{GATEWAY_ITSELF, MIB, peak_memory};
use crate::contract::{closes, head, raw};
use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");

#[tokio::test]
async fn headers_that_are_too_large_or_too_many_are_431() {
    let limits = setup().workers(0).gateway("GATEWAY_MAX_HEADER_BYTES", "4KiB").gateway("GATEWAY_MAX_HEADERS", "20");
    let world = limits.start().await;
    let sized = |size: usize| Post::signed(BODY).header("X-Filler", &"x".repeat(size));
    let many = |count: usize| (0..count).fold(Post::signed(BODY), |post, i| post.header(&format!("X-{i}"), "x"));
    for (post, status) in [(sized(3_000), 202), (sized(4_096), 431), (many(10), 202), (many(20), 431)] {
        assert_eq!(post.send(world.port()).await.status, status, "{post:?}");
    }
    // Counted when the connection has ended, after the answer was read.
    world.gateway.until_metric("gateway_answers_total{status=\"431\",reason=\"headers_too_large\"}", 2.0).await;
}

#[tokio::test]
async fn idling_has_a_time_out_of_its_own() {
    let slow = setup().workers(0).gateway("GATEWAY_HEADER_TIMEOUT", "300ms").gateway("GATEWAY_IDLE_TIMEOUT", "3s");
    let world = slow.start().await;
    // Beyond the header time-out, and still good for a delivery.
    let mut kept = Connection::open(world.port()).await.unwrap();
    for _ in 0..2 {
        kept.send(&Post::signed(BODY)).await.unwrap().accepted();
        tokio::time::sleep(Duration::from_millis(900)).await;
    }
    kept.send(&Post::signed(BODY)).await.unwrap().accepted();

    // Once a request has begun, its headers have their own time, idle before or not.
    let whole = [head(&sign(SECRET, b"{}"), "Content-Length: 2\r\n"), b"{}".to_vec()].concat();
    let (mut socket, answer) = raw(world.port(), &whole).await;
    assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
    let begin = Instant::now();
    socket.write_all(b"POST /api").await.unwrap();
    let mut rest = String::new();
    socket.read_to_string(&mut rest).await.unwrap();
    assert!(rest.starts_with("HTTP/1.1 408 "), "{rest}");
    assert!(begin.elapsed() < Duration::from_millis(2_500), "{:?}", begin.elapsed());

    // Who idles is let go without a word; who has never sent anything, soon.
    let (socket, _) = raw(world.port(), &whole).await;
    let begin = Instant::now();
    assert!(closes(socket).await);
    assert!(begin.elapsed() > Duration::from_millis(2_500), "{:?}", begin.elapsed());
    let begin = Instant::now();
    let mut silent = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
    assert!(begin.elapsed() < Duration::from_millis(2_500), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_body_that_nobody_waits_for_any_more_makes_room() {
    let limits = [("GATEWAY_MAX_BODY_BYTES", "100000"), ("GATEWAY_MAX_BYTES_IN_FLIGHT", "100000")];
    let world = limits.iter().fold(setup().workers(0), |setup, (name, value)| setup.gateway(name, value)).start().await;
    let held = vec![b'1'; 90_000];
    let mut request = head(&sign(SECRET, &held), &format!("Content-Length: {}\r\n", held.len()));
    request.extend_from_slice(&held[1..]);
    let mut slow = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
    slow.write_all(&request).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_500)).await; // longer than Sentry waits
    world.post(vec![b'1'; 50_000]).await.accepted();
    let mut answered = [0; 12];
    slow.read_exact(&mut answered).await.unwrap();
    assert_eq!(&answered, b"HTTP/1.1 503");
}

#[tokio::test]
async fn large_bodies_that_come_all_at_once_wait_for_their_turn_in_bounded_memory() {
    const BYTES: usize = 1_000_000;
    let world = setup().workers(0).gateway("RUST_LOG", "error").start().await;
    let post = Post::signed(vec![b'1'; BYTES]);
    // Together less than may be in flight, and far more than may be in memory.
    let all = futures_util::future::join_all((0..180).map(|_| {
        let taken = async || match post.send(world.port()).await.status {
            202 => Some(()),
            503 => None, // its second was over before its turn came, on a machine as slow as that
            other => panic!("answered {other}"),
        };
        async move { eventually("a large body to be taken", taken).await }
    }));
    all.await;
    let (peak, bound) = (peak_memory(&world) / MIB, 48 + 180 / 16 + GATEWAY_ITSELF / MIB);
    assert!(peak < bound, "{peak} of {bound} MiB");
    eventually("all to be given back", async || {
        (world.metric("gateway_bodies_in_flight_bytes").await == 0.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn large_bodies_that_stall_hold_up_no_other() {
    let limits = [("GATEWAY_MAX_BODY_BYTES", "1MiB"), ("GATEWAY_MAX_BYTES_IN_FLIGHT", "16MiB")];
    let world = limits.iter().fold(setup().workers(0), |setup, (name, value)| setup.gateway(name, value));
    let world = world.gateway("GATEWAY_BODY_TIMEOUT", "10min").start().await;
    let body = vec![b'1'; 1_000_000];
    let mut begun = head(&sign(SECRET, &body), &format!("Content-Length: {}\r\n", body.len()));
    begun.extend_from_slice(&body[1..]);
    // Three of them take the window and all turns there are. They would for ten minutes.
    let mut stalled = Vec::new();
    for held in [999_999.0, 1_999_998.0, 2_999_997.0] {
        let mut socket = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
        socket.write_all(&begun).await.unwrap();
        stalled.push(socket);
        let is_held = async || (world.metric("gateway_bodies_in_flight_bytes").await >= held).then_some(());
        eventually("the bytes to be held", is_held).await;
    }
    let taken = async || (world.post(body.clone()).await.status == 202).then_some(());
    eventually("a large body to be taken", taken).await;
    // Who held it up had to go, and is told.
    let mut answered = [0; 12];
    stalled[1].read_exact(&mut answered).await.unwrap();
    assert_eq!(&answered, b"HTTP/1.1 503");
}

#[tokio::test]
async fn a_low_limit_of_open_files_is_raised_to_what_the_connections_need() {
    const LOW: &[&str] = &["/bin/sh", "-c", "ulimit -Sn 100 && exec \"$0\""];
    let world = setup().workers(0).gateway("GATEWAY_MAX_CONNECTIONS", "300").gateway_under(LOW).start().await;
    let mut connections = Vec::new();
    for _ in 0..200 {
        connections.push(Connection::open(world.port()).await.unwrap());
    }
    for connection in &mut connections {
        connection.send(&Post::signed(BODY)).await.unwrap().accepted();
    }
}

#[tokio::test]
async fn connections_without_a_delivery_make_room_at_the_limit() {
    const LIMIT: usize = 24;
    let begin = Instant::now();
    let mut settings = setup().workers(0).gateway("GATEWAY_MAX_CONNECTIONS", &LIMIT.to_string());
    for timeout in ["GATEWAY_HEADER_TIMEOUT", "GATEWAY_BODY_TIMEOUT", "GATEWAY_IDLE_TIMEOUT"] {
        settings = settings.gateway(timeout, "10min"); // time-outs make no room here
    }
    let world = settings.start().await;
    // A proxy's connections: kept, idle, and the oldest of all.
    let mut kept = Vec::new();
    for number in 0..4 {
        let mut connection = Connection::open(world.port()).await.unwrap();
        connection.send(&Post::signed(format!("\"{number}\""))).await.unwrap().accepted();
        kept.push(connection);
    }
    let signed = head(&"0".repeat(64), "Content-Length: 5\r\n");
    let kinds = [
        ("silent", b"".to_vec()),
        ("answered 404", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("answered 401", b"POST /api/signals/sentry HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".to_vec()),
        ("in their headers", signed[..60].to_vec()),
        ("in their bodies", [signed, b"{".to_vec()].concat()),
    ];
    for (kind, begun) in kinds {
        world.gateway.until_metric("gateway_connections_open", kept.len() as f64).await; // without those of before
        let mut held = silent(world.port(), LIMIT).await;
        for socket in &mut held {
            socket.write_all(&begun).await.unwrap();
        }
        if kind.starts_with("answered") {
            let mut answered = 0;
            for socket in &mut held {
                answered += usize::from(socket.read(&mut [0; 12]).await.is_ok_and(|bytes| bytes > 0));
            }
            assert!(answered >= LIMIT - kept.len(), "{answered}; the others may have made room before their request");
        } else {
            world.gateway.until_metric("gateway_connections_open", LIMIT as f64).await;
        }
        let mut answers = Vec::new();
        for _ in 0..20 {
            answers.push(Post::signed(BODY).try_send(world.port()).await.map_or(0, |answer| answer.status));
        }
        assert_eq!(answers, [202; 20], "while {LIMIT} connections are {kind}");
    }
    for connection in &mut kept {
        connection.send(&Post::signed(BODY)).await.unwrap().accepted();
    }
    // It is told: a check that takes no load balancer away, a counter, one line of the log.
    let answer = world.gateway.ops("/readyz").await;
    let check = |answer: &Answer| {
        let checks = answer.json().as_array().unwrap().clone();
        checks.into_iter().find(|check| check["name"] == "connections").expect("there is that check")
    };
    assert_eq!((answer.status, &check(&answer)["degraded"]), (200, &true.into()), "{answer:?}");
    assert!(world.metric("gateway_connections_evicted_total").await >= 3.0);
    let log = world.gateway.log();
    let told = log.lines().filter(|line| line.contains(" WARN ") && line.contains("GATEWAY_MAX_CONNECTIONS"));
    let lines_at_most = 1 + begin.elapsed().as_secs() / 60; // one a minute
    assert!((1..=lines_at_most).contains(&(told.count() as u64)), "{log}");
    let well = async || (check(&world.gateway.ops("/readyz").await)["ok"] == true).then_some(());
    eventually("the check to be well again", well).await;
}

#[tokio::test]
async fn connections_that_are_dropped_at_the_limit_are_counted() {
    const MANY: usize = 700;
    let world = setup().workers(0).gateway("GATEWAY_MAX_CONNECTIONS", "1").start().await;
    let mut kept = Connection::open(world.port()).await.unwrap();
    kept.send(&Post::signed(BODY)).await.unwrap().accepted(); // and so makes room for no other connection
    let more = silent(world.port(), MANY).await;
    let told = "gateway_answers_total{status=\"503\",reason=\"too_many_connections\"}";
    eventually("each to be answered or dropped, and counted", async || {
        let dropped = world.gateway.try_metric("gateway_connections_dropped_total").await.unwrap_or(0.0);
        let answered = world.metric(told).await;
        (dropped > 0.0 && answered + dropped == MANY as f64).then_some(())
    })
    .await;
    drop(more);
    kept.send(&Post::signed(BODY)).await.unwrap().accepted();
}

#[tokio::test]
async fn connections_that_replay_a_body_make_room_at_the_limit() {
    const LIMIT: usize = 24;
    let limit = LIMIT.to_string();
    let world = setup().workers(0).gateway("GATEWAY_MAX_CONNECTIONS", &limit).start().await;
    let genuine = |number: usize| Post::signed(format!("\"genuine {number}\""));
    let mut proxy = Connection::open(world.port()).await.unwrap();
    proxy.send(&genuine(0)).await.unwrap().accepted();
    // One request was captured. A replayer keeps a 202 on each of its connections, half of them under other Request-IDs.
    let captured = Post::signed(BODY).header("Request-ID", &"a".repeat(32));
    captured.send(world.port()).await.accepted();
    let mut replaying = Vec::new();
    for number in 1..LIMIT {
        let mut connection = Connection::open(world.port()).await.unwrap();
        let request_id = if number % 2 == 0 { "a".repeat(32) } else { format!("{number:032x}") };
        connection.send(&captured.clone().header("Request-ID", &request_id)).await.unwrap().accepted();
        replaying.push(connection);
    }
    let mut answers = Vec::new();
    for number in 1..=20 {
        answers.push(genuine(number).try_send(world.port()).await.map_or(0, |answer| answer.status));
    }
    assert_eq!(answers, [202; 20]);
    proxy.send(&genuine(0)).await.unwrap().accepted();
}

/// Opens that many connections to a port, which stay open and silent until they are dropped.
async fn silent(port: u16, count: usize) -> Vec<TcpStream> {
    let mut silent = Vec::new();
    for _ in 0..count {
        silent.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
    }
    silent
}

#[tokio::test]
async fn idle_connections_to_the_ops_listener_hold_up_no_delivery_and_no_operator() {
    const LOW: &[&str] = &["/bin/sh", "-c", "ulimit -n 1300 && exec \"$0\""];
    let world = setup().workers(0).gateway("GATEWAY_MAX_CONNECTIONS", "100").gateway_under(LOW).start().await;
    let idle = silent(world.gateway.ops_port, 2_000).await;
    let delivered = async {
        for _ in 0..20 {
            Post::signed(BODY).send(world.port()).await.accepted();
        }
    };
    tokio::time::timeout(Duration::from_secs(30), delivered).await.expect("deliveries are taken meanwhile");
    for path in ["/readyz", "/healthz", "/metrics"] {
        let answer = world.gateway.ops(path).await;
        assert_eq!((answer.status, &answer.headers["connection"]), (200, &HeaderValue::from_static("close")), "{path}");
    }
    // The gateway itself ends what idles, be it among the first or the last.
    for socket in idle {
        assert!(ends(socket).await);
    }
    let answer = Post::get("/readyz").send(world.gateway.ops_port).await;
    assert_eq!(answer.status, 200);
}

/// Tells if the other side ends the connection within 30 seconds, be it by a reset.
async fn ends(mut socket: TcpStream) -> bool {
    let mut left = Vec::new();
    tokio::time::timeout(Duration::from_secs(30), socket.read_to_end(&mut left)).await.is_ok()
}

/// A body in chunks of that size.
fn in_chunks(body: &[u8], size: usize) -> Vec<u8> {
    let mut chunked = Vec::new();
    for chunk in body.chunks(size) {
        chunked.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        chunked.extend_from_slice(chunk);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    chunked
}

#[tokio::test]
async fn a_large_body_in_tiny_chunks_is_400_and_one_in_tiny_segments_is_taken() {
    let world = setup().workers(0).start().await;
    let body = format!("\"{}\"", "x".repeat(150_000));
    let (small, large) = (&body.as_bytes()[..60_000], body.as_bytes());
    let chunked =
        |body: &[u8], rest: Vec<u8>| [head(&sign(SECRET, body), "Transfer-Encoding: chunked\r\n"), rest].concat();
    let padded = [vec![b'0'; 2_000_000], b"6\r\n\"hello\r\n0\r\n\r\n".to_vec()].concat();
    let spaced = [b"6".to_vec(), vec![b' '; 2_000_000], b"\r\n\"hello\r\n0\r\n\r\n".to_vec()].concat();
    let table = [
        ("1 byte a chunk", chunked(large, in_chunks(large, 1)), "400"),
        ("32 bytes a chunk", chunked(large, in_chunks(large, 32)), "400"),
        ("64 bytes a chunk", chunked(large, in_chunks(large, 64)), "202"),
        ("1 byte a chunk, of a small body", chunked(small, in_chunks(small, 1)), "202"),
        ("2 MB of zeros before a size", chunked(b"\"hello", padded), "400"),
        ("2 MB of spaces after a size", chunked(b"\"hello", spaced), "400"),
    ];
    for (name, request, status) in table {
        let (_socket, answer) = raw(world.port(), &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{name}: {answer}");
    }
    // Segments of a few bytes: of a body with a length, of one large chunk.
    let length = format!("Content-Length: {}\r\n", large.len());
    let whole = [head(&sign(SECRET, large), &length), large.to_vec()].concat();
    for request in [whole, chunked(large, in_chunks(large, large.len()))] {
        let mut socket = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
        socket.set_nodelay(true).unwrap();
        for segment in request.chunks(40) {
            socket.write_all(segment).await.unwrap();
        }
        let mut answered = [0; 12];
        socket.read_exact(&mut answered).await.unwrap();
        assert_eq!(&answered, b"HTTP/1.1 202");
    }
}
