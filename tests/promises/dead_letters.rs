//! What cannot be stored is kept with its reason, delays nobody, and is stored once the cause is gone.

use std::process::Stdio;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use world::{Connection, Post, Ran, World};

use crate::setup;

/// What refuses some of the bodies below: a constraint of each kind that somebody may add to Loop's tables.
const OBSTACLES: &str = "
    ALTER TABLE issues ADD CONSTRAINT no_poison CHECK (title NOT LIKE '%poison%');
    ALTER TABLE signals ADD CONSTRAINT weight CHECK ((payload ->> 'weight')::integer < 100);
    CREATE UNIQUE INDEX only_one ON signals (source_id) WHERE source_id = 'twin';
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'no %', NEW.source_id; END $$;
    CREATE TRIGGER refuses BEFORE INSERT ON signals FOR EACH ROW WHEN (NEW.source_id = 'refused')
        EXECUTE FUNCTION refuse()";
const FIX: &str = "
    ALTER TABLE issues DROP CONSTRAINT no_poison;
    ALTER TABLE signals DROP CONSTRAINT weight;
    DROP INDEX only_one;
    DROP TRIGGER refuses ON signals";

fn body(title: &str, source: &str, weight: &str) -> String {
    format!(r#"{{"weight":{weight},"data":{{"issue":{{"id":"{source}","title":"{title}"}}}}}}"#)
}

#[tokio::test]
async fn seven_bad_of_five_hundred_become_letters_that_a_fix_brings_back() {
    let mut world = setup().worker("WORKER_BATCH_MAX", "500").start().await;
    world.workers[0].kill().await;
    world.execute(OBSTACLES).await;
    let mut bodies: Vec<(String, Option<&str>)> =
        (0..500).map(|number| (body("fine", &number.to_string(), "1"), None)).collect();
    bodies[20].0 = body("fine", "twin", "1");
    let poison = [
        (0, "{\"cut\":".to_owned(), "not JSON"),
        (77, body("poison", "1", "1"), "SQLSTATE 23514, table issues, constraint no_poison"),
        (123, String::new(), "not JSON"),
        (200, body("more poison", "2", "1"), "SQLSTATE 23514"),
        (250, body("fine", "refused", "1"), "a trigger refuses it (SQLSTATE P0001"),
        (333, body("fine", "3", "\"heavy\""), "SQLSTATE 22P02"),
        (499, body("fine", "twin", "1"), "SQLSTATE 23505, table signals, constraint only_one"),
    ];
    for (at, body, reason) in &poison {
        bodies[*at] = (body.clone(), Some(reason));
    }
    let mut connection = Connection::open(world.port()).await.unwrap();
    let mut ids = Vec::new();
    for (body, _) in &bodies {
        ids.push(connection.send(&Post::signed(body.clone())).await.unwrap().accepted());
    }

    world.on_stream(500).await;
    // Foreseen as far as Loop's columns and constraints tell; what only the real table knows is not.
    let foreseen = world.worker(&["replay", "--dry-run", "--verbose"]).await;
    assert_eq!(foreseen.code, Some(1), "{}", foreseen.err);
    assert_eq!((foreseen.number("would insert"), foreseen.number("would become a dead letter")), (495, 5));
    for at in [0, 77, 123, 200, 333] {
        let line = foreseen.out.lines().find(|line| line.contains(&ids[at])).unwrap();
        assert!(line.contains(bodies[at].1.unwrap()), "{line}");
    }

    world.workers[0].start_again();
    world.all_acknowledged().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM issues").await, 493);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 493);
    let listed = world.worker(&["dead-letters", "list", "--json"]).await.json();
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 7);
    for (letter, (at, body, reason)) in listed.iter().zip(&poison) {
        assert_eq!((&letter["delivery_id"], &letter["bytes"]), (&ids[*at].as_str().into(), &body.len().into()));
        assert!(letter["reason"].as_str().unwrap().contains(reason), "{letter}");
    }
    let table = world.worker(&["dead-letters", "list", "--reason", "23", "--since", "1h"]).await;
    assert_eq!(table.out.lines().count(), 1 + 3, "{table:?}");
    assert!(!table.out.contains(&ids[0]) && table.out.contains(&ids[499]), "{table:?}");
    let none = world.worker(&["dead-letters", "list", "--until", "1h"]).await;
    assert_eq!(none.out, "no dead letters\n");
    let shown = world.worker(&["dead-letters", "show", &ids[77]]).await;
    assert!(shown.out.contains("Delivery-Id: ") && shown.out.contains("no_poison"), "{shown:?}");
    assert!(!shown.out.contains("more poison") && !shown.out.contains("weight"), "no body: {shown:?}");
    assert_eq!(world.worker(&["dead-letters", "show", "--body", &ids[77]]).await.out, poison[1].1);
    assert_eq!(world.worker(&["audit", "--json"]).await.json()["dead_letters"], 7);

    let too_early = world.worker(&["dead-letters", "retry", &ids[77], "nobody"]).await;
    assert_eq!(too_early.code, Some(1), "{too_early:?}");
    assert!(too_early.out.contains("still dead: a CHECK constraint") && too_early.out.contains("no such"));
    let attempts = "SELECT attempts FROM ingest.dead_letters WHERE delivery_id = $1";
    assert_eq!(world.query(attempts, &[&ids[77]]).await[0].get::<_, i32>(0), 2);

    world.execute(FIX).await;
    let retried = world.worker(&["dead-letters", "retry", "--all"]).await;
    assert_eq!(retried.code, Some(1), "what is no JSON is still none: {retried:?}");
    assert_eq!(retried.out.lines().filter(|line| line.ends_with("  stored")).count(), 5, "{retried:?}");
    for (at, body, _) in poison.iter().filter(|(_, body, _)| body.contains("weight")) {
        let stored = world.stored(&ids[*at]).await;
        assert_eq!(stored.signal["payload"], serde_json::from_str::<serde_json::Value>(body).unwrap());
        assert_eq!(stored.signal["created_at"], stored.issue["created_at"]);
    }
    let discarded = world.worker(&["dead-letters", "discard", "--all", "--yes", "--reason", "not json"]).await;
    assert_eq!(discarded.code, Some(0), "{discarded:?}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);

    let replay = world.worker(&["replay"]).await;
    assert_eq!((replay.number("already there"), replay.number("discarded")), (498, 2), "{replay:?}");
    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!((&audit.json()["stored"], &audit.json()["discarded"]), (&498.into(), &2.into()), "{audit:?}");
    assert_eq!(audit.code, Some(0));
}

const LETTERS: &str = "SELECT count(*) FROM ingest.dead_letters";

/// Runs a command of the worker's on a terminal, at which a person types `answer`.
async fn on_a_terminal(world: &World, arguments: &[&str], answer: &str) -> Ran {
    let inside = world.worker_command(arguments);
    let words: Vec<_> = std::iter::once(inside.as_std().get_program()).chain(inside.as_std().get_args()).collect();
    let line = words.iter().map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ");
    let mut command = tokio::process::Command::new("script");
    command.args(["-qec", &line, "/dev/null"]).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.envs(inside.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut keyboard = child.stdin.take().unwrap();
    keyboard.write_all(answer.as_bytes()).await.unwrap();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(60), child.wait_with_output()).await;
    let ran = Ran::of(ended.expect("the command ends").unwrap());
    drop(keyboard);
    ran
}

#[tokio::test]
async fn letters_are_discarded_only_where_it_is_meant_and_come_back() {
    let world = setup().start().await;
    world.execute("ALTER TABLE issues ADD CONSTRAINT no_poison CHECK (title NOT LIKE '%poison%')").await;
    let poison = world.post(body("poison", "1", "1")).await.accepted();
    let broken = world.post("no JSON").await.accepted();
    world.until(LETTERS, 2_i64).await;
    world.all_acknowledged().await;

    // An empty filter would leave all letters.
    for command in ["list", "retry", "discard"] {
        for empty in ["", "  "] {
            let all: &[&str] = if command == "list" { &[] } else { &["--all"] };
            let ran = world.worker(&[&["dead-letters", command, "--reason", empty], all].concat()).await;
            assert_eq!(ran.code, Some(64), "{command} {empty:?}: {ran:?}");
            assert!(ran.err.contains("--reason"), "{ran:?}");
        }
    }
    // Without a terminal the operator has to say that it is meant.
    let asked = world.worker(&["dead-letters", "discard", "--all"]).await;
    assert_eq!(asked.code, Some(64), "{asked:?}");
    assert!(asked.err.contains("--yes") && asked.err.contains("--dry-run"), "{asked:?}");
    assert_eq!(world.value::<i64>(LETTERS).await, 2, "nothing is discarded");
    let dry = world.worker(&["dead-letters", "discard", "--all", "--dry-run"]).await;
    assert_eq!(dry.code, Some(0), "{dry:?}");
    for part in ["2 letters", "no_poison", "not JSON", "--restore-discarded"] {
        assert!(dry.out.contains(part), "no {part}: {dry:?}");
    }
    let one = world.worker(&["dead-letters", "discard", "--dry-run", &broken, "nobody"]).await;
    assert!(one.out.contains("1 letter") && !one.out.contains("no_poison"), "{one:?}");
    let no = on_a_terminal(&world, &["dead-letters", "discard", "--all"], "no\n").await;
    assert_eq!(no.code, Some(2), "{no:?}");
    assert!(no.out.contains("2 letters") && no.out.contains("no_poison"), "{no:?}");
    assert_eq!(world.value::<i64>(LETTERS).await, 2, "nothing is discarded");
    let yes = on_a_terminal(&world, &["dead-letters", "discard", "--all"], "yes\n").await;
    assert_eq!(yes.code, Some(0), "{yes:?}");
    assert_eq!(world.value::<i64>(LETTERS).await, 0);

    // The undo: what can be stored today is stored, the rest is a letter again.
    world.execute("ALTER TABLE issues DROP CONSTRAINT no_poison").await;
    let nothing = world.worker(&["replay"]).await;
    assert_eq!((nothing.code, nothing.number("discarded")), (Some(0), 2), "{nothing:?}");
    let foreseen = world.worker(&["replay", "--restore-discarded", "--dry-run"]).await;
    assert_eq!(foreseen.number("discarded, would be stored"), 1, "{foreseen:?}");
    assert_eq!(foreseen.number("would become a dead letter"), 1, "{foreseen:?}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.deliveries WHERE state = 'discarded'").await, 2);
    let restored = world.worker(&["replay", "--restore-discarded"]).await;
    assert_eq!(restored.code, Some(1), "one is a letter again: {restored:?}");
    assert_eq!(restored.number("was discarded, stored now"), 1, "{restored:?}");
    world.stored(&poison).await;
    let listed = world.worker(&["dead-letters", "list", "--json"]).await.json();
    assert_eq!((listed.as_array().unwrap().len(), &listed[0]["delivery_id"]), (1, &broken.as_str().into()));
    let again = world.worker(&["replay", "--restore-discarded"]).await;
    assert_eq!((again.code, again.number("a dead letter already")), (Some(0), 1), "{again:?}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM signals").await, 1);
}

#[tokio::test]
async fn a_long_list_of_letters_takes_little_memory() {
    const COUNT: usize = 20_000;
    let world = setup().start().await;
    let letters = format!(
        "INSERT INTO ingest.dead_letters
             (delivery_id, stream_sequence, subject, headers, body, reason, attempts, failed_at)
         SELECT 'letter-' || n, n / 3, 'signals.sentry.issue', jsonb_build_object('Long', repeat(md5(n::text), 128)),
                '', 'not JSON', 1, now()
         FROM generate_series(1, {COUNT}) AS n"
    );
    world.execute(&letters).await;
    let mut command = world.worker_command(&["dead-letters", "list", "--json"]);
    let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut text = vec![0];
    out.read_exact(&mut text).await.unwrap(); // the rest waits in the pipe, and the command behind it
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id().unwrap())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim().trim_end_matches(" kB");
    let peak = peak.parse::<u64>().unwrap() >> 10;
    assert!(peak < 64, "{peak} MiB for the first of {COUNT} letters of 4 KiB");
    out.read_to_end(&mut text).await.unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), COUNT);
    let ids: std::collections::HashSet<_> = listed.iter().map(|letter| letter["delivery_id"].as_str()).collect();
    assert_eq!(ids.len(), COUNT);
    assert!(listed.is_sorted_by_key(|letter| letter["stream_sequence"].as_u64()));
    assert!(child.wait().await.unwrap().success());
    let table = world.worker(&["dead-letters", "list"]).await;
    assert_eq!(table.out.lines().count(), 1 + COUNT);
}
