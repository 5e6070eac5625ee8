//! Every row of the contract's table of answers, over real sockets.

use std::time::Duration;

use hyper::Method;
use hyper::header::HeaderValue;
use shared::delivery::DeliveryId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use world::{Connection, Post, SECRET, eventually, sign};

use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");

/// Sends bytes as they are and reads until the connection ends or `enough` of the answer is there.
pub(crate) async fn raw(port: u16, request: &[u8]) -> (TcpStream, String) {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    socket.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    let whole = |answer: &[u8]| {
        let text = String::from_utf8_lossy(answer).into_owned();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?.parse().ok()?;
        (body.len() >= length).then_some(text.clone())
    };
    let read = async {
        loop {
            if let Some(text) = whole(&answer) {
                return text;
            }
            let read = socket.read_buf(&mut answer).await.expect("an answer, not a reset connection");
            assert!(read > 0, "the connection ended after {:?}", String::from_utf8_lossy(&answer));
        }
    };
    let text = tokio::time::timeout(Duration::from_secs(30), read).await.expect("an answer in time");
    (socket, text)
}

/// Whether the other side closes the connection.
pub(crate) async fn closes(mut socket: TcpStream) -> bool {
    let mut left = Vec::new();
    let rest = socket.read_to_end(&mut left);
    matches!(tokio::time::timeout(Duration::from_secs(30), rest).await, Ok(Ok(_)))
}

pub(crate) fn head(signature: &str, rest: &str) -> Vec<u8> {
    format!("POST /api/signals/sentry HTTP/1.1\r\nHost: x\r\nSentry-Hook-Signature: {signature}\r\n{rest}\r\n")
        .into_bytes()
}

#[tokio::test]
async fn a_right_signature_is_202_and_names_the_rows_to_come() {
    let world = setup().start().await;
    for target in ["/api/signals/sentry", "/api/signals/sentry?retry=1&x=/"] {
        let answer = Post::signed(BODY).to(target).send(world.port()).await;
        let id = answer.accepted();
        assert_eq!(answer.headers["content-type"], "application/json");
        let data = &answer.json()["data"];
        assert_eq!(data["status"], "accepted");
        assert_eq!(data.as_object().unwrap().len(), 4);
        let stored = world.stored(&id).await;
        assert_eq!(stored.signal["id"], data["signalId"]);
        assert_eq!(stored.issue["id"], data["issueId"]);
        assert_eq!(stored.signal["issue_id"], data["issueId"]);
    }
}

#[tokio::test]
async fn a_signature_that_is_missing_malformed_or_wrong_is_401() {
    let world = setup().workers(0).start().await;
    let wrong = [
        Post::unsigned(BODY),
        Post::signed(BODY).header("Sentry-Hook-Signature", "sha256=0"),
        Post::signed(BODY).header("Sentry-Hook-Signature", &format!("sha256={}", sign(SECRET, BODY.as_bytes()))),
        Post::signed(BODY).header("Sentry-Hook-Signature", &"0".repeat(64)),
        Post::signed(BODY).header("Sentry-Hook-Signature", &sign("another secret", BODY.as_bytes())),
        Post::signed(BODY).header("Sentry-Hook-Signature", &sign(SECRET, b"another body")),
    ];
    for post in wrong {
        let answer = post.send(world.port()).await;
        assert_eq!(answer.status, 401, "{answer:?}");
        assert!(answer.headers.contains_key("www-authenticate"), "{answer:?}");
        assert!(answer.error().contains("ignature"), "{answer:?}");
    }
    for (reason, count) in [("missing", 1.0), ("malformed", 2.0), ("wrong", 3.0)] {
        let name = format!("gateway_answers_total{{status=\"401\",reason=\"signature_{reason}\"}}");
        assert_eq!(world.metric(&name).await, count, "{name}");
    }
}

#[tokio::test]
async fn what_the_headers_show_is_answered_without_waiting_for_the_body() {
    let world = setup().workers(0).start().await;
    let unsent = "Content-Length: 1000\r\n";
    let large = "Content-Length: 8388609\r\n";
    let signature = "0".repeat(64);
    let table = [
        (format!("POST /api/signals/sentry HTTP/1.1\r\nHost: x\r\n{unsent}\r\n").into_bytes(), "401"),
        (head("malformed", unsent), "401"),
        (head("malformed", large), "401"), // the signature header is looked at before the length
        (head(&signature, large), "413"),
        (format!("POST /api/signals HTTP/1.1\r\nHost: x\r\n{unsent}\r\n").into_bytes(), "404"),
        (format!("PUT /api/signals/sentry HTTP/1.1\r\nHost: x\r\n{unsent}\r\n").into_bytes(), "405"),
        (format!("PUT /elsewhere HTTP/1.1\r\nHost: x\r\n{unsent}\r\n").into_bytes(), "404"), // path before method
    ];
    for (request, status) in table {
        let (_socket, answer) = raw(world.port(), &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_413_and_its_sender_can_read_that() {
    let world = setup().workers(0).gateway("GATEWAY_MAX_BODY_BYTES", "1MiB").start().await;
    let fits = format!("[\"{}\"]", "x".repeat((1 << 20) - 4));
    assert_eq!(world.post(fits.clone()).await.status, 202);
    let too_large = format!("{fits} ");
    let answer = world.post(too_large.clone()).await;
    assert_eq!(answer.status, 413);
    assert!(answer.error().contains("1048576"), "{answer:?}");

    // Chunked, so that nothing announces the size, and all of it sent before anything is read.
    let mut request = head(&sign(SECRET, too_large.as_bytes()), "Transfer-Encoding: chunked\r\n");
    for chunk in too_large.as_bytes().chunks(10_000).chain(std::iter::repeat_n(&[b'y'; 10_000][..], 100)) {
        request.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        request.extend_from_slice(chunk);
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"0\r\n\r\n");
    let (_socket, answer) = raw(world.port(), &request).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn a_refused_body_ends_the_connection_that_never_had_a_202_and_leaves_others_usable() {
    let world = setup().workers(0).start().await;
    let mut connection = Connection::open(world.port()).await.unwrap();
    let get = Post::get("/");
    let large = Post::unsigned(vec![b'x'; 300_000]);
    for (refused, status) in [(&large, 401), (&get, 404), (&get.clone().to("/api/signals/sentry"), 405)] {
        let mut connection = Connection::open(world.port()).await.unwrap();
        let answer = connection.send(refused).await.unwrap();
        assert_eq!((answer.status, &answer.headers["connection"]), (status, &HeaderValue::from_static("close")));
        assert!(connection.send(&Post::signed(BODY)).await.is_err(), "it was closed as announced");
    }
    connection.send(&Post::signed(BODY)).await.unwrap().accepted();
    for _ in 0..3 {
        let refused = connection.send(&Post::unsigned(vec![b'x'; 300_000])).await.unwrap();
        assert_eq!(refused.status, 401);
        connection.send(&Post::signed(BODY)).await.unwrap().accepted();
    }
}

#[tokio::test]
async fn another_method_is_405_another_path_is_404() {
    let world = setup().workers(0).start().await;
    for method in [Method::GET, Method::PUT, Method::DELETE, Method::OPTIONS, Method::PATCH] {
        let answer = Post::signed(BODY).method(method).send(world.port()).await;
        assert_eq!((answer.status, answer.headers["allow"].to_str().unwrap()), (405, "POST"));
        answer.error();
    }
    for path in ["/", "/api/signals", "/api/signals/sentry/", "/api/signals/Sentry", "//api/signals/sentry", "/healthz"]
    {
        let answer = Post::signed(BODY).to(path).send(world.port()).await;
        assert_eq!(answer.status, 404, "{path}");
        answer.error();
    }
}

#[tokio::test]
async fn slow_headers_and_slow_bodies_are_408_and_the_connection_ends() {
    let slow = setup().workers(0).gateway("GATEWAY_HEADER_TIMEOUT", "300ms").gateway("GATEWAY_BODY_TIMEOUT", "300ms");
    let world = slow.start().await;
    let begun = b"POST /api/signals/sentry HTTP/1.1\r\nHost: x\r\nSentry-Hook".to_vec();
    let half =
        [head(&sign(SECRET, BODY.as_bytes()), &format!("Content-Length: {}\r\n", BODY.len())), b"{".to_vec()].concat();
    for request in [begun, half] {
        let (socket, answer) = raw(world.port(), &request).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(answer.contains("connection: close") && answer.contains(r#"{"error":"#), "{answer}");
        assert!(closes(socket).await);
    }
}

#[tokio::test]
async fn too_many_connections_are_503() {
    let world = setup().workers(0).gateway("GATEWAY_MAX_CONNECTIONS", "2").start().await;
    let (mut first, mut second) =
        (Connection::open(world.port()).await.unwrap(), Connection::open(world.port()).await.unwrap());
    first.send(&Post::signed(BODY)).await.unwrap().accepted();
    second.send(&Post::signed("\"another\"")).await.unwrap().accepted();
    let (socket, answer) = raw(world.port(), b"").await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nretry-after: "), "{answer}");
    assert!(closes(socket).await);
    drop(first);
    let room = || async { Post::signed(BODY).try_send(world.port()).await.ok().filter(|answer| answer.status == 202) };
    eventually("room for another connection", room).await;
}

#[tokio::test]
async fn too_many_bytes_in_flight_are_503() {
    let limits = [("GATEWAY_MAX_BODY_BYTES", "100000"), ("GATEWAY_MAX_BYTES_IN_FLIGHT", "100000")];
    let world = limits.iter().fold(setup().workers(0), |setup, (name, value)| setup.gateway(name, value)).start().await;
    // One sender holds most of what there is, by having sent it; the last byte is still to come.
    let held = vec![b'1'; 90_000];
    let mut request = head(&sign(SECRET, &held), &format!("Content-Length: {}\r\n", held.len()));
    request.extend_from_slice(&held[1..]);
    let mut socket = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
    socket.write_all(&request).await.unwrap();
    // Seen before another one is posted: whoever comes first holds them.
    let all_held = async || (world.metric("gateway_bodies_in_flight_bytes").await >= 89_999.0).then_some(());
    eventually("the bytes to be held", all_held).await;
    let answer = world.post(vec![b'1'; 50_000]).await;
    assert_eq!(answer.status, 503);
    assert!(answer.headers.contains_key("retry-after"), "{answer:?}");
    answer.error();
    // It was held up by nothing itself, and gives back what it held.
    socket.write_all(b"1").await.unwrap();
    let mut answered = [0; 12];
    socket.read_exact(&mut answered).await.unwrap();
    assert_eq!(&answered, b"HTTP/1.1 202");
    assert_eq!(world.post(vec![b'1'; 50_000]).await.status, 202);
}

#[tokio::test]
async fn a_sender_that_has_no_more_to_say_is_answered() {
    let world = setup().workers(0).start().await;
    let mut request = head(&sign(SECRET, BODY.as_bytes()), &format!("Content-Length: {}\r\n", BODY.len()));
    request.extend_from_slice(BODY.as_bytes());
    let mut socket = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
    socket.write_all(&request).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap(); // to the end of the connection, which comes then
    assert!(answer.starts_with("HTTP/1.1 202 "), "{answer}");
}

#[tokio::test]
async fn what_came_whole_is_taken_even_if_its_sender_has_gone() {
    let world = setup().start().await;
    // Long enough to be noticed gone while its canonical form is made.
    let body = format!(r#"{{ "data": {{ "numbers": [{}1] }} }}"#, "1.0,".repeat(500_000));
    let canonical = gateway::canonical::canonical(body.as_bytes()).unwrap();
    let id = DeliveryId::of_request(Some(b"gone"), body.as_bytes());
    let extra = format!("Request-ID: gone\r\nContent-Length: {}\r\n", body.len());
    let mut request = head(&sign(SECRET, &canonical), &extra);
    request.extend_from_slice(body.as_bytes());
    let mut socket = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
    socket.write_all(&request).await.unwrap();
    drop(socket);
    world.stored(id.as_str()).await;
}

#[tokio::test]
async fn an_answer_waits_for_the_expected_continue_only_when_the_body_is_wanted() {
    let world = setup().workers(0).start().await;
    let expect = format!("Content-Length: {}\r\nExpect: 100-continue\r\n", BODY.len());
    let (mut socket, continues) = {
        let mut socket = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
        socket.write_all(&head(&sign(SECRET, BODY.as_bytes()), &expect)).await.unwrap();
        let mut line = [0; 25];
        socket.read_exact(&mut line).await.unwrap();
        (socket, String::from_utf8_lossy(&line).into_owned())
    };
    assert_eq!(continues, "HTTP/1.1 100 Continue\r\n\r\n");
    socket.write_all(BODY.as_bytes()).await.unwrap();
    let mut answered = [0; 12];
    socket.read_exact(&mut answered).await.unwrap();
    assert_eq!(&answered, b"HTTP/1.1 202");
    let (_socket, refused) = raw(world.port(), &head("malformed", &expect)).await;
    assert!(refused.starts_with("HTTP/1.1 401 "), "{refused}");
}
