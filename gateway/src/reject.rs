//! Why a delivery was not taken: what its sender reads, and the status that falls out of it.

use std::fmt;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};

use crate::journal::AppendError;

/// Seconds after which it makes sense to come back.
const RETRY_AFTER_SECONDS: &str = "5";

/// Why a delivery was not taken. `Display` is for the sender: no internals, no secret, no body.
#[derive(Debug)]
pub enum Reject {
    /// No such path.
    NotFound,
    /// The path is right, the method is not.
    MethodNotAllowed,
    /// No signature header.
    SignatureMissing,
    /// The signature header is not one value of 64 hex digits.
    SignatureMalformed,
    /// No secret gives this signature over this body.
    BadSignature,
    /// The body is larger than it may be: this many bytes.
    TooLarge(usize),
    /// The request line or a header is not HTTP.
    BrokenHeaders,
    /// The request line and the headers are larger, or more, than they may be.
    LargeHeaders,
    /// The headers took too long.
    SlowHeaders,
    /// The body took too long.
    SlowBody,
    /// The body ended early, was framed wrongly, or came in chunks that are too small.
    BrokenBody,
    /// Too many connections.
    TooManyConnections,
    /// Too many bytes of bodies in flight.
    TooManyBytes,
    /// Too many signatures wait for their canonical form.
    VerifyBusy,
    /// It could not be made durable.
    NotJournalled(AppendError),
    /// A transfer coding other than `chunked`.
    UnknownCoding,
}

impl Reject {
    /// One of each, whatever it holds: the closed set of reasons that metrics have.
    pub const ALL: [Reject; 16] = [
        Reject::NotFound,
        Reject::MethodNotAllowed,
        Reject::SignatureMissing,
        Reject::SignatureMalformed,
        Reject::BadSignature,
        Reject::TooLarge(0),
        Reject::BrokenHeaders,
        Reject::LargeHeaders,
        Reject::SlowHeaders,
        Reject::SlowBody,
        Reject::BrokenBody,
        Reject::TooManyConnections,
        Reject::TooManyBytes,
        Reject::VerifyBusy,
        Reject::NotJournalled(AppendError::ShutDown),
        Reject::UnknownCoding,
    ];

    /// Its place in [`Reject::ALL`].
    pub fn place(&self) -> usize {
        match self {
            Reject::NotFound => 0,
            Reject::MethodNotAllowed => 1,
            Reject::SignatureMissing => 2,
            Reject::SignatureMalformed => 3,
            Reject::BadSignature => 4,
            Reject::TooLarge(_) => 5,
            Reject::BrokenHeaders => 6,
            Reject::LargeHeaders => 7,
            Reject::SlowHeaders => 8,
            Reject::SlowBody => 9,
            Reject::BrokenBody => 10,
            Reject::TooManyConnections => 11,
            Reject::TooManyBytes => 12,
            Reject::VerifyBusy => 13,
            Reject::NotJournalled(_) => 14,
            Reject::UnknownCoding => 15,
        }
    }

    /// The answer's status.
    pub fn status(&self) -> StatusCode {
        match self {
            Reject::NotFound => StatusCode::NOT_FOUND,
            Reject::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Reject::SignatureMissing | Reject::SignatureMalformed | Reject::BadSignature => StatusCode::UNAUTHORIZED,
            Reject::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Reject::SlowHeaders | Reject::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Reject::BrokenHeaders | Reject::BrokenBody => StatusCode::BAD_REQUEST,
            Reject::LargeHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Reject::TooManyConnections | Reject::TooManyBytes | Reject::VerifyBusy | Reject::NotJournalled(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Reject::UnknownCoding => StatusCode::NOT_IMPLEMENTED,
        }
    }

    /// Whether it is we who fail: a delivery may be lost to its sender, and somebody here should know.
    pub fn is_ours(&self) -> bool {
        self.status() == StatusCode::SERVICE_UNAVAILABLE // the sender can do nothing about it; 501 is the sender's doing
    }

    /// Its name in metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Reject::NotFound => "not_found",
            Reject::MethodNotAllowed => "method_not_allowed",
            Reject::SignatureMissing => "signature_missing",
            Reject::SignatureMalformed => "signature_malformed",
            Reject::BadSignature => "signature_wrong",
            Reject::TooLarge(_) => "body_too_large",
            Reject::BrokenHeaders => "headers_broken",
            Reject::LargeHeaders => "headers_too_large",
            Reject::SlowHeaders => "headers_slow",
            Reject::SlowBody => "body_slow",
            Reject::BrokenBody => "body_broken",
            Reject::TooManyConnections => "too_many_connections",
            Reject::TooManyBytes => "too_many_bytes",
            Reject::VerifyBusy => "verify_busy",
            Reject::NotJournalled(_) => "not_journalled",
            Reject::UnknownCoding => "coding_unknown",
        }
    }

    /// The header that goes with the status.
    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self.status() {
            StatusCode::METHOD_NOT_ALLOWED => Some((ALLOW, HeaderValue::from_static("POST"))),
            StatusCode::UNAUTHORIZED => {
                let challenge = r#"HMAC-SHA256 realm="sentry", header="Sentry-Hook-Signature""#;
                Some((WWW_AUTHENTICATE, HeaderValue::from_static(challenge)))
            }
            StatusCode::REQUEST_TIMEOUT => Some((CONNECTION, HeaderValue::from_static("close"))),
            StatusCode::SERVICE_UNAVAILABLE => Some((RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS))),
            _ => None,
        }
    }

    /// The answer: `{"error": "..."}`.
    pub fn to_response(&self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.to_json()));
        *response.status_mut() = self.status();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response.headers_mut().extend(self.header());
        response
    }

    /// The answer as bytes on the wire (RFC 9112), for a connection that no HTTP server holds any more, or yet. It is
    /// closed afterwards.
    pub fn to_wire(&self) -> Vec<u8> {
        let (status, body) = (self.status(), self.to_json());
        let reason = status.canonical_reason().unwrap_or_default();
        let mut head = format!("HTTP/1.1 {} {reason}\r\n", status.as_u16());
        if let Some((name, value)) = self.header().filter(|(name, _)| name != CONNECTION) {
            let value = value.to_str().expect("the values above are ASCII");
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let length = body.len();
        head.push_str(&format!(
            "content-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
        ));
        [head.as_bytes(), &body].concat()
    }

    fn to_json(&self) -> Bytes {
        serde_json::json!({ "error": self.to_string() }).to_string().into()
    }
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reject::NotFound => f.write_str("nothing here: deliveries go to POST /api/signals/sentry"),
            Reject::MethodNotAllowed => f.write_str("only POST is allowed here"),
            Reject::SignatureMissing => f.write_str("the header Sentry-Hook-Signature is missing"),
            Reject::SignatureMalformed => {
                f.write_str("the header Sentry-Hook-Signature must be one value of 64 hex digits, without a prefix")
            }
            Reject::BadSignature => {
                f.write_str("the signature does not match: is the client secret here the one of this integration?")
            }
            Reject::TooLarge(limit) => write!(f, "the body is larger than the {limit} bytes that are taken here"),
            Reject::BrokenHeaders => {
                f.write_str("the request line or a header is malformed, or there is not one valid Host")
            }
            Reject::LargeHeaders => {
                f.write_str("the request line and the headers are larger, or more, than is taken here")
            }
            Reject::SlowHeaders => f.write_str("the headers took too long to arrive"),
            Reject::SlowBody => f.write_str("the body took too long to arrive"),
            Reject::BrokenBody => {
                f.write_str("the body ended early, was framed wrongly, or came in chunks that are too small")
            }
            Reject::TooManyConnections => f.write_str("too many connections at the moment"),
            Reject::TooManyBytes => f.write_str("too many deliveries in flight at the moment"),
            Reject::VerifyBusy => f.write_str("too many signatures wait to be checked at the moment"),
            Reject::NotJournalled(_) => f.write_str("the delivery could not be stored at the moment"),
            Reject::UnknownCoding => f.write_str("no transfer coding but chunked is understood here"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_place() {
        for (place, reject) in Reject::ALL.iter().enumerate() {
            assert_eq!(reject.place(), place, "{reject:?}");
        }
    }
}
