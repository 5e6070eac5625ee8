//! A private PostgreSQL.
//!
//! Signals: <https://www.postgresql.org/docs/current/server-shutdown.html>. SIGINT is the orderly stop ("fast"),
//! SIGQUIT the one without a checkpoint ("immediate"), after which the next start recovers, as after a kill.

use std::ffi::OsString;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};
use tokio_postgres::error::SqlState;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use crate::account::{self, Account};
use crate::data_dir::write_private;
use crate::ports;
use crate::process::Process;
use crate::programs::Programs;

/// How long a start may take without a sign of life: it recovers what a kill left behind.
const START: Duration = Duration::from_secs(120);
/// How long an orderly stop may take before it becomes a kill: it writes out what is in memory.
const STOP: Duration = Duration::from_secs(30);
/// The superuser, and the only user there is.
const USER: &str = "loop";
/// The file in [`Postgres::home`] that holds the superuser's password: beside the data, as neither is of use without
/// the other.
const PASSWORD: &str = "password";

/// What one server is to be. All but `password` is read at every start, so that a change holds from the next one on.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// Where it keeps everything (data, log); made if missing. As root, see [`Postgres::start`].
    pub dir: PathBuf,
    /// Its port on 127.0.0.1; `None` for a free one, which it then keeps.
    pub port: Option<u16>,
    /// Whether the superuser has a password (made with the data, and kept beside it); without one, everybody is let in.
    pub password: bool,
    /// Whether it waits for the disk (`fsync`), so that a power cut loses nothing. Without, it survives `kill -9` only.
    pub durable: bool,
    /// How many connections it takes.
    pub max_connections: u16,
    /// Further settings (names and values of postgresql.conf); they win.
    pub settings: Vec<(String, String)>,
}

impl PostgresOptions {
    /// For tests: a free port, no password, no waiting for the disk.
    pub fn for_tests(dir: impl Into<PathBuf>) -> PostgresOptions {
        let dir = dir.into();
        PostgresOptions { dir, port: None, password: false, durable: false, max_connections: 100, settings: Vec::new() }
    }

    /// For data that stays. With a password, because 127.0.0.1 is open to every user of the machine, and PostgreSQL's
    /// superuser can run programs as the user that PostgreSQL runs as.
    pub fn lasting(dir: impl Into<PathBuf>) -> PostgresOptions {
        PostgresOptions { password: true, durable: true, ..PostgresOptions::for_tests(dir) }
    }
}

/// A running server, or one that was stopped and can be started again with the same port and data. Dropping it ends it
/// without a checkpoint.
pub struct Postgres {
    bin: PathBuf,
    /// What it is to be from the next start on.
    pub options: PostgresOptions,
    home: PathBuf,
    port: u16,
    password: Option<String>,
    process: Process,
}

impl Postgres {
    /// Starts a server, after making its data folder if there is none, and returns once it answers a query.
    ///
    /// PostgreSQL refuses to run as root; for root it runs as an unprivileged user. Where that user cannot reach
    /// [`PostgresOptions::dir`] (below /root, say), its files go to a folder of their own below
    /// `/var/lib/loop-sentry-door`; see [`Postgres::home`].
    ///
    /// # Errors
    /// When it does not start; the text has the end of its log.
    pub async fn start(programs: &Programs, mut options: PostgresOptions) -> anyhow::Result<Postgres> {
        options.dir = std::path::absolute(&options.dir)?;
        let given = options.port.is_some();
        for attempt in 1.. {
            let port = options.port.map_or_else(ports::free, Ok)?;
            let (home, account) = home(&options.dir)?;
            make_data(&programs.postgres_bin, &home, account.as_ref(), &options).await?;
            let password = if options.password { Some(read_password(&home)?) } else { None };
            let process = spawn(&programs.postgres_bin, &home, account.as_ref(), &options, port)?;
            let bin = programs.postgres_bin.clone();
            let server = Postgres { bin, options: options.clone(), home, port, password, process };
            match server.ready().await {
                Ok(()) => return Ok(server),
                // Somebody was faster; a port that nobody asked for can be another.
                Err(err) if !given && attempt < 3 && format!("{err:#}").contains("Address already in use") => {}
                Err(err) => return Err(err),
            }
        }
        unreachable!("the third attempt returns")
    }

    /// Returns once it answers a query.
    async fn ready(&self) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            // A stranger may hold the port that ours is about to find taken; only ours works on this data.
            let whose = self.query("postgres", "SHOW data_directory");
            let answer = tokio::select! {
                _ = self.process.ended() => bail!("PostgreSQL did not start: {}", self.process.last_words()),
                answer = tokio::time::timeout(Duration::from_secs(5), whose) => answer,
            };
            match answer {
                Ok(Ok(Some(folder))) if Path::new(&folder) == data(&self.home) => return Ok(()),
                Ok(Err(err)) if refuses_us(&err) => {
                    let file = self.home.join(PASSWORD);
                    bail!("PostgreSQL runs, but refuses the password in {}: {err:#}", file.display());
                }
                _ if begin.elapsed() > START => {
                    bail!("PostgreSQL did not answer within {START:?}: {}", self.process.last_words());
                }
                _ => tokio::time::sleep(Duration::from_millis(10)).await, // not yet
            }
        }
    }

    /// `postgres://...` of the database `postgres`, with the password if there is one.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// `postgres://...` of the database `name`.
    pub fn url_of(&self, name: &str) -> String {
        let password = self.password.as_ref().map(|password| format!(":{password}")).unwrap_or_default();
        format!("postgres://{USER}{password}@127.0.0.1:{}/{name}", self.port)
    }

    /// Its port; stays the same across restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where its data and log are: the folder that was asked for, unless its user cannot reach that.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The number of its main process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its main process: how it ended, its log, `freeze` and `thaw`.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Makes a database unless it exists, and gives its URL. `name`: letters, digits and `_`.
    ///
    /// # Errors
    /// When the name has other characters, or the server refuses.
    pub async fn create_database(&self, name: &str) -> anyhow::Result<String> {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            bail!("{name:?} is not usable as the name of a database: letters, digits and _ only");
        }
        match self.query("postgres", &format!("CREATE DATABASE \"{name}\"")).await {
            Err(err) if sql_state(&err) == Some(&SqlState::DUPLICATE_DATABASE) => {}
            made => drop(made.with_context(|| format!("cannot create the database {name}"))?),
        }
        Ok(self.url_of(name))
    }

    /// Stops it in order: connections are closed, everything is written out.
    ///
    /// # Errors
    /// When it did not end when asked, and was killed.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.process.end(Signal::SIGINT, STOP).await
    }

    /// `kill -9`, for all its processes.
    pub async fn kill(&self) {
        self.process.kill().await;
    }

    /// Starts it again after [`Postgres::stop`] or [`Postgres::kill`], on the same port and data.
    ///
    /// # Errors
    /// As [`Postgres::start`].
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.process.kill().await; // PostgreSQL would refuse to start twice on the same data
        let account = account::for_postgres()?;
        self.process = spawn(&self.bin, &self.home, account.as_ref(), &self.options, self.port)?;
        self.ready().await
    }

    /// Runs one statement as the superuser and gives the first column of its first row, if it has one.
    async fn query(&self, database: &str, sql: &str) -> anyhow::Result<Option<String>> {
        let mut config = tokio_postgres::Config::new();
        config.host(Ipv4Addr::LOCALHOST.to_string()).port(self.port).user(USER).dbname(database);
        if let Some(password) = &self.password {
            config.password(password);
        }
        let (client, connection) = config.connect(NoTls).await?;
        // The connection is driven here, and closed when this returns or is dropped.
        tokio::select! {
            answer = client.simple_query(sql) => Ok(answer?.iter().find_map(|message| {
                let SimpleQueryMessage::Row(row) = message else { return None };
                Some(row.get(0)?.to_owned())
            })),
            ended = connection => { ended?; bail!("PostgreSQL closed the connection") }
        }
    }
}

impl std::fmt::Debug for Postgres {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the password.
        f.debug_struct("Postgres").field("home", &self.home).field("port", &self.port).finish_non_exhaustive()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Unlike SIGKILL (which follows when `process` is dropped), this lets it give its shared memory back.
        self.process.signal(Signal::SIGQUIT);
        self.process.signal(Signal::SIGCONT);
        let patience = Instant::now() + Duration::from_secs(5);
        while self.process.is_alive() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn sql_state(err: &anyhow::Error) -> Option<&SqlState> {
    err.downcast_ref::<tokio_postgres::Error>()?.code()
}

fn refuses_us(err: &anyhow::Error) -> bool {
    sql_state(err).is_some_and(|code| *code == SqlState::INVALID_PASSWORD)
}

/// The data folder within [`Postgres::home`]. It is on the server's command line, by which a leftover server is known.
pub(crate) fn data(home: &Path) -> PathBuf {
    home.join("data")
}

/// Where PostgreSQL's files go when `dir` was asked for, and whom it must run as (`None`: as we do).
pub(crate) fn home(dir: &Path) -> anyhow::Result<(PathBuf, Option<Account>)> {
    let Some(account) = account::for_postgres()? else {
        return Ok((dir.to_path_buf(), None));
    };
    if account.barred_by(dir).is_none() {
        return Ok((dir.to_path_buf(), Some(account)));
    }
    // Named after the folder that was asked for, so that the next start finds it again.
    let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    let home = Path::new("/var/lib/loop-sentry-door").join(hex::encode(&digest[..8]));
    if let Some(barrier) = account.barred_by(&home) {
        bail!(
            "PostgreSQL refuses to run as root, and the user {} may enter neither {} nor {}",
            account.name,
            dir.display(),
            barrier.display()
        );
    }
    Ok((home, Some(account)))
}

/// `initdb`, unless there is data. Made beside its place and renamed, so that one cut short is not taken for whole.
async fn make_data(
    bin: &Path,
    home: &Path,
    account: Option<&Account>,
    options: &PostgresOptions,
) -> anyhow::Result<()> {
    let data = data(home);
    if data.is_dir() {
        return Ok(());
    }
    let at = || format!("cannot make PostgreSQL's data in {}", home.display());
    if let Some(barrier) = account.and_then(|account| account.barred_by(bin)) {
        let who = account.map_or("", |account| &account.name);
        bail!("PostgreSQL must run as the user {who}, who may not enter {}", barrier.display());
    }
    account::make_passable(home).with_context(at)?;
    let part = home.join("data.part");
    if part.exists() {
        fs::remove_dir_all(&part).with_context(at)?;
    }
    fs::create_dir(&part).with_context(at)?;
    let password = home.join(PASSWORD);
    let mut command = Command::new(bin.join("initdb"));
    // Text sorts and folds by Unicode's rules, without the system's locales where the version can (17 up).
    let locale: &[&str] = match major_version(bin)? {
        17.. => &["--locale-provider=builtin", "--locale=C.UTF-8"],
        _ => &["--no-locale"],
    };
    command.arg("--pgdata").arg(&part).args(["--username", USER, "--encoding=UTF8"]).args(locale);
    if options.password {
        // Two UUIDs of version 4: 244 bits from the system's random generator.
        let secret = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        write_private(&password, &secret).with_context(at)?;
        command.arg("--auth=scram-sha-256").arg("--pwfile").arg(&password);
    } else {
        command.arg("--auth=trust");
    }
    if !options.durable {
        command.arg("--no-sync");
    }
    if let Some(account) = account {
        account.owns(&part).with_context(at)?;
        if options.password {
            account.owns(&password).with_context(at)?;
        }
    }
    run(command, account).await.with_context(at)?;
    fs::rename(&part, &data).with_context(at)
}

/// Runs a program of PostgreSQL to its end.
async fn run(mut command: Command, account: Option<&Account>) -> anyhow::Result<()> {
    settle(&mut command, account);
    command.stdin(Stdio::null());
    let name = PathBuf::from(command.get_program());
    let mut command = tokio::process::Command::from(command);
    let output = command.kill_on_drop(true).output().await.with_context(|| format!("cannot run {}", name.display()))?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{} failed ({}): {}", name.display(), output.status, String::from_utf8_lossy(&output.stderr).trim())
}

/// What every program of PostgreSQL needs to run alike anywhere.
fn settle(command: &mut Command, account: Option<&Account>) {
    // PGDATA, PGPORT and their like are meant for a person's own server.
    let theirs = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with("PG"));
    std::env::vars_os().map(|(name, _)| name).filter(theirs).for_each(|name| {
        command.env_remove(name);
    });
    // Messages in English, because they are looked into; and on macOS the server refuses to start without a locale.
    command.env("LC_ALL", "C").current_dir("/");
    if let Some(account) = account {
        account.runs(command);
    }
}

fn major_version(bin: &Path) -> anyhow::Result<u32> {
    let postgres = bin.join("postgres");
    let output = Command::new(&postgres).arg("--version").stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {}", postgres.display()))?;
    let text = String::from_utf8_lossy(&output.stdout); // postgres (PostgreSQL) 18.6
    let version =
        text.split_whitespace().nth(2).and_then(|version| version.split(|c: char| !c.is_ascii_digit()).next());
    version.and_then(|major| major.parse().ok()).with_context(|| {
        format!(
            "{} --version says no version: {text:?} {:?}",
            postgres.display(),
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

fn spawn(
    bin: &Path,
    home: &Path,
    account: Option<&Account>,
    options: &PostgresOptions,
    port: u16,
) -> anyhow::Result<Process> {
    let data = data(home);
    let config = home.join("postgresql.conf");
    let at = || format!("cannot write {}", config.display());
    fs::write(&config, configuration(options, port)).with_context(at)?;
    fs::set_permissions(&config, fs::Permissions::from_mode(0o644)).with_context(at)?; // its user reads it
    let mut command = Command::new(bin.join("postgres"));
    let mut config_file = OsString::from("config_file=");
    config_file.push(&config);
    command.arg("-D").arg(&data).arg("-c").arg(config_file);
    settle(&mut command, account);
    Process::spawn("PostgreSQL", command, &home.join("postgresql.log"), Signal::SIGINT)
}

/// <https://www.postgresql.org/docs/current/runtime-config.html>
fn configuration(options: &PostgresOptions, port: u16) -> String {
    let switch = |on| if on { "on" } else { "off" };
    let connections = options.max_connections.to_string();
    let ours = [
        ("listen_addresses", "127.0.0.1"),
        ("port", &port.to_string()),
        ("unix_socket_directories", ""), // the path of a socket may not be longer than 107 bytes; ours may
        ("max_connections", &connections),
        ("fsync", switch(options.durable)),
        ("full_page_writes", switch(options.durable)),
        ("dynamic_shared_memory_type", "mmap"), // goes with the data, and /dev/shm is tiny in containers
        ("timezone", "UTC"),
        ("log_timezone", "UTC"),
        ("log_line_prefix", "%m [%p] "),
    ];
    let theirs = options.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let line =
        |(name, value): (&str, &str)| format!("{name} = '{}'\n", value.replace('\\', "\\\\").replace('\'', "''"));
    let lines: String = ours.into_iter().chain(theirs).map(line).collect();
    format!("# Written anew at each start: changes here are lost.\n{lines}")
}

fn read_password(home: &Path) -> anyhow::Result<String> {
    let file = home.join(PASSWORD);
    let missing = || {
        format!(
            "cannot read {}, which holds the password of the data beside it; without it that data is lost",
            file.display()
        )
    };
    fs::read_to_string(&file).with_context(missing)
}
