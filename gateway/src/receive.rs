//! START HERE: what happens to one request.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, EXPECT, HeaderValue, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use shared::delivery::{Delivery, DeliveryId, HOOK_RESOURCE, HOOK_TIMESTAMP, REQUEST_ID};
use shared::trace::{TraceContext, TraceId};
use tracing::field::{DisplayValue, display};

use crate::body::{Bodies, RequestBody};
use crate::connection_limit::ConnectionLimit;
use crate::duplicate_bodies::SeenBodies;
use crate::head;
use crate::journal::{AppendError, Entry, Journal};
use crate::metrics::Metrics;
use crate::pace::InRequest;
use crate::reject::Reject;
use crate::settings::Config;
use crate::signature::{Signature, Verifier};
use crate::source::TrustedProxies;
use crate::top_sources::Sources;

/// Where deliveries are posted.
pub const PATH: &str = "/api/signals/sentry";

/// Everything a request needs.
pub struct Gateway {
    bodies: Bodies,
    verifier: Verifier,
    journal: Journal,
    metrics: Metrics,
    seen_bodies: SeenBodies,
    trusted_proxies: TrustedProxies,
    sources: Sources,
    connections: Arc<ConnectionLimit>,
}

/// A delivery that is safe: the answer is 202.
#[derive(Debug)]
pub struct Accepted {
    id: DeliveryId,
    /// Its body was not accepted before.
    is_new: bool,
}

impl Gateway {
    /// A gateway that keeps what it takes in `journal`, and counts its answers.
    pub fn new(config: &Config, journal: Journal, metrics: Metrics) -> Self {
        Gateway {
            bodies: Bodies::new(&config.limits),
            verifier: Verifier::new(config.secrets.current(), config.form, config.limits.canonical)
                .timed(metrics.verify_times()),
            journal,
            connections: Arc::new(ConnectionLimit::new(config.limits.connections, metrics.evictions())),
            metrics,
            seen_bodies: SeenBodies::new(config.duplicate_bodies),
            trusted_proxies: config.trusted_proxies.clone(),
            sources: Sources::default(),
        }
    }

    /// Answers one request from `peer`. For the connection's pace, the request lasts until nothing of it is left to read.
    pub async fn handle(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: IpAddr,
        lasts: InRequest,
    ) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let mut body = RequestBody::new(body, &lasts);
        let trace = TraceContext::of_request(&head.headers);
        let trace_id = trace.trace_id();
        let source = self.trusted_proxies.source(peer, &head.headers);
        let result = self.receive(&head, &mut body, trace, source, &lasts).await;
        self.metrics.answered(result.as_ref().err());
        let ticket = lasts.ticket();
        if let Ok(accepted) = &result {
            ticket.accepted(accepted.is_new);
        }
        let had_202 = ticket.had_202();
        let mut response = match result {
            Ok(accepted) => accepted.to_response(),
            Err(reject) => {
                tell(&reject, Some(display(trace_id)), source);
                if matches!(reject, Reject::BadSignature) {
                    self.sources.wrong_signatures.add(source);
                }
                if wants_discarding(&head, &body, &reject) {
                    tokio::spawn(async move {
                        self.bodies.discard(body).await;
                        drop(lasts);
                    });
                }
                reject.to_response()
            }
        };
        if !had_202 && ends_connection(response.status()) {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            *response.version_mut() = head.version; // to HTTP/1.0, hyper would say `keep-alive` as well
        }
        if head.headers.contains_key(TRANSFER_ENCODING) {
            // A Content-Length beside it would be a smuggler's (RFC 9112 section 6.3): somebody in between may have gone by
            // that. hyper drops it unseen, so no such connection is used again.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// The limit of connections.
    pub fn connections(&self) -> &Arc<ConnectionLimit> {
        &self.connections
    }

    /// How many bytes of bodies are in flight now (see [`Bodies::bytes_in_flight`]).
    pub fn bytes_in_flight(&self) -> usize {
        self.bodies.bytes_in_flight()
    }

    /// How many client secrets may have signed a delivery now.
    pub fn secrets_in_use(&self) -> usize {
        self.verifier.secrets_in_use()
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The counts by source.
    pub fn sources(&self) -> Sources {
        self.sources.clone()
    }

    /// Counts and tells an answer to `peer` that was given outside of [`Gateway::handle`].
    pub fn refused(&self, reject: &Reject, peer: IpAddr) {
        tell(reject, None, peer.to_canonical());
        self.metrics.answered(Some(reject));
    }

    /// The way of one delivery through this process. Nothing that was not verified goes on, and nothing is accepted
    /// before it is on disk.
    async fn receive(
        &self,
        head: &Parts,
        body: &mut RequestBody,
        trace: TraceContext,
        source: IpAddr,
        lasts: &InRequest,
    ) -> Result<Accepted, Reject> {
        route(head)?;
        let signature = Signature::of(&head.headers)?;
        if let Some(stall) = self.journal.stall() {
            // At once: Sentry counts an answer that does not come as far worse than a 503.
            let trace = trace.trace_id();
            tracing::warn!(trace.id = %trace, %source, cause = %stall, "a delivery was answered 503 before it was read");
            return Err(Reject::NotJournalled(AppendError::Stalled(stall)));
        }
        let (body, _budget) = self.bodies.read(body).await?;
        if !lasts.ticket().leave() {
            return Err(Reject::TooManyConnections);
        }
        let body = self.verifier.verify(body, &signature).await?;
        self.metrics.signed(body.form());
        let digest = body.digest();
        let header = |name| Some(head.headers.get(name)?.as_bytes());
        let (request_id, resource, timestamp) = (header(REQUEST_ID), header(HOOK_RESOURCE), header(HOOK_TIMESTAMP));
        let delivery = Delivery::received(body.into_bytes(), request_id, resource, timestamp).in_trace(trace);
        if let Some(first) = self.seen_bodies.first_delivery(digest, &delivery.id) {
            self.body_came_again(source);
            let trace = delivery.trace_id();
            tracing::debug!(delivery.id = %first, trace.id = trace, %source, "answered a repeated body as its first delivery");
            return Ok(Accepted { id: first, is_new: false }); // that one is on disk
        }
        let entry = Entry {
            received_at: delivery.received_at.into(),
            meta: delivery.to_journal(),
            body: delivery.body.clone(),
        };
        let (begin, meta) = (Instant::now(), entry.meta.len());
        let appended = self.journal.append(entry).await;
        let place = appended.map_err(|cause| not_journalled(&delivery, source, cause))?; // on disk when this returns
        let first = self.seen_bodies.journalled(digest, &delivery.id);
        if first.as_ref().is_some_and(|first| *first != delivery.id) {
            self.body_came_again(source);
        }
        let bytes = delivery.body.len();
        self.metrics.journalled(meta, bytes, begin.elapsed());
        let (id, trace) = (&delivery.id, delivery.trace_id());
        tracing::debug!(delivery.id = %id, trace.id = trace, %source, %place, bytes, "accepted a delivery");
        Ok(Accepted { id: delivery.id, is_new: first.is_none() })
    }

    fn body_came_again(&self, source: IpAddr) {
        self.metrics.repeated_body();
        self.sources.repeated_bodies.add(source);
    }
}

/// The log's line on a delivery that is lost to its sender through no fault of the sender's.
fn not_journalled(delivery: &Delivery, source: IpAddr, cause: AppendError) -> Reject {
    let (id, trace) = (&delivery.id, delivery.trace_id());
    let words = "a delivery could not be journalled and was answered 503";
    tracing::warn!(delivery.id = %id, trace.id = trace, %source, %cause, "{words}");
    Reject::NotJournalled(cause)
}

/// What the log says of a request that was refused. What is the sender's doing is counted; a line for each would let
/// anybody fill the disk.
fn tell(reject: &Reject, trace: Option<DisplayValue<TraceId>>, source: IpAddr) {
    let (status, reason) = (reject.status().as_u16(), reject.reason());
    if matches!(reject, Reject::NotJournalled(_)) {
        return; // told where it happened
    }
    if reject.is_ours() {
        tracing::warn!(trace.id = trace, %source, reason, "a request was answered {status}: {reject}");
    } else {
        tracing::debug!(trace.id = trace, %source, status, reason, "refused a request");
    }
}

/// Whether the rest of a refused body is worth reading: not where the sender waits for our leave to send it at all, nor
/// where it was too slow already.
fn wants_discarding(head: &Parts, body: &RequestBody, reject: &Reject) -> bool {
    !body.is_end_stream() && !head.headers.contains_key(EXPECT) && !matches!(reject, Reject::SlowBody)
}

/// Tells if a refusal ends a connection that never had a 202. A genuine sender does not get these statuses. A stranger's
/// kept connection only takes the place of another.
fn ends_connection(status: StatusCode) -> bool {
    use StatusCode as Is;
    matches!(status, Is::BAD_REQUEST | Is::UNAUTHORIZED | Is::NOT_FOUND | Is::METHOD_NOT_ALLOWED)
}

/// Path first, then method; before both, what a head must be (see [`crate::head`]).
fn route(head: &Parts) -> Result<(), Reject> {
    head::check(head)?;
    match (head.uri.path(), &head.method) {
        (PATH, &Method::POST) => Ok(()),
        (PATH, _) => Err(Reject::MethodNotAllowed),
        _ => Err(Reject::NotFound),
    }
}

impl Accepted {
    fn to_response(&self) -> Response<Full<Bytes>> {
        let id = &self.id;
        // None of these has a character that JSON would escape.
        let data = [
            r#"{"data":{"deliveryId":""#,
            id.as_str(),
            r#"","signalId":""#,
            &id.signal_id(),
            r#"","issueId":""#,
            &id.issue_id(),
            r#"","status":"accepted"}}"#,
        ];
        let mut response = Response::new(Full::new(Bytes::from(data.concat())));
        *response.status_mut() = StatusCode::ACCEPTED;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}
