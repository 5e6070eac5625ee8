//! An open port holds: what strangers send costs them more than us, and genuine deliveries are taken meanwhile.
//!
//! Each attack has a short form, run by the suite. `DRILLS=long` makes each the size that its promise speaks of:
//! `DRILLS=long cargo test --release -p tests --test promises attacks:: -- --test-threads 1 --nocapture`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use local::process::Process;
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use world::{Post, SECRET, World, sign};

use crate::contract::head;
use crate::load::{percentile, size};
use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");
/// A signature in the right form that is nobody's.
const WRONG: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// Sentry waits no longer for its answer.
const SENTRY_WAITS: Duration = Duration::from_secs(1);
pub(crate) const MIB: u64 = 1 << 20;
/// What a gateway takes beside bodies and connections: its program, its threads, its journal's buffers.
pub(crate) const GATEWAY_ITSELF: u64 = 64 * MIB;
/// The most that one connection takes (README), with the largest headers that are taken by default.
const A_CONNECTION: u64 = gateway::server::connection_bytes(16 << 10) as u64;

fn is_long() -> bool {
    size(0, 1) == 1
}

/// Genuine deliveries at a rate that does not wait for answers, each on a connection of its own, as Sentry sends them. On a
/// thread of its own, so that nothing else that a test does holds them up.
pub(crate) struct Genuine {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Vec<(Result<String, String>, Duration)>>,
}

impl Genuine {
    pub(crate) fn start(world: &World, a_second: u32) -> Self {
        let (stop, port) = (Arc::<AtomicBool>::default(), world.port());
        let stopped = stop.clone();
        let send = async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / a_second);
            let mut sent = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                ticks.tick().await;
                sent.push(tokio::spawn(async move {
                    let begin = Instant::now();
                    let answer = match Post::signed(BODY).try_send(port).await {
                        Ok(answer) if answer.status == 202 => Ok(answer.accepted()),
                        Ok(answer) => Err(answer.status.to_string()),
                        Err(error) => Err(format!("{error:#}")),
                    };
                    (answer, begin.elapsed())
                }));
            }
            let mut answers = Vec::new();
            for one in sent {
                answers.push(one.await.unwrap());
            }
            answers
        };
        let run = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(send);
        Genuine { stop, sender: std::thread::spawn(run) }
    }

    /// Stops, and shows what was measured. Every delivery was taken, and is journalled; in the long form each within the
    /// second that Sentry waits. How fast else is told and not judged, for these machines are shared.
    pub(crate) async fn all_taken(self, during: &str, world: &World) {
        self.stop.store(true, Ordering::Relaxed);
        let answers = tokio::task::spawn_blocking(|| self.sender.join().unwrap()).await.unwrap();
        let refused: Vec<_> = answers.iter().filter(|(answer, _)| answer.is_err()).collect();
        let mut took: Vec<_> = answers.iter().map(|(_, took)| *took).collect();
        let late = took.iter().filter(|took| **took > SENTRY_WAITS).count();
        let [p50, p99, most] = [50, 99, 100].map(|percent| percentile(&mut took, percent));
        let (count, peak) = (took.len(), peak_memory(world) / MIB);
        println!(
            "{during}: {count} genuine deliveries, {} refused, {late} late; p50 {p50:?}, p99 {p99:?}, slowest {most:?}; \
             gateway's peak {peak} MiB",
            refused.len()
        );
        assert!(refused.is_empty(), "{} of {count} refused: {refused:?}", refused.len());
        assert!(!is_long() || late == 0, "{late} of {count} answers came after Sentry had gone");
        world.on_stream(count as u64).await; // none is lost
        let log = world.gateway.log();
        assert!(!log.contains("panicked"), "{log}");
    }
}

/// The most memory the gateway ever had, in bytes.
pub(crate) fn peak_memory(world: &World) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.gateway.process().pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// What bodies may take that hold so many bytes in flight: one that grows is copied, so there twice for a moment, and the
/// allocator keeps what was given back for the next.
fn twice(in_flight: u64) -> u64 {
    2 * in_flight
}

/// Strangers, who come on machines of their own: here, in a process that everybody else goes before.
struct Attack {
    process: Process,
    log: PathBuf,
}

impl Attack {
    /// `attacker` with the name of an attack, the gateway's port, and how much of it.
    fn start(world: &World, name: &str, how_much: &[usize]) -> Attack {
        let mut command = Command::new("nice");
        command.args(["-n", "10", env!("CARGO_BIN_EXE_attacker"), name]).arg(world.port().to_string());
        command.args(how_much.iter().map(ToString::to_string));
        let log = world.folder().join("attacker.log");
        Attack { process: Process::spawn("the attacker", command, &log, Signal::SIGKILL).unwrap(), log }
    }

    /// How often it met which end: the status of an answer, or what came instead of one.
    async fn ended(self) -> BTreeMap<String, usize> {
        let ended = self.process.ended().await;
        let log = std::fs::read_to_string(&self.log).unwrap();
        assert!(ended.success(), "{log}");
        let ends = log.lines().map(|line| line.split_once(' ').unwrap());
        ends.map(|(end, count)| (end.to_owned(), count.parse().unwrap())).collect()
    }
}

#[tokio::test]
async fn slow_headers_and_slow_bodies_hold_up_nobody() {
    let memory = size(16, 256) as u64;
    let world = setup().workers(0).gateway("GATEWAY_MAX_BYTES_IN_FLIGHT", &format!("{memory}MiB"));
    let world = world.gateway("RUST_LOG", "info"); // a line a delivery would be much of the work
    let world = world.gateway("GATEWAY_HEADER_TIMEOUT", "2s").gateway("GATEWAY_BODY_TIMEOUT", "4s").start().await;
    let connections = size(300, 2_000);
    let genuine = Genuine::start(&world, 200);
    let ends = Attack::start(&world, "slow", &[connections, size(5, 30)]).ended().await;
    println!("slow headers and bodies met these ends: {ends:?}");
    // The bodies together, 400 KB each at once, are more than all the memory there is for bodies.
    genuine.all_taken(&format!("slow headers and bodies on {connections} connections"), &world).await;
    assert!(ends.get("408") >= Some(&(connections / 2)), "the attackers were there: {ends:?}");
    let bound = twice(memory * MIB) + connections as u64 * A_CONNECTION + GATEWAY_ITSELF;
    assert!(peak_memory(&world) < bound, "{} of {} MiB", peak_memory(&world) / MIB, bound / MIB);
}

#[tokio::test]
async fn large_bodies_with_wrong_signatures_cost_bounded_memory() {
    let memory = size(64, 256) as u64;
    let world = setup().workers(0).gateway("GATEWAY_MAX_BYTES_IN_FLIGHT", &format!("{memory}MiB"));
    let world = world.gateway("RUST_LOG", "info").start().await;
    let (requests, body) = (size(300, 10_000), 8 * MIB);
    let begin = Instant::now();
    let genuine = Genuine::start(&world, 200);
    let ends = Attack::start(&world, "wrong", &[requests, body as usize]).ended().await;
    println!("{requests} bodies of 8 MiB with wrong signatures, answers {ends:?} in {:?}", begin.elapsed());
    genuine.all_taken("8 MiB bodies with wrong signatures", &world).await;
    assert!(ends.keys().all(|end| ["401", "503"].contains(&end.as_str())), "{ends:?}");
    assert!(ends.contains_key("401") && ends.values().sum::<usize>() == requests, "{ends:?}");
    // A canonical form and its draft for each that is made at once, which is on half of the cores.
    let canonical = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let bound = twice(memory * MIB) + canonical * 2 * body + GATEWAY_ITSELF;
    assert!(peak_memory(&world) < bound, "{} of {} MiB", peak_memory(&world) / MIB, bound / MIB);
}

#[tokio::test]
async fn as_many_kept_connections_as_the_limit_shut_out_no_delivery() {
    let limit = size(200, 2_000);
    let world = setup().workers(0).gateway("GATEWAY_MAX_CONNECTIONS", &limit.to_string());
    let world = world.gateway("RUST_LOG", "info").start().await;
    let genuine = Genuine::start(&world, 200);
    let ends = Attack::start(&world, "idle", &[limit, size(5, 30)]).ended().await;
    println!("kept connections met these ends: {ends:?}");
    genuine.all_taken(&format!("{limit} kept connections, as many as may be"), &world).await;
    assert!(ends.values().sum::<usize>() >= limit, "the attackers were there: {ends:?}");
    let bound = limit as u64 * A_CONNECTION + GATEWAY_ITSELF;
    assert!(peak_memory(&world) < bound, "{} of {} MiB", peak_memory(&world) / MIB, bound / MIB);
}

#[tokio::test]
async fn bodies_in_tiny_chunks_cost_no_more_than_their_first_64_kib() {
    let world = setup().workers(0).gateway("RUST_LOG", "info").gateway("GATEWAY_BODY_TIMEOUT", "10min").start().await;
    let (requests, body) = (size(8, 1_000), MIB as usize);
    let genuine = Genuine::start(&world, 200);
    let (begin, before) = (Instant::now(), cpu_time(&world));
    let ends = Attack::start(&world, "chunks", &[requests, body, 1]).ended().await;
    let (took, cpu) = (begin.elapsed(), cpu_time(&world) - before);
    println!(
        "{requests} bodies of 1 MiB in chunks of 1 byte, answers {ends:?} in {took:?}; the gateway's CPU: {cpu:?}"
    );
    genuine.all_taken("bodies in chunks of 1 byte", &world).await;
    assert_eq!(ends, BTreeMap::from([("400".to_owned(), requests)]));
}

/// The CPU time that the gateway has had.
fn cpu_time(world: &World) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", world.gateway.process().pid())).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks: u64 = fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10) // 100 a second, on Linux
}

/// Sends bytes, reads until the gateway closes the connection, and gives the statuses of all answers. Each must be whole:
/// a status line, headers, as much of a body as these announce; and each error says what is wrong, as JSON.
async fn exchange(port: u16, request: &[u8], bodies: bool) -> Vec<u16> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    // Where the gateway has heard enough, it is the answer that counts.
    let _ = socket.write_all(request).await;
    let mut answers = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(30), socket.read_to_end(&mut answers)).await;
    read.expect("the gateway closes what idles").expect("an end, not a reset");
    let mut statuses = Vec::new();
    let mut rest = answers.as_slice();
    while !rest.is_empty() {
        let end = rest.windows(4).position(|four| four == b"\r\n\r\n").expect("whole headers") + 4;
        let head = std::str::from_utf8(&rest[..end]).unwrap();
        assert!(head.starts_with("HTTP/1."), "{head:?}");
        let status = head[9..12].parse().unwrap();
        rest = &rest[end..];
        if status == 100 {
            continue;
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.filter(|_| bodies).map_or(0, |length| length.parse().unwrap());
        if status >= 400 && bodies {
            let said: serde_json::Value = serde_json::from_slice(&rest[..length]).expect("every error is JSON");
            assert!(said["error"].is_string() && said.as_object().is_some_and(|said| said.len() == 1), "{said}");
            assert!(head.contains("content-type: application/json\r\n"), "{head}");
        }
        rest = &rest[length..];
        statuses.push(status);
    }
    statuses
}

/// What HTTP/1.1 wants of every request is not in this one (RFC 9112 section 3.2).
const BODY_WITHOUT_HOST: &[u8] = b"POST /api/signals/sentry HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";

/// A genuine delivery with this request line and these headers besides.
fn genuine(line: &str, headers: &str) -> Vec<u8> {
    let (signature, length) = (sign(SECRET, BODY.as_bytes()), BODY.len());
    let own = format!("Host: x\r\nSentry-Hook-Signature: {signature}\r\nContent-Length: {length}\r\n");
    format!("{line}\r\n{own}{headers}\r\n{BODY}").into_bytes()
}

/// Shapes of requests, and the statuses of their answers.
fn shapes() -> Vec<(String, Vec<u8>, Vec<u16>)> {
    const POST: &str = "POST /api/signals/sentry HTTP/1.1";
    let mut shapes = Vec::new();
    let mut add = |name: &str, request: Vec<u8>, statuses: &[u16]| {
        shapes.push((name.to_owned(), request, statuses.to_vec()));
    };
    let smuggled = genuine(POST, "");
    let framed = |headers: &str, body: &[u8]| [head(WRONG, headers), body.to_vec()].concat();
    let chunked = [b"0\r\n\r\n", smuggled.as_slice()].concat();

    // Two ends of one body: what follows the first is never a request.
    add("length, then chunked", framed("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", &chunked), &[401]);
    add("chunked, then length", framed("Transfer-Encoding: chunked\r\nContent-Length: 900\r\n", &chunked), &[401]);
    for coding in ["xchunked", "chunked, identity", "identity", "chunked;q=1", "\u{b}chunked", ""] {
        add(&format!("coding {coding:?}"), framed(&format!("Transfer-Encoding: {coding}\r\n"), &chunked), &[400]);
    }
    add("space before the colon", framed("Transfer-Encoding : chunked\r\n", &chunked), &[400]);
    add("coding twice", framed("Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n", &chunked), &[400]);
    for length in ["+5", "-1", "5,6", "0x5", "5 5", "99999999999999999999", "", "\u{b}5"] {
        add(&format!("length {length:?}"), framed(&format!("Content-Length: {length}\r\n"), &chunked), &[400]);
    }
    // Codings that are understood: `chunked`, once and alone (RFC 9112 section 6.1).
    for (codings, status) in [
        ("gzip, chunked", 501),
        ("identity, chunked", 501),
        ("gzip;q=\"a,chunked\", chunked", 501),
        ("gzip\r\nTransfer-Encoding: chunked", 501),
        ("chunked, chunked", 400),
        ("chunked\r\nTransfer-Encoding: chunked", 400),
        ("chunked, gzip, Chunked", 400),
        (", CHUNKED ,", 400), // hyper wants `chunked` to be last
        (",\t, CHUNKED", 401),
    ] {
        let headers = format!("Transfer-Encoding: {codings}\r\n");
        add(&format!("codings {codings:?}"), framed(&headers, &chunked), &[status]);
    }
    add("two lengths", framed("Content-Length: 5\r\nContent-Length: 6\r\n", &chunked), &[400]);
    add("one length twice", genuine(POST, &format!("Content-Length: {}\r\n", BODY.len())), &[202]);
    let chunks = |body: &[u8]| framed("Transfer-Encoding: chunked\r\n", body);
    for (name, body) in [
        ("no size", &b"zz\r\n"[..]),
        ("an overflowing size", b"fffffffffffffffffff\r\nx\r\n0\r\n\r\n"),
        ("a negative size", b"-1\r\nx\r\n0\r\n\r\n"),
        ("a size too small", b"1\r\nxyz\r\n0\r\n\r\n"),
        ("a bare line feed", b"1\nx\r\n0\r\n\r\n"),
    ] {
        add(&format!("chunk with {name}"), chunks(body), &[400]);
    }
    add("chunk with a long extension", chunks(&[b"1;", "x".repeat(100_000).as_bytes()].concat()), &[400]);
    add("chunk that never ends", chunks(b"5\r\nab"), &[408]);

    // What is no header.
    for (name, header) in [
        ("folded", "X-A: b\r\n c\r\n"),
        ("NUL in a value", "X-A: b\0c\r\n"),
        ("NUL in a name", "X\0A: b\r\n"),
        ("carriage return in a value", "X-A: b\rc\r\n"),
        ("no colon", "X-A\r\n"),
        ("no name", ": b\r\n"),
        ("a second host", "Host: elsewhere\r\n"),
    ] {
        add(name, genuine(POST, header), &[400]);
    }
    add("folded at once", genuine(&format!("{POST}\r\n X-A: b"), ""), &[400]);
    add("no host", BODY_WITHOUT_HOST.to_vec(), &[400]);
    let hosted = |host: &str| {
        let request = String::from_utf8(genuine(POST, "")).unwrap();
        request.replacen("Host: x\r\n", &format!("Host: {host}\r\n"), 1).into_bytes()
    };
    for host in
        ["a b/c@d", "a b", "a/b", "a@b", "a?", "a:b", "a:1:2", "::1", "[::1", "[::g]", "[::1]x", "[v1.]", "a%2", "ä"]
    {
        add(&format!("host {host:?}"), hosted(host), &[400]);
    }
    for host in ["", ":", "a_b.example:443", "127.0.0.1:8080", "[::1]:80", "[v1.a:b]", "a%C3%A4!$&'()*+,;=~"] {
        add(&format!("host {host:?}"), hosted(host), &[202]);
    }
    add("signed twice", genuine(POST, &format!("Sentry-Hook-Signature: {WRONG}\r\n")), &[401]);
    add("100 KB of one header", genuine(POST, &format!("X-A: {}\r\n", "b".repeat(100_000))), &[431]);
    add("1,000 headers", genuine(POST, &"X-A: b\r\n".repeat(1_000)), &[431]);
    add("100 KB of target", genuine(&format!("POST /{} HTTP/1.1", "x".repeat(100_000)), ""), &[431]);

    add("100 KB of a name", genuine(POST, &format!("{}: b\r\n", "X".repeat(100_000))), &[431]);

    // Other versions, other methods, other forms of a target.
    add("HTTP/1.0", genuine("POST /api/signals/sentry HTTP/1.0", ""), &[202]);
    let old = b"POST /api/signals/sentry HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_vec();
    let kept = [genuine("POST /api/signals/sentry HTTP/1.0", "Connection: keep-alive\r\n"), smuggled.clone()].concat();
    add("HTTP/1.0, kept alive", kept, &[202, 202]);
    add("HTTP/1.0, chunked", old, &[400]);
    add("HTTP/0.9", b"GET /\r\n\r\n".to_vec(), &[400]);
    add("HTTP/3.7", genuine("POST /api/signals/sentry HTTP/3.7", ""), &[400]);
    add("no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), &[400]);
    add("an empty line first", [b"\r\n".to_vec(), genuine(POST, "")].concat(), &[202]);
    for method in ["HEAD", "OPTIONS", "TRACE", "PROPFIND", "post"] {
        add(method, genuine(&format!("{method} /api/signals/sentry HTTP/1.1"), ""), &[405]);
    }
    add("OPTIONS *", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), &[404]);
    add("CONNECT", b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n".to_vec(), &[404]);
    add("upgrade", genuine(POST, "Connection: upgrade\r\nUpgrade: h2c\r\n"), &[202]);
    add("absolute form", genuine("POST http://elsewhere/api/signals/sentry HTTP/1.1", ""), &[202]);
    add("absolute form, encrypted", genuine("POST https://elsewhere:1/api/signals/sentry HTTP/1.1", ""), &[202]);
    add("absolute form, elsewhere", genuine("POST http://x/api/signals/sentry/.. HTTP/1.1", ""), &[404]);
    add("absolute form without a path", genuine("POST http://x HTTP/1.1", ""), &[404]);
    add("no slash first", genuine("POST api/signals/sentry HTTP/1.1", ""), &[400]);
    add("two spaces", genuine("POST  /api/signals/sentry HTTP/1.1", ""), &[400]);
    add("NUL in the target", genuine("POST /api/signals/sentry\0 HTTP/1.1", ""), &[400]);
    add("an empty query", genuine("POST /api/signals/sentry? HTTP/1.1", ""), &[202]);
    add("a query", genuine("POST /api/signals/sentry?/../x=%00&y HTTP/1.1", ""), &[202]);
    for path in [
        "//api/signals/sentry",
        "/api//signals/sentry",
        "/api/signals/sentry/",
        "/api/signals/%73entry",
        "/api/signals/sentry%2f",
        "/%2e/api/signals/sentry",
        "/api/%2e%2e/api/signals/sentry",
        "/api/signals/sentry%00",
        "/api/signals/sentry%3f",
        "/api/signals/sentry/%2e",
        "/api\\signals\\sentry",
        "/api/./signals/sentry",
        "/x/../api/signals/sentry",
        "/api/signals/sentry;x",
        "/API/signals/sentry",
    ] {
        add(path, genuine(&format!("POST {path} HTTP/1.1"), ""), &[404]);
    }

    // A whole body in chunks, with what must not become headers of it, or of the next.
    let (signature, size) = (sign(SECRET, BODY.as_bytes()), BODY.len());
    let trailers =
        format!("{size:x};x=\"\r\n{BODY}\r\n0\r\nContent-Length: 7\r\nSentry-Hook-Signature: {WRONG}\r\n\r\n");
    let chunked_whole = [head(&signature, "Transfer-Encoding: chunked\r\n"), trailers.into_bytes()].concat();
    add("chunks and trailers, and a request behind", [chunked_whole, smuggled.clone()].concat(), &[202]);

    add("continue, body sent at once", genuine(POST, "Expect: 100-continue\r\n"), &[202]);
    add("an expectation unheard of", genuine(POST, "Expect: the-unexpected\r\n"), &[202]);
    let refused = [head(WRONG, "Content-Length: 3\r\n"), b"[1]".to_vec()].concat();
    let pipelined =
        [smuggled.clone(), refused, smuggled.clone(), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()].concat();
    add("pipelined", pipelined, &[202, 401, 202, 404]);
    add("pipelined, the second broken", [smuggled.clone(), b"POST\0".to_vec()].concat(), &[202, 400]);
    let large = genuine(POST, &format!("X-A: {}\r\n", "b".repeat(100_000)));
    add("pipelined, the second too large", [smuggled.clone(), smuggled.clone(), large].concat(), &[202, 202, 431]);
    add("HTTP/2 as clients begin it", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), &[400]);
    shapes
}

#[tokio::test]
async fn odd_requests_get_a_clean_answer_and_nothing_of_one_becomes_another() {
    let quick = ["GATEWAY_HEADER_TIMEOUT", "GATEWAY_BODY_TIMEOUT", "GATEWAY_IDLE_TIMEOUT"];
    let world = quick.iter().fold(setup().workers(0), |setup, name| setup.gateway(name, "1s")).start().await;
    let port = world.port();
    let shapes = shapes();
    let expected: usize = shapes.iter().flat_map(|(.., statuses)| statuses).filter(|status| **status == 202).count();
    let sent: Vec<_> = shapes
        .into_iter()
        .map(|(name, request, expected)| {
            tokio::spawn(async move {
                let statuses = exchange(port, &request, name != "HEAD").await;
                (statuses != expected).then(|| format!("{name}: {statuses:?}, not {expected:?}"))
            })
        })
        .collect();
    let (count, mut wrong) = (sent.len(), Vec::new());
    for one in sent {
        wrong.extend(one.await.unwrap());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let accepted = world.metric("gateway_answers_total{status=\"202\",reason=\"accepted\"}").await;
    assert_eq!(accepted, expected as f64, "what was taken is what was sent as such");
    let log = world.gateway.log();
    assert!(!log.contains("panicked"), "{log}");
    println!("{count} odd requests, each answered as it should be; {accepted} deliveries among them");
}

/// hyper answers a broken request itself, without a word; it must be our words that go out, and whole answers before them.
#[tokio::test]
async fn an_error_is_json_also_where_no_request_could_be_read() {
    let world = setup().workers(0).start().await;
    let whole = |text: &str| {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
        let length = format!("content-length: {}", body.len());
        assert!(
            head.lines().any(|line| line == length) && head.lines().any(|line| line == "connection: close"),
            "{text}"
        );
        let said: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(said["error"].is_string(), "{said}");
        head[9..12].to_owned()
    };
    let large = genuine("POST /api/signals/sentry HTTP/1.1", &format!("X-A: {}\r\n", "b".repeat(100_000)));
    for (broken, status) in [(b"BROKEN\0\r\n\r\n".to_vec(), "400"), (large, "431")] {
        // Alone; behind an answer that was read; behind many that nobody has read yet, at once and byte by byte.
        let good = genuine("POST /api/signals/sentry HTTP/1.1", "");
        let head_only = b"HEAD /nowhere HTTP/1.1\r\nHost: x\r\n\r\n".to_vec();
        let waiting = genuine("POST /api/signals/sentry HTTP/1.1", "Expect: 100-continue\r\n");
        for before in [vec![], vec![&good], vec![&good; 40], vec![&good, &head_only], vec![&waiting, &head_only, &good]]
        {
            for pieces in [usize::MAX, 700] {
                let mut request = before.iter().flat_map(|one| one.iter().copied()).collect::<Vec<u8>>();
                request.extend_from_slice(&broken);
                let mut socket = TcpStream::connect(("127.0.0.1", world.port())).await.unwrap();
                socket.set_nodelay(true).unwrap();
                for piece in request.chunks(pieces) {
                    if socket.write_all(piece).await.is_err() {
                        break; // it has heard enough
                    }
                    tokio::task::yield_now().await;
                }
                let mut answers = String::new();
                let read = tokio::time::timeout(Duration::from_secs(30), socket.read_to_string(&mut answers)).await;
                read.expect("the gateway closes it").expect("an end, not a reset");
                let accepted = before.iter().filter(|one| one.starts_with(b"POST")).count();
                assert_eq!(answers.matches("HTTP/1.1 202 ").count(), accepted, "{answers}");
                assert_eq!(answers.matches("\"status\":\"accepted\"}}").count(), accepted, "{answers}");
                let last = answers.rfind("HTTP/1.1 ").expect("an answer");
                assert_eq!(whole(&answers[last..]), status, "{answers}");
                assert_eq!(
                    answers.matches("HTTP/1.1 4").count() - answers.matches("HTTP/1.1 404").count(),
                    1,
                    "{answers}"
                );
            }
        }
    }
}
