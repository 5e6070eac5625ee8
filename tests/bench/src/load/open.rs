//! An open loop: each request has its time, and its latency counts from then, whether or not the connection was free.
//! A server that stalls therefore pays for every request that should have been sent meanwhile ("coordinated omission",
//! as Gil Tene calls leaving those out).
//!
//! A thread a connection, on blocking sockets: such a thread wakes within some 50 us of its time, where tokio's timers
//! only know milliseconds.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;

use super::{ANSWER_BYTES, Answers, Request, answer, closed_early, histogram};
use crate::bodies::Deliveries;

/// What is sent, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Requests a second, evenly, taken by the connections in turn.
    pub(crate) rate: f64,
    pub(crate) connections: u32,
    /// Requests of this first part are answered, and not counted.
    pub(crate) warm_up: Duration,
    /// The part that counts.
    pub(crate) measure: Duration,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Latencies {
    /// Nanoseconds from when a request was to be sent until its answer was there.
    pub(crate) histogram: Histogram<u64>,
    /// Answers by status.
    pub(crate) answers: Answers,
    /// When each request was to be sent, and the body of its answer. Without those of the warm-up.
    pub(crate) sent: Vec<(Instant, Vec<u8>)>,
}

impl Latencies {
    /// Milliseconds at a quantile.
    pub(crate) fn ms(&self, quantile: f64) -> f64 {
        self.histogram.value_at_quantile(quantile) as f64 / 1e6
    }
}

/// Sends deliveries to a port of this machine as planned.
///
/// # Errors
/// Where a connection cannot be made or breaks.
pub(crate) async fn run(port: u16, deliveries: &Arc<Deliveries>, plan: Plan) -> anyhow::Result<Latencies> {
    let deliveries = deliveries.clone();
    tokio::task::spawn_blocking(move || run_here(port, &deliveries, plan)).await?
}

fn run_here(port: u16, deliveries: &Arc<Deliveries>, plan: Plan) -> anyhow::Result<Latencies> {
    let salt = fastrand::u64(..);
    let begin = Instant::now() + Duration::from_millis(100); // when all threads are there
    let threads: Vec<_> = (0..plan.connections)
        .map(|place| {
            let request = Request::new(deliveries.clone(), port, salt);
            thread::spawn(move || connection(port, request, plan, place, begin))
        })
        .collect();
    let mut all = Latencies { histogram: histogram(), answers: Answers::new(), sent: Vec::new() };
    for thread in threads {
        let ended = thread.join().map_err(|_| anyhow::anyhow!("a thread of the load generator panicked"))?;
        let latencies = ended.with_context(|| format!("a connection of the load to port {port} failed"))?;
        all.histogram.add(&latencies.histogram)?;
        for (status, count) in latencies.answers {
            *all.answers.entry(status).or_default() += count;
        }
        all.sent.extend(latencies.sent);
    }
    Ok(all)
}

fn connection(port: u16, mut request: Request, plan: Plan, place: u32, begin: Instant) -> anyhow::Result<Latencies> {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut latencies = Latencies { histogram: histogram(), answers: Answers::new(), sent: Vec::new() };
    let mut buffer = [0; ANSWER_BYTES];
    let mut number = u64::from(place);
    loop {
        let due = Duration::from_secs_f64(number as f64 / plan.rate);
        if due >= plan.warm_up + plan.measure {
            return Ok(latencies);
        }
        let intended = begin + due;
        thread::sleep(intended.saturating_duration_since(Instant::now()));
        request.become_number(number);
        let (status, body) = exchange(&mut socket, &request, &mut buffer)?;
        *latencies.answers.entry(status).or_default() += 1;
        if due >= plan.warm_up {
            let took = u64::try_from(intended.elapsed().as_nanos()).unwrap_or(u64::MAX);
            latencies.histogram.saturating_record(took);
            latencies.sent.push((intended, body));
        }
        number += u64::from(plan.connections);
    }
}

/// Sends a request; gives the status and the body of its answer.
fn exchange(socket: &mut TcpStream, request: &Request, buffer: &mut [u8; ANSWER_BYTES]) -> io::Result<(u16, Vec<u8>)> {
    let mut written = 0;
    while written < request.len() {
        written += socket.write_vectored(&request.rest(written))?;
    }
    let mut read = 0;
    loop {
        let more = socket.read(&mut buffer[read..])?;
        if more == 0 {
            return Err(closed_early());
        }
        read += more;
        if let Some((status, whole)) = answer(&buffer[..read])? {
            let answer = &buffer[..whole];
            let body = answer.windows(4).position(|end| end == b"\r\n\r\n").map_or(whole, |end| end + 4);
            return Ok((status, answer[body..].to_vec()));
        }
    }
}
