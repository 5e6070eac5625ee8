//! NATS: who is trusted and who we are, and what is told where either fails.

use std::path::Path;

use local::{NatsOptions, NatsServer, Scratch};
use nkeys::KeyPair;
use shared::settings::Reader;
use shared::stream::NatsSettings;
use world::programs;

use super::certificates::{Authority, Pair};
use super::servers::Operator;

const HERE: [&str; 2] = ["localhost", "127.0.0.1"];

/// A server with these lines in its configuration.
async fn server(folder: &Scratch, extra: &str) -> NatsServer {
    let options = NatsOptions { extra: extra.to_owned(), ..NatsOptions::new(folder.path().join("nats")) };
    NatsServer::start(programs(), options).await.unwrap()
}

/// <https://docs.nats.io/running-a-nats-service/configuration/securing_nats/tls>
fn tls(folder: &Path, pair: &Pair, clients: Option<&Authority>) -> String {
    let (certificate, key) = pair.files(folder, "server");
    let verified = clients.map(|ca| format!("ca_file: {:?}, verify: true", ca.file(folder, "clients.crt")));
    format!("tls {{ cert_file: {certificate:?}, key_file: {key:?}, {} }}\n", verified.unwrap_or_default())
}

/// Connects once, with these settings: whether it worked, or what is told.
async fn connects(url: &str, files: &[(&str, &Path)]) -> Result<(), String> {
    once(&settings(url, files)?).await
}

async fn once(settings: &NatsSettings) -> Result<(), String> {
    let client = settings.try_connect("a test").await.map_err(|error| error.to_string())?;
    client.flush().await.map_err(|error| error.to_string())
}

fn settings(url: &str, files: &[(&str, &Path)]) -> Result<NatsSettings, String> {
    let lookup = |variable: &str| match variable {
        "NATS_URL" => Some(url.to_owned()),
        _ => files.iter().find(|(name, _)| *name == variable).map(|(_, file)| file.display().to_string()),
    };
    let mut reader = Reader::new(&lookup);
    let settings = NatsSettings::read(&mut reader);
    reader.finish(settings).map_err(|mistakes| format!("settings: {mistakes}"))
}

fn says(outcome: Result<(), String>, words: &[&str]) {
    let error = outcome.expect_err("it should be refused");
    assert!(words.iter().all(|word| error.contains(word)), "{words:?} should be in: {error}");
}

#[tokio::test]
async fn a_server_is_trusted_if_the_ca_file_says_so_and_its_name_fits() {
    let (folder, ours, theirs) = (Scratch::new("nats-tls").unwrap(), Authority::new(), Authority::new());
    let (right, wrong) = (ours.file(folder.path(), "ca.crt"), theirs.file(folder.path(), "other-ca.crt"));
    let mut nats = server(&folder, &tls(folder.path(), &ours.server(&HERE), None)).await;
    let encrypted = format!("tls://localhost:{}", nats.port());
    let named = format!("127.0.0.1:{}", nats.port());
    for url in [nats.url(), encrypted.clone()] {
        connects(&url, &[("NATS_CA_FILE", &right)]).await.unwrap();
        let unknown = ["no CA that is trusted here", "NATS_CA_FILE"];
        says(connects(&url, &[("NATS_CA_FILE", &wrong)]).await, &unknown);
        says(connects(&url, &[]).await, &unknown); // the system's CAs
    }
    says(connects(&nats.url(), &[("NATS_CA_FILE", &wrong)]).await, &[&named]);

    nats.options.extra = tls(folder.path(), &ours.server(&["nats.example"]), None);
    nats.stop().await.unwrap();
    nats.start_again().await.unwrap();
    says(connects(&encrypted, &[("NATS_CA_FILE", &right)]).await, &["not for this host", "nats.example", "localhost"]);

    // Who names a CA wants TLS: nothing is sent to a server that has none.
    nats.options.extra = String::new();
    nats.stop().await.unwrap();
    nats.start_again().await.unwrap();
    connects(&nats.url(), &[]).await.unwrap();
    says(connects(&nats.url(), &[("NATS_CA_FILE", &right)]).await, &["does not speak TLS"]);
    says(connects(&encrypted, &[]).await, &["does not speak TLS"]);
}

#[tokio::test]
async fn a_client_certificate_is_shown_where_the_server_wants_one() {
    let (folder, ours, theirs) = (Scratch::new("nats-mtls").unwrap(), Authority::new(), Authority::new());
    let ca = ours.file(folder.path(), "ca.crt");
    let nats = server(&folder, &tls(folder.path(), &ours.server(&HERE), Some(&ours))).await;
    let with = async |pair: &Pair, name: &str| {
        let (certificate, key) = pair.files(folder.path(), name);
        let files: [(&str, &Path); 3] =
            [("NATS_CA_FILE", &ca), ("NATS_CLIENT_CERT", &certificate), ("NATS_CLIENT_KEY", &key)];
        connects(&nats.url(), &files).await
    };
    with(&ours.client("door"), "door").await.unwrap();
    says(with(&theirs.client("door"), "stranger").await, &["client certificate", "NATS_CLIENT_CERT"]);
    says(connects(&nats.url(), &[("NATS_CA_FILE", &ca)]).await, &["client certificate", "NATS_CLIENT_CERT"]);
    let mixed = Pair { certificate: ours.client("door").certificate, key: ours.client("door").key };
    says(with(&mixed, "mixed").await, &["settings", "NATS_CLIENT_KEY", "another's"]);
}

#[tokio::test]
async fn files_that_change_are_read_at_the_next_connection() {
    let (folder, ours, theirs) = (Scratch::new("nats-rotation").unwrap(), Authority::new(), Authority::new());
    let nats = server(&folder, &tls(folder.path(), &ours.server(&HERE), Some(&ours))).await;
    let ca = theirs.file(folder.path(), "ca.crt");
    let (certificate, key) = theirs.client("door").files(folder.path(), "door");
    let files: [(&str, &Path); 3] =
        [("NATS_CA_FILE", &ca), ("NATS_CLIENT_CERT", &certificate), ("NATS_CLIENT_KEY", &key)];
    let settings = settings(&nats.url(), &files).unwrap();
    says(once(&settings).await, &["no CA that is trusted here"]);
    ours.file(folder.path(), "ca.crt");
    says(once(&settings).await, &["does not accept our client certificate"]);
    ours.client("door").files(folder.path(), "door");
    once(&settings).await.unwrap();
    // One that is spoilt later on is told by its name.
    std::fs::write(&key, "hunter2").unwrap();
    let told = once(&settings).await.unwrap_err();
    says(Err(told.clone()), &["NATS_CLIENT_KEY must be a private key"]);
    assert!(!told.contains("hunter2"), "{told}");
    std::fs::remove_file(&ca).unwrap();
    says(once(&settings).await, &["NATS_CA_FILE must be a file that can be read"]);
}

#[tokio::test]
async fn an_nkey_logs_in_if_the_server_knows_it() {
    let folder = Scratch::new("nats-nkey").unwrap();
    let (known, unknown) = (KeyPair::new_user(), KeyPair::new_user());
    let nats = server(&folder, &format!("authorization {{ users: [ {{ nkey: {} }} ] }}", known.public_key())).await;
    let file = |name: &str, key: &KeyPair| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("{}\n", key.seed().unwrap())).unwrap();
        path
    };
    connects(&nats.url(), &[("NATS_NKEY_FILE", &file("known", &known))]).await.unwrap();
    says(
        connects(&nats.url(), &[("NATS_NKEY_FILE", &file("unknown", &unknown))]).await,
        &["refuses the key in NATS_NKEY_FILE"],
    );
    says(connects(&nats.url(), &[]).await, &["wants a login", "NATS_CREDS_FILE"]);
    let account = file("account", &KeyPair::new_account());
    says(connects(&nats.url(), &[("NATS_NKEY_FILE", &account)]).await, &["settings", "NATS_NKEY_FILE", "user nkey"]);
}

#[tokio::test]
async fn credentials_log_in_if_the_operator_stands_behind_them() {
    let (folder, ours, theirs) = (Scratch::new("nats-creds").unwrap(), Operator::new(), Operator::new());
    let nats = server(&folder, &ours.configuration).await;
    let with = async |credentials: &str| {
        let file = folder.path().join("user.creds");
        std::fs::write(&file, credentials).unwrap();
        connects(&nats.url(), &[("NATS_CREDS_FILE", &file)]).await
    };
    with(&ours.credentials(None)).await.unwrap();
    with(&ours.credentials(Some(4_000_000_000))).await.unwrap();
    says(with(&theirs.credentials(None)).await, &["refuses the user in NATS_CREDS_FILE"]);
    says(with(&ours.credentials(Some(1_700_000_000))).await, &["expired at 2023-11-14T22:13:20Z"]);
    // A JWT with another's key is a mistake that no server need be asked about; and nothing of either is shown.
    let (one, other) = (ours.credentials(None), ours.credentials(None));
    let mixed = one.split("-----BEGIN USER").next().unwrap().to_owned()
        + "-----BEGIN USER"
        + other.split("-----BEGIN USER").nth(1).unwrap();
    let told = with(&mixed).await.unwrap_err();
    says(Err(told.clone()), &["settings", "NATS_CREDS_FILE", "not that of its user JWT"]);
    assert!(!told.contains("SU") && !told.contains("eyJ"), "{told}");
}
