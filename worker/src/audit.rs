//! `worker audit`: accounts for every message that the stream has. Changes nothing.
//!
//! A delivery counts once, by the message that it was stored from; another message with the same id (published again
//! for want of a receipt, say) is a repeat. So the lines of the result add up to the messages read.
//!
//! The span is fixed first, then the consumer is looked at, then the ledger. A worker acknowledges only what it has
//! committed: what was acknowledged then and is not in the ledger now is missing. The consumer tells three parts of the
//! stream apart:
//! - Up to its ack floor everything is acknowledged. A message without a ledger row is missing.
//! - Beyond what it has delivered nothing is acknowledged. A message without a ledger row is pending.
//! - In between it tells only how many messages are not acknowledged. At most as many can be pending; if more are without
//!   a ledger row, the others are missing. The consumer does not tell which.
//!
//! Whole messages are read: a consumer that leaves the bodies out makes nats-server 2.15 panic over a header block of one
//! byte. Only counts are kept, besides the ids that are named and 16 bytes for each delivery that
//! is not in the ledger (so that its repeats do not count again).

use std::collections::HashSet;
use std::pin::pin;

use anyhow::Context as _;
use async_nats::jetstream::context::ConsumerInfoErrorKind;
use async_nats::jetstream::stream::Stream;
use clap::{ArgMatches, Command};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};
use shared::stream::CONSUMER;
use shared::text::printable;
use time::OffsetDateTime;

use crate::Config;
use crate::commands::{self, Ending, Progress, count, flag, patiently, print, print_json, show_time, time_option};
use crate::reading::{Entry, From, Reading, Span, Until};
use crate::replay::fingerprint;
use crate::store::{Fate, Known, LOOK_UP, Store};

/// How many batches are looked up at once.
const AT_ONCE: usize = 3;
/// How many ids of a kind are named without `--verbose`.
const NAMED: usize = 20;

const AFTER_HELP: &str = "\
stored      both rows are there (also where Loop has marked the issue as deleted)
pending     not acknowledged yet; a worker will store it
missing     acknowledged, and not in the ledger: `worker replay` brings it back
repeats     further messages of a delivery that is counted above
Exit codes: 0 nothing is missing; 1 something is; 2 it could not be found out; 64 wrong arguments; 130 interrupted.";

pub(crate) fn command() -> Command {
    Command::new("audit")
        .about("Account for every delivery on the stream: stored, pending, dead, discarded, deleted or missing")
        .after_help(AFTER_HELP)
        .arg(time_option("since", "Only what the stream stored at this time or later (RFC 3339, or how long ago: 2h)"))
        .arg(flag("verbose", "Name all that are missing or deleted, not only the first 20 of each"))
        .arg(flag("json", "JSON, for programs"))
}

pub(crate) async fn run(config: &Config, matches: &ArgMatches) -> anyhow::Result<Ending> {
    let link = commands::link(config).await?;
    let store = commands::store(config).await?;
    let since = matches.get_one::<OffsetDateTime>("since").map_or(From::Oldest, |since| From::Time(*since));
    let span = Span { from: since, until: Until::Newest, resource: None };
    let name = &config.nats.stream;
    let stream = link.current().context.get_stream(name).await;
    let stream = stream.with_context(|| format!("cannot look at stream {name}"))?;
    let reading = Reading::open(link, name, &span).await?;
    let consumer = Position::of(&stream).await?;
    let named = if matches.get_flag("verbose") { usize::MAX } else { NAMED };
    let mut audit = Audit { consumer, named, ..Audit::default() };
    let mut progress = Progress::new(reading.total);
    Box::pin(audit.all(&store, reading, &mut progress)).await?;
    let pace = progress.pace();
    drop(progress);
    match matches.get_flag("json") {
        true => print_json(&audit.json())?,
        false => {
            print(&format!("read {} messages of stream {name} in {pace}\n{}", count(audit.messages), audit.text()))?;
        }
    }
    Ok(if audit.missing() == 0 { Ending::Well } else { Ending::LookAtIt })
}

/// The position of the consumer.
#[derive(Debug, Default)]
struct Position {
    /// Everything up to this sequence is acknowledged.
    floor: u64,
    /// Nothing beyond this sequence was delivered.
    delivered: u64,
    /// Number of messages between the two that are not acknowledged.
    unacknowledged: u64,
}

impl Position {
    /// Of the consumer of `stream`: at the very beginning where there is none.
    async fn of(stream: &Stream) -> anyhow::Result<Position> {
        match stream.consumer_info(CONSUMER).await {
            Ok(info) => Ok(Position {
                floor: info.ack_floor.stream_sequence,
                delivered: info.delivered.stream_sequence,
                unacknowledged: info.num_ack_pending as u64,
            }),
            Err(error) if error.kind() == ConsumerInfoErrorKind::NotFound => Ok(Position::default()),
            Err(error) => Err(error).with_context(|| format!("cannot look at consumer {CONSUMER}")),
        }
    }
}

/// The deliveries of a kind that somebody should look at.
#[derive(Debug, Default)]
struct Noted {
    count: u64,
    /// The first of them: sequence, id, when the gateway received it.
    first: Vec<(u64, String, OffsetDateTime)>,
}

/// What was counted so far.
#[derive(Debug, Default)]
struct Audit {
    consumer: Position,
    /// How many ids of a kind are kept.
    named: usize,
    messages: u64,
    stored: u64,
    /// Not delivered yet.
    undelivered: u64,
    dead: u64,
    discarded: u64,
    repeats: u64,
    deleted: Noted,
    /// Missing for certain.
    missing: Noted,
    /// Between the consumer's floor and what it has delivered: pending or missing.
    unsettled: Noted,
    /// What is not in the ledger.
    unknown: HashSet<u128>,
}

impl Audit {
    async fn all(&mut self, store: &Store, reading: Reading, progress: &mut Progress) -> anyhow::Result<()> {
        let batches = stream::try_unfold(reading, |mut reading| async move {
            Ok(reading.batch(LOOK_UP).await?.map(|batch| (batch, reading)))
        });
        let look_up = |batch: Vec<Entry>| async move {
            let ids: Vec<String> = batch.iter().map(|entry| entry.id().to_string()).collect();
            let known = patiently(|| store.look_up(&ids)).await?;
            anyhow::Ok((batch, ids, known))
        };
        let mut found = pin!(batches.map_ok(look_up).try_buffered(AT_ONCE));
        while let Some(batch) = found.next().await {
            let (entries, ids, known) = batch?;
            progress.add(entries.len() as u64);
            for (entry, id) in entries.iter().zip(ids) {
                let known = known.get(&id);
                self.count(entry.sequence, id, || entry.received_at(), known);
            }
        }
        Ok(())
    }

    fn count(&mut self, sequence: u64, id: String, received: impl FnOnce() -> OffsetDateTime, known: Option<&Known>) {
        self.messages += 1;
        let Some(known) = known else {
            match self.unknown.insert(fingerprint(&id)) {
                false => self.repeats += 1,
                true if sequence > self.consumer.delivered => self.undelivered += 1,
                true if sequence > self.consumer.floor => {
                    self.unsettled.note(self.named, (sequence, id, received()));
                }
                true => self.missing.note(self.named, (sequence, id, received())),
            }
            return;
        };
        if known.stream_sequence != sequence {
            self.repeats += 1;
            return;
        }
        match known.fate {
            Fate::Stored { .. } => self.stored += 1,
            Fate::Dead => self.dead += 1,
            Fate::Discarded => self.discarded += 1,
            Fate::Deleted => self.deleted.note(self.named, (sequence, id, received())),
        }
    }

    /// Number of the unsettled that must be missing: more cannot be pending than the consumer says.
    fn missing_among(&self) -> u64 {
        self.unsettled.count.saturating_sub(self.consumer.unacknowledged)
    }

    fn missing(&self) -> u64 {
        self.missing.count + self.missing_among()
    }

    /// What is counted, in the order in which it is told.
    fn lines(&self) -> [(&'static str, u64); 7] {
        [
            ("stored", self.stored),
            ("pending", self.undelivered + self.unsettled.count - self.missing_among()),
            ("dead letters", self.dead),
            ("discarded", self.discarded),
            ("deleted by a user", self.deleted.count),
            ("missing", self.missing()),
            ("repeats", self.repeats),
        ]
    }

    fn text(&self) -> String {
        let mut text: String =
            self.lines().iter().map(|(name, number)| format!("{:>12}  {name}\n", count(*number))).collect();
        text += &self.deleted.text("deleted by a user");
        text += &self.missing.text("missing");
        if self.missing_among() > 0 {
            let (missing, all) = (count(self.missing_among()), count(self.unsettled.count));
            text +=
                &self.unsettled.text(&format!("missing are {missing} of these {all}; the others are with a worker"));
        }
        if self.missing() > 0 {
            let among = self.unsettled.first.first().filter(|_| self.missing_among() > 0);
            let first = self.missing.first.first().or(among).map_or(1, |(sequence, ..)| *sequence);
            text += &format!("\n`worker replay --from-seq {first}` stores what is missing.\n");
        }
        text
    }

    fn json(&self) -> Value {
        let mut object: serde_json::Map<String, Value> =
            self.lines().iter().map(|(name, number)| (name.replace(' ', "_"), json!(number))).collect();
        object.insert("messages".into(), json!(self.messages));
        let among = if self.missing_among() > 0 { &self.unsettled } else { &Noted::default() };
        let noted =
            [("deleted_first", &self.deleted), ("missing_first", &self.missing), ("missing_among_first", among)];
        for (name, noted) in noted {
            let list = noted.first.iter().map(|(sequence, id, received_at)| {
                json!({ "stream_sequence": sequence, "delivery_id": id, "received_at": show_time(*received_at) })
            });
            object.insert(name.into(), list.collect());
        }
        Value::Object(object)
    }
}

impl Noted {
    fn note(&mut self, most: usize, one: (u64, String, OffsetDateTime)) {
        self.count += 1;
        if self.first.len() < most {
            self.first.push(one);
        }
    }

    /// The first of them under a heading; nothing where there is none.
    fn text(&self, heading: &str) -> String {
        if self.count == 0 {
            return String::new();
        }
        let mut text = format!("\n{heading} (sequence, delivery, received at):\n");
        for (sequence, id, received_at) in &self.first {
            text += &format!("{sequence:>12}  {}  {}\n", printable(id), show_time(*received_at));
        }
        let more = self.count.saturating_sub(self.first.len() as u64);
        if more > 0 {
            text += &format!("              and {} more; --verbose names them all\n", count(more));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_message_counts_once_and_the_lines_add_up() {
        let known = |fate, stream_sequence| Known { fate, stream_sequence };
        let stored = || Fate::Stored { severity: "low".into(), title: "T".into() };
        let ledger = [
            (1, "a", Some(known(stored(), 1))),
            (2, "b", None), // acknowledged and not in the ledger
            (3, "a", Some(known(stored(), 1))),
            (4, "b", None),
            (5, "c", Some(known(Fate::Dead, 5))),
            (6, "d", Some(known(Fate::Discarded, 6))),
            (7, "e", Some(known(Fate::Deleted, 7))),
            (8, "f", None), // delivered, above the floor
            (9, "f", None),
            (10, "g", None),
            (11, "h", None), // not delivered
        ];
        let consumer = Position { floor: 7, delivered: 10, unacknowledged: 1 };
        let mut audit = Audit { consumer, named: 1, ..Audit::default() };
        for (sequence, id, known) in &ledger {
            audit.count(*sequence, (*id).to_owned(), || OffsetDateTime::UNIX_EPOCH, known.as_ref());
        }
        let counts = audit.lines().map(|(_, number)| number);
        assert_eq!(counts, [1, 2, 1, 1, 1, 2, 3]);
        assert_eq!(counts.iter().sum::<u64>(), audit.messages);
        let text = audit.text();
        assert!(text.contains("worker replay --from-seq 2") && text.contains("missing are 1 of these 2"), "{text}");
        assert_eq!(audit.json()["missing_first"][0]["delivery_id"], "b");
        assert_eq!(audit.json()["missing_among_first"][0]["delivery_id"], "f");
        audit.consumer.unacknowledged = 2;
        assert_eq!(audit.lines().map(|(_, number)| number), [1, 3, 1, 1, 1, 1, 3], "all of them may be with a worker");
    }
}
