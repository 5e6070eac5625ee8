//! `worker replay`: what is on the stream and not in the database is stored, as a worker would have stored it.
//!
//! 1. [`Reading`] reads the stream in place.
//! 2. The ledger is asked for the ids of a batch ([`Store::look_up`]), so that only what is missing is read and sent.
//! 3. [`Store::persist`] stores that, in the transaction that workers use: either may come first, and both may at once.
//!
//! What the ledger has is not touched: not a row that somebody edited, and none that somebody deleted (but
//! `--restore-deleted`), no dead letter and none that was discarded (but `--restore-discarded`). With `--dry-run` step 3 only tries
//! ([`Store::try_out`]).

mod findings;
mod options;

use std::collections::HashSet;
use std::pin::pin;
use std::time::Duration;

use clap::ArgMatches;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use shared::operator;
use shared::text::printable;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::commands::{self, Ending, Progress, count, patiently, patiently_while};
use crate::dead_letters::DeadLetter;
use crate::reading::Reading;
use crate::store::{Batch, Dead, LOOK_UP, Record, SetBack, Store, StoreError, Stored, Tried, tell};

use findings::{Found, Outcome, Totals, find};
use options::Options;
pub(crate) use options::command;

/// How many batches are looked up and read at once.
const AT_ONCE: usize = 3;

pub(crate) async fn run(
    config: &Config,
    matches: &ArgMatches,
    interruption: &CancellationToken,
) -> anyhow::Result<Ending> {
    let options = Options::of(matches);
    let link = commands::link(config).await?;
    let store = commands::store(config).await?;
    let reading = Reading::open(link, &config.nats.stream, &options.span).await?;
    let mut replay = Replay {
        store: &store,
        options: &options,
        batch_max: config.batch_max,
        progress: Progress::new(reading.total),
        totals: Totals::default(),
        foreseen: HashSet::new(),
        next: None,
    };
    let ended = interruption.run_until_cancelled(Box::pin(replay.all(reading))).await;
    let Replay { progress, totals, next, .. } = replay;
    let pace = progress.pace();
    drop(progress);
    if !options.dry_run {
        operator::log_end("worker replay", &options.filter(), &totals.summary());
    }
    let (read, stream) = (count(totals.read()), &config.nats.stream);
    commands::print(&format!("read {read} messages of stream {stream} in {pace}\n{}", totals.table(options.dry_run)))?;
    let go_on = || match next {
        Some(next) => format!("go on with: {}", options.going_on(next)),
        None => "nothing was done yet; run it again".to_owned(),
    };
    match ended {
        Some(Ok(())) if totals.look_at_it() => Ok(Ending::LookAtIt),
        Some(Ok(())) => Ok(Ending::Well),
        Some(Err(error)) => Err(error.context(format!("stopped before the end; {}", go_on()))),
        None => {
            eprintln!("interrupted; {}", go_on());
            Ok(Ending::Interrupted)
        }
    }
}

/// The changes of a batch, done or foreseen.
#[derive(Debug, Default)]
struct Done {
    /// The deliveries to which something was done.
    ids: HashSet<String>,
    /// Those of them that are dead letters now, and those that could not be restored.
    dead: Vec<Dead>,
    /// Those that are not stored, because their rows are refused for an unclear reason. In a dry run also those that would
    /// not be restored.
    left: Vec<SetBack>,
}

/// A replay under way.
struct Replay<'a> {
    store: &'a Store,
    options: &'a Options,
    batch_max: usize,
    progress: Progress,
    totals: Totals,
    /// Dry run only: what would have been stored by now, as a replay would meet it again in the ledger. 16 bytes each.
    foreseen: HashSet<u128>,
    /// Everything before this sequence is done.
    next: Option<u64>,
}

impl Replay<'_> {
    /// Reads and handles everything. Dropping this loses nothing: what `next` does not count is done again, harmlessly.
    async fn all(&mut self, reading: Reading) -> anyhow::Result<()> {
        let (store, options) = (self.store, self.options);
        let size = options.rate.map_or(LOOK_UP, |rate| usize::try_from(rate).map_or(LOOK_UP, |rate| rate.min(LOOK_UP)));
        let batches = stream::try_unfold(reading, |mut reading| async move {
            Ok(reading.batch(size).await?.map(|batch| (batch, reading)))
        });
        let mut found = pin!(batches.map_ok(|batch| find(store, options, batch)).try_buffered(AT_ONCE));
        let begun = Instant::now();
        while let Some(batch) = found.next().await {
            let batch: Vec<Found> = batch?;
            let (messages, last) = (batch.len() as u64, batch.last().map(|found| found.sequence));
            self.take(batch).await?;
            self.next = last.map(|last| last + 1);
            self.progress.add(messages);
            if let Some(rate) = self.options.rate {
                let due = Duration::from_secs_f64(self.totals.read() as f64 / rate as f64);
                tokio::time::sleep_until(begun + due).await;
            }
        }
        Ok(())
    }

    /// One batch: stores and restores, or only tries to, and counts what became of each message.
    async fn take(&mut self, batch: Vec<Found>) -> anyhow::Result<()> {
        let mut missing = Batch::default();
        let (mut deleted, mut discarded) = (Vec::new(), Vec::new());
        let mut told = Vec::with_capacity(batch.len());
        for Found { sequence, delivery_id, outcome, read } in batch {
            if outcome == Outcome::TakenBack {
                discarded.push(delivery_id.clone());
            }
            match (&outcome, read) {
                (Outcome::Inserted | Outcome::TakenBack, Some(Ok(record))) => missing.records.push(*record),
                (Outcome::Inserted | Outcome::TakenBack, Some(Err(dead))) => missing.dead_letters.push(*dead),
                (Outcome::Restored, Some(Ok(record))) => deleted.push(*record),
                _ => {}
            }
            told.push((sequence, delivery_id, outcome));
        }
        let Done { ids: mut done, dead, left } = match self.options.dry_run {
            true => self.try_out(&missing, &deleted).await?,
            false => {
                if !discarded.is_empty() {
                    patiently(|| self.store.forget_discarded(&discarded)).await?;
                }
                self.write(&missing, &deleted).await?
            }
        };
        let mut lines = String::new();
        for (sequence, id, outcome) in told {
            let letter = || dead.iter().find(|dead| dead.delivery_id == id);
            let left = left.iter().find(|left| left.delivery_id == id);
            let mine = done.remove(&id); // a second message of the same delivery finds it there
            let (outcome, reason) = match outcome {
                Outcome::Inserted | Outcome::TakenBack if left.is_some() => {
                    (Outcome::NotStored, left.map(|left| &left.reason))
                }
                Outcome::Inserted | Outcome::TakenBack if !mine => (Outcome::There, None),
                Outcome::Inserted | Outcome::TakenBack => {
                    letter().map_or((outcome, None), |dead| (Outcome::Buried, Some(&dead.reason)))
                }
                Outcome::Restored => match letter().map(|dead| &dead.reason).or(left.map(|left| &left.reason)) {
                    Some(reason) => (Outcome::NotRestored, Some(reason)),
                    None if mine => (outcome, None),
                    None => (Outcome::There, None),
                },
                Outcome::Buried
                | Outcome::There
                | Outcome::Differs(_)
                | Outcome::Deleted
                | Outcome::NotStored
                | Outcome::NotRestored
                | Outcome::Dead
                | Outcome::Discarded => (outcome, None),
            };
            self.totals.add(&outcome);
            if self.options.verbose {
                let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
                let words = format!("{}{reason}", outcome.words(self.options.dry_run));
                lines += &format!("{sequence}  {}  {}\n", printable(&id), printable(&words));
            }
        }
        if !lines.is_empty() {
            self.progress.print(&lines)?;
        }
        Ok(())
    }

    /// Stores what is missing and restores what was deleted.
    async fn write(&self, missing: &Batch, deleted: &[Record]) -> Result<Done, StoreError> {
        let mut done = Done::default();
        let letters = missing.dead_letters.chunks(self.batch_max).map(|letters| (&[][..], letters));
        let records = missing.records.chunks(self.batch_max).map(|records| (records, &[][..]));
        for (records, letters) in records.chain(letters) {
            let (records, dead_letters): (&[Record], &[DeadLetter]) = (records, letters);
            let part = Batch { records: records.to_vec(), dead_letters: dead_letters.to_vec() };
            let stored = self.store(&part).await?;
            tell(&stored, &part);
            done.ids.extend(stored.fresh);
            done.ids.extend(stored.dead.iter().map(|dead| dead.delivery_id.clone()));
            done.dead.extend(stored.dead);
            done.left.extend(stored.set_back);
        }
        let deleted: Vec<&Record> = deleted.iter().collect();
        for part in deleted.chunks(self.batch_max) {
            let restored = patiently(|| self.store.restore(part)).await?;
            done.ids.extend(restored.restored);
            done.dead.extend(restored.refused);
        }
        Ok(done)
    }

    /// Stores `part`. Single rows that fail for an unclear reason are left out.
    async fn store(&self, part: &Batch) -> Result<Stored, StoreError> {
        let may_pass = |error: &StoreError| error.is_outage() && !error.is_unclear();
        match patiently_while(may_pass, || self.store.persist(part)).await {
            Err(error) if error.is_unclear() => patiently(|| self.store.persist_each(part)).await,
            outcome => outcome,
        }
    }

    /// The same, only foreseen.
    async fn try_out(&mut self, missing: &Batch, deleted: &[Record]) -> Result<Done, StoreError> {
        let mut fresh = |id: &String| self.foreseen.insert(fingerprint(id));
        let records: Vec<&Record> =
            missing.records.iter().chain(deleted).filter(|record| fresh(&record.delivery_id)).collect();
        let letters: Vec<&DeadLetter> =
            missing.dead_letters.iter().filter(|letter| fresh(&letter.delivery_id)).collect();
        let Tried { refused: mut dead, set_back: left } = patiently(|| self.store.try_out(&records)).await?;
        dead.extend(
            letters
                .iter()
                .map(|letter| Dead { delivery_id: letter.delivery_id.clone(), reason: letter.reason.clone() }),
        );
        let ids = records.iter().map(|record| &record.delivery_id).chain(letters.iter().map(|it| &it.delivery_id));
        Ok(Done { ids: ids.cloned().collect(), dead, left })
    }
}

/// 128 bits of an id's digest: no two deliveries share one.
pub(crate) fn fingerprint(id: &str) -> u128 {
    let digest = Sha256::digest(id);
    u128::from_be_bytes(digest[..16].try_into().expect("SHA-256 has 32 bytes"))
}
