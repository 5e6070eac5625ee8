//! A sender's text steers no terminal and hides nothing: titles have no hidden characters, commands print them as escapes.

use async_nats::HeaderMap;
use serde_json::json;
use world::World;

use crate::setup;

/// Controls, line and paragraph separators, bidi controls, characters without width, tags, private use, noncharacters.
const HOSTILE: &str = "\u{1b}]0;\u{7}\u{9b}31m\u{7f}\r\n\t\u{85}\u{2028}\u{2029}\u{202e}\u{2066}\u{2069}\u{200e}\u{61c}\
                       \u{200b}\u{feff}\u{ad}\u{2060}\u{e0041}\u{e007f}\u{e000}\u{f0000}\u{10fffd}\u{fdd0}\u{ffff}";

/// `true`: it is of one of those kinds.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{feff}')
        || ('\u{2028}'..='\u{202e}').contains(&c)
        || ('\u{2060}'..='\u{206f}').contains(&c)
        || ('\u{e000}'..='\u{f8ff}').contains(&c)
        || ('\u{fdd0}'..='\u{fdef}').contains(&c)
        || c >= '\u{e0000}'
        || (c as u32) & 0xfffe == 0xfffe
}

async fn title(world: &World, data: serde_json::Value) -> String {
    let id = world.post(json!({ "action": "created", "data": data }).to_string()).await.accepted();
    let title = world.stored(&id).await.issue["title"].as_str().unwrap().to_owned();
    assert!(!title.contains(is_hidden), "{title:?}");
    title
}

#[tokio::test]
async fn titles_are_one_line_of_what_can_be_seen() {
    let world = setup().start().await;
    let with = |text: &str| format!("{HOSTILE}{text}{HOSTILE}");
    let issue = json!({ "issue": { "title": with("a") + "b", "id": 7 } });
    assert_eq!(title(&world, issue).await, "Sentry: ]0;31m a]0;31m b (1 events)");
    // A title of hidden characters alone counts as absent.
    let nothing = "\u{202e}\u{200b} \u{e0041}\n";
    let fallen = json!({ "issue": { "title": nothing }, "error": { "title": "from error" } });
    assert_eq!(title(&world, fallen).await, "Sentry: from error (1 events)");
    assert_eq!(title(&world, json!({ "event": { "title": nothing } })).await, "Sentry: Unknown error (1 events)");
    let alert = json!({ "metric_alert": { "title": "a\u{2066}b" }, "description_title": nothing });
    assert_eq!(title(&world, alert).await, "Sentry: ab");
    assert_eq!(title(&world, json!({ "comment": "a\u{202e}\u{2028}b" })).await, "Sentry: comment created: a b");
    let named = json!({ "installation": { "app": { "slug": "a\u{e0041}b" }, "organization": { "slug": nothing } } });
    assert_eq!(title(&world, named).await, "Sentry: installation created: ab");
    // Scripts and emoji that need joiners keep them.
    for kept in ["می‌خواهم", "क्‍ष", "👩‍👧", "Liegeplatz „Süd-7“ für 海鸥号 🚢"] {
        let issue = json!({ "issue": { "title": kept } });
        assert_eq!(title(&world, issue).await, format!("Sentry: {kept} (1 events)"));
    }
    // The payload is stored as it came.
    let text = "\u{202e}\u{e0041}".to_owned();
    let id = world.post(json!({ "data": { "issue": { "title": text } } }).to_string()).await.accepted();
    assert_eq!(world.stored(&id).await.signal["payload"]["data"]["issue"]["title"], text);
    // A dry run tells of a title that an older version stored, and escapes it.
    world
        .execute("UPDATE issues SET title = E'Sentry: \\u202e\\u001b[31mab (1 events)' WHERE title = 'Sentry: ab'")
        .await;
    let ran = world.worker(&["replay", "--dry-run", "--verbose"]).await;
    assert_eq!(ran.number("already there, would today get another severity or title"), 1, "{ran:?}");
    assert!(ran.out.contains(r"\u{202e}\u{1b}[31mab (1 events)") && is_shown(&ran.out), "{ran:?}");
}

/// `true`: it has no hidden character but line feeds.
fn is_shown(printed: &str) -> bool {
    !printed.replace('\n', "").contains(is_hidden)
}

#[tokio::test]
async fn commands_print_what_strangers_wrote_as_escapes() {
    let world = setup().start().await;
    // A message of another publisher: it chooses subject and headers, and the body is no delivery.
    let mut headers = HeaderMap::new();
    headers.insert("X-Note", "\u{9b}31m\u{202e}\u{e0041}\u{1b}[2J");
    let client = async_nats::connect(world.nats.url()).await.unwrap();
    let subject = "signals.sentry.\u{1b}[31m\u{202e}red";
    client.publish_with_headers(subject, headers, "not JSON".into()).await.unwrap();
    client.flush().await.unwrap();
    world.until("SELECT count(*) FROM ingest.dead_letters", 1_i64).await;
    // A reason with hidden characters, as an error of PostgreSQL's could have them.
    world
        .execute("UPDATE ingest.dead_letters SET reason = reason || E' \\u202e\\u001b[31m\\n\\u2028forged line'")
        .await;
    let id: String = world.value("SELECT delivery_id FROM ingest.dead_letters").await;
    let escaped = |text: &str| [r"\u{1b}[31m", r"\u{202e}"].iter().all(|part| text.contains(part));
    let shown = world.worker(&["dead-letters", "show", &id]).await;
    assert!(escaped(&shown.out) && is_shown(&shown.out), "{shown:?}");
    assert!(shown.out.contains(r"X-Note: \u{9b}31m\u{202e}\u{e0041}\u{1b}[2J"), "{shown:?}");
    let listed = world.worker(&["dead-letters", "list"]).await;
    assert!(escaped(&listed.out) && is_shown(&listed.out), "{listed:?}");
    assert_eq!(listed.out.lines().count(), 2, "a heading and one letter: {listed:?}");
    let retried = world.worker(&["dead-letters", "retry", &id, "\u{1b}[31m\u{202e}"]).await;
    assert!(escaped(&retried.out) && is_shown(&retried.out), "{retried:?}");
    // JSON has the same values, with its own escapes.
    world.execute("UPDATE ingest.dead_letters SET reason = E'\\u202e\\u009b\\u2028'").await;
    for arguments in [&["dead-letters", "list", "--json"][..], &["dead-letters", "show", &id, "--json"]] {
        let ran = world.worker(arguments).await;
        assert!(is_shown(&ran.out), "{ran:?}");
        let letter = if ran.json().is_array() { ran.json()[0].clone() } else { ran.json() };
        assert_eq!((&letter["subject"], &letter["reason"]), (&subject.into(), &"\u{202e}\u{9b}\u{2028}".into()));
    }
}
