//! What Sentry sends, and what comes back.

use anyhow::Context as _;
use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{HeaderMap, Method, Request};
use hyper_util::rt::TokioIo;
use sha2::Sha256;
use tokio::net::TcpStream;

use crate::SECRET;

/// The signature of `signed` by `secret`: HMAC-SHA256 in hex.
pub fn sign(secret: &str, signed: &[u8]) -> String {
    let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    hex::encode(mac.chain_update(signed).finalize().into_bytes())
}

/// A request.
#[derive(Debug, Clone)]
pub struct Post {
    method: Method,
    target: String,
    headers: Vec<(String, String)>,
    body: Bytes,
}

impl Post {
    /// A delivery as Sentry sends it: signed over its bytes, resource `issue`, a `Request-ID` of its own.
    pub fn signed(body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let signature = sign(SECRET, &body);
        Post::unsigned(body).header("Sentry-Hook-Signature", &signature)
    }

    /// The same without a signature.
    pub fn unsigned(body: impl Into<Bytes>) -> Self {
        let post =
            Post { method: Method::POST, target: "/api/signals/sentry".into(), headers: vec![], body: body.into() };
        post.header("Content-Type", "application/json")
            .header("Request-ID", &uuid::Uuid::new_v4().simple().to_string())
            .header("Sentry-Hook-Resource", "issue")
            .header("Sentry-Hook-Timestamp", "1700000000")
    }

    /// A plain GET.
    pub fn get(path: &str) -> Self {
        Post { method: Method::GET, target: path.into(), headers: vec![], body: Bytes::new() }
    }

    /// With this header, instead of the one of that name.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(other, _)| !other.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Without the header of that name.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(other, _)| !other.eq_ignore_ascii_case(name));
        self
    }

    /// To this target, instead of the door's path.
    #[must_use]
    pub fn to(mut self, target: &str) -> Self {
        target.clone_into(&mut self.target);
        self
    }

    /// With this method.
    #[must_use]
    pub fn method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    /// Sends it on a connection of its own, as Sentry does.
    pub async fn send(&self, port: u16) -> Answer {
        self.try_send(port).await.unwrap_or_else(|error| panic!("no answer from port {port}: {error:#}"))
    }

    /// The same, where an answer is not certain.
    ///
    /// # Errors
    /// Where there is none.
    pub async fn try_send(&self, port: u16) -> anyhow::Result<Answer> {
        Connection::open(port).await?.send(self).await
    }
}

/// A connection that is kept alive.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    port: u16,
}

impl Connection {
    /// Connects to a port of this machine.
    ///
    /// # Errors
    /// Where nobody listens.
    pub async fn open(port: u16) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(("127.0.0.1", port)).await.context("cannot connect")?;
        let (sender, connection) = handshake(TokioIo::new(socket)).await?;
        tokio::spawn(connection);
        Ok(Connection { sender, port })
    }

    /// Sends a request, gives the answer.
    ///
    /// # Errors
    /// Where the connection breaks first.
    pub async fn send(&mut self, post: &Post) -> anyhow::Result<Answer> {
        let mut request = Request::builder().method(&post.method).uri(&post.target);
        request = request.header("Host", format!("127.0.0.1:{}", self.port));
        for (name, value) in &post.headers {
            request = request.header(name, value);
        }
        let response = self.sender.send_request(request.body(Full::new(post.body.clone()))?).await?;
        let (head, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// The delivery's id; the answer must be 202.
    pub fn accepted(&self) -> String {
        assert_eq!(self.status, 202, "{self:?}");
        self.json()["data"]["deliveryId"].as_str().expect("a 202 names the delivery").to_owned()
    }

    /// What an error says; it must be `{"error": "..."}` and nothing more.
    pub fn error(&self) -> String {
        let json = self.json();
        let text = json["error"].as_str().unwrap_or_else(|| panic!("no error in {self:?}"));
        assert_eq!(json, serde_json::json!({ "error": text }));
        text.to_owned()
    }
}
