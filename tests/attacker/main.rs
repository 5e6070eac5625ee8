//! Strangers who attack a gateway, in a process of their own: real ones have machines of their own, and the gateway's
//! processors to themselves neither they nor the tests' genuine sender may have. Ends by itself, and prints how often it
//! met which end, one a line: `401 9950`.
//!
//! - `attacker slow PORT CONNECTIONS SECONDS`: headers and bodies that come byte by byte, on that many connections.
//! - `attacker wrong PORT REQUESTS BYTES`: bodies of that size with a signature that is nobody's, 32 at a time.
//! - `attacker idle PORT CONNECTIONS SECONDS`: that many connections that are kept: silent, with a 404, half a head, half a body.
//! - `attacker chunks PORT REQUESTS BYTES SIZE`: as `wrong`, in chunks of that size, 4 at a time.
#![expect(clippy::unwrap_used, reason = "an attacker that panics fails the test that sent it")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

/// A request whose signature is well formed, and wrong, up to these last headers.
fn head(headers: &str) -> String {
    let signature = "0123456789abcdef".repeat(4);
    format!("POST /api/signals/sentry HTTP/1.1\r\nHost: x\r\nSentry-Hook-Signature: {signature}\r\n{headers}")
}

type Ends = BTreeMap<String, usize>;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments[at].parse::<usize>().unwrap();
    let port = arguments[1].parse().unwrap();
    let attackers: Vec<_> = match &*arguments[0] {
        "slow" => {
            let until = Instant::now() + Duration::from_secs(number(3) as u64);
            let headers = Bytes::from(head("X-Slow: "));
            let body = Bytes::from([head("Content-Length: 8000000\r\n\r\n").as_bytes(), &[b'x'; 400_000]].concat());
            (0..number(2)).map(|n| tokio::spawn(dribble(port, [&headers, &body][n % 2].clone(), until))).collect()
        }
        "wrong" => {
            let body = [b"\"".to_vec(), vec![b'x'; number(3) - 2], b"\"".to_vec()].concat();
            let head = head(&format!("Content-Length: {}\r\n\r\n", body.len()));
            let request = Bytes::from([head.as_bytes(), &body].concat());
            let left = Arc::new(AtomicUsize::new(number(2)));
            (0..32).map(|_| tokio::spawn(send_wrong(port, request.clone(), left.clone()))).collect()
        }
        "idle" => {
            let until = Instant::now() + Duration::from_secs(number(3) as u64);
            let begun = [
                "".into(),
                "GET / HTTP/1.1\r\nHost: x\r\n\r\n".into(),
                head("X-Half"),
                head("Content-Length: 9\r\n\r\n{"),
            ];
            let begun = begun.map(Bytes::from);
            (0..number(2)).map(|n| tokio::spawn(keep(port, begun[n % 4].clone(), until))).collect()
        }
        "chunks" => {
            let size = number(4);
            let chunk = format!("{size:x}\r\n{}\r\n", "x".repeat(size));
            let body = chunk.repeat(number(3) / size);
            let request = Bytes::from(format!("{}{body}0\r\n\r\n", head("Transfer-Encoding: chunked\r\n\r\n")));
            let left = Arc::new(AtomicUsize::new(number(2)));
            (0..4).map(|_| tokio::spawn(send_wrong(port, request.clone(), left.clone()))).collect()
        }
        unknown => panic!("no such attack: {unknown}"),
    };
    let mut ends = Ends::new();
    for attacker in attackers {
        for (end, count) in attacker.await.unwrap() {
            *ends.entry(end).or_default() += count;
        }
    }
    ends.iter().for_each(|(end, count)| println!("{end} {count}"));
}

/// One byte after the other, until the gateway has had enough; then again, after a while: who is slow does not come back
/// at once, and 2,000 who did would be another attack.
async fn dribble(port: u16, start: Bytes, until: Instant) -> Ends {
    let mut ends = Ends::new();
    while Instant::now() < until {
        let turned_out = async {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
            socket.write_all(&start).await?;
            let mut answer = [0; 1024];
            loop {
                if let Ok(read) = timeout(Duration::from_millis(200), socket.read(&mut answer)).await {
                    return read.map(|length| answer[..length].to_vec());
                }
                let _ = socket.write_all(b"x").await; // refused is as good as any other end
            }
        };
        let end = match timeout_at(until, turned_out).await {
            Ok(Ok(answer)) => status(&answer),
            Ok(Err(_)) => "broken".into(),
            Err(_) => "held".into(),
        };
        *ends.entry(end).or_default() += 1;
        tokio::time::sleep_until(until.min(Instant::now() + Duration::from_secs(1))).await;
    }
    ends
}

/// Keeps a connection on which no more than this comes, until the gateway ends it; then again, after a while.
async fn keep(port: u16, begun: Bytes, until: Instant) -> Ends {
    let mut ends = Ends::new();
    while Instant::now() < until {
        let kept = async {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
            socket.write_all(&begun).await?;
            let (mut answer, mut read) = (Vec::new(), [0; 1024]);
            // An end that is a reset is as good as any other.
            while let Ok(length @ 1..) = socket.read(&mut read).await {
                answer.extend_from_slice(&read[..length]);
            }
            Ok::<_, std::io::Error>(status(&answer))
        };
        let end = match timeout_at(until, kept).await {
            Ok(end) => end.unwrap_or_else(|_| "broken".into()),
            Err(_) => "held".into(),
        };
        *ends.entry(end).or_default() += 1;
        tokio::time::sleep_until(until.min(Instant::now() + Duration::from_secs(1))).await;
    }
    ends
}

/// The same request again and again, each on a connection of its own, until none is left.
async fn send_wrong(port: u16, request: Bytes, left: Arc<AtomicUsize>) -> Ends {
    let mut ends = Ends::new();
    while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        // Refused early and for long, its end may not be wanted any more; the answer is read all the same.
        let _ = socket.write_all(&request).await;
        let mut answer = [0; 12];
        let end = match socket.read_exact(&mut answer).await {
            Ok(_) => status(&answer),
            Err(_) => "broken".into(),
        };
        *ends.entry(end).or_default() += 1;
    }
    ends
}

/// The three digits of an answer's first line; `closed` where there is none.
fn status(answer: &[u8]) -> String {
    answer.get(9..12).map_or_else(|| "closed".into(), |status| String::from_utf8_lossy(status).into_owned())
}
