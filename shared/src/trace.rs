//! Trace context: how one delivery is found again in the logs of everybody who had it in hand, by the rules of W3C
//! Trace Context, level 1 (<https://www.w3.org/TR/trace-context/>).
//!
//! The gateway takes a request's `traceparent`, or begins a trace where there is none that holds. Either way it makes a
//! span id of its own, once a delivery: receiving it is an operation, and everything that follows (publish, repeat,
//! replay, a dead letter's retry) follows from that. Trace id and span id are kept in the journal and travel as the
//! message header `traceparent`, so they stay the same however often the delivery goes out. No worker makes a span:
//! nothing follows it.
//!
//! These headers are not signed. They are shown in logs and decide nothing.

use std::fmt::{self, Write as _};

use hyper::HeaderMap;
use hyper::header::HeaderValue;

/// Request and message header: the trace, and whose operation this follows from.
pub const TRACEPARENT: &str = "traceparent";
/// Request and message header: what tracing systems add to it. Passed on as it is.
pub const TRACESTATE: &str = "tracestate";

/// Longest `tracestate` that travels along, over all headers of that name: what everybody has to be able to pass on
/// (section 3.3.1.5). A longer one is left out.
const STATE_MAX: usize = 512;
/// A `traceparent` in version 00 (section 3.2).
const PARENT_LENGTH: usize = "00-".len() + 32 + "-".len() + 16 + "-00".len();
/// The one flag that has a meaning (section 3.2.2.5); the others are not passed on.
const SAMPLED: u8 = 1;

/// What all log lines of one delivery share.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceId([u8; 16]);

impl fmt::Display for TraceId {
    /// 32 hex digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A trace, and the operation in it that whatever comes next follows from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    trace: TraceId,
    span: [u8; 8],
    sampled: bool,
    state: Option<String>,
}

impl TraceContext {
    /// The trace that a request belongs to, and in it the gateway's own span. A `traceparent` that is there twice, or
    /// does not hold, counts as none (section 4.3): then a trace begins here, not sampled, and a `tracestate` is
    /// ignored.
    pub fn of_request(headers: &HeaderMap) -> Self {
        let mut parents = headers.get_all(TRACEPARENT).into_iter();
        let parent = match (parents.next(), parents.next()) {
            (Some(parent), None) => parent.to_str().ok().and_then(Self::parse),
            _ => None,
        };
        let span = random()[..8].try_into().expect("8 of 16 bytes");
        match parent {
            Some(parent) => TraceContext { span, state: state(headers), ..parent },
            None => TraceContext { trace: TraceId(random()), span, sampled: false, state: None },
        }
    }

    /// Takes a `traceparent` (section 3.2): `00-<trace id>-<parent id>-<flags>` in lower-case hex, no id all zeros. Of
    /// a version later than 00 it takes these four fields and leaves what may follow (section 4.3); `ff` is no version.
    pub fn parse(text: &str) -> Option<Self> {
        let (version, rest) = (hex::<1>(text.get(..2)?)?[0], text.get(PARENT_LENGTH..)?);
        let may_have_more = version > 0 && version < 0xff && rest.starts_with('-');
        let dashes = [2, 35, 52].iter().all(|&at| text.as_bytes()[at] == b'-');
        if version == 0xff || !dashes || !(rest.is_empty() || may_have_more) {
            return None;
        }
        let (trace, span) = (hex::<16>(text.get(3..35)?)?, hex::<8>(text.get(36..52)?)?);
        let flags = hex::<1>(text.get(53..55)?)?[0];
        let ids_are_some = trace != [0; 16] && span != [0; 8];
        ids_are_some.then_some(TraceContext { trace: TraceId(trace), span, sampled: flags & SAMPLED != 0, state: None })
    }

    /// With this `tracestate`, where it can travel.
    #[must_use]
    pub fn with_state(mut self, state: Option<&str>) -> Self {
        let travels = |state: &&str| (1..=STATE_MAX).contains(&state.len()) && state.bytes().all(is_printable);
        self.state = state.filter(travels).map(str::to_owned);
        self
    }

    /// The `traceparent`, in version 00.
    pub fn to_traceparent(&self) -> String {
        let TraceContext { trace, span, sampled, .. } = self;
        let mut text = String::with_capacity(PARENT_LENGTH);
        write!(text, "00-{trace}-{:016x}-{:02x}", u64::from_be_bytes(*span), u8::from(*sampled))
            .expect("a string takes it");
        text
    }

    /// The trace.
    pub fn trace_id(&self) -> TraceId {
        self.trace
    }

    /// The `tracestate` that goes with it.
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }
}

/// All headers `tracestate` as one (RFC 9110 section 5.3).
fn state(headers: &HeaderMap) -> Option<String> {
    let values: Option<Vec<&str>> =
        headers.get_all(TRACESTATE).into_iter().map(HeaderValue::to_str).map(Result::ok).collect();
    let joined = values?.join(",");
    let travels = (1..=STATE_MAX).contains(&joined.len()) && joined.bytes().all(is_printable);
    travels.then_some(joined)
}

fn is_printable(byte: u8) -> bool {
    matches!(byte, b' '..=b'~')
}

/// Lower-case hex digits as bytes.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if text.len() != 2 * N || !text.bytes().all(is_digit) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// A UUIDv4: 122 random bits in 16 bytes, of which the first 8 are never all zeros, for they hold its version. Everybody may
/// guess them, so they cost no system call.
fn random() -> [u8; 16] {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_be_bytes()).into_uuid().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const PARENT: &str = "00f067aa0ba902b7";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    #[test]
    fn a_traceparent_is_taken_as_the_recommendation_says() {
        let good = [
            ("00", "01", "01"),
            ("00", "00", "00"),
            ("00", "ff", "01"),
            ("00", "fe", "00"),
            ("01", "01", "01"),
            ("cc", "01-what-the-future-will-be-like", "01"),
            ("fe", "02-", "00"),
        ];
        for (version, flags, passed_on) in good {
            let text = format!("{version}-{TRACE}-{PARENT}-{flags}");
            let context = TraceContext::parse(&text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(context.trace_id().to_string(), TRACE);
            assert_eq!(context.to_traceparent(), format!("00-{TRACE}-{PARENT}-{passed_on}"), "{text}");
        }
    }

    #[test]
    fn what_does_not_hold_begins_a_trace() {
        let bad = [
            String::new(),
            "00".into(),
            TRACE.into(),
            format!("00-{TRACE}-{PARENT}"),
            format!("00-{TRACE}-{PARENT}-1"),
            format!("00-{TRACE}-{PARENT}-01-"),
            format!("00-{TRACE}-{PARENT}-01-more"),
            format!("00-{TRACE}-{PARENT}-011"),
            format!("01-{TRACE}-{PARENT}-01.more"),
            format!("cc-{TRACE}-{PARENT}-01more"),
            format!("ff-{TRACE}-{PARENT}-01"),
            format!("0-{TRACE}-{PARENT}-01"),
            format!("0x-{TRACE}-{PARENT}-01"),
            format!("00-{}-{PARENT}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{PARENT}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-{}-01", PARENT.to_uppercase()),
            format!("00-{TRACE}-{PARENT}-0A"),
            format!("00_{TRACE}_{PARENT}_01"),
            format!("00-{}g-{PARENT}-01", &TRACE[1..]),
            format!("00-{TRACE}é{}-01", &PARENT[1..]),
            format!("+0-{TRACE}-{PARENT}-01"),
            format!(" 00-{TRACE}-{PARENT}-01"),
        ];
        for text in &bad {
            assert_eq!(TraceContext::parse(text), None, "{text}");
            let begun = TraceContext::of_request(&headers(&[(TRACEPARENT, text), (TRACESTATE, "a=1")]));
            assert_ne!(begun.trace_id().to_string(), TRACE, "{text}");
            assert_eq!((begun.sampled, begun.state()), (false, None));
            assert_eq!(TraceContext::parse(&begun.to_traceparent()), Some(begun), "what is made here holds");
        }
        let twice = format!("00-{TRACE}-{PARENT}-01");
        let twice = TraceContext::of_request(&headers(&[(TRACEPARENT, &twice), (TRACEPARENT, &twice)]));
        assert_ne!(twice.trace_id().to_string(), TRACE);
    }

    #[test]
    fn a_trace_goes_on_under_a_span_of_our_own() {
        let parent = format!("00-{TRACE}-{PARENT}-01");
        let request = headers(&[(TRACEPARENT, &parent), (TRACESTATE, "a=1,b=2"), (TRACESTATE, "c=3")]);
        let (one, other) = (TraceContext::of_request(&request), TraceContext::of_request(&request));
        assert_eq!(one.trace_id().to_string(), TRACE);
        let passed_on = one.to_traceparent();
        assert!(passed_on.starts_with(&format!("00-{TRACE}-")) && passed_on.ends_with("-01"), "{passed_on}");
        assert!(!passed_on.contains(PARENT) && one.span != other.span);
        assert_eq!(one.state(), Some("a=1,b=2,c=3"));
        let fresh = TraceContext::of_request(&HeaderMap::new());
        assert_ne!(fresh.trace_id(), TraceContext::of_request(&HeaderMap::new()).trace_id());
    }

    #[test]
    fn a_state_that_cannot_travel_is_left_out() {
        let parent = format!("00-{TRACE}-{PARENT}-01");
        let long = "x".repeat(STATE_MAX);
        for (state, travels) in [("", false), ("é", false), (&*long, true), (&*format!("{long}y"), false)] {
            let context = TraceContext::of_request(&headers(&[(TRACEPARENT, &parent), (TRACESTATE, state)]));
            assert_eq!(context.state(), travels.then_some(state));
            assert_eq!(TraceContext::parse(&parent).unwrap().with_state(Some(state)).state(), context.state());
        }
    }
}
