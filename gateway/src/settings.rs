//! What can be set, and the config that comes of it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use shared::nats;
use shared::settings::{self, BadSettings, SHUTDOWN_GRACE, Setting};
use shared::stream::{self, NatsSettings};
use shared::telemetry::LogSettings;

use crate::duplicate_bodies::DuplicateBodies;
use crate::journal;
use crate::secrets::{Secrets, Source};
use crate::signature::Form;
use crate::source::TrustedProxies;

const SENTRY_CLIENT_SECRET: Setting = Setting::secret(
    "SENTRY_CLIENT_SECRET",
    "The integration's client secret; several separated by commas while it is rotated",
);
const SENTRY_CLIENT_SECRET_FILE: Setting = Setting::bare(
    "SENTRY_CLIENT_SECRET_FILE",
    "A file that holds the client secret, or several, instead of the variable; changes are taken within seconds",
);
const SENTRY_SECRET_GRACE: Setting = Setting::new(
    "SENTRY_SECRET_GRACE",
    "10min",
    "Time for which a secret stays valid after it was taken out of the file; 0 for none",
);
const SENTRY_SIGNATURE_FORM: Setting = Setting::new(
    "SENTRY_SIGNATURE_FORM",
    "any",
    "What a signature may be over: the body's bytes (raw), its canonical JSON (canonical), either (any)",
);
const GATEWAY_LISTEN: Setting = Setting::new("GATEWAY_LISTEN", "0.0.0.0:8080", "Where Sentry reaches the gateway");
const GATEWAY_OPS_LISTEN: Setting =
    Setting::new("GATEWAY_OPS_LISTEN", "127.0.0.1:9464", "Where operators reach /healthz and /readyz");
const GATEWAY_JOURNAL_DIR: Setting = Setting::new(
    "GATEWAY_JOURNAL_DIR",
    "/var/lib/loop-gateway",
    "Where the journal is: a directory of this gateway's own, on a disk that lasts",
);
const GATEWAY_JOURNAL_MAX_BYTES: Setting = Setting::new(
    "GATEWAY_JOURNAL_MAX_BYTES",
    "10GiB",
    "Size the journal may have on disk, two of the largest bodies at least; full of what is nowhere else, deliveries are \
     answered 503",
);
const GATEWAY_CONFIRM_AFTER: Setting = Setting::new(
    "GATEWAY_CONFIRM_AFTER",
    "5min",
    "How long a published delivery may be without a receipt before it is looked after",
);
const GATEWAY_JOURNAL_RETAIN: Setting = Setting {
    default: Some("0"),
    ..Setting::bare("GATEWAY_JOURNAL_RETAIN", "How long confirmed deliveries are kept for `gateway journal redrive`")
};
const GATEWAY_MAX_BODY_BYTES: Setting =
    Setting::new("GATEWAY_MAX_BODY_BYTES", "8MiB", "Largest body that is taken; a larger one is answered 413");
const GATEWAY_MAX_HEADER_BYTES: Setting = Setting::new(
    "GATEWAY_MAX_HEADER_BYTES",
    "16KiB",
    "Largest request line and headers, together; larger ones are answered 431",
);
const GATEWAY_MAX_HEADERS: Setting =
    Setting::new("GATEWAY_MAX_HEADERS", "100", "Headers a request may have; more are answered 431");
const GATEWAY_HEADER_TIMEOUT: Setting =
    Setting::new("GATEWAY_HEADER_TIMEOUT", "5s", "How long a request's headers may take to arrive");
const GATEWAY_BODY_TIMEOUT: Setting =
    Setting::new("GATEWAY_BODY_TIMEOUT", "10s", "How long a request's body may take to arrive");
const GATEWAY_IDLE_TIMEOUT: Setting = Setting::new(
    "GATEWAY_IDLE_TIMEOUT",
    "75s",
    "How long a connection may wait for its next request; longer than the proxy in front keeps its own, or deliveries are lost",
);
const GATEWAY_MAX_CONNECTIONS: Setting = Setting::new(
    "GATEWAY_MAX_CONNECTIONS",
    "10000",
    "Connections at once; beyond, a new one takes the place of one without a 202, else is answered 503",
);
const GATEWAY_MAX_BYTES_IN_FLIGHT: Setting = Setting::new(
    "GATEWAY_MAX_BYTES_IN_FLIGHT",
    "256MiB",
    "Bytes of bodies in flight at once, in memory or waiting to be read; more is answered 503",
);
const GATEWAY_MAX_CANONICAL: Setting = Setting::bare(
    "GATEWAY_MAX_CANONICAL",
    "Bodies whose canonical form is made at once, default half of the CPU's cores; deliveries signed raw never wait for them",
);
const GATEWAY_DUPLICATE_BODIES: Setting = Setting::new(
    "GATEWAY_DUPLICATE_BODIES",
    "accept",
    "A body that was accepted under another delivery id within the last hour is a delivery of its own (accept), or the first one again (once)",
);
const GATEWAY_TRUSTED_PROXIES: Setting = Setting::bare(
    "GATEWAY_TRUSTED_PROXIES",
    "Proxies whose Forwarded or X-Forwarded-For names a request's source in the log: addresses or CIDR blocks, separated by commas",
);
const GATEWAY_SHUTDOWN_DELAY: Setting = Setting::new(
    "GATEWAY_SHUTDOWN_DELAY",
    "0",
    "How long a stopping gateway takes deliveries while /readyz says 503 already, such as 5s behind a load balancer; part of SHUTDOWN_GRACE",
);

/// Every setting of the gateway, in the order of `--help`.
pub const SETTINGS: [&[Setting]; 4] = [
    &[
        SENTRY_CLIENT_SECRET,
        SENTRY_CLIENT_SECRET_FILE,
        SENTRY_SECRET_GRACE,
        SENTRY_SIGNATURE_FORM,
        GATEWAY_LISTEN,
        GATEWAY_OPS_LISTEN,
        GATEWAY_JOURNAL_DIR,
        GATEWAY_JOURNAL_MAX_BYTES,
        GATEWAY_CONFIRM_AFTER,
        GATEWAY_JOURNAL_RETAIN,
        GATEWAY_MAX_BODY_BYTES,
        GATEWAY_MAX_HEADER_BYTES,
        GATEWAY_MAX_HEADERS,
        GATEWAY_HEADER_TIMEOUT,
        GATEWAY_BODY_TIMEOUT,
        GATEWAY_IDLE_TIMEOUT,
        GATEWAY_MAX_CONNECTIONS,
        GATEWAY_MAX_BYTES_IN_FLIGHT,
        GATEWAY_MAX_CANONICAL,
        GATEWAY_DUPLICATE_BODIES,
        GATEWAY_TRUSTED_PROXIES,
        GATEWAY_SHUTDOWN_DELAY,
    ],
    &nats::SETTINGS,
    &stream::SETTINGS,
    &settings::PROCESS,
];

/// The gateway's settings, read and checked.
#[derive(Debug)]
pub struct Config {
    /// `GATEWAY_LISTEN`
    pub listen: SocketAddr,
    /// `GATEWAY_OPS_LISTEN`
    pub ops_listen: SocketAddr,
    /// `SENTRY_CLIENT_SECRET` or `SENTRY_CLIENT_SECRET_FILE`
    pub secrets: Source,
    /// `SENTRY_SIGNATURE_FORM`
    pub form: Form,
    /// The journal.
    pub journal: JournalSettings,
    /// What the public listener puts up with.
    pub limits: Limits,
    /// `GATEWAY_DUPLICATE_BODIES`
    pub duplicate_bodies: DuplicateBodies,
    /// `GATEWAY_TRUSTED_PROXIES`
    pub trusted_proxies: TrustedProxies,
    /// Where NATS is, and the stream.
    pub nats: NatsSettings,
    /// `GATEWAY_SHUTDOWN_DELAY`
    pub shutdown_delay: Duration,
    /// `SHUTDOWN_GRACE`
    pub grace: Duration,
    /// `RUST_LOG`, `LOG_FORMAT`
    pub logs: LogSettings,
}

/// Where the journal is, and how much it may take.
#[derive(Debug, Clone)]
pub struct JournalSettings {
    /// `GATEWAY_JOURNAL_DIR`
    pub dir: PathBuf,
    /// `GATEWAY_JOURNAL_MAX_BYTES`, `GATEWAY_JOURNAL_RETAIN`
    pub limits: journal::Limits,
    /// `GATEWAY_CONFIRM_AFTER`
    pub confirm_after: Duration,
}

/// What the public listener puts up with.
#[derive(Debug, Clone)]
pub struct Limits {
    /// `GATEWAY_MAX_BODY_BYTES`
    pub body_bytes: usize,
    /// `GATEWAY_MAX_HEADER_BYTES`
    pub header_bytes: usize,
    /// `GATEWAY_MAX_HEADERS`
    pub headers: usize,
    /// `GATEWAY_HEADER_TIMEOUT`
    pub header_timeout: Duration,
    /// `GATEWAY_BODY_TIMEOUT`
    pub body_timeout: Duration,
    /// `GATEWAY_IDLE_TIMEOUT`
    pub idle_timeout: Duration,
    /// `GATEWAY_MAX_CONNECTIONS`
    pub connections: usize,
    /// `GATEWAY_MAX_BYTES_IN_FLIGHT`
    pub bytes_in_flight: usize,
    /// `GATEWAY_MAX_CANONICAL`
    pub canonical: usize,
}

impl Config {
    /// Reads every setting through `lookup`.
    ///
    /// # Errors
    /// All mistakes at once.
    pub fn load(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadSettings> {
        let mut reader = settings::Reader::new(lookup);
        let secrets = secrets(&mut reader);
        let form = reader
            .parse(&SENTRY_SIGNATURE_FORM, |text| Form::named(text).ok_or_else(|| "any, canonical or raw".into()));
        let listen = reader.parse(&GATEWAY_LISTEN, settings::address);
        let ops_listen = reader.parse(&GATEWAY_OPS_LISTEN, settings::address);
        let journal = journal(&mut reader);
        let limits = limits(&mut reader);
        let duplicate_bodies = reader.parse(&GATEWAY_DUPLICATE_BODIES, |text| {
            DuplicateBodies::named(text).ok_or_else(|| "accept or once".into())
        });
        let trusted_proxies = reader.optional(&GATEWAY_TRUSTED_PROXIES, |text| {
            let expected = "addresses or CIDR blocks, separated by commas, such as 10.0.0.0/8,2001:db8::1";
            TrustedProxies::parse(text).ok_or_else(|| expected.into())
        });
        let nats = NatsSettings::read(&mut reader);
        let shutdown_delay = reader.parse(&GATEWAY_SHUTDOWN_DELAY, duration_or_0);
        let grace = reader.parse(&SHUTDOWN_GRACE, settings::duration);
        if shutdown_delay.zip(grace).is_some_and(|(delay, grace)| delay >= grace) {
            let (delay, grace) = (GATEWAY_SHUTDOWN_DELAY.variable, SHUTDOWN_GRACE.variable);
            reader.mistake(format!("{delay} must be shorter than {grace}, of which it is a part"));
        }
        let logs = settings::logs(&mut reader);
        if let Some((journal, limits)) = journal.as_ref().zip(limits.as_ref()) {
            let least = journal::Limits::least_for(limits.body_bytes + limits.header_bytes);
            if journal.limits.max_bytes_on_disk < least {
                let (max, body) = (GATEWAY_JOURNAL_MAX_BYTES.variable, GATEWAY_MAX_BODY_BYTES.variable);
                reader.mistake(format!(
                    "{max} is {} bytes and must be at least {least}: the journal needs room for two of the largest deliveries \
                     that {body} allows; raise {max} or lower {body}",
                    journal.limits.max_bytes_on_disk
                ));
            }
        }
        let config = || {
            Some(Config {
                listen: listen?,
                ops_listen: ops_listen?,
                secrets: secrets?,
                form: form?,
                journal: journal?,
                limits: limits?,
                duplicate_bodies: duplicate_bodies?,
                trusted_proxies: trusted_proxies.unwrap_or_default(),
                nats: nats?,
                shutdown_delay: shutdown_delay?,
                grace: grace?,
                logs: logs?,
            })
        };
        let config = config();
        reader.finish(config)
    }
}

/// What the commands on a journal need: no secret, no listener.
#[derive(Debug)]
pub struct JournalConfig {
    /// The journal.
    pub journal: JournalSettings,
    /// Where NATS is, and the stream.
    pub nats: NatsSettings,
    /// `RUST_LOG`, `LOG_FORMAT`
    pub logs: LogSettings,
}

impl JournalConfig {
    /// Reads these settings through `lookup`.
    ///
    /// # Errors
    /// All mistakes at once.
    pub fn load(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadSettings> {
        let mut reader = settings::Reader::new(lookup);
        let (journal, nats) = (journal(&mut reader), NatsSettings::read(&mut reader));
        let logs = settings::logs(&mut reader);
        let config = || Some(JournalConfig { journal: journal?, nats: nats?, logs: logs? });
        let config = config();
        reader.finish(config)
    }
}

fn duration_or_0(text: &str) -> Result<Duration, String> {
    if text == "0" {
        Ok(Duration::ZERO)
    } else {
        settings::duration(text).map_err(|expected| format!("0, or {expected}"))
    }
}

fn journal(reader: &mut settings::Reader<'_>) -> Option<JournalSettings> {
    let dir = reader.parse(&GATEWAY_JOURNAL_DIR, |text| Ok(PathBuf::from(text)));
    let max_bytes = reader.parse(&GATEWAY_JOURNAL_MAX_BYTES, |text| {
        Some(settings::size(text)?).filter(|size| *size >= 1 << 20).ok_or_else(|| "a size of at least 1MiB".into())
    });
    let confirm_after = reader.parse(&GATEWAY_CONFIRM_AFTER, settings::duration);
    let retain = reader.parse(&GATEWAY_JOURNAL_RETAIN, duration_or_0);
    let limits = journal::Limits { retain: retain?, ..journal::Limits::of(max_bytes?) };
    Some(JournalSettings { dir: dir?, limits, confirm_after: confirm_after? })
}

fn limits(reader: &mut settings::Reader<'_>) -> Option<Limits> {
    // A body must fit into u32: the budget of bytes in flight is handed out in such pieces.
    let body_bytes = reader.parse(&GATEWAY_MAX_BODY_BYTES, |text| {
        let small_enough = |size: &u64| *size <= 1 << 30;
        let size = Some(settings::size(text)?).filter(small_enough).ok_or("a size of at most 1GiB")?;
        usize::try_from(size).map_err(|_| "a size this machine can address".into())
    });
    let header_bytes = reader.parse(&GATEWAY_MAX_HEADER_BYTES, |text| {
        let size = Some(settings::size(text)?).filter(|size| (4 << 10..=1 << 20).contains(size));
        size.and_then(|size| usize::try_from(size).ok()).ok_or_else(|| "a size from 4KiB to 1MiB".into())
    });
    let headers = reader.parse(&GATEWAY_MAX_HEADERS, |text| settings::number(text, 10..=10_000));
    let header_timeout = reader.parse(&GATEWAY_HEADER_TIMEOUT, settings::duration);
    let body_timeout = reader.parse(&GATEWAY_BODY_TIMEOUT, settings::duration);
    let idle_timeout = reader.parse(&GATEWAY_IDLE_TIMEOUT, settings::duration);
    let connections = reader.parse(&GATEWAY_MAX_CONNECTIONS, |text| settings::number(text, 1..=1_000_000));
    let bytes_in_flight = reader.parse(&GATEWAY_MAX_BYTES_IN_FLIGHT, |text| {
        usize::try_from(settings::size(text)?).map_err(|_| "a size this machine can address".into())
    });
    let canonical = match reader.text(&GATEWAY_MAX_CANONICAL) {
        Some(_) => reader.parse(&GATEWAY_MAX_CANONICAL, |text| settings::number(text, 1..=1024)),
        // So that deliveries signed raw always find a core.
        None => Some((std::thread::available_parallelism().map_or(1, usize::from) / 2).max(1)),
    };
    let limits = Limits {
        body_bytes: body_bytes?,
        header_bytes: header_bytes?,
        headers: headers?,
        header_timeout: header_timeout?,
        body_timeout: body_timeout?,
        idle_timeout: idle_timeout?,
        connections: connections?,
        bytes_in_flight: bytes_in_flight?,
        canonical: canonical?,
    };
    if limits.bytes_in_flight < limits.body_bytes {
        let (flight, body) = (GATEWAY_MAX_BYTES_IN_FLIGHT.variable, GATEWAY_MAX_BODY_BYTES.variable);
        reader.mistake(format!("{flight} must be at least {body}, or the largest body could never be taken"));
    }
    Some(limits)
}

/// The secrets, from the variable or from the file.
fn secrets(reader: &mut settings::Reader<'_>) -> Option<Source> {
    let grace = reader.parse(&SENTRY_SECRET_GRACE, duration_or_0);
    let Some(file) = reader.text(&SENTRY_CLIENT_SECRET_FILE) else {
        let parse = |text: &str| {
            Secrets::parse(text).map_err(|problem| format!("the integration's client secret; the value {problem}"))
        };
        return reader.parse(&SENTRY_CLIENT_SECRET, parse).map(Source::fixed);
    };
    if reader.text(&SENTRY_CLIENT_SECRET).is_some() {
        let (variable, file) = (SENTRY_CLIENT_SECRET.variable, SENTRY_CLIENT_SECRET_FILE.variable);
        reader.mistake(format!("{variable} and {file} are both set: keep one"));
        return None;
    }
    let grace = grace?;
    reader.parse(&SENTRY_CLIENT_SECRET_FILE, |_| {
        Source::file(file.as_ref(), grace)
            .map_err(|problem| format!("a file that holds the client secret; it {problem}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(set: &[(&str, &str)]) -> Result<Config, BadSettings> {
        let value =
            |variable: &str| set.iter().find(|(name, _)| *name == variable).map(|(_, value)| (*value).to_owned());
        Config::load(&value)
    }

    #[test]
    fn a_secret_is_all_that_must_be_set() {
        let config = load(&[("SENTRY_CLIENT_SECRET", "s3cr3t-s3cr3t-s3cr3t")]).unwrap();
        assert_eq!(config.listen, "0.0.0.0:8080".parse().unwrap());
        assert_eq!(config.limits.body_bytes, 8 << 20);
        assert!(!format!("{config:?}").contains("s3cr3t"));
    }

    #[test]
    fn every_mistake_is_named_at_once() {
        let bad = [
            ("SENTRY_SIGNATURE_FORM", "sha1"),
            ("GATEWAY_LISTEN", "here"),
            ("GATEWAY_MAX_BODY_BYTES", "0"),
            ("GATEWAY_DUPLICATE_BODIES", "twice"),
            ("GATEWAY_TRUSTED_PROXIES", "10.0.0.0/33"),
            ("NATS_URL", "::"),
            ("LOG_FORMAT", "xml"),
        ];
        let error = load(&bad).unwrap_err().to_string();
        for (variable, _) in bad {
            assert!(error.contains(variable), "{variable} is missing in {error}");
        }
        assert!(error.contains("SENTRY_CLIENT_SECRET is not set"), "{error}");
    }

    #[test]
    fn limits_that_contradict_each_other_are_a_mistake() {
        let error = load(&[("SENTRY_CLIENT_SECRET", "s3cr3t-s3cr3t-s3cr3t"), ("GATEWAY_MAX_BYTES_IN_FLIGHT", "1MiB")])
            .unwrap_err();
        assert!(error.to_string().contains("GATEWAY_MAX_BYTES_IN_FLIGHT must be at least"), "{error}");
    }

    #[test]
    fn a_journal_too_small_for_the_largest_body_is_a_mistake() {
        let secret = ("SENTRY_CLIENT_SECRET", "s3cr3t-s3cr3t-s3cr3t");
        let error = load(&[secret, ("GATEWAY_JOURNAL_MAX_BYTES", "4MiB")]).unwrap_err();
        let error = error.to_string();
        let parts = ["GATEWAY_JOURNAL_MAX_BYTES is 4194304 bytes", "at least 16941056", "lower GATEWAY_MAX_BODY_BYTES"];
        for part in parts {
            assert!(error.contains(part), "{part} is missing in {error}");
        }
        load(&[secret, ("GATEWAY_JOURNAL_MAX_BYTES", "16941056")]).unwrap();
        load(&[secret, ("GATEWAY_JOURNAL_MAX_BYTES", "4MiB"), ("GATEWAY_MAX_BODY_BYTES", "1MiB")]).unwrap();
    }
}
