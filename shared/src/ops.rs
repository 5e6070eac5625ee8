//! The ops listener: `/healthz` (the process runs), `/readyz` (it can do its work, check by check).

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What a process needs to do its work, and whether it has it. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    checks: Arc<Mutex<BTreeMap<&'static str, Result<String, String>>>>,
}

/// One check as `/readyz` shows it.
#[derive(Debug, Serialize)]
struct Check<'a> {
    name: &'a str,
    ok: bool,
    detail: &'a str,
}

impl Readiness {
    /// Sets the state of one check: what is good about it, or what is wrong.
    pub fn set(&self, name: &'static str, state: Result<String, String>) {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner).insert(name, state);
    }

    /// Whether every check is good.
    pub fn is_ready(&self) -> bool {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner).values().all(Result::is_ok)
    }

    /// The checks as a JSON list, by name.
    fn to_json(&self) -> Vec<u8> {
        let checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        let list: Vec<_> = checks
            .iter()
            .map(|(name, state)| Check {
                name,
                ok: state.is_ok(),
                detail: state.as_ref().unwrap_or_else(|wrong| wrong),
            })
            .collect();
        serde_json::to_vec(&list).expect("strings and booleans are JSON")
    }
}

/// Answers on `listener` until `shutdown`.
pub async fn serve(listener: TcpListener, readiness: Readiness, shutdown: CancellationToken) {
    loop {
        let connection = tokio::select! {
            connection = listener.accept() => connection,
            () = shutdown.cancelled() => return,
        };
        let Ok((socket, _)) = connection else {
            // Out of file descriptors, most likely: accepting at once again would only burn CPU.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let readiness = readiness.clone();
        let service = service_fn(move |request| std::future::ready(Ok::<_, Infallible>(answer(&request, &readiness))));
        let connection = http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(socket), service);
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                // A caller that breaks off harms nobody but itself.
                _ = connection => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
}

fn answer(request: &Request<Incoming>, readiness: &Readiness) -> Response<Full<Bytes>> {
    let (status, body) = match request.uri().path() {
        "/healthz" => (StatusCode::OK, br#"{"status":"ok"}"#.to_vec()),
        "/readyz" if readiness.is_ready() => (StatusCode::OK, readiness.to_json()),
        "/readyz" => (StatusCode::SERVICE_UNAVAILABLE, readiness.to_json()),
        _ => (StatusCode::NOT_FOUND, br#"{"error":"here are /healthz and /readyz"}"#.to_vec()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if status != StatusCode::NOT_FOUND && !matches!(*request.method(), Method::GET | Method::HEAD) {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}
