//! `DATABASE_URL`: where the database is, how to log in, how the connection is encrypted.
//!
//! tokio-postgres reads it, but for the parameters of TLS, of which it knows too few. Those are taken out here and mean
//! what they mean to libpq (see [`super::tls`]), in both forms that libpq takes
//! (<https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING>).

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use shared::settings::Setting;
use shared::tls;
use tokio_postgres::Config;
use tokio_postgres::config::Host;

use super::tls::{Parameter, Security};

/// How the connection is encrypted, where `DATABASE_URL` has no `sslmode`.
const PGSSLMODE: Setting = Setting::bare(
    "PGSSLMODE",
    "disable, allow, prefer (the default), require, verify-ca or verify-full, where DATABASE_URL has no sslmode",
);
/// Whom to trust.
const PGSSLROOTCERT: Setting = Setting::bare(
    "PGSSLROOTCERT",
    "CA certificates (PEM) that may sign PostgreSQL's certificate, or system, where DATABASE_URL has no sslrootcert",
);
/// Our own certificate.
const PGSSLCERT: Setting =
    Setting::bare("PGSSLCERT", "The client certificate (PEM) to show to PostgreSQL, where DATABASE_URL has no sslcert");
/// Its key.
const PGSSLKEY: Setting =
    Setting::bare("PGSSLKEY", "The private key (PEM) of that certificate, where DATABASE_URL has no sslkey");

/// The settings of TLS, libpq's variables.
pub const TLS_SETTINGS: [Setting; 4] = [PGSSLMODE, PGSSLROOTCERT, PGSSLCERT, PGSSLKEY];

/// What is taken out of the URL, and the variable that stands in for each.
const PARAMETERS: [(&str, Option<&str>); 5] = [
    ("sslmode", Some(PGSSLMODE.variable)),
    ("sslrootcert", Some(PGSSLROOTCERT.variable)),
    ("sslcert", Some(PGSSLCERT.variable)),
    ("sslkey", Some(PGSSLKEY.variable)),
    ("sslnegotiation", None),
];

/// libpq's parameters of TLS that would change nothing if they were ignored but what somebody relies on.
const REFUSED: [&str; 9] = [
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslkeylogfile",
    "sslpassword",
    "sslsni",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
];

/// Where the database is and how to log in. Shows itself without the password.
#[derive(Clone)]
pub struct DatabaseUrl {
    /// Everything but hosts and TLS.
    config: Config,
    hosts: Vec<Server>,
    pub(super) security: Security,
}

/// One of the servers that may have the database.
#[derive(Debug, Clone)]
pub(super) struct Server {
    /// What it is called, which its certificate is checked against.
    pub(super) host: Host,
    /// Where it is, when that need not be looked up.
    hostaddr: Option<IpAddr>,
    port: u16,
}

/// `DATABASE_URL` (or one of [`TLS_SETTINGS`]) cannot be used. Says nothing of a value: there may be a password in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadDatabaseUrl {
    /// Neither of the two forms.
    #[error(
        "DATABASE_URL must be a PostgreSQL connection string: postgres://USER:PASSWORD@HOST:PORT/DATABASE \
         (percent-encode special characters of the password) or `host=... port=... user=... password=... dbname=...`"
    )]
    Syntax,
    /// Well formed, but leads nowhere.
    #[error("DATABASE_URL must name a host: postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
    NoHost,
    /// A parameter of libpq's that this program does not have.
    #[error("DATABASE_URL must be without {0}, which this program does not have")]
    Refused(&'static str),
    /// What is wrong with TLS, mistake by mistake.
    #[error("{}", .0.join("; "))]
    Tls(Vec<String>),
}

impl BadDatabaseUrl {
    /// Each mistake as a sentence that names the setting.
    pub fn mistakes(self) -> Vec<String> {
        match self {
            BadDatabaseUrl::Tls(mistakes) => mistakes,
            BadDatabaseUrl::Syntax | BadDatabaseUrl::NoHost | BadDatabaseUrl::Refused(_) => vec![self.to_string()],
        }
    }
}

impl DatabaseUrl {
    /// The role that logs in, where it is named.
    pub fn user(&self) -> Option<&str> {
        self.config.get_user()
    }

    /// The database: that of the role's name, where none is named.
    pub(crate) fn name(&self) -> &str {
        self.config.get_dbname().or(self.user()).unwrap_or("postgres")
    }

    /// Reads `DATABASE_URL`; what it does not say of TLS, `variable` does, which gives the value of one of
    /// [`TLS_SETTINGS`].
    ///
    /// # Errors
    /// Every mistake, and no value.
    pub fn read(url: &str, variable: impl Fn(&str) -> Option<String>) -> Result<DatabaseUrl, BadDatabaseUrl> {
        let (rest, taken) = take_out(url).ok_or(BadDatabaseUrl::Syntax)?;
        if let Some(refused) = REFUSED.iter().find(|refused| taken.iter().any(|(key, _)| key == *refused)) {
            return Err(BadDatabaseUrl::Refused(refused));
        }
        let whole: Config = rest.parse().map_err(|_| BadDatabaseUrl::Syntax)?;
        let hosts = servers(&whole)?;
        let parameter = |wanted: &str| {
            // The last one wins, as in libpq.
            let given = taken.iter().rev().find(|(key, value)| key == wanted && !value.is_empty());
            let given = given.map(|(key, value)| (format!("{key} in DATABASE_URL"), value.clone()));
            given.or_else(|| {
                let name = PARAMETERS.iter().find(|(key, _)| *key == wanted)?.1?;
                Some((name.to_owned(), variable(name)?))
            })
        };
        let parameter = |wanted: &str| parameter(wanted).map(|(name, value)| Parameter { name, value });
        let security = Security::read(parameter).map_err(BadDatabaseUrl::Tls)?;
        if security.checks_names() && hosts.iter().any(Server::is_nameless) {
            let mistake =
                "DATABASE_URL must name a host where sslmode is verify-full: an address in hostaddr alone is none";
            return Err(BadDatabaseUrl::Tls(vec![mistake.into()]));
        }
        Ok(DatabaseUrl { config: without_hosts(&whole), hosts, security })
    }

    /// Everything but hosts and TLS.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// The servers, in the order in which they are named.
    pub(super) fn servers(&self) -> &[Server] {
        &self.hosts
    }
}

impl FromStr for DatabaseUrl {
    type Err = BadDatabaseUrl;

    /// [`DatabaseUrl::read`] without variables.
    fn from_str(url: &str) -> Result<DatabaseUrl, BadDatabaseUrl> {
        DatabaseUrl::read(url, |_| None)
    }
}

impl Server {
    /// `config` for this server alone.
    pub(super) fn configure(&self, config: &Config) -> Config {
        let mut config = config.clone();
        match &self.host {
            Host::Tcp(name) => config.host(name),
            #[cfg(unix)]
            Host::Unix(folder) => config.host_path(folder),
        };
        if let Some(address) = self.hostaddr {
            config.hostaddr(address);
        }
        config.port(self.port);
        config
    }

    /// Whether it is reached through a file: never encrypted, whatever `sslmode` says
    /// (<https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-SSLMODE>).
    pub(super) fn is_local(&self) -> bool {
        !matches!(self.host, Host::Tcp(_))
    }

    /// `true`: bytes that are sent to it leave this machine. A name is not looked up (see [`tls::is_loopback`]).
    pub(super) fn is_remote(&self) -> bool {
        match (&self.hostaddr, &self.host) {
            (Some(address), Host::Tcp(_)) => !address.to_canonical().is_loopback(),
            (None, Host::Tcp(name)) => !tls::is_loopback(name),
            #[cfg(unix)]
            (_, Host::Unix(_)) => false,
        }
    }

    /// Whether an address in `hostaddr` is all that there is.
    fn is_nameless(&self) -> bool {
        self.hostaddr.is_some_and(|address| matches!(&self.host, Host::Tcp(name) if *name == address.to_string()))
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Tcp(name) => write!(f, "{name}:{}", self.port),
            #[cfg(unix)]
            Host::Unix(folder) => write!(f, "{}:{}", folder.display(), self.port),
        }
    }
}

impl fmt::Display for DatabaseUrl {
    /// `host:port/database`, hosts separated by commas.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, host) in self.hosts.iter().enumerate() {
            write!(f, "{}{host}", if index > 0 { "," } else { "" })?;
        }
        write!(f, "/{}", self.config.get_dbname().unwrap_or_default())
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Pairs hosts, addresses and ports as libpq does: no port is 5432, one port is every host's.
fn servers(config: &Config) -> Result<Vec<Server>, BadDatabaseUrl> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    let fits = |len: usize| len == 0 || len == count;
    if !fits(hosts.len()) || !fits(addresses.len()) || !(fits(ports.len()) || ports.len() == 1) {
        return Err(BadDatabaseUrl::Syntax);
    }
    let server = |index: usize| {
        let hostaddr = addresses.get(index).copied();
        let host = hosts.get(index).cloned().or_else(|| Some(Host::Tcp(hostaddr?.to_string())))?;
        // `host=` with nothing behind it.
        let named = !matches!(&host, Host::Tcp(name) if name.is_empty());
        let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
        named.then_some(Server { host, hostaddr, port })
    };
    let servers = (0..count).map(server).collect::<Option<Vec<_>>>().unwrap_or_default();
    if servers.is_empty() { Err(BadDatabaseUrl::NoHost) } else { Ok(servers) }
}

/// What the pool does not set itself; it has its own time limits, application name and choice of hosts.
fn without_hosts(whole: &Config) -> Config {
    let mut config = Config::new();
    if let Some(user) = whole.get_user() {
        config.user(user);
    }
    if let Some(password) = whole.get_password() {
        config.password(password);
    }
    if let Some(name) = whole.get_dbname() {
        config.dbname(name);
    }
    if let Some(options) = whole.get_options() {
        config.options(options);
    }
    config.keepalives(whole.get_keepalives()).channel_binding(whole.get_channel_binding());
    config
}

/// A parameter and its value, decoded.
type Taken = Vec<(String, String)>;

/// Takes the parameters of TLS out of a connection string. None where its parameters cannot be told apart.
fn take_out(url: &str) -> Option<(String, Taken)> {
    let is_url = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
    if is_url { take_out_of_url(url) } else { take_out_of_pairs(url) }
}

fn is_taken(key: &str) -> bool {
    PARAMETERS.iter().any(|(name, _)| *name == key) || REFUSED.contains(&key)
}

/// From `postgres://...?sslmode=require&...`, divided as tokio-postgres divides it: user and password end at the first
/// `@`, parameters begin at the first `?` behind it.
fn take_out_of_url(url: &str) -> Option<(String, Taken)> {
    let login = url.find('@').map_or(0, |at| at + 1);
    let Some(question) = url[login..].find('?').map(|at| at + login) else { return Some((url.to_owned(), vec![])) };
    let (mut left, mut taken) = (Vec::new(), Vec::new());
    for pair in url[question + 1..].split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=')?;
        let decoded = |text| percent_decode_str(text).decode_utf8().ok().map(Cow::into_owned);
        match decoded(key)?.as_str() {
            // JDBC's word for it, which libpq takes in a URL.
            "ssl" if value == "true" => taken.push(("sslmode".to_owned(), "require".to_owned())),
            key if is_taken(key) => taken.push((key.to_owned(), decoded(value)?)),
            _ => left.push(pair),
        }
    }
    let rest = if left.is_empty() { String::new() } else { format!("?{}", left.join("&")) };
    Some((format!("{}{rest}", &url[..question]), taken))
}

/// From `host=... sslmode=require ...`: values may stand in single quotes, and a backslash makes the next character
/// itself.
fn take_out_of_pairs(text: &str) -> Option<(String, Taken)> {
    let (mut left, mut taken) = (String::new(), Vec::new());
    let mut remaining = text.trim_start();
    while !remaining.is_empty() {
        let (key, behind) = remaining.split_once('=')?;
        let key = key.trim_end();
        let behind = behind.trim_start();
        let (value, length) = pair_value(behind)?;
        let whole = &remaining[..remaining.len() - behind.len() + length];
        if is_taken(key) {
            taken.push((key.to_owned(), value));
        } else {
            left.push_str(whole);
            left.push(' ');
        }
        remaining = behind[length..].trim_start();
    }
    Some((left, taken))
}

/// The value at the beginning of `text`, and how many bytes it takes there.
fn pair_value(text: &str) -> Option<(String, usize)> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut characters = text.char_indices().skip(usize::from(quoted));
    while let Some((at, character)) = characters.next() {
        match character {
            '\'' if quoted => return Some((value, at + 1)),
            '\\' => value.push(characters.next()?.1),
            space if !quoted && space.is_whitespace() => return Some((value, at)),
            other => value.push(other),
        }
    }
    (!quoted).then_some((value, text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        for url in [
            "postgres://loop:hunter2@db.example:5433/loop",
            "host=db.example port=5433 user=loop password=hunter2 dbname=loop",
        ] {
            let url: DatabaseUrl = url.parse().unwrap();
            assert_eq!(format!("{url} {url:?}"), "db.example:5433/loop db.example:5433/loop");
        }
        for url in ["postgres://loop:hun ter2=@[db/", "host=db password=hunter2 hunter2=x", "hunter2", "a=\\"] {
            let err = url.parse::<DatabaseUrl>().unwrap_err();
            assert!(!format!("{err} {err:?}").contains("ter2"), "{err:?}");
        }
    }

    #[test]
    fn every_host_is_shown_with_its_port() {
        let shown = |url: &str| url.parse::<DatabaseUrl>().map(|url| url.to_string());
        assert_eq!(shown("postgres://loop@a,b:5433/x").unwrap(), "a:5432,b:5433/x");
        assert_eq!(shown("host=a,b port=5433 dbname=x").unwrap(), "a:5433,b:5433/x");
        assert_eq!(shown("host=/run/pg dbname=x").unwrap(), "/run/pg:5432/x");
        assert_eq!(shown("hostaddr=::1 dbname=x").unwrap(), "::1:5432/x");
        assert_eq!(shown("postgres:///x"), Err(BadDatabaseUrl::NoHost));
        assert_eq!(shown("host=a,b hostaddr=::1 dbname=x"), Err(BadDatabaseUrl::Syntax));
    }

    #[test]
    fn what_concerns_tls_is_taken_out_in_both_forms() {
        let taken = |url: &str| take_out(url).unwrap();
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            taken(
                "postgres://u:p%3F@h/d?connect_timeout=3&sslmode=verify-full&sslrootcert=%2Fa%20b.pem&options=-c%20x"
            ),
            (
                "postgres://u:p%3F@h/d?connect_timeout=3&options=-c%20x".to_owned(),
                vec![pair("sslmode", "verify-full"), pair("sslrootcert", "/a b.pem")]
            )
        );
        assert_eq!(taken("postgres://u:p?sslmode=x@h/d").1, vec![], "that is the password");
        assert_eq!(taken("postgres://h/d?ssl=true").1, vec![pair("sslmode", "require")]);
        assert_eq!(
            taken("host=h password='it\\'s sslmode=no' sslmode = require sslrootcert='/a b.pem' dbname=d"),
            (
                "host=h password='it\\'s sslmode=no' dbname=d ".to_owned(),
                vec![pair("sslmode", "require"), pair("sslrootcert", "/a b.pem")]
            )
        );
    }

    #[test]
    fn libpqs_parameters_that_are_not_there_are_refused_by_name() {
        let refused = "postgres://h/d?sslcrl=/hunter2".parse::<DatabaseUrl>().unwrap_err().to_string();
        assert!(refused.contains("sslcrl") && !refused.contains("hunter2"), "{refused}");
        let direct = "host=h sslmode=require sslnegotiation=direct".parse::<DatabaseUrl>().unwrap_err().to_string();
        assert!(direct.contains("sslnegotiation"), "{direct}");
    }

    #[test]
    fn what_leaves_this_machine_is_told_from_what_does_not() {
        let remote = |url: &str| url.parse::<DatabaseUrl>().unwrap().servers()[0].is_remote();
        for here in ["host=/run/pg", "host=localhost", "host=127.0.0.1", "host=::1", "host=db hostaddr=127.0.0.2"] {
            assert!(!remote(here), "{here}");
        }
        for elsewhere in ["host=db", "host=192.0.2.1", "host=localhost.example", "host=localhost hostaddr=192.0.2.1"] {
            assert!(remote(elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn verify_full_needs_a_name_to_verify() {
        let read = |url: &str| DatabaseUrl::read(url, |_| None).map(drop);
        assert!(
            read("hostaddr=127.0.0.1 sslmode=verify-full sslrootcert=system").unwrap_err().to_string().contains("host")
        );
        assert_eq!(read("hostaddr=127.0.0.1 sslmode=require"), Ok(()));
    }
}
