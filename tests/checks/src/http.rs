//! The HTTP handler: a whole connection of the public listener, on a pipe instead of a socket and with a clock that jumps to
//! the next deadline whenever nothing else is left to do.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gateway::journal::{self, Journal, State};
use gateway::metrics::Metrics;
use gateway::receive::Gateway;
use gateway::reject::Reject;
use gateway::{Config, server};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use shared::delivery::Delivery;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::wire::{self, Answer, SECRET};

/// Small, so that few bytes reach each limit.
const LIMITS: [(&str, &str); 4] = [
    ("GATEWAY_MAX_BODY_BYTES", "1500"),
    ("GATEWAY_MAX_HEADER_BYTES", "4KiB"),
    ("GATEWAY_MAX_HEADERS", "10"),
    ("GATEWAY_MAX_BYTES_IN_FLIGHT", "100KiB"),
];
/// How long a sender pauses, of the clock that jumps: a few pauses are longer than any time-out.
const PAUSE: Duration = Duration::from_secs(2);

/// What a connection was answered.
#[derive(Debug)]
pub struct Seen {
    /// The statuses, in their order.
    pub statuses: Vec<u16>,
}

/// A gateway, for one connection after the other.
pub struct Door {
    config: Config,
    gateway: Arc<Gateway>,
    journal: Journal,
    _folder: TempDir, // last: the journal writes there until it is dropped
}

/// Of any bytes on a connection, in any pieces: the gateway does not panic, and the connection ends. What comes back is a
/// row of whole answers, each of a status of the contract's, no 5xx but 501, and made of words that the gateway has of its
/// own: nothing that was sent is in any. A delivery is journalled only where a right signature of it was sent, and each
/// 202 is one of those, in the order of the requests.
pub fn check(door: &Door, script: &[u8]) -> Seen {
    let (flags, script) = script.split_first().unwrap_or((&0, &[]));
    let closes_early = flags & 1 != 0;
    let pieces = wire::pieces(script);
    let sent = pieces.concat();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let (received, journalled) = runtime.block_on(async {
        let received = exchange(door, &pieces, closes_early).await;
        (received, journalled(&door.journal).await)
    });
    let lower = sent.to_ascii_lowercase();
    let has = |text: &[u8]| lower.windows(text.len()).any(|window| window == text);
    let answers = wire::answers(&received, has(b"head"));
    answers.iter().for_each(assert_answer);
    for delivery in &journalled {
        let signed = wire::right_signatures(&delivery.body).iter().any(|signature| has(signature.as_bytes()));
        assert!(signed, "taken without a signature: {delivery:?}");
        let body = delivery.body.to_ascii_lowercase();
        assert!(body.is_empty() || has(&body) || has(b"chunked"), "a body that nobody sent: {delivery:?}");
    }
    let accepted: Vec<_> = answers.iter().filter(|answer| answer.status == 202).map(accepted).collect();
    let mut taken = journalled.iter().map(|delivery| delivery.id.to_string());
    assert!(accepted.iter().all(|id| taken.any(|taken| taken == *id)), "202 for what is not journalled");
    // Who does not wait for an answer may be taken without one.
    assert!(closes_early || taken.next().is_none() && accepted.len() == journalled.len(), "journalled without a 202");
    Seen { statuses: answers.iter().map(|answer| answer.status).collect() }
}

impl Door {
    /// With small limits and an empty journal.
    #[expect(clippy::new_without_default, reason = "it starts threads and makes files")]
    pub fn new() -> Door {
        let set = |name: &str| {
            let limit = LIMITS.iter().find(|(limit, _)| *limit == name).map(|(_, value)| *value);
            limit.or((name == "SENTRY_CLIENT_SECRET").then_some(SECRET)).map(str::to_owned)
        };
        let config = Config::load(&set).unwrap();
        let folder = crate::journal::folder();
        let (journal, _) = Journal::open(folder.path(), journal::Limits::of(64 << 20)).unwrap();
        let metrics = Metrics::new(&mut Registry::default(), &journal);
        let gateway = Arc::new(Gateway::new(&config, journal.clone(), metrics));
        Door { config, gateway, journal, _folder: folder }
    }
}

/// Sends these pieces, and gives everything that comes back until the gateway closes the connection.
async fn exchange(door: &Door, pieces: &[Vec<u8>], closes_early: bool) -> Vec<u8> {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let (mut reader, mut writer) = tokio::io::split(ours);
    let send = async {
        for (number, piece) in pieces.iter().enumerate() {
            if number > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            // Where the gateway has heard enough, it is the answer that counts.
            let _ = writer.write_all(piece).await;
        }
        if closes_early {
            let _ = writer.shutdown().await;
        }
    };
    let receive = async {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        received
    };
    let serve = server::serve(
        theirs,
        Ipv4Addr::LOCALHOST.into(),
        door.gateway.clone(),
        &door.config.limits,
        server::Ending::default(),
    );
    let ((), received, ()) = tokio::join!(send, receive, serve);
    received
}

/// What was journalled since this was asked last.
async fn journalled(journal: &Journal) -> Vec<Delivery> {
    let mut deliveries = Vec::new();
    while journal.stats().share(State::Journalled).tally.entries > 0 {
        for stored in journal.take(usize::MAX, u64::MAX).await {
            deliveries.push(Delivery::from_journal(&stored.meta, stored.body).unwrap());
            journal.mark_confirmed(&[stored.place]).await;
        }
    }
    deliveries
}

/// What the sender is told in each refusal that a connection by itself can meet.
fn refusals() -> [Reject; 12] {
    [
        Reject::NotFound,
        Reject::MethodNotAllowed,
        Reject::SignatureMissing,
        Reject::SignatureMalformed,
        Reject::BadSignature,
        Reject::TooLarge(1500),
        Reject::BrokenHeaders,
        Reject::LargeHeaders,
        Reject::SlowHeaders,
        Reject::SlowBody,
        Reject::BrokenBody,
        Reject::UnknownCoding,
    ]
}

fn assert_answer(answer: &Answer) {
    for (name, value) in &answer.headers {
        let is_ours = match name.as_str() {
            "content-length" => true, // it is that of the body, or the body were not whole
            "content-type" => value == "application/json",
            "connection" => ["close", "keep-alive"].contains(&value.as_str()),
            "allow" => value == "POST" && answer.status == 405,
            "www-authenticate" => answer.status == 401,
            "date" => value.len() == "Sun, 06 Nov 1994 08:49:37 GMT".len(),
            _ => false,
        };
        assert!(is_ours, "{name}: {value} in {answer:?}");
    }
    assert_eq!(answer.status == 405, answer.header("allow").is_some(), "{answer:?}");
    assert_eq!(answer.status == 401, answer.header("www-authenticate").is_some(), "{answer:?}");
    if answer.status == 202 || answer.is_to_head {
        return; // the first: see `accepted`
    }
    let told = |reject: &Reject| answer.status == reject.status().as_u16() && answer.body == told(reject);
    assert!(refusals().iter().any(told), "{answer:?}");
}

fn told(reject: &Reject) -> Bytes {
    json!({ "error": reject.to_string() }).to_string().into()
}

/// The id of the delivery that was accepted.
fn accepted(answer: &Answer) -> String {
    let body: Value = serde_json::from_slice(&answer.body).expect("JSON");
    let field = |name: &str| body["data"][name].as_str().unwrap_or_default().to_owned();
    let (id, signal, issue) = (field("deliveryId"), field("signalId"), field("issueId"));
    let expected = json!({ "data": { "deliveryId": id, "signalId": signal, "issueId": issue, "status": "accepted" } });
    assert!(body == expected && [&id, &signal, &issue].iter().all(|id| !id.is_empty()), "{answer:?}");
    id
}
