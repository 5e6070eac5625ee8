//! A client that reaches the broker's address tries to stop the programs behind it.
//!
//! The brokers of these tests take anybody, so that each attack arrives. A broker with logins, which is what production
//! has, refuses the stranger at the door: the last test.

use local::Login;
use world::{RawClient, World, eventually};

use crate::{fixture, setup};

const BODY: &str = fixture!("issue_created");

/// Header blocks, from none at all to one that no client library can read.
const BLOCKS: [&[u8]; 6] = [
    b"",
    b"NATS/1.0\r\nX: a\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
    b"NATS/1.0 409 Consumer Deleted\r\n\r\n",
    b"NATS/1.0\r\nX: a\rb\r\n\r\n",
    b"NATS/1.0\r\nno header\r\n\r\n",
];

/// The subject on which a worker waits for messages at the moment.
async fn worker_inbox(world: &World) -> String {
    let mut spy = RawClient::connect(world.nats.port()).await;
    spy.subscribe("$JS.API.CONSUMER.MSG.NEXT.SIGNALS.worker").await;
    spy.next().await.reply.expect("a request for messages names where they go")
}

#[tokio::test]
async fn bytes_in_a_workers_inbox_stop_no_worker() {
    let world = setup().start().await;
    let mut hostile = RawClient::connect(world.nats.port()).await;
    for block in BLOCKS {
        for body in [&b""[..], b"x", BODY.as_bytes()] {
            let inbox = worker_inbox(&world).await;
            hostile.publish(&inbox, block, body).await;
            hostile.flush().await;
        }
        let id = world.post(BODY).await.accepted();
        world.stored(&id).await;
    }
    assert!(world.workers[0].process().is_alive(), "{}", world.workers[0].log());
    assert!(world.workers[0].metric("worker_messages_ignored_total").await > 0.0);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, BLOCKS.len() as i64);
    world.all_acknowledged().await;
}

#[tokio::test]
async fn a_receipt_that_cannot_be_read_costs_the_gateway_no_delivery() {
    // A genuine receipt may be lost with the connection. That costs one repeat, soon enough for a test.
    let world = setup().gateway("GATEWAY_CONFIRM_AFTER", "1s").start().await;
    let id = std::fs::read_to_string(world.folder().join("gateway-0/gateway-id")).unwrap();
    let receipts = format!("receipts.{}", id.trim());
    let mut hostile = RawClient::connect(world.nats.port()).await;
    for block in BLOCKS {
        for body in [&b""[..], b"\xff\xfe", b"1.2.3\n\n..\n1.0.00000000.0000000000000000"] {
            hostile.publish(&receipts, block, body).await;
            hostile.flush().await;
        }
        let id = world.post(BODY).await.accepted();
        world.stored(&id).await;
    }
    world.until_confirmed().await;
    let ready = world.gateway.ops("/readyz").await.json();
    let nats = ready.as_array().unwrap().iter().find(|check| check["name"] == "nats").unwrap();
    assert_eq!(nats["ok"], true, "{ready}");
}

#[tokio::test]
async fn the_check_nats_is_an_answer_of_nats() {
    let world = setup().start().await;
    world.nats.process().freeze().unwrap();
    for program in [&world.gateway, &world.workers[0]] {
        eventually("readyz to say that NATS gives no answer", || async {
            let checks = program.ops("/readyz").await.json();
            let nats = checks.as_array()?.iter().find(|check| check["name"] == "nats")?.clone();
            (nats["ok"] == false).then_some(())
        })
        .await;
    }
    world.nats.process().thaw().unwrap();
    world.workers[0].ready().await;
    let id = world.post(BODY).await.accepted();
    world.stored(&id).await;
}

#[tokio::test]
async fn a_broker_with_logins_refuses_the_stranger_and_serves_the_door() {
    let login = || Login { user: "door".into(), password: "apasswordofthetests".into() };
    let world = setup().nats(|options| options.login = Some(login())).start().await;
    let refused = RawClient::connect(world.nats.port()).await.login_answer().await;
    assert!(refused.starts_with("-ERR 'Authorization Violation'"), "{refused}");
    let wrong = r#"{"verbose":false,"headers":true,"user":"door","pass":"guessed"}"#;
    let refused = RawClient::with_options(world.nats.port(), wrong).await.login_answer().await;
    assert!(refused.starts_with("-ERR 'Authorization Violation'"), "{refused}");
    let id = world.post(BODY).await.accepted();
    world.stored(&id).await;
    for program in [&world.gateway, &world.workers[0]] {
        assert!(!program.log().contains("apasswordofthetests"), "{}", program.log());
    }
}
