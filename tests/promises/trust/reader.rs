//! A program that reads the stream tries to settle deliveries that are not stored.
//!
//! It sees each message's `Receipt-To`, may publish on `receipts.*`, and knows how places are written.

use std::collections::BTreeSet;

use world::{Post, RawClient, World, eventually};

use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");
const FULL_AT: &str = "200KB";

fn receipts_subject(world: &World) -> String {
    let id = std::fs::read_to_string(world.folder().join("gateway-0/gateway-id")).unwrap();
    format!("receipts.{}", id.trim())
}

/// The value of a message's header.
fn header<'a>(block: &'a str, name: &str) -> Option<&'a str> {
    block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// Places as the reader makes them from one that was seen: of every entry that the segment may have, with the rest of
/// the text as it was.
fn forged(seen: &str, entries: usize) -> Vec<String> {
    let parts: Vec<&str> = seen.split('.').skip(1).collect(); // without the gateway's id
    let [segment, _, rest @ ..] = &parts[..] else { panic!("{seen}") };
    let with_rest = (0..entries).map(|index| [&[*segment, &index.to_string()], rest].concat().join("."));
    let without_tag = (0..entries).map(|index| format!("{segment}.{index}.{}", rest[0]));
    with_rest.chain(without_tag).collect()
}

#[tokio::test]
async fn forged_receipts_settle_nothing_that_is_not_on_the_stream() {
    let setup = setup().workers(0).gateway("NATS_MAX_BYTES", FULL_AT).worker("NATS_MAX_BYTES", FULL_AT);
    let mut world = setup.start().await;
    let mut spy = RawClient::connect(world.nats.port()).await;
    spy.subscribe("signals.sentry.*").await;
    let mut accepted = BTreeSet::new();
    for _ in 0..200 {
        accepted.insert(world.post(BODY).await.accepted());
    }
    eventually("the stream to be full", || async {
        let full = world.metric("gateway_publish_retries_total{cause=\"full\"}").await;
        (full > 0.0).then_some(())
    })
    .await;
    // The reader sees every message, also those that the full stream did not take.
    let seen = String::from_utf8(spy.next().await.headers).unwrap();
    let mut places = forged(header(&seen, "Receipt-To").unwrap(), 400);
    for _ in 0..100 {
        let headers = String::from_utf8(spy.next().await.headers).unwrap();
        places.push(header(&headers, "Receipt-To").unwrap().split_once('.').unwrap().1.to_owned());
    }
    spy.publish(&receipts_subject(&world), b"", places.join("\n").as_bytes()).await;
    spy.flush().await;
    eventually("the gateway to have looked at them", || async {
        let log = world.gateway.log();
        log.contains("refused receipts").then_some(())
    })
    .await;
    world.gateway.kill().await;
    world.gateway.start_again();
    world.gateway.ready().await;
    spy.publish(&receipts_subject(&world), b"", places.join("\n").as_bytes()).await;
    spy.flush().await;
    world.start_worker().await;
    for id in &accepted {
        world.stored(id).await;
    }
    world.until_confirmed().await;
}

#[tokio::test]
async fn a_receipt_settles_nothing_that_was_set_aside() {
    let mut world = setup().workers(0).nats(|options| options.max_payload = Some("64KB".into())).start().await;
    let mut spy = RawClient::connect(world.nats.port()).await;
    let seen_before = {
        spy.subscribe("signals.sentry.*").await;
        world.post(BODY).await.accepted();
        String::from_utf8(spy.next().await.headers).unwrap()
    };
    let large = format!(r#"{{"data":{{"issue":{{"title":"{}"}}}}}}"#, "x".repeat(100_000));
    let id = Post::signed(large).send(world.port()).await.accepted();
    world.gateway.until_metric("gateway_journal_entries{state=\"set_aside\"}", 1.0).await;
    let places = forged(header(&seen_before, "Receipt-To").unwrap(), 10);
    spy.publish(&receipts_subject(&world), b"", places.join("\n").as_bytes()).await;
    spy.flush().await;
    eventually("the gateway to refuse them", || async {
        world
            .gateway
            .try_metric("gateway_receipts_refused_total{reason=\"wrong_tag\"}")
            .await
            .filter(|count| *count > 0.0)
    })
    .await;
    assert_eq!(world.metric("gateway_journal_entries{state=\"set_aside\"}").await, 1.0);
    world.nats.options.max_payload = None;
    world.nats.stop().await.unwrap();
    world.nats.start_again().await.unwrap();
    world.start_worker().await;
    world.stored(&id).await;
    world.until_confirmed().await;
}

#[tokio::test]
async fn a_foreign_message_that_names_a_seen_place_settles_nothing_early() {
    let setup = setup().workers(0).gateway("NATS_MAX_BYTES", FULL_AT).worker("NATS_MAX_BYTES", FULL_AT);
    let mut world = setup.start().await;
    let mut spy = RawClient::connect(world.nats.port()).await;
    spy.subscribe("signals.sentry.*").await;
    let first = world.post(BODY).await.accepted();
    let seen = String::from_utf8(spy.next().await.headers).unwrap();
    let place = header(&seen, "Receipt-To").unwrap().to_owned();
    for place in forged(&place, 50) {
        let gateway = receipts_subject(&world);
        let gateway = gateway.strip_prefix("receipts.").unwrap();
        let block = format!("NATS/1.0\r\nReceipt-To: {gateway}.{place}\r\n\r\n");
        spy.publish("signals.sentry.issue", block.as_bytes(), b"{}").await;
    }
    spy.flush().await;
    let mut accepted = vec![first];
    for _ in 0..200 {
        accepted.push(world.post(BODY).await.accepted());
    }
    world.start_worker().await;
    for id in &accepted {
        world.stored(id).await;
    }
    world.until_confirmed().await;
}

/// Short form: enough to see that what is too large is dropped unread. `DRILLS=long` floods as the promise speaks of.
#[tokio::test]
async fn a_flood_of_receipts_costs_bounded_memory() {
    let megabytes = crate::load::size(60, 600);
    let world = setup().gateway("RUST_LOG", "info").start().await;
    let subject = receipts_subject(&world);
    let flood = {
        let (port, place) = (world.nats.port(), "1.0.00000000.0000000000000000\n");
        tokio::spawn(async move {
            let mut hostile = RawClient::connect(port).await;
            let large = place.repeat((1 << 20) / place.len());
            for _ in 0..megabytes {
                hostile.publish(&subject, b"", large.as_bytes()).await;
            }
            hostile.flush().await;
        })
    };
    let genuine = crate::attacks::Genuine::start(&world, 100);
    flood.await.unwrap();
    genuine.all_taken(&format!("{megabytes} MB of receipts"), &world).await;
    eventually("the flood to have arrived", || async {
        let refused = world.gateway.try_metric("gateway_receipts_refused_total{reason=\"too_large\"}").await?;
        (refused > 0.0).then_some(())
    })
    .await;
    world.all_acknowledged().await;
    world.until_confirmed().await;
    let peak = crate::attacks::peak_memory(&world);
    let bound = crate::attacks::GATEWAY_ITSELF + 100 * crate::attacks::MIB;
    assert!(peak < bound, "{} MiB", peak / crate::attacks::MIB);
}
