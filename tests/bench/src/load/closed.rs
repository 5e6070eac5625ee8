//! A closed loop: each connection has one request under way, all the time.
//!
//! All of it runs on one thread of its own, so that the generator's readiness is asked for many sockets at once and it
//! can never take more than one core from the server.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::{ANSWER_BYTES, Answers, Request, answer, closed_early, histogram};
use crate::bodies::Deliveries;

/// A load that is on.
pub(crate) struct Load {
    shared: Arc<Shared>,
    ended: oneshot::Receiver<anyhow::Result<()>>,
}

struct Shared {
    /// How many requests are sent in all.
    limit: u64,
    begun: AtomicU64,
    answered: AtomicU64,
    stop: AtomicBool,
    hold: AtomicBool,
    ended: Mutex<Ended>,
}

/// The result of a load.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Answers by status.
    pub(crate) answers: Answers,
    /// Nanoseconds from the first byte of a request to the last of its answer.
    pub(crate) took: Histogram<u64>,
}

impl Load {
    /// Sends deliveries to a port of this machine until it is stopped, or to the number of `limit`.
    pub(crate) fn start(port: u16, deliveries: &Arc<Deliveries>, connections: usize, limit: Option<u64>) -> Load {
        let shared = Arc::new(Shared {
            limit: limit.unwrap_or(u64::MAX),
            begun: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            hold: AtomicBool::new(false),
            ended: Mutex::new(Ended { answers: BTreeMap::new(), took: histogram() }),
        });
        let (tell, ended) = oneshot::channel();
        let (deliveries, for_thread, salt) = (deliveries.clone(), shared.clone(), fastrand::u64(..));
        thread::spawn(move || {
            // Nobody may be left to care.
            let _ = tell.send(run(port, &deliveries, connections, salt, &for_thread));
        });
        Load { shared, ended }
    }

    /// How many requests have been answered.
    pub(crate) fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    /// Lets no further request begin, or lets them again.
    pub(crate) fn hold(&self, hold: bool) {
        self.shared.hold.store(hold, Ordering::Relaxed);
    }

    /// Ends it once what is under way is answered; gives all answers.
    ///
    /// # Errors
    /// Where a connection could not be made or broke.
    pub(crate) async fn stop(self) -> anyhow::Result<Answers> {
        Ok(self.end().await?.answers)
    }

    /// The same, with the latencies.
    ///
    /// # Errors
    /// As [`Load::stop`].
    pub(crate) async fn end(self) -> anyhow::Result<Ended> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.ended().await
    }

    /// Waits until as many are answered as were to be sent; gives all answers.
    ///
    /// # Errors
    /// As [`Load::stop`].
    pub(crate) async fn finish(self) -> anyhow::Result<Answers> {
        Ok(self.ended().await?.answers)
    }

    async fn ended(mut self) -> anyhow::Result<Ended> {
        (&mut self.ended).await.context("the load generator panicked")??;
        let none = Ended { answers: BTreeMap::new(), took: histogram() };
        Ok(std::mem::replace(&mut *self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner), none))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn run(
    port: u16,
    deliveries: &Arc<Deliveries>,
    connections: usize,
    salt: u64,
    shared: &Arc<Shared>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let connect = || {
            let request = Request::new(deliveries.clone(), port, salt);
            tokio::spawn(connection(port, request, shared.clone()))
        };
        let connections: Vec<_> = (0..connections).map(|_| connect()).collect();
        for connection in connections {
            connection.await?.with_context(|| format!("a connection of the load to port {port} failed"))?;
        }
        Ok(())
    })
}

async fn connection(port: u16, mut request: Request, shared: Arc<Shared>) -> io::Result<()> {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    socket.set_nodelay(true)?;
    let mut buffer = [0; ANSWER_BYTES];
    let mut answers = Answers::new();
    let mut took = histogram();
    while let Some(number) = shared.next().await {
        request.become_number(number);
        let begin = Instant::now();
        let mut written = 0;
        while written < request.len() {
            written += socket.write_vectored(&request.rest(written)).await?;
        }
        let mut read = 0;
        let status = loop {
            let more = socket.read(&mut buffer[read..]).await?;
            if more == 0 {
                return Err(closed_early());
            }
            read += more;
            if let Some((status, _)) = answer(&buffer[..read])? {
                break status;
            }
        };
        took.saturating_record(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
        *answers.entry(status).or_default() += 1;
        shared.answered.fetch_add(1, Ordering::Relaxed);
    }
    let mut all = shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
    for (status, count) in answers {
        *all.answers.entry(status).or_default() += count;
    }
    all.took.add(&took).map_err(io::Error::other)
}

impl Shared {
    /// The number of the next request, or none where there is to be none any more.
    async fn next(&self) -> Option<u64> {
        while self.hold.load(Ordering::Relaxed) && !self.stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        (number < self.limit).then_some(number)
    }
}
