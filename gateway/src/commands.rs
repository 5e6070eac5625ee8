//! `gateway journal`: what operators do with a journal.
//!
//! - `status` and `redrive` read without the lock, so also while a gateway runs on the journal.
//! - `drain` takes the lock: it is for the journal of a gateway that is no more.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use clap::{Arg, ArgAction, ArgMatches, Command};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use shared::delivery::Delivery;
use shared::operator;
use shared::ops::Readiness;
use shared::receipt::ReceiptTo;
use shared::stream::{ensure_stream, until_ready};
use shared::text::{printable, printable_json, printable_lines};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;

use crate::Settling;
use crate::journal::{Journal, Listed, Share, Snapshot, State, Stored};
use crate::metrics::Metrics;
use crate::publish::Publisher;
use crate::receipts::ReceiptKey;
use crate::settings::JournalConfig;

/// Messages that may wait in a subscription; a command on a journal has none.
const QUEUE: usize = 64;

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
            let snapshot = look(&config.journal.dir).await?;
            if arguments.get_flag("json") {
                println!("{}", printable_json(&status_json(&snapshot).to_string()))
            } else {
                print!("{}", printable_lines(&status(&snapshot)))
            }
            Ok(())
        }
        "redrive" => {
            let since = *arguments.get_one::<SystemTime>("since").expect("clap requires it");
            redrive(&config, since, arguments.get_flag("dry-run")).await
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
async fn redrive(config: &JournalConfig, since: SystemTime, dry: bool) -> anyhow::Result<()> {
    let snapshot = look(&config.journal.dir).await?;
    let gateway = snapshot.gateway_id().unwrap_or_default().to_owned();
    let due = || snapshot.entries().filter(|entry| entry.received_at() >= since);
    println!("{} deliveries received since {} are in the journal", due().count(), when(since));
    if dry {
        return Ok(());
    }
    let readiness = Readiness::default();
    let link = config.nats.connect("gateway journal redrive", QUEUE, &readiness, |_| ()).await?;
    let ensure = || async { ensure_stream(&link.current().context, &config.nats).await };
    until_ready("stream", &readiness, ensure).await;
    // Made by the gateway at its first start with tags. Without it, no receipt can settle these entries.
    let key = snapshot.receipt_key().map(ReceiptKey::new);
    // The same for all of this run, and none that was used before.
    let repeat = u32::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap_or(u32::MAX);
    let (mut published, mut failed) = (0_u64, 0_u64);
    for entry in due() {
        let place = entry.place();
        match redrive_one(&entry, &gateway, key.as_ref(), repeat, &link.current().context).await {
            Ok(()) => published += 1,
            Err(error) => {
                failed += 1;
                eprintln!("the entry at {place} is not published: {}", printable(&format!("{error:#}")));
            }
        }
    }
    let result = format!("published {published}, failed {failed}");
    operator::log_end("gateway journal redrive", &format!("--since {}", when(since)), &result);
    println!("published {published}");
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
) -> anyhow::Result<()> {
    let Stored { place, meta, body, .. } = tokio::task::block_in_place(|| entry.read())?;
    let delivery = Delivery::from_journal(&meta, body)?;
    let receipt_to = match key {
        Some(key) => key.receipt_to(gateway, place, &delivery.id),
        None => ReceiptTo::new(gateway, place),
    };
    let headers = delivery.headers(repeat, &receipt_to);
    context.publish_with_headers(delivery.subject(), headers, delivery.body.clone()).await?.await?;
    tracing::debug!(delivery.id = %delivery.id, trace.id = delivery.trace_id(), %place, "published a delivery again");
    Ok(())
}

/// Publishes an orphaned journal and waits until every delivery in it is confirmed.
async fn drain(config: &JournalConfig, shutdown: CancellationToken) -> anyhow::Result<()> {
    let Some(opened) = shutdown.run_until_cancelled(crate::open_journal(&config.journal)).await else {
        bail!("stopped before the journal was open");
    };
    let journal = opened?;
    let readiness = Readiness::default();
    let metrics = Metrics::new(&mut Registry::default(), &journal);
    let publisher = Publisher::connect(&config.nats, journal.clone(), &readiness, metrics.clone()).await?;
    let settling = Settling { journal: &journal, publisher: &publisher, metrics: &metrics };
    let done = CancellationToken::new();
    let before = unconfirmed(&journal);
    let wait = async {
        let mut told = None;
        loop {
            let left = unconfirmed(&journal);
            if told != Some(left) {
                println!("{left} deliveries are not confirmed yet");
                told = Some(left);
            }
            if left == 0 || shutdown.is_cancelled() {
                break done.cancel();
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::join!(wait, settling.run(&config.nats, config.journal.confirm_after, &readiness, &done));
    let (left, aside) = (unconfirmed(&journal), journal.stats().share(State::SetAside).tally.entries);
    journal.close().await;
    let confirmed = before.saturating_sub(left);
    let filter = format!("--dir {}", config.journal.dir.display());
    let result = format!("confirmed {confirmed}, left {left}, set aside {aside}");
    operator::log_end("gateway journal drain", &filter, &result);
    match (left, aside) {
        (0, 0) => println!("the journal is empty; its directory can go"),
        (0, aside) => bail!("{aside} deliveries are left that NATS refuses; see `gateway journal status`"),
        (left, _) => bail!("stopped with {left} deliveries not confirmed; they are still in the journal"),
    }
    Ok(())
}

/// What may still be confirmed: all but what is set aside.
fn unconfirmed(journal: &Journal) -> u64 {
    let stats = journal.stats();
    [State::Journalled, State::Published].map(|state| stats.share(state).tally.entries).iter().sum()
}
