//! Entries that are tried again and again: how many there are by cause, for the metrics and for `/readyz`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shared::ops;

use super::ACK_WITHIN;
use crate::metrics::{Delay, Metrics};

/// An entry counts from this time after its first failure on. One that had no acknowledgement has waited long enough for
/// it, and counts at once.
const AFTER: Duration = Duration::from_secs(3);

/// The log has at most one line in this time.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// The entries that are tried in vain.
#[derive(Debug)]
pub(super) struct Overdue {
    metrics: Metrics,
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    /// NATS's words on the last failure of each cause.
    words: [String; Delay::ALL.len()],
    /// Time of the last log line.
    told: Option<Instant>,
}

/// The tries of one entry. It no longer counts once this is dropped.
pub(super) struct Tries<'o> {
    overdue: &'o Overdue,
    first_failure: Option<Instant>,
    counted: Option<Delay>,
}

impl Overdue {
    pub(super) fn new(metrics: Metrics) -> Self {
        Overdue { metrics, last: Mutex::default() }
    }

    /// An entry that is about to be tried.
    pub(super) fn tries(&self) -> Tries<'_> {
        Tries { overdue: self, first_failure: None, counted: None }
    }

    /// The check `publishing`. `is_full`: no other entries are read meanwhile.
    pub(super) fn state(&self, is_full: bool) -> ops::State {
        let last = self.last();
        let cause = |delay: Delay| {
            let count = self.metrics.overdue(delay).get();
            (count > 0).then(|| format!("{count} {}", advice(delay, &last.words[delay as usize])))
        };
        let causes: Vec<_> = Delay::ALL.into_iter().filter_map(cause).collect();
        if causes.is_empty() {
            return Ok("no delivery waits for another try".into());
        }
        let others = if is_full { "; others are not read before some of these are published" } else { "" };
        Err(format!("deliveries are tried again until they are published: {}{others}", causes.join("; ")))
    }

    fn failed(&self, delay: Delay, because: &str) {
        let mut last = self.last();
        because.clone_into(&mut last.words[delay as usize]);
        if last.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            last.told = Some(Instant::now());
            let advice = advice(delay, because);
            tracing::warn!(cause = delay.as_str(), "deliveries {advice}. Each is tried again until it is published");
        }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner) // nothing that holds this can panic half-way
    }
}

/// The fault, and the next step. It follows a number of deliveries.
fn advice(delay: Delay, words: &str) -> String {
    match delay {
        Delay::TimedOut => format!(
            "are not acknowledged within {} s: look at the server's log and at the space on its disk; after a full disk it \
             has to be restarted",
            ACK_WITHIN.as_secs()
        ),
        Delay::NoStream => "find no stream: see the check `stream`".into(),
        Delay::Full => format!(
            "find no room ({words}): raise the limit of the stream or of the server, or see that workers store what is there"
        ),
        Delay::Other => format!("are refused for now ({words})"),
    }
}

impl Tries<'_> {
    /// A try has failed and will be repeated.
    pub(super) fn failed(&mut self, delay: Delay, because: &str) {
        let first = *self.first_failure.get_or_insert_with(Instant::now);
        if delay != Delay::TimedOut && first.elapsed() < AFTER {
            return;
        }
        self.overdue.failed(delay, because);
        self.count(Some(delay));
    }

    fn count(&mut self, delay: Option<Delay>) {
        if let Some(before) = std::mem::replace(&mut self.counted, delay) {
            self.overdue.metrics.overdue(before).dec();
        }
        if let Some(now) = delay {
            self.overdue.metrics.overdue(now).inc();
        }
    }
}

impl Drop for Tries<'_> {
    fn drop(&mut self) {
        self.count(None);
    }
}
