//! The servers that these tests need: a PostgreSQL that does TLS, and NATS with an operator.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use local::{Postgres, PostgresOptions, Programs, Scratch};
use nkeys::KeyPair;
use serde_json::json;
use tokio::sync::OnceCell;
use world::programs;

use super::certificates::{Authority, Pair};

/// The password of all roles.
pub(super) const PASSWORD: &str = "the-password-of-the-tests";

/// Who may come how. <https://www.postgresql.org/docs/current/auth-pg-hba-conf.html>
const HBA: &str = "\
    local     all plain                  scram-sha-256\n\
    host      all loop      127.0.0.1/32 trust\n\
    hostssl   all encrypted samehost     scram-sha-256\n\
    hostnossl all plain     samehost     scram-sha-256\n\
    host      all anyhow    127.0.0.1/32 scram-sha-256\n\
    hostssl   all certified 127.0.0.1/32 scram-sha-256 clientcert=verify-full\n";

/// A PostgreSQL that does TLS. The roles `encrypted`, `plain`, `anyhow` and `certified` come in as `HBA` says, so that who
/// is in shows how; the superuser `loop` comes in any way.
pub(super) struct TlsPostgres {
    pub(super) server: Postgres,
    pub(super) folder: Scratch,
}

impl TlsPostgres {
    /// One for all tests that leave it as it is, and the CA behind it, with a certificate for this machine. Ended by the
    /// watchdog, with its folder, when the process ends.
    pub(super) async fn shared(test: &str) -> Option<(&'static TlsPostgres, &'static Authority)> {
        static SHARED: OnceCell<Option<(TlsPostgres, Authority)>> = OnceCell::const_new();
        let start = async || {
            let ours = Authority::new();
            Some((TlsPostgres::launch(&ours, &ours.server(&["localhost", "127.0.0.1"])).await?, ours))
        };
        let shared = SHARED.get_or_init(start).await.as_ref();
        if shared.is_none() {
            no_openssl(test);
        }
        shared.map(|(postgres, ours)| (postgres, ours))
    }

    /// Starts one that shows this certificate and takes clients of `clients`. None, and told, where this machine has no
    /// PostgreSQL with OpenSSL (the pinned build has none).
    pub(super) async fn start(test: &str, clients: &Authority, shown: &Pair) -> Option<TlsPostgres> {
        let started = TlsPostgres::launch(clients, shown).await;
        if started.is_none() {
            no_openssl(test);
        }
        started
    }

    async fn launch(clients: &Authority, shown: &Pair) -> Option<TlsPostgres> {
        let programs = programs().with_tls()?;
        let folder = Scratch::new("tls").unwrap();
        let server = start(&programs, folder.path()).await;
        let mut server = TlsPostgres { server, folder };
        let roles = ["encrypted", "plain", "anyhow", "certified"];
        let roles = roles.map(|role| format!("CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{PASSWORD}';"));
        server.execute(&roles.concat()).await;
        let home = server.server.home().to_owned();
        let file = |name: &str| home.join(name).display().to_string();
        std::fs::write(home.join("hba.conf"), HBA).unwrap();
        clients.file(&home, "clients.crt");
        let own = world::own_address().map(|address| format!(",{address}")).unwrap_or_default();
        let listen = format!("127.0.0.1{own}");
        let settings = [
            ("ssl", "on".to_owned()),
            ("ssl_cert_file", file("server.crt")),
            ("ssl_key_file", file("server.key")),
            ("ssl_ca_file", file("clients.crt")),
            ("hba_file", file("hba.conf")),
            ("listen_addresses", listen),
        ];
        server.server.options.settings = settings.map(|(name, value)| (name.to_owned(), value)).into();
        server.show(shown).await;
        Some(server)
    }

    /// Restarts it with another certificate.
    pub(super) async fn show(&mut self, pair: &Pair) {
        self.server.stop().await.unwrap();
        let (certificate, key) = pair.files(self.server.home(), "server");
        // The server insists that the key is its own and nobody else's.
        let owner = std::fs::metadata(self.server.home().join("data")).unwrap();
        chown(&key, Some(owner.uid()), Some(owner.gid())).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::set_permissions(&certificate, std::fs::Permissions::from_mode(0o644)).unwrap();
        self.server.start_again().await.unwrap();
    }

    /// As the superuser, without TLS.
    pub(super) async fn execute(&self, sql: &str) {
        let (client, connection) = tokio_postgres::connect(&self.server.url(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute(sql).await.unwrap();
    }

    /// `postgres://...` of the database `postgres`.
    pub(super) fn url(&self, role: &str, host: &str, parameters: &str) -> String {
        format!("postgres://{role}:{PASSWORD}@{host}:{}/postgres?{parameters}", self.server.port())
    }
}

fn no_openssl(test: &str) {
    world::skipped(test, "no PostgreSQL here does TLS: apt install postgresql");
}

async fn start(programs: &Programs, folder: &Path) -> Postgres {
    Postgres::start(programs, PostgresOptions::for_tests(folder.join("postgres"))).await.unwrap()
}

/// NATS's decentralised authentication: an operator whose accounts stand in the server's configuration, and whose users
/// come with a JWT. <https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/jwt>
pub(super) struct Operator {
    account: KeyPair,
    /// What the server's configuration needs.
    pub(super) configuration: String,
}

impl Operator {
    pub(super) fn new() -> Operator {
        let (operator, account, system) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
        let own = jwt(&operator, &operator, json!({ "type": "operator", "version": 2 }), None);
        let limits = json!({ "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
            "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1 });
        let with_jetstream =
            jwt(&operator, &account, json!({ "type": "account", "version": 2, "limits": limits }), None);
        let without = json!({ "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
            "conn": -1, "leaf": -1 });
        let for_system = jwt(&operator, &system, json!({ "type": "account", "version": 2, "limits": without }), None);
        let (named, system) = (account.public_key(), system.public_key());
        let configuration = format!(
            "operator: {own}\nsystem_account: {system}\nresolver: MEMORY\n\
             resolver_preload {{\n  {named}: {with_jetstream}\n  {system}: {for_system}\n}}\n"
        );
        Operator { account, configuration }
    }

    /// The credentials of a new user, as `nsc generate creds` writes them. `expires`: in seconds since 1970.
    pub(super) fn credentials(&self, expires: Option<i64>) -> String {
        let user = KeyPair::new_user();
        let claims = json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 });
        let jwt = jwt(&self.account, &user, claims, expires);
        let seed = user.seed().unwrap();
        format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
             ************************* IMPORTANT *************************\n\
             NKEY Seed printed below can be used to sign and prove identity.\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
    }

    pub(super) fn credentials_file(&self, folder: &Path) -> PathBuf {
        let file = folder.join("user.creds");
        std::fs::write(&file, self.credentials(None)).unwrap();
        file
    }
}

fn jwt(issuer: &KeyPair, subject: &KeyPair, claims: serde_json::Value, expires: Option<i64>) -> String {
    let mut all = json!({ "jti": uuid::Uuid::now_v7().to_string(), "iat": 1_700_000_000, "iss": issuer.public_key(),
        "name": "a test", "sub": subject.public_key(), "nats": claims });
    if let Some(expires) = expires {
        all["exp"] = expires.into();
    }
    let part = |json: &serde_json::Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let signed = format!("{}.{}", part(&json!({ "typ": "JWT", "alg": "ed25519-nkey" })), part(&all));
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}
