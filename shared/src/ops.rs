//! The ops listener: `/healthz` (the process runs, and no restart would help it), `/readyz` (it can do its
//! work, check by check), `/metrics`.
//!
//! It has [`MAX_CONNECTIONS`], each for one request and for [`CONNECTION_TIMEOUT`]. Beyond them the oldest is closed for a
//! new one. Why: a client that fills this listener must take no file descriptor from the program's own work. It must not
//! keep the operator out who looks for the cause.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

/// Connections that are open at once.
pub const MAX_CONNECTIONS: usize = 64;
/// Time for a request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a whole connection: a client that does not read its answer holds no connection for longer.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// What a process needs to do its work, and whether it has it. Clones share one state.
#[derive(Clone, Default)]
pub struct Readiness {
    checks: Arc<Mutex<BTreeMap<&'static str, Check>>>,
    /// Probes of faults that only a restart of the process mends.
    vital: Arc<Mutex<Vec<Probe>>>,
    /// Checks whose failure is told and does not make the process unready.
    tolerated: &'static [&'static str],
}

/// The state of one check: what is good about it, or what is wrong.
pub type State = Result<String, String>;

/// Asks for a state.
type Probe = Box<dyn Fn() -> State + Send>;

enum Check {
    /// As it was last set.
    Set(State),
    /// Asked each time.
    Probe(Probe),
}

/// One check as `/readyz` shows it.
#[derive(Debug, Serialize)]
struct Shown {
    name: &'static str,
    ok: bool,
    /// Not ok, and still no reason to send nothing here.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    degraded: bool,
    detail: String,
}

impl Readiness {
    /// A state in which these checks may fail without making the process unready.
    pub fn tolerating(tolerated: &'static [&'static str]) -> Self {
        Readiness { tolerated, ..Readiness::default() }
    }

    /// Sets the state of one check.
    pub fn set(&self, name: &'static str, state: State) {
        self.lock().insert(name, Check::Set(state));
    }

    /// The process was asked to stop: from now on nothing new is to be sent to it, whatever else is well.
    pub fn stopping(&self) {
        self.set("shutdown", Err("asked to stop: what is in hand is finished, new work belongs elsewhere".into()));
    }

    /// Has a check asked each time somebody looks.
    pub fn probe(&self, name: &'static str, probe: impl Fn() -> State + Send + 'static) {
        self.lock().insert(name, Check::Probe(Box::new(probe)));
    }

    /// Makes `/healthz` fail while `probe` fails. A probe is for a fault that only a restart of the process mends.
    pub fn vital(&self, probe: impl Fn() -> State + Send + 'static) {
        self.vital.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(probe));
    }

    /// The fault that only a restart mends, if there is one.
    fn broken(&self) -> Option<String> {
        self.vital.lock().unwrap_or_else(PoisonError::into_inner).iter().find_map(|probe| probe().err())
    }

    /// Every check by name, and whether it is well.
    pub fn states(&self) -> Vec<(&'static str, bool)> {
        self.look().1.iter().map(|check| (check.name, check.ok)).collect()
    }

    /// Every check by name, and whether the process can do its work.
    fn look(&self) -> (bool, Vec<Shown>) {
        let shown = |(&name, check): (&&'static str, &Check)| {
            let state = match check {
                Check::Set(state) => state.clone(),
                Check::Probe(probe) => probe(),
            };
            let ok = state.is_ok();
            let degraded = !ok && self.tolerated.contains(&name);
            Shown { name, ok, degraded, detail: state.unwrap_or_else(|wrong| wrong) }
        };
        let checks: Vec<_> = self.lock().iter().map(shown).collect();
        (checks.iter().all(|check| check.ok || check.degraded), checks)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Check>> {
        // A probe that panicked leaves the list as it was.
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers on `listener` until `shutdown`.
pub async fn serve(listener: TcpListener, readiness: Readiness, metrics: Registry, shutdown: CancellationToken) {
    let metrics = Arc::new(metrics);
    let mut open: VecDeque<AbortHandle> = VecDeque::with_capacity(MAX_CONNECTIONS);
    loop {
        let connection = tokio::select! {
            connection = listener.accept() => connection,
            () = shutdown.cancelled() => return,
        };
        let socket = match connection {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of file descriptors, most likely: accepting at once again would only burn CPU.
                tracing::warn!(%error, "cannot accept a connection to the ops listener");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (readiness, metrics) = (readiness.clone(), metrics.clone());
        let answer = move |request| std::future::ready(Ok::<_, Infallible>(answer(&request, &readiness, &metrics)));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .keep_alive(false)
            .serve_connection(TokioIo::new(socket), service_fn(answer));
        open.retain(|connection| !connection.is_finished());
        if open.len() >= MAX_CONNECTIONS
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
        }
        let shutdown = shutdown.clone();
        let task = tokio::spawn(async move {
            tokio::select! {
                // A caller that breaks off harms nobody but itself.
                _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection) => {}
                () = shutdown.cancelled() => {}
            }
        });
        open.push_back(task.abort_handle());
    }
}

/// What `/healthz` says.
pub(crate) const HEALTHY: &str = r#"{"status":"ok"}"#;
const JSON: &str = "application/json";
/// What Prometheus asks for (OpenMetrics 1.0, section 4).
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

fn answer(request: &Request<Incoming>, readiness: &Readiness, metrics: &Registry) -> Response<Full<Bytes>> {
    let (status, kind, body) = match (request.uri().path(), request.method()) {
        ("/healthz" | "/readyz" | "/metrics", method) if !matches!(*method, Method::GET | Method::HEAD) => {
            (StatusCode::METHOD_NOT_ALLOWED, JSON, r#"{"error":"only GET is allowed here"}"#.to_owned())
        }
        ("/healthz", _) => match readiness.broken() {
            None => (StatusCode::OK, JSON, HEALTHY.to_owned()),
            Some(why) => {
                let body = serde_json::json!({ "status": "restart", "error": why });
                (StatusCode::SERVICE_UNAVAILABLE, JSON, body.to_string())
            }
        },
        ("/readyz", _) => {
            let (ready, checks) = readiness.look();
            let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            (status, JSON, serde_json::to_string(&checks).expect("strings and booleans are JSON"))
        }
        ("/metrics", _) => {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, metrics).expect("writing to a string does not fail");
            (StatusCode::OK, OPEN_METRICS, text)
        }
        _ => (StatusCode::NOT_FOUND, JSON, r#"{"error":"here are /healthz, /readyz and /metrics"}"#.to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_stops_is_not_ready_whatever_else_is_well() {
        let readiness = Readiness::tolerating(&["nats"]);
        readiness.set("nats", Err("away".into()));
        readiness.probe("journal", || Ok("takes deliveries".into()));
        assert!(readiness.look().0, "degraded, and ready");
        readiness.stopping();
        let (ready, checks) = readiness.look();
        assert!(!ready && checks.iter().any(|check| check.name == "shutdown" && !check.ok && !check.degraded));
    }

    #[test]
    fn what_only_a_restart_mends_fails_the_health_and_nothing_else() {
        let readiness = Readiness::default();
        readiness.vital(|| Ok("runs".into()));
        assert_eq!(readiness.broken(), None);
        readiness.clone().vital(|| Err("a thread has ended".into()));
        assert_eq!(readiness.broken().as_deref(), Some("a thread has ended"));
        assert!(readiness.look().0);
    }
}
