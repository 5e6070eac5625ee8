//! What cannot be stored is kept with its reason, delays nobody, and is stored once the cause is gone.

use world::{Connection, Post};

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
    let discarded = world.worker(&["dead-letters", "discard", "--all", "--reason", "not json"]).await;
    assert_eq!(discarded.code, Some(0), "{discarded:?}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM ingest.dead_letters").await, 0);

    let replay = world.worker(&["replay"]).await;
    assert_eq!((replay.number("already there"), replay.number("discarded")), (498, 2), "{replay:?}");
    let audit = world.worker(&["audit", "--json"]).await;
    assert_eq!((&audit.json()["stored"], &audit.json()["discarded"]), (&498.into(), &2.into()), "{audit:?}");
    assert_eq!(audit.code, Some(0));
}
