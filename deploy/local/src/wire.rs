//! A JSON text the way Sentry puts it on the wire, byte for byte: what Python's
//! `json.dumps(value, separators=(",", ":"))` makes of it (Sentry: `simplejson` with `ignore_nan`), with the members of
//! the top level in the order `action`, `installation`, `data`, `actor`.
//!
//! The bytes matter, because the signature is over them: Python keeps `1.0` and integers of any size, writes `1e-07`,
//! escapes everything outside printable ASCII, and keeps its keys in their order, where JavaScript does none of that.
//! So this is written on the tokens and not on a tree whose numbers are f64.

use std::ops::Range;

use shared::json::{NotJson, Reader, Str, Token, Unit, decode};

/// The order in which Sentry writes the members of the top level; others follow as they were.
const ORDER: [&str; 4] = ["\"action\"", "\"installation\"", "\"data\"", "\"actor\""];

/// A payload as Sentry sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wire {
    /// The request body.
    pub body: Vec<u8>,
    /// What Sentry would call it in `Sentry-Hook-Resource`, by the keys of its `data`; `issue` where they say nothing.
    pub resource: &'static str,
}

/// An object that is not closed yet.
struct Open {
    /// Where its brace is in the output.
    start: usize,
    /// Its members so far: the key as it was written (ASCII, so equal keys are equal texts) and the whole member.
    members: Vec<(Range<usize>, Range<usize>)>,
}

/// Writes `text` (a body as it stands in a file) as Sentry would.
///
/// # Errors
/// [`NotJson`] where it is none.
pub fn of(text: &[u8]) -> Result<Wire, NotJson> {
    let text = decode(text);
    let mut reader = Reader::new(&text);
    let mut out = String::with_capacity(text.len());
    let mut objects: Vec<Open> = Vec::new(); // no recursion: the depth is the file's
    let mut resource = "issue";
    let mut after_key = false;
    while let Some(token) = reader.next()? {
        let closes = matches!(token, Token::ObjectEnd | Token::ArrayEnd);
        if !closes && !after_key && !out.is_empty() && !out.ends_with(['{', '[']) {
            out.push(',');
        }
        after_key = false;
        match token {
            Token::ObjectStart => {
                objects.push(Open { start: out.len(), members: Vec::new() });
                out.push('{');
            }
            Token::ObjectEnd => {
                let object = objects.pop().expect("the reader closes only what it opened");
                close(&mut out, object, objects.is_empty() && reader.depth() == 0, &mut resource);
            }
            Token::ArrayStart => out.push('['),
            Token::ArrayEnd => out.push(']'),
            Token::Key(key) => {
                let start = out.len();
                string(&mut out, key);
                let object = objects.last_mut().expect("a key stands in an object");
                if let Some((_, last)) = object.members.last_mut() {
                    last.end = start - 1; // the comma
                }
                object.members.push((start..out.len(), start..out.len()));
                out.push(':');
                after_key = true;
            }
            Token::String(value) => string(&mut out, value),
            Token::Number(number) => out.push_str(&number_of(number)),
            Token::Bool(value) => out.push_str(if value { "true" } else { "false" }),
            Token::Null => out.push_str("null"),
        }
    }
    Ok(Wire { body: out.into_bytes(), resource })
}

/// Ends an object: of members with the same key the last one's value stays, at the first one's place (a Python dict);
/// those of the top level are put into Sentry's order.
fn close(out: &mut String, object: Open, top: bool, resource: &mut &'static str) {
    let Open { start, mut members } = object;
    if let Some((_, last)) = members.last_mut() {
        last.end = out.len();
    }
    let mut places = std::collections::HashMap::new();
    let mut kept: Vec<&(Range<usize>, Range<usize>)> = Vec::new();
    for member in &members {
        match places.entry(&out[member.0.clone()]) {
            std::collections::hash_map::Entry::Occupied(place) => kept[*place.get()] = member,
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push(member);
            }
        }
    }
    if top {
        let rank = |key: &str| ORDER.iter().position(|known| *known == key).unwrap_or(ORDER.len());
        kept.sort_by_key(|(key, _)| rank(&out[key.clone()])); // stable
        let data = kept.iter().find(|(key, _)| &out[key.clone()] == "\"data\"");
        if let Some((key, member)) = data {
            *resource = resource_of(&out[key.end + 1..member.end]);
        }
    }
    let in_place = kept.len() == members.len() && kept.iter().zip(&members).all(|(kept, member)| *kept == member);
    if !in_place {
        let kept: Vec<&str> = kept.iter().map(|(_, member)| &out[member.clone()]).collect();
        let kept = kept.join(",");
        out.truncate(start + 1);
        out.push_str(&kept);
    }
    out.push('}');
}

/// Which webhook this is, by the keys of its `data` (a JSON text that was written here).
fn resource_of(data: &str) -> &'static str {
    const BY_KEY: [(&str, &str); 10] = [
        ("activity", "activity_alert"),
        ("metric_alert", "metric_alert"),
        ("event", "event_alert"),
        ("error", "error"),
        ("comment_id", "comment"),
        ("issue", "issue"),
        ("installation", "installation"),
        ("run_id", "seer"),
        ("pull_requests", "seer"),
        ("buildId", "preprod_artifact"),
    ];
    let mut reader = Reader::new(data);
    let mut keys = Vec::new();
    while let Ok(Some(token)) = reader.next() {
        if let (Token::Key(key), 1) = (token, reader.depth()) {
            keys.push(key.to_text());
        }
    }
    let known = BY_KEY.iter().find(|(name, _)| keys.iter().any(|key| key == name));
    known.map_or("issue", |(_, resource)| resource)
}

/// Python's `ensure_ascii`: printable ASCII as it is, the rest as `\u` with lower-case digits, DEL too.
fn string(out: &mut String, text: Str<'_>) {
    out.push('"');
    for unit in text.units() {
        match unit {
            Unit::Char('"') => out.push_str("\\\""),
            Unit::Char('\\') => out.push_str("\\\\"),
            Unit::Char('\u{8}') => out.push_str("\\b"),
            Unit::Char('\u{c}') => out.push_str("\\f"),
            Unit::Char('\n') => out.push_str("\\n"),
            Unit::Char('\r') => out.push_str("\\r"),
            Unit::Char('\t') => out.push_str("\\t"),
            Unit::Char(plain @ ' '..='~') => out.push(plain),
            Unit::Char(other) => {
                let mut units = [0; 2];
                other.encode_utf16(&mut units).iter().for_each(|unit| escape(out, *unit));
            }
            Unit::LoneSurrogate(unit) => escape(out, unit),
        }
    }
    out.push('"');
}

fn escape(out: &mut String, unit: u16) {
    out.push_str(&format!("\\u{unit:04x}"));
}

/// A number as Python reads and writes it: an integer keeps all its digits, a float is its shortest `repr`.
fn number_of(text: &str) -> String {
    if text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') {
        return if text == "-0" { "0".to_owned() } else { text.to_owned() };
    }
    // Never an error: the reader lets only JSON's numbers through, and Rust reads all of them (too large: infinite).
    let value: f64 = text.parse().unwrap_or(f64::INFINITY);
    if value.is_finite() { repr(value) } else { "null".to_owned() } // simplejson's ignore_nan
}

/// Python's `repr` of a finite float: the shortest digits that read back as the same value (of two such, the even one,
/// as JavaScript has it, and unlike Rust's own), with an exponent below 1e-4 and from 1e16 up.
fn repr(value: f64) -> String {
    let sign = if value.is_sign_negative() { "-" } else { "" };
    let mut buffer = ryu_js::Buffer::new();
    let javascript = buffer.format_finite(value.abs()); // 0.1, 15, 1e+21, 1.5e-7
    let (mantissa, exponent) = javascript.split_once('e').unwrap_or((javascript, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all = format!("{whole}{fraction}");
    let significant = all.trim_start_matches('0');
    let length = |text: &str| i32::try_from(text.len()).unwrap_or(0); // of short texts
    let exponent: i32 = exponent.parse().unwrap_or(0);
    // Where the point stands, counted from the first digit that is not 0.
    let (digits, point) = match significant.trim_end_matches('0') {
        "" => ("0", 1),
        digits => (digits, exponent + length(whole) - (length(&all) - length(significant))),
    };
    let zeros = |count: i32| "0".repeat(usize::try_from(count).unwrap_or(0));
    match point {
        -3..=0 => format!("{sign}0.{}{digits}", zeros(-point)),
        1..=16 if length(digits) <= point => format!("{sign}{digits}{}.0", zeros(point - length(digits))),
        1..=16 => {
            let (whole, fraction) = digits.split_at(point.unsigned_abs() as usize);
            format!("{sign}{whole}.{fraction}")
        }
        _ => {
            let (first, rest) = digits.split_at(1);
            let (dot, exponent) = (if rest.is_empty() { "" } else { "." }, point - 1);
            format!("{sign}{first}{dot}{rest}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    fn wire(text: &str) -> String {
        String::from_utf8(of(text.as_bytes()).unwrap().body).unwrap()
    }

    /// What Python 3.11 writes for each.
    const VECTORS: [(&str, &str); 26] = [
        (" { \"a\" : [ 1 , 2 ] , \"b\" : { } , \"c\" : [ ] } ", r#"{"a":[1,2],"b":{},"c":[]}"#),
        ("1.0", "1.0"),
        ("-0", "0"),
        ("-0.0", "-0.0"),
        ("0.0001", "0.0001"),
        ("0.00001", "1e-05"),
        ("1e-7", "1e-07"),
        ("1.5E-300", "1.5e-300"),
        ("1E0", "1.0"),
        ("1e15", "1000000000000000.0"),
        ("9999999999999998.0", "9999999999999998.0"),
        ("1e16", "1e+16"),
        ("1308548795726862.25", "1308548795726862.2"),
        ("1308548795726862.75", "1308548795726862.8"),
        ("123456789012345678.5", "1.2345678901234568e+17"),
        ("1.7976931348623157e308", "1.7976931348623157e+308"),
        ("5e-324", "5e-324"),
        ("1e400", "null"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1689194871.0", "1689194871.0"),
        (r#""é€😀\u00E9\/<>&""#, r#""\u00e9\u20ac\ud83d\ude00\u00e9/<>&""#),
        ("\"\u{7f}\\u0000\\b\\f\\n\\r\\t\\\"\\\\\u{2028}\"", r#""\u007f\u0000\b\f\n\r\t\"\\\u2028""#),
        (r#""\ud83d \ude00""#, r#""\ud83d \ude00""#),
        (r#"[{"b":1,"a":2,"\u0062":{"x":[]},"10":3,"9":4}]"#, r#"[{"b":{"x":[]},"a":2,"10":3,"9":4}]"#),
        (r#"{"":null,"__proto__":true,"":false}"#, r#"{"":false,"__proto__":true}"#),
        (r#"[[[{}]],{"a":[{"a":1,"a":2}]}]"#, r#"[[[{}]],{"a":[{"a":2}]}]"#),
    ];

    #[test]
    fn writes_what_python_writes() {
        for (text, expected) in VECTORS {
            assert_eq!(wire(text), expected, "of {text}");
        }
    }

    #[test]
    fn the_top_level_is_in_sentrys_order() {
        let text = r#"{"actor":{"z":1,"action":2},"x":0,"data":{"data":1,"action":2},"action":"a","y":9,"data":3}"#;
        assert_eq!(wire(text), r#"{"action":"a","data":3,"actor":{"z":1,"action":2},"x":0,"y":9}"#);
    }

    #[test]
    fn the_resource_follows_from_the_keys_of_data() {
        let resource = |text: &str| of(text.as_bytes()).unwrap().resource;
        assert_eq!(resource(r#"{"data":{"metric_alert":{}}}"#), "metric_alert");
        assert_eq!(resource(r#"{"data":{"issue_alert":{},"event":{"issue":1}}}"#), "event_alert");
        assert_eq!(resource(r#"{"data":{"activity":{},"issue":{}}}"#), "activity_alert");
        assert_eq!(resource(r#"{"data":{"error":1},"data":{"issue_id":1,"comment_id":2}}"#), "comment");
        assert_eq!(resource(r#"{"data":[{"error":1}]}"#), "issue");
        assert_eq!(resource("[]"), "issue");
    }

    #[test]
    fn nesting_costs_no_stack_and_what_is_no_json_is_refused() {
        let depth = 200_000;
        let text = "{\"a\":[".repeat(depth) + &"]}".repeat(depth);
        assert_eq!(wire(&text), text);
        assert!(of(b"{\"a\":}").is_err());
    }

    /// Floats of all magnitudes and strings of all planes, against the real thing where this machine has it.
    #[test]
    fn agrees_with_the_python_of_this_machine() {
        const SCRIPT: &str =
            "import json,sys\nfor line in sys.stdin: print(json.dumps(json.loads(line),separators=(',',':')))";
        let python = Command::new("python3").args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut python) = python else {
            eprintln!("no python3 here: only the recorded vectors were compared");
            return;
        };
        // SplitMix64: the same cases at every run.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        let mut lines: Vec<String> = (-330..310).map(|exponent| format!("[1e{exponent},-7.5E{exponent}]")).collect();
        lines.retain(|line| !wire(line).contains("null")); // infinity, which plain json.dumps spells Infinity
        let mut some = |make: &mut dyn FnMut(u64) -> Option<String>| {
            lines.extend((0..3000).filter_map(|_| make(random())));
        };
        some(&mut |bits| {
            Some(f64::from_bits(bits)).filter(|float| float.is_finite()).map(|float| format!("{float:e}"))
        });
        // Halves, quarters and eighths of large numbers: where two shortest texts are equally near.
        some(&mut |bits| Some(format!("{}e0", (bits >> 11) as f64 / f64::from(1 << (bits % 8)))));
        some(&mut |bits| Some(format!("\"\\u{:04x}\\u{:04x}\"", bits & 0xffff, bits >> 16 & 0xffff)));
        // What ends a line for Python would split the case in two.
        let one_line = |c: &char| *c >= ' ' && !"\"\\\u{85}\u{2028}\u{2029}".contains(*c);
        some(&mut |bits| Some(format!("\"{}\"", char::from_u32((bits % 0x11_0000) as u32).filter(one_line)?)));
        lines.extend(VECTORS.iter().map(|(text, _)| (*text).to_owned()).filter(|text| wire(text) != "null"));
        let mut stdin = python.stdin.take().unwrap();
        let input = lines.join("\n") + "\n";
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = python.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        let written = String::from_utf8(output.stdout).unwrap();
        let written: Vec<&str> = written.lines().collect();
        assert_eq!(written.len(), lines.len());
        for (line, expected) in lines.iter().zip(written) {
            assert_eq!(wire(line), expected, "of {line}");
        }
    }
}
