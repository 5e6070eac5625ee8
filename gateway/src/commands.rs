//! `gateway journal`: what operators do with a journal.
//!
//! - `status` and `redrive` read without the lock, so also while a gateway runs on the journal.
//! - `drain` takes the lock: it is for the journal of a gateway that is no more.
//!
//! Each ends within a second of SIGINT or SIGTERM, whatever NATS does. A disk that hangs costs `drain` two more.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::{Arg, ArgAction, ArgMatches, Command};
use futures_util::{StreamExt as _, stream};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use shared::delivery::Delivery;
use shared::operator;
use shared::ops::Readiness;
use shared::receipt::ReceiptTo;
use shared::stream::{ensure_stream, until_ready};
use shared::text::{print, printable, printable_json, printable_lines};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;

use crate::Settling;
use crate::journal::{Journal, Listed, Outside, ReadError, Share, Snapshot, State, Stats};
use crate::metrics::Metrics;
use crate::publish::{InFlight, Publisher};
use crate::receipts::ReceiptKey;
use crate::settings::JournalConfig;

/// Messages that may wait in a subscription; a command on a journal has none.
const QUEUE: usize = 64;
/// Publishes of a redrive that are on their way at once.
const REDRIVEN_AT_ONCE: usize = 256;
/// Time for which a drain waits for what the disk does not give, when nothing else is left. It is read four times in it.
const READ_AGAIN_FOR: Duration = Duration::from_secs(15);

/// The command line below `gateway journal`.
pub fn command() -> Command {
    let json = Arg::new("json").long("json").action(ArgAction::SetTrue).help("For machines");
    let status =
        Command::new("status").about("What a journal holds: entries and bytes by state, per segment").arg(json);
    let since = Arg::new("since").long("since").value_name("TIME").required(true).value_parser(moment);
    let since = since.help("Deliveries received since then: 2026-11-23T12:00:00Z, or a span such as 2h");
    let dry = Arg::new("dry-run").long("dry-run").action(ArgAction::SetTrue).help("Only say what would be published");
    let redrive =
        Command::new("redrive").about("Publish again what the journal still holds; what is stored stays as it is");
    let drain =
        Command::new("drain").about("Publish all of a journal whose gateway is no more, and wait for the receipts");
    let dir = Arg::new("dir").long("dir").value_name("DIR").global(true);
    let dir = dir.help("The journal's directory, instead of GATEWAY_JOURNAL_DIR");
    Command::new("journal")
        .about("Look at a journal, publish it again, or empty it")
        .subcommand_required(true)
        .arg(dir)
        .subcommand(status)
        .subcommand(redrive.arg(since).arg(dry))
        .subcommand(drain)
}

/// A moment in the past, or how long ago it was.
fn moment(text: &str) -> Result<SystemTime, String> {
    let ago = |span| SystemTime::now().checked_sub(span);
    let moment = OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from);
    moment
        .or_else(|| shared::settings::duration(text).ok().and_then(ago))
        .ok_or_else(|| "a time such as 2026-11-23T12:00:00Z, or a span such as 2h".into())
}

/// Runs one of the commands.
///
/// # Errors
/// What went wrong, for a person.
pub async fn run(arguments: &ArgMatches, mut config: JournalConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    let (name, arguments) = arguments.subcommand().expect("clap requires a subcommand");
    if let Some(dir) = arguments.get_one::<String>("dir") {
        config.journal.dir = dir.into();
    }
    match name {
        "status" => {
            let looked = shutdown.run_until_cancelled(look(&config.journal.dir)).await;
            let snapshot = looked.context("stopped")??;
            if arguments.get_flag("json") {
                print(&format!("{}\n", printable_json(&status_json(&snapshot).to_string())))?;
            } else {
                print(&printable_lines(&status(&snapshot)))?;
            }
            Ok(())
        }
        "redrive" => {
            let since = *arguments.get_one::<SystemTime>("since").expect("clap requires it");
            Box::pin(redrive(&config, since, arguments.get_flag("dry-run"), &shutdown)).await
        }
        _ => Box::pin(drain(&config, shutdown)).await,
    }
}

async fn look(dir: &Path) -> anyhow::Result<Snapshot> {
    let owned = dir.to_owned();
    let looked = tokio::task::spawn_blocking(move || Snapshot::of(&owned)).await?;
    let snapshot = looked.with_context(|| format!("cannot look into the journal {}", dir.display()))?;
    if snapshot.gateway_id().is_none() {
        bail!("{} is no journal: no gateway ever ran on it", dir.display());
    }
    Ok(snapshot)
}

fn status(snapshot: &Snapshot) -> String {
    let mut text = format!("journal of gateway {}\n\n", printable(snapshot.gateway_id().unwrap_or_default()));
    text += &format!("{:<12} {:>10} {:>12}   oldest\n", "state", "entries", "bytes");
    text.extend(snapshot.shares().iter().map(|share| {
        let size = bytesize::ByteSize(share.tally.bytes).to_string();
        let oldest = share.oldest.map(when).unwrap_or_default();
        format!("{:<12} {:>10} {:>12}   {oldest}\n", share.state.as_str(), share.tally.entries, size)
    }));
    text += "\nsegment                                  bytes  journalled  published  confirmed  set aside\n";
    text.extend(snapshot.segments().map(|segment| {
        let name = segment.file.file_name().unwrap_or_default().to_string_lossy();
        let name = printable(&name);
        let damaged = if segment.damaged { "  damaged" } else { "" };
        let entries = segment.shares.map(|share| share.tally.entries);
        let [journalled, published, confirmed, aside] = entries;
        let size = bytesize::ByteSize(segment.bytes).to_string();
        format!("{name:<34} {size:>11} {journalled:>11} {published:>10} {confirmed:>10} {aside:>10}{damaged}\n")
    }));
    for file in snapshot.unreadable() {
        text += &format!("{} cannot be read\n", printable(&file.to_string_lossy()));
    }
    for (file, bytes) in snapshot.damaged() {
        let file = file.to_string_lossy();
        text += &format!("{} is damaged and kept for you to look at ({bytes} bytes)\n", printable(&file));
    }
    text
}

fn status_json(snapshot: &Snapshot) -> Value {
    let states = |shares: [Share; State::ALL.len()]| -> Value {
        let state = |share: Share| {
            let told = json!({
                "entries": share.tally.entries,
                "bytes": share.tally.bytes,
                "oldest": share.oldest.map(when),
            });
            (share.state.as_str().to_owned(), told)
        };
        Value::Object(shares.into_iter().map(state).collect())
    };
    let segments = snapshot.segments().map(|segment| {
        json!({ "file": segment.file, "bytes": segment.bytes, "damaged": segment.damaged, "states": states(segment.shares) })
    });
    json!({
        "gateway": snapshot.gateway_id(),
        "states": states(snapshot.shares()),
        "segments": segments.collect::<Vec<_>>(),
        "unreadable": snapshot.unreadable(),
        "damaged": snapshot.damaged().iter().map(|(file, _)| file).collect::<Vec<_>>(),
    })
}

fn when(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}

/// Publishes again what was received since `since` and is still in the journal, whatever became of it. Each message has a
/// new id, so that the duplicate window does not swallow it; the delivery's own id makes it harmless.
async fn redrive(
    config: &JournalConfig,
    since: SystemTime,
    dry: bool,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    const NOTHING: &str = "stopped before anything was published";
    let snapshot = shutdown.run_until_cancelled(look(&config.journal.dir)).await.context(NOTHING)??;
    let gateway = snapshot.gateway_id().unwrap_or_default().to_owned();
    let due = || snapshot.entries().filter(|entry| entry.received_at() >= since);
    let count = due().count();
    print(&format!("{count} deliveries received since {} are in the journal\n", when(since)))?;
    if dry {
        return Ok(());
    }
    let readiness = Readiness::default();
    let link = config.nats.connect("gateway journal redrive", QUEUE, &readiness).await?;
    let ensure = || async { ensure_stream(&link.current().context, &config.nats).await };
    shutdown.run_until_cancelled(until_ready("stream", &readiness, ensure)).await.context(NOTHING)?;
    // Made by the gateway at its first start with tags. Without it, no receipt can settle these entries.
    let key = snapshot.receipt_key().map(ReceiptKey::new);
    // The same for all of this run, and none that was used before.
    let repeat = u32::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap_or(u32::MAX);
    let in_flight = InFlight::new();
    let (gateway, key, in_flight) = (&gateway, key.as_ref(), &in_flight);
    let publishes = due().map(|entry| {
        let linked = link.current();
        async move { (entry.place(), redrive_one(&entry, gateway, key, repeat, &linked.context, in_flight).await) }
    });
    let mut publishes = stream::iter(publishes).buffer_unordered(REDRIVEN_AT_ONCE);
    let (mut published, mut let_go, mut failed) = (0, 0, 0);
    while let Some(Some((place, ended))) = shutdown.run_until_cancelled(publishes.next()).await {
        match ended {
            Ok(()) => published += 1,
            // A gateway that runs on the journal lets go of what is stored.
            Err(error) if matches!(error.downcast_ref(), Some(ReadError::Unknown)) => let_go += 1,
            Err(error) => {
                failed += 1;
                eprintln!("the entry at {place} is not published: {}", printable(&format!("{error:#}")));
            }
        }
    }
    let left = count - published - let_go - failed;
    let result = format!("published {published}, let go {let_go}, failed {failed}, left {left}");
    operator::log_end("gateway journal redrive", &format!("--since {}", when(since)), &result);
    let gone = if let_go == 0 { String::new() } else { format!(", {let_go} let go by the gateway meanwhile") };
    print(&format!("published {published}{gone}\n"))?;
    if left > 0 {
        bail!("stopped with {left} deliveries not published again, or without an acknowledgement; run it again");
    }
    if failed > 0 {
        bail!("{failed} deliveries are not published; what is not stored is still the gateway's to publish");
    }
    Ok(())
}

async fn redrive_one(
    entry: &Listed<'_>,
    gateway: &str,
    key: Option<&ReceiptKey>,
    repeat: u32,
    context: &async_nats::jetstream::Context,
    in_flight: &InFlight,
) -> anyhow::Result<()> {
    let mut meta = Bytes::new();
    let read = async {
        let stored = tokio::task::block_in_place(|| entry.read())?;
        meta = stored.meta;
        Ok::<_, ReadError>(stored.body)
    };
    let body = in_flight.reread(entry.bytes(), read).await?;
    let (place, mut delivery) = (entry.place(), Delivery::from_journal(&{ meta }, body)?);
    let receipt_to = match key {
        Some(key) => key.receipt_to(gateway, place, &delivery.id),
        None => ReceiptTo::new(gateway, place),
    };
    let headers = delivery.headers(repeat, &receipt_to);
    let body = std::mem::take(&mut delivery.body); // the client's: its memory is free once it is written
    context.publish_with_headers(delivery.subject(), headers, body).await?.await?;
    tracing::debug!(delivery.id = %delivery.id, trace.id = delivery.trace_id(), %place, "published a delivery again");
    Ok(())
}

/// Publishes an orphaned journal and waits until every delivery in it is confirmed.
///
/// Entries that NATS refused before are tried once more, under today's limits. Entries that the disk does not give are
/// tried for [`READ_AGAIN_FOR`].
async fn drain(config: &JournalConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    let dir = config.journal.dir.clone();
    // Opening makes a journal where there is none, and the operator may have mistyped the directory.
    let outside = tokio::task::spawn_blocking(move || Outside::look(&dir)).await?;
    let dir = config.journal.dir.display();
    let outside = outside.with_context(|| format!("cannot look into the journal {dir}"))?;
    if !outside.is_journal {
        bail!("{dir} is no journal: no gateway ever ran on it");
    }
    let Some(opened) = shutdown.run_until_cancelled(crate::open_journal(&config.journal)).await else {
        bail!("stopped before the journal was open");
    };
    let journal = opened?;
    let readiness = Readiness::default();
    let metrics = Metrics::new(&mut Registry::default(), &journal);
    let publisher = Publisher::connect(&config.nats, journal.clone(), &readiness, metrics.clone()).await?;
    let settling = Settling { journal: &journal, publisher: &publisher, metrics: &metrics };
    let done = CancellationToken::new();
    let wait = async {
        until_drained(&journal, &publisher, &shutdown).await;
        done.cancel();
    };
    tokio::join!(wait, settling.run(&config.nats, config.journal.confirm_after, &readiness, &done));
    let stats = journal.stats();
    let (left, aside, unreadable) =
        (unconfirmed(&stats), stats.share(State::SetAside).tally.entries, stats.unreadable_entries);
    crate::close(&journal, tokio::time::Instant::now() + crate::CLOSING).await;
    let counts = metrics.counts();
    let result = format!("published {}, confirmed {}", counts.published, counts.confirmed);
    let logged = format!("{result}, left {left}, set aside {aside}, unreadable {unreadable}");
    operator::log_end("gateway journal drain", &format!("--dir {dir}"), &logged);
    if left + aside + unreadable == 0 {
        let damaged = match stats.damaged_files {
            0 => "it is empty and can go".to_owned(),
            files => format!("{files} damaged files are kept in it for you to look at"),
        };
        return Ok(print(&format!("{}\n", printable(&format!("drained {dir}: {result}; {damaged}"))))?);
    }
    let some = |count: u64, what: &str| (count > 0).then(|| format!("{count} {what}"));
    let reasons =
        [some(left, "not confirmed yet"), some(aside, "refused by NATS"), some(unreadable, "not given by the disk")];
    let reasons = reasons.into_iter().flatten().collect::<Vec<_>>().join(", ");
    let ended = if shutdown.is_cancelled() { "stopped" } else { "not drained" };
    bail!("{ended}: {reasons}. These deliveries are still in the journal {dir}: keep it. The log says why ({result})")
}

/// Waits until nothing is left in the journal that could be confirmed, or `shutdown`.
async fn until_drained(journal: &Journal, publisher: &Publisher, shutdown: &CancellationToken) {
    let (mut told, mut looked, mut rest) = (None, false, None);
    while !shutdown.is_cancelled() {
        // The first look at the stream is what lets set-aside entries be tried again.
        looked |= publisher.is_up();
        let stats = journal.stats();
        looked |= stats.share(State::SetAside).tally.entries == 0;
        let left = unconfirmed(&stats);
        if told != Some(left) {
            let _ = print(&format!("{left} deliveries are not confirmed yet\n")); // the work goes on unseen
            told = Some(left);
        }
        let nothing_is_left = looked && left == 0;
        let since = if nothing_is_left { *rest.get_or_insert_with(Instant::now) } else { Instant::now() };
        if nothing_is_left && (stats.unreadable_entries == 0 || since.elapsed() > READ_AGAIN_FOR) {
            return;
        }
        let _ = tokio::time::timeout(Duration::from_millis(200), shutdown.cancelled()).await;
    }
}

/// Entries that may still be confirmed: all but what is set aside, and what the disk does not give.
fn unconfirmed(stats: &Stats) -> u64 {
    stats.to_publish() + stats.unverified + stats.share(State::Published).tally.entries
}
