//! What can be set, and the config that comes of it.

use std::net::SocketAddr;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use shared::nats;
use shared::settings::{self, BadSettings, SHUTDOWN_GRACE, Setting};
use shared::stream::{self, NatsSettings};
use shared::telemetry::LogSettings;

use crate::store::{DatabaseUrl, TLS_SETTINGS};

const DATABASE_URL: Setting =
    Setting::bare("DATABASE_URL", "Loop's PostgreSQL, such as postgres://user:password@host:5432/loop")
        .no_flag_with_password(has_password);
const WORKER_OPS_LISTEN: Setting =
    Setting::new("WORKER_OPS_LISTEN", "127.0.0.1:9465", "Where operators reach /healthz and /readyz");
const WORKER_BATCH_MAX: Setting =
    Setting::new("WORKER_BATCH_MAX", "256", "Most deliveries stored in one transaction (1 to 10000)");
const WORKER_CONCURRENCY: Setting = Setting::new(
    "WORKER_CONCURRENCY",
    "2",
    "Batches worked on at once (1 to 64); a worker opens up to twice as many database connections, and two",
);
const WORKER_MIGRATE: Setting = Setting::new(
    "WORKER_MIGRATE",
    "on",
    "Whether a start makes the tables that are missing (on), or only checks them (off)",
);

/// Every setting of the worker, in the order of `--help`.
pub const SETTINGS: [&[Setting]; 6] = [
    &[DATABASE_URL],
    &TLS_SETTINGS,
    &[WORKER_OPS_LISTEN, WORKER_BATCH_MAX, WORKER_CONCURRENCY, WORKER_MIGRATE],
    &nats::SETTINGS,
    &stream::SETTINGS,
    &settings::PROCESS,
];

/// The worker's settings, read and checked.
#[derive(Debug)]
pub struct Config {
    /// `DATABASE_URL`
    pub database: DatabaseUrl,
    /// `WORKER_OPS_LISTEN`
    pub ops_listen: SocketAddr,
    /// `WORKER_BATCH_MAX`
    pub batch_max: usize,
    /// `WORKER_CONCURRENCY`
    pub concurrency: usize,
    /// `WORKER_MIGRATE`
    pub migrate: bool,
    /// Where NATS is, and the stream.
    pub nats: NatsSettings,
    /// `SHUTDOWN_GRACE`
    pub grace: Duration,
    /// `RUST_LOG`, `LOG_FORMAT`
    pub logs: LogSettings,
}

impl Config {
    /// Reads every setting through `lookup`.
    ///
    /// # Errors
    /// All mistakes at once.
    pub fn load(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadSettings> {
        let mut reader = settings::Reader::new(lookup);
        let database = database(&mut reader);
        let ops_listen = reader.parse(&WORKER_OPS_LISTEN, settings::address);
        let batch_max = reader.parse(&WORKER_BATCH_MAX, |text| settings::number(text, 1..=10_000));
        let concurrency = reader.parse(&WORKER_CONCURRENCY, |text| settings::number(text, 1..=64));
        let migrate = reader.parse(&WORKER_MIGRATE, |text| match text {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err("on or off".into()),
        });
        let nats = NatsSettings::read(&mut reader);
        let grace = reader.parse(&SHUTDOWN_GRACE, settings::duration);
        let logs = settings::logs(&mut reader);
        let config = || {
            Some(Config {
                database: database?,
                ops_listen: ops_listen?,
                batch_max: batch_max?,
                concurrency: concurrency?,
                migrate: migrate?,
                nats: nats?,
                grace: grace?,
                logs: logs?,
            })
        };
        let config = config();
        reader.finish(config)
    }
}

/// Where the database is, and how the connection to it is encrypted.
fn database(reader: &mut settings::Reader<'_>) -> Option<DatabaseUrl> {
    let url = reader.parse(&DATABASE_URL, |text| Ok(text.to_owned()))?;
    let tls = TLS_SETTINGS.map(|setting| (setting.variable, reader.text(&setting)));
    let variable = |name: &str| tls.iter().find(|(variable, _)| *variable == name)?.1.clone();
    match DatabaseUrl::read(&url, variable) {
        Ok(database) => Some(database),
        Err(bad) => {
            bad.mistakes().into_iter().for_each(|mistake| reader.mistake(mistake));
            None
        }
    }
}

/// Tells if the text, in either form of a connection string, may hold a password. In doubt it does.
fn has_password(text: &str) -> bool {
    let decoded = percent_decode_str(text).decode_utf8_lossy();
    let has_value = |(at, name): (usize, &str)| decoded[at + name.len()..].trim_start().starts_with('=');
    let parameter = decoded.match_indices("password").any(has_value);
    let login = text.split_once("://").and_then(|(_, rest)| rest.split('?').next()?.rsplit_once('@'));
    parameter || login.is_some_and(|(login, _)| login.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_all_that_must_be_set() {
        let url = |variable: &str| (variable == "DATABASE_URL").then(|| "postgres://u:hunter2@h/loop".to_owned());
        let config = Config::load(&url).unwrap();
        assert_eq!((config.batch_max, config.concurrency, config.migrate), (256, 2, true));
        assert!(!format!("{config:?}").contains("hunter2"), "{config:?}");
    }

    #[test]
    fn every_mistake_is_named_at_once_and_no_password_with_it() {
        let bad = |variable: &str| match variable {
            "DATABASE_URL" => Some("mysql://u:hunter2@h/loop".to_owned()),
            "WORKER_BATCH_MAX" => Some("0".to_owned()),
            "WORKER_MIGRATE" => Some("yes".to_owned()),
            _ => None,
        };
        let error = Config::load(&bad).unwrap_err().to_string();
        for variable in ["DATABASE_URL", "WORKER_BATCH_MAX", "WORKER_MIGRATE"] {
            assert!(error.contains(variable), "{error}");
        }
        assert!(!error.contains("hunter2"), "{error}");
    }
}
