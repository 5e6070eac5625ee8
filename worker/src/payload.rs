//! The JSON text that PostgreSQL's `jsonb` takes for a body, and gives back.
//!
//! jsonb holds less than JSON can say. What it refuses is replaced by what says the same as nearly as jsonb can; all
//! else is handed over as it was written. Found by experiment with PostgreSQL 15.18 and 18.6, `max_stack_depth` at its
//! default of 2 MB (limits of `numeric`: postgresql.org/docs, "Numeric Types"):
//!
//! | in the body | in PostgreSQL | here |
//! |---|---|---|
//! | `\u0000`, half a surrogate pair, in values and keys | refused | U+FFFD |
//! | bytes that are no UTF-8; a leading byte order mark | refused | U+FFFD; dropped |
//! | a number of over 131,072 digits before or 16,383 after the point | refused | a string of the literal |
//! | `1e100000` by the thousand | stored, but a text of over 1 GB: unreadable | from 16 MiB on, strings |
//! | nesting | refused from 13,000 levels on (`@>`: 8,100) | below level 6,000 a string of the JSON |
//!
//! Keys that become equal by this are duplicates to jsonb, which keeps the last. Sizes need no care: the least that
//! jsonb refuses, 16.7 million elements of an array or 8.3 million members of an object, takes a body of 32 MiB.

use std::{borrow::Cow, ops::Range};

use shared::json::{NotJson, Reader, Str, Token, Unit, decode};

/// How many objects and arrays may lie in one another: room above the 5,000 that are kept as they are whatever
/// happens, and less than half of what jsonb took on the server that took least.
const DEEPEST: usize = 6_000;

/// Digits of `numeric` before the decimal point.
const DIGITS_BEFORE_POINT: i64 = 131_072;

/// Digits of `numeric` after the decimal point.
const DIGITS_AFTER_POINT: i64 = 16_383;

/// How many characters longer than they are written all numbers of a body may be when jsonb prints them: `1e1000` is
/// printed with a thousand zeros, and PostgreSQL can print no more than 1 GB a value.
const GROWTH: usize = 16 << 20;

/// The text of `body` for a `jsonb` column: the same JSON value, but for what jsonb cannot hold (see the table above).
/// Borrows from the body where nothing had to change.
///
/// # Errors
/// [`NotJson`] where `JSON.parse` refuses the body, too.
pub fn payload(body: &[u8]) -> Result<Cow<'_, str>, NotJson> {
    let text = decode(body);
    Ok(match rewritten(&text)? {
        None => text,
        Some(rewritten) => Cow::Owned(rewritten),
    })
}

/// `text` with what jsonb cannot hold replaced; `None` where it can hold it all.
fn rewritten(text: &str) -> Result<Option<String>, NotJson> {
    let mut reader = Reader::new(text);
    let mut copy = Copy { text, copied: 0, out: String::new() };
    let mut growth = GROWTH;
    loop {
        let before = reader.offset();
        let Some(token) = reader.next()? else { return Ok(copy.finish()) };
        match token {
            Token::Key(string) | Token::String(string) => {
                if is_refused(string) {
                    // Only white space and a comma lie between two tokens.
                    let start = before + text[before..].find('"').expect("a string begins with a quote");
                    copy.replace(start..start + string.raw.len() + 2, &storable(string));
                }
            }
            Token::Number(literal) => {
                if !fits_numeric(literal, &mut growth) {
                    copy.replace(reader.offset() - literal.len()..reader.offset(), literal);
                }
            }
            Token::ObjectStart | Token::ArrayStart => {
                if reader.depth() > DEEPEST {
                    let start = reader.offset() - 1;
                    while reader.depth() > DEEPEST {
                        reader.next()?;
                    }
                    copy.replace(start..reader.offset(), &text[start..reader.offset()]);
                }
            }
            Token::ObjectEnd | Token::ArrayEnd | Token::Bool(_) | Token::Null => {}
        }
    }
}

/// A copy of `text` with some pieces replaced.
struct Copy<'a> {
    text: &'a str,
    /// Up to where `text` is in `out`, as it was or replaced.
    copied: usize,
    out: String,
}

impl Copy<'_> {
    /// Puts the JSON string whose value is `value` in the place of `piece`, which lies after all that was replaced
    /// before.
    fn replace(&mut self, piece: Range<usize>, value: &str) {
        self.out.push_str(&self.text[self.copied..piece.start]);
        self.out.push_str(&serde_json::to_string(value).expect("every str can be a JSON string"));
        self.copied = piece.end;
    }

    /// The whole copy; `None` if nothing was replaced.
    fn finish(mut self) -> Option<String> {
        if self.copied == 0 {
            return None;
        }
        self.out.push_str(&self.text[self.copied..]);
        Some(self.out)
    }
}

/// Whether this string's value has what PostgreSQL's text cannot hold.
fn is_refused(string: Str<'_>) -> bool {
    // What begins `\u000` or `\ud8` to `\udf` may be such an escape; decoding settles it, and is seldom needed.
    let is_surrogate = |piece: &[u8]| matches!(piece, [b'\\', b'u', b'd' | b'D', digit, _] if *digit > b'7');
    let may_be = |piece: &[u8]| piece == b"\\u000" || is_surrogate(piece);
    string.escaped
        && string.raw.as_bytes().windows(5).any(may_be)
        && string.units().any(|unit| matches!(unit, Unit::Char('\0') | Unit::LoneSurrogate(_)))
}

/// The string's value as PostgreSQL's text can hold it: U+FFFD for what it cannot.
fn storable(string: Str<'_>) -> String {
    string.to_text().replace('\0', "\u{fffd}")
}

/// Whether `numeric`, in which jsonb keeps numbers, holds this number and prints it in no more room than is left in
/// `growth`, from which the number takes its share.
fn fits_numeric(literal: &str, growth: &mut usize) -> bool {
    // Nearly every number: printed as it is written.
    let has_exponent = literal.bytes().any(|byte| matches!(byte, b'e' | b'E'));
    if !has_exponent && literal.len() <= DIGITS_AFTER_POINT as usize {
        return true;
    }
    let (mantissa, exponent) = literal.split_once(['e', 'E']).unwrap_or((literal, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let whole = whole.trim_start_matches('-');
    // An exponent beyond i64 is beyond every limit here.
    let Ok(exponent) = exponent.parse::<i64>() else { return false };
    let zeros = whole.bytes().chain(fraction.bytes()).take_while(|digit| *digit == b'0').count();
    // Zero counts as if its exponent made it longer, which errs on the side of the string: numeric takes `0e200000`,
    // but not `0e2000000000`.
    let before_point = exponent.saturating_add(whole.len() as i64 - zeros as i64);
    let after_point = (fraction.len() as i64).saturating_sub(exponent).max(0);
    if before_point > DIGITS_BEFORE_POINT || after_point > DIGITS_AFTER_POINT {
        return false;
    }
    let printed = before_point.max(1) as usize + after_point as usize;
    match growth.checked_sub(printed.saturating_sub(literal.len())) {
        Some(left) => *growth = left,
        None => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The payload of a body, which must in turn be a payload that needs no change.
    fn stored(body: &str) -> String {
        let text = payload(body.as_bytes()).unwrap();
        let again = payload(text.as_bytes()).unwrap();
        assert!(matches!(again, Cow::Borrowed(_)), "changed twice: {body:.99}");
        text.into_owned()
    }

    #[track_caller]
    fn assert_kept(body: &str) {
        assert!(matches!(payload(body.as_bytes()).unwrap(), Cow::Borrowed(text) if text == body), "{body:.99}");
    }

    #[test]
    fn what_jsonb_holds_is_borrowed() {
        let bodies = [
            "null",
            "0",
            r#""text""#,
            "[]",
            " { } ",
            "{\"10\" : 1.0,\r\n\t\"9\":1e-07, \"9\":-0}",
            r#"{"\u00e9\\u0000":"\ud83d\ude00\\ud800\"\/\b\u0001\u2028"}"#,
            "{\"é😀\":\"\u{fffd}\u{2028}\u{7f}\"}",
            "123456789012345678901234567890.12345678901234567890",
            "[1e400,-1e-400,5e-324]",
        ];
        for body in bodies {
            assert_kept(body);
        }
        assert_kept(include_str!("../../tests/fixtures/event_alert_triggered.json"));
        assert_kept(include_str!("../../tests/fixtures/issue_created_non_ascii.json"));
    }

    #[test]
    fn what_text_cannot_hold_becomes_the_replacement_character() {
        let rows = [
            (r#""\u0000""#, "\"\u{fffd}\""),
            (r#"{"a":["\u0000x",{"b":"y\u0000"}]}"#, "{\"a\":[\"\u{fffd}x\",{\"b\":\"y\u{fffd}\"}]}"),
            (r#"["\ud800","\uDFFF","\ude00\ud83d"]"#, "[\"\u{fffd}\",\"\u{fffd}\",\"\u{fffd}\u{fffd}\"]"),
            (r#"["\ud83d\ud83d\ude00"]"#, "[\"\u{fffd}😀\"]"),
            (r#"{"\u0000" : 1 , "\ud800":2}"#, "{\"\u{fffd}\" : 1 , \"\u{fffd}\":2}"),
            // Escapes beside it keep their meaning.
            (r#""\u0000\"\\\/\b\f\n\r\t\u0001\u00e9""#, "\"\u{fffd}\\\"\\\\/\\b\\f\\n\\r\\t\\u0001é\""),
            (r#""\u0000\\u0000""#, "\"\u{fffd}\\\\u0000\""),
        ];
        for (body, text) in rows {
            assert_eq!(stored(body), text, "{body}");
        }
    }

    #[test]
    fn of_all_escapes_only_those_are_replaced() {
        for unit in 0..=u16::MAX {
            let storable = unit != 0 && !(0xd800..0xe000).contains(&unit);
            for body in [format!("[\"a\\u{unit:04x}\"]"), format!("{{\"\\u{unit:04X}b\":1}}")] {
                let is_kept = matches!(payload(body.as_bytes()).unwrap(), Cow::Borrowed(_));
                assert_eq!(is_kept, storable, "{body}");
            }
        }
    }

    #[test]
    fn a_body_that_is_not_quite_utf8_is_decoded_as_text_decoder_does() {
        // Byte order mark, stray byte, encoded surrogate, torn é.
        let body = b"\xEF\xBB\xBF{\"a\xFF\":\"\xED\xA0\x80\xC3\"}";
        assert_eq!(payload(body).unwrap(), "{\"a\u{fffd}\":\"\u{fffd}\u{fffd}\u{fffd}\u{fffd}\"}");
        assert!(matches!(payload(b"\xEF\xBB\xBF{}").unwrap(), Cow::Borrowed("{}")));
    }

    #[test]
    fn numbers_that_numeric_cannot_hold_become_strings() {
        let zeros = |count| "0".repeat(count);
        let ones = |count| "1".repeat(count);
        // Each of these was tried with PostgreSQL 15 and 18: it takes all in the first list, none in the second.
        let taken = [
            "1e131071".into(),
            "9.99e131071".into(),
            "-0.00001e131076".into(),
            "10E+131070".into(),
            "1e-16383".into(),
            "1.5e-16382".into(),
            "0e-16383".into(),
            ones(131_072),
            format!("1.{}", ones(16_383)),
            format!("0.{}1", zeros(16_382)),
            format!("{}.{}", ones(131_072), ones(16_383)),
            format!("1.{}e1", ones(16_384)),
            format!("0.{}e20000", ones(20_000)),
            "-0".into(),
        ];
        for literal in taken {
            assert_kept(&literal);
        }
        let refused = [
            "1e131072".into(),
            "-1e131072".into(),
            "0.00001e131077".into(),
            "10e131071".into(),
            "1e-16384".into(),
            "1.5e-16383".into(),
            "0e-16384".into(),
            "0e2147483648".into(),
            "1e99999999999999999999".into(),
            "1e-99999999999999999999".into(),
            "0e99999999999999999999".into(),
            "1e9223372036854775807".into(),
            "1e-9223372036854775808".into(),
            ones(131_073),
            ones(300_000),
            format!("1.{}", zeros(16_384)),
            format!("0.{}1", zeros(16_383)),
            format!("1.{}e1", ones(16_385)),
        ];
        for literal in refused {
            assert_eq!(stored(&format!(r#"{{"a":[1,{literal} ,2]}}"#)), format!(r#"{{"a":[1,"{literal}" ,2]}}"#));
        }
    }

    #[test]
    fn numbers_cannot_make_a_row_too_long_to_be_read() {
        let digits = 131_072;
        let body = format!("[{}1e131071,1]", "1e131071,".repeat(1_000));
        let text = stored(&body);
        let kept = text.matches(",1e131071").count() + 1;
        assert_eq!(kept, GROWTH / (digits - "1e131071".len()));
        assert_eq!(text.matches(r#""1e131071""#).count(), 1_001 - kept);
        assert!(text.ends_with(r#","1e131071",1]"#), "numbers that do not grow are kept: {}", &text[text.len() - 20..]);
    }

    #[test]
    fn what_lies_too_deep_becomes_a_string_of_its_json() {
        let nested = |levels: usize, inside: &str| "[".repeat(levels) + inside + &"]".repeat(levels);
        assert_kept(&nested(5_000, "1"));
        assert_kept(&(r#"{"a":"#.repeat(5_000) + "1" + &"}".repeat(5_000)));
        assert_kept(&nested(DEEPEST, r#"1,"a""#));
        let inside = "{\"k\\u0000\" :\t[\"\\\"\\ud800\", 1e999999,\r\n{}]}";
        let quoted = r#"{\"k\\u0000\" :\t[\"\\\"\\ud800\", 1e999999,\r\n{}]}"#;
        let body = nested(DEEPEST, &format!(r#"1,{inside} , [2],"\u0000""#));
        let text = nested(DEEPEST, &format!("1,\"{quoted}\" , \"[2]\",\"\u{fffd}\""));
        assert_eq!(stored(&body), text);
        // The string can be read as the JSON that stood there.
        let string = format!("\"{quoted}\"");
        assert_eq!(serde_json::from_str::<String>(&string).unwrap(), inside);
    }

    #[test]
    fn hostile_shapes_cost_no_stack() {
        let million = 1_000_000;
        let text = stored(&("[".repeat(million) + &"]".repeat(million)));
        assert_eq!(text.len(), 2 * million + 2); // the two quotes around what was too deep
        let text = stored(&(r#"{"a":"#.repeat(million) + "1" + &"}".repeat(million)));
        assert_eq!(Reader::new(&text).next(), Ok(Some(Token::ObjectStart)));
        assert_kept(&format!("{{{}\"a\":1}}", r#""a":1,"#.repeat(million)));
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for body in ["", "{", "[1,]", "{}{}", r#""\u00"#, "01", "\"\0\"", "1e"] {
            assert!(payload(body.as_bytes()).is_err(), "{body:?}");
        }
        assert!(payload(("[".repeat(DEEPEST + 5) + "}").as_bytes()).is_err());
        assert!(payload("[".repeat(DEEPEST + 5).as_bytes()).is_err());
    }
}
