//! A client secret is rotated by changing a file, under load, without a restart and without one 401.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use local::Scratch;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use sha2::{Digest as _, Sha256};
use world::{Connection, Post, SECRET, World, eventually, sign};

use crate::{fixture, setup};

const NEXT: &str = "the-next-client-secret";
const BODY: &str = fixture!("issue_created");

/// Mounts a version of a secret as Kubernetes does: a directory of its own, and the link `..data` swapped onto it.
fn mount(folder: &Path, version: &str, content: &str) {
    std::fs::create_dir(folder.join(version)).unwrap();
    std::fs::write(folder.join(version).join("secret"), content).unwrap();
    symlink(version, folder.join("..data_tmp")).unwrap();
    std::fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
}

fn signed(secret: &str) -> Post {
    Post::unsigned(BODY).header("Sentry-Hook-Signature", &sign(secret, BODY.as_bytes()))
}

/// Waits until the readiness of the secrets is as told: whether good, and what it says.
async fn secrets_are(world: &World, ok: bool, says: &str) {
    eventually(&format!("the secrets to be {says}"), || async {
        let list = world.gateway.ops("/readyz").await.json();
        let check = list.as_array()?.iter().find(|entry| entry["name"] == "secrets")?.clone();
        (check["ok"] == ok && check["detail"].as_str()?.contains(says)).then_some(())
    })
    .await;
}

async fn post_until(port: u16, stop: Arc<AtomicBool>, secret: Arc<AtomicUsize>) -> (usize, Vec<u16>) {
    let (mut accepted, mut refused) = (0, Vec::new());
    let mut connection = Connection::open(port).await.unwrap();
    while !stop.load(Ordering::Relaxed) {
        let answer = connection.send(&signed([SECRET, NEXT][secret.load(Ordering::Relaxed)])).await.unwrap();
        if answer.status == 202 {
            accepted += 1;
        } else {
            refused.push(answer.status);
        }
    }
    (accepted, refused)
}

#[tokio::test]
async fn a_rotation_under_load_refuses_nothing() {
    let folder = Scratch::new("rotation").unwrap();
    mount(folder.path(), "..v1", SECRET);
    symlink("..data/secret", folder.path().join("secret")).unwrap();
    let file = folder.path().join("secret");
    let from_file = setup().workers(0).gateway("SENTRY_CLIENT_SECRET", "");
    let world = from_file.gateway("SENTRY_CLIENT_SECRET_FILE", file.to_str().unwrap()).start().await;
    assert_eq!(signed(NEXT).send(world.port()).await.status, 401);

    let (stop, secret) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let senders: Vec<_> =
        (0..4).map(|_| tokio::spawn(post_until(world.port(), stop.clone(), secret.clone()))).collect();
    mount(folder.path(), "..v2", &format!("{SECRET}\n{NEXT}\n"));
    secrets_are(&world, true, "2 in use").await;
    secret.store(1, Ordering::Relaxed);
    let old_is_unused = world.metric("gateway_answers_total{status=\"202\",reason=\"accepted\"}").await + 20.0;
    eventually("the senders to have switched", || async {
        let now = world.metric("gateway_answers_total{status=\"202\",reason=\"accepted\"}").await;
        (now > old_is_unused).then_some(())
    })
    .await;
    mount(folder.path(), "..v3", NEXT);
    secrets_are(&world, true, "1 in use").await;
    signed(SECRET).send(world.port()).await.accepted(); // until the grace time is over
    stop.store(true, Ordering::Relaxed);
    let mut accepted = 0;
    for sender in senders {
        let (good, refused) = sender.await.unwrap();
        assert!(refused.is_empty(), "{refused:?}");
        accepted += good;
    }
    println!("{accepted} deliveries during the rotation, all 202");
    let log = world.gateway.log();
    assert!(!log.contains(SECRET) && !log.contains(NEXT), "{log}");
}

#[tokio::test]
async fn a_file_that_cannot_be_used_keeps_the_secrets_and_says_so_once() {
    let folder = Scratch::new("rotation").unwrap();
    let file = folder.path().join("secret");
    std::fs::write(&file, SECRET).unwrap();
    let from_file = setup().workers(0).gateway("SENTRY_CLIENT_SECRET", "");
    let world = from_file.gateway("SENTRY_CLIENT_SECRET_FILE", file.to_str().unwrap()).start().await;
    for (number, trouble) in ["cannot be read", "is empty"].into_iter().enumerate() {
        match number {
            0 => std::fs::remove_file(&file).unwrap(),
            _ => std::fs::write(&file, "\n").unwrap(),
        }
        secrets_are(&world, false, trouble).await;
        tokio::time::sleep(Duration::from_millis(2_500)).await; // long enough to say it again
        assert_eq!(world.gateway.ops("/readyz").await.status, 200, "degraded, and ready");
        world.post(BODY).await.accepted();
        assert_eq!(world.gateway.log().matches("stay as they were").count(), number + 1);
        std::fs::write(&file, SECRET).unwrap(); // in place
        secrets_are(&world, true, "1 in use").await;
    }
    world.post(BODY).await.accepted();
}

/// The fingerprint of a secret: the first 8 hex digits of its SHA-256.
fn fingerprint(secret: &str) -> String {
    hex::encode(&Sha256::digest(secret)[..4])
}

/// The metric that counts the deliveries that a secret has signed.
fn signed_by(secret: &str) -> String {
    format!("gateway_secret_deliveries_total{{fingerprint=\"{}\"}}", fingerprint(secret))
}

/// A world without workers, with these secrets in a file.
async fn with_file(file: &Path, content: &str, settings: &[(&str, &str)]) -> World {
    std::fs::write(file, content).unwrap();
    let from_file = setup().workers(0).gateway("SENTRY_CLIENT_SECRET", "");
    let from_file = from_file.gateway("SENTRY_CLIENT_SECRET_FILE", file.to_str().unwrap());
    settings.iter().fold(from_file, |setup, (name, value)| setup.gateway(name, value)).start().await
}

#[tokio::test]
async fn an_old_secret_stays_valid_for_the_grace_time_and_no_longer() {
    let folder = Scratch::new("rotation").unwrap();
    let file = folder.path().join("secret");
    let world = with_file(&file, SECRET, &[("SENTRY_SECRET_GRACE", "4s")]).await;
    signed(SECRET).send(world.port()).await.accepted();
    std::fs::write(&file, NEXT).unwrap();
    secrets_are(&world, true, &format!("previous: {}", fingerprint(SECRET))).await;
    let begin = Instant::now();
    let answers = [SECRET, NEXT].map(signed);
    for post in answers {
        let status = post.send(world.port()).await.status;
        assert!(status == 202 || begin.elapsed() > Duration::from_secs(2), "{status}");
    }
    eventually("the old secret to be refused", async || {
        (signed(SECRET).send(world.port()).await.status == 401).then_some(())
    })
    .await;
    secrets_are(&world, true, &format!("1 in use: {}", fingerprint(NEXT))).await;
    let over = format!("the grace time of client secret {} (", fingerprint(SECRET));
    let log = world.gateway.log();
    assert!(log.lines().any(|line| line.contains(" WARN ") && line.contains(&over)), "it was still used: {log}");
    signed(NEXT).send(world.port()).await.accepted();
    assert_eq!(world.metric("gateway_secrets").await, 1.0);
    assert!(!world.gateway.log().contains(SECRET) && !world.gateway.log().contains(NEXT));
}

#[tokio::test]
async fn without_a_grace_time_an_old_secret_is_refused_at_once() {
    let folder = Scratch::new("rotation").unwrap();
    let file = folder.path().join("secret");
    let world = with_file(&file, &format!("{SECRET}\n{NEXT}"), &[("SENTRY_SECRET_GRACE", "0")]).await;
    signed(SECRET).send(world.port()).await.accepted();
    std::fs::write(&file, NEXT).unwrap();
    secrets_are(&world, true, "1 in use").await;
    assert_eq!(signed(SECRET).send(world.port()).await.status, 401);
    signed(NEXT).send(world.port()).await.accepted();
}

#[tokio::test]
async fn the_last_step_of_a_rotation_can_be_seen() {
    let folder = Scratch::new("rotation").unwrap();
    let world = with_file(&folder.path().join("secret"), &format!("{SECRET}\n{NEXT}"), &[]).await;
    for post in [signed(SECRET), signed(SECRET), signed(NEXT)] {
        post.send(world.port()).await.accepted();
    }
    assert_eq!((world.metric(&signed_by(SECRET)).await, world.metric(&signed_by(NEXT)).await), (2.0, 1.0));
    let log = world.gateway.log();
    let told = log.lines().filter(|line| line.contains(&fingerprint(SECRET)) && line.contains(&fingerprint(NEXT)));
    assert_eq!(told.count(), 1, "at the start: {log}");
    secrets_are(&world, true, &format!("2 in use: {} (2 deliveries, the last ", fingerprint(SECRET))).await;
    secrets_are(&world, true, &format!("{} (1 delivery, ", fingerprint(NEXT))).await;
    let (code, out, _) = world.gateway_command_async(&["check"]).await;
    assert!(code.is_some() && out.contains(&fingerprint(SECRET)) && out.contains(&fingerprint(NEXT)), "{out}");
    assert!(!log.contains(SECRET) && !out.contains(SECRET));
    // A change is told as well, and a count goes on.
    std::fs::write(folder.path().join("secret"), NEXT).unwrap();
    secrets_are(&world, true, "1 in use").await;
    signed(NEXT).send(world.port()).await.accepted();
    assert_eq!((world.metric(&signed_by(SECRET)).await, world.metric(&signed_by(NEXT)).await), (2.0, 2.0));
    let log = world.gateway.log();
    let changed = log.lines().find(|line| line.contains("took the client secrets from their file"));
    assert!(changed.is_some_and(|line| line.contains(&fingerprint(NEXT))), "{log}");
}

#[tokio::test]
async fn wrong_signatures_without_a_right_one_are_told_within_a_minute() {
    let folder = Scratch::new("rotation").unwrap();
    let file = folder.path().join("secret");
    let (wrong, mixed) =
        tokio::join!(with_file(&file, NEXT, &[("SENTRY_SECRET_GRACE", "0")]), setup().workers(0).start());
    let begin = Instant::now();
    let mut posted = 0;
    let told = loop {
        assert_eq!(signed(SECRET).send(wrong.port()).await.status, 401);
        posted += 1;
        // A stranger's, and a genuine one.
        assert_eq!(signed(NEXT).send(mixed.port()).await.status, 401);
        mixed.post(BODY).await.accepted();
        let list = wrong.gateway.ops("/readyz").await;
        let check = list.json().as_array().unwrap().iter().find(|check| check["name"] == "secrets").cloned();
        match check {
            Some(check) if check["ok"] == false => break (list.status, check),
            _ => assert!(begin.elapsed() < Duration::from_secs(60), "{posted} wrong ones, and no word: {list:?}"),
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    let (status, check) = told;
    assert_eq!((status, &check["degraded"]), (200, &true.into()), "{check}");
    let detail = check["detail"].as_str().unwrap();
    let file_changed = format!("{} last changed at 20", file.display());
    for part in ["wrong", " since 20", "Sentry's", "strangers", &fingerprint(NEXT), &file_changed] {
        assert!(detail.contains(part), "no {part} in: {detail}");
    }
    assert!(!detail.contains(NEXT) && !detail.contains(SECRET), "{detail}");
    wrong.gateway.until_metric("gateway_check_ok{check=\"secrets\"}", 0.0).await;
    let warnings = |log: &str| log.lines().filter(|it| it.contains(" WARN ") && it.contains("strangers")).count();
    eventually("one warning", async || (warnings(&wrong.gateway.log()) > 0).then_some(())).await;
    assert_eq!(warnings(&wrong.gateway.log()), 1, "once a minute: {}", wrong.gateway.log());
    // If right ones come, too, there is nothing to tell.
    assert!(begin.elapsed() > Duration::from_secs(30));
    assert_eq!(mixed.metric("gateway_check_ok{check=\"secrets\"}").await, 1.0);
    assert_eq!(warnings(&mixed.gateway.log()), 0);
    // The right secret mends it.
    std::fs::write(&file, SECRET).unwrap();
    secrets_are(&wrong, true, "1 in use").await;
    wrong.post(BODY).await.accepted();
}

#[tokio::test]
async fn a_secret_file_that_is_no_regular_file_is_refused_and_never_waited_for() {
    let folder = Scratch::new("rotation").unwrap();
    let [file, fifo, link] = ["secret", "fifo", "link"].map(|name| folder.path().join(name));
    mkfifo(&fifo, Mode::from_bits_truncate(0o600)).unwrap();
    symlink(&fifo, &link).unwrap();
    for path in [&fifo, &link, Path::new("/dev/zero"), folder.path()] {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_gateway-under-test"));
        command.env_clear().env("SENTRY_CLIENT_SECRET_FILE", path).kill_on_drop(true);
        let ended = tokio::time::timeout(Duration::from_secs(30), command.output()).await;
        let ran = world::Ran::of(ended.unwrap_or_else(|_| panic!("a start hangs on {}", path.display())).unwrap());
        assert_eq!(ran.code, Some(64), "{ran:?}");
        assert!(ran.err.contains("SENTRY_CLIENT_SECRET_FILE") && ran.err.contains("no regular file"), "{ran:?}");
    }
    let world = with_file(&file, SECRET, &[]).await;
    std::fs::rename(&link, &file).unwrap();
    secrets_are(&world, false, "is no regular file").await;
    world.post(BODY).await.accepted();
    mount(folder.path(), "..v1", &format!("{SECRET}\n{NEXT}\n"));
    symlink("..data/secret", &link).unwrap();
    std::fs::rename(&link, &file).unwrap();
    secrets_are(&world, true, "2 in use").await;
    signed(NEXT).send(world.port()).await.accepted();
}
