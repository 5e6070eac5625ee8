//! Input from the broker is hostile input. Both programs hold to this page.
//!
//! Anything may stand on a subject or arrive in an inbox: a colleague's tool, a wrong configuration or an attacker put it
//! there. So:
//! - No `expect`, no `assert` and no index rests on what a message says. A time, a number, an id or a place is parsed, and
//!   what does not parse is told, counted and left behind.
//! - Every queue that a sender can fill has a limit. Every wait for an answer has one, too.
//! - A message that cannot be read is set apart by its sequence, with its raw bytes: the worker makes a dead letter of it.
//!   It is met once, and what comes behind it goes on.
//! - async-nats parses a message's headers before this program sees them. Some blocks make it drop the connection, others
//!   make its task panic (<https://github.com/nats-io/nats.rs/pull/1612>). [`headers`] knows these blocks,
//!   [`StoredMessage`] fetches a message without parsing any, and [`crate::link`] replaces a client that has ended.

use std::fmt;
use std::str::FromStr as _;

use async_nats::jetstream::{self, ErrorCode};
use async_nats::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;

/// The header under which a dead letter keeps a header block that cannot be read: base64 of its bytes.
pub const UNREADABLE_BLOCK: &str = "Unreadable-Header-Block";

/// A message as the stream holds it, its header block unparsed.
#[derive(Debug, Clone)]
pub struct StoredMessage {
    /// The subject it was published on. The server has put U+FFFD for bytes that are no UTF-8.
    pub subject: String,
    /// Its place in the stream.
    pub sequence: u64,
    /// When the stream stored it.
    pub stored_at: OffsetDateTime,
    /// The header block, from `NATS/1.0` to the empty line. Empty for a message without headers.
    pub header_block: Bytes,
    /// The body.
    pub body: Bytes,
}

/// The stream could not be asked for a message.
#[derive(Debug, thiserror::Error)]
#[error("cannot fetch a message of stream {stream}: {cause}")]
pub struct FetchError {
    stream: String,
    cause: String,
}

impl StoredMessage {
    /// Fetches the message at `sequence`: `None` where the stream has none there. The stream's leader answers
    /// (STREAM.MSG.GET; a direct get could come from a stale replica).
    ///
    /// # Errors
    /// [`FetchError`]; asking again later is right.
    pub async fn at(context: &jetstream::Context, stream: &str, sequence: u64) -> Result<Option<Self>, FetchError> {
        fetch(context, stream, json!({ "seq": sequence })).await
    }

    /// Fetches the first message from `sequence` on whose subject matches `subject`.
    ///
    /// # Errors
    /// [`FetchError`]; asking again later is right.
    pub async fn first(
        context: &jetstream::Context,
        stream: &str,
        subject: &str,
        sequence: u64,
    ) -> Result<Option<Self>, FetchError> {
        fetch(context, stream, json!({ "seq": sequence, "next_by_subj": subject })).await
    }

    /// The message as the client library would have read it.
    ///
    /// # Errors
    /// The error names the part that the library cannot read.
    pub fn to_message(&self) -> Result<async_nats::Message, Unreadable> {
        let headers = headers(&self.subject, &self.header_block)?;
        Ok(self.with_headers(headers))
    }

    /// The message with its raw header block as its only header, base64 under [`UNREADABLE_BLOCK`]: for one that cannot be
    /// read.
    pub fn to_raw_message(&self) -> async_nats::Message {
        let mut headers = HeaderMap::new();
        headers.insert(UNREADABLE_BLOCK, STANDARD.encode(&self.header_block));
        self.with_headers(Some(headers))
    }

    fn with_headers(&self, headers: Option<HeaderMap>) -> async_nats::Message {
        async_nats::Message {
            subject: self.subject.as_str().into(),
            reply: None,
            payload: self.body.clone(),
            headers,
            status: None,
            description: None,
            length: self.header_block.len() + self.body.len(),
        }
    }
}

/// The first value of a header in a block, as far as that can be read.
pub fn header<'b>(block: &'b [u8], name: &str) -> Option<&'b str> {
    let block = std::str::from_utf8(block).ok()?;
    block.lines().skip(1).find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

/// <https://docs.nats.io/reference/reference-protocols/nats_api_reference>, "Fetch Message From Stream".
async fn fetch(
    context: &jetstream::Context,
    stream: &str,
    request: serde_json::Value,
) -> Result<Option<StoredMessage>, FetchError> {
    let failed = |cause: &dyn fmt::Display| FetchError { stream: stream.to_owned(), cause: cause.to_string() };
    let answer = context.request(format!("STREAM.MSG.GET.{stream}"), &request).await;
    let answer: jetstream::response::Response<Answer> = answer.map_err(|error| failed(&error))?;
    let message = match answer {
        jetstream::response::Response::Ok(Answer { message }) => message,
        jetstream::response::Response::Err { error } if error.error_code() == ErrorCode::NO_MESSAGE_FOUND => {
            return Ok(None);
        }
        jetstream::response::Response::Err { error } => return Err(failed(&error)),
    };
    let decode = |text: String| STANDARD.decode(text).map(Bytes::from).map_err(|error| failed(&error));
    Ok(Some(StoredMessage {
        subject: message.subject,
        sequence: message.seq,
        stored_at: message.time,
        header_block: decode(message.hdrs)?,
        body: decode(message.data)?,
    }))
}

/// The answer to STREAM.MSG.GET, read for the message's headers. The server sends the body, too: no form of the request
/// leaves it out (nats-server 2.15, `JSApiMsgGetRequest`).
#[derive(Debug, Deserialize)]
pub struct StoredHeaders {
    message: OnlyHeaders,
}

#[derive(Debug, Deserialize)]
struct OnlyHeaders {
    #[serde(default)]
    hdrs: String,
}

impl StoredHeaders {
    /// The header block, from `NATS/1.0` to the empty line. Empty for a message without headers.
    pub fn block(&self) -> Bytes {
        STANDARD.decode(&self.message.hdrs).unwrap_or_default().into()
    }
}

#[derive(Deserialize)]
struct Answer {
    message: Message,
}

/// The server leaves out what is empty.
#[derive(Deserialize)]
struct Message {
    subject: String,
    seq: u64,
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
    #[serde(with = "time::serde::rfc3339")]
    time: OffsetDateTime,
}

/// The part of a message that async-nats 0.51 cannot read (`Connection::try_read_op` in its `connection.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// The line that announces the message is no UTF-8.
    #[error("its subject is no UTF-8")]
    Subject,
    /// The library takes white space that NATS allows in a subject for the end of it.
    #[error("its subject holds white space")]
    SpaceInSubject,
    /// The header block is no UTF-8.
    #[error("its headers cannot be read: they are no UTF-8")]
    NotUtf8,
    /// The block does not begin with `NATS/1.0` and, perhaps, a status.
    #[error("its headers cannot be read: their first line is not that of NATS/1.0")]
    Version,
    /// A line has no colon, or a name that is none.
    #[error("its headers cannot be read: a line has no name")]
    Name,
    /// A value holds a carriage return: the library's task panics.
    #[error("its headers cannot be read: a value holds a carriage return")]
    Value,
}

/// Reads a header block as async-nats 0.51 does: `None` for a message without one.
///
/// # Errors
/// The error names the part that the library cannot read.
pub fn headers(subject: &str, block: &[u8]) -> Result<Option<HeaderMap>, Unreadable> {
    // A subject that holds U+FFFD itself is taken for one that is no UTF-8: harmless, as neither is a genuine delivery's.
    if subject.contains(char::REPLACEMENT_CHARACTER) {
        return Err(Unreadable::Subject);
    }
    if block.is_empty() {
        return Ok(None); // announced by MSG, whose words only blanks part
    }
    if subject.split_whitespace().count() != 1 {
        return Err(Unreadable::SpaceInSubject);
    }
    let text = std::str::from_utf8(block).map_err(|_| Unreadable::NotUtf8)?;
    let mut lines = text.lines().peekable();
    let version = lines.next().and_then(|line| line.strip_prefix("NATS/1.0")).ok_or(Unreadable::Version)?;
    let status = version.trim().split(' ').next().unwrap_or_default().trim();
    if !status.is_empty() && StatusCode::from_str(status).is_err() {
        return Err(Unreadable::Version);
    }
    let mut headers = HeaderMap::new();
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let (name, value) = line.split_once(':').ok_or(Unreadable::Name)?;
        let name = HeaderName::from_str(name).map_err(|_| Unreadable::Name)?;
        // A line that begins with white space goes on with the value.
        let mut value = value.trim_start().to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        let value = HeaderValue::from_str(value.trim_end()).map_err(|_| Unreadable::Value)?;
        headers.append(name, value);
    }
    Ok(Some(headers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_judged_as_the_client_judges_them() {
        for (block, judged) in [
            (&b""[..], None),
            (b"NATS/1.0\r\n\r\n", None),
            (b"NATS/1.0 503 No Responders\r\n\r\n", None),
            (b"NATS/1.0\r\nA: b\r\n c\r\nD:e\r\n\r\n", None),
            (b"NATS/1.0\r\nA: b\r\r\n\r\n", None), // the value is trimmed
            (b"NATS/1.0\r\nA: b\rc\r\n\r\n", Some(Unreadable::Value)),
            (b"NATS/1.0\r\nA: b\r\n c\rd\r\n\r\n", Some(Unreadable::Value)),
            (b"NATS/1.0\r\nA\r\n\r\n", Some(Unreadable::Name)),
            (b"NATS/1.0\r\nA B: c\r\n\r\n", Some(Unreadable::Name)),
            (b"NATS/1.0 twelve\r\n\r\n", Some(Unreadable::Version)),
            (b"NATS/2.0\r\n\r\n", Some(Unreadable::Version)),
            (b"\r\n", Some(Unreadable::Version)),
            (b"NATS/1.0\r\nA: \xff\r\n\r\n", Some(Unreadable::NotUtf8)),
        ] {
            assert_eq!(headers("a.b", block).err(), judged, "{}", block.escape_ascii());
        }
        let judged = |subject: &str, block: &[u8]| headers(subject, block).err();
        assert_eq!(judged("a.\u{fffd}", b""), Some(Unreadable::Subject));
        assert_eq!(judged("a.\u{a0}b", b""), None);
        assert_eq!(judged("a.\u{a0}b", b"NATS/1.0\r\n\r\n"), Some(Unreadable::SpaceInSubject));
    }

    #[test]
    fn a_block_that_can_be_read_gives_its_headers() {
        let block = b"NATS/1.0 503 x\r\nA:  b \r\n c\r\nD:e\r\nD: f\r\n\r\n";
        let headers = headers("a.b", block).unwrap().unwrap();
        let values = |name: &str| headers.get_all(name).map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!((values("A"), values("D")), (vec!["b  c".to_owned()], vec!["e".to_owned(), "f".to_owned()]));
    }
}
