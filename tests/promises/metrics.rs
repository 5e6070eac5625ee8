//! The metrics are what the README says, in a form that Prometheus takes, and they count what happens.

use std::collections::{BTreeMap, BTreeSet};

use world::{Post, Program, SECRET, sign};

use crate::{fixture, setup};

/// A family of metrics as it is shown.
#[derive(Debug, Default)]
struct Family {
    help: String,
    kind: String,
    unit: Option<String>,
    samples: Vec<Sample>,
}

#[derive(Debug)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

/// Reads what `/metrics` says by the grammar of OpenMetrics 1.0, and no other.
/// <https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md>
fn read(text: &str) -> BTreeMap<String, Family> {
    let body = text.strip_suffix("# EOF\n").expect("an exposition ends with its EOF");
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in body.lines() {
        if let Some(about) = line.strip_prefix("# ") {
            let [what, name, words] = about.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            if name != current {
                assert!(!families.contains_key(name), "{name} is there twice, or not in one piece");
                current = name.to_owned();
            }
            let family = families.entry(name.to_owned()).or_default();
            assert!(family.samples.is_empty(), "{line} comes after its samples");
            match what {
                "HELP" => family.help = words.to_owned(),
                "TYPE" => family.kind = words.to_owned(),
                "UNIT" => family.unit = Some(words.to_owned()),
                _ => panic!("{line}"),
            }
            continue;
        }
        let sample = sample(line);
        let family = families.get_mut(&current).expect("a sample comes after its family");
        let suffixes: &[&str] = match family.kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_sum", "_count"],
            other => panic!("{current} is a {other}"),
        };
        let suffix = sample.name.strip_prefix(&current).unwrap_or_else(|| panic!("{line} is no sample of {current}"));
        assert!(suffixes.contains(&suffix), "{line}");
        family.samples.push(sample);
    }
    families
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
    let (name, inside) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}').unwrap_or_else(|| panic!("{line}"))),
        None => (series, ""),
    };
    let is_name = |name: &str| {
        let mut bytes = name.bytes();
        bytes.next().is_some_and(|first| first.is_ascii_lowercase() || first == b'_')
            && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    assert!(is_name(name), "{line}");
    // None of our values has a quote, a comma or a backslash in it: they are names out of closed sets.
    let label = |label: &str| {
        let (name, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
        let value = value.strip_suffix('"').unwrap_or_else(|| panic!("{line}"));
        assert!(
            is_name(name) && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte)),
            "{line}"
        );
        (name.to_owned(), value.to_owned())
    };
    let labels = if inside.is_empty() { vec![] } else { inside.split(',').map(label).collect() };
    let value = if value == "+Inf" { f64::INFINITY } else { value.parse().unwrap_or_else(|_| panic!("{line}")) };
    Sample { name: name.to_owned(), labels, value }
}

/// What holds of every family.
fn check(name: &str, family: &Family) {
    let Family { help, kind, unit, samples } = family;
    assert!(help.len() > 10 && !help.contains('\\'), "{name} says what it is: {help}");
    if let Some(unit) = unit {
        assert!(name.ends_with(&format!("_{unit}")), "{name} ends with its unit {unit}");
        assert!(["seconds", "bytes"].contains(&unit.as_str()), "{name} has a base unit, not {unit}");
    }
    let mut series = BTreeSet::new();
    for sample in samples {
        assert!(series.insert((&sample.name, &sample.labels)), "{sample:?} is there twice");
        assert!(sample.value >= 0.0, "{sample:?}");
    }
    if kind == "histogram" {
        check_histogram(name, samples);
    }
}

/// Buckets are cumulative, in order, and end with all.
fn check_histogram(name: &str, samples: &[Sample]) {
    let others = |sample: &Sample| sample.labels.iter().filter(|(label, _)| label != "le").cloned().collect::<Vec<_>>();
    let sets: BTreeSet<_> = samples.iter().map(others).collect();
    for labels in sets {
        let of = |suffix: &str| {
            samples.iter().filter(|it| others(it) == labels && it.name == format!("{name}{suffix}")).collect::<Vec<_>>()
        };
        let (buckets, counts, sums) = (of("_bucket"), of("_count"), of("_sum"));
        assert_eq!((counts.len(), sums.len()), (1, 1), "{name} {labels:?}");
        let bound = |sample: &Sample| {
            let le = &sample.labels.iter().find(|(label, _)| label == "le").expect("a bucket has its bound").1;
            if le == "+Inf" { f64::INFINITY } else { le.parse::<f64>().unwrap() }
        };
        for pair in buckets.windows(2) {
            assert!(bound(pair[0]) < bound(pair[1]) && pair[0].value <= pair[1].value, "{pair:?}");
        }
        let last = buckets.last().expect("there are buckets");
        assert!(bound(last).is_infinite() && last.value == counts[0].value, "{last:?} {counts:?}");
    }
}

/// The row of the README's table.
fn row(name: &str, family: &Family) -> String {
    let suffix = match family.kind.as_str() {
        "counter" => "_total",
        "info" => "_info",
        _ => "",
    };
    let mut labels: Vec<&str> = Vec::new();
    for (label, _) in family.samples.iter().flat_map(|sample| &sample.labels).filter(|(label, _)| label != "le") {
        if !labels.contains(&label.as_str()) {
            labels.push(label);
        }
    }
    let labels = labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
    let help = family.help.strip_suffix('.').unwrap_or(&family.help);
    format!("| `{name}{suffix}` | {} | {labels} | {help} |", family.kind)
}

async fn exposed(program: &Program) -> BTreeMap<String, Family> {
    let answer = program.ops("/metrics").await;
    assert_eq!(answer.headers["content-type"], "application/openmetrics-text; version=1.0.0; charset=utf-8");
    read(std::str::from_utf8(&answer.body).unwrap())
}

#[tokio::test]
async fn the_readme_lists_every_metric_as_it_is() {
    let world = setup().start().await;
    let id = world.post(fixture!("issue_created")).await.accepted();
    world.stored(&id).await;
    world.workers[0].until_metric("worker_consumer_pending", 0.0).await;
    let (gateway, worker) = (exposed(&world.gateway).await, exposed(&world.workers[0]).await);
    for (program, families) in [("gateway_", &gateway), ("worker_", &worker)] {
        for (name, family) in families {
            check(name, family);
            let is_shared = ["process_", "log_"].iter().any(|prefix| name.starts_with(prefix));
            assert!(name.starts_with(program) || is_shared, "{name}");
        }
    }
    let rows: BTreeSet<String> = gateway.iter().chain(&worker).map(|(name, family)| row(name, family)).collect();
    let expected = rows.into_iter().collect::<Vec<_>>().join("\n");
    let readme = include_str!("../../README.md");
    let table = readme.split("| metric | type | labels | |\n|---|---|---|---|\n").nth(1);
    let found = table.expect("the README has that table").split("\n\n").next().unwrap_or_default();
    assert!(found == expected, "README.md should have this table:\n{expected}");
}

#[tokio::test]
async fn what_happens_is_counted() {
    let world = setup().start().await;
    let (gateway, worker) = (&world.gateway, &world.workers[0]);
    let body = r#"{"a": 1.0}"#;
    let canonical = sign(SECRET, br#"{"a":1}"#);
    let signed = Post::unsigned(body).header("Sentry-Hook-Signature", &canonical);
    let wrong = Post::unsigned(body).header("Sentry-Hook-Signature", &"0".repeat(64));
    let mut ids = vec![signed.send(world.port()).await.accepted()];
    ids.push(world.post(body).await.accepted());
    ids.push(world.post("no JSON").await.accepted());
    for (post, status) in [(&wrong, 401), (&Post::unsigned(body), 401), (&Post::get("/"), 404)] {
        assert_eq!(post.send(world.port()).await.status, status);
    }
    world.until_confirmed().await;
    world.all_acknowledged().await;
    let bytes = (2 * body.len() + "no JSON".len()) as f64;
    let of_gateway = [
        ("gateway_answers_total{status=\"202\",reason=\"accepted\"}", 3.0),
        ("gateway_answers_total{status=\"401\",reason=\"signature_wrong\"}", 1.0),
        ("gateway_answers_total{status=\"401\",reason=\"signature_missing\"}", 1.0),
        ("gateway_answers_total{status=\"404\",reason=\"not_found\"}", 1.0),
        ("gateway_answers_total{status=\"503\",reason=\"not_journalled\"}", 0.0),
        ("gateway_body_bytes_count", 3.0),
        ("gateway_body_bytes_sum", bytes),
        ("gateway_verify_seconds_count{form=\"raw\",result=\"matched\"}", 2.0),
        ("gateway_verify_seconds_count{form=\"raw\",result=\"unmatched\"}", 2.0),
        ("gateway_verify_seconds_count{form=\"canonical\",result=\"matched\"}", 1.0),
        ("gateway_verify_seconds_count{form=\"canonical\",result=\"unmatched\"}", 1.0),
        ("gateway_signatures_total{form=\"raw\"}", 2.0),
        ("gateway_signatures_total{form=\"canonical\"}", 1.0),
        ("gateway_journal_append_seconds_count", 3.0),
        ("gateway_publish_seconds_count", 3.0),
        ("gateway_published_total", 3.0),
        ("gateway_publish_in_flight", 0.0),
        ("gateway_publish_refusals_total{kind=\"too_large\"}", 0.0),
        ("gateway_confirmed_total", 3.0),
        ("gateway_deliveries_unconfirmed", 0.0),
        ("gateway_repeats_total{cause=\"missing\"}", 0.0),
        ("gateway_secrets", 1.0),
        ("gateway_check_ok{check=\"nats\"}", 1.0),
        ("log_lines_suppressed_total", 0.0),
    ];
    for (name, expected) in of_gateway {
        gateway.until_metric(name, expected).await;
    }
    assert!(gateway.metric("gateway_journal_written_bytes_total").await > bytes);
    assert!(gateway.metric("gateway_connections_accepted_total").await >= 6.0);
    gateway.until_metric("gateway_connections_open", 0.0).await;
    assert!(gateway.metric("process_start_time_seconds").await > 1.7e9);

    let of_worker = [
        ("worker_deliveries_total{outcome=\"stored\"}", 2.0),
        ("worker_deliveries_total{outcome=\"known\"}", 0.0),
        ("worker_deliveries_total{outcome=\"dead\"}", 1.0),
        ("worker_batch_deliveries_sum", 3.0),
        ("worker_delivery_age_seconds_count", 2.0),
        ("worker_consumer_pending", 0.0),
        ("worker_consumer_ack_pending", 0.0),
        ("worker_acks_unconfirmed_total", 0.0),
        ("worker_consumer_resets_total", 0.0),
        ("worker_check_ok{check=\"database\"}", 1.0),
    ];
    for (name, expected) in of_worker {
        worker.until_metric(name, expected).await;
    }
    let batches = worker.metric("worker_batch_deliveries_count").await;
    assert_eq!(worker.metric("worker_persist_seconds_count{outcome=\"stored\"}").await, batches);

    // An outage is counted by its class, and what was stored before as known.
    world.execute("ALTER TABLE issues RENAME TO elsewhere").await;
    let late = world.post(body).await.accepted();
    let class = "worker_retries_total{class=\"schema\"}";
    world::eventually("a retry", async || (worker.metric(class).await > 0.0).then_some(())).await;
    assert!(worker.metric("worker_persist_seconds_count{outcome=\"outage\"}").await > 0.0);
    world.execute("ALTER TABLE elsewhere RENAME TO issues").await;
    world.stored(&late).await;
    worker.until_metric("worker_deliveries_total{outcome=\"stored\"}", 3.0).await;
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    let again = stream.get_raw_message(1).await.unwrap();
    let mut headers = again.headers;
    headers.insert("Nats-Msg-Id", "another");
    world.jetstream().await.publish_with_headers(again.subject, headers, again.payload).await.unwrap().await.unwrap();
    worker.until_metric("worker_deliveries_total{outcome=\"known\"}", 1.0).await;
}

#[tokio::test]
async fn while_nats_is_away_there_is_no_lag_rather_than_an_old_one() {
    let world = setup().start().await;
    let worker = &world.workers[0];
    worker.until_metric("worker_consumer_pending", 0.0).await;
    world.nats.kill().await;
    let gone = async || worker.try_metric("worker_consumer_pending").await.is_none().then_some(());
    world::eventually("no lag to be shown", gone).await;
    worker.until_metric("worker_check_ok{check=\"nats\"}", 0.0).await;
    world.gateway.until_metric("gateway_check_ok{check=\"nats\"}", 0.0).await;
}
