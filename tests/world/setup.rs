//! How a world comes into being.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use local::process::Process;
use local::{NatsOptions, NatsServer, Postgres, PostgresOptions, Programs, Scratch, ports};
use nix::sys::signal::Signal;
use tokio::sync::OnceCell;

use crate::{Program, SECRET, World};

/// The programs under test.
#[derive(Debug, Clone, Copy)]
pub struct Binaries {
    /// The gateway.
    pub gateway: &'static str,
    /// The worker.
    pub worker: &'static str,
}

/// What a world is to be. Made with [`Setup::new`], changed, then started.
pub struct Setup {
    binaries: Binaries,
    gateway: Vec<(String, String)>,
    worker: Vec<(String, String)>,
    workers: usize,
    own_postgres: bool,
    servers_later: bool,
    sql: String,
    nats: NatsOptions,
    cluster: bool,
    gateway_under: &'static [&'static str],
    worker_under: &'static [&'static str],
}

impl Setup {
    /// A gateway, a worker, a broker of its own, and a database of its own on a server that all worlds of this process
    /// share.
    pub fn new(binaries: Binaries) -> Self {
        Setup {
            binaries,
            gateway: vec![],
            worker: vec![],
            workers: 1,
            own_postgres: false,
            servers_later: false,
            sql: String::new(),
            nats: NatsOptions::new(PathBuf::new()),
            cluster: false,
            gateway_under: &[],
            worker_under: &[],
        }
    }

    /// With a setting of the gateway.
    #[must_use]
    pub fn gateway(mut self, variable: &str, value: &str) -> Self {
        self.gateway.push((variable.to_owned(), value.to_owned()));
        self
    }

    /// With a setting of all workers.
    #[must_use]
    pub fn worker(mut self, variable: &str, value: &str) -> Self {
        self.worker.push((variable.to_owned(), value.to_owned()));
        self
    }

    /// With that many workers; 0 is possible.
    #[must_use]
    pub fn workers(mut self, count: usize) -> Self {
        self.workers = count;
        self
    }

    /// With a PostgreSQL server of its own, which can be killed.
    #[must_use]
    pub fn own_postgres(mut self) -> Self {
        self.own_postgres = true;
        self
    }

    /// With NATS and PostgreSQL stopped when the gateway and the workers start; nobody is waited for.
    #[must_use]
    pub fn servers_later(mut self) -> Self {
        self.own_postgres = true;
        self.servers_later = true;
        self
    }

    /// With these statements run on the database before anything else.
    #[must_use]
    pub fn sql(mut self, sql: &str) -> Self {
        self.sql.push_str(sql);
        self
    }

    /// With these lines in the broker's configuration.
    #[must_use]
    pub fn nats(mut self, change: impl FnOnce(&mut NatsOptions)) -> Self {
        change(&mut self.nats);
        self
    }

    /// With a broker of three servers, which the gateway and the workers know all, and three replicas of the stream.
    #[must_use]
    pub fn cluster(mut self) -> Self {
        self.cluster = true;
        self.gateway("NATS_REPLICAS", "3").worker("NATS_REPLICAS", "3")
    }

    /// With the gateway started by this command, which gets the program as its last argument and must become it (exec).
    #[must_use]
    pub fn gateway_under(mut self, command: &'static [&'static str]) -> Self {
        self.gateway_under = command;
        self
    }

    /// With the workers started by this command, which gets the program as its last argument.
    #[must_use]
    pub fn worker_under(mut self, command: &'static [&'static str]) -> Self {
        self.worker_under = command;
        self
    }

    /// Starts everything, and waits until gateway and workers are ready.
    pub async fn start(self) -> World {
        let world = self.launch().await;
        world.gateway.ready().await;
        for worker in &world.workers {
            worker.ready().await;
        }
        world
    }

    /// Starts everything, and waits for the servers only.
    pub async fn launch(mut self) -> World {
        let programs = programs();
        let scratch = Scratch::new("world").unwrap();
        self.nats.dir = scratch.path().join("nats");
        let (nats, other_nats) = match self.cluster {
            true => self.start_cluster(programs, scratch.path()).await,
            false => (NatsServer::start(programs, self.nats.clone()).await.unwrap(), vec![]),
        };
        let (postgres, database_url) = self.database(programs, scratch.path()).await;
        if self.servers_later {
            nats.stop().await.unwrap();
            postgres.as_ref().expect("asked for above").stop().await.unwrap();
        }
        let nats_url = std::iter::once(&nats).chain(&other_nats).map(NatsServer::url).collect::<Vec<_>>().join(",");
        let gateway = self.gateway_maker(scratch.path().to_owned(), nats_url.clone());
        let worker = self.worker_maker(scratch.path().to_owned(), nats_url.clone(), database_url.clone());
        let workers = (0..self.workers).map(|_| worker()).collect();
        let command = self.worker_command(&nats_url, &database_url);
        let (gateway, start_gateway) = (gateway(), Box::new(gateway));
        let start_worker = Box::new(worker);
        let mut world = World {
            nats,
            other_nats,
            gateway,
            workers,
            command,
            sql: None,
            database_url,
            postgres,
            start_gateway,
            start_worker,
            scratch,
        };
        if !self.servers_later {
            world.connect_sql().await;
        }
        world
    }

    /// Starts gateways, each with ports and a journal of its own.
    fn gateway_maker(&self, folder: PathBuf, nats_url: String) -> impl Fn() -> Program + Send + Sync + use<> {
        let (command, settings) = ([self.gateway_under, &[self.binaries.gateway]].concat(), self.gateway.clone());
        let count = AtomicUsize::new(0);
        move || {
            let name = format!("gateway-{}", count.fetch_add(1, Ordering::Relaxed));
            let ports = (ports::free().unwrap(), ports::free().unwrap());
            let own = [
                ("NATS_URL", nats_url.clone()),
                ("SENTRY_CLIENT_SECRET", SECRET.to_owned()),
                ("GATEWAY_LISTEN", format!("127.0.0.1:{}", ports.0)),
                ("GATEWAY_OPS_LISTEN", format!("127.0.0.1:{}", ports.1)),
                ("GATEWAY_JOURNAL_DIR", folder.join(&name).display().to_string()),
            ];
            start(&folder, &name, &command, [environment(own), settings.clone()].concat(), ports)
        }
    }

    /// Starts workers, each with an ops port of its own.
    fn worker_maker(
        &self,
        folder: PathBuf,
        nats_url: String,
        database_url: String,
    ) -> impl Fn() -> Program + Send + Sync + use<> {
        let (command, settings) = ([self.worker_under, &[self.binaries.worker]].concat(), self.worker.clone());
        let count = AtomicUsize::new(0);
        move || {
            let name = format!("worker-{}", count.fetch_add(1, Ordering::Relaxed));
            let ops_port = ports::free().unwrap();
            let own = [
                ("NATS_URL", nats_url.clone()),
                ("DATABASE_URL", database_url.clone()),
                ("WORKER_OPS_LISTEN", format!("127.0.0.1:{ops_port}")),
            ];
            start(&folder, &name, &command, [environment(own), settings.clone()].concat(), (0, ops_port))
        }
    }

    /// Three servers that know each other. <https://docs.nats.io/running-a-nats-service/configuration/clustering>
    async fn start_cluster(&self, programs: &Programs, folder: &Path) -> (NatsServer, Vec<NatsServer>) {
        let ports = [(); 3].map(|()| ports::free().unwrap());
        let routes = ports.map(|port| format!("\"nats://127.0.0.1:{port}\"")).join(", ");
        let member = |port: u16| {
            let mut options = self.nats.clone();
            options.dir = folder.join(format!("nats-{port}"));
            options.extra.push_str(&format!(
                "\nserver_name: n{port}\ncluster {{ name: world, listen: \"127.0.0.1:{port}\", routes: [{routes}] }}"
            ));
            NatsServer::launch(programs, options).unwrap()
        };
        let [first, second, third] = ports.map(member); // none is ready before the others are there
        for server in [&first, &second, &third] {
            server.ready().await.unwrap();
        }
        (first, vec![second, third])
    }

    async fn database(&self, programs: &Programs, folder: &Path) -> (Option<Postgres>, String) {
        let own = match self.own_postgres {
            true => Some(Postgres::start(programs, PostgresOptions::for_tests(folder.join("postgres"))).await.unwrap()),
            false => None,
        };
        let server = match &own {
            Some(own) => own,
            None => postgres().await,
        };
        let name = format!("world_{}", uuid::Uuid::new_v4().simple());
        let url = server.create_database(&name).await.unwrap();
        if !self.sql.is_empty() {
            let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            client.batch_execute(&self.sql).await.unwrap();
        }
        (own, url)
    }

    /// The worker's program with the settings of this world, for its commands.
    fn worker_command(&self, nats_url: &str, database_url: &str) -> Command {
        let mut command = Command::new(self.binaries.worker);
        command.env_clear().env("NATS_URL", nats_url).env("DATABASE_URL", database_url);
        command.envs(self.worker.iter().cloned());
        command
    }
}

/// The settings that every program has here, and its own.
fn environment<const N: usize>(own: [(&str, String); N]) -> Vec<(String, String)> {
    let logs = ("RUST_LOG", "info,gateway=debug,worker=debug,shared=debug".to_owned());
    own.into_iter().chain([logs]).map(|(variable, value)| (variable.to_owned(), value)).collect()
}

/// Starts a program; the later of two settings of the same name wins.
fn start(
    folder: &Path,
    name: &str,
    command: &[&'static str],
    settings: Vec<(String, String)>,
    ports: (u16, u16),
) -> Program {
    let words = command.to_vec();
    let command = move || {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        // Nothing of the machine's own environment decides what a test finds.
        command.env_clear().envs(settings.iter().map(|(variable, value)| (variable, value)));
        command
    };
    let log = folder.join(format!("{name}.log"));
    let process = Process::spawn(name, command(), &log, Signal::SIGKILL).unwrap();
    let (port, ops_port) = ports;
    Program { name: name.to_owned(), command: Box::new(command), log, port, ops_port, process }
}

/// The servers' programs, found or fetched once.
pub fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| Programs::find_or_fetch(&mut |line| eprintln!("{line}")).unwrap())
}

/// A PostgreSQL server for all worlds and tests of this process that need none of their own. Ended by the watchdog, with
/// its folder, when the process ends.
pub async fn postgres() -> &'static Postgres {
    static SHARED: OnceCell<(Postgres, Scratch)> = OnceCell::const_new();
    let start = || async {
        let scratch = Scratch::new("postgres").unwrap();
        let mut options = PostgresOptions::for_tests(scratch.path().join("postgres"));
        options.max_connections = 400;
        (Postgres::start(programs(), options).await.unwrap(), scratch)
    };
    &SHARED.get_or_init(start).await.0
}
