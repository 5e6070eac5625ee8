//! How slow a connection may be between and around its requests: the time-outs for headers and for idling.
//!
//! hyper has one time-out for both, `header_read_timeout`, and it runs from the end of the last answer on. Long enough for
//! a proxy that keeps its connections, it would let headers dribble in for as long; short enough for those, it would close
//! connections that a proxy is about to use again, and Sentry sends nothing twice. So hyper's stays off, and this looks at
//! when the first byte of a request comes. While a request is handled, its own limits hold (see [`crate::body`]).

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, sleep_until};

use crate::connection_limit::Ticket;
use crate::said::Said;
use crate::traffic::Traffic;

/// Where a connection is, and until when it may be there.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Nothing has come yet.
    Fresh { until: Instant },
    /// Nothing of the next request has come.
    Waiting { until: Instant },
    /// A request has begun, and its headers are not whole.
    Headers { until: Instant },
    /// A request is handled, the connection's request of this number.
    Request(u64),
}

/// The pace of one connection.
#[derive(Debug)]
pub struct Pace {
    phase: Mutex<Phase>,
    requests: AtomicU64,
    header_timeout: Duration,
    idle_timeout: Duration,
    ticket: Ticket,
    traffic: Traffic,
}

/// While this lives, a request is handled: its answer is not ready, or the rest of its body is still being read. The next
/// request may begin a moment before this ends, and is then not touched by its end.
#[derive(Debug)]
pub struct InRequest {
    pace: Arc<Pace>,
    number: u64,
    is_chunked: bool,
}

impl Pace {
    /// A connection that was just made. Who has sent nothing yet has no claim to the idle time-out: the headers of a first
    /// request have to come at once.
    pub fn new(header_timeout: Duration, idle_timeout: Duration, ticket: Ticket) -> Arc<Self> {
        let phase = Mutex::new(Phase::Fresh { until: Instant::now() + header_timeout });
        Arc::new(Pace {
            phase,
            requests: AtomicU64::new(0),
            header_timeout,
            idle_timeout,
            ticket,
            traffic: Traffic::new(),
        })
    }

    /// Headers are whole, and the request is handled from here on.
    pub fn request(self: &Arc<Self>, is_chunked: bool) -> InRequest {
        if is_chunked {
            self.traffic.begin_chunked();
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        *self.phase() = Phase::Request(number);
        InRequest { pace: self.clone(), number, is_chunked }
    }

    /// Returns when the connection is somewhere for longer than it may be.
    pub async fn overdue(&self) {
        loop {
            let (phase, now) = (*self.phase(), Instant::now());
            // Looked at again, rather than told, when the next phase begins: so a request costs no timer and no wake-up. No
            // phase that begins later has an earlier deadline than that.
            let next_phase = now + self.header_timeout.min(self.idle_timeout);
            let (deadline, look_at) = match phase {
                Phase::Fresh { until } | Phase::Headers { until } => (Some(until), until),
                Phase::Waiting { until } => (Some(until), until.min(next_phase)),
                Phase::Request(_) => (None, next_phase),
            };
            if deadline.is_some_and(|deadline| deadline <= now) {
                return;
            }
            sleep_until(look_at).await;
        }
    }

    /// Whether it had a request, and nothing of the next one has come.
    pub fn is_between_requests(&self) -> bool {
        matches!(*self.phase(), Phase::Waiting { .. })
    }

    /// Whether a request is handled.
    pub fn is_in_request(&self) -> bool {
        matches!(*self.phase(), Phase::Request(_))
    }

    /// Its place in the queue of those that make room.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// The counts of its chunked body.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    fn bytes_came(&self) {
        let mut phase = self.phase();
        if let Phase::Fresh { .. } | Phase::Waiting { .. } = *phase {
            *phase = Phase::Headers { until: Instant::now() + self.header_timeout };
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        // Nothing that holds this can panic half-way.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InRequest {
    /// Tells if its body is chunked.
    pub fn is_chunked(&self) -> bool {
        self.is_chunked
    }

    /// The pace of its connection.
    pub fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// The place of its connection in the queue of those that make room.
    pub fn ticket(&self) -> &Ticket {
        &self.pace.ticket
    }
}

impl Drop for InRequest {
    fn drop(&mut self) {
        let mut phase = self.pace.phase();
        if matches!(*phase, Phase::Request(number) if number == self.number) {
            *phase = Phase::Waiting { until: Instant::now() + self.pace.idle_timeout };
            self.pace.ticket.enter(); // under the lock, so that no later request is under way
        }
    }
}

/// A socket that tells its [`Pace`] when bytes come, and keeps back what is none of our words (see [`crate::said`]).
#[derive(Debug)]
pub struct Paced<S> {
    /// The socket.
    pub socket: S,
    /// Its pace.
    pub pace: Arc<Pace>,
    /// What is on its way out.
    pub said: Arc<Said>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.pace.traffic.check()?;
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buffer))?;
        let bytes = buffer.filled().len() - before;
        if bytes > 0 {
            self.pace.traffic.read(bytes);
            self.pace.bytes_came();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.said.is_all() {
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
        self.said.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.said.is_all() {
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::connection_limit::ConnectionLimit;

    /// What is left of a refused body may still be read when the next request is whole already.
    #[test]
    fn the_end_of_one_request_is_not_that_of_the_next() {
        let second = Duration::from_secs(1);
        let limit = Arc::new(ConnectionLimit::new(1, Counter::default()));
        let pace = Pace::new(second, second, limit.ticket());
        let (first, next) = (pace.request(false), pace.request(false));
        drop(first);
        pace.bytes_came(); // of the next one's body
        assert!(matches!(*pace.phase(), Phase::Request(_)), "{pace:?}");
        drop(next);
        assert!(matches!(*pace.phase(), Phase::Waiting { .. }), "{pace:?}");
    }
}
