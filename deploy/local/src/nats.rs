//! A private nats-server with JetStream.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;

use crate::account;
use crate::data_dir::write_private;
use crate::ports;
use crate::process::Process;
use crate::programs::Programs;

/// How long a start may take: it reads back what JetStream has stored.
const START: Duration = Duration::from_secs(60);
/// How long an orderly stop may take before it becomes a kill.
const STOP: Duration = Duration::from_secs(10);

/// What one server is to be. Read at every start, so that a change holds from the next one on.
#[derive(Debug, Clone)]
pub struct NatsOptions {
    /// Where it keeps everything (configuration, log, JetStream's files); made if missing.
    pub dir: PathBuf,
    /// Its port on 127.0.0.1; `None` for a free one, which it then keeps.
    pub port: Option<u16>,
    /// Whether it serves its monitoring pages (`/healthz`, `/jsz`) over HTTP.
    pub monitor: bool,
    /// The largest message it takes; `None` for the 9 MB that the gateway's body limit needs.
    pub max_payload: Option<String>,
    /// The login that every client needs. Without one, every client that reaches the port is let in.
    pub login: Option<Login>,
    /// Further lines of its configuration's `jetstream` block, such as `sync_interval: always`.
    pub jetstream: String,
    /// Further lines of its configuration, such as a `cluster` block. (Not `log_file`: its log is read here.)
    pub extra: String,
}

impl NatsOptions {
    /// A single server on a free port that keeps its things in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> NatsOptions {
        let (jetstream, extra) = (String::new(), String::new());
        NatsOptions { dir: dir.into(), port: None, monitor: false, max_payload: None, login: None, jetstream, extra }
    }
}

/// A user and its password: letters and digits, so that they stand in a URL as they are.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user.
    pub user: String,
    /// The password. Never shown.
    pub password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login({}, password not shown)", self.user)
    }
}

/// A running server, or one that was stopped and can be started again with the same port and data. Dropping kills it.
#[derive(Debug)]
pub struct NatsServer {
    program: PathBuf,
    /// What it is to be from the next start on.
    pub options: NatsOptions,
    port: u16,
    monitor_port: u16,
    process: Process,
}

impl NatsServer {
    /// Starts a server and returns once it takes connections and JetStream is ready.
    ///
    /// # Errors
    /// When it does not; the text has the end of its log.
    pub async fn start(programs: &Programs, options: NatsOptions) -> anyhow::Result<NatsServer> {
        let given = options.port.is_some();
        for attempt in 1.. {
            let server = NatsServer::launch(programs, options.clone())?;
            match server.ready().await {
                Ok(()) => return Ok(server),
                // Somebody was faster; a port that nobody asked for can be another.
                Err(err) if !given && attempt < 3 && format!("{err:#}").contains("address already in use") => {}
                Err(err) => return Err(err),
            }
        }
        unreachable!("the third attempt returns")
    }

    /// Starts a server without waiting, for clusters: a member may wait for the others. See [`NatsServer::ready`].
    ///
    /// # Errors
    /// When its files cannot be written or the program not be started.
    pub fn launch(programs: &Programs, mut options: NatsOptions) -> anyhow::Result<NatsServer> {
        options.dir = std::path::absolute(&options.dir)?;
        let port = options.port.map_or_else(ports::free, Ok)?;
        let monitor_port = ports::free()?;
        let process = spawn(&programs.nats_server, &options, port, monitor_port)?;
        Ok(NatsServer { program: programs.nats_server.clone(), options, port, monitor_port, process })
    }

    /// Returns once it takes connections and JetStream is on: the server sends `INFO {... "jetstream":true ...}` to
    /// whoever connects (<https://docs.nats.io/reference/reference-protocols/nats-protocol>), and listens only after
    /// JetStream has read its files back. (In a cluster, JetStream answers once the members have elected a leader.)
    ///
    /// # Errors
    /// When it ends or a minute passes before; the text has the end of its log.
    pub async fn ready(&self) -> anyhow::Result<()> {
        let answers = async {
            while !self.answers_with_jetstream().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            _ = self.process.ended() => bail!("nats-server did not start: {}", self.process.last_words()),
            answered = tokio::time::timeout(START, answers) => {
                answered.map_err(|_| anyhow!("nats-server was not ready in {START:?}: {}", self.process.last_words()))
            }
        }
    }

    async fn answers_with_jetstream(&self) -> bool {
        let info = async {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.ok()?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).await.ok()?;
            serde_json::from_str::<serde_json::Value>(line.strip_prefix("INFO ")?).ok()
        };
        let Some(info) = tokio::time::timeout(Duration::from_secs(1), info).await.ok().flatten() else { return false };
        // A stranger may hold the port that ours is about to find taken; our log names our id.
        let ours = info["server_id"].as_str().is_some_and(|id| self.process.said(id));
        ours && info["jetstream"] == true
    }

    /// `nats://127.0.0.1:<port>`, with the login where there is one.
    pub fn url(&self) -> String {
        let login = self.options.login.as_ref().map(|Login { user, password }| format!("{user}:{password}@"));
        format!("nats://{}127.0.0.1:{}", login.unwrap_or_default(), self.port)
    }

    /// Its port; stays the same across restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `http://127.0.0.1:<port>` of its monitoring pages; nothing is there unless [`NatsOptions::monitor`] is set.
    pub fn monitor_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.monitor_port)
    }

    /// The number of its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its process: how it ended, its log, `freeze` and `thaw`.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Stops it in order.
    ///
    /// # Errors
    /// When it did not end when asked, and was killed.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.process.end(Signal::SIGTERM, STOP).await
    }

    /// `kill -9`
    pub async fn kill(&self) {
        self.process.kill().await;
    }

    /// Starts it again after [`NatsServer::stop`] or [`NatsServer::kill`], on the same port and data.
    ///
    /// # Errors
    /// As [`NatsServer::start`].
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.launch_again().await?;
        self.ready().await
    }

    /// [`NatsServer::start_again`] without waiting until it is ready.
    ///
    /// # Errors
    /// As [`NatsServer::launch`].
    pub async fn launch_again(&mut self) -> anyhow::Result<()> {
        self.process.kill().await; // two servers on the same files would ruin them
        self.process = spawn(&self.program, &self.options, self.port, self.monitor_port)?;
        Ok(())
    }
}

/// The file that names the data folder on the server's command line, by which a leftover server is known.
pub(crate) fn config_file(dir: &Path) -> PathBuf {
    dir.join("nats.conf")
}

fn spawn(program: &Path, options: &NatsOptions, port: u16, monitor_port: u16) -> anyhow::Result<Process> {
    let at = || format!("cannot write to {}", options.dir.display());
    account::make_passable(&options.dir).with_context(at)?;
    let config = config_file(&options.dir);
    write_private(&config, &configuration(options, port, monitor_port)).with_context(at)?;
    let mut command = Command::new(program);
    command.arg("--config").arg(&config).current_dir(&options.dir);
    Process::spawn("nats-server", command, &options.dir.join("nats-server.log"), Signal::SIGTERM)
}

/// <https://docs.nats.io/running-a-nats-service/configuration>
fn configuration(options: &NatsOptions, port: u16, monitor_port: u16) -> String {
    let store = options.dir.join("jetstream");
    let login = options.login.as_ref().map(|Login { user, password }| {
        format!("authorization {{ user: {}, password: {} }}\n", quoted(user), quoted(password))
    });
    let login = login.unwrap_or_default();
    let monitor = if options.monitor { format!("http: \"127.0.0.1:{monitor_port}\"\n") } else { String::new() };
    // 9MB: a body of 8 MiB and its headers. The store's limit: otherwise three quarters of the free disk, which on a
    // small one would refuse the stream for a size that it may never reach.
    let max_payload = options.max_payload.as_deref().unwrap_or("9MB");
    format!(
        "# Written anew at each start: changes here are lost.\n\
         listen: \"127.0.0.1:{port}\"\n{monitor}{login}\
         max_payload: {max_payload}\n\
         jetstream {{\n  store_dir: {}\n  max_file_store: 1TB\n{}\n}}\n{}\n",
        quoted(&store.to_string_lossy()),
        options.jetstream,
        options.extra,
    )
}

/// A string of NATS's configuration language.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
