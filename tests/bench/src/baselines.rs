//! What the gateway is compared with that is not a program of its own elsewhere.

use std::convert::Infallible;
use std::net::Ipv4Addr;

use async_nats::jetstream::{self, stream};
use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use sha2::Sha256;
use tokio::net::{TcpListener, TcpStream};
use world::SECRET;

/// As long as the gateway's.
const ANSWER: &str = concat!(
    r#"{"data":{"deliveryId":"7a2a9da4-5265-8c06-815b-133483823384","signalId":"osju16k5nml4s8ihbqha6wgc","#,
    r#""issueId":"fdhcnj0dx41ufyxb89f1xudi","status":"accepted"}}"#
);

/// The least that a server made of hyper can do with a delivery: reads the body and answers 202. The same version of
/// hyper as the gateway's, the same runtime with the same settings, hyper's own buffer sizes, no limits, nothing kept.
/// With `verify`, the body's raw signature is checked as well.
///
/// # Errors
/// Where it cannot listen.
pub(crate) fn bare_hyper(port: u16, verify: bool) -> anyhow::Result<()> {
    let keyed = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("HMAC takes a key of any length");
    tokio::runtime::Runtime::new()?.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        loop {
            let (socket, _) = listener.accept().await?;
            tokio::spawn(connection(socket, verify.then(|| keyed.clone())));
        }
    })
}

async fn connection(socket: TcpStream, keyed: Option<Hmac<Sha256>>) {
    let _ = socket.set_nodelay(true); // as the gateway
    let service = service_fn(|request| answer(request, keyed.as_ref()));
    // The load generator sees connections that break.
    let _ = http1::Builder::new().timer(TokioTimer::new()).serve_connection(TokioIo::new(socket), service).await;
}

async fn answer(request: Request<Incoming>, keyed: Option<&Hmac<Sha256>>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let status = match body.collect().await {
        Ok(body) => match keyed {
            Some(keyed) if !verifies(&head, &body.to_bytes(), keyed) => StatusCode::UNAUTHORIZED,
            _ => StatusCode::ACCEPTED,
        },
        Err(_) => StatusCode::BAD_REQUEST,
    };
    let mut response = Response::new(Full::new(Bytes::from_static(ANSWER.as_bytes())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// The gateway that most people would write first: verifies the raw signature, publishes to JetStream, and answers 202 when the broker
/// has acknowledged. Nothing is synced: the broker does that every two minutes.
///
/// # Errors
/// Fails if it cannot listen, or if the broker refuses the stream.
pub(crate) fn minimal_gateway(port: u16, nats: &str) -> anyhow::Result<()> {
    let keyed = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("HMAC takes a key of any length");
    tokio::runtime::Runtime::new()?.block_on(async {
        let jetstream = jetstream::new(async_nats::connect(nats).await?);
        let subjects = vec!["signals.sentry.*".to_owned()];
        let config = stream::Config { name: "SIGNALS".to_owned(), subjects, ..stream::Config::default() };
        jetstream.get_or_create_stream(config).await?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        loop {
            let (socket, _) = listener.accept().await?;
            let (jetstream, keyed) = (jetstream.clone(), keyed.clone());
            tokio::spawn(async move {
                let _ = socket.set_nodelay(true);
                let service = service_fn(|request| publish(request, &keyed, &jetstream));
                // The load generator sees connections that break.
                let _ = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
            });
        }
    })
}

async fn publish(
    request: Request<Incoming>,
    keyed: &Hmac<Sha256>,
    jetstream: &jetstream::Context,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let status = match body.collect().await {
        Ok(body) => {
            let body = body.to_bytes();
            match verifies(&head, &body, keyed) {
                false => StatusCode::UNAUTHORIZED,
                true if is_acknowledged(jetstream, body).await => StatusCode::ACCEPTED,
                true => StatusCode::SERVICE_UNAVAILABLE,
            }
        }
        Err(_) => StatusCode::BAD_REQUEST,
    };
    let mut response = Response::new(Full::new(Bytes::from_static(ANSWER.as_bytes())));
    *response.status_mut() = status;
    Ok(response)
}

async fn is_acknowledged(jetstream: &jetstream::Context, body: Bytes) -> bool {
    let sent = jetstream.publish("signals.sentry.error", body).await;
    match sent {
        Ok(sent) => sent.await.is_ok(),
        Err(_) => false,
    }
}

fn verifies(head: &hyper::http::request::Parts, body: &[u8], keyed: &Hmac<Sha256>) -> bool {
    let mut tag = [0; 32];
    let signature = head.headers.get("sentry-hook-signature");
    let decoded = signature.is_some_and(|value| hex::decode_to_slice(value, &mut tag).is_ok());
    decoded && keyed.clone().chain_update(body).verify_slice(&tag).is_ok()
}
