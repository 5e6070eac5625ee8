//! Is NATS there, does it let us in, would it hold what is to be stored?
//!
//! What a client cannot know is said: how much disk the servers have left, and whether a stream would find its servers.

mod making;
mod rights;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::header::NATS_EXPECTED_STREAM;
use async_nats::jetstream::context::{AccountError, AccountErrorKind, ConsumerInfoErrorKind};
use async_nats::jetstream::{self, ErrorCode, consumer, stream};
use async_nats::{Client, Event, HeaderMap, Request, RequestErrorKind, ServerAddr, ServerError, ServerInfo};
use tokio::time::{sleep, timeout};

use super::{Finding, size};
use crate::delivery::HEADERS_MAX;
use crate::receipt;
use crate::stream::{
    CONSUMER, Difference, Harm, NatsSettings, SUBJECT_PREFIX, compare_consumers, compare_streams, is_missing,
    lies_beyond,
};
use crate::tls::is_loopback;
use rights::{ACCOUNT_INFO, END, Rights, STREAM_NAMES, consumer_info, is_about, reset, stream_create, stream_info};

/// How long one try may take: a server that needs longer is as good as away.
const TRY_WITHIN: Duration = Duration::from_secs(4);
/// How long the server's word on what we may not do can take after a request got no answer.
const DENIAL_WITHIN: Duration = Duration::from_millis(300);
/// How often is looked whether it has come.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Servers warn of a `max_payload` above this, and refuse one above 64 MiB
/// (<https://docs.nats.io/running-a-nats-service/configuration>).
const PAYLOAD_ADVISED: usize = 8 << 20;

/// Whose connection it would be.
#[derive(Debug, Clone, Copy)]
pub enum Side<'a> {
    /// The gateway's: makes the stream, publishes into it, hears receipts.
    Gateway {
        /// Its id, where it has one already.
        id: Option<&'a str>,
        /// `GATEWAY_MAX_BODY_BYTES`
        body_bytes: usize,
    },
    /// The worker's: makes the consumer, pulls, sends receipts.
    Worker,
}

impl Side<'_> {
    /// The name of the connection: the program's first, as the prefix of its inboxes follows from it.
    fn client_name(self) -> &'static str {
        match self {
            Side::Gateway { .. } => "gateway check",
            Side::Worker => "worker check",
        }
    }
}

/// A connection that was made once, and what the server said we may not do.
struct Link {
    client: Client,
    denied: Arc<Mutex<Vec<String>>>,
}

impl Link {
    /// The refusals that the server has sent so far, sorted. A refusal is no answer to a request: it comes as an event.
    ///
    /// The server works in order: its answer to this request, or its refusal, comes after all refusals before.
    async fn denied(&self) -> Vec<String> {
        self.heard().retain(|refusal| !is_about(refusal, END));
        let answer = self.client.send_request(END, Request::new().timeout(Some(TRY_WITHIN)));
        let refused = async {
            while !self.heard().iter().any(|refusal| is_about(refusal, END)) {
                sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            _ = answer => sleep(DENIAL_WITHIN).await, // the events may still be on their way
            () = refused => {}
        }
        let mut denied: Vec<String> = self.heard().iter().filter(|refusal| !is_about(refusal, END)).cloned().collect();
        denied.sort();
        denied.dedup();
        denied
    }

    fn heard(&self) -> MutexGuard<'_, Vec<String>> {
        self.denied.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects once to this one server, as the program would; else what is wrong, and what to do.
async fn connect_once(nats: &NatsSettings, server: &ServerAddr, side: Side<'_>) -> Result<Link, (String, String)> {
    let denied = Arc::<Mutex<Vec<String>>>::default();
    let heard = denied.clone();
    let observe = move |event| {
        if let Event::ServerError(ServerError::Other(text)) = event {
            heard.lock().unwrap_or_else(PoisonError::into_inner).push(text);
        }
    };
    match nats.connection().try_one(side.client_name(), server, TRY_WITHIN, observe).await {
        Ok(client) => Ok(Link { client, denied }),
        Err((error, advice)) => {
            // The client puts this before the server's own words.
            let advice = advice.unwrap_or_else(|| match error.starts_with("nats: ") {
                true => "it answers and takes no connection: look at its log".to_owned(),
                false => "start it, or let this machine reach it; NATS_URL says where it is".to_owned(),
            });
            Err((error, advice))
        }
    }
}

/// Looks at every server that is named, then at JetStream through the first that answers.
pub async fn look(nats: &NatsSettings, side: Side<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut first = None;
    let tries = futures_util::future::join_all(nats.connection().servers().iter().map(async |server| {
        let begin = Instant::now();
        let connected = connect_once(nats, server, side).await;
        let took = begin.elapsed();
        let open = connected.is_ok() && takes_strangers(nats, server).await;
        (server, connected, took, open)
    }));
    let tries = tries.await;
    // One of several may be away: the programs go to the next.
    let all_away = tries.iter().all(|(_, connected, ..)| connected.is_err());
    for (server, connected, took, open) in tries {
        let what = format!("NATS {}", shown(server));
        match connected {
            Ok(link) => {
                let info = link.client.server_info();
                findings.push(tell_server(&what, &info, took));
                findings.extend(payload(&what, &info, side));
                findings.extend(open.then(|| open_to_all(&what)));
                let encrypted = nats.connection().must_encrypt() || info.tls_required;
                findings.extend((!encrypted && !is_loopback(server.host())).then(|| in_clear(&what)));
                first.get_or_insert(link);
            }
            Err((error, advice)) if all_away => findings.push(Finding::problem(what, error, advice)),
            Err((error, advice)) => findings.push(Finding::warning(what, error, advice)),
        }
    }
    let Some(link) = first else { return findings };
    findings.extend(jetstream(nats, side, &link).await);
    // A client that is dropped reports the connection as lost; this one leaves.
    let _ = timeout(TRY_WITHIN, link.client.drain()).await;
    findings
}

/// Tries a connection without a login. `true`: the server takes it. A server that refuses it writes a line into its log.
async fn takes_strangers(nats: &NatsSettings, server: &ServerAddr) -> bool {
    if !nats.connection().has_login() {
        return true; // the check itself has connected without a login
    }
    let stranger = nats.connection().without_login();
    match stranger.try_one("check", server, TRY_WITHIN, |_| ()).await {
        Ok(client) => {
            let _ = timeout(TRY_WITHIN, client.drain()).await;
            true
        }
        Err(_) => false,
    }
}

fn open_to_all(what: &str) -> Finding {
    let advice = "give it users with permissions (`authorization` or `accounts` in the servers' configuration); a program \
                  without a login may read deliveries, publish forged ones and purge the stream, unless permissions forbid it";
    Finding::warning(format!("{what}, login"), "NATS takes clients without a login", advice)
}

fn in_clear(what: &str) -> Finding {
    let advice = "set up `tls` in the servers' configuration, and tls:// in NATS_URL; a machine on the way can read \
                  deliveries and a password";
    Finding::warning(format!("{what}, encryption"), "the connection to NATS is not encrypted", advice)
}

/// `nats://host:port`, whatever else stands in the URL.
pub fn shown(server: &ServerAddr) -> String {
    let host = server.host();
    let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
    format!("{}://{host}:{}", server.scheme(), server.port())
}

fn tell_server(what: &str, info: &ServerInfo, took: Duration) -> Finding {
    let cluster = info.cluster.as_ref().map(|name| format!(", cluster {name}")).unwrap_or_default();
    let detail = format!("connected in {took:.1?}: nats-server {}, {}{cluster}", info.version, info.server_name);
    let version: Vec<u32> = info.version.split(['.', '-']).map_while(|part| part.parse().ok()).collect();
    if version.as_slice() < [2, 10].as_slice() {
        return Finding::warning(what, detail, "this is tried with 2.10 and later: update the server");
    }
    if version.as_slice() < [2, 14].as_slice() {
        let advice = "from 2.14 on, workers mend by themselves a consumer that stands beyond the stream's end after the \
                      servers' files went back in time; on this one the log says what to do";
        return Finding::warning(what, detail, advice);
    }
    Finding::ok(what, detail)
}

/// Whether the largest body that the gateway takes fits into a message.
fn payload(what: &str, info: &ServerInfo, side: Side<'_>) -> Option<Finding> {
    let Side::Gateway { body_bytes, .. } = side else { return None };
    let (what, needed, most) = (format!("{what}, max_payload"), body_bytes + HEADERS_MAX, info.max_payload);
    let sizes = format!("{most} bytes; the largest body and its headers take {needed}");
    if most >= needed {
        return Some(Finding::ok(what, sizes));
    }
    let wanted = needed.div_ceil(1_000_000);
    let server_warns = if wanted * 1_000_000 > PAYLOAD_ADVISED { " (it will warn of the size)" } else { "" };
    let advice = format!(
        "set max_payload: {wanted}MB in the server's configuration{server_warns}, or GATEWAY_MAX_BODY_BYTES to {} at most; \
         as it is, larger deliveries are answered 202 and stay in the journal, set aside",
        most.saturating_sub(HEADERS_MAX)
    );
    Some(Finding::problem(what, sizes, advice))
}

/// JetStream, the stream, the consumer, and what we may do with them.
async fn jetstream(nats: &NatsSettings, side: Side<'_>, link: &Link) -> Vec<Finding> {
    let mut context = jetstream::new(link.client.clone());
    context.set_timeout(TRY_WITHIN);
    let mut findings = Vec::new();
    let rights = Rights::of(nats, side);
    rights.try_all(&link.client).await;
    let denied = link.denied().await;
    let may = |subject: &str| !denied.iter().any(|refusal| is_about(refusal, subject));
    let mut account = None;
    if may(ACCOUNT_INFO) {
        match context.query_account().await {
            Ok(found) => account = Some(found),
            Err(error) => {
                findings.push(no_jetstream(&error));
                if !is_off(&error) {
                    findings.extend(denials(link, &rights).await);
                }
                return findings;
            }
        }
    } else {
        let detail = format!("this login may not ask for the account's limits ({ACCOUNT_INFO})");
        let advice = "the programs never ask; with this right a check compares the limits with NATS_MAX_BYTES";
        findings.push(Finding::not_tried("NATS account", detail, advice));
    }
    let what = format!("stream {}", nats.stream);
    // This is tried even where the login may not look at the stream. `denials` names a refusal.
    let (heard, subject) = may_publish(&link.client, side).await;
    if may(&stream_info(nats)) {
        match context.get_stream(&nats.stream).await {
            Ok(stream) => {
                findings.extend(tell_stream(&what, stream.cached_info(), &nats.stream_config()));
                findings.push(if may(&consumer_info(nats)) {
                    tell_consumer(stream.consumer_info(CONSUMER).await, stream.cached_info(), side)
                } else {
                    not_looked_at(format!("consumer {CONSUMER}"))
                });
                findings.extend(subject);
            }
            Err(error) if is_missing(&error) => {
                findings.extend(making::look(&what, nats, side, link, account.as_ref()));
                if matches!(side, Side::Gateway { .. }) {
                    let listed = may(STREAM_NAMES);
                    findings.push(making::subjects(&what, link, listed, heard).await);
                    if may(&stream_create(nats)) {
                        findings.push(making::storage(&what, nats, link, &context).await);
                    }
                }
            }
            Err(error) => {
                findings.push(Finding::problem(
                    &what,
                    format!("cannot be looked at: {error}"),
                    "see the other findings",
                ));
            }
        }
    } else {
        findings.push(not_looked_at(&what));
    }
    let denied = denials(link, &rights).await;
    if denied.is_empty() {
        findings.push(Finding::ok("NATS permissions", "the server refused nothing that was tried"));
    }
    findings.extend(denied);
    if matches!(side, Side::Worker) {
        let detail = format!("the right to publish to {}", reset(nats));
        let advice = "a worker needs it after the servers' files went back in time; a try could move the consumer";
        findings.push(Finding::not_tried("NATS permissions", detail, advice));
    }
    findings
}

fn not_looked_at(what: impl Into<String>) -> Finding {
    Finding::not_tried(what, "this login may not look at it", "see NATS permissions")
}

fn is_off(error: &AccountError) -> bool {
    match error.kind() {
        AccountErrorKind::JetStreamUnavailable => true,
        AccountErrorKind::JetStream(error) => {
            [ErrorCode::JETSTREAM_NOT_ENABLED, ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT]
                .contains(&error.error_code())
        }
        AccountErrorKind::TimedOut | AccountErrorKind::Other => false,
    }
}

fn no_jetstream(error: &AccountError) -> Finding {
    if is_off(error) {
        let advice = "turn it on: `jetstream { store_dir: ... }` in the server's configuration, and for this account";
        return Finding::problem("JetStream", "it is off", advice);
    }
    let advice = "in a cluster it answers once most of its servers are there";
    Finding::problem("JetStream", format!("it does not answer: {error}"), advice)
}

/// A stream that is there.
fn tell_stream(what: &str, info: &stream::Info, wanted: &stream::Config) -> Vec<Finding> {
    let mut findings: Vec<Finding> = compare_streams(&info.config, wanted).iter().map(differs).collect();
    if findings.is_empty() {
        findings.push(Finding::ok(what, format!("as it would be made; {} messages", info.state.messages)));
    }
    let limit = u64::try_from(info.config.max_bytes).unwrap_or(0);
    if limit > 0 && info.state.bytes > limit / 10 * 9 {
        let detail = format!("{} of {} are used", size(info.state.bytes), size(limit));
        let advice = "workers purge what is acknowledged above 80 %: do they keep up? (`worker status`)";
        findings.push(Finding::warning(format!("{what}, room"), detail, advice));
    }
    let behind = |peer: &&stream::PeerInfo| peer.offline || !peer.current;
    let peers = info.cluster.as_ref().map(|cluster| cluster.replicas.as_slice()).unwrap_or_default();
    let behind: Vec<&str> = peers.iter().filter(behind).map(|peer| peer.name.as_str()).collect();
    if !behind.is_empty() {
        let detail = format!("away or not up to date: {}", behind.join(", "));
        findings.push(Finding::warning(format!("{what}, replicas"), detail, "bring these servers back"));
    }
    findings
}

fn differs(difference: &Difference) -> Finding {
    let Difference { owner, setting, found, wanted, harm, mend } = difference;
    let (what, detail) = (format!("{owner}, {setting}"), format!("{found}, wanted is {wanted}"));
    match harm {
        Harm::Breaks(promise) => {
            Finding::problem(what, format!("{detail}: {promise}"), format!("{mend}; nothing is changed silently"))
        }
        Harm::Risk(promise) => Finding::warning(what, format!("{detail}: {promise}"), mend),
        Harm::None => Finding::warning(what, detail, format!("it is used as it is; to change it: {mend}")),
    }
}

fn tell_consumer(
    found: Result<consumer::Info, async_nats::jetstream::context::ConsumerInfoError>,
    stream: &stream::Info,
    side: Side<'_>,
) -> Finding {
    let what = format!("consumer {CONSUMER}");
    let info = match (found, side) {
        (Ok(info), _) => info,
        (Err(error), Side::Worker) if error.kind() == ConsumerInfoErrorKind::NotFound => {
            return Finding::ok(what, "not there yet: the worker makes it");
        }
        (Err(error), Side::Gateway { .. }) if error.kind() == ConsumerInfoErrorKind::NotFound => {
            return Finding::ok(what, "not there yet: the first worker makes it");
        }
        (Err(error), _) => {
            return Finding::problem(what, format!("cannot be looked at: {error}"), "see the other findings");
        }
    };
    let mut differences = compare_consumers(&info.config, &stream.config);
    differences.sort_by_key(|difference| !matches!(difference.harm, Harm::Breaks(_)));
    if let Some(first) = differences.first() {
        let all: Vec<String> = differences.iter().map(ToString::to_string).collect();
        return Finding { what, detail: all.join("; "), ..differs(first) };
    }
    if info.paused {
        let left = info.pause_remaining.map(|left| format!(" for {} s more", left.as_secs())).unwrap_or_default();
        return Finding::warning(
            what,
            format!("somebody paused it{left}"),
            "`nats consumer resume` lets workers go on",
        );
    }
    if lies_beyond(&info, stream.state.last_sequence) {
        let advice = "its servers' files went back in time; workers put it right when they start";
        return Finding::warning(what, "it stands beyond the stream's end", advice);
    }
    let (pending, held) = (info.num_pending, info.num_ack_pending);
    Finding::ok(what, format!("as it would be made; {pending} not delivered yet, {held} not acknowledged"))
}

/// Tries the subjects without a message that a program hears. A message for the stream names, as the one to store it, a
/// stream that cannot be. The stream says no, and so shows that it hears us. [`Rights`] tries a worker's subjects.
///
/// Returns `true` where a stream has answered, and what is not well.
async fn may_publish(client: &Client, side: Side<'_>) -> (bool, Option<Finding>) {
    match side {
        Side::Gateway { id, .. } => {
            let receipts = client.subscribe(receipt::subject(id.unwrap_or("check"))).await; // refused: see `denials`
            let subject = tried_subject();
            let mut headers = HeaderMap::new();
            headers.insert(NATS_EXPECTED_STREAM, "no stream has a name like this");
            let request = Request::new().headers(headers).timeout(Some(TRY_WITHIN));
            let answer = client.send_request(subject.clone(), request).await;
            drop(receipts);
            match answer {
                Ok(answer) => {
                    let json = serde_json::from_slice::<serde_json::Value>(&answer.payload);
                    (json.is_ok_and(|json| json["error"].is_object()), None)
                }
                Err(error) if error.kind() == RequestErrorKind::NoResponders => {
                    let advice = "a stream that takes some resources only is used for those; all else is set aside";
                    (false, Some(Finding::warning(format!("subject {subject}"), "no stream takes it", advice)))
                }
                Err(error) => {
                    let advice = "where the login may not publish there, that is told below";
                    let finding = Finding::warning(format!("subject {subject}"), format!("no answer: {error}"), advice);
                    (false, Some(finding))
                }
            }
        }
        Side::Worker => (false, None),
    }
}

/// A subject of deliveries that no delivery has.
fn tried_subject() -> String {
    format!("{SUBJECT_PREFIX}.check")
}

/// A problem for each refusal of a right that the program needs. It does not need the look at the account.
async fn denials(link: &Link, rights: &Rights) -> Vec<Finding> {
    let is_needed = |refusal: &String| ![ACCOUNT_INFO, STREAM_NAMES].iter().any(|subject| is_about(refusal, subject));
    let denied = link.denied().await.into_iter().filter(is_needed);
    denied.map(|refusal| Finding::problem("NATS permissions", refusal, rights.advice())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_shown_without_its_login() {
        let shown = |url: &str| shown(&url.parse().unwrap());
        assert_eq!(shown("nats://user:hunter2@nats:4333"), "nats://nats:4333");
        assert_eq!(shown("tls://hunter2@nats"), "tls://nats:4222");
        assert_eq!(shown("nats://[::1]:4222"), "nats://[::1]:4222");
    }
}
