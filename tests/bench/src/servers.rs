//! Servers to be measured: each a process of its own, with a folder of its own that is gone when it is dropped.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use local::process::Process;
use local::{NatsOptions, NatsServer, Postgres, PostgresOptions, Scratch, ports};
use nix::sys::signal::Signal;
use world::{Post, SECRET};

use crate::database::connect;
use crate::programs::Built;

/// How long anything may take that is not the measurement itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// Something that takes deliveries, or stores them.
#[derive(Debug)]
pub(crate) struct Server {
    process: Process,
    /// Where it takes deliveries; 0 where it takes none.
    pub(crate) port: u16,
    ops_port: u16,
    // Last: what runs above writes into it until it is dropped.
    _folder: Scratch,
}

impl Server {
    /// The gateway, publishing to `nats_url`, with its settings' defaults but for `settings`.
    pub(crate) async fn gateway(built: &Built, nats_url: &str, settings: &[(&str, &str)]) -> anyhow::Result<Server> {
        let folder = Scratch::new("bench-gateway")?;
        let (port, ops_port) = (ports::free()?, ports::free()?);
        let mut command = Command::new(&built.gateway);
        command.env_clear().env("NATS_URL", nats_url).env("SENTRY_CLIENT_SECRET", SECRET);
        command.env("GATEWAY_LISTEN", format!("127.0.0.1:{port}"));
        command.env("GATEWAY_OPS_LISTEN", format!("127.0.0.1:{ops_port}"));
        command.env("GATEWAY_JOURNAL_DIR", folder.path().join("journal"));
        command.envs(settings.iter().copied());
        let server = Server::spawn("gateway", command, (port, ops_port), folder)?;
        server.ready().await?;
        Ok(server)
    }

    /// A worker, with its settings' defaults but for `settings`. Does not wait: it begins to work as soon as it can.
    pub(crate) fn worker(
        built: &Built,
        nats_url: &str,
        database_url: &str,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Server> {
        let ops_port = ports::free()?;
        let mut command = worker_command(built, nats_url, database_url);
        command.env("WORKER_OPS_LISTEN", format!("127.0.0.1:{ops_port}")).envs(settings.iter().copied());
        Server::spawn("worker", command, (0, ops_port), Scratch::new("bench-worker")?)
    }

    /// A bare hyper server; see [`crate::baselines::bare_hyper`].
    pub(crate) async fn bare_hyper(built: &Built, verify: bool) -> anyhow::Result<Server> {
        let port = ports::free()?;
        let mut command = Command::new(&built.bench);
        command.args(["serve-bare-hyper", "--port", &port.to_string()]);
        if verify {
            command.arg("--verify");
        }
        let server = Server::spawn("bare-hyper", command, (port, 0), Scratch::new("bench-bare-hyper")?)?;
        server.listens().await?;
        Ok(server)
    }

    /// A gateway that answers when JetStream has acknowledged; see [`crate::baselines::minimal_gateway`].
    pub(crate) async fn minimal_gateway(built: &Built, nats_url: &str) -> anyhow::Result<Server> {
        let port = ports::free()?;
        let mut command = Command::new(&built.bench);
        command.args(["serve-minimal-gateway", "--port", &port.to_string(), "--nats", nats_url]);
        let server = Server::spawn("minimal-gateway", command, (port, 0), Scratch::new("bench-minimal-gateway")?)?;
        server.listens().await?;
        Ok(server)
    }

    /// Any other program that takes deliveries at `port`, once it does.
    pub(crate) async fn other(name: &str, command: Command, port: u16) -> anyhow::Result<Server> {
        let server = Server::spawn(name, command, (port, 0), Scratch::new("bench-other")?)?;
        server.listens().await?;
        Ok(server)
    }

    fn spawn(name: &str, command: Command, ports: (u16, u16), folder: Scratch) -> anyhow::Result<Server> {
        let process = Process::spawn(name, command, &folder.path().join("log"), Signal::SIGKILL)?;
        let (port, ops_port) = ports;
        Ok(Server { process, port, ops_port, _folder: folder })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits until `/readyz` says 200.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        self.until("ready", async || Ok(self.ops("/readyz").await.is_some_and(|(status, _)| status == 200))).await
    }

    async fn listens(&self) -> anyhow::Result<()> {
        let address = ("127.0.0.1", self.port);
        self.until("listening", async || Ok(tokio::net::TcpStream::connect(address).await.is_ok())).await
    }

    /// Waits until something is so, as long as the server lives.
    pub(crate) async fn until(&self, what: &str, holds: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
        self.until_within(PATIENCE, what, holds).await
    }

    /// The same, for what takes longer.
    pub(crate) async fn until_within(
        &self,
        patience: Duration,
        what: &str,
        holds: impl AsyncFn() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let begin = Instant::now();
        while !holds().await? {
            ensure!(self.process.is_alive(), "it ended before it was {what}: {}", self.process.last_words());
            if begin.elapsed() > patience {
                bail!("it was not {what} within {patience:?}: {}", self.process.last_words());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn ops(&self, path: &str) -> Option<(u16, String)> {
        let answer = Post::get(path).try_send(self.ops_port).await.ok()?;
        Some((answer.status, String::from_utf8_lossy(&answer.body).into_owned()))
    }

    /// A metric by its name and labels, as they stand in `/metrics`.
    pub(crate) async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let (_, text) = self.ops("/metrics").await.context("the ops listener does not answer")?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.with_context(|| format!("no metric {name}"))
    }

    /// Entries of a gateway's journal that are not published yet.
    pub(crate) async fn backlog(&self) -> anyhow::Result<f64> {
        self.metric(r#"gateway_journal_entries{state="journalled"}"#).await
    }
}

/// The worker's program, to be run as a server or with a command of its own.
pub(crate) fn worker_command(built: &Built, nats_url: &str, database_url: &str) -> Command {
    let mut command = Command::new(&built.worker);
    command.env_clear().env("NATS_URL", nats_url).env("DATABASE_URL", database_url);
    command
}

/// A broker, and where it keeps its files.
pub(crate) struct Nats {
    pub(crate) server: NatsServer,
    _folder: Scratch,
}

impl Nats {
    /// nats-server with its own defaults; `jetstream` adds to its block of that name.
    pub(crate) async fn start(jetstream: &str) -> anyhow::Result<Nats> {
        Nats::with(|options| jetstream.clone_into(&mut options.jetstream)).await
    }

    /// The same on a given port.
    pub(crate) async fn start_at(port: u16) -> anyhow::Result<Nats> {
        Nats::with(|options| options.port = Some(port)).await
    }

    async fn with(change: impl FnOnce(&mut NatsOptions)) -> anyhow::Result<Nats> {
        let folder = Scratch::new("bench-nats")?;
        let mut options = NatsOptions::new(folder.path().join("nats"));
        change(&mut options);
        Ok(Nats { server: NatsServer::start(world::programs(), options).await?, _folder: folder })
    }

    /// Its URL.
    pub(crate) fn url(&self) -> String {
        self.server.url()
    }
}

/// Where no broker is.
pub(crate) fn no_nats() -> anyhow::Result<String> {
    Ok(format!("nats://127.0.0.1:{}", ports::free()?))
}

/// A PostgreSQL that waits for its disk, as one in earnest does, and remembers when each transaction was committed
/// (`track_commit_timestamp`), by which everything here is timed that ends in the database.
pub(crate) struct Database {
    server: Postgres,
    made: AtomicU32,
    _folder: Scratch,
}

impl Database {
    pub(crate) async fn start() -> anyhow::Result<Database> {
        let folder = Scratch::new("bench-postgres")?;
        let mut options = PostgresOptions::for_tests(folder.path().join("postgres"));
        options.durable = true;
        options.settings = [
            ("track_commit_timestamp", "on"),
            // Room for what is written here, so that a checkpoint in the middle of one run and not of the next does not
            // decide between them.
            ("max_wal_size", "8GB"),
            ("checkpoint_timeout", "30min"),
            ("shared_buffers", "512MB"),
            ("autovacuum", "off"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        let server = Postgres::start(world::programs(), options).await?;
        Ok(Database { server, made: AtomicU32::new(0), _folder: folder })
    }

    /// A name that no database in it has.
    fn name(&self) -> String {
        format!("bench_{}", self.made.fetch_add(1, Ordering::Relaxed))
    }

    /// The URL of a copy of a database, to which nobody is connected.
    pub(crate) async fn copy(&self, url: &str) -> anyhow::Result<String> {
        let (name, original) = (self.name(), url.rsplit('/').next().unwrap_or_default());
        self.execute(&format!("CREATE DATABASE {name} TEMPLATE {original}")).await?;
        Ok(self.server.url_of(&name))
    }

    /// Removes a database.
    pub(crate) async fn remove(&self, url: &str) -> anyhow::Result<()> {
        let name = url.rsplit('/').next().unwrap_or_default();
        self.execute(&format!("DROP DATABASE {name} WITH (FORCE)")).await
    }

    async fn execute(&self, sql: &str) -> anyhow::Result<()> {
        let client = connect(&self.server.url()).await?;
        client.batch_execute(sql).await.with_context(|| sql.to_owned())
    }

    /// The URL of a new database in it, which has the tables and no rows.
    pub(crate) async fn empty(&self, built: &Built) -> anyhow::Result<String> {
        let name = self.name();
        let url = self.server.create_database(&name).await?;
        let output = worker_command(built, "nats://127.0.0.1:1", &url).arg("migrate").output()?;
        ensure!(output.status.success(), "worker migrate failed: {}", String::from_utf8_lossy(&output.stderr));
        Ok(url)
    }
}
