//! What the fuzzers left behind (`fuzz/corpus`: a small body of inputs that reaches everything they ever reached, and each
//! input that once broke something) passes their checks; and JavaScript and PostgreSQL themselves, which no fuzzer can ask
//! a thousand times a second, agree on it.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use checks::http::Door;
use checks::message::Seen;
use shared::delivery::Delivery;
use shared::hostile::StoredMessage;
use worker::pull::unreadable_letter;
use worker::read::read_message;
use worker::store::{Batch, Origin};

use crate::canonical_form;
use crate::store::Database;

/// The inputs of a fuzzer: name and bytes.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    inputs(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target))
}

fn inputs(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut inputs: Vec<_> =
        files.map(|file| file.unwrap().path()).map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    inputs.sort();
    inputs
}

/// Runs a check on each input of its fuzzer, and names those that do not pass. What the check says of them is above.
fn pass<T>(target: &str, check: impl Fn(&[u8]) -> T) -> Vec<T> {
    let (mut results, mut failed) = (Vec::new(), Vec::new());
    for (name, input) in corpus(target) {
        match catch_unwind(AssertUnwindSafe(|| check(&input))) {
            Ok(result) => results.push(result),
            Err(_) => failed.push(name),
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
    results
}

#[test]
fn the_canonical_form_is_javascripts() {
    pass("canonical", checks::canonical::check);
    pass("interpret", checks::canonical::check);
}

#[test]
fn meaning_and_payload_hold_what_the_body_says() {
    pass("interpret", checks::interpret::check);
    pass("canonical", checks::interpret::check);
}

#[test]
fn a_journal_of_any_bytes_gives_out_what_is_intact_and_nothing_else() {
    pass("journal", checks::journal::check);
}

#[test]
fn a_connection_of_any_bytes_gets_clean_answers_and_nothing_unsigned_is_taken() {
    let door = Door::new();
    let seen = pass("http", |input| checks::http::check(&door, input));
    let seen: BTreeSet<u16> = seen.into_iter().flat_map(|seen| seen.statuses).collect();
    assert_eq!(seen, [202, 400, 401, 404, 405, 408, 413, 431, 501].into(), "the corpus reaches every answer");
}

#[test]
fn a_message_of_any_bytes_is_a_row_or_a_dead_letter() {
    let seen: BTreeSet<Seen> = pass("message", checks::message::check).into_iter().collect();
    let unreadable = seen.iter().filter(|seen| matches!(seen, Seen::Unreadable(_))).count();
    assert!(seen.contains(&Seen::Record) && seen.contains(&Seen::NotJson), "{seen:?}");
    assert_eq!(unreadable, 6, "the corpus reaches every reason: {seen:?}");
}

/// Also of another folder, such as a fuzzer's while it runs: `CANONICAL_CORPUS=folder`.
#[test]
fn node_agrees_on_what_the_fuzzers_found() {
    let mut bodies = [corpus("canonical"), corpus("interpret")].concat();
    if let Some(folder) = std::env::var_os("CANONICAL_CORPUS") {
        bodies.extend(inputs(Path::new(&folder)));
    }
    let (names, bodies): (Vec<_>, Vec<_>) = bodies.into_iter().unzip();
    let Some(answers) = canonical_form::ask_node(&bodies) else {
        return world::skipped("node_agrees_on_what_the_fuzzers_found", "there is no `node` on PATH");
    };
    assert_eq!(answers.len(), bodies.len());
    for ((name, body), expected) in names.iter().zip(&bodies).zip(&answers) {
        let ours = canonical_form::answer(body);
        assert!(ours == *expected || expected == "too deep", "{}\nNode  {expected}\nours  {ours}", name.display());
    }
    println!("Node agrees on {} bodies", bodies.len());
}

/// All of them together, as they might come: a delivery whose body is JSON becomes its rows, any other a dead letter, and
/// none takes its batch down. PostgreSQL can give back what it took.
#[tokio::test]
async fn postgresql_takes_what_the_fuzzers_found() {
    let database = Database::migrated().await;
    let store = database.store();
    let bodies: Vec<_> = [corpus("interpret"), corpus("canonical")].concat();
    let (mut fresh, mut dead) = (0, 0);
    for (number, bodies) in bodies.chunks(256).enumerate() {
        let mut batch = Batch::default();
        for (place, (_, body)) in bodies.iter().enumerate() {
            let body = Bytes::from(body.clone());
            let delivery = Delivery::received(body.clone(), None, Some(b"issue"), None);
            let origin = Origin { subject: "signals.sentry.issue".into(), body, attempts: 1, ..Origin::default() };
            match worker::read::read(&delivery, (number * 256 + place) as u64, origin) {
                Ok(record) => batch.records.push(record),
                Err(letter) => batch.dead_letters.push(*letter),
            }
        }
        let stored = store.persist(&batch).await.unwrap();
        let refused: Vec<_> = stored.dead.iter().filter(|dead| !dead.reason.contains("not JSON")).collect();
        assert!(refused.is_empty(), "PostgreSQL refused what it was thought to take: {refused:?}");
        assert_eq!((stored.fresh.len(), stored.dead.len()), (batch.records.len(), batch.dead_letters.len()));
        fresh += stored.fresh.len() as i64;
        dead += stored.dead.len() as i64;
    }
    let mut messages = Batch::default();
    for ((_, input), sequence) in corpus("message").iter().zip(1..) {
        let stored = StoredMessage { sequence, ..checks::message::parts(input) };
        match (unreadable_letter(&stored), stored.to_message()) {
            (Some(letter), _) => messages.dead_letters.push(letter),
            (None, Ok(message)) => match read_message(&message, stored.sequence, stored.stored_at, 1) {
                Ok(record) => messages.records.push(record),
                Err(letter) => messages.dead_letters.push(*letter),
            },
            (None, Err(why)) => unreachable!("it has a letter: {why}"),
        }
    }
    let stored = store.persist(&messages).await.unwrap();
    fresh += stored.fresh.len() as i64;
    dead += stored.dead.len() as i64;
    assert!(stored.fresh.len() > 3 && stored.dead.len() > 6, "{stored:?}");
    assert_eq!(database.counts().await, [fresh, fresh, fresh + dead, dead]);
    assert!(fresh > 100 && dead > 10, "{fresh} stored and {dead} dead letters: too few to tell anything");
    let readable = "SELECT count(*)::text FROM signals WHERE length(payload::text) > 0";
    assert_eq!(database.text(readable).await, fresh.to_string());
}
