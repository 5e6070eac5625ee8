//! JSON as ECMAScript's `JSON.parse` reads it (ECMA-262 section 25.5.1, grammar ECMA-404), one token at a time.
//!
//! Both processes read what strangers send, and both must read it as Loop, a JavaScript program, does: the gateway for
//! the canonical form, the worker for the meaning. `serde_json::Value` cannot hold what JavaScript can (lone
//! surrogates, duplicate keys, key order), so neither is built on it.
//!
//! - No recursion and no tree: nesting costs one bit a level.
//! - Every byte is looked at a bounded number of times, whatever the input.
//! - Tokens borrow from the text; nothing is decoded until somebody asks.

use std::borrow::Cow;

/// Why a text is not JSON: the byte at which it stops being it. Holds nothing of the text itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not JSON: {problem} at byte {at}")]
pub struct NotJson {
    /// Offset in the decoded text, in bytes.
    pub at: usize,
    /// What was wrong there.
    pub problem: &'static str,
}

/// The text of a body, as `TextDecoder` (WHATWG Encoding, "UTF-8 decode") gives it to `JSON.parse`: invalid UTF-8
/// becomes U+FFFD and one leading byte order mark is dropped. Borrows when there is nothing to replace.
pub fn decode(body: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body))
}

/// One token. Commas and colons are checked and not reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    /// `{`
    ObjectStart,
    /// `}`
    ObjectEnd,
    /// `[`
    ArrayStart,
    /// `]`
    ArrayEnd,
    /// A member's key; its value follows.
    Key(Str<'a>),
    /// A string value.
    String(Str<'a>),
    /// A number, as it was written.
    Number(&'a str),
    /// `true` or `false`
    Bool(bool),
    /// `null`
    Null,
}

/// A string as it was written, between its quotes; its escapes are known to be well formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Str<'a> {
    /// Between the quotes, escapes and all.
    pub raw: &'a str,
    /// Whether a backslash is in it; without one, `raw` is the string's value.
    pub escaped: bool,
}

/// A piece of a string's value, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A Unicode scalar value; an escaped surrogate pair is one of these.
    Char(char),
    /// Half of a pair without its other half, U+D800 to U+DFFF: JavaScript strings can hold it, UTF-8 cannot.
    LoneSurrogate(u16),
}

impl<'a> Str<'a> {
    /// The value, with U+FFFD for each lone surrogate. Borrows where nothing was escaped.
    pub fn to_text(self) -> Cow<'a, str> {
        if !self.escaped {
            return Cow::Borrowed(self.raw);
        }
        let char_of = |unit| match unit {
            Unit::Char(c) => c,
            Unit::LoneSurrogate(_) => char::REPLACEMENT_CHARACTER,
        };
        Cow::Owned(self.units().map(char_of).collect())
    }

    /// The value piece by piece.
    pub fn units(self) -> Units<'a> {
        Units { rest: self.raw }
    }
}

/// Iterator of [`Str::units`].
#[derive(Debug, Clone)]
pub struct Units<'a> {
    rest: &'a str,
}

impl Units<'_> {
    /// The code unit of a `\uXXXX` at the start of `text`, if there is one.
    fn escaped_unit(text: &str) -> Option<u16> {
        let digits = text.strip_prefix("\\u")?.get(..4)?;
        u16::from_str_radix(digits, 16).ok()
    }
}

impl Iterator for Units<'_> {
    type Item = Unit;

    fn next(&mut self) -> Option<Unit> {
        let first = self.rest.chars().next()?;
        if first != '\\' {
            self.rest = &self.rest[first.len_utf8()..];
            return Some(Unit::Char(first));
        }
        let Some(unit) = Self::escaped_unit(self.rest) else {
            let plain = match self.rest.as_bytes()[1] {
                b'b' => '\u{8}',
                b'f' => '\u{c}',
                b'n' => '\n',
                b'r' => '\r',
                b't' => '\t',
                itself => char::from(itself), // `"`, `\` or `/`
            };
            self.rest = &self.rest[2..];
            return Some(Unit::Char(plain));
        };
        self.rest = &self.rest[6..];
        if let Some(c) = char::from_u32(u32::from(unit)) {
            return Some(Unit::Char(c));
        }
        let low = Self::escaped_unit(self.rest).unwrap_or_default();
        match char::decode_utf16([unit, low]).next() {
            Some(Ok(pair)) => {
                self.rest = &self.rest[6..];
                Some(Unit::Char(pair))
            }
            _ => Some(Unit::LoneSurrogate(unit)),
        }
    }
}

/// What the grammar allows next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Value,
    ValueOrArrayEnd,
    KeyOrObjectEnd,
    Key,
    CommaOrEnd,
    Nothing,
}

/// Reads a text token by token. After the last token of the top-level value comes `None`, once only white space
/// follows. After an error the reader is of no further use.
#[derive(Debug)]
pub struct Reader<'a> {
    text: &'a str,
    at: usize,
    expect: Expect,
    nesting: Nesting,
}

impl<'a> Reader<'a> {
    /// A reader at the start of `text` (see [`decode`]).
    pub fn new(text: &'a str) -> Self {
        Reader { text, at: 0, expect: Expect::Value, nesting: Nesting::default() }
    }

    /// How many objects and arrays are open.
    pub fn depth(&self) -> usize {
        self.nesting.depth
    }

    /// Offset of the first byte not yet read. Right after a token it is the end of that token (of its colon, for a
    /// key).
    pub fn offset(&self) -> usize {
        self.at
    }

    /// The next token.
    ///
    /// # Errors
    /// [`NotJson`] at the first byte that `JSON.parse` would refuse, too.
    #[expect(clippy::should_implement_trait, reason = "an Iterator of Results would make every caller transpose")]
    pub fn next(&mut self) -> Result<Option<Token<'a>>, NotJson> {
        self.skip_space();
        if self.expect == Expect::CommaOrEnd {
            if self.peek() != Some(b',') {
                return self.close().map(Some);
            }
            self.at += 1;
            self.skip_space();
            self.expect = if self.nesting.in_object() { Expect::Key } else { Expect::Value };
        }
        match (self.expect, self.peek()) {
            (Expect::Nothing, None) => Ok(None),
            (Expect::Nothing, Some(_)) => Err(self.refuse("text after the end of the value")),
            (Expect::KeyOrObjectEnd, Some(b'}')) | (Expect::ValueOrArrayEnd, Some(b']')) => self.close().map(Some),
            (Expect::Key | Expect::KeyOrObjectEnd, _) => self.key().map(Some),
            (Expect::Value | Expect::ValueOrArrayEnd | Expect::CommaOrEnd, _) => self.value().map(Some),
        }
    }

    fn key(&mut self) -> Result<Token<'a>, NotJson> {
        if self.peek() != Some(b'"') {
            return Err(self.refuse("no key where one must be"));
        }
        let key = self.string()?;
        self.skip_space();
        if self.peek() != Some(b':') {
            return Err(self.refuse("no colon after a key"));
        }
        self.at += 1;
        self.expect = Expect::Value;
        Ok(Token::Key(key))
    }

    fn value(&mut self) -> Result<Token<'a>, NotJson> {
        let token = match self.peek() {
            Some(b'{') => {
                self.at += 1;
                self.nesting.open(true);
                self.expect = Expect::KeyOrObjectEnd;
                return Ok(Token::ObjectStart);
            }
            Some(b'[') => {
                self.at += 1;
                self.nesting.open(false);
                self.expect = Expect::ValueOrArrayEnd;
                return Ok(Token::ArrayStart);
            }
            Some(b'"') => Token::String(self.string()?),
            Some(b'-' | b'0'..=b'9') => Token::Number(self.number()?),
            Some(b't') => self.word("true", Token::Bool(true))?,
            Some(b'f') => self.word("false", Token::Bool(false))?,
            Some(b'n') => self.word("null", Token::Null)?,
            _ => return Err(self.refuse("no value where one must be")),
        };
        self.after_value();
        Ok(token)
    }

    fn close(&mut self) -> Result<Token<'a>, NotJson> {
        let token = match (self.peek(), self.nesting.in_object()) {
            (Some(b'}'), true) => Token::ObjectEnd,
            (Some(b']'), false) => Token::ArrayEnd,
            _ => return Err(self.refuse("neither a comma nor the end of this object or array")),
        };
        self.at += 1;
        self.nesting.close();
        self.after_value();
        Ok(token)
    }

    fn after_value(&mut self) {
        self.expect = if self.nesting.depth == 0 { Expect::Nothing } else { Expect::CommaOrEnd };
    }

    fn word(&mut self, word: &str, token: Token<'a>) -> Result<Token<'a>, NotJson> {
        if !self.text.as_bytes()[self.at..].starts_with(word.as_bytes()) {
            return Err(self.refuse("no value where one must be"));
        }
        self.at += word.len();
        Ok(token)
    }

    /// At its opening quote.
    fn string(&mut self) -> Result<Str<'a>, NotJson> {
        let bytes = self.text.as_bytes();
        let start = self.at + 1;
        let mut escaped = false;
        self.at = start;
        loop {
            self.at += plain_run(&bytes[self.at..]);
            match bytes.get(self.at) {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    self.escape()?;
                }
                Some(_) => return Err(self.refuse("a control character in a string")),
                None => return Err(self.refuse("a string without an end")),
            }
        }
        let raw = &self.text[start..self.at];
        self.at += 1;
        Ok(Str { raw, escaped })
    }

    /// At its backslash.
    fn escape(&mut self) -> Result<(), NotJson> {
        let rest = &self.text.as_bytes()[self.at + 1..];
        let length = match rest {
            [b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => 1,
            [b'u', a, b, c, d, ..] if [a, b, c, d].iter().all(|digit| digit.is_ascii_hexdigit()) => 5,
            _ => return Err(self.refuse("an escape that JSON does not have")),
        };
        self.at += 1 + length;
        Ok(())
    }

    /// At its first character.
    fn number(&mut self) -> Result<&'a str, NotJson> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(&self.text[start..self.at])
    }

    /// One digit or more.
    fn digits(&mut self) -> Result<(), NotJson> {
        let rest = &self.text.as_bytes()[self.at..];
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if count == 0 {
            return Err(self.refuse("a number without a digit where one must be"));
        }
        self.at += count;
        Ok(())
    }

    fn skip_space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn refuse(&self, problem: &'static str) -> NotJson {
        NotJson { at: self.at, problem }
    }
}

/// How many bytes from the start belong to a string as they are: up to the first quote, backslash or control
/// character, or to the end. Eight at a time ("SIMD within a register").
fn plain_run(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = 0x8080_8080_8080_8080;
    let zero_bytes = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    let mut chunks = bytes.chunks_exact(8);
    let mut run = 0;
    for chunk in &mut chunks {
        let word = u64::from_le_bytes(chunk.try_into().expect("chunks_exact(8) gives eight bytes"));
        let quotes = zero_bytes(word ^ (ONES * u64::from(b'"')));
        let backslashes = zero_bytes(word ^ (ONES * u64::from(b'\\')));
        let controls = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
        // A borrow can set bits above the first hit, never below it: the lowest bit is exact.
        let stops = quotes | backslashes | controls;
        if stops != 0 {
            return run + stops.trailing_zeros() as usize / 8;
        }
        run += 8;
    }
    let stop = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..0x20);
    run + chunks.remainder().iter().position(stop).unwrap_or(chunks.remainder().len())
}

/// Which of the open brackets are braces: a stack of bits.
#[derive(Debug, Default)]
struct Nesting {
    bits: Vec<u64>,
    depth: usize,
}

impl Nesting {
    fn open(&mut self, object: bool) {
        let (word, bit) = (self.depth / 64, self.depth % 64);
        if word == self.bits.len() {
            self.bits.push(0);
        }
        self.bits[word] = self.bits[word] & !(1 << bit) | u64::from(object) << bit;
        self.depth += 1;
    }

    fn close(&mut self) {
        self.depth -= 1;
    }

    /// Whether the innermost is an object. Only asked while something is open.
    fn in_object(&self) -> bool {
        let top = self.depth - 1;
        self.bits[top / 64] >> (top % 64) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Result<Vec<Token<'_>>, NotJson> {
        let mut reader = Reader::new(text);
        let mut all = Vec::new();
        while let Some(token) = reader.next()? {
            all.push(token);
        }
        Ok(all)
    }

    #[test]
    fn reads_every_kind_of_token() {
        let plain = |raw| Str { raw, escaped: false };
        let read = tokens(" {\"a\" : [1, -0.5e+3,\ttrue,false,null , {}] ,\"b\":\"x\\n\"}\r\n").unwrap();
        let expected = [
            Token::ObjectStart,
            Token::Key(plain("a")),
            Token::ArrayStart,
            Token::Number("1"),
            Token::Number("-0.5e+3"),
            Token::Bool(true),
            Token::Bool(false),
            Token::Null,
            Token::ObjectStart,
            Token::ObjectEnd,
            Token::ArrayEnd,
            Token::Key(plain("b")),
            Token::String(Str { raw: "x\\n", escaped: true }),
            Token::ObjectEnd,
        ];
        assert_eq!(read, expected);
    }

    #[test]
    fn refuses_what_json_parse_refuses() {
        let bad = [
            "", " ", "{", "[", "]", "}", "[1,]", "[,1]", "{\"a\":1,}", "{\"a\"}", "{\"a\":}", "{a:1}", "{1:1}", "[1 2]",
            "01", "-", "-01", "1.", ".5", "+1", "1e", "1e+", "0x1", "NaN", "Infinity", "tru", "nul", "truefalse", "1 1",
            "\"", "\"\\", "\"\\x\"", "\"\\u12\"", "\"\\u12g4\"", "\"\t\"", "'a'", "[1}", "{\"a\":1]", "\u{feff}1", "\u{a0}1",
            "\u{b}1", "1\0",
        ];
        for text in bad {
            assert!(tokens(text).is_err(), "{text:?} must be refused");
        }
    }

    #[test]
    fn strings_decode_as_javascript_decodes_them() {
        let text = |raw| Str { raw, escaped: true }.to_text().into_owned();
        assert_eq!(text(r#"\"\\\/\b\f\n\r\t"#), "\"\\/\u{8}\u{c}\n\r\t");
        assert_eq!(text(r"\u00e9\ud83d\ude00é"), "é😀é");
        let units: Vec<_> = Str { raw: r"\ud83dx\ude00\ud83d\ud83d\ude00", escaped: true }.units().collect();
        let lone = Unit::LoneSurrogate;
        assert_eq!(units, [lone(0xd83d), Unit::Char('x'), lone(0xde00), lone(0xd83d), Unit::Char('😀')]);
    }

    #[test]
    fn a_body_decodes_as_text_decoder_decodes_it() {
        assert_eq!(decode(b"\xEF\xBB\xBF\xEF\xBB\xBF1"), "\u{feff}1"); // one mark goes, not two
        assert_eq!(decode(b"\xF0\x9F\x98x\xC0\x80"), "\u{fffd}x\u{fffd}\u{fffd}"); // maximal subparts
    }

    #[test]
    fn plain_runs_stop_exactly_where_they_must() {
        for length in 0..40 {
            for stop in [b'"', b'\\', 0, 0x1f] {
                for at in 0..length {
                    let mut bytes = vec![b'!'; length];
                    bytes[at] = stop;
                    assert_eq!(plain_run(&bytes), at);
                    bytes[at] = 0xff;
                    assert_eq!(plain_run(&bytes), length);
                }
            }
        }
    }

    #[test]
    fn nesting_costs_no_stack() {
        let text = "[".repeat(1_000_000) + &"]".repeat(1_000_000);
        assert_eq!(tokens(&text).unwrap().len(), 2_000_000);
    }
}
