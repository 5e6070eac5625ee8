//! Whose words go out on a connection.
//!
//! Every error here is `{"error": "..."}`. hyper, though, answers by itself what it cannot read as a request: with the right
//! status, without a body, and without a way to change either. Those words are kept back, and ours are said instead (see
//! [`crate::server`]). Nothing has to be guessed about what hyper writes, for two things hold:
//! - All that is not hyper's own is an answer of our service (or the `100 Continue` before it), from the service's call on.
//! - hyper flushes its socket only when everything it has put together so far is written.
//!
//! So after a flush that follows an answer's last byte, until our service is called again, what hyper writes is its own. An
//! answer is never kept back: while one is on its way, all bytes go out.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Response;
use hyper::body::{Body, Frame, SizeHint};

/// Nothing of ours is on its way.
const NOTHING: u8 = 0;
/// A request was handed to our service, and hyper does not have all of its answer.
const DUE: u8 = 1;
/// hyper has all of the answer, and may not have written all of it.
const SAID: u8 = 2;

/// What is on its way to the sender of one connection. hyper handles its requests one after the other.
#[derive(Debug, Default)]
pub struct Said(AtomicU8);

impl Said {
    /// A request was handed over: an answer is due until what this gives is dropped.
    pub fn due(self: &Arc<Self>) -> Due {
        self.0.store(DUE, Ordering::Release);
        Due(self.clone())
    }

    /// Everything that hyper had to write is written.
    pub fn flushed(&self) {
        // Only from `SAID`: an answer that is still due may be flushed piece by piece.
        let _ = self.0.compare_exchange(SAID, NOTHING, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether no answer of ours is on its way.
    pub fn is_all(&self) -> bool {
        self.0.load(Ordering::Acquire) == NOTHING
    }
}

/// While this lives, hyper does not have all of an answer.
#[derive(Debug)]
pub struct Due(Arc<Said>);

impl Due {
    /// The answer, which carries this with its body: hyper drops that once it has put it into its buffer.
    pub fn answer(self, response: Response<Full<Bytes>>) -> Response<Answer> {
        response.map(|body| Answer { body, _due: self })
    }
}

impl Drop for Due {
    fn drop(&mut self) {
        self.0.0.store(SAID, Ordering::Release);
    }
}

/// An answer's body.
#[derive(Debug)]
pub struct Answer {
    body: Full<Bytes>,
    _due: Due,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
