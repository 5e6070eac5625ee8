//! The canonical form of a body: `JSON.stringify(JSON.parse(text))`, byte for byte as V8 computes it, where `text` is
//! the body decoded as UTF-8 the way `TextDecoder` does it. Loop's documented signature rule is an HMAC over this.
//!
//! ECMA-262 sections 25.5.1 (`JSON.parse`), 25.5.2 (`JSON.stringify`), 10.1.11 (`OrdinaryOwnPropertyKeys`) and
//! 6.1.6.1.20 (`Number::toString`) say what it is; Node says whether we read them right (`tests/canonical`).
//!
//! # How
//! What Sentry sends is nearly canonical already. So the text is read once, and what needs no change is copied in runs,
//! each as long as it lasts. A run ends at
//! - white space between tokens, which goes;
//! - an escape that `JSON.stringify` spells in another way;
//! - a number that `Number::toString` prints in another way ([`number`]).
//!
//! What comes of it, the draft, has every token right and the members of its objects where they were written. Where an
//! object's members must move or go, [`members`] notes it, and puts the whole right once, at the end.
//!
//! # What strangers cannot do with it
//! No recursion and no tree. A body of n bytes takes O(n log n) time and O(n) memory whatever its nesting and its keys;
//! `hostile_bodies_timed` in the workspace's tests prints the factors.

use std::ops::Range;

use shared::json::{self, NotJson, Reader, Str, Token, Unit};

mod members;
mod number;
mod order;

use members::Members;

/// The longest text taken, in bytes. Offsets in the draft are `u32`, and no token grows as much as eightfold (`1e20`
/// grows most, to 21 digits). V8 stops about there, too: its longest string has 2^29 - 24 code units.
const LONGEST: usize = 1 << 29;

/// The canonical form of `body`, in UTF-8.
///
/// # Errors
/// [`NotJson`] where `JSON.parse` throws a `SyntaxError`, and for a text over 512 MiB. Nothing else: depth at which V8
/// runs out of stack works.
pub fn canonical(body: &[u8]) -> Result<Vec<u8>, NotJson> {
    let text = json::decode(body);
    if text.len() > LONGEST {
        return Err(NotJson { at: LONGEST, problem: "longer than any JavaScript string" });
    }
    let mut draft = Draft::of(&text);
    let mut members = Members::default();
    let mut reader = Reader::new(&text);
    loop {
        let end = reader.offset(); // of the token before
        let Some(token) = reader.next()? else {
            draft.keep(end);
            break;
        };
        let start = reader.start();
        if reader.spaced() {
            draft.drop_space(end..start);
        }
        match token {
            Token::Key(key) => {
                let place = draft.len_at(start);
                let quote = start + 1 + key.raw.len();
                if key.escaped {
                    draft.respell(start + 1, key);
                    draft.keep(quote);
                    members.add(place, &draft.bytes, place as usize + 1..draft.bytes.len());
                } else {
                    members.add(place, text.as_bytes(), start + 1..quote);
                }
                if reader.spaced() {
                    draft.drop_space(quote + 1..reader.offset());
                }
            }
            Token::String(string) if string.escaped => draft.respell(start + 1, string),
            Token::Number(number) => draft.reprint(start, number),
            Token::ObjectStart => members.open(),
            Token::ObjectEnd => {
                if members.need_a_look() {
                    draft.keep(start);
                    members.arrange(&draft.bytes);
                }
                members.close();
            }
            Token::ArrayStart | Token::ArrayEnd | Token::String(_) | Token::Bool(_) | Token::Null => {}
        }
    }
    Ok(members.put_right(draft.bytes))
}

/// The canonical text but for the order of members: finished bytes, and a run of the text that follows them as it is.
struct Draft<'a> {
    text: &'a str,
    bytes: Vec<u8>,
    /// Where in the text the run begins.
    run: usize,
}

impl<'a> Draft<'a> {
    fn of(text: &'a str) -> Self {
        Draft { text, bytes: Vec::with_capacity(text.len()), run: 0 }
    }

    /// How long the draft is once the run reaches `at` in the text. It fits, see [`LONGEST`].
    fn len_at(&self, at: usize) -> u32 {
        (self.bytes.len() + at - self.run) as u32
    }

    /// Ends the run at `at`; the next begins there.
    fn keep(&mut self, at: usize) {
        self.skip(at..at);
    }

    /// Ends the run where `gap` begins; the next begins where it ends.
    fn skip(&mut self, gap: Range<usize>) {
        self.bytes.extend_from_slice(&self.text.as_bytes()[self.run..gap.start]);
        self.run = gap.end;
    }

    /// Of what lies between two tokens, leaves only the comma or the colon, if there is one.
    fn drop_space(&mut self, gap: Range<usize>) {
        let bytes = &self.text.as_bytes()[gap.clone()];
        if let [b',' | b':', ..] = bytes {
            self.skip(gap.start + 1..gap.end);
            return;
        }
        self.skip(gap);
        self.bytes.extend(bytes.iter().find(|byte| matches!(byte, b',' | b':')));
    }

    /// Spells a string's escapes as `QuoteJSONString` does. `at` is where its `raw` begins in the text.
    fn respell(&mut self, at: usize, string: Str<'_>) {
        for (escape, unit) in string.escapes() {
            let short = escape.len() == 2;
            if short && unit != Unit::Char('/') {
                continue; // the only spelling there is
            }
            self.skip(at + escape.start..at + escape.end);
            self.spell(unit);
        }
    }

    fn spell(&mut self, unit: Unit) {
        let short = match unit {
            Unit::Char('\u{8}') => b'b',
            Unit::Char('\t') => b't',
            Unit::Char('\n') => b'n',
            Unit::Char('\u{c}') => b'f',
            Unit::Char('\r') => b'r',
            Unit::Char(itself @ ('"' | '\\')) => itself as u8,
            Unit::Char(control @ '\0'..' ') => return self.spell_hex(control as u16),
            Unit::LoneSurrogate(half) => return self.spell_hex(half),
            Unit::Char(c) => return self.bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        };
        self.bytes.extend_from_slice(&[b'\\', short]);
    }

    fn spell_hex(&mut self, unit: u16) {
        let [a, b, c, d] = [12, 8, 4, 0].map(|shift| b"0123456789abcdef"[usize::from(unit >> shift & 0xf)]);
        self.bytes.extend_from_slice(&[b'\\', b'u', a, b, c, d]);
    }

    /// Prints a number as `Number::toString` does. `at` is where it begins in the text.
    fn reprint(&mut self, at: usize, written: &str) {
        let end = at + written.len();
        let Some(unchanged) = number::unchanged(written) else {
            self.skip(at..end);
            number::print(written, &mut self.bytes);
            return;
        };
        if unchanged < written.len() {
            self.skip(at + unchanged..end);
        }
    }
}

#[cfg(test)]
mod tests;
