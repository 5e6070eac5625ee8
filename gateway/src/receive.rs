//! START HERE: what happens to one request.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONTENT_TYPE, EXPECT, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use shared::delivery::{Delivery, DeliveryId, HOOK_RESOURCE, HOOK_TIMESTAMP, REQUEST_ID};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Duration, Instant, timeout_at};

use crate::journal::{Entry, Journal};
use crate::reject::Reject;
use crate::settings::{Config, Limits};
use crate::signature::{Signature, Verifier};

/// Where deliveries are posted.
pub const PATH: &str = "/api/signals/sentry";

/// How long, and how far beyond the body limit, the rest of a refused body is read and thrown away, so that its sender
/// sees the answer and not a reset connection (RFC 9112 section 9.6).
const DISCARD_FOR: Duration = Duration::from_secs(3);
const DISCARD_BODIES: usize = 4;

/// Everything a request needs.
pub struct Gateway {
    verifier: Verifier,
    journal: Journal,
    limits: Limits,
    /// Bytes of bodies that may still be taken into memory.
    budget: Semaphore,
}

/// A delivery that is safe: the answer is 202.
#[derive(Debug)]
pub struct Accepted(DeliveryId);

impl Gateway {
    /// A gateway that keeps what it takes in `journal`.
    pub fn new(config: &Config, journal: Journal) -> Self {
        Gateway {
            verifier: Verifier::new(config.secrets.clone(), config.form),
            journal,
            limits: config.limits.clone(),
            budget: Semaphore::new(config.limits.bytes_in_flight.min(Semaphore::MAX_PERMITS)),
        }
    }

    /// Answers one request.
    pub async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, mut body) = request.into_parts();
        match self.receive(&head, &mut body).await {
            Ok(accepted) => accepted.to_response(),
            Err(reject) => {
                if let Reject::NotJournalled(cause) = &reject {
                    tracing::warn!(%cause, "a delivery could not be journalled and was answered 503");
                }
                self.discard_rest(&head, body, &reject);
                reject.to_response()
            }
        }
    }

    /// The way of one delivery through this process. Nothing that was not verified goes on, and nothing is accepted
    /// before it is on disk.
    async fn receive(&self, head: &Parts, body: &mut Incoming) -> Result<Accepted, Reject> {
        route(head)?;
        let signature = Signature::of(&head.headers)?;
        let (body, _budget) = self.read(body).await?;
        let body = self.verifier.verify(body, &signature).await?;
        let header = |name| Some(head.headers.get(name)?.as_bytes());
        let delivery =
            Delivery::received(body.into_bytes(), header(REQUEST_ID), header(HOOK_RESOURCE), header(HOOK_TIMESTAMP));
        let entry = Entry {
            received_at: delivery.received_at.into(),
            meta: delivery.to_journal(),
            body: delivery.body.clone(),
        };
        self.journal.append(entry).await.map_err(Reject::NotJournalled)?; // on disk when this returns
        tracing::debug!(delivery.id = %delivery.id, bytes = delivery.body.len(), "accepted a delivery");
        Ok(Accepted(delivery.id))
    }

    /// Reads the body, within its limits of size, of time, and of what all bodies together may hold in memory (given
    /// back with the permit).
    async fn read(&self, body: &mut Incoming) -> Result<(Bytes, SemaphorePermit<'_>), Reject> {
        let limit = self.limits.body_bytes;
        let declared = body.size_hint().lower();
        if declared > limit as u64 {
            return Err(Reject::TooLarge(limit));
        }
        let deadline = Instant::now() + self.limits.body_timeout;
        let mut held = self.budget.try_acquire_many(0).map_err(|_| Reject::TooManyBytes)?;
        let mut buffer = BytesMut::new();
        loop {
            let frame = timeout_at(deadline, body.frame()).await.map_err(|_| Reject::SlowBody)?;
            let Some(frame) = frame else { return Ok((buffer.freeze(), held)) };
            // Trailers are no part of the body.
            let Ok(data) = frame.map_err(|_| Reject::BrokenBody)?.into_data() else { continue };
            if buffer.len() + data.len() > limit {
                return Err(Reject::TooLarge(limit));
            }
            // Taken as bytes arrive, not as they are announced: who announces much and sends nothing holds nothing.
            let bytes = u32::try_from(data.len()).map_err(|_| Reject::TooLarge(limit))?;
            held.merge(self.budget.try_acquire_many(bytes).map_err(|_| Reject::TooManyBytes)?);
            if buffer.is_empty() && data.len() as u64 == declared {
                return Ok((data, held)); // all of it in one piece: no copy
            }
            buffer.extend_from_slice(&data);
        }
    }

    /// Reads and throws away what is left of a body that was answered early. Not where the sender waits for our leave
    /// to send it at all, nor where it was too slow already.
    fn discard_rest(&self, head: &Parts, mut body: Incoming, reject: &Reject) {
        if body.is_end_stream() || head.headers.contains_key(EXPECT) || matches!(reject, Reject::SlowBody) {
            return;
        }
        let mut left = self.limits.body_bytes.saturating_mul(DISCARD_BODIES);
        tokio::spawn(tokio::time::timeout(DISCARD_FOR, async move {
            while let Some(Ok(frame)) = body.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(rest) = left.checked_sub(length) else { return };
                left = rest;
            }
        }));
    }
}

/// Path first, then method.
fn route(head: &Parts) -> Result<(), Reject> {
    match (head.uri.path(), &head.method) {
        (PATH, &Method::POST) => Ok(()),
        (PATH, _) => Err(Reject::MethodNotAllowed),
        _ => Err(Reject::NotFound),
    }
}

impl Accepted {
    fn to_response(&self) -> Response<Full<Bytes>> {
        let Accepted(id) = self;
        // None of these has a character that JSON would escape.
        let (signal, issue) = (id.signal_id(), id.issue_id());
        let data = format!(
            r#"{{"data":{{"deliveryId":"{id}","signalId":"{signal}","issueId":"{issue}","status":"accepted"}}}}"#
        );
        let mut response = Response::new(Full::new(Bytes::from(data)));
        *response.status_mut() = StatusCode::ACCEPTED;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}
