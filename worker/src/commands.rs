//! The operator's commands: what they have in common.
//!
//! They read the same settings as the worker and can run beside any number of them. What they find goes to stdout, how
//! far they are to stderr.
//!
//! | exit code | means |
//! |---|---|
//! | 0 | done, and all is well |
//! | 1 | done, and somebody should look: a delivery is missing, a letter still dead, a server away |
//! | 2 | could not be done, or not to the end |
//! | 64 | called or set up wrongly (sysexits.h, `EX_USAGE`) |
//! | 130 | interrupted by SIGINT or SIGTERM; what was done stays done |

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use backon::{ExponentialBuilder, Retryable as _};
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;
use shared::link::Link;
use shared::ops::Readiness;
use shared::settings::{EX_USAGE, duration};
use shared::text::{printable_json, printable_lines};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio_util::sync::CancellationToken;

use crate::store::{Store, StoreError};
use crate::{Config, audit, check, dead_letters, replay, status};

/// How long NATS may take to be there when a command starts.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Messages that may wait in a subscription: those that are asked for ahead, and more.
const SUBSCRIPTION_QUEUE: usize = 4096;
/// How long a command waits, all in all, for a database that went away under it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Connections to the database that a command uses at once.
const CONNECTIONS: usize = 4;

/// Time in which an interrupted command may say how far it has come.
const WIND_UP: Duration = Duration::from_millis(500);
/// The exit code of a command that was interrupted.
pub const EX_INTERRUPTED: u8 = 130;
/// The connection to NATS. A client that is dropped reports its connection as lost; this one lasts as long as the process.
static LINK: OnceLock<Link> = OnceLock::new();

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All is well.
    Well,
    /// It did what it should, and found what somebody should look at.
    LookAtIt,
    /// It was asked to stop.
    Interrupted,
}

/// Every command, for the parser.
pub fn all() -> [Command; 5] {
    [check::command(), dead_letters::command::command(), replay::command(), audit::command(), status::command()]
        .map(own_first)
}

/// In `--help`, what a command has of its own comes before the settings.
fn own_first(command: Command) -> Command {
    command.mut_args(|arg| arg.display_order(0)).mut_subcommands(own_first)
}

/// Runs the command that `arguments`, the whole program's, name. None where they name none of these.
pub async fn execute(arguments: &ArgMatches, config: &Config, interruption: &CancellationToken) -> Option<ExitCode> {
    let (name, matches) = arguments.subcommand()?;
    if !all().iter().any(|command| command.get_name() == name) {
        return None;
    }
    let command = Box::pin(async {
        match name {
            "check" => check::run(config, matches).await,
            "dead-letters" => dead_letters::command::run(config, matches, interruption).await,
            "replay" => replay::run(config, matches, interruption).await,
            "audit" => audit::run(config, matches).await,
            _ => status::run(config, matches).await,
        }
    });
    let ended = until_interrupted(interruption, command).await;
    Some(match ended.unwrap_or(Ok(Ending::Interrupted)) {
        Ok(Ending::Well) => ExitCode::SUCCESS,
        Ok(Ending::LookAtIt) => ExitCode::from(1),
        Ok(Ending::Interrupted) => ExitCode::from(EX_INTERRUPTED),
        // Whoever read our output has read enough, as `head` does.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.is::<clap::Error>() => {
            let _ = writeln!(std::io::stderr(), "worker {name}: {error}");
            ExitCode::from(EX_USAGE)
        }
        Err(error) => {
            // Nothing is left to be told when even stderr is gone.
            let _ = writeln!(std::io::stderr(), "worker {name}: {}", printable_lines(&words(&error)));
            ExitCode::from(2)
        }
    })
}

/// Runs a command, at most [`WIND_UP`] longer than until it is interrupted, whatever it waits for. None where it did not
/// end by itself. The database rolls back what it had not committed.
pub async fn until_interrupted<T>(interruption: &CancellationToken, command: impl Future<Output = T>) -> Option<T> {
    let too_long = async {
        interruption.cancelled().await;
        tokio::time::sleep(WIND_UP).await;
    };
    tokio::select! {
        ended = command => Some(ended),
        () = too_long => {
            let _ = writeln!(std::io::stderr(), "interrupted");
            None
        }
    }
}

/// An error for people. A request to NATS that this login may not send ends in a time-out: then the right is named.
pub(crate) fn words(error: &anyhow::Error) -> String {
    let denied = LINK.get().map(|link| link.current().denied()).unwrap_or_default();
    let all = format!("{error:#}");
    if denied.is_empty() || !all.contains("timed out") {
        return all;
    }
    format!("{error}: this login may not publish to {}, says NATS", denied.join(", "))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The connection to NATS, once NATS answers.
///
/// # Errors
/// Where it does not.
pub(crate) async fn link(config: &Config) -> anyhow::Result<&'static Link> {
    let link = config.nats.connect("worker", SUBSCRIPTION_QUEUE, &Readiness::default()).await?;
    match tokio::time::timeout(CONNECT_WITHIN, link.current().client.flush()).await {
        Ok(flushed) => flushed.context("NATS does not answer; NATS_URL says where it is")?,
        Err(_) => match tokio::time::timeout(CONNECT_WITHIN, config.nats.try_connect("worker")).await {
            Ok(Err(error)) => bail!("{error}; NATS_URL says where it is"),
            Ok(Ok(_)) | Err(_) => bail!("NATS does not answer within {CONNECT_WITHIN:?}; NATS_URL says where it is"),
        },
    }
    Ok(LINK.get_or_init(|| link))
}

/// The database, once its tables are what the worker writes to.
///
/// # Errors
/// Where it cannot be reached or does not fit.
pub(crate) async fn store(config: &Config) -> anyhow::Result<Store> {
    let store = Store::new(&config.database, CONNECTIONS);
    store.check().await.with_context(|| format!("the database {}", config.database))?;
    Ok(store)
}

/// Attempts something of the database's. A short outage is waited for.
///
/// # Errors
/// The last error, after a minute of waiting.
pub(crate) async fn patiently<T, F>(attempt: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    patiently_while(StoreError::is_outage, attempt).await
}

/// The same for errors of which `may_pass` says that they may pass by themselves.
///
/// # Errors
/// Any other error, or the last one after a minute of waiting.
pub(crate) async fn patiently_while<T, F>(
    may_pass: impl FnMut(&StoreError) -> bool,
    attempt: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times()
        .with_total_delay(Some(PATIENCE));
    let note = |error: &StoreError, _: Duration| tracing::warn!("will try again: {error}");
    attempt.retry(backoff).when(may_pass).notify(note).await
}

/// A flag of a command.
pub(crate) fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

/// An option of a command that takes a time.
pub(crate) fn time_option(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name("TIME").value_parser(time).help(help)
}

/// A time as people write it: RFC 3339, or how long ago.
pub(crate) fn time(text: &str) -> Result<OffsetDateTime, String> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let ago = duration(text).ok().filter(|_| !is_number);
    let ago = ago.and_then(|ago| OffsetDateTime::now_utc().checked_sub(ago.try_into().ok()?));
    OffsetDateTime::parse(text, &Rfc3339)
        .ok()
        .or(ago)
        .ok_or_else(|| "a time such as 2026-01-31T08:00:00Z, or how long ago, such as 2h or 30d".into())
}

/// RFC 3339, in UTC, to the second.
pub(crate) fn show_time(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC).replace_nanosecond(0).unwrap_or(at);
    at.format(&Rfc3339).unwrap_or_else(|_| at.to_string())
}

/// 1234567 as `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}

/// How far a command is, on stderr: a bar on a terminal, a line now and then anywhere else.
pub(crate) struct Progress {
    bar: Option<indicatif::ProgressBar>,
    total: u64,
    done: u64,
    begun: Instant,
    told: Instant,
}

impl Progress {
    /// How often a line is written where there is no terminal.
    const EVERY: Duration = Duration::from_secs(5);

    pub(crate) fn new(total: u64) -> Progress {
        use std::io::IsTerminal as _;
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{wide_bar} {human_pos} of {human_len}, {per_sec}, {eta} left";
            let style = indicatif::ProgressStyle::with_template(style);
            let bar = indicatif::ProgressBar::new(total);
            bar.set_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar())); // it is known to be good
            bar
        });
        let now = Instant::now();
        Progress { bar, total, done: 0, begun: now, told: now }
    }

    /// So many more are done.
    pub(crate) fn add(&mut self, more: u64) {
        self.done += more;
        match &self.bar {
            Some(bar) => bar.set_position(self.done),
            None if self.told.elapsed() >= Self::EVERY => {
                self.told = Instant::now();
                let _ = writeln!(std::io::stderr(), "{}", self.line());
            }
            None => {}
        }
    }

    fn line(&self) -> String {
        let rate = self.rate();
        let left = Duration::from_secs_f64((self.total.saturating_sub(self.done)) as f64 / rate.max(1.0));
        format!(
            "{} of {}, {}/s, {} left",
            count(self.done),
            count(self.total),
            count(rate as u64),
            indicatif::HumanDuration(left)
        )
    }

    /// A second, since the beginning.
    fn rate(&self) -> f64 {
        self.done as f64 / self.begun.elapsed().as_secs_f64().max(0.001)
    }

    /// `1.2 s, 34,567/s`, for the last line.
    pub(crate) fn pace(&self) -> String {
        format!("{:.1} s, {}/s", self.begun.elapsed().as_secs_f64(), count(self.rate() as u64))
    }

    /// Writes to stdout, beside the bar.
    ///
    /// # Errors
    /// Where nobody reads it.
    pub(crate) fn print(&self, text: &str) -> std::io::Result<()> {
        let print = || print(text);
        self.bar.as_ref().map_or_else(print, |bar| bar.suspend(print))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Writes lines to stdout. Hidden characters become escapes. A value that others wrote is escaped before it is put into
/// its line ([`shared::text::printable`]): its line feeds would begin lines here.
///
/// # Errors
/// Where nobody reads it.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(printable_lines(text).as_bytes())?;
    out.flush()
}

/// Writes a value to stdout as JSON. Hidden characters become escapes of JSON's.
///
/// # Errors
/// Fails when stdout is closed.
pub(crate) fn print_json(value: &Value) -> std::io::Result<()> {
    print(&printable_json(&format!("{value:#}\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_write_them() {
        assert_eq!(time("2026-01-31T08:00:00Z").unwrap().unix_timestamp(), 1_769_846_400);
        assert_eq!(time("2026-01-31T09:00:00+01:00").unwrap().unix_timestamp(), 1_769_846_400);
        let ago = OffsetDateTime::now_utc() - time("2h").unwrap();
        assert!((7_199..=7_201).contains(&ago.whole_seconds()), "{ago}");
        for bad in ["", "7", "yesterday", "2026-01-31", "99999999999y", "-2h"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn commands_are_well_formed() {
        Command::new("worker").subcommands(all()).debug_assert();
    }
}
