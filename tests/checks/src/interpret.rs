//! What a worker makes of a body: its meaning, and the jsonb text that PostgreSQL gets.

use std::borrow::Cow;

use gateway::canonical::canonical;
use shared::text::is_hidden;
use worker::interpret::interpret;
use worker::payload::payload;

use crate::javascript::{self, Value};

/// The most characters that any text of a [`worker::interpret::Meaning`] has: a notice's title is made of several, each cut
/// at 500.
const LONGEST: usize = 4_000;

/// Of any body: the gateway's canonical form, the meaning and the payload agree on what is JSON. The meaning's texts are
/// short texts for PostgreSQL, the title one line. It is the meaning of the canonical form, too. The payload is the same
/// value as the body, but for what jsonb cannot hold, and needs no second change.
pub fn check(body: &[u8]) {
    let form = canonical(body);
    let (meaning, text) = match (&form, interpret(body), payload(body)) {
        (Ok(_), Ok(meaning), Ok(text)) => (meaning, text),
        (Err(_), Err(_), Err(_)) => return,
        (form, meaning, text) => {
            panic!("JSON or not? {:?}, {:?}, {:?}", form.as_ref().err(), meaning.err(), text.err())
        }
    };
    for text in [Some(&meaning.kind), Some(&meaning.title), meaning.source_id.as_ref()].into_iter().flatten() {
        assert!(!text.contains('\0'), "no text for PostgreSQL: {text:?}");
        assert!(text.chars().count() <= LONGEST, "{} characters", text.chars().count());
    }
    assert!(!meaning.title.contains(is_hidden), "not one line of what can be seen: {:?}", meaning.title);
    assert!(matches!(payload(text.as_bytes()), Ok(Cow::Borrowed(again)) if again == text), "changed twice");
    let Ok(value) = javascript::parse(body) else { return }; // too deep
    let stored = javascript::parse(text.as_bytes()).expect("the payload is JSON");
    assert_stored(&value, &stored);
    if !value.any(&differs_when_canonical) {
        let form = form.expect("returned above");
        assert_eq!(interpret(&form).as_ref(), Ok(&meaning), "the canonical form means something else");
    }
}

/// What the canonical form does not keep, rightly: numbers beyond f64, which it writes as null, and the order of members,
/// which counts in one object alone.
fn differs_when_canonical(value: &Value) -> bool {
    match value {
        Value::Number(literal) => literal.parse().is_ok_and(|number: f64| number.is_infinite()),
        Value::String(key) => *key == "code_changes".encode_utf16().collect::<Vec<_>>(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => false,
    }
}

/// That `stored` is `value` but for what jsonb cannot hold: U+0000 and lone surrogates, and large numbers.
fn assert_stored(value: &Value, stored: &Value) {
    match (value, stored) {
        (Value::Array(values), Value::Array(stored)) => {
            assert_eq!(values.len(), stored.len());
            values.iter().zip(stored).for_each(|(value, stored)| assert_stored(value, stored));
        }
        (Value::Object(members), Value::Object(stored)) => {
            assert_eq!(members.len(), stored.len());
            for ((key, value), (stored_key, stored)) in members.iter().zip(stored) {
                assert_eq!(storable(key), *stored_key);
                assert_stored(value, stored);
            }
        }
        (Value::String(string), Value::String(stored)) => assert_eq!(storable(string), *stored),
        (Value::Number(literal), Value::String(stored)) => {
            assert_eq!(*literal, String::from_utf16_lossy(stored));
            let is_large = literal.len() > 16_383 || literal.contains(['e', 'E']);
            assert!(is_large, "a number that jsonb holds became a string: {literal}");
        }
        _ => assert_eq!(value, stored),
    }
}

/// A string's code units as PostgreSQL's text can hold them.
fn storable(units: &[u16]) -> Vec<u16> {
    let storable = |unit: Result<char, _>| unit.ok().filter(|c| *c != '\0').unwrap_or(char::REPLACEMENT_CHARACTER);
    char::decode_utf16(units.iter().copied()).map(storable).collect::<String>().encode_utf16().collect()
}
