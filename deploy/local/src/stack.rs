//! `cargo run`: a private nats-server and PostgreSQL, the gateway and the workers in this process, until Ctrl-C.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hyper::StatusCode;
use local::data_dir::DataDir;
use local::stack_env::StackEnv;
use local::{Login, NatsOptions, NatsServer, Postgres, PostgresOptions, Programs, http, leftovers, ports};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use worker::store::TLS_SETTINGS;

use crate::progress::Progress;
use crate::{signals, welcome};

/// How long gateway and workers may take until they are ready, with both servers there.
const READY: Duration = Duration::from_secs(60);
/// The file in the data directory that holds the client secret.
pub(crate) const SECRET_FILE: &str = "client-secret";

/// The file in the data directory that holds the password of NATS.
const NATS_PASSWORD_FILE: &str = "nats-password";

/// What a person can choose.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// The webhook's port; 0 for any that is free.
    pub(crate) port: u16,
    pub(crate) data_dir: PathBuf,
    pub(crate) workers: usize,
}

/// Everything that runs, and where it is.
pub(crate) struct Stack {
    pub(crate) env: StackEnv,
    pub(crate) data_dir: DataDir,
    pub(crate) programs: Programs,
    pub(crate) nats: NatsServer,
    pub(crate) postgres: Postgres,
    gateway: Service,
    workers: Service,
}

/// The gateway, or all the workers: tasks of this process that end after `stop`.
struct Service {
    name: &'static str,
    stop: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
}

/// Starts everything, says so, and waits for the end: ours when a signal asks for it, or a part's own.
///
/// # Errors
/// When something cannot start, or a part ends by itself.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let stop = signals::listen().context("cannot listen for signals")?;
    let Some(started) = stop.run_until_cancelled(start(&options)).await else {
        eprintln!("Stopped before it was ready.");
        return Ok(());
    };
    let mut stack = started?;
    welcome::print(&stack);
    let ended = stack.ended(&stop).await;
    if ended.is_ok() {
        eprintln!("Stopping (Ctrl-C again to force) ...");
    }
    stack.stop().await;
    if ended.is_ok() {
        eprintln!("Stopped. The data is still in {}.", stack.data_dir.path().display());
    }
    ended
}

async fn start(options: &Options) -> anyhow::Result<Stack> {
    let data_dir = DataDir::take(&options.data_dir)?;
    StackEnv::remove(&data_dir)?;
    let port = public_port(options.port)?;
    let progress = Progress::new();
    progress.step("Looking for nats-server and PostgreSQL");
    let (progress, programs) = tokio::task::spawn_blocking(move || {
        let programs = Programs::find_or_fetch(&mut |step| progress.step(step));
        (progress, programs)
    })
    .await?;
    let programs = programs?;
    let (nats_dir, postgres_dir) = (data_dir.path().join("nats"), data_dir.path().join("postgres"));
    end_leftovers(&nats_dir, &postgres_dir, &progress).await?;

    progress.step("Starting nats-server and PostgreSQL");
    let ports = Ports::choose(&data_dir)?;
    // Each user of this machine reaches the port. A client reads deliveries there, and a message of it becomes a row.
    let login = Login { user: "loop".into(), password: nats_password(&data_dir)? };
    let nats = NatsOptions { port: Some(ports.nats), login: Some(login), ..NatsOptions::new(nats_dir) };
    let postgres = PostgresOptions { port: Some(ports.postgres), ..PostgresOptions::lasting(postgres_dir) };
    let (nats, postgres) = tokio::try_join!(NatsServer::start(&programs, nats), Postgres::start(&programs, postgres))?;
    let secret = data_dir.secret(SECRET_FILE)?;
    let env = StackEnv {
        webhook_url: format!("http://127.0.0.1:{port}/api/signals/sentry"),
        secret: first_secret(&secret).to_owned(),
        database_url: postgres.create_database("loop").await?,
        nats_url: nats.url(),
        gateway_ops_url: format!("http://127.0.0.1:{}", ports.gateway_ops),
        worker_ops_url: format!("http://127.0.0.1:{}", ports.worker_ops),
    };
    drop(progress); // from here on the logs have the screen

    let (gateway, workers) = services(&env, &data_dir, port, &ports, options.workers)?;
    let mut stack = Stack { env, data_dir, programs, nats, postgres, gateway, workers };
    stack.ready().await?;
    stack.env.write(&stack.data_dir)?;
    Ok(stack)
}

/// The password of NATS, which stands in its URL and in its configuration.
fn nats_password(data_dir: &DataDir) -> anyhow::Result<String> {
    let password = data_dir.secret(NATS_PASSWORD_FILE)?;
    if !password.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        let file = data_dir.path().join(NATS_PASSWORD_FILE);
        bail!("{} holds more than letters and digits. Remove it: the next start makes another", file.display());
    }
    Ok(password)
}

/// The first secret of a file, as the gateway reads it: secrets are separated by commas or line ends.
fn first_secret(text: &str) -> &str {
    text.split([',', '\n']).map(str::trim).find(|secret| !secret.is_empty()).unwrap_or_default()
}

/// What a killed launcher left behind, if its watchdog was killed, too.
async fn end_leftovers(nats_dir: &Path, postgres_dir: &Path, progress: &Progress) -> anyhow::Result<()> {
    let (nats, postgres) = (nats_dir.to_path_buf(), postgres_dir.to_path_buf());
    let ended = tokio::task::spawn_blocking(move || leftovers::end(&nats, &postgres)).await??;
    if !ended.is_empty() {
        let pids: Vec<String> = ended.iter().map(u32::to_string).collect();
        progress.note(&format!("Ended servers that an earlier run had left behind (processes {}).", pids.join(", ")));
    }
    Ok(())
}

/// The webhook's port, which must be free on every address, as the gateway listens on all.
fn public_port(asked: u16) -> anyhow::Result<u16> {
    let free = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() && ports::is_free(port);
    match asked {
        0 => ports::free(),
        port if free(port) => Ok(port),
        port => bail!(
            "port {port} is taken by another program. `cargo run -- --port 0` takes one that is free, `--port N` the \
             one you name"
        ),
    }
}

/// The servers' ports. Kept in the data directory, so that DATABASE_URL and its like stay the same from start to start,
/// unless another program has taken one meanwhile.
struct Ports {
    nats: u16,
    postgres: u16,
    gateway_ops: u16,
    worker_ops: u16,
}

impl Ports {
    fn choose(data_dir: &DataDir) -> anyhow::Result<Ports> {
        const FILE: &str = "ports.json";
        let text = fs::read_to_string(data_dir.path().join(FILE)).unwrap_or_default();
        let kept: BTreeMap<String, u16> = serde_json::from_str(&text).unwrap_or_default(); // none, or of no use
        let mut chosen = BTreeMap::new();
        let mut choose = |name: &str| -> anyhow::Result<u16> {
            let port = match kept.get(name) {
                Some(port) if ports::is_free(*port) => *port,
                _ => ports::free()?,
            };
            chosen.insert(name.to_owned(), port);
            Ok(port)
        };
        let ports = Ports {
            nats: choose("nats")?,
            postgres: choose("postgres")?,
            gateway_ops: choose("gateway_ops")?,
            worker_ops: choose("worker_ops")?,
        };
        data_dir.write_private(FILE, &serde_json::to_string_pretty(&chosen)?)?;
        Ok(ports)
    }
}

/// Starts the gateway and the workers, as their own programs would start.
fn services(
    env: &StackEnv,
    data_dir: &DataDir,
    port: u16,
    ports: &Ports,
    count: usize,
) -> anyhow::Result<(Service, Service)> {
    // What is the stack's own. Everything else is tuning, and passes through from the environment.
    let ours = |variable: &str| -> Option<Option<String>> {
        let inside = |name: &str| data_dir.path().join(name).to_string_lossy().into_owned();
        Some(match variable {
            "GATEWAY_LISTEN" => Some(format!("0.0.0.0:{port}")),
            "GATEWAY_OPS_LISTEN" => Some(format!("127.0.0.1:{}", ports.gateway_ops)),
            "GATEWAY_JOURNAL_DIR" => Some(inside("journal")),
            "SENTRY_CLIENT_SECRET_FILE" => Some(inside(SECRET_FILE)),
            "NATS_URL" => Some(env.nats_url.clone()),
            "DATABASE_URL" => Some(env.database_url.clone()),
            "SENTRY_CLIENT_SECRET"
            | "NATS_REPLICAS"
            | "NATS_CREDS_FILE"
            | "NATS_NKEY_FILE"
            | "NATS_CA_FILE"
            | "NATS_CLIENT_CERT"
            | "NATS_CLIENT_KEY" => None,
            // Those of another database.
            _ if TLS_SETTINGS.iter().any(|setting| setting.variable == variable) => None,
            _ => return None,
        })
    };
    let lookup = |variable: &str| ours(variable).unwrap_or_else(|| std::env::var(variable).ok());
    let config = gateway::Config::load(&lookup)?;
    config.logs.start();
    let mut gateway = Service::new("gateway");
    gateway.tasks.spawn(gateway::run(config, gateway.stop.clone()));
    let mut workers = Service::new("worker");
    for number in 0..count {
        let ops = if number == 0 { ports.worker_ops } else { ports::free()? };
        let lookup = |variable: &str| match variable {
            "WORKER_OPS_LISTEN" => Some(format!("127.0.0.1:{ops}")),
            _ => lookup(variable),
        };
        workers.tasks.spawn(worker::run(worker::Config::load(&lookup)?, workers.stop.clone()));
    }
    Ok((gateway, workers))
}

impl Service {
    fn new(name: &'static str) -> Service {
        Service { name, stop: CancellationToken::new(), tasks: JoinSet::new() }
    }

    /// Waits until one of its tasks has ended, which none does by itself while all is well.
    async fn ended(&mut self) -> anyhow::Error {
        let how = match self.tasks.join_next().await {
            Some(Ok(Err(err))) => err,
            Some(Err(panic)) => panic.into(),
            Some(Ok(Ok(()))) | None => anyhow::anyhow!("it ended without a reason"),
        };
        how.context(format!("the {} failed", self.name))
    }

    /// Asks it to end and waits until it has (it keeps its own time limit, `SHUTDOWN_GRACE`).
    async fn stop(&mut self) {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(err) = ended.map_err(anyhow::Error::from).flatten() {
                eprintln!("The {} did not stop in order: {err:#}", self.name);
            }
        }
    }
}

impl Stack {
    /// Returns once gateway and worker say that they are ready.
    async fn ready(&mut self) -> anyhow::Result<()> {
        let urls = [&self.env.gateway_ops_url, &self.env.worker_ops_url].map(|url| format!("{url}/readyz"));
        let all_ready = async {
            let begin = Instant::now();
            for url in urls {
                loop {
                    let answer = http::get(&url).await;
                    if matches!(&answer, Ok((StatusCode::OK, _))) {
                        break;
                    }
                    if begin.elapsed() > READY {
                        let said = answer.map_or_else(|err| format!("{err:#}"), |(_, text)| text);
                        bail!("not ready within {READY:?}; {url} says: {said}");
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            Ok(())
        };
        tokio::select! {
            ready = all_ready => ready,
            how = self.gateway.ended() => Err(how),
            how = self.workers.ended() => Err(how),
        }
    }

    /// Waits for the end: `Ok` when `stop` asks for it, an error when a part ended by itself.
    async fn ended(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            _ = self.nats.process().ended() => {
                bail!("nats-server ended by itself: {}", self.nats.process().last_words())
            }
            _ = self.postgres.process().ended() => {
                bail!("PostgreSQL ended by itself: {}", self.postgres.process().last_words())
            }
            how = self.gateway.ended() => Err(how),
            how = self.workers.ended() => Err(how),
        }
    }

    /// Stops everything in order: first what takes deliveries, last what holds them.
    /// What is wrong on the way is told, and the rest stopped all the same.
    async fn stop(&mut self) {
        if let Err(err) = StackEnv::remove(&self.data_dir) {
            eprintln!("{err:#}");
        }
        self.gateway.stop().await;
        self.workers.stop().await;
        let (postgres, nats) = tokio::join!(self.postgres.stop(), self.nats.stop());
        for problem in [postgres, nats].into_iter().filter_map(Result::err) {
            eprintln!("{problem:#}");
        }
    }
}
