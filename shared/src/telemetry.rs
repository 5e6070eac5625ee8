//! Logs: a sentence plus fields, on stderr. No body, no title, no secret, no signature in any of them.
//!
//! A failure has one line, where it is handled; a success has none (at debug it has), but for a summary each
//! [`SUMMARY_EVERY`] in which something happened. Every line about a delivery has `delivery.id` and `trace.id`. Floods
//! are held back by `throttle`.

mod throttle;

use std::io::IsTerminal as _;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use throttle::Throttle;

/// How often a process sums up what happened.
pub const SUMMARY_EVERY: Duration = Duration::from_secs(60);
/// How often is looked whether lines were held back for long enough to say so.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Crates that log nothing here, whatever `RUST_LOG` says: tokio-postgres quotes every parameter of every statement at
/// debug, which is bodies and titles, and a trigger's NOTICE at info; async-nats tells each attempt to connect, which
/// `shared::stream` tells once. What goes wrong in them comes back as an error, and is told by who handles it.
const SILENT: [&str; 2] = ["async_nats", "tokio_postgres"];

/// There is one log in a process, so there is one of these.
static THROTTLE: OnceLock<Throttle> = OnceLock::new();

/// How many lines were not written because too many of their kind came at once.
pub fn suppressed_lines() -> Counter {
    static SUPPRESSED: OnceLock<Counter> = OnceLock::new();
    SUPPRESSED.get_or_init(Counter::default).clone()
}

/// Says now how many lines were not written, for a process that ends.
pub fn tell_suppressed() {
    if let Some(throttle) = THROTTLE.get() {
        throttle.tell_all();
    }
}

/// `LOG_FORMAT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: an object a line.
    Json,
}

/// What to log and how: `RUST_LOG` and `LOG_FORMAT`.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// A filter of `tracing_subscriber`, such as `info` or `warn,gateway=debug`.
    pub filter: String,
    /// The lines' form.
    pub format: LogFormat,
}

impl LogSettings {
    /// Starts logging, once in a process; a second call changes nothing. From then on a panic is a line of the log,
    /// too.
    pub fn start(&self) {
        // What tells of lines that were held back is shown wherever those lines would be.
        let filter = EnvFilter::new(format!("{},{}=info", self.filter, throttle::TARGET));
        let silent = filter_fn(|about| !about.target().split("::").next().is_some_and(|name| SILENT.contains(&name)));
        let throttle = THROTTLE.get_or_init(|| Throttle::new(suppressed_lines())).clone();
        let lines =
            tracing_subscriber::fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
        let lines = match self.format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().flatten_event(true).boxed(),
        };
        let logs = tracing_subscriber::registry().with(filter).with(silent).with(throttle.clone()).with(lines);
        if logs.try_init().is_err() {
            return tracing::debug!("logging was started before");
        }
        tell_panics_without_their_words();
        let tell = move || loop {
            std::thread::sleep(TELL_EVERY);
            throttle.tell_at(Instant::now());
        };
        if let Err(error) = std::thread::Builder::new().name("log".into()).spawn(tell) {
            tracing::warn!(%error, "no thread for the log: what is held back of it is only told at the end");
        }
    }
}

/// A panic is told with its place and nothing more: Rust's own message for a wrong slice of a text quotes the text, and
/// the texts here are other people's.
fn tell_panics_without_their_words() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        tracing::error!(place, "this program has a fault: it panicked");
    }));
}

/// Names with their numbers, for one field of a summary: `a 3, b 1`. Those of which there are none are left out.
pub fn numbers<'a>(named: impl IntoIterator<Item = (&'a str, u64)>) -> String {
    let some = named.into_iter().filter(|(_, number)| *number > 0);
    some.map(|(name, number)| format!("{name} {number}")).collect::<Vec<_>>().join(", ")
}
