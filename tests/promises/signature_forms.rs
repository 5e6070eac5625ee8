//! A genuine delivery is let in, in each form that its signature may have.

use serde_json::json;
use world::{Post, SECRET, World, sign};

use crate::{fixture, setup};

/// As Sentry writes it: `\uXXXX` for what is not ASCII, `1.0`, keys `"10","9"` in that order. JSON.stringify writes each of
/// these differently, so the two forms have two signatures.
const GENUINE: &str = fixture!("error_created");

#[test]
fn the_fixture_is_what_it_is_used_for() {
    for written in [r"\u", ":1.0,", r#"{"10":"later","9":"sooner"}"#] {
        assert!(GENUINE.contains(written), "{written}");
    }
}

async fn answers(world: &World) -> (u16, u16, u16) {
    let signed = |over: &[u8]| Post::unsigned(GENUINE).header("Sentry-Hook-Signature", &sign(SECRET, over));
    let canonical = gateway::canonical::canonical(GENUINE.as_bytes()).unwrap();
    assert_ne!(canonical, GENUINE.as_bytes());
    let raw = signed(GENUINE.as_bytes()).send(world.port()).await;
    let canonical = signed(&canonical).send(world.port()).await;
    let neither = signed(b"{}").send(world.port()).await;
    (raw.status, canonical.status, neither.status)
}

#[tokio::test]
async fn any_takes_both_forms() {
    let world = setup().start().await;
    assert_eq!(answers(&world).await, (202, 202, 401));
    let stored = world.stored(&world.post(GENUINE).await.accepted()).await;
    let sent: serde_json::Value = serde_json::from_str(GENUINE).unwrap();
    assert_eq!(stored.signal["payload"], sent);
}

#[tokio::test]
async fn raw_takes_only_what_sentry_signs() {
    let world = setup().workers(0).gateway("SENTRY_SIGNATURE_FORM", "raw").start().await;
    assert_eq!(answers(&world).await, (202, 401, 401));
}

#[tokio::test]
async fn canonical_takes_only_the_canonical_form() {
    let world = setup().workers(0).gateway("SENTRY_SIGNATURE_FORM", "canonical").start().await;
    assert_eq!(answers(&world).await, (401, 202, 401));
}

#[tokio::test]
async fn every_secret_of_a_rotation_is_good() {
    let world =
        setup().workers(0).gateway("SENTRY_CLIENT_SECRET", &format!("the-next-one-of-two, {SECRET}")).start().await;
    let body = json!({ "data": {} }).to_string();
    for secret in ["the-next-one-of-two", SECRET] {
        let post = Post::unsigned(body.clone()).header("Sentry-Hook-Signature", &sign(secret, body.as_bytes()));
        assert_eq!(post.send(world.port()).await.status, 202);
    }
}

#[tokio::test]
async fn a_secret_may_come_from_a_file() {
    let folder = local::Scratch::new("secret").unwrap();
    let file = folder.path().join("secret");
    std::fs::write(&file, format!("{SECRET}\n")).unwrap();
    let from_file = setup().workers(0).gateway("SENTRY_CLIENT_SECRET", "");
    let world = from_file.gateway("SENTRY_CLIENT_SECRET_FILE", file.to_str().unwrap()).start().await;
    assert_eq!(world.post("{}").await.status, 202);
}
