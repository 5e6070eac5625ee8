//! The limit of connections (`GATEWAY_MAX_CONNECTIONS`), and the connection that makes room for a new one at the limit.
//!
//! A stranger can open as many connections as the limit allows, and keep them. So a new connection takes the place of an
//! evictable one. A connection is evictable while both hold:
//! - It never had a 202 for a new body. A connection that had one belongs to a sender that knows a secret, such as a proxy.
//!   A body that was accepted before (see [`crate::duplicate_bodies`]) does not count: one captured request would else keep
//!   all connections.
//! - No whole request has come on it since it was accepted, or since its last request ended. It may be idle, in its headers
//!   or in its body.
//!
//! Evictable connections stand in one queue, in the order of those moments; the first is closed. Why one queue: a genuine
//! sender's request comes whole within milliseconds, so at the limit all connections that are kept stand before it.
//! Without an evictable connection, the new one is answered 503.
//!
//! The cost for a connection that brings one delivery is one insertion into the queue and one removal, each under the
//! queue's lock. A connection that brought a new body before does neither.

use std::collections::BTreeMap;
use std::future::{poll_fn, ready};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::Either;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// The readiness check is degraded for this long after the limit was reached.
const DEGRADED_FOR: Duration = Duration::from_secs(10);
/// The least time between two lines of the log about the limit.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// The text of the readiness check and of the log's line.
const REACHED: &str =
    "GATEWAY_MAX_CONNECTIONS is reached: a new connection takes the place of one without a 202, or is answered 503";

/// [`Ticket::number`] of a connection that is not in the queue.
const NOT_QUEUED: u64 = 0;
/// [`Ticket::number`] of a connection that was evicted or has ended.
const ENDED: u64 = u64::MAX;

/// Counts connections and evicts the first in the queue at the limit.
#[derive(Debug)]
pub struct ConnectionLimit {
    limit: usize,
    slots: Arc<Semaphore>,
    queue: Mutex<Queue>,
    /// Locked only at the limit.
    reached: Mutex<Reached>,
    evicted: Counter,
}

/// The evictable connections.
#[derive(Debug, Default)]
struct Queue {
    /// The last number that was given to a connection.
    last: u64,
    waiting: BTreeMap<u64, Arc<Notify>>,
}

/// The last times that the limit was reached and that the log had a line on it.
#[derive(Debug, Default)]
struct Reached {
    last: Option<Instant>,
    warned: Option<Instant>,
}

impl ConnectionLimit {
    /// Allows `limit` connections at once. `evicted` counts evictions.
    pub fn new(limit: usize, evicted: Counter) -> Self {
        let slots = Arc::new(Semaphore::new(limit));
        ConnectionLimit { limit, slots, queue: Mutex::default(), reached: Mutex::default(), evicted }
    }

    /// Admits a new connection; at the limit in the place of the first in the queue. Returns `None` when the queue is empty.
    pub fn admit(&self) -> Option<impl Future<Output = OwnedSemaphorePermit> + Send + use<>> {
        if let Ok(slot) = self.slots.clone().try_acquire_owned() {
            return Some(Either::Left(ready(slot)));
        }
        let first = self.queue().waiting.pop_first();
        let admitted = first.map(|(_, first)| {
            let slots = self.slots.clone();
            let mut slot = Box::pin(async move { slots.acquire_owned().await.expect("it is never closed") });
            // Polled once, it stands in the semaphore's queue: no other connection takes the slot that the first gives back.
            let slot_already = slot.as_mut().now_or_never();
            first.notify_one();
            self.evicted.inc();
            slot_already.map_or(Either::Right(slot), |slot| Either::Left(ready(slot)))
        });
        self.note_reached();
        admitted
    }

    /// The state of the readiness check.
    ///
    /// # Errors
    /// Fails while the limit was reached within [`DEGRADED_FOR`].
    pub fn state(&self) -> Result<String, String> {
        let reached = self.reached().last.is_some_and(|last| last.elapsed() < DEGRADED_FOR);
        if reached { Err(REACHED.to_owned()) } else { Ok("fewer than GATEWAY_MAX_CONNECTIONS".into()) }
    }

    /// A new connection's ticket, in the queue already.
    pub fn ticket(self: &Arc<Self>) -> Ticket {
        let ticket = Ticket {
            limit: self.clone(),
            number: AtomicU64::new(NOT_QUEUED),
            had_202: AtomicBool::new(false),
            is_kept: AtomicBool::new(false),
            evicted: Arc::default(),
        };
        ticket.enter();
        ticket
    }

    fn note_reached(&self) {
        let (now, mut reached) = (Instant::now(), self.reached());
        reached.last = Some(now);
        if reached.warned.is_none_or(|warned| now.duration_since(warned) >= WARN_EVERY) {
            reached.warned = Some(now);
            drop(reached);
            tracing::warn!(limit = self.limit, evicted = self.evicted.get(), "{REACHED}");
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // No holder of this lock can panic half-way.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reached(&self) -> MutexGuard<'_, Reached> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place in the queue.
#[derive(Debug)]
pub struct Ticket {
    limit: Arc<ConnectionLimit>,
    /// Written only under the queue's lock.
    number: AtomicU64,
    had_202: AtomicBool,
    /// A new body was accepted: the connection is never evictable again.
    is_kept: AtomicBool,
    evicted: Arc<Notify>,
}

impl Ticket {
    /// The connection waits for a request, from now on: it goes to the end of the queue, unless it brought a new body.
    pub fn enter(&self) {
        if self.is_kept() {
            return;
        }
        let mut queue = self.limit.queue();
        match self.number.load(Ordering::Relaxed) {
            NOT_QUEUED => {}
            ENDED => return,
            number if queue.waiting.remove(&number).is_some() => {}
            _ => return self.number.store(ENDED, Ordering::Relaxed),
        }
        queue.last += 1;
        let number = queue.last;
        queue.waiting.insert(number, self.evicted.clone());
        self.number.store(number, Ordering::Relaxed);
    }

    /// A whole request has come: the connection leaves the queue. `false` where it was evicted before.
    pub fn leave(&self) -> bool {
        if self.number.load(Ordering::Relaxed) == NOT_QUEUED {
            return true;
        }
        let mut queue = self.limit.queue();
        let stays = queue.waiting.remove(&self.number.load(Ordering::Relaxed)).is_some();
        self.number.store(if stays { NOT_QUEUED } else { ENDED }, Ordering::Relaxed);
        stays
    }

    /// The connection has ended.
    pub fn end(&self) {
        if self.is_kept() {
            return; // it left the queue for good
        }
        let mut queue = self.limit.queue();
        let number = self.number.swap(ENDED, Ordering::Relaxed);
        queue.waiting.remove(&number);
    }

    /// A request was answered 202. If its body was new, the connection is never evictable again.
    pub fn accepted(&self, is_new: bool) {
        self.had_202.store(true, Ordering::Relaxed);
        self.is_kept.fetch_or(is_new, Ordering::Relaxed);
    }

    /// Tells if a request was answered 202.
    pub fn had_202(&self) -> bool {
        self.had_202.load(Ordering::Relaxed)
    }

    fn is_kept(&self) -> bool {
        self.is_kept.load(Ordering::Relaxed)
    }

    /// Returns when the connection is to make room. Costs a load each time that the task of a kept connection runs.
    pub async fn evicted(&self) {
        let mut evicted = pin!(self.evicted.notified());
        poll_fn(|cx| if self.is_kept() { Poll::Pending } else { evicted.as_mut().poll(cx) }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> (Arc<ConnectionLimit>, Vec<OwnedSemaphorePermit>) {
        let limit = Arc::new(ConnectionLimit::new(2, Counter::default()));
        let slots = (0..2).map(|_| limit.admit().unwrap().now_or_never().unwrap()).collect();
        (limit, slots)
    }

    /// Admits a new connection and returns the index of the ticket that is evicted for it.
    fn evicts(limit: &ConnectionLimit, tickets: &[&Ticket]) -> Option<usize> {
        let admitted = limit.admit().is_some();
        let evicted = tickets.iter().position(|ticket| ticket.evicted().now_or_never().is_some());
        assert_eq!(admitted, evicted.is_some());
        evicted
    }

    #[test]
    fn the_connection_that_waits_longest_goes_and_none_with_a_new_body_or_a_whole_request() {
        let (limit, _slots) = full();
        let [first, second, third, fourth] = [(); 4].map(|()| limit.ticket());
        let all = [&first, &second, &third, &fourth];
        assert!(second.leave());
        assert!(third.leave());
        third.accepted(true);
        third.accepted(false);
        third.enter();
        first.enter(); // its answer was another one: it waits again
        assert_eq!(evicts(&limit, &all), Some(3));
        assert_eq!(evicts(&limit, &all), Some(0));
        assert_eq!(evicts(&limit, &all), None);
        second.accepted(false);
        second.enter();
        assert_eq!(evicts(&limit, &all), Some(1));
    }

    #[test]
    fn an_evicted_or_ended_connection_is_not_evicted_again() {
        let (limit, _slots) = full();
        let [evicted, ended] = [(); 2].map(|()| limit.ticket());
        assert_eq!(evicts(&limit, &[&evicted]), Some(0));
        assert!(!evicted.leave(), "what has come whole since is not taken");
        evicted.enter();
        ended.end();
        ended.enter();
        assert_eq!(evicts(&limit, &[&evicted, &ended]), None);
    }

    #[tokio::test]
    async fn the_slot_of_an_evicted_connection_is_the_new_ones() {
        let (limit, mut slots) = full();
        let _ticket = limit.ticket();
        let admitted = limit.admit().unwrap();
        slots.pop(); // before the new connection's task has run
        assert!(limit.admit().is_none(), "it is promised");
        let _slot = admitted.await;
        assert_eq!(limit.state(), Err(REACHED.to_owned()));
    }
}
