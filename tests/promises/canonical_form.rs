//! The canonical form is `JSON.stringify(JSON.parse(text))`, byte for byte as V8 computes it, whatever strangers send.

mod hostile;
mod nasty;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use gateway::canonical::canonical;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("canonical")
}

/// As the oracle answers: the form in hex, or `not JSON`.
pub(crate) fn answer(body: &[u8]) -> String {
    canonical(body).map_or_else(|_| "not JSON".into(), hex::encode)
}

/// What V8 answered when `make_vectors.mjs` ran.
#[test]
fn vectors_made_by_node() {
    let path = folder().join("vectors.jsonl");
    let vectors = std::fs::read_to_string(&path).unwrap();
    let mut wrong = Vec::new();
    for (line, vector) in vectors.lines().enumerate() {
        let vector: serde_json::Value = serde_json::from_str(vector).unwrap();
        let body = match vector["hex"].as_str() {
            Some(digits) => hex::decode(digits).unwrap(),
            None => vector["body"].as_str().unwrap().as_bytes().to_vec(),
        };
        let expected = vector["form"].as_str().map_or_else(|| "not JSON".into(), hex::encode);
        if answer(&body) != expected {
            wrong.push(format!("line {}, {}: {vector}", line + 1, vector["about"]));
        }
    }
    assert!(wrong.is_empty(), "{} vectors of {}:\n{}", wrong.len(), path.display(), wrong.join("\n"));
    assert!(vectors.lines().count() > 500, "{} was cut short", path.display());
}

/// What V8 answers now, to bodies nobody thought of. New ones at every run; `CANONICAL_SEED` brings a run back.
#[test]
fn node_agrees_on_nasty_bodies() {
    const BODIES: usize = 5000;
    let seed = match std::env::var("CANONICAL_SEED") {
        Ok(seed) => seed.parse().expect("CANONICAL_SEED is a whole number"),
        Err(_) => fastrand::u64(..),
    };
    let mut random = fastrand::Rng::with_seed(seed);
    let bodies: Vec<Vec<u8>> = (0..BODIES).map(|_| nasty::body(&mut random)).collect();
    let Some(answers) = ask_node(&bodies) else {
        return world::skipped("node_agrees_on_nasty_bodies", "there is no `node` on PATH");
    };
    assert_eq!(answers.len(), BODIES);
    for (body, expected) in bodies.iter().zip(&answers) {
        assert!(
            *expected == answer(body) || expected == "too deep",
            "CANONICAL_SEED={seed}\nbody  {}\ntext  {}\nNode  {expected}\nours  {}",
            hex::encode(body),
            String::from_utf8_lossy(body),
            answer(body)
        );
    }
    let json = answers.iter().filter(|answer| *answer != "not JSON").count();
    assert!(
        json > BODIES / 3 && json < BODIES * 9 / 10,
        "{json} of {BODIES} are JSON: too much alike to tell anything"
    );
}

/// The answers of `oracle.mjs`, `None` without Node.
pub(crate) fn ask_node(bodies: &[Vec<u8>]) -> Option<Vec<String>> {
    let mut node = Command::new("node");
    node.arg(folder().join("oracle.mjs")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut node = match node.spawn() {
        Ok(node) => node,
        Err(problem) if problem.kind() == std::io::ErrorKind::NotFound => return None,
        Err(problem) => panic!("node does not start: {problem}"),
    };
    let mut questions = node.stdin.take().unwrap();
    let answers = BufReader::new(node.stdout.take().unwrap());
    let answers = std::thread::scope(|scope| {
        // Both ways at once: with all questions first, both pipes would fill up and both sides wait.
        scope.spawn(move || {
            for body in bodies {
                // Fails only when Node is gone; then its exit code and the number of answers say so.
                let _ = writeln!(questions, "{}", hex::encode(body));
            }
        });
        answers.lines().collect::<Result<Vec<_>, _>>().unwrap()
    });
    assert!(node.wait().unwrap().success(), "the oracle failed");
    Some(answers)
}
