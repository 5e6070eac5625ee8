//! Reading bodies: how large, how slow, and how much memory all of them together may take.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Duration, Instant, timeout, timeout_at};

use crate::reject::Reject;
use crate::settings::Limits;

/// How long, and how far beyond the body limit, the rest of a refused body is read and thrown away, so that its sender
/// sees the answer and not a reset connection (RFC 9112 section 9.6).
const DISCARD_FOR: Duration = Duration::from_secs(3);
const DISCARD_BODIES: usize = 4;

/// A body that announces no more than this may use all the memory there is for bodies; from others a quarter of it is kept
/// free. Nearly all deliveries are small, and so get in however large bodies crowd.
const SMALL: u64 = 64 * 1024;
/// From this age on an unfinished body makes room for another: Sentry waits a second for its answer, so nobody waits for
/// this one any more. Else a few slow senders of large bodies could hold all the memory there is for bodies.
const OVERDUE_AFTER: Duration = Duration::from_secs(1);
/// How long a body waits for the room that others were told to make.
const ROOM_WITHIN: Duration = Duration::from_millis(500);

/// Reads bodies into memory, and no more of them than there is to be.
#[derive(Debug)]
pub struct Bodies {
    limit: usize,
    timeout: Duration,
    /// Bytes of memory that bodies may still take, of `memory` in all.
    budget: Semaphore,
    memory: usize,
    /// How many of them only bodies up to [`SMALL`] may take.
    reserve: usize,
    /// Bodies being read, the oldest first.
    unfinished: Mutex<BTreeMap<u64, Arc<Unfinished>>>,
    begun: AtomicU64,
    /// A body is read, or given up.
    left: Notify,
}

/// A body that is being read.
#[derive(Debug)]
struct Unfinished {
    since: Instant,
    /// It has to make room.
    evicted: Notify,
}

/// A body's place among those being read, left when this is dropped.
struct Reading<'a> {
    bodies: &'a Bodies,
    number: u64,
    body: Arc<Unfinished>,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.bodies.unfinished().remove(&self.number);
        self.bodies.left.notify_waiters();
    }
}

impl Bodies {
    /// With these limits.
    pub fn new(limits: &Limits) -> Self {
        let memory = limits.bytes_in_flight.min(Semaphore::MAX_PERMITS);
        Bodies {
            limit: limits.body_bytes,
            timeout: limits.body_timeout,
            budget: Semaphore::new(memory),
            memory,
            // Not so much that the largest body could never be taken, nor more than the semaphore hands out at once beside it.
            reserve: (limits.bytes_in_flight / 4).min(limits.bytes_in_flight - limits.body_bytes).min(1 << 30),
            unfinished: Mutex::default(),
            begun: AtomicU64::new(0),
            left: Notify::new(),
        }
    }

    /// How many bytes of memory bodies take now.
    pub fn bytes_in_flight(&self) -> usize {
        self.memory - self.budget.available_permits()
    }

    /// Reads a body, within its limits of size, of time, and of what all bodies together may hold in memory (given back
    /// with the permit).
    ///
    /// # Errors
    /// The limit that was met; or that the body is broken.
    pub async fn read(&self, body: &mut Incoming) -> Result<(Bytes, SemaphorePermit<'_>), Reject> {
        let hint = body.size_hint();
        // As much as this many bytes may come; a chunked body does not say.
        let most = hint.exact().map_or(Some(self.limit), |declared| usize::try_from(declared).ok());
        let most = most.filter(|most| *most <= self.limit).ok_or(Reject::TooLarge(self.limit))?;
        let spare = if hint.exact().is_some_and(|declared| declared <= SMALL) { 0 } else { self.reserve };
        let deadline = Instant::now() + self.timeout;
        let reading = self.begin(); // dropped last, after the memory is given back
        let mut held = self.budget.try_acquire_many(0).map_err(|_| Reject::TooManyBytes)?;
        let mut buffer = Vec::new();
        loop {
            let frame = tokio::select! {
                frame = timeout_at(deadline, body.frame()) => frame.map_err(|_| Reject::SlowBody)?,
                () = reading.body.evicted.notified() => return Err(Reject::TooManyBytes),
            };
            let Some(frame) = frame else { return Ok((buffer.into(), held)) };
            // Trailers are no part of the body.
            let Ok(data) = frame.map_err(|_| Reject::BrokenBody)?.into_data() else { continue };
            if hint.exact() == Some(data.len() as u64) {
                held.merge(self.take(data.len(), spare).await?);
                return Ok((data, held)); // all of it in one piece: no copy
            }
            let needed = buffer.len() + data.len();
            if needed > self.limit {
                return Err(Reject::TooLarge(self.limit));
            }
            if needed > buffer.capacity() {
                // Grows with what arrives, not with what is announced: who announces much and sends nothing holds nothing.
                // Doubled, so that copying stays cheap; what counts is the memory, not how much of it is filled.
                let capacity = needed.max(buffer.capacity().saturating_mul(2).min(most));
                held.merge(self.take(capacity - buffer.capacity(), spare).await?);
                buffer.reserve_exact(capacity - buffer.len());
            }
            buffer.extend_from_slice(&data);
        }
    }

    /// Takes memory for that many more bytes of a body, where `spare` bytes are left; where there is none, from the bodies
    /// that are overdue.
    async fn take(&self, bytes: usize, spare: usize) -> Result<SemaphorePermit<'_>, Reject> {
        let wanted = u32::try_from(bytes + spare).map_err(|_| Reject::TooManyBytes)?;
        // Never by waiting in the semaphore's own queue: it gives a waiter what is free piece by piece, the spare bytes too.
        let freed = async {
            loop {
                let left = self.left.notified();
                if let Ok(held) = self.budget.try_acquire_many(wanted) {
                    return Some(held);
                }
                if !self.evict_oldest() {
                    return None;
                }
                let _ = timeout(ROOM_WITHIN / 10, left).await; // then there is room, or another has to go
            }
        };
        let freed = timeout(ROOM_WITHIN, freed).await.ok().flatten();
        let mut held = freed.ok_or(Reject::TooManyBytes)?;
        drop(held.split(spare)); // it had to be there, no more
        Ok(held)
    }

    fn begin(&self) -> Reading<'_> {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let body = Arc::new(Unfinished { since: Instant::now(), evicted: Notify::new() });
        self.unfinished().insert(number, body.clone());
        Reading { bodies: self, number, body }
    }

    /// Has the oldest unfinished body make room; false where none is overdue.
    fn evict_oldest(&self) -> bool {
        let mut unfinished = self.unfinished();
        let Some(oldest) = unfinished.first_entry().filter(|oldest| oldest.get().since.elapsed() >= OVERDUE_AFTER)
        else {
            return false;
        };
        oldest.remove().evicted.notify_one();
        true
    }

    fn unfinished(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Unfinished>>> {
        // Nothing that holds this can panic half-way.
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads and throws away what is left of a body that was answered early, for a bounded time and size.
    pub async fn discard(&self, mut body: Incoming) {
        let mut left = self.limit.saturating_mul(DISCARD_BODIES);
        let discarding = async {
            while let Some(Ok(frame)) = body.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(rest) = left.checked_sub(length) else { return };
                left = rest;
            }
        };
        // What is still to come then costs the sender the connection, and nobody else anything.
        let _ = timeout(DISCARD_FOR, discarding).await;
    }
}
