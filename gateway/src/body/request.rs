//! A request's body, read within the limits of [`crate::traffic`].

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use crate::pace::{InRequest, Pace};
use crate::reject::Reject;

/// A request's body.
#[derive(Debug)]
pub struct RequestBody {
    incoming: Incoming,
    /// Set when the body is chunked.
    pace: Option<Arc<Pace>>,
}

impl RequestBody {
    /// The body of this request.
    pub fn new(incoming: Incoming, request: &InRequest) -> Self {
        RequestBody { incoming, pace: request.is_chunked().then(|| request.pace().clone()) }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Reject;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Some(frame) = ready!(Pin::new(&mut self.incoming).poll_frame(cx)) else { return Poll::Ready(None) };
        let is_taken = |frame: &Frame<Bytes>| match (&self.pace, frame.data_ref()) {
            (Some(pace), Some(data)) => pace.traffic().frame(data.len()),
            _ => true,
        };
        Poll::Ready(Some(frame.ok().filter(is_taken).ok_or(Reject::BrokenBody)))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
