//! PostgreSQL: each sslmode takes what it should and refuses the rest, and says why.

use std::path::Path;

use worker::store::{DatabaseUrl, Store};

use super::certificates::{Authority, Pair};
use super::servers::{PASSWORD, TlsPostgres};

const HERE: [&str; 2] = ["localhost", "127.0.0.1"];

/// Connects once, as the worker does: whether it is in, or what is told.
async fn connects(url: &str) -> Result<(), String> {
    connects_with(url, &[]).await
}

async fn connects_with(url: &str, variables: &[(&str, &str)]) -> Result<(), String> {
    let variable = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
    let url = DatabaseUrl::read(url, variable).map_err(|mistake| format!("settings: {mistake}"))?;
    let told = Store::new(&url, 1).ping().await;
    told.map_err(|error| {
        assert!(error.is_outage(), "somebody can mend it: {error}");
        assert!(!error.to_string().contains(PASSWORD), "{error}");
        error.to_string()
    })
}

fn says(outcome: Result<(), String>, words: &[&str]) {
    let error = outcome.expect_err("it should be refused");
    assert!(words.iter().all(|word| error.contains(word)), "{words:?} should be in: {error}");
}

fn root(file: &Path) -> String {
    format!("&sslrootcert={}", file.display())
}

#[tokio::test]
async fn each_sslmode_encrypts_and_trusts_as_libpq_says() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let Some(postgres) = TlsPostgres::start("each_sslmode", &ours, &ours.server(&HERE)).await else { return };
    let folder = postgres.folder.path();
    let (right, wrong) = (root(&ours.file(folder, "ca.crt")), root(&theirs.file(folder, "other-ca.crt")));
    let as_role = |role: &str, host: &str, mode: &str, more: &str| {
        let url = postgres.url(role, host, &format!("sslmode={mode}{more}"));
        async move { connects(&url).await }
    };
    const UNKNOWN_CA: [&str; 2] = ["no CA that is trusted here", "sslrootcert"];

    // The role comes in encrypted only: who is in is encrypted.
    as_role("encrypted", "localhost", "verify-full", &right).await.unwrap();
    as_role("encrypted", "127.0.0.1", "verify-full", &right).await.unwrap();
    says(as_role("encrypted", "localhost", "verify-full", &wrong).await, &UNKNOWN_CA);
    as_role("encrypted", "localhost", "verify-ca", &right).await.unwrap();
    says(as_role("encrypted", "localhost", "verify-ca", &wrong).await, &UNKNOWN_CA);
    as_role("encrypted", "localhost", "require", "").await.unwrap();
    as_role("encrypted", "localhost", "require", &right).await.unwrap();
    says(as_role("encrypted", "localhost", "require", &wrong).await, &UNKNOWN_CA);
    for mode in ["allow", "prefer"] {
        as_role("encrypted", "localhost", mode, "").await.unwrap();
        as_role("plain", "localhost", mode, "").await.unwrap();
    }
    connects(&postgres.url("encrypted", "localhost", "")).await.expect("prefer is the default");
    says(as_role("encrypted", "localhost", "disable", "").await, &["no encryption", "sslmode must be require"]);
    as_role("plain", "localhost", "disable", "").await.unwrap();
    says(as_role("plain", "localhost", "require", "").await, &["28000"]);

    // prefer goes on without TLS where the handshake fails, and only if the server takes that.
    as_role("anyhow", "localhost", "prefer", &wrong).await.unwrap();
    says(as_role("encrypted", "localhost", "prefer", &wrong).await, &UNKNOWN_CA);

    // SCRAM bound to the TLS channel, and a wrong password.
    as_role("encrypted", "localhost", "verify-full", &format!("{right}&channel_binding=require")).await.unwrap();
    let url = postgres.url("encrypted", "localhost", &format!("sslmode=require{right}"));
    says(connects(&url.replace(PASSWORD, "hunter2")).await, &["28P01"]);

    // The other form, and an address besides the name.
    let ca = folder.join("ca.crt");
    let pairs = |host: &str| {
        let port = postgres.server.port();
        format!(
            "host={host} hostaddr=127.0.0.1 port={port} user=encrypted password={PASSWORD} dbname=postgres \
             sslmode=verify-full sslrootcert='{}'",
            ca.display()
        )
    };
    connects(&pairs("localhost")).await.unwrap();
    says(connects(&pairs("db.example")).await, &["db.example", "not for this host", "verify-full"]);
    let nameless = pairs("localhost").replace("host=localhost", "").replace("verify-full", "verify-ca");
    connects(&nameless).await.unwrap();

    // libpq's variables, for what the URL leaves open.
    let (bare, ca) = (postgres.url("encrypted", "localhost", ""), ca.display().to_string());
    let other = folder.join("other-ca.crt").display().to_string();
    let with = |ca| [("PGSSLMODE", "verify-full"), ("PGSSLROOTCERT", ca)];
    connects_with(&bare, &with(&ca)).await.unwrap();
    says(connects_with(&bare, &with(&other)).await, &UNKNOWN_CA);
    connects_with(&postgres.url("plain", "localhost", "sslmode=disable"), &with(&other)).await.unwrap();
    says(connects_with(&bare, &[("PGSSLMODE", "verify-ca")]).await, &["settings", "PGSSLROOTCERT"]);
}

#[tokio::test]
async fn a_certificate_must_be_for_the_host_where_verify_full_says_so_and_only_there() {
    let ours = Authority::new();
    let Some(mut postgres) = TlsPostgres::start("a_certificate", &ours, &ours.server(&["db.example"])).await else {
        return;
    };
    let right = root(&ours.file(postgres.folder.path(), "ca.crt"));
    let url = |host: &str, mode: &str, roots: &str| postgres.url("encrypted", host, &format!("sslmode={mode}{roots}"));
    says(connects(&url("localhost", "verify-full", &right)).await, &["localhost", "not for this host", "db.example"]);
    connects(&url("localhost", "verify-ca", &right)).await.unwrap();
    let behind_an_address = format!("{right}&hostaddr=127.0.0.1");
    connects(&url("db.example", "verify-full", &behind_an_address)).await.unwrap();

    postgres.show(&ours.expired(&HERE)).await;
    let url = |host: &str, mode: &str, roots: &str| postgres.url("encrypted", host, &format!("sslmode={mode}{roots}"));
    says(connects(&url("localhost", "verify-ca", &right)).await, &["expired", "renew"]);
    connects(&url("localhost", "require", "")).await.unwrap();

    // As PostgreSQL's manual makes it: its own CA, a common name and no subjectAltName.
    let own = Pair::self_signed("localhost");
    postgres.show(&own).await;
    let url = |host: &str, mode: &str, roots: &str| postgres.url("encrypted", host, &format!("sslmode={mode}{roots}"));
    let pinned = root(&own.files(postgres.folder.path(), "own").0);
    connects(&url("localhost", "verify-full", &pinned)).await.unwrap();
    connects(&url("127.0.0.1", "verify-ca", &pinned)).await.unwrap();
    says(connects(&url("127.0.0.1", "verify-full", &pinned)).await, &["not for this host"]);
    let another = root(&Pair::self_signed("localhost").files(postgres.folder.path(), "another").0);
    says(connects(&url("localhost", "verify-ca", &another)).await, &["sslrootcert", "must hold exactly that one"]);
    says(connects(&url("localhost", "verify-full", &right)).await, &["sslrootcert"]);
}

#[tokio::test]
async fn a_client_certificate_is_shown_where_the_server_wants_one() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let Some(postgres) = TlsPostgres::start("a_client_certificate", &ours, &ours.server(&HERE)).await else { return };
    let folder = postgres.folder.path();
    let with = |pair: &Pair, name: &str| {
        let (certificate, key) = pair.files(folder, name);
        let parameters = format!("sslmode=require&sslcert={}&sslkey={}", certificate.display(), key.display());
        postgres.url("certified", "localhost", &parameters)
    };
    connects(&with(&ours.client("certified"), "right")).await.unwrap();
    connects(&with(&ours.client("certified").with_sec1_key(), "older")).await.unwrap();
    says(
        connects(&postgres.url("certified", "localhost", "sslmode=require")).await,
        &["client certificate", "PGSSLCERT"],
    );
    says(connects(&with(&ours.client("somebody"), "somebody")).await, &["SQLSTATE 28"]);
    says(connects(&with(&theirs.client("certified"), "theirs")).await, &["does not accept our client certificate"]);
    // Both halves, and of one certificate.
    let (mine, other) = (ours.client("certified"), ours.client("certified"));
    let mixed = Pair { certificate: mine.certificate, key: other.key };
    says(connects(&with(&mixed, "mixed")).await, &["settings", "sslkey", "another's"]);
}

#[tokio::test]
async fn files_that_change_are_read_at_the_next_connection() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let Some(postgres) = TlsPostgres::start("files_that_change", &ours, &ours.server(&HERE)).await else { return };
    let folder = postgres.folder.path();
    let ca = theirs.file(folder, "rotated.crt");
    let (certificate, key) = theirs.client("certified").files(folder, "door");
    let client = format!("&sslcert={}&sslkey={}", certificate.display(), key.display());
    let url = postgres.url("certified", "localhost", &format!("sslmode=verify-full{}{client}", root(&ca)));
    let store = Store::new(&url.parse().unwrap(), 1);
    let ping = async || store.ping().await.map_err(|error| error.to_string());
    says(ping().await, &["no CA that is trusted here"]);
    ours.file(folder, "rotated.crt");
    says(ping().await, &["does not accept our client certificate"]);
    ours.client("certified").files(folder, "door");
    ping().await.unwrap();
    // One that is spoilt later on is told by its name, and open connections go on.
    std::fs::write(&key, "hunter2").unwrap();
    ping().await.unwrap();
    let told = Store::new(&url.replace(&client, "").parse().unwrap(), 1).ping().await.unwrap_err().to_string();
    assert!(told.contains("client certificate"), "{told}");
}

#[tokio::test]
async fn a_server_that_does_no_tls_is_for_those_who_allow_it() {
    let server = world::postgres().await; // the pinned build has no OpenSSL
    let url = |mode: &str| format!("{}?sslmode={mode}", server.url());
    for mode in ["disable", "allow", "prefer"] {
        connects(&url(mode)).await.unwrap();
    }
    says(connects(&url("require")).await, &["does no TLS", "sslmode"]);
}
