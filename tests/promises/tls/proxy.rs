//! The nginx that the README shows, word for word, before a gateway.

use std::process::Command;
use std::sync::Arc;

use local::process::Process;
use local::{Scratch, ports};
use nix::sys::signal::Signal;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use world::{SECRET, eventually, sign};

use super::certificates::Authority;
use crate::{fixture, setup};

/// The block of nginx's configuration in the README, with this test's ports and files in place of the example's.
fn from_the_readme(public: u16, gateway: u16, certificate: &str, key: &str) -> String {
    let readme = include_str!("../../../README.md");
    let block = readme.split("```nginx\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let places = [
        ("server 127.0.0.1:8080;", format!("server 127.0.0.1:{gateway};")),
        ("listen 443 ssl;", format!("listen 127.0.0.1:{public} ssl;")),
        ("/etc/nginx/tls/tls.crt", certificate.to_owned()),
        ("/etc/nginx/tls/tls.key", key.to_owned()),
    ];
    places.iter().fold(block.to_owned(), |block, (example, ours)| {
        assert!(block.contains(example), "the README's nginx has no `{example}`");
        block.replace(example, ours)
    })
}

/// Posts a signed body through TLS and gives the status line and the body of the answer.
async fn post(tls: &TlsConnector, port: u16, request_id: &str, body: &str) -> Option<(String, String)> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    let name = ServerName::try_from("loop.example.com").unwrap();
    let (mut from, mut to) = tokio::io::split(tls.connect(name, stream).await.ok()?);
    let head = format!(
        "POST /api/signals/sentry HTTP/1.1\r\nHost: loop.example.com\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nRequest-ID: {request_id}\r\nSentry-Hook-Resource: issue\r\n\
         Sentry-Hook-Signature: {}\r\nConnection: close\r\n\r\n",
        body.len(),
        sign(SECRET, body.as_bytes())
    );
    let send = async {
        to.write_all(head.as_bytes()).await.ok()?;
        to.write_all(body.as_bytes()).await.ok()?;
        to.flush().await.ok()
    };
    let mut answer = Vec::new();
    // A proxy that refuses need not read to the end; what counts is its answer.
    let (_, _) = tokio::join!(send, from.read_to_end(&mut answer));
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.lines().next()?.to_owned(), body.to_owned()))
}

#[tokio::test]
async fn the_nginx_of_the_readme_brings_deliveries_to_the_gateway() {
    if Command::new("nginx").arg("-v").output().is_err() {
        world::skipped("the_nginx_of_the_readme", "no nginx here: apt install nginx-light");
        return;
    }
    let world = setup().start().await;
    let (folder, ours) = (Scratch::new("nginx").unwrap(), Authority::new());
    let (certificate, key) = ours.server(&["loop.example.com"]).files(folder.path(), "tls");
    let public = ports::free().unwrap();
    let block = from_the_readme(public, world.port(), certificate.to_str().unwrap(), key.to_str().unwrap());
    let place = folder.path().display();
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let temporary = temporary.map(|what| format!("{what}_temp_path {place}/{what};\n")).concat();
    // One process, so that none is left behind when it is killed.
    let main = format!(
        "daemon off; master_process off; pid {place}/nginx.pid; error_log stderr;\nevents {{}}\n\
         http {{\naccess_log off;\n{temporary}{block}}}\n"
    );
    let file = folder.path().join("nginx.conf");
    std::fs::write(&file, main).unwrap();
    let nginx = || {
        let mut command = Command::new("nginx");
        command.arg("-p").arg(folder.path()).arg("-c").arg(&file);
        command
    };
    let checked = nginx().arg("-t").output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let _nginx = Process::spawn("nginx", nginx(), &folder.path().join("nginx.log"), Signal::SIGTERM).unwrap();

    let roots = shared::tls::roots(&ours.file(folder.path(), "ca.crt")).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(shared::tls::provider());
    let config = config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let tls = TlsConnector::from(Arc::new(config.with_no_client_auth()));
    let body = fixture!("issue_created");
    let (status, first) = eventually("nginx to answer", || post(&tls, public, "one", body)).await;
    assert!(status.contains(" 202 "), "{status} {first}");
    let delivery = |answer: &str| -> String {
        let answer: serde_json::Value = serde_json::from_str(answer).unwrap();
        answer["data"]["deliveryId"].as_str().unwrap().to_owned()
    };
    world.stored(&delivery(&first)).await;
    // Request-ID comes through: the same request again is the same delivery.
    let (_, again) = post(&tls, public, "one", body).await.unwrap();
    let (_, another) = post(&tls, public, "two", body).await.unwrap();
    assert_eq!(delivery(&first), delivery(&again));
    assert_ne!(delivery(&first), delivery(&another));
    // The largest body, and one byte more.
    let of_size = |size: usize| format!(r#"{{"data":"{}"}}"#, "x".repeat(size - 11));
    let (status, answer) = post(&tls, public, "large", &of_size(8 << 20)).await.unwrap();
    assert!(status.contains(" 202 "), "{status} {answer}");
    let (status, _) = post(&tls, public, "too-large", &of_size((8 << 20) + 1)).await.unwrap();
    assert!(status.contains(" 413 "), "{status}");
}
