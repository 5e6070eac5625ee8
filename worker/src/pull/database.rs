//! Waiting PostgreSQL's troubles out.
//!
//! While the database is out, a worker holds the batches it has, tries them again, and asks for no more: what it does
//! not take, another worker may. An outage is noticed by a batch that fails, or, where the server says nothing at all,
//! by a question that is asked beside it: storing 8 MiB may take a slow server half a minute, `SELECT 1` may not.
//!
//! A batch that takes long while questions are answered is waited for. [`super::waits`] tells what it waits for. A batch
//! that fails again and again for a reason that may lie in one row is run row by row. Such rows are set back
//! ([`super::set_back`]).

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable as _};
use shared::ops::Readiness;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::set_back::SetBackRows;
use super::waits::{InHand, Wait};
use crate::metrics::Metrics;
use crate::store::{Batch, Class, Outage, Store, StoreError, Stored, tell_set_back};

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
/// A batch that takes so long is asked about, and told.
const TOLD_AFTER: Duration = Duration::from_secs(5);
/// Time within which PostgreSQL has to tell what a batch waits for.
const TOLD_WITHIN: Duration = Duration::from_secs(2);
/// After so many failures of a batch, each for a reason that may lie in one row, it is run row by row.
const FAILURES_TOGETHER: u32 = 3;

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
    /// The batches that are being stored, the oldest first.
    in_hand: Vec<Arc<InHand>>,
    /// The number of them that have failed at least once.
    held: usize,
    /// The wait of the oldest of those that take long.
    wait: Option<Wait>,
    set_back: SetBackRows,
    /// When a row was last written.
    written: Option<Instant>,
}

impl Database {
    /// A database that has just been found in order.
    pub fn new(store: Store, readiness: &Readiness, metrics: Metrics) -> Database {
        let state = State {
            proven: Instant::now(),
            outage: None,
            silent: None,
            in_hand: Vec::new(),
            held: 0,
            wait: None,
            set_back: SetBackRows::default(),
            written: None,
        };
        let up = watch::Sender::new(true);
        let database = Database { store, readiness: readiness.clone(), metrics, up, state: Mutex::new(state) };
        database.show(&database.lock());
        database
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
        self.lock().in_hand.is_empty()
    }

    /// Returns once no outage is known.
    pub(super) async fn available(&self) {
        // The sender is a field of `self`: it cannot be gone.
        let _ = self.up.subscribe().wait_for(|up| *up).await;
    }

    /// Stores a batch, in as many tries as it takes. When this returns, a row that PostgreSQL refuses is a dead letter. A row
    /// that it refuses for an unclear reason is set back, while `may_set_back` says that this may be.
    /// `None` where `go_on` said, after a try that failed, that it is to be given up.
    pub(super) async fn persist<F: Future<Output = bool>>(
        &self,
        batch: &Batch,
        go_on: impl Fn() -> bool,
        may_set_back: impl Fn() -> F,
    ) -> Option<Stored> {
        let backoff = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(50))
            .with_max_delay(Duration::from_secs(2))
            .with_jitter()
            .without_max_times();
        let work = Work::begin(self, batch);
        let note = |error: &StoreError, _: Duration| {
            self.metrics.retried(error);
            work.failed(error);
        };
        let attempt = || async {
            let apart = work.is_suspect(batch);
            let each = apart && may_set_back().await;
            let outcome = self.attempt(batch, &work, each).await;
            outcome.map_err(|error| if apart && !each { too_many_set_back(error) } else { error })
        };
        let stored = attempt.retry(backoff).when(|_| go_on()).notify(note).await;
        drop(work);
        let stored = stored.inspect(|_| self.proven()).ok()?;
        self.settle(batch, &stored);
        self.metrics.stored(batch, &stored, OffsetDateTime::now_utc());
        Some(stored)
    }

    /// One try. Given up where the server does not answer questions asked beside it either.
    async fn attempt(&self, batch: &Batch, work: &Work<'_>, each: bool) -> Result<Stored, StoreError> {
        let silence = async {
            while self.lock().silent.is_none_or(|since| since.elapsed() < SILENT_FOR) {
                sleep(LOOK_EVERY).await;
            }
        };
        let begin = Instant::now();
        let outcome = tokio::select! {
            biased;
            stored = self.one_try(batch, each, &work.in_hand.sessions[0]) => stored,
            stored = self.second_try(batch, each, &work.in_hand.sessions[1]) => Ok(stored),
            () = silence => Err(silent(SILENT_FOR)),
        };
        work.in_hand.sessions.iter().for_each(|session| session.store(0, Ordering::Relaxed));
        self.metrics.tried(&outcome, begin.elapsed());
        outcome
    }

    async fn one_try(&self, batch: &Batch, each: bool, session: &AtomicI32) -> Result<Stored, StoreError> {
        let at = |pid| session.store(pid, Ordering::Relaxed);
        match each {
            true => self.store.persist_each_at(batch, at).await,
            false => self.store.persist_at(batch, at).await,
        }
    }

    /// The same batch on a new connection, begun when the first try takes long, and again until it succeeds: another server
    /// may still be taking the first one's place. At one that is merely slow it waits for the first try's COMMIT, and finds
    /// everything known.
    async fn second_try(&self, batch: &Batch, each: bool, session: &AtomicI32) -> Stored {
        sleep(SLOW_AFTER).await;
        loop {
            self.store.forget_idle(); // they may lead to the same server
            if let Ok(stored) = self.one_try(batch, each, session).await {
                return stored;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Asks whether it answers, whenever no batch has shown it for a while, and what those wait for that take long. Never
    /// returns.
    pub async fn watch(&self) {
        loop {
            sleep(LOOK_EVERY).await;
            let slow = self.slow();
            if slow.is_empty() && self.lock().proven.elapsed() < PROVEN_FOR {
                continue;
            }
            let asked = Instant::now();
            let answer = timeout(ANSWERS_WITHIN, self.store.ping()).await;
            if self.lock().proven > asked {
                continue; // a batch was stored meanwhile, which says more
            }
            if answer.is_ok() {
                self.lock().silent = None;
            }
            match answer {
                Ok(Ok(())) => {
                    match self.wait_of(&slow).await {
                        Some(wait) => self.waits(&mut self.lock(), wait),
                        None => self.forget_wait(&mut self.lock()),
                    }
                    // It may answer and yet refuse every row (read-only, disk full): then a batch has the last word.
                    if self.lock().held == 0 {
                        self.proven();
                    }
                }
                Ok(Err(error)) => self.failed(&error),
                Err(_) => {
                    self.lock().silent.get_or_insert_with(Instant::now);
                    self.forget_wait(&mut self.lock());
                    self.failed(&silent(ANSWERS_WITHIN));
                }
            }
        }
    }

    /// The batches that take long. Forgets what is old beside.
    fn slow(&self) -> Vec<Arc<InHand>> {
        let mut state = self.lock();
        if state.set_back.forget_old(Instant::now()) {
            self.metrics.set_back(state.set_back.counts());
            self.show(&state);
        }
        let slow: Vec<_> = state.in_hand.iter().filter(|batch| batch.since.elapsed() >= TOLD_AFTER).cloned().collect();
        if slow.is_empty() {
            self.waits(&mut state, None);
        }
        slow
    }

    /// The wait of the first of these batches, if one waits. None where PostgreSQL does not tell: its catalog may be locked,
    /// or the role may not ask.
    async fn wait_of(&self, slow: &[Arc<InHand>]) -> Option<Option<Wait>> {
        let sessions: Vec<i32> = slow.iter().flat_map(|batch| batch.pids()).collect();
        if sessions.is_empty() {
            return Some(None);
        }
        let delays = timeout(TOLD_WITHIN, self.store.delays(&sessions)).await.ok()?.ok()?;
        Some(Wait::of(slow, &delays))
    }

    /// PostgreSQL does not tell any more what batches wait for. The log calls no wait over that may go on.
    fn forget_wait(&self, state: &mut State) {
        if state.wait.take().is_some() {
            self.show(state);
        }
    }

    /// Keeps in mind what a batch waits for. The log tells of locks.
    fn waits(&self, state: &mut State, wait: Option<Wait>) {
        let holder = |wait: &Option<Wait>| wait.as_ref().and_then(|wait| wait.holder);
        match (&wait, holder(&state.wait)) {
            (Some(wait), before) if wait.holder.is_some() && wait.holder != before => {
                tracing::warn!("deliveries are not stored yet: {wait}");
            }
            (wait, Some(_)) if holder(wait).is_none() => tracing::info!("no batch waits for a lock any more"),
            _ => {}
        }
        if wait.is_some() || state.wait.is_some() {
            state.wait = wait;
            self.show(state);
        }
    }

    /// Keeps what became of a batch in mind.
    fn settle(&self, batch: &Batch, stored: &Stored) {
        let mut state = self.lock();
        let new = state.set_back.note(stored, Instant::now());
        tell_set_back(&new, batch);
        if !stored.fresh.is_empty() {
            state.written = Some(Instant::now());
        }
        self.metrics.set_back(state.set_back.counts());
        self.show(&state);
    }

    fn proven(&self) {
        let mut state = self.lock();
        state.proven = Instant::now();
        state.silent = None;
        if let Some((since, _)) = state.outage.take() {
            tracing::info!(seconds = since.elapsed().as_secs(), "PostgreSQL works again");
            self.show(&state);
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
        state.outage = Some((since, reason));
        self.show(&state);
        self.up.send_replace(false);
    }

    /// Shows the state on `/readyz`.
    fn show(&self, state: &State) {
        let set_back = state.set_back.describe();
        let takes_none = state.set_back.newest().is_some_and(|newest| state.written.is_none_or(|at| at < newest));
        let database = match (&state.wait, &state.outage, &set_back) {
            (Some(wait), ..) if wait.holder.is_some() => Err(wait.to_string()),
            (_, Some((_, reason)), _) => Err(reason.clone()),
            (_, None, Some(rows)) if takes_none => Err(format!("PostgreSQL has taken no row lately: {rows}")),
            (Some(wait), ..) => Ok(format!("ready; {wait}")),
            (None, ..) => Ok("ready".into()),
        };
        self.readiness.set("database", database);
        self.readiness.set("rows", set_back.map_or_else(|| Ok("all are taken".into()), Err));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn silent(time: Duration) -> StoreError {
    let silence = format!("PostgreSQL has not answered for {} s", time.as_secs());
    StoreError::Outage(Outage::new(Class::NoAnswer, silence))
}

/// Adds why a row that should be set back is not.
fn too_many_set_back(error: StoreError) -> StoreError {
    match error {
        StoreError::Outage(outage) if outage.is_unclear() => StoreError::Outage(outage.with(
            "; the row waits with its batch, because half of the consumer's max_ack_pending is un-acked already, or NATS does \
             not tell",
        )),
        StoreError::Outage(_) | StoreError::Refused(_) | StoreError::Denied(_) => error,
    }
}

/// A batch that is being stored, from the first try until this is dropped, however the trying ends.
struct Work<'a> {
    database: &'a Database,
    in_hand: Arc<InHand>,
    has_failed: AtomicBool,
    /// Failures for a reason that may lie in one row.
    unclear: AtomicU32,
}

impl<'a> Work<'a> {
    fn begin(database: &'a Database, batch: &Batch) -> Work<'a> {
        let in_hand = Arc::new(InHand::new(batch.records.len() + batch.dead_letters.len()));
        database.lock().in_hand.push(in_hand.clone());
        Work { database, in_hand, has_failed: false.into(), unclear: 0.into() }
    }

    fn failed(&self, error: &StoreError) {
        if !self.has_failed.swap(true, Ordering::Relaxed) {
            self.database.lock().held += 1;
        }
        match error {
            // A statement that took too long takes as long the next time, unless it has less to do.
            StoreError::Outage(outage) if outage.is_unclear() && outage.class() == Class::Canceled => {
                self.unclear.store(FAILURES_TOGETHER, Ordering::Relaxed);
            }
            StoreError::Outage(outage) if outage.is_unclear() => {
                self.unclear.fetch_add(1, Ordering::Relaxed);
            }
            StoreError::Outage(_) | StoreError::Refused(_) | StoreError::Denied(_) => {}
        }
        self.database.failed(error);
    }

    /// Returns `true` where the trouble may lie in single rows: one of them was set back before, or the batch has failed
    /// so often.
    fn is_suspect(&self, batch: &Batch) -> bool {
        self.unclear.load(Ordering::Relaxed) >= FAILURES_TOGETHER || self.database.lock().set_back.holds_one_of(batch)
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        let mut state = self.database.lock();
        state.in_hand.retain(|batch| !Arc::ptr_eq(batch, &self.in_hand));
        state.held -= usize::from(self.has_failed.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_question_that_fails_late_is_outweighed_by_a_batch_that_was_stored_meanwhile() {
        // Takes connections, and says nothing.
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("postgres://loop@{}/loop", server.local_addr().unwrap()).parse().unwrap();
        let store = Store::new(&url, 1);
        let metrics = Metrics::new(&mut Registry::default(), &store);
        let database = Database::new(store, &Readiness::default(), metrics);
        let meanwhile = async {
            // It asks 3 to 4 s after the beginning, and waits for 5.
            sleep(Duration::from_secs(6)).await;
            database.proven();
            sleep(Duration::from_secs(4)).await;
            database.is_up()
        };
        let is_up = tokio::select! {
            is_up = meanwhile => is_up,
            () = database.watch() => unreachable!("it never ends"),
        };
        assert!(is_up, "PostgreSQL has stored a batch since it was asked");
    }
}
