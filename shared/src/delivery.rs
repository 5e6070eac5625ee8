//! One delivery: its identity, the ids derived from it, and how it travels on the stream.

use std::borrow::Cow;
use std::fmt;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime, UtcOffset};
use tracing::field::{DisplayValue, display};
use twox_hash::XxHash3_128;
use uuid::Uuid;

use crate::receipt::{RECEIPT_TO, ReceiptTo};
use crate::trace::{TRACEPARENT, TRACESTATE, TraceContext, TraceId};

/// Message header: the [`DeliveryId`].
pub const DELIVERY_ID: &str = "Delivery-Id";
/// Message header: when the gateway had read the delivery, RFC 3339.
pub const RECEIVED_AT: &str = "Received-At";
/// Request and message header: Sentry's id of one attempt to deliver.
pub const REQUEST_ID: &str = "Request-Id";
/// Request and message header: what Sentry says the delivery is about. Unsigned.
pub const HOOK_RESOURCE: &str = "Sentry-Hook-Resource";
/// Request and message header: when Sentry sent it, in seconds since 1970. Unsigned.
pub const HOOK_TIMESTAMP: &str = "Sentry-Hook-Timestamp";

/// Longest time that a delivery may wait in a gateway's journal before the stream stores it. The stream's own default age
/// is 30 days.
const OLDEST: Duration = Duration::days(40);
/// Furthest that the gateway's clock may be ahead of the stream's.
const CLOCKS_APART: Duration = Duration::minutes(10);

/// Longest sender's header value that travels along; a longer one is left out.
const HEADER_VALUE_MAX: usize = 200;

/// The names as async-nats keeps them, made once: from a string it makes, checks and allocates them anew for each message.
mod name {
    use async_nats::HeaderName;

    pub(super) static DELIVERY_ID: HeaderName = HeaderName::from_static(super::DELIVERY_ID);
    pub(super) static RECEIVED_AT: HeaderName = HeaderName::from_static(super::RECEIVED_AT);
    pub(super) static REQUEST_ID: HeaderName = HeaderName::from_static(super::REQUEST_ID);
    pub(super) static HOOK_RESOURCE: HeaderName = HeaderName::from_static(super::HOOK_RESOURCE);
    pub(super) static HOOK_TIMESTAMP: HeaderName = HeaderName::from_static(super::HOOK_TIMESTAMP);
    pub(super) static RECEIPT_TO: HeaderName = HeaderName::from_static(super::RECEIPT_TO);
    pub(super) static TRACEPARENT: HeaderName = HeaderName::from_static(super::TRACEPARENT);
    pub(super) static TRACESTATE: HeaderName = HeaderName::from_static(super::TRACESTATE);
}

/// More bytes than the headers of a message ever take: what a stream's server must take beside the largest body.
pub const HEADERS_MAX: usize = 2048;

/// What makes a delivery the same delivery, through redelivery, repeat and replay.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryId(String);

impl DeliveryId {
    /// The identity of a request. With a `Request-ID` it is a digest of that and the body (UUIDv8, RFC 9562 section
    /// 5.8), so that the same HTTP request sent again by a proxy is one delivery; Sentry itself makes a new
    /// `Request-ID` at every attempt. Without one it is a fresh UUIDv7.
    pub fn of_request(request_id: Option<&[u8]>, body: &[u8]) -> Self {
        let uuid = match request_id {
            Some(request_id) => digest("request", request_id, body),
            None => Uuid::now_v7(),
        };
        DeliveryId(uuid.hyphenated().to_string())
    }

    /// The identity of a message that somebody else put on the stream without one: its place there and its body, so
    /// that reading it again finds the same.
    pub fn of_foreign_message(stream_sequence: u64, body: &[u8]) -> Self {
        DeliveryId(digest("foreign message", &stream_sequence.to_be_bytes(), body).hyphenated().to_string())
    }

    /// Takes an id back from a header: 1 to 128 letters, digits, `-` or `_`. Anything else is none.
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        ((1..=128).contains(&text.len()) && text.bytes().all(allowed)).then(|| DeliveryId(text.to_owned()))
    }

    /// Its 128 bits. `None` for an id that is no UUID, as another program's may be.
    pub fn to_bits(&self) -> Option<u128> {
        Uuid::try_parse(&self.0).ok().map(|uuid| uuid.as_u128())
    }

    /// The id of these 128 bits: a UUID with hyphens, as [`DeliveryId::of_request`] makes them.
    pub fn from_bits(bits: u128) -> Self {
        DeliveryId(Uuid::from_u128(bits).hyphenated().to_string())
    }

    /// As it stands in headers, answers, logs and the ledger.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id of the signal that this delivery becomes.
    pub fn signal_id(&self) -> String {
        self.derived("signal")
    }

    /// The id of the issue that this delivery becomes.
    pub fn issue_id(&self) -> String {
        self.derived("issue")
    }

    /// 24 characters `[a-z][a-z0-9]{23}`, the shape of Loop's cuid2 ids: 123 bits of a digest, so that the gateway can
    /// name a row in its answer that the worker writes later.
    fn derived(&self, what: &str) -> String {
        let digest = Sha256::new().chain_update(what).chain_update([0]).chain_update(&self.0).finalize();
        let digest = u128::from_be_bytes(digest[..16].try_into().expect("SHA-256 has 32 bytes"));
        // Divided by 26 * 36^11 once, because a division of 128 bits costs as much as the 24 of 64 bits together.
        let first = 26 * 36_u128.pow(11);
        let half = |part: u128| u64::try_from(part % 36_u128.pow(12)).expect("less than 2^63");
        let (mut low, mut high) = (half(digest % first), half(digest / first));
        let take = |left: &mut u64, base: u8| {
            let digit = u8::try_from(*left % u64::from(base)).expect("a remainder below 36");
            *left /= u64::from(base);
            char::from(if digit < 26 { b'a' + digit } else { b'0' + digit - 26 })
        };
        let mut id = String::with_capacity(24);
        id.push(take(&mut low, 26));
        id.extend(std::iter::repeat_with(|| take(&mut low, 36)).take(11));
        id.extend(std::iter::repeat_with(|| take(&mut high, 36)).take(12));
        id
    }
}

impl fmt::Display for DeliveryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A UUIDv8 over what `kind` of key, the key (length first, so that no two pairs read the same) and the body.
///
/// Of the body, its XXH3 goes in (128 bits): a second SHA-256 over all of it would cost each delivery as much as its
/// signature does. It only has to tell apart what comes, not to withstand a forger: two bodies that collide would both
/// have to be signed by the client secret and sent under one `Request-ID`, which Sentry makes anew for each.
fn digest(kind: &str, key: &[u8], body: &[u8]) -> Uuid {
    let digest = Sha256::new()
        .chain_update(kind)
        .chain_update((key.len() as u64).to_be_bytes())
        .chain_update(key)
        .chain_update(XxHash3_128::oneshot(body).to_be_bytes())
        .finalize();
    uuid::Builder::from_custom_bytes(digest[..16].try_into().expect("SHA-256 has 32 bytes")).into_uuid()
}

/// The last token of a delivery's subject, from the unsigned `Sentry-Hook-Resource`. It routes; it never decides what
/// a delivery means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource(String);

impl Resource {
    /// A token of `[a-z0-9_]{1,40}`; anything else is `unknown`.
    pub fn of(header: Option<&str>) -> Self {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        let token = |name: &&str| (1..=40).contains(&name.len()) && name.bytes().all(allowed);
        Resource(header.filter(token).unwrap_or("unknown").to_owned())
    }

    /// The token.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A verified delivery, as the gateway took it and the worker gets it back.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Its identity.
    pub id: DeliveryId,
    /// When the gateway had read it, to the microsecond (what PostgreSQL keeps).
    pub received_at: OffsetDateTime,
    /// Where it is routed.
    pub resource: Resource,
    /// Sentry's `Request-ID`, where it was sent and is plain ASCII.
    pub request_id: Option<String>,
    /// Sentry's `Sentry-Hook-Timestamp`, likewise.
    pub hook_timestamp: Option<String>,
    /// The trace that it belongs to. None where an older gateway took it, or somebody else published it.
    pub trace: Option<TraceContext>,
    /// The raw request body, byte for byte.
    pub body: Bytes,
}

impl Delivery {
    /// A delivery that was just read. Header values are the sender's; what cannot travel in a header is left out.
    pub fn received(
        body: Bytes,
        request_id: Option<&[u8]>,
        hook_resource: Option<&[u8]>,
        hook_timestamp: Option<&[u8]>,
    ) -> Self {
        let now = OffsetDateTime::now_utc();
        Delivery {
            id: DeliveryId::of_request(request_id, &body),
            received_at: now.replace_nanosecond(now.microsecond() * 1000).expect("microseconds * 1000 are in range"),
            resource: Resource::of(hook_resource.and_then(travelling).as_deref()),
            request_id: request_id.and_then(travelling),
            hook_timestamp: hook_timestamp.and_then(travelling),
            trace: None,
            body,
        }
    }

    /// As part of this trace.
    #[must_use]
    pub fn in_trace(self, trace: TraceContext) -> Self {
        Delivery { trace: Some(trace), ..self }
    }

    /// For the field `trace.id`, which every log line about this delivery has.
    pub fn trace_id(&self) -> Option<DisplayValue<TraceId>> {
        self.trace.as_ref().map(|trace| display(trace.trace_id()))
    }

    /// The subject it is published on: `signals.sentry.<resource>`.
    pub fn subject(&self) -> String {
        [crate::stream::SUBJECT_PREFIX, ".", self.resource.as_str()].concat()
    }

    /// The message headers it is published with. `Nats-Msg-Id` is the id itself at the first publish, so that JetStream
    /// stores it once however often that is tried; a `repeat` for want of a receipt adds `.<n>`, so that the duplicate
    /// window cannot swallow it.
    pub fn headers(&self, repeat: u32, receipt_to: &ReceiptTo) -> HeaderMap {
        let mut headers = HeaderMap::new();
        match repeat {
            0 => headers.insert(NATS_MESSAGE_ID, self.id.as_str()),
            n => headers.insert(NATS_MESSAGE_ID, format!("{}.{n}", self.id)),
        }
        headers.insert(name::DELIVERY_ID.clone(), self.id.as_str());
        headers.insert(name::RECEIVED_AT.clone(), rfc3339(self.received_at));
        headers.insert(name::HOOK_RESOURCE.clone(), self.resource.as_str());
        headers.insert(name::RECEIPT_TO.clone(), receipt_to.as_str());
        if let Some(trace) = &self.trace {
            headers.insert(name::TRACEPARENT.clone(), trace.to_traceparent());
        }
        let optional = [
            (&name::REQUEST_ID, self.request_id.as_deref()),
            (&name::HOOK_TIMESTAMP, self.hook_timestamp.as_deref()),
            (&name::TRACESTATE, self.trace.as_ref().and_then(TraceContext::state)),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                headers.insert(name.clone(), value);
            }
        }
        headers
    }

    /// All but the body, as the journal keeps it: JSON.
    pub fn to_journal(&self) -> Bytes {
        let kept = Kept {
            id: self.id.as_str().into(),
            received_at: self.received_at,
            resource: self.resource.as_str().into(),
            request_id: self.request_id.as_deref().map(Into::into),
            hook_timestamp: self.hook_timestamp.as_deref().map(Into::into),
            traceparent: self.trace.as_ref().map(|trace| trace.to_traceparent().into()),
            tracestate: self.trace.as_ref().and_then(TraceContext::state).map(Into::into),
        };
        let mut json = Vec::with_capacity(512); // enough for what Sentry sends
        serde_json::to_writer(&mut json, &kept).expect("strings and a date are JSON");
        json.into()
    }

    /// Takes a delivery back from the journal.
    ///
    /// # Errors
    /// Where `kept` is not what [`Delivery::to_journal`] of any version wrote.
    pub fn from_journal(kept: &[u8], body: Bytes) -> Result<Self, NotADelivery> {
        let kept: Kept<'_> = serde_json::from_slice(kept).map_err(|_| NotADelivery)?;
        Ok(Delivery {
            id: DeliveryId::parse(&kept.id).ok_or(NotADelivery)?,
            received_at: kept.received_at,
            resource: Resource::of(Some(&kept.resource)),
            request_id: kept.request_id.map(Cow::into_owned),
            hook_timestamp: kept.hook_timestamp.map(Cow::into_owned),
            trace: trace(kept.traceparent.as_deref(), kept.tracestate.as_deref()),
            body,
        })
    }

    /// Takes a delivery back from a message. Never fails: what a foreign message lacks follows from its place on the
    /// stream (`stream_sequence`) and the time at which the stream stored it (`stored_at`).
    pub fn from_message(message: &async_nats::Message, stream_sequence: u64, stored_at: OffsetDateTime) -> Self {
        let header = |name: &str| Some(message.headers.as_ref()?.get(name)?.as_str());
        let received_at = header(RECEIVED_AT).and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
        let received_at = received_at.map(|said| held_to(said, stored_at));
        let id = header(DELIVERY_ID).and_then(DeliveryId::parse);
        Delivery {
            id: id.unwrap_or_else(|| DeliveryId::of_foreign_message(stream_sequence, &message.payload)),
            received_at: received_at.unwrap_or(stored_at),
            resource: Resource::of(message.subject.as_str().rsplit('.').next()),
            request_id: header(REQUEST_ID).map(str::to_owned),
            hook_timestamp: header(HOOK_TIMESTAMP).map(str::to_owned),
            trace: trace_of_message(message.headers.as_ref()),
            body: message.payload.clone(),
        }
    }
}

/// Limits a message's own time by the stream's clock. The gateway received a delivery at most [`OLDEST`] before the stream
/// stored it, and not later. The gateway's clock may be ahead by [`CLOCKS_APART`].
fn held_to(said: OffsetDateTime, stored_at: OffsetDateTime) -> OffsetDateTime {
    let (earliest, latest) = (stored_at.saturating_sub(OLDEST), stored_at.saturating_add(CLOCKS_APART));
    // Compared first: a time near the end of the calendar has no UTC.
    said.clamp(earliest, latest).to_offset(UtcOffset::UTC)
}

/// The trace that a message's headers name.
pub fn trace_of_message(headers: Option<&HeaderMap>) -> Option<TraceContext> {
    let header = |name: &str| Some(headers?.get(name)?.as_str());
    trace(header(TRACEPARENT), header(TRACESTATE))
}

fn trace(parent: Option<&str>, state: Option<&str>) -> Option<TraceContext> {
    Some(TraceContext::parse(parent?)?.with_state(state))
}

/// What the journal keeps of a delivery beside its body. What versions before did not write is optional, and what later
/// ones add is passed over.
#[derive(Serialize, Deserialize)]
struct Kept<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(with = "time::serde::rfc3339")]
    received_at: OffsetDateTime,
    #[serde(borrow)]
    resource: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    request_id: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    hook_timestamp: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    traceparent: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    tracestate: Option<Cow<'a, str>>,
}

/// A header block of the journal that no version known here wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the journal's entry does not say what it is; was it written by a newer version?")]
pub struct NotADelivery;

/// RFC 3339, UTC.
fn rfc3339(at: OffsetDateTime) -> String {
    let mut text = Vec::with_capacity(32);
    at.format_into(&mut text, &Rfc3339).expect("a date of our own clock has a year of four digits");
    String::from_utf8(text).expect("RFC 3339 is ASCII")
}

/// A header value that can travel: printable ASCII of bounded length.
fn travelling(value: &[u8]) -> Option<String> {
    let printable = |byte: &u8| matches!(byte, b' '..=b'~');
    let fits = value.len() <= HEADER_VALUE_MAX && value.iter().all(printable);
    fits.then(|| String::from_utf8(value.to_vec()).expect("ASCII is UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_request_is_the_same_delivery() {
        let id = |request_id: &[u8], body: &[u8]| DeliveryId::of_request(Some(request_id), body);
        assert_eq!(id(b"r1", b"body"), id(b"r1", b"body"));
        assert_ne!(id(b"r1", b"body"), id(b"r2", b"body"));
        assert_ne!(id(b"r1", b"body"), id(b"r1", b"Body"));
        assert_ne!(id(b"r1", b"body"), id(b"r1b", b"ody")); // the border between the two counts
        assert_ne!(DeliveryId::of_request(None, b"body"), DeliveryId::of_request(None, b"body"));
    }

    #[test]
    fn headers_never_take_more_than_is_said() {
        let long = "x".repeat(10 * HEADER_VALUE_MAX);
        for length in [HEADER_VALUE_MAX, long.len()] {
            let value = Some(&long.as_bytes()[..length]);
            let delivery = Delivery::received(Bytes::new(), value, Some("a".repeat(40).as_bytes()), value);
            let headers = delivery.headers(u32::MAX, &ReceiptTo::new(&"g".repeat(64), "9".repeat(64)));
            let line = |name: &str, value: &str| name.len() + value.len() + ": \r\n".len();
            let lines =
                headers.iter().flat_map(|(name, values)| values.iter().map(move |it| line(name.as_ref(), it.as_str())));
            let bytes = "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>();
            assert!(bytes + 200 < HEADERS_MAX, "{bytes}, with room for one more");
            assert_eq!(
                bytes > 2 * HEADER_VALUE_MAX,
                length == HEADER_VALUE_MAX,
                "{bytes}: what is too long is left out"
            );
        }
    }

    #[test]
    fn an_id_is_a_uuid_and_parses_back() {
        for (id, version) in [(DeliveryId::of_request(Some(b"r"), b""), 8), (DeliveryId::of_request(None, b""), 7)] {
            assert_eq!(Uuid::parse_str(id.as_str()).unwrap().get_version_num(), version);
            assert_eq!(id.to_bits().map(DeliveryId::from_bits).as_ref(), Some(&id));
            assert_eq!(DeliveryId::parse(id.as_str()), Some(id));
        }
        for bad in ["", "a b", "é", "a\n", &"x".repeat(129)] {
            assert_eq!(DeliveryId::parse(bad), None);
        }
    }

    #[test]
    fn derived_ids_have_the_shape_of_cuid2() {
        for n in 0..1000_u32 {
            let id = DeliveryId::of_request(Some(&n.to_be_bytes()), b"body");
            for derived in [id.signal_id(), id.issue_id()] {
                assert_eq!(derived.len(), 24);
                assert!(derived.starts_with(|first: char| first.is_ascii_lowercase()));
                assert!(derived.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()));
            }
            assert_ne!(id.signal_id(), id.issue_id());
        }
    }

    #[test]
    fn derived_ids_never_change() {
        // A worker of a later version must name the rows that a gateway of this version promised.
        let id = DeliveryId::parse("7a2a9da4-5265-8c06-815b-133483823384").unwrap();
        assert_eq!(id.signal_id(), "osju16k5nml4s8ihbqha6wgc");
        assert_eq!(id.issue_id(), "fdhcnj0dx41ufyxb89f1xudi");
        // The same request must be the same delivery for gateways of two versions.
        let id = DeliveryId::of_request(Some(b"request"), b"body");
        assert_eq!(id.as_str(), "d9e133ca-d33a-83b5-8387-bf969228eb93");
    }

    #[test]
    fn a_resource_is_a_token_or_unknown() {
        for good in ["issue", "event_alert", "a1"] {
            assert_eq!(Resource::of(Some(good)).as_str(), good);
        }
        let long = "x".repeat(41);
        for bad in [None, Some(""), Some("Issue"), Some("a.b"), Some("*"), Some("a b"), Some(">"), Some(long.as_str())]
        {
            assert_eq!(Resource::of(bad).as_str(), "unknown");
        }
    }

    #[test]
    fn a_delivery_comes_back_from_its_message() {
        let sent = Delivery::received(Bytes::from_static(b"{}"), Some(b"abc"), Some(b"issue"), Some(b"1700000000"))
            .in_trace(a_trace());
        let message = async_nats::Message {
            subject: sent.subject().into(),
            reply: None,
            payload: sent.body.clone(),
            headers: Some(sent.headers(0, &ReceiptTo::new("gw", 1))),
            status: None,
            description: None,
            length: 0,
        };
        let back = Delivery::from_message(&message, 7, sent.received_at);
        assert_eq!((&back.id, back.received_at), (&sent.id, sent.received_at));
        assert_eq!((&back.resource, &back.request_id), (&sent.resource, &sent.request_id));
        assert_eq!((&back.hook_timestamp, &back.body), (&sent.hook_timestamp, &sent.body));
        assert_eq!(back.trace, sent.trace);
    }

    #[test]
    fn a_repeat_is_another_message_and_the_same_delivery() {
        let delivery = Delivery::received(Bytes::from_static(b"{}"), Some(b"abc"), None, None);
        let headers = |repeat| delivery.headers(repeat, &ReceiptTo::new("gw", "1.2"));
        assert_eq!(headers(0).get(NATS_MESSAGE_ID).unwrap().as_str(), delivery.id.as_str());
        assert_eq!(headers(3).get(NATS_MESSAGE_ID).unwrap().as_str(), format!("{}.3", delivery.id));
        assert_eq!(headers(3).get(DELIVERY_ID).unwrap().as_str(), delivery.id.as_str());
        assert_eq!(headers(0).get(RECEIPT_TO).unwrap().as_str(), "gw.1.2");
    }

    #[test]
    fn a_delivery_comes_back_from_the_journal() {
        for request_id in [Some(&b"a \"quoted\" one"[..]), None] {
            let sent = Delivery::received(Bytes::from_static(b"{}"), request_id, Some(b"issue"), Some(b"1700000000"))
                .in_trace(a_trace());
            let back = Delivery::from_journal(&sent.to_journal(), sent.body.clone()).unwrap();
            assert_eq!((&back.id, back.received_at), (&sent.id, sent.received_at));
            assert_eq!((&back.resource, &back.request_id), (&sent.resource, &sent.request_id));
            assert_eq!((&back.hook_timestamp, &back.body), (&sent.hook_timestamp, &sent.body));
            assert_eq!(back.trace, sent.trace);
        }
        for bad in [&b""[..], b"{}", b"\xff", br#"{"id":"a b","received_at":"2026-01-01T00:00:00Z","resource":"x"}"#] {
            assert_eq!(Delivery::from_journal(bad, Bytes::new()).unwrap_err(), NotADelivery);
        }
    }

    fn a_trace() -> TraceContext {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        TraceContext::parse(parent).unwrap().with_state(Some("vendor=\"quoted\""))
    }

    #[test]
    fn entries_of_other_versions_are_read() {
        // What the version before traces wrote, and what a later one might write.
        let before = br#"{"id":"a","received_at":"2026-01-01T00:00:00Z","resource":"issue","request_id":"r"}"#;
        let later =
            br#"{"id":"a","received_at":"2026-01-01T00:00:00Z","resource":"issue","traceparent":"no","new":[1]}"#;
        for kept in [&before[..], later] {
            let delivery = Delivery::from_journal(kept, Bytes::new()).unwrap();
            assert_eq!((delivery.id.as_str(), &delivery.trace), ("a", &None));
            let headers = delivery.headers(0, &ReceiptTo::new("gw", 1));
            assert!(headers.get(TRACEPARENT).is_none() && headers.get(TRACESTATE).is_none());
        }
    }

    #[test]
    fn a_foreign_message_gets_what_it_lacks_from_its_place() {
        let message = async_nats::Message {
            subject: "signals.sentry.issue".into(),
            reply: None,
            payload: Bytes::from_static(b"{}"),
            headers: None,
            status: None,
            description: None,
            length: 0,
        };
        let at = OffsetDateTime::UNIX_EPOCH;
        let first = Delivery::from_message(&message, 7, at);
        assert_eq!(first.received_at, at);
        assert_eq!(first.id, Delivery::from_message(&message, 7, at).id);
        assert_ne!(first.id, Delivery::from_message(&message, 8, at).id);
    }

    #[test]
    fn a_time_is_held_to_the_streams_clock() {
        let stored_at = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let held = |text: &str| held_to(OffsetDateTime::parse(text, &Rfc3339).unwrap(), stored_at) - stored_at;
        assert_eq!(held("9999-12-31T23:59:59-23:59"), CLOCKS_APART);
        assert_eq!(held("0000-01-01T00:00:00+23:59"), -OLDEST);
        assert_eq!(held("2027-01-15T08:00:00Z"), Duration::ZERO);
        assert_eq!(held("2027-01-15T07:00:00+01:00"), -Duration::hours(2));
    }

    #[test]
    fn values_that_cannot_travel_are_left_out() {
        let long = [b'x'; HEADER_VALUE_MAX + 1];
        for bad in [&b"a\r\nb: c"[..], b"caf\xc3\xa9", b"\0", &long] {
            let delivery = Delivery::received(Bytes::new(), Some(bad), None, Some(bad));
            assert_eq!((delivery.request_id, delivery.hook_timestamp), (None, None));
        }
    }
}
