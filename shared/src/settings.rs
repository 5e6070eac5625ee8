//! Settings: one table names each, its default and what it means. `--help`, the flags and the errors come from it.
//!
//! A program reads its settings once, into types, and one start names every mistake. A flag wins over the variable, an
//! empty variable counts as not set, and no value is ever repeated in an error: it could be a secret.

use std::ffi::OsStr;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::builder::{StringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, Command};

use crate::telemetry::{LogFormat, LogSettings};

/// The exit code of a program that was called or set up wrongly (BSD's sysexits.h, `EX_USAGE`).
pub const EX_USAGE: u8 = 64;

/// One setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The environment variable.
    pub variable: &'static str,
    /// What holds where it is not set; none where it must be, or where absence has a meaning of its own.
    pub default: Option<&'static str>,
    /// One sentence for `--help`.
    pub help: &'static str,
    /// Secrets are no flags: every user of a machine can read a process's arguments.
    pub secret: bool,
    /// Tells if a value holds a password. Such a value is refused as a flag.
    pub has_password: Option<fn(&str) -> bool>,
}

impl Setting {
    /// A setting with a default.
    pub const fn new(variable: &'static str, default: &'static str, help: &'static str) -> Self {
        Setting { default: Some(default), ..Setting::bare(variable, help) }
    }

    /// A setting without a default.
    pub const fn bare(variable: &'static str, help: &'static str) -> Self {
        Setting { variable, default: None, help, secret: false, has_password: None }
    }

    /// A setting that only the environment may hold.
    pub const fn secret(variable: &'static str, help: &'static str) -> Self {
        Setting { secret: true, ..Setting::bare(variable, help) }
    }

    /// The same setting, as a flag only without a password.
    #[must_use]
    pub const fn no_flag_with_password(self, has_password: fn(&str) -> bool) -> Self {
        Setting { has_password: Some(has_password), ..self }
    }

    /// Its flag, without the dashes: `GATEWAY_LISTEN` is `listen` for the program `gateway`.
    pub fn flag(&self, program: &str) -> String {
        let own = self.variable.strip_prefix(&format!("{}_", program.to_uppercase())).unwrap_or(self.variable);
        own.to_lowercase().replace('_', "-")
    }

    fn arg(&self, program: &str) -> Arg {
        let default = self.default.map(|default| format!(", default: {default}")).unwrap_or_default();
        let help = format!("{} [{}{default}]", self.help, self.variable);
        let arg = Arg::new(self.variable).long(self.flag(program)).value_name("VALUE").help(help).global(true);
        match self.has_password {
            Some(has_password) => arg.value_parser(NoPassword { variable: self.variable, has_password }),
            None => arg,
        }
    }
}

/// Refuses a flag's value that holds a password, with an error that does not hold it.
#[derive(Clone)]
struct NoPassword {
    variable: &'static str,
    has_password: fn(&str) -> bool,
}

impl TypedValueParser for NoPassword {
    type Value = String;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<String, clap::Error> {
        if !(self.has_password)(&value.to_string_lossy()) {
            return StringValueParser::new().parse_ref(command, arg, value);
        }
        let (flag, variable) = (arg.and_then(Arg::get_long).unwrap_or_default(), self.variable);
        let words = format!(
            "--{flag} holds a password, which every user of this machine can read in its list of processes. Set the \
             variable {variable} instead\n"
        );
        Err(clap::Error::raw(ErrorKind::ValueValidation, words))
    }
}

/// `command` with a flag for each setting that is no secret; the secrets' variables are named below the flags.
pub fn command(command: Command, settings: &[&[Setting]]) -> Command {
    let program = command.get_name().to_owned();
    let (secrets, open): (Vec<&Setting>, Vec<&Setting>) =
        settings.iter().copied().flatten().partition(|setting| setting.secret);
    let named = secrets.iter().map(|secret| format!("\n  {}\n          {}", secret.variable, secret.help));
    let after = match secrets.is_empty() {
        true => String::new(),
        false => format!("Only in the environment:{}", named.collect::<String>()),
    };
    command.args(open.iter().map(|setting| setting.arg(&program))).after_help(after)
}

/// Parses this process's arguments, and ends it where they are wrong (exit code 64) or ask for help (0).
pub fn arguments(command: Command) -> ArgMatches {
    command.try_get_matches().unwrap_or_else(|error| {
        // Nothing is left to be told when even stderr is gone.
        let _ = error.print();
        std::process::exit(if error.use_stderr() { i32::from(EX_USAGE) } else { 0 })
    })
}

/// Looks settings up as a program does: its flags first, then the environment.
pub fn flags_then_environment(matches: &ArgMatches) -> impl Fn(&str) -> Option<String> {
    move |variable| {
        let flag = matches.try_get_one::<String>(variable).ok().flatten().cloned();
        flag.or_else(|| std::env::var(variable).ok())
    }
}

/// Where a setting's value is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum From {
    /// Its flag.
    Flag,
    /// The environment variable.
    Variable,
    /// Nobody set it.
    Default,
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            From::Flag => "flag",
            From::Variable => "variable",
            From::Default => "default",
        })
    }
}

/// A setting as a program would use it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct InUse {
    /// Its variable.
    pub variable: &'static str,
    /// Its value, for people: nothing of a secret.
    pub value: String,
    /// Where that is from.
    pub from: From,
}

/// Every setting as it would be used. `show` words the values that must not, or cannot, be shown as they are set; others
/// are shown so, but for secrets, of which is only said that they are there.
pub fn in_use(settings: &[&[Setting]], matches: &ArgMatches, show: impl Fn(&str) -> Option<String>) -> Vec<InUse> {
    let is_set = |text: &String| !text.trim().is_empty();
    let used = |setting: &Setting| {
        let flag = matches.try_get_one::<String>(setting.variable).ok().flatten().cloned();
        let variable = || std::env::var(setting.variable).ok();
        // As `Reader::text` has it: a flag wins, and what is empty is not set.
        let from = if flag.is_some() { From::Flag } else { From::Variable };
        let set = flag.or_else(variable).filter(is_set);
        let from = if set.is_some() { from } else { From::Default };
        let plain = || match (&set, setting.default) {
            (Some(_), _) if setting.secret => "set".to_owned(),
            (Some(text), _) => text.trim().to_owned(),
            (None, Some(default)) => default.to_owned(),
            (None, None) => "not set".to_owned(),
        };
        InUse { variable: setting.variable, value: show(setting.variable).unwrap_or_else(plain), from }
    };
    settings.iter().copied().flatten().map(used).collect()
}

/// Every mistake in the settings, a line each: the variable and what is wrong, never the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSettings(Vec<String>);

impl fmt::Display for BadSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot start, the settings have {} mistake(s):", self.0.len())?;
        self.0.iter().try_for_each(|mistake| write!(f, "\n  {mistake}"))
    }
}

impl std::error::Error for BadSettings {}

/// Reads settings and remembers what is wrong with them.
pub struct Reader<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    mistakes: Vec<String>,
}

impl<'a> Reader<'a> {
    /// A reader over `lookup`: the environment, or a test's closure.
    pub fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Reader { lookup, mistakes: Vec::new() }
    }

    /// The text of a setting, or its default. `None` where there is neither; that is no mistake.
    pub fn text(&self, setting: &Setting) -> Option<String> {
        let set = (self.lookup)(setting.variable).map(|value| value.trim().to_owned());
        set.filter(|value| !value.is_empty()).or_else(|| setting.default.map(str::to_owned))
    }

    /// The setting as a `T`. `parse` says what was expected, in words that follow "must be", without the value. `None`
    /// only where [`Reader::finish`] will fail.
    pub fn parse<T>(&mut self, setting: &Setting, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let Some(text) = self.text(setting) else {
            self.mistake(format!("{} is not set: {}", setting.variable, setting.help));
            return None;
        };
        match parse(&text) {
            Ok(value) => Some(value),
            Err(expected) => {
                self.mistake(format!("{} must be {expected}", setting.variable));
                None
            }
        }
    }

    /// The same for a setting that may be absent. `None` where it is, and where it is wrong and [`Reader::finish`] fails.
    pub fn optional<T>(&mut self, setting: &Setting, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.text(setting).and_then(|_| self.parse(setting, parse))
    }

    /// Remembers a mistake that no single setting makes. Must not hold a value.
    pub fn mistake(&mut self, mistake: String) {
        self.mistakes.push(mistake);
    }

    /// Makes the config out of what was read, where all of it is there and nothing was wrong.
    ///
    /// # Errors
    /// All mistakes at once.
    pub fn finish<T>(self, config: Option<T>) -> Result<T, BadSettings> {
        match config {
            Some(config) if self.mistakes.is_empty() => Ok(config),
            _ => Err(BadSettings(self.mistakes)),
        }
    }
}

/// An address to listen on, such as `127.0.0.1:8080` or `[::]:8080`.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "an IP address and a port, such as 127.0.0.1:8080".to_owned())
}

/// A size in bytes: `8MiB`, `10 GiB`, `9MB`, or bytes as a plain number. Not 0.
pub fn size(text: &str) -> Result<u64, String> {
    let size = text.parse::<ByteSize>().map(|size| size.as_u64()).unwrap_or(0);
    if size == 0 { Err("a size above 0, such as 8MiB or a number of bytes".into()) } else { Ok(size) }
}

/// Longest span that a setting may have. A moment that far away can still be computed.
const LONGEST: Duration = Duration::from_secs(101 * 365 * 86_400);

/// A span of time: `25s`, `2 min`, `30d`, or seconds as a plain number. Not 0, and at most a century.
pub fn duration(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map(Duration::from_secs);
    let span = seconds.or_else(|_| humantime::parse_duration(text)).unwrap_or_default();
    if span.is_zero() || span >= LONGEST {
        return Err("a time above 0 and of at most 100 years, such as 25s, 2min or 30d".into());
    }
    Ok(span)
}

/// A whole number in `range`.
pub fn number(text: &str, range: std::ops::RangeInclusive<usize>) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("a whole number from {} to {}", range.start(), range.end()))
}

/// How long a stopping program may take.
pub const SHUTDOWN_GRACE: Setting =
    Setting::new("SHUTDOWN_GRACE", "25s", "How long a stop may take before it is cut short");
/// What is logged.
pub const RUST_LOG: Setting = Setting::new("RUST_LOG", "info", "What is logged: a level, or levels by module");
/// How it is logged.
pub const LOG_FORMAT: Setting =
    Setting::new("LOG_FORMAT", "text", "How it is logged: text for people, json for machines");

/// The settings that every long-running program has.
pub const PROCESS: [Setting; 3] = [SHUTDOWN_GRACE, RUST_LOG, LOG_FORMAT];

/// [`RUST_LOG`] and [`LOG_FORMAT`].
pub fn logs(reader: &mut Reader<'_>) -> Option<LogSettings> {
    let filter = reader.parse(&RUST_LOG, |text| match text.parse::<tracing_subscriber::EnvFilter>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("a level (error, warn, info, debug, trace) or a list such as info,gateway=debug".into()),
    });
    let format = reader.parse(&LOG_FORMAT, |text| match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("text or json".into()),
    });
    Some(LogSettings { filter: filter?, format: format? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: Setting = Setting::new("GATEWAY_LISTEN", "0.0.0.0:8080", "Where to listen");
    const KEY: Setting = Setting::secret("SENTRY_CLIENT_SECRET", "The secret");

    #[test]
    fn one_start_names_every_mistake_and_no_value() {
        let set = |variable: &str| match variable {
            "GATEWAY_LISTEN" => Some("hunter2".to_owned()),
            "SENTRY_CLIENT_SECRET" => Some("  ".to_owned()),
            _ => None,
        };
        let mut reader = Reader::new(&set);
        let listen = reader.parse(&PORT, address);
        let secret = reader.parse(&KEY, |text| Ok(text.to_owned()));
        let error = reader.finish(listen.zip(secret)).unwrap_err().to_string();
        assert!(error.contains("GATEWAY_LISTEN must be an IP address"), "{error}");
        assert!(error.contains("SENTRY_CLIENT_SECRET is not set"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn defaults_hold_where_nothing_is_set() {
        let unset = |_: &str| None;
        let mut reader = Reader::new(&unset);
        assert_eq!(reader.parse(&PORT, address), Some("0.0.0.0:8080".parse().unwrap()));
    }

    #[test]
    fn sizes_and_times_read_as_people_write_them() {
        assert_eq!(size("8MiB"), Ok(8 << 20));
        assert_eq!(size("10 GiB"), Ok(10 << 30));
        assert_eq!(size("9MB"), Ok(9_000_000));
        assert_eq!(size("1024"), Ok(1024));
        assert_eq!(duration("25s"), Ok(Duration::from_secs(25)));
        assert_eq!(duration("5 min"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
        assert_eq!(duration("900ms"), Ok(Duration::from_millis(900)));
        for bad in ["", "0", "-1", "x", "5 parsecs"] {
            assert!(size(bad).is_err() && duration(bad).is_err(), "{bad}");
        }
        // A moment so far away cannot be computed.
        for too_long in ["18446744073709551615", "100000000000y", "102y"] {
            assert!(duration(too_long).is_err(), "{too_long}");
        }
        assert!(duration("100y").is_ok());
    }

    #[test]
    fn a_flag_drops_the_programs_own_prefix() {
        assert_eq!(PORT.flag("gateway"), "listen");
        assert_eq!(PORT.flag("worker"), "gateway-listen");
        let command = command(Command::new("gateway"), &[&[PORT, KEY]]);
        let matches = command.clone().try_get_matches_from(["gateway", "--listen", "1.2.3.4:5"]).unwrap();
        assert_eq!(flags_then_environment(&matches)("GATEWAY_LISTEN").as_deref(), Some("1.2.3.4:5"));
        assert!(command.try_get_matches_from(["gateway", "--sentry-client-secret", "x"]).is_err());
    }
}
