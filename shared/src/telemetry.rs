//! Logs: a sentence plus fields, on stderr. No body, no title, no secret, no signature in any of them.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use prometheus_client::metrics::counter::Counter;
use tracing_subscriber::EnvFilter;

/// How many lines were not written because too many of their kind came at once.
pub fn suppressed_lines() -> Counter {
    static SUPPRESSED: OnceLock<Counter> = OnceLock::new();
    SUPPRESSED.get_or_init(Counter::default).clone()
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
    /// Starts logging, once in a process; a second call changes nothing.
    pub fn start(&self) {
        // async-nats tells each reconnect attempt at info; `shared::stream` says it once, in our words.
        let filter = EnvFilter::new(format!("async_nats=off,{}", self.filter));
        let logs = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr);
        let started = match self.format {
            LogFormat::Text => logs.try_init(),
            LogFormat::Json => logs.json().flatten_event(true).try_init(),
        };
        if started.is_err() {
            tracing::debug!("logging was started before");
        }
    }
}
