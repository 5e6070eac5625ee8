//! One HTTP request to a server on the way (no TLS): what `send` and the start of the stack need, and no more.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{CONNECTION, HOST, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// The host and port of an `http://` URL.
///
/// # Errors
/// When it is no URL, or another kind.
pub fn authority(url: &Uri) -> anyhow::Result<(&str, u16)> {
    match (url.scheme_str(), url.host()) {
        (Some("http"), Some(host)) => Ok((host, url.port_u16().unwrap_or(80))),
        (Some("https"), _) => {
            bail!("{url}: this sends plain http:// only; name the gateway itself, not the proxy with the certificate")
        }
        _ => bail!("{url} is no URL to send to; one looks like http://127.0.0.1:8080/api/signals/sentry"),
    }
}

/// Sends `request` (its URI is the whole `http://` URL) on a connection of its own and reads the answer. `limit` holds
/// for connecting, and again for the answer.
///
/// # Errors
/// When nobody listens there, or the time is over.
pub async fn exchange(mut request: Request<Full<Bytes>>, limit: Duration) -> anyhow::Result<Response<Bytes>> {
    let url = request.uri().clone();
    let (host, port) = authority(&url)?;
    let connecting = tokio::time::timeout(limit, TcpStream::connect((host.trim_matches(['[', ']']), port))).await;
    let stream = connecting.map_err(|_| anyhow!("no connection within {limit:?}"))??;
    stream.set_nodelay(true)?;
    let name = url.authority().map_or(host, |authority| authority.as_str());
    request.headers_mut().insert(HOST, HeaderValue::from_str(name)?);
    // On the line itself a server wants the path alone.
    *request.uri_mut() = url.path_and_query().map_or("/", |path| path.as_str()).parse()?;
    let answer = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let exchange = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            Ok::<_, hyper::Error>(Response::from_parts(head, body.collect().await?.to_bytes()))
        };
        tokio::pin!(connection);
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            // Closed by the server: what it sent before may be all there is to read.
            _ = &mut connection => exchange.await,
        }
    };
    let answer = tokio::time::timeout(limit, answer).await;
    answer.map_err(|_| anyhow!("no answer within {limit:?}"))?.context("the connection broke")
}

/// GET, for status pages: the status and the text.
///
/// # Errors
/// As [`exchange`].
pub async fn get(url: &str) -> anyhow::Result<(StatusCode, String)> {
    let request = Request::get(url).header(CONNECTION, "close").body(Full::default())?;
    let answer = exchange(request, Duration::from_secs(2)).await?;
    Ok((answer.status(), String::from_utf8_lossy(answer.body()).into_owned()))
}
