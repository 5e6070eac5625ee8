//! A flood of failures must not become a flood of lines: a sender that is refused, a disk that fails or poison by the
//! thousand would fill the disk that the log is on.
//!
//! Of each kind of line [`BURST`] are written in a [`PERIOD`]; the others are counted, and when the period is over one
//! line says how many there were. The kind of a line is where in the program it comes from, and what it says: its
//! message and its reason, digits aside. So another reason is another kind, and the first of anything is always
//! written. Debug and trace lines are there because somebody asked to see them all, and are never held back.
//!
//! Our own, because the crates there are for it (tracing-throttle, say) key their counts by all fields of a line, of
//! which delivery ids would make each one new, or by the message alone, and are young.

use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::fmt::{self, Write as _};
use std::hash::{Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// How many lines of a kind are written in a period.
const BURST: u64 = 10;
/// From the first line of a kind to the one that says how many were held back.
const PERIOD: Duration = Duration::from_secs(60);
/// How many kinds are told apart at once; beyond, all of one place in the program are one kind.
const KINDS_MAX: usize = 1000;
/// The target of what this writes itself, which is never held back.
pub(super) const TARGET: &str = "shared::log";
/// The fields that, with the message, make the kind.
const TELLING: [&str; 4] = ["message", "reason", "cause", "error"];

/// Counts lines by their kind. Clones share the counts.
#[derive(Clone)]
pub(super) struct Throttle {
    kinds: Arc<Mutex<HashMap<(Identifier, u64), Kind>>>,
    held_back: Counter,
}

struct Kind {
    since: Instant,
    lines: u64,
    level: Level,
    /// Where it comes from, and what its first line said.
    of: &'static str,
    said: String,
}

impl Throttle {
    /// One that counts in `held_back` what it does not let through.
    pub(super) fn new(held_back: Counter) -> Self {
        Throttle { kinds: Arc::default(), held_back }
    }

    /// Whether this line is written.
    fn lets_through(&self, event: &Event<'_>, now: Instant) -> bool {
        let about = event.metadata();
        if *about.level() > Level::INFO || about.target() == TARGET {
            return true;
        }
        let mut words = Words(DefaultHasher::new());
        event.record(&mut words);
        let mut key = (about.callsite(), words.0.finish());
        let mut kinds = self.kinds();
        if kinds.len() >= KINDS_MAX && !kinds.contains_key(&key) {
            key.1 = 0;
        }
        let lines = match kinds.entry(key) {
            Entry::Occupied(kind) => {
                let kind = kind.into_mut();
                kind.lines += 1;
                kind.lines
            }
            Entry::Vacant(new) => {
                let mut said = Said(String::new());
                event.record(&mut said);
                new.insert(Kind { since: now, lines: 1, level: *about.level(), of: about.target(), said: said.0 });
                1
            }
        };
        drop(kinds);
        if lines > BURST {
            self.held_back.inc();
        }
        lines <= BURST
    }

    /// Ends the periods that are over by `now`, and says what was held back in them.
    pub(super) fn tell_at(&self, now: Instant) {
        self.tell(|kind| now.saturating_duration_since(kind.since) >= PERIOD);
    }

    /// Ends all periods, and says what was held back in them.
    pub(super) fn tell_all(&self) {
        self.tell(|_| true);
    }

    fn tell(&self, over: impl Fn(&Kind) -> bool) {
        let mut ended: Vec<Kind> = self.kinds().extract_if(|_, kind| over(kind)).map(|(_, kind)| kind).collect();
        ended.retain(|kind| kind.lines > BURST);
        ended.sort_by_key(|kind| kind.since);
        for Kind { since, lines, level, of, said } in ended {
            let (suppressed, seconds) = (lines - BURST, since.elapsed().as_secs());
            let said = format!("{suppressed} more lines like this were not written: {said}");
            match level {
                Level::ERROR => tracing::error!(target: TARGET, suppressed, seconds, of, "{said}"),
                Level::WARN => tracing::warn!(target: TARGET, suppressed, seconds, of, "{said}"),
                _ => tracing::info!(target: TARGET, suppressed, seconds, of, "{said}"),
            }
        }
    }

    fn kinds(&self) -> MutexGuard<'_, HashMap<(Identifier, u64), Kind>> {
        // A line may be written while its thread panics; the counts are whole at any time.
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber> Layer<S> for Throttle {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        self.lets_through(event, Instant::now())
    }
}

/// What a line says, without digits, as a number.
struct Words(DefaultHasher);

impl fmt::Write for Words {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let bytes = text.bytes().filter(|byte| !byte.is_ascii_digit());
        bytes.for_each(|byte| self.0.write_u8(byte));
        Ok(())
    }
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if TELLING.contains(&field.name()) {
            field.name().hash(&mut self.0);
            let _ = write!(self, "{value:?}"); // `write_str` never fails
        }
    }
}

/// What a line says, for people.
struct Said(String);

impl Said {
    fn add(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if TELLING.contains(&field.name()) {
            let colon = if self.0.is_empty() { "" } else { ": " };
            let _ = write!(self.0, "{colon}{value}"); // a string takes everything
        }
    }
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tracing_subscriber::fmt::MakeWriter;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    /// A log in memory.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Log {
        type Writer = Log;

        fn make_writer(&self) -> Log {
            self.clone()
        }
    }

    /// What is written while `act` logs.
    fn written(act: impl FnOnce(&Throttle)) -> Vec<String> {
        let (log, throttle) = (Log::default(), Throttle::new(Counter::default()));
        let fmt = tracing_subscriber::fmt::layer().with_ansi(false).without_time().with_writer(log.clone());
        let logs = tracing_subscriber::registry().with(throttle.clone()).with(fmt);
        tracing::subscriber::with_default(logs, || act(&throttle));
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn fails(id: usize, reason: &str) {
        tracing::warn!(delivery.id = id, reason, "a delivery failed");
    }

    #[test]
    fn of_a_flood_the_beginning_and_the_number_are_written() {
        let lines = written(|throttle| {
            (0..5000).for_each(|id| fails(id, "no JSON at 17"));
            (5000..5003).for_each(|id| fails(id, "no JSON at 18"));
            throttle.tell_at(Instant::now()); // the period is not over
            assert_eq!(throttle.held_back.get(), 4993);
            throttle.tell_at(Instant::now() + PERIOD);
            throttle.tell_at(Instant::now() + PERIOD * 2);
        });
        assert_eq!(lines.len(), 11, "{lines:?}");
        assert!(lines[9].contains("delivery.id=9 "), "{lines:?}");
        assert!(lines[10].contains("4993 more lines like this were not written: "), "{lines:?}");
        assert!(lines[10].contains("a delivery failed") && lines[10].contains("no JSON at 17"), "{lines:?}");
        assert!(lines[10].contains("suppressed=4993") && lines[10].contains("WARN"), "{lines:?}");
    }

    #[test]
    fn the_first_of_anything_is_written() {
        let lines = written(|throttle| {
            for id in 0..100 {
                fails(id, "no JSON");
                tracing::warn!("another place");
            }
            fails(100, "a constraint"); // the same place, another reason
            throttle.tell_all();
            fails(101, "no JSON"); // another period
        });
        let with = |words: &str| lines.iter().filter(|line| line.contains(words)).count();
        assert_eq!((with("more lines"), with("constraint"), with("delivery.id=101 ")), (2, 1, 1), "{lines:?}");
        assert_eq!(lines.len(), 10 + 10 + 1 + 2 + 1, "{lines:?}");
    }

    #[test]
    fn what_somebody_asked_to_see_is_never_held_back() {
        let lines = written(|throttle| {
            (0..100).for_each(|id| tracing::debug!(id, "a delivery"));
            throttle.tell_all();
        });
        assert_eq!(lines.len(), 100);
    }

    #[test]
    fn kinds_without_end_are_one_in_the_end() {
        let letters = |mut number: usize| {
            let mut word = String::new();
            while number > 0 {
                word.push(char::from(b'a' + u8::try_from(number % 26).unwrap()));
                number /= 26;
            }
            word
        };
        let lines = written(|throttle| {
            (0..KINDS_MAX * 3).for_each(|id| fails(id, &letters(id)));
            assert_eq!(throttle.kinds().len(), KINDS_MAX + 1);
            throttle.tell_all();
        });
        assert_eq!(lines.len(), KINDS_MAX + 10 + 1);
    }
}
