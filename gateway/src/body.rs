//! Reading bodies: how large, how slow, and how much memory all of them together may take.

mod request;
mod room;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use tokio::sync::Semaphore;
use tokio::time::{Duration, Instant, timeout, timeout_at};

use crate::reject::Reject;
use crate::settings::Limits;

pub use request::RequestBody;
pub use room::Memory;
use room::{Room, SMALL};

/// How long, and how far beyond the body limit, the rest of a refused body is read and thrown away, so that its sender
/// sees the answer and not a reset connection (RFC 9112 section 9.6).
const DISCARD_FOR: Duration = Duration::from_secs(3);
const DISCARD_BODIES: usize = 4;

/// Refused bodies of unknown or large size that are thrown away at once. Each takes a connection's buffers, which no limit
/// of bytes counts; one after the other, as many senders see their answer in time as can.
const DISCARD_AT_ONCE: usize = 32;

/// Reads bodies into memory, and no more of them than there is to be.
#[derive(Debug)]
pub struct Bodies {
    limit: usize,
    timeout: Duration,
    room: Room,
    discarded_at_once: Semaphore,
}

impl Bodies {
    /// With these limits.
    pub fn new(limits: &Limits) -> Self {
        Bodies {
            limit: limits.body_bytes,
            timeout: limits.body_timeout,
            room: Room::new(limits),
            discarded_at_once: Semaphore::new(DISCARD_AT_ONCE),
        }
    }

    /// How many bytes of bodies are in flight now: in memory, or still to come of those that have, or wait for, their turn.
    pub fn bytes_in_flight(&self) -> usize {
        self.room.in_flight()
    }

    /// Reads a body, within its limits of size, of time, and of what all bodies together may hold in memory (given back
    /// with what comes beside the body).
    ///
    /// # Errors
    /// The limit that was met; or that the body is broken.
    pub async fn read(&self, body: &mut RequestBody) -> Result<(Bytes, Memory<'_>), Reject> {
        let announced = body.size_hint().exact();
        // As much as this many bytes may come; a chunked body does not say.
        let most = announced.map_or(Some(self.limit), |announced| usize::try_from(announced).ok());
        let most = most.filter(|most| *most <= self.limit).ok_or(Reject::TooLarge(self.limit))?;
        let deadline = Instant::now() + self.timeout;
        let mut share = self.room.enter(most, announced.is_some());
        let mut buffer = Vec::new();
        loop {
            let frame = tokio::select! {
                frame = timeout_at(deadline, body.frame()) => frame.map_err(|_| Reject::SlowBody)?,
                () = share.evicted() => return Err(Reject::TooManyBytes),
            };
            let Some(frame) = frame else { return Ok((buffer.into(), share.whole())) };
            // Trailers are no part of the body.
            let Ok(data) = frame?.into_data() else { continue };
            if announced == Some(data.len() as u64) {
                share.grow(data.len(), data.len()).await?;
                return Ok((data, share.whole())); // all of it in one piece: no copy
            }
            let needed = buffer.len() + data.len();
            if needed > self.limit {
                return Err(Reject::TooLarge(self.limit));
            }
            if needed > share.bytes() {
                // Four times what has come, so that little is copied again; what counts is the memory, not how much of it is
                // filled.
                share.grow(needed, needed.saturating_mul(4)).await?;
                buffer.reserve_exact(share.bytes() - buffer.len());
            }
            buffer.extend_from_slice(&data);
        }
    }

    /// Reads and throws away what is left of a body that was answered early, for a bounded time and size.
    pub async fn discard(&self, mut body: RequestBody) {
        let mut left = self.limit.saturating_mul(DISCARD_BODIES);
        let small = body.size_hint().exact().is_some_and(|length| length <= SMALL as u64);
        let discarding = async {
            let _turn = if small { None } else { Some(self.discarded_at_once.acquire().await) };
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
