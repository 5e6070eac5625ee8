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
use std::ops::Range;

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
    let body = body.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(body);
    // `from_utf8_lossy` alone looks at each byte by itself; `from_utf8` passes over ASCII a word at a time.
    str::from_utf8(body).map_or_else(|_| String::from_utf8_lossy(body), Cow::Borrowed)
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
        let mut text = String::with_capacity(self.raw.len());
        let mut done = 0;
        for (at, unit) in self.escapes() {
            text.push_str(&self.raw[done..at.start]);
            text.push(match unit {
                Unit::Char(c) => c,
                Unit::LoneSurrogate(_) => char::REPLACEMENT_CHARACTER,
            });
            done = at.end;
        }
        text.push_str(&self.raw[done..]);
        Cow::Owned(text)
    }

    /// The value piece by piece.
    pub fn units(self) -> Units<'a> {
        Units { rest: self.raw }
    }

    /// The escapes alone: where each is in `raw` (both halves of an escaped pair together), and what it stands for.
    pub fn escapes(self) -> Escapes<'a> {
        Escapes { raw: self.raw, at: 0 }
    }
}

/// Iterator of [`Str::units`].
#[derive(Debug, Clone)]
pub struct Units<'a> {
    rest: &'a str,
}

impl Iterator for Units<'_> {
    type Item = Unit;

    fn next(&mut self) -> Option<Unit> {
        let first = self.rest.chars().next()?;
        let (unit, length) = if first == '\\' { unescape(self.rest) } else { (Unit::Char(first), first.len_utf8()) };
        self.rest = &self.rest[length..];
        Some(unit)
    }
}

/// Iterator of [`Str::escapes`].
#[derive(Debug, Clone)]
pub struct Escapes<'a> {
    raw: &'a str,
    at: usize,
}

impl Iterator for Escapes<'_> {
    type Item = (Range<usize>, Unit);

    fn next(&mut self) -> Option<(Range<usize>, Unit)> {
        let start = self.at + plain_run(&self.raw.as_bytes()[self.at..]);
        if start == self.raw.len() {
            return None;
        }
        let (unit, length) = unescape(&self.raw[start..]);
        self.at = start + length;
        Some((start..self.at, unit))
    }
}

/// What the escape at the start of `text` stands for, and its length. The reader has seen that it is well formed.
fn unescape(text: &str) -> (Unit, usize) {
    let Some(unit) = escaped_unit(text) else {
        let plain = match text.as_bytes()[1] {
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            itself => char::from(itself), // `"`, `\` or `/`
        };
        return (Unit::Char(plain), 2);
    };
    if let Some(c) = char::from_u32(u32::from(unit)) {
        return (Unit::Char(c), 6);
    }
    let low = escaped_unit(&text[6..]).unwrap_or_default();
    match char::decode_utf16([unit, low]).next() {
        Some(Ok(pair)) => (Unit::Char(pair), 12),
        _ => (Unit::LoneSurrogate(unit), 6),
    }
}

/// The code unit of a `\uXXXX` at the start of `text`, if there is one.
fn escaped_unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    u16::from_str_radix(digits, 16).ok()
}

/// What the grammar allows next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Value,
    FirstElementOrEnd,
    CommaOrArrayEnd,
    FirstKeyOrEnd,
    CommaOrObjectEnd,
    Nothing,
}

/// Reads a text token by token. After the last token of the top-level value comes `None`, once only white space
/// follows. After an error the reader is of no further use.
#[derive(Debug)]
pub struct Reader<'a> {
    text: &'a str,
    start: usize,
    at: usize,
    spaced: bool,
    expect: Expect,
    /// What comes after a value where we are; the innermost bracket says it.
    after_value: Expect,
    nesting: Nesting,
}

impl<'a> Reader<'a> {
    /// A reader at the start of `text` (see [`decode`]).
    pub fn new(text: &'a str) -> Self {
        let (expect, after_value) = (Expect::Value, Expect::Nothing);
        Reader { text, start: 0, at: 0, spaced: false, expect, after_value, nesting: Nesting::default() }
    }

    /// How many objects and arrays are open.
    pub fn depth(&self) -> usize {
        self.nesting.depth
    }

    /// Offset of the first byte of the token read last (of its opening quote, for a string).
    pub fn start(&self) -> usize {
        self.start
    }

    /// Offset of the first byte not yet read. Right after a token it is the end of that token (of its colon, for a
    /// key).
    pub fn offset(&self) -> usize {
        self.at
    }

    /// Whether white space stood before the token read last, or before its colon, for a key.
    pub fn spaced(&self) -> bool {
        self.spaced
    }

    /// The next token.
    ///
    /// # Errors
    /// [`NotJson`] at the first byte that `JSON.parse` would refuse, too.
    #[expect(clippy::should_implement_trait, reason = "an Iterator of Results would make every caller transpose")]
    #[inline(always)] // reading a token costs less than handing it over in memory would
    pub fn next(&mut self) -> Result<Option<Token<'a>>, NotJson> {
        // Local, so that it can be kept in registers.
        let mut cursor = Cursor { text: self.text, at: self.at, spaced: false };
        let token = match (self.expect, cursor.skip_space()) {
            (Expect::CommaOrObjectEnd, Some(b',')) => {
                cursor.at += 1;
                cursor.skip_space();
                self.key(&mut cursor)?
            }
            (Expect::CommaOrArrayEnd, Some(b',')) => {
                cursor.at += 1;
                cursor.skip_space();
                self.value(&mut cursor)?
            }
            (Expect::CommaOrObjectEnd | Expect::FirstKeyOrEnd, Some(b'}')) => self.close(&mut cursor, Token::ObjectEnd),
            (Expect::CommaOrArrayEnd | Expect::FirstElementOrEnd, Some(b']')) => {
                self.close(&mut cursor, Token::ArrayEnd)
            }
            (Expect::Value | Expect::FirstElementOrEnd, _) => self.value(&mut cursor)?,
            (Expect::FirstKeyOrEnd, _) => self.key(&mut cursor)?,
            (Expect::Nothing, None) => return Ok(None),
            (Expect::Nothing, Some(_)) => return Err(cursor.refuse("text after the end of the value")),
            (Expect::CommaOrObjectEnd | Expect::CommaOrArrayEnd, _) => {
                return Err(cursor.refuse("neither a comma nor the end of this object or array"));
            }
        };
        self.at = cursor.at;
        self.spaced = cursor.spaced;
        Ok(Some(token))
    }

    #[inline(always)]
    fn key(&mut self, cursor: &mut Cursor<'a>) -> Result<Token<'a>, NotJson> {
        self.start = cursor.at;
        if cursor.peek() != Some(b'"') {
            return Err(cursor.refuse("no key where one must be"));
        }
        let key = cursor.string()?;
        if cursor.skip_space() != Some(b':') {
            return Err(cursor.refuse("no colon after a key"));
        }
        cursor.at += 1;
        self.expect = Expect::Value;
        Ok(Token::Key(key))
    }

    #[inline(always)]
    fn value(&mut self, cursor: &mut Cursor<'a>) -> Result<Token<'a>, NotJson> {
        self.start = cursor.at;
        let token = match cursor.peek() {
            Some(b'"') => Token::String(cursor.string()?),
            Some(b'{') => return Ok(self.open(cursor, true)),
            Some(b'[') => return Ok(self.open(cursor, false)),
            Some(b'-' | b'0'..=b'9') => Token::Number(cursor.number()?),
            Some(b't') => cursor.word("true", Token::Bool(true))?,
            Some(b'f') => cursor.word("false", Token::Bool(false))?,
            Some(b'n') => cursor.word("null", Token::Null)?,
            _ => return Err(cursor.refuse("no value where one must be")),
        };
        self.expect = self.after_value;
        Ok(token)
    }

    #[inline(always)]
    fn open(&mut self, cursor: &mut Cursor<'a>, object: bool) -> Token<'a> {
        cursor.at += 1;
        self.nesting.open(object);
        if object {
            self.expect = Expect::FirstKeyOrEnd;
            self.after_value = Expect::CommaOrObjectEnd;
            Token::ObjectStart
        } else {
            self.expect = Expect::FirstElementOrEnd;
            self.after_value = Expect::CommaOrArrayEnd;
            Token::ArrayStart
        }
    }

    #[inline(always)]
    fn close(&mut self, cursor: &mut Cursor<'a>, token: Token<'a>) -> Token<'a> {
        self.start = cursor.at;
        cursor.at += 1;
        self.after_value = match self.nesting.close() {
            Some(true) => Expect::CommaOrObjectEnd,
            Some(false) => Expect::CommaOrArrayEnd,
            None => Expect::Nothing,
        };
        self.expect = self.after_value;
        token
    }
}

/// A place in a text, and the words of the language from there.
#[derive(Debug, Clone, Copy)]
struct Cursor<'a> {
    text: &'a str,
    at: usize,
    /// Whether white space was skipped.
    spaced: bool,
}

impl<'a> Cursor<'a> {
    #[inline(always)]
    fn peek(self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Gives the byte after it.
    #[inline(always)]
    fn skip_space(&mut self) -> Option<u8> {
        let mut byte = self.peek();
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = byte {
            self.at += 1;
            self.spaced = true;
            byte = self.peek();
        }
        byte
    }

    #[inline(always)]
    fn word(&mut self, word: &str, token: Token<'a>) -> Result<Token<'a>, NotJson> {
        if !self.text.as_bytes()[self.at..].starts_with(word.as_bytes()) {
            return Err(self.refuse("no value where one must be"));
        }
        self.at += word.len();
        Ok(token)
    }

    /// At its opening quote.
    #[inline(always)]
    fn string(&mut self) -> Result<Str<'a>, NotJson> {
        let bytes = self.text.as_bytes();
        let start = self.at + 1;
        let mut end = start + plain_run(&bytes[start..]);
        let escaped = bytes.get(end) != Some(&b'"');
        if escaped {
            end = Cursor { at: end, ..*self }.escaped_end()?;
        }
        self.at = end + 1;
        Ok(Str { raw: &self.text[start..end], escaped })
    }

    /// Where the string ends. At what ended its first plain run and is no quote.
    fn escaped_end(mut self) -> Result<usize, NotJson> {
        let bytes = self.text.as_bytes();
        loop {
            let length = match &bytes[self.at..] {
                [b'"', ..] => return Ok(self.at),
                [b'\\', b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => 2,
                [b'\\', b'u', a, b, c, d, ..] if [a, b, c, d].iter().all(|digit| digit.is_ascii_hexdigit()) => 6,
                [b'\\', ..] => return Err(self.refuse("an escape that JSON does not have")),
                [] => return Err(self.refuse("a string without an end")),
                _ => return Err(self.refuse("a control character in a string")),
            };
            self.at += length;
            self.at += plain_run(&bytes[self.at..]);
        }
    }

    /// At its first character.
    #[inline(always)]
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
        if let Some(b'.' | b'e' | b'E') = self.peek() {
            self.at = self.fraction_end()?;
        }
        Ok(&self.text[start..self.at])
    }

    /// Where the number ends. At its point, or at the sign of its exponent.
    fn fraction_end(mut self) -> Result<usize, NotJson> {
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
        Ok(self.at)
    }

    /// One digit or more.
    #[inline(always)]
    fn digits(&mut self) -> Result<(), NotJson> {
        let rest = &self.text.as_bytes()[self.at..];
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if count == 0 {
            return Err(self.refuse("a number without a digit where one must be"));
        }
        self.at += count;
        Ok(())
    }

    #[cold]
    fn refuse(self, problem: &'static str) -> NotJson {
        NotJson { at: self.at, problem }
    }
}

/// How many bytes from the start belong to a string as they are: up to the first quote, backslash or control
/// character, or to the end.
#[inline(always)]
fn plain_run(bytes: &[u8]) -> usize {
    // Most strings end within 16 bytes. Where exactly nobody foretells, so there is no branch on it.
    if let Some(chunk) = bytes.first_chunk::<16>() {
        let stops = stops16(chunk);
        if stops != 0 {
            return stops.trailing_zeros() as usize / 8;
        }
        return 16 + long_plain_run(&bytes[16..]);
    }
    long_plain_run(bytes)
}

/// [`plain_run`] of any length.
fn long_plain_run(bytes: &[u8]) -> usize {
    let (chunks, tail) = bytes.as_chunks::<16>();
    for (i, chunk) in chunks.iter().enumerate() {
        let stops = stops16(chunk);
        if stops != 0 {
            return i * 16 + stops.trailing_zeros() as usize / 8;
        }
    }
    let stop = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..0x20);
    bytes.len() - tail.len() + tail.iter().position(stop).unwrap_or(tail.len())
}

/// The lowest bit set is in the first byte that ends a plain run; none set, none does.
#[inline(always)]
fn stops16(chunk: &[u8; 16]) -> u128 {
    let (low, high) = chunk.split_at(8);
    let word = |half: &[u8]| u64::from_le_bytes(half.try_into().expect("half of sixteen is eight"));
    u128::from(stops8(word(low))) | u128::from(stops8(word(high))) << 64
}

/// "SIMD within a register": the byte that a subtraction takes below zero has its high bit set. The borrow can set bits
/// in the bytes above, never in those below: the lowest bit is exact.
#[inline(always)]
fn stops8(word: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = 0x8080_8080_8080_8080;
    let quotes = (word ^ (ONES * u64::from(b'"'))).wrapping_sub(ONES);
    let backslashes = (word ^ (ONES * u64::from(b'\\'))).wrapping_sub(ONES);
    let controls = word.wrapping_sub(ONES * 0x20);
    (quotes | backslashes | controls) & !word & HIGHS
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

    /// Whether what is open now is an object, if anything is.
    fn close(&mut self) -> Option<bool> {
        self.depth -= 1;
        let top = self.depth.checked_sub(1)?;
        Some(self.bits[top / 64] >> (top % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests;
