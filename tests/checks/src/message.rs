//! A message as the broker may deliver it to either program: a subject, a header block, a body, a reply subject.
//!
//! The input is four lengths (a byte for the subject, a byte for the reply subject, two for the header block), these three
//! in that order, and the body.

use std::sync::LazyLock;

use async_nats::jetstream::{self, Context};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use shared::delivery::Delivery;
use shared::hostile::{StoredMessage, UNREADABLE_BLOCK};
use shared::receipt::{self, ReceiptTo};
use time::{Duration, OffsetDateTime};
use tokio::runtime::Runtime;
use worker::pull::{Pulled, unreadable_letter};
use worker::read;
use worker::store::Record;

/// The sequence of every message here.
const SEQUENCE: u64 = 7;

/// The end of a message, so that a test can ask for each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seen {
    /// It would be a row.
    Record,
    /// It would be a dead letter: its body is no JSON.
    NotJson,
    /// It would be a dead letter: the client library cannot read it.
    Unreadable(String),
}

/// The parts of an input.
pub fn parts(input: &[u8]) -> StoredMessage {
    let (subject, _, header_block, body) = split(input);
    let stored_at = OffsetDateTime::from_unix_timestamp(1_800_000_000).expect("in 2027");
    let subject = String::from_utf8_lossy(subject).into_owned(); // as the server writes it in JSON
    let (header_block, body) = (Bytes::copy_from_slice(header_block), Bytes::copy_from_slice(body));
    StoredMessage { subject, sequence: SEQUENCE, stored_at, header_block, body }
}

/// Of any message: the worker makes a row or a dead letter of it, and the same by each way; nothing of it is lost, made up
/// or out of bounds. What the gateway reads of it as a receipt is what stands there.
pub fn check(input: &[u8]) -> Seen {
    let stored = parts(input);
    check_receipts(&stored.body);
    let message = match stored.to_message() {
        Ok(message) => message,
        Err(why) => {
            assert!(is_odd(&stored), "a plain message cannot be read: {why}");
            let letter = unreadable_letter(&stored).expect("what cannot be read has a letter");
            let kept = letter.origin.headers.get(UNREADABLE_BLOCK).expect("with its block");
            assert_eq!(STANDARD.decode(kept.as_str()).unwrap(), stored.header_block);
            assert_eq!((letter.stream_sequence, &letter.origin.body), (SEQUENCE, &stored.body));
            return Seen::Unreadable(letter.reason);
        }
    };
    assert!(unreadable_letter(&stored).is_none());
    for (name, values) in message.headers.iter().flat_map(|headers| headers.iter()) {
        for value in values {
            assert!(!value.as_str().contains(['\r', '\n']), "a value of two lines");
            let name: &str = name.as_ref();
            assert!(!name.is_empty() || stored.header_block.windows(2).any(|two| two == b"\n:"), "a name made up");
        }
    }
    if let Some(to) = ReceiptTo::of(message.headers.as_ref()) {
        for (subject, payload) in receipt::messages([to]) {
            assert_eq!(subject.matches('.').count(), 1, "{subject}");
            assert!(!subject.contains(['*', '>', ' ']), "{subject}");
            assert!(receipt::places(&payload).count() == 1);
        }
    }
    let delivery = Delivery::from_message(&message, SEQUENCE, stored.stored_at);
    let late = delivery.received_at - stored.stored_at;
    assert!(late >= Duration::days(-40) && late <= Duration::minutes(10), "{late}");
    assert_eq!(delivery.received_at.offset(), time::UtcOffset::UTC);
    assert_eq!(delivery.id, read::id(&message, SEQUENCE));
    let read = read::read_message(&message, SEQUENCE, stored.stored_at, 1);
    check_pulled(input, &message, &read);
    match read {
        Ok(record) => {
            assert_eq!(record.delivery_id, delivery.id.to_string());
            for text in [&record.title, &record.kind, &record.resource, &record.delivery_id] {
                assert!(!text.contains('\0'), "no text for PostgreSQL: {text:?}");
            }
            Seen::Record
        }
        Err(letter) => {
            assert!(!letter.reason.contains("panic"), "{}", letter.reason);
            assert_eq!(letter.origin.body, stored.body);
            Seen::NotJson
        }
    }
}

fn split(input: &[u8]) -> (&[u8], &[u8], &[u8], &[u8]) {
    let [subject, reply, block_high, block_low, rest @ ..] = input else { return (b"", b"", b"", input) };
    let block = usize::from(u16::from_be_bytes([*block_high, *block_low]));
    let (subject, rest) = rest.split_at(usize::from(*subject).min(rest.len()));
    let (reply, rest) = rest.split_at(usize::from(*reply).min(rest.len()));
    let (block, body) = rest.split_at(block.min(rest.len()));
    (subject, reply, block, body)
}

/// Returns `true` for a message with anything that plain ones do not have. Only such a one may be unreadable.
fn is_odd(stored: &StoredMessage) -> bool {
    let block = &stored.header_block;
    let plain = |byte: &u8| matches!(byte, b' '..=b'~' | b'\r' | b'\n');
    let lines = std::str::from_utf8(block).unwrap_or_default().split("\r\n");
    let has_name = |line: &str| line.is_empty() || line.split_once(':').is_some_and(|(name, _)| !name.contains(' '));
    !stored.subject.bytes().all(|byte| (b'!'..=b'~').contains(&byte))
        || stored.subject.is_empty()
        || !block.iter().all(plain)
        || !block.starts_with(b"NATS/1.0\r\n")
        || lines.clone().any(|line| line.contains(['\r', '\n']))
        || !lines.skip(1).all(has_name)
}

/// A message that came to a worker is the same message: by its reply subject, or it is none.
fn check_pulled(
    input: &[u8],
    message: &async_nats::Message,
    read: &Result<Record, Box<worker::dead_letters::DeadLetter>>,
) {
    static CONTEXT: LazyLock<(Runtime, Context)> = LazyLock::new(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // A client that never connects: a message only needs one to be acknowledged.
        let connect = async_nats::ConnectOptions::new().retry_on_initial_connect().connect("127.0.0.1:1");
        let context = runtime.block_on(async { jetstream::new(connect.await.unwrap()) });
        (runtime, context)
    });
    let reply = String::from_utf8_lossy(split(input).1).into_owned();
    let message = async_nats::Message { reply: Some(reply.as_str().into()), ..message.clone() };
    let Some(pulled) = Pulled::of(jetstream::Message { message, context: CONTEXT.1.clone() }) else { return };
    assert!(reply.starts_with("$JS.ACK."), "{reply}");
    assert_eq!(pulled.read().is_ok(), read.is_ok());
}

/// A line that is taken for a receipt says just that.
fn check_receipts(payload: &[u8]) {
    for line in receipt::places(payload) {
        if let Some(receipt) = gateway::receipts::parse(line) {
            assert_eq!(format!("{}.{:016x}", receipt.place, receipt.tag), line);
        }
    }
}
