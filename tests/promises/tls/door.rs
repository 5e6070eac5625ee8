//! The whole door over TLS; and when something about it is wrong, it says so, waits, and goes on by itself.

use std::path::{Path, PathBuf};

use local::{Scratch, ports};
use world::{Setup, World};

use super::certificates::{Authority, Pair};
use super::servers::{Operator, TlsPostgres};
use super::{refuses, takes};
use crate::{fixture, setup};

const HERE: [&str; 2] = ["localhost", "127.0.0.1"];

/// A setting of the gateway and the worker.
fn both(setup: Setup, variable: &str, value: impl AsRef<Path>) -> Setup {
    let value = value.as_ref().to_str().unwrap();
    setup.gateway(variable, value).worker(variable, value)
}

fn nats_tls(folder: &Path, pair: &Pair, clients: &Path) -> String {
    let (certificate, key) = pair.files(folder, "nats");
    format!("tls {{ cert_file: {certificate:?}, key_file: {key:?}, ca_file: {clients:?}, verify: true }}\n")
}

/// Looks at the database of another server than the world's own.
async fn look_at(world: &mut World, postgres: &TlsPostgres) {
    world.database_url = postgres.server.url();
    world.connect_sql().await;
}

#[tokio::test]
async fn a_delivery_becomes_its_rows_entirely_over_tls() {
    let (folder, ours, operator) = (Scratch::new("tls-door").unwrap(), Authority::new(), Operator::new());
    let Some(postgres) = TlsPostgres::start("a_delivery_over_tls", &ours, &ours.server(&HERE)).await else { return };
    let ca = ours.file(folder.path(), "ca.crt");
    let (certificate, key) = ours.client("door").files(folder.path(), "door");
    let port = ports::free().unwrap();
    let database = postgres.url("encrypted", "localhost", "sslmode=verify-full&channel_binding=require");
    let mut setup = setup().nats(|nats| {
        nats.port = Some(port);
        nats.extra = nats_tls(folder.path(), &ours.server(&HERE), &ca) + &operator.configuration;
    });
    for (variable, value) in [
        ("NATS_URL", &PathBuf::from(format!("tls://localhost:{port}"))),
        ("NATS_CA_FILE", &ca),
        ("NATS_CLIENT_CERT", &certificate),
        ("NATS_CLIENT_KEY", &key),
        ("NATS_CREDS_FILE", &operator.credentials_file(folder.path())),
    ] {
        setup = both(setup, variable, value);
    }
    // The system's CAs, which this variable replaces for one process (rustls-native-certs, as OpenSSL).
    let setup = setup.worker("DATABASE_URL", &database).worker("PGSSLROOTCERT", "system");
    let mut world = setup.worker("SSL_CERT_FILE", ca.to_str().unwrap()).start().await;
    look_at(&mut world, &postgres).await;

    let id = world.post(fixture!("issue_created")).await.accepted();
    world.stored(&id).await;
    world.until_confirmed().await;
    // The commands go the same way.
    let audit = world.worker(&["audit"]).await;
    assert_eq!((audit.code, audit.number("stored")), (Some(0), 1), "{audit:?}");
    assert_eq!(world.gateway_command(&["journal", "redrive", "--since", "1h"]).0, Some(0));
    for log in [world.gateway.log(), world.workers[0].log()] {
        assert!(!log.contains("SUA") && !log.contains(super::servers::PASSWORD), "{log}");
    }
}

#[tokio::test]
async fn a_nats_that_shows_or_wants_the_wrong_thing_is_told_and_waited_for() {
    let (folder, ours, theirs) = (Scratch::new("tls-nats").unwrap(), Authority::new(), Authority::new());
    let operator = Operator::new();
    let ca = ours.file(folder.path(), "ca.crt");
    let (certificate, key) = ours.client("door").files(folder.path(), "door");
    let credentials = folder.path().join("user.creds");
    std::fs::write(&credentials, Operator::new().credentials(None)).unwrap();
    let tls = |pair: &Pair| nats_tls(folder.path(), pair, &ca) + &operator.configuration;
    let mut setup = setup().nats(|nats| nats.extra = tls(&theirs.server(&HERE)));
    for (variable, value) in [
        ("NATS_CA_FILE", &ca),
        ("NATS_CLIENT_CERT", &certificate),
        ("NATS_CLIENT_KEY", &key),
        ("NATS_CREDS_FILE", &credentials),
    ] {
        setup = both(setup, variable, value);
    }
    let mut world = setup.launch().await;
    world.gateway.ready().await;
    let id = world.post(fixture!("issue_created")).await.accepted(); // the journal has it
    let address = format!("127.0.0.1:{}", world.nats.port());
    for program in [&world.gateway, &world.workers[0]] {
        refuses(program, "nats", &[&address, "no CA that is trusted here", "NATS_CA_FILE"]).await;
    }
    for (pair, words) in [
        (ours.server(&["nats.example"]), ["not for this host", "nats.example"]),
        (ours.server(&HERE), ["refuses the user in NATS_CREDS_FILE", "authorization violation"]),
    ] {
        world.nats.stop().await.unwrap();
        world.nats.options.extra = tls(&pair);
        world.nats.start_again().await.unwrap();
        for program in [&world.gateway, &world.workers[0]] {
            refuses(program, "nats", &words).await;
        }
    }
    assert_eq!(world.gateway.ops("/readyz").await.status, 200, "the gateway takes deliveries all the while");
    assert_eq!(world.workers[0].ops("/readyz").await.status, 503);
    for log in [world.gateway.log(), world.workers[0].log()] {
        let told = log.lines().filter_map(|line| line.split_once("cannot connect to NATS")).map(|(_, why)| why);
        let told: Vec<_> = told.collect();
        assert!(told.windows(2).all(|two| two[0] != two[1]), "what every attempt meets is told once: {log}");
    }

    // The right credentials in the same file: no restart.
    std::fs::write(&credentials, operator.credentials(None)).unwrap();
    world.gateway.ready().await;
    world.workers[0].ready().await;
    world.stored(&id).await;

    // And again, while it runs: the next connection logs in as whoever the file names then.
    std::fs::write(&credentials, operator.credentials(None)).unwrap();
    world.nats.kill().await;
    world.nats.start_again().await.unwrap();
    world.stored(&world.post(fixture!("issue_created")).await.accepted()).await;
}

#[tokio::test]
async fn a_postgresql_that_shows_the_wrong_certificate_is_told_and_waited_for() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let Some(mut postgres) = TlsPostgres::start("a_postgresql", &ours, &theirs.server(&HERE)).await else { return };
    let ca = ours.file(postgres.folder.path(), "ca.crt");
    let database = postgres.url("encrypted", "localhost", "sslmode=verify-full");
    let setup = setup().worker("DATABASE_URL", &database).worker("PGSSLROOTCERT", ca.to_str().unwrap());
    let mut world = setup.launch().await;
    world.gateway.ready().await;
    look_at(&mut world, &postgres).await;
    let id = world.post(fixture!("issue_created")).await.accepted();
    let address = format!("localhost:{}", postgres.server.port());
    let worker = &world.workers[0];
    refuses(worker, "database", &[&address, "verify-full", "no CA that is trusted here", "sslrootcert"]).await;
    postgres.show(&ours.server(&["db.example"])).await;
    refuses(worker, "database", &[&address, "not for this host", "db.example"]).await;
    postgres.show(&ours.server(&HERE)).await;
    takes(worker, "database").await;
    look_at(&mut world, &postgres).await;
    world.stored(&id).await;
    let log = world.workers[0].log();
    assert!(log.contains("no CA that is trusted here") && !log.contains(super::servers::PASSWORD), "{log}");
}

/// Every mistake is named at the start, with the others, and nothing of a file or a value is shown.
#[tokio::test]
async fn files_that_are_not_what_they_should_be_are_mistakes_in_the_settings() {
    let folder = Scratch::new("tls-mistakes").unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let (junk, creds) = (file("hunter2", "hunter2"), file("user.creds", &Operator::new().credentials(None)));
    let run = |program: &str, set: &[(&str, &str)]| {
        let output = std::process::Command::new(program).env_clear().envs(set.iter().copied()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{told}");
        assert!(!told.contains("hunter2") && !told.contains("SUA"), "{told}");
        told
    };
    let gateway = env!("CARGO_BIN_EXE_gateway-under-test");
    let told = run(
        gateway,
        &[
            ("NATS_CA_FILE", &junk),
            ("NATS_CREDS_FILE", &junk),
            ("NATS_CLIENT_KEY", &junk),
            ("NATS_NKEY_FILE", "/no/hunter2"),
        ],
    );
    for words in [
        "NATS_CA_FILE must be a file of certificates",
        "NATS_CREDS_FILE must be a NATS credentials file",
        "NATS_CLIENT_CERT and NATS_CLIENT_KEY go together",
        "NATS_NKEY_FILE must be a file that can be read (No such file",
        "SENTRY_CLIENT_SECRET is not set",
    ] {
        assert!(told.contains(words), "{words} is missing in {told}");
    }
    let user = nkeys::KeyPair::new_user().seed().unwrap();
    let told = run(gateway, &[("NATS_CREDS_FILE", &creds), ("NATS_NKEY_FILE", &file("nkey", &user))]);
    assert!(told.contains("NATS_CREDS_FILE and NATS_NKEY_FILE are both set"), "{told}");
    let told = run(
        env!("CARGO_BIN_EXE_worker-under-test"),
        &[("DATABASE_URL", "postgres://u:hunter2@h/d?sslmode=hunter2"), ("PGSSLROOTCERT", &junk), ("PGSSLCERT", &junk)],
    );
    for words in ["sslmode in DATABASE_URL must be one of", "PGSSLROOTCERT must be a file of certificates", "PGSSLCERT"]
    {
        assert!(told.contains(words), "{words} is missing in {told}");
    }
}
