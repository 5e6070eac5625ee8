//! Bodies that are hard to store are stored, and none fails another of its batch.

use serde_json::{Value, json};
use world::World;

use crate::setup;

/// An issue with these members beside its id.
fn issue(members: &str) -> String {
    format!(
        r#"{{"action":"created","data":{{"issue":{{"id":"1"{}{members}}}}}}}"#,
        if members.is_empty() { "" } else { "," }
    )
}

/// All of these bodies wait on the stream before the worker starts, so that they come in one batch.
async fn stored_together(bodies: &[String]) -> (World, Vec<String>) {
    let mut world = setup().start().await;
    world.workers[0].kill().await;
    let mut ids = Vec::new();
    for body in bodies {
        ids.push(world.post(body.clone()).await.accepted());
    }
    world.workers[0].start_again();
    world.all_acknowledged().await;
    (world, ids)
}

#[tokio::test]
async fn types_come_as_they_come() {
    let table = [
        (issue(r#""title":"T","count":"523""#), "critical", "Sentry: T (523 events)"),
        (issue(r#""title":"T","count":523"#), "critical", "Sentry: T (523 events)"),
        (issue(r#""title":"T","count":5.5"#), "high", "Sentry: T (5.5 events)"),
        (issue(r#""title":"T","count":"abc""#), "high", "Sentry: T (1 events)"),
        (issue(r#""title":"T","count":"""#), "high", "Sentry: T (1 events)"),
        (issue(r#""title":"T","count":true"#), "high", "Sentry: T (1 events)"),
        (issue(r#""title":"T","count":null"#), "high", "Sentry: T (1 events)"),
        (issue(r#""title":"T","level":null"#), "high", "Sentry: T (1 events)"),
        (issue(r#""title":"T","level":"ERROR""#), "low", "Sentry: T (1 events)"),
        (issue(r#""title":"T","level":3"#), "low", "Sentry: T (1 events)"),
        (issue(""), "high", "Sentry: Unknown error (1 events)"),
        (issue(r#""title":null"#), "high", "Sentry: Unknown error (1 events)"),
        (issue(r#""title":404"#), "high", "Sentry: 404 (1 events)"),
        (r#"{"action":"created"}"#.into(), "high", "Sentry: Unknown error (1 events)"),
        (r#"{"data":null}"#.into(), "high", "Sentry: Unknown error (1 events)"),
        (r#"{"data":[1]}"#.into(), "high", "Sentry: Unknown error (1 events)"),
        ("[]".into(), "high", "Sentry: Unknown error (1 events)"),
        (r#""text""#.into(), "high", "Sentry: Unknown error (1 events)"),
        ("42".into(), "high", "Sentry: Unknown error (1 events)"),
        ("null".into(), "high", "Sentry: Unknown error (1 events)"),
    ];
    let bodies: Vec<_> = table.iter().map(|(body, ..)| body.clone()).collect();
    let (world, ids) = stored_together(&bodies).await;
    for ((body, severity, title), id) in table.iter().zip(&ids) {
        let stored = world.stored(id).await;
        assert_eq!((&stored.signal["severity"], &stored.issue["title"]), (&json!(severity), &json!(title)), "{body}");
        assert_eq!(stored.signal["payload"], serde_json::from_str::<Value>(body).unwrap());
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);
}

#[tokio::test]
async fn what_postgresql_refuses_is_stored_with_its_meaning_and_what_is_no_json_is_a_dead_letter() {
    let long = "x".repeat(2 << 20);
    let deep = |levels: usize| format!(r#"{{"a":{}{}}}"#, "[".repeat(levels), "]".repeat(levels));
    let nested = |levels: usize| format!(r#"{}1{}"#, r#"{"a":"#.repeat(levels), "}".repeat(levels));
    let bodies = vec![
        issue(r#""title":"a\u0000b""#),
        issue(r#""title":"a\ud800b","culprit":[{"x\u0000":"\udfff"}]"#),
        issue(&format!(r#""title":"{long}""#)),
        issue(r#""title":"T","n":[1e400,-1e400,1e-400,123456789012345678901234567890,0.1e999999,1e-999999]"#),
        issue(r#""title":"first","title":"last""#),
        deep(5_000),
        nested(5_000),
        deep(100_000),
        "this is no JSON".into(),
        r#"{"cut":"#.into(),
        String::new(),
        issue(r#""title":"the mate of all these""#),
    ];
    let (world, ids) = stored_together(&bodies).await;
    let title = async |number: usize| world.stored(&ids[number]).await.issue["title"].as_str().unwrap().to_owned();
    assert_eq!(title(0).await, "Sentry: a\u{fffd}b (1 events)");
    assert_eq!(title(1).await, "Sentry: a\u{fffd}b (1 events)");
    let payload = world.stored(&ids[1]).await.signal["payload"].clone();
    assert_eq!(payload["data"]["issue"]["culprit"], json!([{ "x\u{fffd}": "\u{fffd}" }]));
    assert_eq!(title(2).await, format!("Sentry: {}… (1 events)", &long[..500]));
    let payload = world.stored(&ids[2]).await.signal["payload"].clone();
    assert_eq!(payload["data"]["issue"]["title"].as_str().unwrap().len(), long.len());
    let sql = "SELECT payload #>> '{data,issue,n,3}' FROM signals s JOIN ingest.deliveries l ON l.signal_id = s.id
        WHERE l.delivery_id = $1";
    let number: String = world.query(sql, &[&ids[3]]).await[0].get(0);
    assert_eq!(number, "123456789012345678901234567890", "as it was written, not as a double");
    assert_eq!(title(4).await, "Sentry: last (1 events)");
    let sql = "SELECT length(s.payload::text) FROM signals s JOIN ingest.deliveries l ON l.signal_id = s.id
        WHERE l.delivery_id = $1";
    for (number, least) in [(5, 10_000), (6, 25_000), (7, 200_000)] {
        let length: i32 = world.query(sql, &[&ids[number]]).await[0].get(0);
        assert!(length >= least, "body {number} is stored whole, as {length} characters");
    }
    assert_eq!(title(11).await, "Sentry: the mate of all these (1 events)");

    let dead = "SELECT body, reason, headers->'Delivery-Id'->>0 FROM ingest.dead_letters WHERE delivery_id = $1";
    for number in 8..=10 {
        let row = &world.query(dead, &[&ids[number]]).await[0];
        assert_eq!(row.get::<_, Vec<u8>>(0), bodies[number].as_bytes());
        assert!(row.get::<_, String>(1).contains("not JSON"), "{row:?}");
        assert_eq!(row.get::<_, String>(2), ids[number]);
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 3);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.deliveries WHERE state = 'dead'").await, 3);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM issues").await, 9);
}
