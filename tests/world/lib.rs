//! World: real gateway, worker, nats-server and PostgreSQL, each world its own, on free ports and in folders that are gone
//! afterwards. Everything that is promised is tested in one of these.
//!
//! - [`World`]: what runs, and how to look at it.
//! - [`Post`]: what Sentry sends.
//! - [`eventually`]: how to wait. Nothing here sleeps for a fixed time.

#![expect(clippy::unwrap_used, reason = "a harness that panics says enough")]

mod broker;
mod disk;
mod post;
mod setup;

use std::fmt::Debug;
use std::io::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use local::process::Process;
use local::{NatsServer, Postgres, Scratch};
use nix::sys::signal::Signal;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row};

pub use broker::{RawClient, RawMessage};
pub use disk::SmallDisk;
pub use post::{Answer, Connection, Post, sign};
pub use setup::{Binaries, Setup, postgres, programs};

/// The client secret of every world.
pub const SECRET: &str = "a-client-secret-of-the-tests";

/// How long something may take before a test gives up on it. Generous: machines are slow at times, and a test that works
/// never waits this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What runs, and how to look at it. Dropping it ends and removes all of it.
pub struct World {
    /// The broker.
    pub nats: NatsServer,
    /// The other servers of the broker, where it is a cluster.
    pub other_nats: Vec<NatsServer>,
    /// The gateway.
    pub gateway: Program,
    /// The workers.
    pub workers: Vec<Program>,
    /// The worker's program, for its commands.
    command: std::process::Command,
    /// A connection to the database, for looking; none while the world has not started one.
    sql: Option<Client>,
    /// Where the database is.
    pub database_url: String,
    /// A PostgreSQL server of this world's own, where it asked for one.
    pub postgres: Option<Postgres>,
    start_gateway: Box<dyn Fn() -> Program + Send + Sync>,
    start_worker: Box<dyn Fn() -> Program + Send + Sync>,
    // Last, because what runs above writes into it until it is dropped.
    scratch: Scratch,
}

/// The gateway or a worker: a process, and how to start it again.
pub struct Program {
    name: String,
    command: Box<dyn Fn() -> std::process::Command + Send + Sync>,
    log: std::path::PathBuf,
    /// Its public port, for a gateway.
    pub port: u16,
    /// Its ops port.
    pub ops_port: u16,
    process: Process,
}

impl Program {
    /// The running process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Everything it has logged, in all its lives.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).expect("a program that was started has a log")).into_owned()
    }

    /// `kill -9`.
    pub async fn kill(&self) {
        self.process.kill().await;
    }

    /// Starts it again, with the same settings and ports, once it has ended.
    pub fn start_again(&mut self) {
        assert!(!self.process.is_alive(), "{} still runs", self.name);
        self.process = Process::spawn(&self.name, (self.command)(), &self.log, Signal::SIGKILL).unwrap();
    }

    /// SIGTERM; gives the exit code.
    pub async fn stop(&self) -> Option<i32> {
        self.process.signal(Signal::SIGTERM);
        let ended = tokio::time::timeout(PATIENCE, self.process.ended()).await;
        ended.unwrap_or_else(|_| panic!("{} did not stop", self.process.last_words())).code()
    }

    /// An answer of its ops listener, once there is one.
    pub async fn ops(&self, path: &str) -> Answer {
        eventually("an answer of the ops listener", || async { Post::get(path).try_send(self.ops_port).await.ok() })
            .await
    }

    /// A metric, by its name and labels as they are shown; none where it is not.
    pub async fn try_metric(&self, name: &str) -> Option<f64> {
        let text = String::from_utf8(self.ops("/metrics").await.body.to_vec()).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        Some(value.parse().unwrap())
    }

    /// The same, which must be there.
    pub async fn metric(&self, name: &str) -> f64 {
        self.try_metric(name).await.unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }

    /// Waits until a metric is that.
    pub async fn until_metric(&self, name: &str, expected: f64) {
        let is = || async { (self.try_metric(name).await == Some(expected)).then_some(()) };
        eventually(&format!("{} to have {name} {expected}", self.name), is).await;
    }

    /// Waits until `/readyz` says 200.
    pub async fn ready(&self) {
        let ready = async || {
            assert!(self.process.is_alive(), "{}", self.process.last_words());
            let answer = Post::get("/readyz").try_send(self.ops_port).await.ok()?;
            (answer.status == 200).then_some(())
        };
        eventually(&format!("{} to be ready", self.name), ready).await;
    }
}

impl World {
    /// What Sentry would reach.
    pub fn port(&self) -> u16 {
        self.gateway.port
    }

    /// Posts a body, signed as Sentry signs it, as an `issue`.
    pub async fn post(&self, body: impl Into<bytes::Bytes>) -> Answer {
        Post::signed(body).send(self.port()).await
    }

    /// Runs a command of the worker's, such as `["audit", "--json"]`, to its end.
    pub async fn worker(&self, arguments: &[&str]) -> Ran {
        let ran = tokio::time::timeout(PATIENCE, self.worker_command(arguments).output()).await;
        let ran =
            ran.unwrap_or_else(|_| panic!("worker {arguments:?} did not end")).expect("the worker's program runs");
        Ran::of(ran)
    }

    /// The same, not started yet. Ends when it is dropped.
    pub fn worker_command(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = std::process::Command::new(self.command.get_program());
        command.env_clear().args(arguments);
        command.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts another gateway, with a journal of its own.
    pub async fn another_gateway(&self) -> Program {
        let gateway = (self.start_gateway)();
        gateway.ready().await;
        gateway
    }

    /// Starts one more worker, and waits until it is ready.
    pub async fn start_worker(&mut self) {
        let worker = (self.start_worker)();
        worker.ready().await;
        self.workers.push(worker);
    }

    /// Runs the gateway's program with these arguments and this world's settings to its end: exit code, stdout, stderr.
    pub fn gateway_command(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = (self.gateway.command)().args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    /// The same, while this world goes on.
    pub async fn gateway_command_async(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = tokio::process::Command::from((self.gateway.command)()).args(arguments).output().await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    /// The same with a stdout that no process reads any more: exit code, stderr.
    pub async fn gateway_command_unread(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = tokio::process::Command::from((self.gateway.command)());
        command.args(arguments).stdout(writer).stderr(Stdio::piped()).kill_on_drop(true);
        let output = command.spawn().unwrap().wait_with_output();
        let output = tokio::time::timeout(PATIENCE, output).await.expect("it ends").unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    /// Starts the gateway's program with these arguments and this world's settings. Ends when it is dropped.
    pub fn gateway_process(&self, arguments: &[&str]) -> Running {
        let mut command = (self.gateway.command)();
        command.args(arguments);
        Running::start(command, self.folder())
    }

    /// Starts the worker's program with these arguments and this world's settings. Ends when it is dropped.
    pub fn worker_process(&self, arguments: &[&str]) -> Running {
        Running::start(self.worker_command(arguments).into_std(), self.folder())
    }

    /// A folder of this world's own.
    pub fn folder(&self) -> &std::path::Path {
        self.scratch.path()
    }

    /// Rows of a query.
    pub async fn query(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Vec<Row> {
        let client = self.sql.as_ref().expect("this world's database was not started");
        client.query(sql, parameters).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"))
    }

    /// The one value of a query that has one row of one column.
    pub async fn value<T: for<'a> tokio_postgres::types::FromSql<'a>>(&self, sql: &str) -> T {
        self.query(sql, &[]).await[0].get(0)
    }

    /// Statements without parameters.
    pub async fn execute(&self, sql: &str) {
        let client = self.sql.as_ref().expect("this world's database was not started");
        client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Connects (again) to the database, for looking.
    pub async fn connect_sql(&mut self) {
        let url = &self.database_url;
        let connect = async || tokio_postgres::connect(url, NoTls).await.ok();
        let (client, connection) = eventually("a connection to PostgreSQL", connect).await;
        tokio::spawn(connection);
        self.sql = Some(client);
    }

    /// Waits until a delivery's signal and issue are there, and gives them as one row: all columns of `signals` as
    /// `signal` and of `issues` as `issue`, both as JSON.
    pub async fn stored(&self, delivery_id: &str) -> Stored {
        const SQL: &str = "SELECT to_jsonb(s)::text, to_jsonb(i)::text, l.state
            FROM ingest.deliveries l JOIN signals s ON s.id = l.signal_id JOIN issues i ON i.id = s.issue_id
            WHERE l.delivery_id = $1";
        let row = eventually(&format!("delivery {delivery_id} to be stored"), || async {
            // Not an error yet where the tables are still to be made.
            let client = self.sql.as_ref().expect("this world's database was not started");
            client.query(SQL, &[&delivery_id]).await.ok()?.into_iter().next()
        })
        .await;
        let json = |column: usize| serde_json::from_str(row.get(column)).unwrap();
        assert_eq!(row.get::<_, String>(2), "stored");
        Stored { signal: json(0), issue: json(1) }
    }

    /// Waits until a query's one value is `expected`.
    pub async fn until<T>(&self, sql: &str, expected: T)
    where
        T: for<'a> tokio_postgres::types::FromSql<'a> + PartialEq + Debug,
    {
        let begin = Instant::now();
        loop {
            let found: T = self.value(sql).await;
            if found == expected {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "{sql} gives {found:?}, not {expected:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a count is at least that.
    pub async fn until_at_least(&self, sql: &str, least: i64) {
        let enough = async || (self.value::<i64>(sql).await >= least).then_some(());
        eventually(&format!("{sql} to give {least}"), enough).await;
    }

    /// Waits until that many deliveries are stored and the stream has nothing left for any worker. Then each delivery
    /// is one signal, one issue and one row of the ledger, and there is no dead letter. Nothing can come after this
    /// that would make a second row.
    pub async fn settled(&self, deliveries: usize) {
        let all = i64::try_from(deliveries).unwrap();
        self.until("SELECT count(*) FROM signals", all).await;
        self.all_acknowledged().await;
        for table in ["signals", "issues", "ingest.deliveries WHERE state = 'stored'"] {
            assert_eq!(self.value::<i64>(&format!("SELECT count(*) FROM {table}")).await, all, "{table}");
        }
        assert_eq!(self.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0, "dead letters");
    }

    /// A metric of the gateway.
    pub async fn metric(&self, name: &str) -> f64 {
        self.gateway.metric(name).await
    }

    /// Waits until the gateway has a receipt for every delivery.
    pub async fn until_confirmed(&self) {
        let confirmed = || async { (self.metric("gateway_deliveries_unconfirmed").await == 0.0).then_some(()) };
        eventually("every delivery to be confirmed", confirmed).await;
    }

    /// Ends the server processes of all of the workers' connections to the database.
    pub async fn kill_server_connections(&self) {
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                   WHERE application_name = 'loop-worker' AND datname = current_database()";
        self.value::<i64>(sql).await;
    }

    /// JetStream, as a client of this world's broker.
    pub async fn jetstream(&self) -> async_nats::jetstream::Context {
        let client = eventually("a connection to NATS", || async { async_nats::connect(self.nats.url()).await.ok() });
        async_nats::jetstream::new(client.await)
    }

    /// Waits until the stream has had that many messages: the gateway answers before it publishes.
    pub async fn on_stream(&self, messages: u64) {
        let jetstream = self.jetstream().await;
        eventually(&format!("{messages} messages on the stream"), || async {
            let stream = jetstream.get_stream("SIGNALS").await.ok()?;
            (stream.cached_info().state.last_sequence >= messages).then_some(())
        })
        .await;
    }

    /// Waits until every message of the stream is acknowledged. By sequences: a message that was just stored is not yet
    /// counted in the consumer's `num_pending`, as the server tells its consumers of it a moment later.
    pub async fn all_acknowledged(&self) {
        let jetstream = self.jetstream().await;
        eventually("all messages to be acknowledged", || async {
            let stream = jetstream.get_stream("SIGNALS").await.ok()?;
            let info = stream.consumer_info("worker").await.ok()?;
            let last = stream.cached_info().state.last_sequence;
            (info.delivered.stream_sequence >= last && info.num_ack_pending == 0).then_some(())
        })
        .await;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for program in std::iter::once(&self.gateway).chain(&self.workers) {
                eprintln!("{}", program.process.last_words());
            }
        }
    }
}

/// A command that runs.
pub struct Running {
    child: tokio::process::Child,
    out: std::path::PathBuf,
    err: std::path::PathBuf,
}

impl Running {
    fn start(command: std::process::Command, folder: &std::path::Path) -> Running {
        let tag = uuid::Uuid::new_v4().simple().to_string();
        let (out, err) = (folder.join(format!("{tag}.out")), folder.join(format!("{tag}.err")));
        let file = |path| std::fs::File::create(path).unwrap();
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(file(&out)).stderr(file(&err));
        Running { child: command.spawn().unwrap(), out, err }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it has not been waited for")
    }

    /// Its output on stdout so far.
    pub fn out(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap()
    }

    /// Sends this signal once the program handles it. Before that the signal would end any program.
    pub async fn signal(&self, signal: Signal) {
        let pid = self.pid();
        eventually(&format!("{signal} to be handled"), || async {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim().to_owned();
            let caught = u64::from_str_radix(&caught, 16).unwrap();
            (caught & 1 << (signal as i32 - 1) != 0).then_some(())
        })
        .await;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end for a minute.
    pub async fn ended(&mut self) -> Ran {
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap();
        let (out, err) = (read(&self.out), read(&self.err));
        let ended = ended.unwrap_or_else(|_| panic!("it did not end: {out}{err}")).unwrap();
        Ran { code: ended.code(), out, err }
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; none where a signal killed it.
    pub code: Option<i32>,
    /// What it wrote to stdout.
    pub out: String,
    /// What it wrote to stderr.
    pub err: String,
}

impl Ran {
    /// What a process left behind.
    pub fn of(output: std::process::Output) -> Ran {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("commands write UTF-8");
        Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Stdout as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// The number before `what` on a line of its own; 0 where there is no such line.
    pub fn number(&self, what: &str) -> u64 {
        let numbers = self.out.lines().filter_map(|line| line.strip_suffix(what));
        let mut numbers = numbers.filter_map(|number| number.trim().replace(',', "").parse().ok());
        numbers.next().unwrap_or(0)
    }
}

/// What a delivery became.
#[derive(Debug)]
pub struct Stored {
    /// Its row of `signals`.
    pub signal: serde_json::Value,
    /// Its row of `issues`.
    pub issue: serde_json::Value,
}

/// An address of this machine that is not loopback; none where it has no network.
pub fn own_address() -> Option<std::net::IpAddr> {
    // A UDP socket that is connected has a source address. It sends nothing by that.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

/// Prints that a test was skipped and what it needs. Goes past the test runner, which hides the output of a test that
/// passes.
pub fn skipped(test: &str, because: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {because}");
}

/// Asks until there is an answer, and gives it.
///
/// # Panics
/// When there is none for a minute.
pub async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(begin.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
