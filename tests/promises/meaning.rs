//! What a delivery says, in the rows that it becomes: every row of the table of severities, and each kind of delivery.

use serde_json::{Value, json};
use world::{Post, Stored, World};

use crate::{fixture, setup};

/// severity, priority, title, type, source id
type Meaning = (&'static str, i64, &'static str, &'static str, Option<&'static str>);

/// Each kind of delivery that Sentry sends.
const KINDS: [(&str, Meaning); 19] = [
    (fixture!("issue_created"), ("high", 2, "KeyError: 'berth_7' (3 events)", "created", Some("6120045871"))),
    (
        fixture!("issue_created_fatal"),
        ("critical", 1, "MemoryError: cannot allocate the chart cache (1 events)", "created", Some("6120100033")),
    ),
    (
        fixture!("issue_created_non_ascii"),
        (
            "medium",
            3,
            "ValueError: Liegeplatz „Süd-7“ ist für 海鸥号 🚢 zu kurz (12 events)",
            "created",
            Some("6120077219"),
        ),
    ),
    (
        fixture!("issue_unresolved_523_events"),
        (
            "critical",
            1,
            "TimeoutError: tide table did not answer within 30 s (523 events)",
            "unresolved",
            Some("6119987402"),
        ),
    ),
    (
        fixture!("issue_activity_alert_triggered"),
        ("high", 2, "KeyError: 'berth_7' (4 events)", "triggered", Some("6120045871")),
    ),
    (fixture!("error_created"), ("high", 2, "KeyError: 'berth_7' (1 events)", "created", Some("6120045871"))),
    (
        fixture!("event_alert_triggered"),
        ("medium", 3, "RangeError: draught 11.4 m exceeds the basin (1 events)", "triggered", Some("6120063318")),
    ),
    (fixture!("metric_alert_critical"), ("critical", 1, "Critical: Reservations failing", "critical", None)),
    (fixture!("metric_alert_warning"), ("medium", 3, "Warning: Reservations failing", "warning", None)),
    (fixture!("metric_alert_resolved"), ("low", 4, "Resolved: Reservations failing", "resolved", None)),
    (
        fixture!("comment_created"),
        (
            "low",
            4,
            "comment created by Ines Okafor: Berth 7 was renamed on Thursday, see the harbour log.",
            "created",
            Some("6120045871"),
        ),
    ),
    (
        fixture!("installation_created"),
        ("low", 4, "installation created: loop-triage-3f9a10 in harbour-works", "created", None),
    ),
    (
        fixture!("seer_root_cause_started"),
        ("low", 4, "Seer root cause started: issue 6120045871", "root_cause_started", Some("6120045871")),
    ),
    (
        fixture!("seer_root_cause_completed"),
        (
            "low",
            4,
            "Seer root cause completed: `reserve` looks a berth up by its old name after the board was reloaded.",
            "root_cause_completed",
            Some("6120045871"),
        ),
    ),
    (
        fixture!("seer_solution_completed"),
        (
            "low",
            4,
            "Seer solution completed: Resolve berths by id and answer 409 when one was renamed.",
            "solution_completed",
            Some("6120045871"),
        ),
    ),
    (
        fixture!("seer_coding_completed"),
        ("low", 4, "Seer coding completed: harbour-works/tide-api", "coding_completed", Some("6120045871")),
    ),
    (
        fixture!("seer_pr_created"),
        (
            "low",
            4,
            "Seer PR created: https://github.com/harbour-works/tide-api/pull/512",
            "pr_created",
            Some("6120045871"),
        ),
    ),
    (
        fixture!("preprod_artifact_build_distribution_completed"),
        ("low", 4, "build distribution completed: Quay Terminal 4.2 (ANDROID)", "build_distribution_completed", None),
    ),
    (
        fixture!("preprod_artifact_size_analysis_failed"),
        (
            "low",
            4,
            "size analysis failed: Quay Terminal 4.3 (APPLE): The analysis took longer than 30 minutes",
            "size_analysis_completed",
            None,
        ),
    ),
];

#[tokio::test]
async fn every_kind_of_delivery_becomes_what_it_says() {
    let world = setup().start().await;
    for (body, meaning) in KINDS {
        assert_meaning(&stored(&world, body).await, meaning, body);
    }
}

#[tokio::test]
async fn what_says_nothing_has_the_defaults() {
    let world = setup().start().await;
    let nothing = ("high", 2, "Unknown error (1 events)");
    let table =
        [(r#"{"data":{}}"#, "event"), (r#"{"action":"created","data":{}}"#, "created"), (r#"{"action":7}"#, "event")];
    for (body, kind) in table {
        assert_meaning(&stored(&world, body).await, (nothing.0, nothing.1, nothing.2, kind, None), body);
    }
}

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
    assert_eq!(issue["title"], format!("Sentry: {title}"), "{body}");
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
