//! Random bodies that try what canonicalisers get wrong.

use fastrand::Rng;

/// A body: mostly JSON of every kind, spelled in every way; sometimes damaged.
pub(crate) fn body(random: &mut Rng) -> Vec<u8> {
    let mut text = Text { random, written: Vec::new() };
    if text.once_in(20) {
        text.put("\u{feff}");
    }
    text.space();
    match text.random.u32(..60) {
        0 => text.deep(),
        1 => text.many_members(),
        _ => text.value(0),
    }
    text.space();
    let mut body = text.written;
    if random.u32(..3) == 0 {
        for _ in 0..random.u32(1..4) {
            damage(random, &mut body);
        }
    }
    body
}

fn damage(random: &mut Rng, body: &mut Vec<u8>) {
    let at = random.usize(..=body.len());
    let end = (at + random.usize(..6)).min(body.len());
    match random.u32(..6) {
        0 => drop(body.drain(at..end)),
        1 => body.truncate(at),
        2 => body.insert(at, random.u8(..)),
        3 => body.insert(at, *random.choice(b"\"\\{}[],:0e.-u \n").unwrap()),
        4 => body.splice(at..at, body[at..end].to_vec()).for_each(drop),
        _ => {
            if let Some(byte) = body.get_mut(at) {
                *byte ^= 1 << random.u32(..8);
            }
        }
    }
}

struct Text<'r> {
    random: &'r mut Rng,
    written: Vec<u8>,
}

impl Text<'_> {
    fn once_in(&mut self, times: u32) -> bool {
        self.random.u32(..times) == 0
    }

    /// Mostly less than `usual`, now and then up to `seldom`.
    fn below(&mut self, usual: usize, seldom: usize) -> usize {
        let end = if self.once_in(8) { seldom } else { usual };
        self.random.usize(..end)
    }

    fn put(&mut self, text: impl AsRef<[u8]>) {
        self.written.extend_from_slice(text.as_ref());
    }

    fn put_one(&mut self, of: &[&str]) {
        let one = self.random.choice(of).unwrap();
        self.put(one);
    }

    fn space(&mut self) {
        if self.once_in(4) {
            for _ in 0..self.random.u32(1..4) {
                self.put_one(&[" ", "\t", "\n", "\r"]);
            }
        }
    }

    fn value(&mut self, depth: u32) {
        match self.random.u32(..if depth > 5 { 6 } else { 12 }) {
            0 | 1 => self.number(),
            2 | 3 => self.string(),
            4 => self.put_one(&["true", "false", "null"]),
            5 => self.put_one(&["0", "\"\"", "[]", "{}"]),
            6 | 7 => {
                let count = self.random.usize(..5);
                self.list(count, ["[", "]"], |text, _| text.value(depth + 1));
            }
            _ => {
                let count = self.below(8, 90);
                let depth = if count > 8 { 6 } else { depth };
                self.list(count, ["{", "}"], |text, _| text.member(depth));
            }
        }
    }

    fn list(&mut self, count: usize, [open, close]: [&str; 2], each: impl Fn(&mut Self, usize)) {
        self.put(open);
        self.space();
        for i in 0..count {
            if i > 0 {
                self.put(",");
                self.space();
            }
            each(self, i);
            self.space();
        }
        self.put(close);
    }

    fn member(&mut self, depth: u32) {
        self.key();
        self.space();
        self.put(":");
        self.space();
        self.value(depth + 1);
    }

    /// Few enough that keys come twice, near enough to indices that their borders are tried.
    fn key(&mut self) {
        match self.random.u32(..8) {
            0 | 1 => {
                let name = [
                    "a",
                    "b",
                    "\\u0061",
                    "\\u0062",
                    "",
                    "é",
                    "\\u00e9",
                    "\\u00E9",
                    "__proto__",
                    "toJSON",
                    "length",
                    "\\ud83d",
                    "\\uD83D",
                    "/",
                    "\\/",
                    "abcdefgh-abcdefgh",
                    "abcdefgh+abcdefgh",
                    "abcdefgh\\u002babcdefgh",
                ];
                let name = self.random.choice(name).unwrap();
                self.put(format!("\"{name}\""));
            }
            2 => {
                let border = [
                    "4294967293",
                    "4294967294",
                    "4294967295",
                    "4294967296",
                    "2147483648",
                    "00",
                    "01",
                    "-0",
                    "-1",
                    "1.0",
                    "1e1",
                    "\\u0031",
                ];
                let border = self.random.choice(border).unwrap();
                self.put(format!("\"{border}\""));
            }
            3 | 4 => {
                let index = self.below(12, 1 << 33);
                self.put(format!("\"{index}\""));
            }
            5 | 6 => {
                let name = self.random.u32(..40);
                self.put(format!("\"k{name}\""));
            }
            _ => self.string(),
        }
    }

    fn string(&mut self) {
        self.put("\"");
        for _ in 0..self.below(6, 40) {
            match self.random.u32(..10) {
                0..4 => {
                    let letter = self.random.alphanumeric();
                    self.put(letter.to_string());
                }
                4 => self.put_one(&["é", "中", "😀", "\u{2028}", "\u{7f}", "\u{feff}", "\u{ffff}", " ", "/", "'"]),
                5 => self.put_one(&["\\\"", "\\\\", "\\/", "\\b", "\\f", "\\n", "\\r", "\\t"]),
                6 => self.escaped(0..0x100),
                7 => self.escaped(0..0x10000),
                8 => self.escaped(0xd7fe..0xe002),
                _ => {
                    let bad: &[u8] = self
                        .random
                        .choice([&b"\xff"[..], b"\xc3", b"\xe2\x82", b"\xed\xa0\xbd", b"\xf0\x9f\x98", b"\xc0\x80"])
                        .unwrap();
                    self.put(bad);
                }
            }
        }
        self.put("\"");
    }

    fn escaped(&mut self, units: std::ops::Range<u32>) {
        let unit = self.random.u32(units);
        let lower = self.random.bool();
        self.put(if lower { format!("\\u{unit:04x}") } else { format!("\\u{unit:04X}") });
    }

    fn number(&mut self) {
        if self.once_in(3) {
            self.put("-");
        }
        let digits = |random: &mut Rng, most: usize| -> String {
            let first = char::from(b'1' + random.u8(..9));
            (1..random.usize(1..=most)).fold(first.to_string(), |digits, _| digits + &random.digit(10).to_string())
        };
        let whole = if self.once_in(3) { "0".into() } else { digits(self.random, 20) };
        self.put(whole);
        if self.random.bool() {
            let zeros = |random: &mut Rng| "0".repeat(random.usize(..8));
            let fraction = format!(".{}{}{}", zeros(self.random), digits(self.random, 18), zeros(self.random));
            let fraction = if self.once_in(4) { ".0".into() } else { fraction };
            self.put(fraction);
        }
        if self.once_in(4) {
            self.put_one(&["e", "E", "e+", "E-", "e-"]);
            let exponent = self.below(30, 400);
            self.put(exponent.to_string());
        }
    }

    /// Reordering at every level.
    fn deep(&mut self) {
        let depth = self.random.usize(1..300);
        for _ in 0..depth {
            self.put_one(&["{\"b\":0,\"1\":", "{\"a\":0,\"a\":", "{\"a\":[1.0],\"b\":"]);
        }
        self.value(0);
        self.put("}".repeat(depth));
    }

    fn many_members(&mut self) {
        let count = self.random.usize(60..300);
        let most = self.random.usize(1..2 * count);
        self.list(count, ["{", "}"], |text, i| {
            let (prefix, name) = (if text.random.bool() { "" } else { "k" }, text.random.usize(..most));
            text.put(format!("\"{prefix}{name}\":{i}"));
        });
    }
}
