//! Deliveries that are set back: PostgreSQL refuses their rows for a reason that is no verdict on what they say.
//!
//! Such a delivery is given back to the consumer with a delay, and comes again until it is stored. This list serves the
//! operator. By it the next batch with such a delivery is run row by row at once. Another worker may have got a delivery
//! that did not come again.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use crate::store::{Batch, SetBack, Stored};

/// Delay of the first time; of the second it is twice that, and so on.
const DELAY: Duration = Duration::from_secs(10);
/// Longest delay. A cause that was mended is over for all deliveries after this time.
const DELAY_MAX: Duration = Duration::from_secs(300);
/// A delivery that has not come again for so long is with another worker.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(2 * 300);
/// Most reasons that are told at once.
const REASONS_MAX: usize = 5;

/// The delay of a delivery that was delivered so many times.
pub(super) fn delay(attempts: i64) -> Duration {
    let attempts = u32::try_from(attempts.max(1)).unwrap_or(u32::MAX);
    DELAY.saturating_mul(attempts).min(DELAY_MAX)
}

/// Those that this worker has set back last.
#[derive(Debug, Default)]
pub(super) struct SetBackRows(HashMap<String, Row>);

#[derive(Debug)]
struct Row {
    sqlstate: String,
    reason: String,
    first: Instant,
    last: Instant,
}

impl SetBackRows {
    /// Returns `true` where the batch holds one of them.
    pub(super) fn holds_one_of(&self, batch: &Batch) -> bool {
        !self.0.is_empty() && batch.records.iter().any(|record| self.0.contains_key(&record.delivery_id))
    }

    /// Notes what became of a batch. Gives those that are set back for the first time, or with another code than before.
    pub(super) fn note<'a>(&mut self, stored: &'a Stored, now: Instant) -> Vec<&'a SetBack> {
        let dead = stored.dead.iter().map(|dead| &dead.delivery_id);
        if !self.0.is_empty() {
            for id in stored.fresh.iter().chain(&stored.known).chain(dead) {
                self.0.remove(id);
            }
        }
        let mut new = Vec::new();
        for row in &stored.set_back {
            let SetBack { delivery_id, sqlstate, reason } = row;
            let known = self.0.get(delivery_id);
            if known.is_none_or(|known| known.sqlstate != *sqlstate) {
                new.push(row);
            }
            let first = known.map_or(now, |known| known.first);
            let row = Row { sqlstate: sqlstate.clone(), reason: reason.clone(), first, last: now };
            self.0.insert(delivery_id.clone(), row);
        }
        new
    }

    /// Drops those that are another worker's. Returns `true` where there were any.
    pub(super) fn forget_old(&mut self, now: Instant) -> bool {
        let before = self.0.len();
        self.0.retain(|_, row| now.duration_since(row.last) < FORGOTTEN_AFTER);
        self.0.len() < before
    }

    /// When the last of them was set back for the first time.
    pub(super) fn newest(&self) -> Option<Instant> {
        self.0.values().map(|row| row.first).max()
    }

    /// Their number, by code.
    pub(super) fn counts(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for row in self.0.values() {
            *counts.entry(row.sqlstate.clone()).or_default() += 1;
        }
        counts
    }

    /// The same in words; none where there are none.
    pub(super) fn describe(&self) -> Option<String> {
        let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
        for row in self.0.values() {
            *reasons.entry(&row.reason).or_default() += 1;
        }
        let named: Vec<_> =
            reasons.iter().take(REASONS_MAX).map(|(reason, count)| format!("{count}: {reason}")).collect();
        let more = if reasons.len() > named.len() { "; and other reasons" } else { "" };
        let all = self.0.len();
        (all > 0).then(|| {
            format!(
                "{all} deliveries wait alone, because PostgreSQL refuses their rows ({}{more}). The log has their ids; look at \
                 the triggers of the tables",
                named.join("; ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(known: &[&str], set_back: &[(&str, &str)]) -> Stored {
        let row = |(id, code): &(&str, &str)| SetBack {
            delivery_id: (*id).into(),
            sqlstate: (*code).into(),
            reason: format!("SQLSTATE {code}"),
        };
        let known = known.iter().map(|id| (*id).into()).collect();
        Stored { known, set_back: set_back.iter().map(row).collect(), ..Stored::default() }
    }

    #[test]
    fn each_is_told_once_and_gone_when_it_is_stored_or_another_workers() {
        let mut rows = SetBackRows::default();
        let begin = Instant::now();
        let first = stored(&[], &[("a", "LP001"), ("b", "XX000")]);
        assert_eq!(rows.note(&first, begin).len(), 2);
        assert_eq!(rows.note(&first, begin).len(), 0);
        assert_eq!(rows.note(&stored(&[], &[("a", "P0002")]), begin).len(), 1, "another reason is news");
        assert_eq!(rows.counts(), BTreeMap::from([("P0002".into(), 1), ("XX000".into(), 1)]));
        assert!(rows.describe().unwrap().starts_with("2 deliveries wait alone"), "{:?}", rows.describe());
        assert!(rows.note(&stored(&["a"], &[]), begin).is_empty());
        assert!(rows.forget_old(begin + FORGOTTEN_AFTER) && rows.describe().is_none() && rows.newest().is_none());
    }

    #[test]
    fn a_delay_grows_to_its_limit() {
        let seconds: Vec<u64> = [0, 1, 2, 30, 31, i64::MAX].map(|attempts| delay(attempts).as_secs()).into();
        assert_eq!(seconds, [10, 10, 20, 300, 300, 300]);
    }
}
