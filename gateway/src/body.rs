//! Reading bodies: how large, how slow, and how much memory all of them together may take.

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Duration, Instant, timeout, timeout_at};

use crate::reject::Reject;
use crate::settings::Limits;

/// How long, and how far beyond the body limit, the rest of a refused body is read and thrown away, so that its sender
/// sees the answer and not a reset connection (RFC 9112 section 9.6).
const DISCARD_FOR: Duration = Duration::from_secs(3);
const DISCARD_BODIES: usize = 4;

/// Reads bodies into memory, and no more of them than there is to be.
#[derive(Debug)]
pub struct Bodies {
    limit: usize,
    timeout: Duration,
    /// Bytes of memory that bodies may still take.
    budget: Semaphore,
}

impl Bodies {
    /// With these limits.
    pub fn new(limits: &Limits) -> Self {
        Bodies {
            limit: limits.body_bytes,
            timeout: limits.body_timeout,
            budget: Semaphore::new(limits.bytes_in_flight.min(Semaphore::MAX_PERMITS)),
        }
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
        let deadline = Instant::now() + self.timeout;
        let mut held = self.take(0)?;
        let mut buffer = Vec::new();
        loop {
            let frame = timeout_at(deadline, body.frame()).await.map_err(|_| Reject::SlowBody)?;
            let Some(frame) = frame else { return Ok((buffer.into(), held)) };
            // Trailers are no part of the body.
            let Ok(data) = frame.map_err(|_| Reject::BrokenBody)?.into_data() else { continue };
            if hint.exact() == Some(data.len() as u64) {
                held.merge(self.take(data.len())?);
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
                held.merge(self.take(capacity - buffer.capacity())?);
                buffer.reserve_exact(capacity - buffer.len());
            }
            buffer.extend_from_slice(&data);
        }
    }

    fn take(&self, bytes: usize) -> Result<SemaphorePermit<'_>, Reject> {
        let bytes = u32::try_from(bytes).map_err(|_| Reject::TooLarge(self.limit))?;
        self.budget.try_acquire_many(bytes).map_err(|_| Reject::TooManyBytes)
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
