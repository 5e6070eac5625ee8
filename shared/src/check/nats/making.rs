//! A stream that is missing: could the gateway make it as it is wanted?

use async_nats::Request;
use async_nats::jetstream::account::Account;
use async_nats::jetstream::context::CreateStreamErrorKind;
use async_nats::jetstream::stream::{self, Republish};
use async_nats::jetstream::{self, ErrorCode};
use serde::Deserialize;

use super::rights::STREAM_NAMES;
use super::{Link, Side, TRY_WITHIN, tried_subject};
use crate::check::{Finding, size};
use crate::stream::{NatsSettings, SUBJECT_PREFIX};

/// The words of the connection and the account: replicas, storage, number of streams.
pub(super) fn look(
    what: &str,
    nats: &NatsSettings,
    side: Side<'_>,
    link: &Link,
    account: Option<&Account>,
) -> Vec<Finding> {
    let wanted = nats.stream_config();
    let days = wanted.max_age.as_secs_f64() / 86_400.0;
    let bytes = u64::try_from(wanted.max_bytes).unwrap_or(0);
    let as_wanted = format!("{} on disk, {days:.1} days, {} replica(s)", size(bytes), wanted.num_replicas);
    let maker = if matches!(side, Side::Gateway { .. }) { "the gateway" } else { "a gateway" };
    let mut findings = vec![Finding::ok(
        what,
        format!("not there yet: {maker} makes it ({as_wanted}); the servers' free disk cannot be seen from here"),
    )];
    let info = link.client.server_info();
    if wanted.num_replicas > 1 && info.cluster.is_none() {
        let detail = format!("{} wanted, and this server is alone: it would refuse", wanted.num_replicas);
        let advice = "set NATS_REPLICAS to 1, or name the servers of a cluster in NATS_URL";
        findings.push(Finding::problem(format!("{what}, replicas"), detail, advice));
    } else if wanted.num_replicas > info.connect_urls.len().max(1) {
        let detail = format!("{} wanted, {} servers are known", wanted.num_replicas, info.connect_urls.len().max(1));
        let advice = "start the others, or set NATS_REPLICAS to what there is; servers may also hide behind one name";
        findings.push(Finding::warning(format!("{what}, replicas"), detail, advice));
    }
    let Some(account) = account else { return findings };
    // If limits are by tier, as for replicated streams in the cloud, the tier's hold and the account has none.
    let tier = account.tiers.get(&format!("R{}", wanted.num_replicas));
    let (limits, storage, streams) = tier
        .map_or((account.limits, account.storage, account.streams), |tier| (tier.limits, tier.storage, tier.streams));
    let limit = limits.max_storage.and_then(|limit| u64::try_from(limit).ok());
    if let Some(limit) = limit.filter(|limit| storage + bytes > *limit) {
        let detail =
            format!("{} of it are used, NATS_MAX_BYTES is {}: it would be refused", size(storage), size(bytes));
        let advice = format!("raise the account's max_file ({}), or lower NATS_MAX_BYTES", size(limit));
        findings.push(Finding::problem("NATS account, storage", detail, advice));
    }
    let most = limits.storage_max_stream_bytes.and_then(|most| u64::try_from(most).ok()).unwrap_or(0); // 0: no limit
    if most > 0 && bytes > most {
        let detail = format!("a stream may have {}, NATS_MAX_BYTES is {}", size(most), size(bytes));
        findings.push(Finding::problem(
            "NATS account, stream size",
            detail,
            "lower NATS_MAX_BYTES, or raise the limit",
        ));
    }
    let streams_max = limits.max_streams.and_then(|most| usize::try_from(most).ok());
    if streams_max.is_some_and(|most| streams >= most) {
        let detail = format!("it has the {streams} streams that it may have");
        findings.push(Finding::problem("NATS account, streams", detail, "raise the account's max_streams"));
    }
    findings
}

/// The answer to [`STREAM_NAMES`].
#[derive(Deserialize)]
struct Names {
    streams: Option<Vec<String>>,
}

/// Tells if another stream has some of the subjects. NATS refuses a second one with them. `listed`: this login may list
/// streams. `heard`: a stream has answered on [`tried_subject`].
pub(super) async fn subjects(what: &str, link: &Link, listed: bool, heard: bool) -> Finding {
    let (what, subjects) = (format!("{what}, subjects"), format!("{SUBJECT_PREFIX}.*"));
    let advice = "give that stream other subjects, or have NATS_STREAM name it where it is meant for deliveries";
    let names = if listed { other_streams(link, &subjects).await } else { None };
    match names {
        Some(names) if !names.is_empty() => {
            let detail = format!(
                "another stream has some of {subjects}: {}; the server would refuse this one",
                names.join(", ")
            );
            Finding::problem(what, detail, advice)
        }
        Some(_) => Finding::ok(what, format!("no other stream has any of {subjects}")),
        None if heard => {
            let detail = format!("another stream takes {}; the server would refuse this one", tried_subject());
            Finding::problem(what, detail, advice)
        }
        None => {
            let detail =
                format!("no stream takes {}; one with other subjects of {subjects} cannot be seen", tried_subject());
            let advice = format!("the gateway needs no right to {STREAM_NAMES}; with it a check sees all streams");
            Finding::not_tried(what, detail, advice)
        }
    }
}

/// The streams of this account that have some of these subjects. `None` without an answer.
async fn other_streams(link: &Link, subjects: &str) -> Option<Vec<String>> {
    let asked = serde_json::json!({ "subject": subjects }).to_string();
    let request = Request::new().payload(asked.into()).timeout(Some(TRY_WITHIN));
    let answer = link.client.send_request(STREAM_NAMES.to_owned(), request).await.ok()?;
    Some(serde_json::from_slice::<Names>(&answer.payload).ok()?.streams.unwrap_or_default())
}

/// Tells if the server's own storage limit leaves room for the stream. No client can ask for that limit. So the check asks
/// for a stream that cannot be made: its last part is no subject. The server looks at its limit first.
///
/// Not in a cluster: there one server takes the request and another looks at the limit.
pub(super) async fn storage(what: &str, nats: &NatsSettings, link: &Link, context: &jetstream::Context) -> Finding {
    let what = format!("{what}, storage");
    let not_tried = |detail: String| {
        let advice = "compare max_file_store of the servers with NATS_MAX_BYTES";
        Finding::not_tried(what.clone(), detail, advice)
    };
    if link.client.server_info().cluster.is_some() {
        return not_tried("the limits of a cluster's servers cannot be tried without making the stream".into());
    }
    let no_subject = Republish { source: "no..subject".into(), destination: "none".into(), headers_only: true };
    let wanted = stream::Config { republish: Some(no_subject), ..nats.stream_config() };
    let bytes = size(u64::try_from(wanted.max_bytes).unwrap_or(0));
    let Err(error) = context.create_stream(wanted).await else {
        return Finding::problem(
            what,
            "the server has made a stream out of what is none",
            "look at it with the nats command",
        );
    };
    let code = if let CreateStreamErrorKind::JetStream(error) = error.kind() { Some(error.error_code()) } else { None };
    match code {
        Some(ErrorCode::STORAGE_RESOURCES_EXCEEDED) => {
            let detail = format!("the server has no {bytes} left for a stream: it would refuse NATS_MAX_BYTES");
            let advice = "raise max_file_store in the server's configuration, or lower NATS_MAX_BYTES";
            Finding::problem(what, detail, advice)
        }
        Some(ErrorCode::STREAM_INVALID_CONFIG) => Finding::ok(what, format!("the server's limit has room for {bytes}")),
        _ => not_tried(format!("the server's limit cannot be tried: {error}")),
    }
}
