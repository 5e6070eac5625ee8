//! PostgreSQL behind PgBouncer in transaction mode: each transaction may run on another server connection.
//! <https://www.pgbouncer.org/features.html>

use std::process::Command;

use local::ports;
use local::process::Process;
use nix::sys::signal::Signal;
use world::{Setup, World, eventually};

use crate::load::{exactly_once, post};
use crate::{fixture, setup};

/// A running PgBouncer. It ends with the test.
struct Pooler(Process);

/// A world whose worker reaches PostgreSQL through a pooler that keeps two server connections. `None` where this
/// machine has no PgBouncer: the test then prints that it is skipped.
async fn behind_a_pooler(test: &str, settings: &str, change: impl FnOnce(Setup) -> Setup) -> Option<(World, Pooler)> {
    const PROGRAM: &str = "/usr/sbin/pgbouncer";
    if Command::new(PROGRAM).arg("--version").output().is_err() {
        world::skipped(test, "there is no PgBouncer here: apt install pgbouncer");
        return None;
    }
    let port = ports::free().unwrap();
    let url = format!("postgres://loop@127.0.0.1:{port}/door");
    let mut world = change(setup().workers(0).worker("DATABASE_URL", &url)).start().await;
    let server: tokio_postgres::Config = world.database_url.parse().unwrap();
    let configuration = format!(
        "[databases]\ndoor = host=127.0.0.1 port={} dbname={} user=loop\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
         pool_mode = transaction\ndefault_pool_size = 2\n{settings}\n",
        server.get_ports()[0],
        server.get_dbname().unwrap(),
    );
    // PgBouncer refuses to run as root, and the world's folder is closed to other users: it reads from stdin's file.
    let file = std::env::temp_dir().join(format!("pgbouncer-{port}.ini"));
    std::fs::write(&file, configuration).unwrap();
    let mut command = Command::new(PROGRAM);
    if nix::unistd::geteuid().is_root() {
        command.args(["-u", "nobody"]);
    }
    command.arg(&file);
    let process = Process::spawn("pgbouncer", command, &world.folder().join("pgbouncer.log"), Signal::SIGKILL).unwrap();
    let pooler = Pooler(process);
    eventually("PgBouncer to listen", async || {
        assert!(pooler.0.is_alive(), "{}", pooler.0.last_words());
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()
    })
    .await;
    std::fs::remove_file(&file).unwrap();
    world.start_worker().await;
    Some((world, pooler))
}

#[tokio::test]
async fn a_pooler_in_transaction_mode_loses_and_doubles_nothing() {
    let test = "a_pooler_in_transaction_mode_loses_and_doubles_nothing";
    let Some((mut world, _pooler)) = behind_a_pooler(test, "", |setup| setup).await else { return };
    world.start_worker().await;
    let mut ids = post(&world, 200).await;
    ids.push(world.post("\"\\u0000\"").await.accepted());
    ids.push(world.post(fixture!("error_created")).await.accepted());
    exactly_once(&world, &ids, 0).await;
    for arguments in [&["audit"][..], &["replay", "--dry-run"], &["status"], &["check"]] {
        let ran = world.worker(arguments).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }
    world.kill_server_connections().await;
    let more = post(&world, 50).await;
    exactly_once(&world, &[ids, more].concat(), 0).await;
}
