//! A client secret is rotated by changing a file, under load, without a restart and without one 401.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use local::Scratch;
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
    assert_eq!(signed(SECRET).send(world.port()).await.status, 401, "the old secret is gone");
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
