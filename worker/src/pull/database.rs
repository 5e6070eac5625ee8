//! Waiting PostgreSQL's troubles out.
//!
//! While the database is out, a worker holds the batches it has, tries them again, and asks for no more: what it does
//! not take, another worker may. An outage is noticed by a batch that fails, or, where the server says nothing at all,
//! by a question that is asked beside it: storing 8 MiB may take a slow server half a minute, `SELECT 1` may not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable as _};
use shared::ops::Readiness;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::metrics::Metrics;
use crate::store::{Batch, Class, Outage, Store, StoreError, Stored};

/// A batch that was stored so recently proves as much as a question.
const PROVEN_FOR: Duration = Duration::from_secs(3);
/// How long a server that is well may take to answer a question, login included.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// A server that has answered no question for so long is not waited for: another may have taken its place.
const SILENT_FOR: Duration = Duration::from_secs(15);
/// A batch that takes so long, though questions are answered, is tried a second time beside the first: its connection may
/// lead to a server that hangs, and the answers come from the one that took its place.
const SLOW_AFTER: Duration = Duration::from_secs(15);
/// How often is looked whether a question is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// PostgreSQL as the pullers of this worker find it.
pub struct Database {
    store: Store,
    readiness: Readiness,
    metrics: Metrics,
    /// Whether it can be worked with.
    up: watch::Sender<bool>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When it last did what it was asked to.
    proven: Instant,
    /// Since when it has not, and why.
    outage: Option<(Instant, String)>,
    /// Since when questions get no answer at all, not even an error.
    silent: Option<Instant>,
    /// How many batches are being stored,
    working: usize,
    /// and how many of them have failed at least once.
    held: usize,
}

impl Database {
    /// A database that has just been found in order.
    pub fn new(store: Store, readiness: &Readiness, metrics: Metrics) -> Database {
        let state = State { proven: Instant::now(), outage: None, silent: None, working: 0, held: 0 };
        let up = watch::Sender::new(true);
        Database { store, readiness: readiness.clone(), metrics, up, state: Mutex::new(state) }
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Whether no outage is known.
    pub fn is_up(&self) -> bool {
        *self.up.borrow()
    }

    /// Whether no batch of this worker is being stored.
    pub(super) fn is_idle(&self) -> bool {
        self.lock().working == 0
    }

    /// Returns once no outage is known.
    pub(super) async fn available(&self) {
        // The sender is a field of `self`: it cannot be gone.
        let _ = self.up.subscribe().wait_for(|up| *up).await;
    }

    /// Stores a batch, in as many tries as it takes. A row that PostgreSQL refuses is a dead letter when this returns.
    /// `None` where `go_on` said, after a try that failed, that it is to be given up.
    pub(super) async fn persist(&self, batch: &Batch, go_on: impl Fn() -> bool) -> Option<Stored> {
        let backoff = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(Duration::from_secs(2))
            .with_jitter()
            .without_max_times();
        let work = Work::begin(self);
        let note = |error: &StoreError, _: Duration| {
            self.metrics.retried(error);
            work.failed(error);
        };
        let stored = (|| self.attempt(batch)).retry(backoff).when(|_| go_on()).notify(note).await;
        drop(work);
        let stored = stored.inspect(|_| self.proven()).ok()?;
        self.metrics.stored(batch, &stored, OffsetDateTime::now_utc());
        Some(stored)
    }

    /// One try. Given up where the server does not answer questions asked beside it either.
    async fn attempt(&self, batch: &Batch) -> Result<Stored, StoreError> {
        let silence = async {
            while self.lock().silent.is_none_or(|since| since.elapsed() < SILENT_FOR) {
                sleep(LOOK_EVERY).await;
            }
        };
        let begin = Instant::now();
        let outcome = tokio::select! {
            stored = self.store.persist(batch) => stored,
            stored = self.second_try(batch) => Ok(stored),
            () = silence => Err(silent(SILENT_FOR)),
        };
        self.metrics.tried(&outcome, begin.elapsed());
        outcome
    }

    /// The same batch on a new connection, begun when the first try takes long, and again until it succeeds: another server
    /// may still be taking the first one's place. At one that is merely slow it waits for the first try's COMMIT, and finds
    /// everything known.
    async fn second_try(&self, batch: &Batch) -> Stored {
        sleep(SLOW_AFTER).await;
        loop {
            self.store.forget_idle(); // they may lead to the same server
            if let Ok(stored) = self.store.persist(batch).await {
                return stored;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Asks whether it answers, whenever no batch has shown it for a while. Never returns.
    pub async fn watch(&self) {
        loop {
            sleep(LOOK_EVERY).await;
            if self.lock().proven.elapsed() < PROVEN_FOR {
                continue;
            }
            let answer = timeout(ANSWERS_WITHIN, self.store.ping()).await;
            if answer.is_ok() {
                self.lock().silent = None;
            }
            match answer {
                // It may answer and yet refuse every row (read-only, disk full): then a batch has the last word.
                Ok(Ok(())) if self.lock().held > 0 => {}
                Ok(Ok(())) => self.proven(),
                Ok(Err(error)) => self.failed(&error),
                Err(_) => {
                    self.lock().silent.get_or_insert_with(Instant::now);
                    self.failed(&silent(ANSWERS_WITHIN));
                }
            }
        }
    }

    fn proven(&self) {
        let mut state = self.lock();
        state.proven = Instant::now();
        state.silent = None;
        if let Some((since, _)) = state.outage.take() {
            tracing::info!(seconds = since.elapsed().as_secs(), "PostgreSQL works again");
            self.readiness.set("database", Ok("ready".into()));
            self.up.send_replace(true);
        }
    }

    fn failed(&self, error: &StoreError) {
        let mut state = self.lock();
        let reason = error.to_string();
        if state.outage.as_ref().is_none_or(|(_, known)| *known != reason) {
            tracing::warn!(batches = state.held, "deliveries are not stored yet, will try until they are: {reason}");
        }
        let since = state.outage.take().map_or_else(Instant::now, |(since, _)| since);
        self.readiness.set("database", Err(reason.clone()));
        state.outage = Some((since, reason));
        self.up.send_replace(false);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn silent(time: Duration) -> StoreError {
    let silence = format!("PostgreSQL has not answered for {} s", time.as_secs());
    StoreError::Outage(Outage::new(Class::NoAnswer, silence))
}

/// A batch that is being stored, from the first try until this is dropped, however the trying ends.
struct Work<'a> {
    database: &'a Database,
    has_failed: AtomicBool,
}

impl<'a> Work<'a> {
    fn begin(database: &'a Database) -> Work<'a> {
        database.lock().working += 1;
        Work { database, has_failed: false.into() }
    }

    fn failed(&self, error: &StoreError) {
        if !self.has_failed.swap(true, Ordering::Relaxed) {
            self.database.lock().held += 1;
        }
        self.database.failed(error);
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        let mut state = self.database.lock();
        state.working -= 1;
        state.held -= usize::from(self.has_failed.load(Ordering::Relaxed));
    }
}
