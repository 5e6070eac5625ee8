//! Bodies of the largest size that is let in, made to cost as much as they can: each comes out right, and the time for
//! each is in proportion to its length.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use gateway::canonical::canonical;

/// `GATEWAY_MAX_BODY_BYTES`, unless set; an eighth of it where nothing is optimised, or the tests take minutes.
const SIZE: usize = if cfg!(debug_assertions) { 1 << 20 } else { 8 << 20 };

struct Hostile {
    about: &'static str,
    body: String,
    form: String,
}

/// As many copies of `unit` as fit.
fn fill(unit: &str) -> String {
    unit.repeat(SIZE / unit.len())
}

/// `[unit,unit,...]`, and the same of what becomes of the unit.
fn list(about: &'static str, unit: &str, becomes: &str) -> Hostile {
    let count = SIZE / (unit.len() + 1);
    let of = |unit: &str| format!("[{}]", vec![unit; count].join(","));
    Hostile { about, body: of(unit), form: of(becomes) }
}

/// `open` nested as deep as fits around `0`; becomes `turned` on the way in and `closed` on the way out.
fn nested(about: &'static str, [open, close]: [&str; 2], [turned, closed]: [&str; 2]) -> Hostile {
    let depth = SIZE / (open.len() + close.len());
    let around = |open: &str, close: &str| format!("{}0{}", open.repeat(depth), close.repeat(depth));
    Hostile { about, body: around(open, close), form: around(turned, closed) }
}

/// An object of the members that `keys` names, each with its number as value.
fn object(keys: impl Iterator<Item = (String, usize)>) -> String {
    let mut text = String::from("{");
    for (key, value) in keys {
        let comma = if text.len() > 1 { "," } else { "" };
        write!(text, "{comma}\"{key}\":{value}").unwrap();
    }
    text + "}"
}

/// One event after another, in canonical form: what the others are measured by.
fn flat() -> Hostile {
    let frame = concat!(
        r#"{"filename":"app/orders/checkout.py","function":"confirm_payment","lineno":1142,"colno":null,"in_app":true,"#,
        r#""context_line":"        raise PaymentError(\"card %s\" % card)","pre_context":["    with atomic():","#,
        r#""        order.lock()"],"vars":{"card":"<Card 42>","total":99.9},"data":{}}"#
    );
    list("flat (the measure)", frame, frame)
}

fn all() -> Vec<Hostile> {
    let many = SIZE / 16; // members of an object
    let numbered = |prefix: &'static str, value: fn(usize, usize) -> usize| {
        object((0..many).map(|i| (format!("{prefix}{i}"), value(i, many))))
    };
    let twice = |i: usize| (format!("k{}", i % (many / 2)), i);
    let ascending = object((0..many).map(|i| (i.to_string(), i)));
    let prefix = "p".repeat(1 << 12);
    let long = |i: usize| (format!("{prefix}{:04}", i % 1000), i);
    let huge = "h".repeat(SIZE / 8 - 10);
    let alike = object((0..64).map(|i| (format!("abcdefgh{i:02}abcdefgh"), i)));
    vec![
        flat(),
        list("small objects, in order", "{\"b\":0,\"c\":0}", "{\"b\":0,\"c\":0}"),
        nested("nested, index after name", ["{\"b\":0,\"1\":", "}"], ["{\"1\":", ",\"b\":0}"]),
        nested("nested, name before index, spaced", ["{ \"b\" : 0 , \"1\" : ", " }"], ["{\"1\":", ",\"b\":0}"]),
        nested("nested, equal keys", ["{\"a\":0,\"a\":", "}"], ["{\"a\":", "}"]),
        nested("deep arrays", ["[", "]"], ["[", "]"]),
        nested("deep objects", ["{\"\":", "}"], ["{\"\":", "}"]),
        list("small objects, index after name", "{\"b\":0,\"1\":0}", "{\"1\":0,\"b\":0}"),
        list("small objects, equal keys", "{\"a\":0,\"a\":1}", "{\"a\":1}"),
        list("64 keys of one tag", &alike, &alike),
        Hostile {
            about: "one key, again and again",
            body: format!("{{{}\"a\":1}}", fill("\"a\":0,")),
            form: "{\"a\":1}".into(),
        },
        Hostile { about: "many names", body: numbered("k", |i, _| i), form: numbered("k", |i, _| i) },
        Hostile {
            about: "many names, each twice",
            body: object((0..many).map(twice)),
            form: object((many / 2..many).map(twice)),
        },
        Hostile {
            about: "many indices, descending",
            body: object((0..many).rev().map(|i| (i.to_string(), i))),
            form: ascending.clone(),
        },
        Hostile {
            about: "many indices, shuffled",
            // A number without a common divisor with a power of two: every index comes once.
            body: object((0..many).map(|i| i * 7_654_321 % many).map(|i| (i.to_string(), i))),
            form: ascending,
        },
        Hostile {
            about: "keys that differ at their end",
            body: object((0..2000).map(long)),
            form: object((1000..2000).map(long)),
        },
        Hostile {
            about: "8 equal keys of 1 MiB",
            body: object((0..8).map(|i| (huge.clone(), i))),
            form: object([(huge.clone(), 7)].into_iter()),
        },
        Hostile {
            about: "one key of all",
            body: format!("{{\"{}\":0}}", fill("k")),
            form: format!("{{\"{}\":0}}", fill("k")),
        },
        Hostile {
            about: "one key of all, escaped",
            body: format!("{{\"{}\":0}}", fill("\\u006b")),
            form: format!("{{\"{}\":0}}", "k".repeat(SIZE / 6)),
        },
        list("escapes that grow", "\"\\u00e9\\ud83d\\ude00\\u001F\\/\"", "\"é😀\\u001f/\""),
        list("spaces", " 0 ", "0"),
        list("whole numbers", "0", "0"),
        list("exponents", "1e5", "100000"),
        list("numbers that grow", "1e20", "100000000000000000000"),
        list("long fractions", "0.1234567890123456", "0.1234567890123456"),
        list("halfway between two doubles", "1.00000000000000011102230246251565404236316680908203125", "1"),
        list("halfway, far below one", "2.4703282292062327208e-324", "0"),
        Hostile { about: "one number of all", body: fill("9"), form: "null".into() },
    ]
}

#[test]
fn hostile_bodies_have_the_right_form() {
    for Hostile { about, body, form } in all() {
        assert!(canonical(body.as_bytes()).unwrap() == form.as_bytes(), "{about}: not the form expected");
    }
    // No text: every byte becomes three.
    let body = [b"\"".as_slice(), &[0xff].repeat(SIZE), b"\""].concat();
    assert!(canonical(&body).unwrap() == format!("\"{}\"", "\u{fffd}".repeat(SIZE)).as_bytes());
}

/// Prints what each costs beside a flat body of the same size:
/// `cargo test --release -p tests --test promises -- --ignored --nocapture hostile_bodies_timed`
#[test]
#[ignore = "a measurement: only a release build on a quiet machine tells anything"]
fn hostile_bodies_timed() {
    let flat = flat();
    println!("{:<34} {:>10} {:>8}", "body of 8 MiB", "time", "x flat");
    for Hostile { about, body, .. } in all() {
        // One beside the other: what else this machine does hits both.
        let rounds = (0..9).map(|_| (timed(flat.body.as_bytes()), timed(body.as_bytes())));
        let (of_flat, time) = rounds.reduce(|best, now| (best.0.min(now.0), best.1.min(now.1))).unwrap();
        let ratio = time.as_secs_f64() / of_flat.as_secs_f64();
        println!("{about:<34} {:>7.1} ms {ratio:>8.1}", time.as_secs_f64() * 1e3);
    }
}

fn timed(body: &[u8]) -> Duration {
    let start = Instant::now();
    std::hint::black_box(canonical(body).unwrap());
    start.elapsed()
}
