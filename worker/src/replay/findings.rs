//! What a replay finds and does, a word for each.

use crate::commands::{count, patiently};
use crate::dead_letters::DeadLetter;
use crate::interpret::interpret;
use crate::reading::Entry;
use crate::replay::options::Options;
use crate::store::{Fate, Known, Record, Store};

/// What became of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was missing, and is stored now.
    Inserted,
    /// It was missing, cannot be stored, and is a dead letter now.
    Buried,
    /// It is stored.
    There,
    /// It is stored, and this version would read it differently: how.
    Differs(String),
    /// It was stored, somebody deleted it, and so it stays.
    Deleted,
    /// It was deleted, and is there again.
    Restored,
    /// It was deleted, and PostgreSQL refuses it today.
    NotRestored,
    /// It was missing, and PostgreSQL refuses its row for a reason that is no verdict on what it says.
    NotStored,
    /// It is a dead letter.
    Dead,
    /// It was discarded.
    Discarded,
    /// It was discarded, and is stored now.
    TakenBack,
}

/// How many kinds of [`Outcome`] there are.
const KINDS: usize = 11;

impl Outcome {
    /// Its place in [`Totals`], and what it is called: what a dry run says, and what a replay says.
    fn kind(&self) -> (usize, &'static str, &'static str) {
        match self {
            Outcome::Inserted => (0, "would insert", "inserted"),
            Outcome::There => (1, "already there", "already there"),
            Outcome::Differs(_) => (2, "already there, would today get another severity or title", "already there"),
            Outcome::Deleted => (3, "deleted by a user", "deleted by a user"),
            Outcome::Restored => (4, "would be restored", "restored"),
            Outcome::NotRestored => (5, "could not be restored", "could not be restored"),
            Outcome::Buried => (6, "would become a dead letter", "became a dead letter"),
            Outcome::Dead => (7, "a dead letter already", "a dead letter already"),
            Outcome::Discarded => (8, "discarded", "discarded"),
            Outcome::TakenBack => (9, "discarded, would be stored", "was discarded, stored now"),
            Outcome::NotStored => (10, "could not be stored", "could not be stored"),
        }
    }

    /// For one line of `--verbose`.
    pub(super) fn words(&self, dry_run: bool) -> String {
        let (_, foreseen, done) = self.kind();
        let words = if dry_run { foreseen } else { done };
        if let Outcome::Differs(how) = self { format!("{words}: {how}") } else { words.to_owned() }
    }
}

/// How many messages had which outcome.
#[derive(Debug, Clone, Default)]
pub(super) struct Totals([u64; KINDS]);

impl Totals {
    pub(super) fn add(&mut self, outcome: &Outcome) {
        self.0[outcome.kind().0] += 1;
    }

    pub(super) fn of(&self, outcome: &Outcome) -> u64 {
        self.0[outcome.kind().0]
    }

    /// Returns `true` where there is something that an operator should look at.
    pub(super) fn look_at_it(&self) -> bool {
        [Outcome::Buried, Outcome::NotRestored, Outcome::NotStored].iter().any(|outcome| self.of(outcome) > 0)
    }

    /// Of all outcomes.
    pub(super) fn read(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The changes of a replay in numbers, for the log.
    pub(super) fn summary(&self) -> String {
        let changed = [Outcome::Inserted, Outcome::Restored, Outcome::TakenBack, Outcome::Buried];
        let [inserted, restored, taken_back, buried] = changed.map(|outcome| self.of(&outcome));
        let restored = restored + taken_back;
        format!("read {}, inserted {inserted}, restored {restored}, dead letters {buried}", self.read())
    }

    /// A line an outcome that occurred; what was inserted is always told.
    pub(super) fn table(&self, dry_run: bool) -> String {
        let all = [
            Outcome::Inserted,
            Outcome::There,
            Outcome::Differs(String::new()),
            Outcome::Deleted,
            Outcome::Restored,
            Outcome::NotRestored,
            Outcome::NotStored,
            Outcome::Buried,
            Outcome::Dead,
            Outcome::Discarded,
            Outcome::TakenBack,
        ];
        let told = all.iter().filter(|outcome| **outcome == Outcome::Inserted || self.of(outcome) > 0);
        told.map(|outcome| {
            let (_, foreseen, done) = outcome.kind();
            format!("{:>12}  {}\n", count(self.of(outcome)), if dry_run { foreseen } else { done })
        })
        .collect()
    }
}

/// A message, what is to become of it, and what it says where that is needed.
pub(super) struct Found {
    pub(super) sequence: u64,
    pub(super) delivery_id: String,
    /// If nothing goes wrong: `Inserted`, `TakenBack` and `Restored` are still to be done.
    pub(super) outcome: Outcome,
    pub(super) read: Option<Result<Box<Record>, Box<DeadLetter>>>,
}

/// Looks a batch up, and reads the bodies that have to be read.
pub(super) async fn find(store: &Store, options: &Options, batch: Vec<Entry>) -> anyhow::Result<Vec<Found>> {
    let ids: Vec<String> = batch.iter().map(|entry| entry.id().to_string()).collect();
    let known = patiently(|| store.look_up(&ids)).await?;
    let options = options.clone();
    let judge = move || {
        let pairs = batch.into_iter().zip(ids);
        pairs.map(|(entry, id)| Found::of(&entry, known.get(&id), id, &options)).collect()
    };
    // Reading megabytes of JSON takes a while.
    Ok(tokio::task::spawn_blocking(judge).await.expect("reading isolates its panics"))
}

impl Found {
    fn of(entry: &Entry, known: Option<&Known>, delivery_id: String, options: &Options) -> Found {
        let read = || Some(entry.read().map(Box::new));
        let (outcome, read) = match known.map(|known| &known.fate) {
            None => (Outcome::Inserted, read()),
            Some(Fate::Stored { severity, title }) if options.dry_run => (compare(entry, severity, title), None),
            Some(Fate::Stored { .. }) => (Outcome::There, None),
            Some(Fate::Deleted) if options.restore_deleted => match read() {
                // It was stored by a version that could read it.
                Some(Err(_)) => (Outcome::NotRestored, None),
                read => (Outcome::Restored, read),
            },
            Some(Fate::Deleted) => (Outcome::Deleted, None),
            Some(Fate::Dead) => (Outcome::Dead, None),
            Some(Fate::Discarded) if options.restore_discarded => (Outcome::TakenBack, read()),
            Some(Fate::Discarded) => (Outcome::Discarded, None),
        };
        Found { sequence: entry.sequence, delivery_id, outcome, read }
    }
}

/// Whether this version would read a stored delivery as it stands in the database.
fn compare(entry: &Entry, severity: &str, title: &str) -> Outcome {
    let Ok(meaning) = interpret(entry.body()) else {
        return Outcome::Differs("it would be a dead letter".into());
    };
    let mut how = Vec::new();
    if meaning.severity.as_str() != severity {
        how.push(format!("severity {severity} -> {}", meaning.severity));
    }
    if meaning.title != title {
        how.push(format!("title \"{title}\" -> \"{}\"", meaning.title));
    }
    if how.is_empty() { Outcome::There } else { Outcome::Differs(how.join(", ")) }
}
