//! PostgreSQL: each sslmode takes what it should and refuses the rest, and says why.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
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
    let Some((postgres, ours)) = TlsPostgres::shared("each_sslmode").await else { return };
    let theirs = Authority::new();
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
    let Some((postgres, ours)) = TlsPostgres::shared("a_client_certificate").await else { return };
    let theirs = Authority::new();
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
    let Some((postgres, ours)) = TlsPostgres::shared("files_that_change").await else { return };
    let theirs = Authority::new();
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
async fn over_a_unix_socket_there_is_no_tls_whatever_the_sslmode() {
    let ours = Authority::new();
    let Some(mut postgres) = TlsPostgres::start("over_a_unix_socket", &ours, &ours.server(&HERE)).await else { return };
    let socket = postgres.server.home().join("data").display().to_string();
    if socket.len() > 80 {
        world::skipped("over_a_unix_socket", "the path of a socket may not be as long as this folder's");
        return;
    }
    postgres.server.options.settings.push(("unix_socket_directories".into(), socket.clone()));
    postgres.show(&ours.server(&HERE)).await;
    let ca = ours.file(postgres.folder.path(), "ca.crt");
    let port = postgres.server.port();
    let url = |host: &str| {
        let parameters = format!("sslmode=verify-full sslrootcert={}", ca.display());
        format!("host={host} port={port} user=plain password={PASSWORD} dbname=postgres {parameters}")
    };
    connects(&url(&socket)).await.unwrap();
    says(connects(&url("localhost")).await, &["28000"]); // the role that comes in without TLS only
    // Of several servers each is tried its own way, and the first that takes us will do.
    connects(&url(&format!("localhost,{socket}"))).await.unwrap();
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

/// A server on `address` that declines TLS (`N`) or breaks it off (`S`), and asks for the password: in clear (3) or hashed
/// with MD5 (5). Gives its port, and the answers of its clients, login by login.
async fn asks_for_the_password(address: IpAddr, tls: u8, how: u8) -> (u16, Arc<Mutex<Vec<Vec<u8>>>>) {
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = Arc::<Mutex<Vec<Vec<u8>>>>::default();
    let told = heard.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            if let Ok(answer) = ask(client, tls, how).await {
                told.lock().unwrap().push(answer);
            }
        }
    });
    (port, heard)
}

/// Serves one client and gives its answer. <https://www.postgresql.org/docs/current/protocol-message-formats.html>
async fn ask(mut client: TcpStream, tls: u8, how: u8) -> std::io::Result<Vec<u8>> {
    const SSL_REQUEST: u32 = 80_877_103;
    loop {
        let length = client.read_u32().await?;
        let mut message = vec![0; length as usize - 4];
        client.read_exact(&mut message).await?;
        if message[..4] != SSL_REQUEST.to_be_bytes() {
            break; // that was the start-up message
        }
        client.write_all(&[tls]).await?;
        if tls == b'S' {
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
    }
    let salt: &[u8] = if how == 5 { b"salt" } else { b"" };
    client.write_all(b"R").await?;
    client.write_u32(8 + salt.len() as u32).await?;
    client.write_u32(how.into()).await?;
    client.write_all(salt).await?;
    let mut answer = vec![0; 256];
    let length = client.read(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

#[tokio::test]
async fn a_password_goes_to_another_machine_encrypted_or_not_at_all() {
    let Some(address) = world::own_address() else {
        return world::skipped("a_password_goes_encrypted", "this machine has no address but loopback");
    };
    for (tls, how) in [(b'N', 3), (b'N', 5), (b'S', 3)] {
        let (port, heard) = asks_for_the_password(address, tls, how).await;
        let url = |parameters: &str| format!("postgres://door:{PASSWORD}@{address}:{port}/door?{parameters}");
        for parameters in ["", "sslmode=prefer", "sslmode=allow", "sslmode=require"] {
            let refused = connects(&url(parameters)).await;
            assert_eq!(*heard.lock().unwrap(), Vec::<Vec<u8>>::new(), "the password, with {parameters:?}");
            says(refused, &["TLS", "sslmode"]);
        }
        if tls == b'N' {
            says(connects(&url("sslmode=prefer")).await, &["password", "sslmode=disable"]);
        }
        // The operator allows it. The server ends the connection after it has the password.
        assert!(connects(&url("sslmode=disable")).await.is_err());
        let sent = heard.lock().unwrap().remove(0);
        assert_eq!((sent[0], sent.windows(PASSWORD.len()).any(|part| part == PASSWORD.as_bytes())), (b'p', how == 3));
        // A login without a password has no password to lose.
        let without = url("sslmode=allow").replace(&format!(":{PASSWORD}"), "");
        says(connects(&without).await, &["password missing"]);
    }
    // On this machine nothing changes.
    let (port, heard) = asks_for_the_password("127.0.0.1".parse().unwrap(), b'N', 3).await;
    for host in ["127.0.0.1", "localhost"] {
        assert!(connects(&format!("postgres://door:{PASSWORD}@{host}:{port}/door?sslmode=prefer")).await.is_err());
        assert_eq!(heard.lock().unwrap().remove(0)[0], b'p', "{host}");
    }
}

#[tokio::test]
async fn a_server_on_another_address_is_reached_as_its_sslmode_says() {
    let Some((postgres, _)) = TlsPostgres::shared("a_server_on_another_address").await else { return };
    let Some(address) = world::own_address() else {
        return world::skipped("a_server_on_another_address", "this machine has no address but loopback");
    };
    let address = address.to_string();
    let as_role =
        async |role: &str, mode: &str| connects(&postgres.url(role, &address, &format!("sslmode={mode}"))).await;
    for mode in ["require", "prefer", "allow"] {
        as_role("encrypted", mode).await.unwrap();
        assert!(as_role("plain", mode).await.is_err(), "{mode}");
    }
    connects(&postgres.url("encrypted", &address, "")).await.unwrap();
    as_role("plain", "disable").await.unwrap();
}
