//! What a delivery says, in the rows that it becomes: every row of the table of severities, and each kind of delivery.

use serde_json::{Value, json};
use world::{Post, Stored, World};

use crate::{fixture, setup};

/// severity, priority, title, type, source id
type Meaning = (&'static str, i64, &'static str, &'static str, Option<&'static str>);

async fn stored(world: &World, body: &str) -> Stored {
    world.stored(&world.post(body.to_owned()).await.accepted()).await
}

fn assert_meaning(stored: &Stored, (severity, priority, title, kind, source_id): Meaning, body: &str) {
    let Stored { signal, issue } = stored;
    assert_eq!(signal["severity"], severity, "{body}");
    assert_eq!(signal["type"], kind, "{body}");
    assert_eq!(signal["source_id"], json!(source_id), "{body}");
    assert_eq!(signal["source"], "sentry", "{body}");
    assert_eq!(signal["issue_id"], issue["id"], "{body}");
    assert_eq!(issue["priority"], priority, "{body}");
    assert_eq!(issue["title"], title, "{body}");
    assert_eq!(issue["type"], "signal", "{body}");
    assert_eq!(issue["status"], "triage", "{body}");
    assert_eq!(issue["signal_source"], "sentry", "{body}");
    let sent: Value = serde_json::from_str(body).unwrap();
    assert_eq!(signal["payload"], sent, "the whole body");
    assert_eq!(issue["signal_payload"], sent, "the whole body");
    assert_eq!(signal["created_at"], issue["created_at"]);
}

#[tokio::test]
async fn every_level_and_count_has_its_severity_and_priority() {
    let world = setup().start().await;
    let table = [
        ("fatal", json!(1), "critical", 1),
        ("fatal", json!("1000"), "critical", 1),
        ("error", json!(100), "critical", 1),
        ("error", json!("100"), "critical", 1),
        ("error", json!(99), "high", 2),
        ("error", json!("99"), "high", 2),
        ("warning", json!("100000"), "medium", 3),
        ("info", json!(100), "low", 4),
        ("debug", json!(1), "low", 4),
        ("ERROR", json!(100), "low", 4),
        ("", json!(1), "low", 4),
    ];
    for (level, count, severity, priority) in table {
        let issue = json!({ "id": "7", "title": "T", "level": level, "count": count });
        let body = json!({ "action": "created", "data": { "issue": issue } }).to_string();
        let Stored { signal, issue } = stored(&world, &body).await;
        assert_eq!((&signal["severity"], &issue["priority"]), (&json!(severity), &json!(priority)), "{body}");
        let count = count.as_str().map_or_else(|| count.to_string(), str::to_owned);
        assert_eq!(issue["title"], format!("Sentry: T ({count} events)"));
    }
}

#[tokio::test]
async fn what_was_received_is_when_the_rows_were_made() {
    let world = setup().start().await;
    let before: f64 = world.value("SELECT extract(epoch FROM clock_timestamp())::float8").await;
    let id = world.post(fixture!("issue_created")).await.accepted();
    let after: f64 = world.value("SELECT extract(epoch FROM clock_timestamp())::float8").await;
    world.stored(&id).await;
    let sql = "SELECT extract(epoch FROM s.created_at)::float8, i.created_at = s.created_at, l.received_at = s.created_at,
        l.resource, l.state FROM signals s JOIN issues i ON i.id = s.issue_id JOIN ingest.deliveries l ON l.signal_id = s.id";
    let row = &world.query(sql, &[]).await[0];
    let created: f64 = row.get(0);
    assert!((before..=after).contains(&created), "{before} {created} {after}");
    assert!(row.get::<_, bool>(1) && row.get::<_, bool>(2));
    assert_eq!((row.get::<_, &str>(3), row.get::<_, &str>(4)), ("issue", "stored"));
}

#[tokio::test]
async fn the_resource_header_routes_and_never_decides() {
    let world = setup().start().await;
    let expected = stored(&world, fixture!("metric_alert_critical")).await;
    for (header, resource) in [("issue", "issue"), ("Metric.Alert*", "unknown"), ("comment", "comment")] {
        let post = Post::signed(fixture!("metric_alert_critical")).header("Sentry-Hook-Resource", header);
        let id = post.send(world.port()).await.accepted();
        let stored = world.stored(&id).await;
        assert_eq!(stored.issue["title"], expected.issue["title"]);
        assert_eq!(stored.signal["severity"], expected.signal["severity"]);
        let sql = "SELECT resource FROM ingest.deliveries WHERE delivery_id = $1";
        assert_eq!(world.query(sql, &[&id]).await[0].get::<_, String>(0), resource);
    }
}
