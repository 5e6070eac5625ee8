//! `cargo run` as a person has it: the program itself, with real servers.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use local::stack_env::{self, StackEnv};
use local::wheels::{NATS_SERVER, POSTGRESQL};
use local::{Scratch, watchdog};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_postgres::NoTls;

/// A launcher on a data directory of its own. Killed when dropped.
struct Launcher {
    process: Child,
    data_dir: PathBuf,
}

impl Launcher {
    fn start(data_dir: &Path) -> Launcher {
        Launcher::start_with(data_dir, &[])
    }

    /// The same, with these variables in its environment.
    fn start_with(data_dir: &Path, variables: &[(&str, &str)]) -> Launcher {
        let mut command = Command::new(env!("CARGO_BIN_EXE_local"));
        command.envs(variables.iter().copied());
        command.args(["--port", "0", "--data-dir"]).arg(data_dir).stdout(Stdio::piped()).stderr(Stdio::piped());
        let process = command.env_remove("RUST_LOG").spawn().expect("the launcher starts");
        watchdog::guard_process(process.id(), Signal::SIGTERM).expect("the watchdog starts");
        Launcher { process, data_dir: data_dir.to_path_buf() }
    }

    /// Waits until everything runs.
    fn ready(&mut self) -> StackEnv {
        let begin = Instant::now();
        loop {
            if let Some(env) = StackEnv::read(&self.data_dir).expect("a whole stack.env") {
                return env;
            }
            let ended = self.process.try_wait().expect("it is our child");
            assert!(ended.is_none() && begin.elapsed() < Duration::from_secs(120), "not ready: {}", self.words());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: Signal) {
        kill(pid(self.process.id()), signal).expect("it runs");
    }

    /// Waits for its end; how it ended, and what it said.
    fn ended(mut self) -> (ExitStatus, String) {
        let status = self.process.wait().expect("it is our child");
        (status, self.words())
    }

    /// All that it said; it must have ended.
    fn words(&mut self) -> String {
        let _ = self.process.kill();
        let mut words = String::new();
        self.process.stderr.take().map(|mut pipe| pipe.read_to_string(&mut words));
        self.process.stdout.take().map(|mut pipe| pipe.read_to_string(&mut words));
        words
    }

    /// The servers' process numbers, and the watchdog's.
    fn children(&self) -> Vec<(u32, String)> {
        let table = Command::new("ps").args(["-eo", "pid=,ppid=,args="]).output().expect("ps runs").stdout;
        let table = String::from_utf8_lossy(&table).into_owned();
        let rows = table.lines().filter_map(|line| {
            let (pid, rest) = line.trim().split_once(char::is_whitespace)?;
            let (parent, args) = rest.trim().split_once(char::is_whitespace)?;
            (parent.parse() == Ok(self.process.id())).then(|| Some((pid.parse().ok()?, args.trim().to_owned())))?
        });
        rows.collect()
    }

    fn child(&self, words: &str) -> u32 {
        let children = self.children();
        let found = children.iter().find(|(_, args)| args.contains(words));
        found.unwrap_or_else(|| panic!("{words} is not among {children:?}")).0
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        watchdog::release_process(self.process.id());
    }
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.try_into().expect("a process number"))
}

/// Whether any process has `folder` in its arguments.
fn in_use(folder: &Path) -> bool {
    let table = Command::new("ps").args(["-eo", "stat=,args="]).output().expect("ps runs").stdout;
    let folder = folder.to_string_lossy();
    String::from_utf8_lossy(&table).lines().any(|line| !line.starts_with('Z') && line.contains(&*folder))
}

fn wait_until_unused(folder: &Path) {
    let begin = Instant::now();
    while in_use(folder) {
        assert!(begin.elapsed() < Duration::from_secs(30), "something still runs in {}", folder.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a delivery to the stack in `data_dir`: the exit code, and all that was said.
fn send(data_dir: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/issue_created.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_local"));
    command.arg("send").arg(fixture).arg("--data-dir").arg(data_dir).args(arguments);
    let output = command.output().expect("the program runs");
    let words = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&words).into_owned())
}

async fn query(url: &str, sql: &str) -> Vec<String> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the database answers");
    tokio::spawn(connection);
    let rows = client.query(sql, &[]).await.expect("a good query");
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stack_keeps_its_data_and_addresses_whatever_ended_it() {
    let scratch = Scratch::new("stack").unwrap();
    let data_dir = scratch.path().join("data");
    let mut first = Launcher::start(&data_dir);
    let env = first.ready();
    let (code, words) = send(&data_dir, &["--request-id", "once"]);
    assert_eq!(code, Some(0), "{words}");
    for part in ["202 Accepted", "Issue #1 ", "severity  high", "priority  2", "Sentry: KeyError: 'berth_7' (3 events)"]
    {
        assert!(words.contains(part), "{part} is missing in: {words}");
    }
    let (code, words) = send(&data_dir, &["--sign", "bad"]);
    assert!(code == Some(1) && words.contains("401 Unauthorized"), "{words}");

    // A second one on the same folder is told who has it; a second one elsewhere just runs.
    let (refused, words) = Launcher::start(&data_dir).ended();
    assert_eq!(refused.code(), Some(1));
    assert!(words.contains(&format!("in use by process {}", first.process.id())), "{words}");
    let mut elsewhere = Launcher::start(&scratch.path().join("elsewhere"));
    let other = elsewhere.ready();
    assert!(other.webhook_url != env.webhook_url && other.secret != env.secret);
    elsewhere.signal(Signal::SIGINT);
    let (status, words) = elsewhere.ended();
    assert!(status.success(), "{words}");
    assert!(words.contains(&other.webhook_url) && words.contains("Ctrl-C stops everything"), "{words}");
    wait_until_unused(&scratch.path().join("elsewhere"));

    // An orderly stop, then kill -9 of the launcher, which takes the servers with it.
    first.signal(Signal::SIGTERM);
    let (status, words) = first.ended();
    assert!(status.success(), "{words}");
    assert!(!in_use(&data_dir) && StackEnv::read(&data_dir).unwrap().is_none());
    let mut second = Launcher::start(&data_dir);
    let again = second.ready();
    assert_eq!((&again.database_url, &again.nats_url), (&env.database_url, &env.nats_url));
    assert_eq!(query(&again.database_url, "SELECT number::text FROM issues").await, ["1"]);
    second.signal(Signal::SIGKILL);
    drop(second);
    wait_until_unused(&data_dir);
    assert!(StackEnv::read(&data_dir).unwrap().is_none());

    // kill -9 of launcher and watchdog: the servers stay, and the next start ends them.
    let mut third = Launcher::start(&data_dir);
    let address = third.ready().database_url;
    let (watchdog, nats, postgres) = (third.child("watchdog"), third.child("nats.conf"), third.child("postgres -D"));
    kill(pid(watchdog), Signal::SIGKILL).unwrap();
    third.signal(Signal::SIGKILL);
    drop(third);
    assert!(in_use(&data_dir));
    query(&address, "SELECT 'still there'").await;
    fs::remove_file(data_dir.join(stack_env::NAME)).unwrap(); // nobody did; it would be taken for the next one's
    let mut fourth = Launcher::start(&data_dir);
    let again = fourth.ready();
    assert_eq!((&again.database_url, &again.nats_url), (&env.database_url, &env.nats_url));
    let (code, words) = send(&data_dir, &["--request-id", "once"]); // by a proxy, say
    assert!(code == Some(0) && words.contains("Issue #1 "), "{words}");
    assert_eq!(query(&again.database_url, "SELECT number::text FROM issues").await, ["1"]);
    assert!(![nats, postgres].contains(&fourth.child("nats.conf")));
    fourth.signal(Signal::SIGTERM);
    let (status, words) = fourth.ended();
    assert!(status.success() && words.contains("an earlier run had left behind"), "{words}");
    assert!(words.contains(&nats.to_string()) && words.contains(&postgres.to_string()), "{words}");
    wait_until_unused(&data_dir);
}

/// Sends what a NATS client sends first, with `login` in it, and gives the answer.
fn greet(port: u16, login: &str) -> String {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("nats-server listens");
    write!(socket, "CONNECT {{\"verbose\":false,\"protocol\":1{login}}}\r\nPING\r\n").expect("it reads");
    let mut lines = BufReader::new(socket).lines().map_while(Result::ok);
    lines.find(|line| !line.starts_with("INFO ")).unwrap_or_default()
}

#[test]
fn the_broker_takes_only_its_own_login() {
    let scratch = Scratch::new("login").unwrap();
    let mut launcher = Launcher::start(scratch.path());
    let env = launcher.ready();
    let (login, address) = env.nats_url.strip_prefix("nats://").and_then(|url| url.split_once('@')).unwrap_or_default();
    let port = env.nats_url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port in NATS_URL");
    for wrong in ["", ",\"user\":\"loop\",\"pass\":\"\"", ",\"user\":\"loop\",\"pass\":\"loop\""] {
        let answer = greet(port, wrong);
        assert!(answer.contains("Authorization Violation"), "{wrong}: {answer}");
    }
    let (user, password) = login.split_once(':').expect("a login in NATS_URL");
    assert!(password.len() == 64 && address.starts_with("127.0.0.1:"), "{address}");
    assert_eq!(greet(port, &format!(",\"user\":\"{user}\",\"pass\":\"{password}\"")), "PONG");
    for file in [stack_env::NAME, "nats-password", "nats/nats.conf"] {
        let mode = fs::metadata(scratch.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let (code, words) = send(scratch.path(), &[]);
    assert_eq!(code, Some(0), "{words}");
    launcher.signal(Signal::SIGTERM);
    let (status, words) = launcher.ended();
    assert!(status.success() && !words.contains(password), "{words}");
}

#[test]
fn variables_of_another_database_and_a_secret_of_several_lines_change_nothing() {
    let scratch = Scratch::new("variables").unwrap();
    let (first, second) = ("the-first-client-secret", "the-second-client-secret");
    fs::write(scratch.path().join("client-secret"), format!("\n{first}\r\n{second}\n")).unwrap();
    let theirs = [
        ("PGSSLMODE", "verify-full"),
        ("PGSSLROOTCERT", "/no/such/file"),
        ("PGSSLCERT", "/no/such/file"),
        ("PGSSLKEY", "/no/such/file"),
        ("PGHOST", "192.0.2.1"),
        ("PGPORT", "1"),
        ("PGUSER", "nobody"),
        ("PGPASSWORD", "none"),
        ("PGDATABASE", "elsewhere"),
        ("PGSERVICE", "elsewhere"),
        ("PGOPTIONS", "-c search_path=elsewhere"),
        ("DATABASE_URL", "postgres://192.0.2.1/elsewhere"),
        ("NATS_URL", "nats://192.0.2.1"),
        ("NATS_CREDS_FILE", "/no/such/file"),
        ("SENTRY_CLIENT_SECRET", "another-client-secret"),
    ];
    let mut launcher = Launcher::start_with(scratch.path(), &theirs);
    let env = launcher.ready();
    assert_eq!(env.secret, first);
    let text = fs::read_to_string(scratch.path().join(stack_env::NAME)).unwrap();
    assert_eq!(text.lines().count(), 6, "a line a name: {text}");
    let (code, words) = send(scratch.path(), &[]);
    assert_eq!(code, Some(0), "{words}");
    let (code, words) = send(scratch.path(), &["--secret", second]);
    assert_eq!(code, Some(0), "{words}");
    launcher.signal(Signal::SIGTERM);
    let (status, words) = launcher.ended();
    assert!(status.success(), "{words}");
}

/// A cache with programs that were not unpacked there. Each makes the file `ran` and ends.
#[test]
fn a_program_that_was_put_into_the_cache_does_not_run() {
    let scratch = Scratch::new("cache").unwrap();
    let (cache, ran) = (scratch.path().join("cache/loop-sentry-door"), scratch.path().join("ran"));
    for wheel in [&NATS_SERVER, &POSTGRESQL] {
        let program = wheel.cached(&cache).expect("a build for this machine");
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        for program in [program.clone(), program.with_file_name("initdb")] {
            fs::write(&program, format!("#!/bin/sh\necho \"$0\" >> {}\n", ran.display())).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_local"));
    command.args(["--port", "0", "--data-dir"]).arg(scratch.path().join("data"));
    command.env("PATH", scratch.path()).env("XDG_CACHE_HOME", scratch.path().join("cache"));
    let output = command.env_remove("LOCAL_NATS_SERVER").env_remove("LOCAL_POSTGRES_BIN").output().unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(!ran.exists(), "{} ran: {words}", fs::read_to_string(&ran).unwrap());
    assert!(output.status.code() == Some(1) && words.contains("no python3 on PATH"), "{words}");
}

#[test]
fn a_server_that_ends_by_itself_ends_the_stack() {
    let scratch = Scratch::new("stack").unwrap();
    let mut launcher = Launcher::start(scratch.path());
    launcher.ready();
    kill(pid(launcher.child("nats.conf")), Signal::SIGKILL).unwrap();
    let (status, words) = launcher.ended();
    assert_eq!(status.code(), Some(1), "{words}");
    assert!(words.contains("nats-server ended by itself") && words.contains("signal: 9"), "{words}");
    wait_until_unused(scratch.path());
}

#[test]
fn a_person_is_told_what_to_do() {
    let scratch = Scratch::new("advice").unwrap();
    let (cache, empty) = (scratch.path().join("cache"), scratch.path().join("empty"));
    fs::create_dir(&cache).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_local"));
        command.args(arguments).arg("--data-dir").arg(scratch.path().join("data"));
        command.env("PATH", &empty).env("XDG_CACHE_HOME", &cache);
        let output = command.env_remove("LOCAL_NATS_SERVER").output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, words) = run(&["--port", "0"]);
    assert_eq!(code, Some(1));
    assert!(words.contains("no python3 on PATH") && words.contains("LOCAL_NATS_SERVER"), "{words}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, words) = run(&["--port", &port]);
    assert_eq!(code, Some(1));
    assert!(words.contains(&format!("port {port} is taken")) && words.contains("--port 0"), "{words}");

    let (code, words) = run(&["send", file!()]);
    assert_eq!(code, Some(1));
    assert!(words.contains("cannot read"), "{words}");
    let payload = scratch.path().join("payload.json");
    fs::write(&payload, "{}").unwrap();
    let (code, words) = run(&["send", payload.to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(words.contains("no stack is running") && words.contains("cargo run"), "{words}");
    let (code, _) = run(&["--wrong"]);
    assert_eq!(code, Some(64));
}
