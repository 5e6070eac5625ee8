//! Counts events by source in bounded memory, for warnings that name the most frequent sources.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Sources that are counted at once.
const SOURCES_MAX: usize = 256;
/// Sources that a warning names.
const NAMED: usize = 5;

/// The events that are counted by source. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Requests with a signature that no secret gives.
    pub wrong_signatures: TopSources,
    /// Bodies that were accepted before, under another delivery id.
    pub repeated_bodies: TopSources,
}

/// Counts events by source. Clones share the counts.
///
/// Beyond [`SOURCES_MAX`] sources a new one replaces the one with the fewest events and begins with its count (Space-Saving,
/// Metwally et al. 2005). So a frequent source stays, however many others there are.
#[derive(Debug, Clone, Default)]
pub struct TopSources(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    events: u64,
    of: HashMap<IpAddr, Count>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Count {
    events: u64,
    /// Events of the source that this one replaced.
    inherited: u64,
}

/// The result of [`TopSources::take`].
#[derive(Debug, PartialEq, Eq)]
pub struct Top {
    /// All events.
    pub events: u64,
    /// The most frequent sources, each with the least number of events that it had: `203.0.113.7 12, 2001:db8::1 3`. The
    /// numbers are exact up to [`SOURCES_MAX`] sources.
    pub sources: String,
}

impl TopSources {
    /// Counts one event of `source`.
    pub fn add(&self, source: IpAddr) {
        let mut counts = self.lock();
        counts.events += 1;
        if let Some(count) = counts.of.get_mut(&source) {
            count.events += 1;
            return;
        }
        let mut inherited = 0;
        if counts.of.len() >= SOURCES_MAX {
            let fewest =
                counts.of.iter().min_by_key(|(_, count)| count.events).map(|(source, count)| (*source, *count));
            let (replaced, count) = fewest.expect("the map is full");
            counts.of.remove(&replaced);
            inherited = count.events;
        }
        counts.of.insert(source, Count { events: inherited + 1, inherited });
    }

    /// Takes the counts since the last call. Returns `None` when there was no event.
    pub fn take(&self) -> Option<Top> {
        let Counts { events, of } = std::mem::take(&mut *self.lock());
        let mut sources: Vec<_> =
            of.into_iter().map(|(source, count)| (count.events - count.inherited, source)).collect();
        sources.sort_unstable_by_key(|(events, source)| (std::cmp::Reverse(*events), *source));
        let named = sources.iter().take(NAMED).map(|(events, source)| format!("{source} {events}"));
        (events > 0).then(|| Top { events, sources: named.collect::<Vec<_>>().join(", ") })
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // The counts are whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn the_most_frequent_sources_are_named_once() {
        let sources = TopSources::default();
        assert_eq!(sources.take(), None);
        for number in 1..=7 {
            (0..number).for_each(|_| sources.add(address(number)));
        }
        let named = "0.0.0.7 7, 0.0.0.6 6, 0.0.0.5 5, 0.0.0.4 4, 0.0.0.3 3".to_owned();
        assert_eq!(sources.take(), Some(Top { events: 28, sources: named }));
        assert_eq!(sources.take(), None);
    }

    #[test]
    fn a_flood_of_other_sources_hides_no_frequent_source_and_takes_no_memory() {
        let sources = TopSources::default();
        for number in 0..100_000 {
            sources.add(address(1 << 24 | number));
            if number % 50 == 0 {
                sources.add(address(7));
            }
        }
        assert_eq!(sources.lock().of.len(), SOURCES_MAX);
        let top = sources.take().unwrap();
        assert_eq!(top.events, 102_000);
        assert!(top.sources.starts_with("0.0.0.7 "), "{top:?}");
    }
}
