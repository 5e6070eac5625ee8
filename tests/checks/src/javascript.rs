//! JSON as JavaScript reads and writes it, in the plainest way: UTF-16, a tree, recursion. Slow, shallow, and made from
//! ECMA-262 alone, to be held against the code that must be fast and deep.

/// Deeper than this is not read: recursion needs stack.
const DEEPEST: usize = 150;

/// A JSON value, nothing of it decided yet: numbers as they are written, members as often as they are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// `null`
    Null,
    /// `true`, `false`
    Bool(bool),
    /// A number's literal.
    Number(String),
    /// A string's UTF-16 code units.
    String(Vec<u16>),
    /// An array.
    Array(Vec<Value>),
    /// An object's members in the order of the text, duplicates and all.
    Object(Vec<(Vec<u16>, Value)>),
}

/// Why there is no [`Value`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unread {
    /// `JSON.parse` throws a `SyntaxError`.
    NotJson,
    /// It may be JSON or not.
    TooDeep,
}

/// `JSON.parse` of the body's text.
///
/// # Errors
/// [`Unread`]
pub fn parse(body: &[u8]) -> Result<Value, Unread> {
    let text = String::from_utf8_lossy(body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body));
    let mut parser = Parser { units: text.encode_utf16().collect(), at: 0 };
    let value = parser.value(0)?;
    parser.space();
    if parser.at < parser.units.len() { Err(Unread::NotJson) } else { Ok(value) }
}

struct Parser {
    units: Vec<u16>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.units.get(self.at).map(|&unit| char::from_u32(unit.into()).unwrap_or(char::REPLACEMENT_CHARACTER))
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(' ' | '\t' | '\n' | '\r')) {
            self.at += 1;
        }
    }

    /// White space, then this character, if it is there.
    fn eat(&mut self, wanted: char) -> bool {
        self.space();
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, wanted: char) -> Result<(), Unread> {
        if self.eat(wanted) { Ok(()) } else { Err(Unread::NotJson) }
    }

    fn value(&mut self, depth: usize) -> Result<Value, Unread> {
        if depth > DEEPEST {
            return Err(Unread::TooDeep);
        }
        self.space();
        match self.peek() {
            Some('{') => self.object(depth),
            Some('[') => self.array(depth),
            Some('"') => Ok(Value::String(self.string()?)),
            Some('-' | '0'..='9') => Ok(Value::Number(self.number()?)),
            _ => self.word(),
        }
    }

    fn word(&mut self) -> Result<Value, Unread> {
        for (word, value) in [("null", Value::Null), ("true", Value::Bool(true)), ("false", Value::Bool(false))] {
            let units: Vec<u16> = word.encode_utf16().collect();
            if self.units[self.at..].starts_with(&units) {
                self.at += units.len();
                return Ok(value);
            }
        }
        Err(Unread::NotJson)
    }

    fn array(&mut self, depth: usize) -> Result<Value, Unread> {
        self.expect('[')?;
        let mut values = Vec::new();
        if self.eat(']') {
            return Ok(Value::Array(values));
        }
        loop {
            values.push(self.value(depth + 1)?);
            if self.eat(']') {
                return Ok(Value::Array(values));
            }
            self.expect(',')?;
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, Unread> {
        self.expect('{')?;
        let mut members = Vec::new();
        if self.eat('}') {
            return Ok(Value::Object(members));
        }
        loop {
            self.space();
            let key = self.string()?;
            self.expect(':')?;
            members.push((key, self.value(depth + 1)?));
            if self.eat('}') {
                return Ok(Value::Object(members));
            }
            self.expect(',')?;
        }
    }

    fn string(&mut self) -> Result<Vec<u16>, Unread> {
        if self.peek() != Some('"') {
            return Err(Unread::NotJson);
        }
        self.at += 1;
        let mut string = Vec::new();
        loop {
            let unit = *self.units.get(self.at).ok_or(Unread::NotJson)?;
            self.at += 1;
            match unit {
                0x22 => return Ok(string),
                0x5c => string.push(self.escape()?),
                0..0x20 => return Err(Unread::NotJson),
                unit => string.push(unit),
            }
        }
    }

    fn escape(&mut self) -> Result<u16, Unread> {
        let escape = self.peek().ok_or(Unread::NotJson)?;
        self.at += 1;
        Ok(match escape {
            '"' | '\\' | '/' => escape as u16,
            'b' => 8,
            'f' => 0xc,
            'n' => 0xa,
            'r' => 0xd,
            't' => 9,
            'u' => {
                let digits = self.units.get(self.at..self.at + 4).ok_or(Unread::NotJson)?;
                let digits = String::from_utf16_lossy(digits);
                if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                    return Err(Unread::NotJson);
                }
                self.at += 4;
                u16::from_str_radix(&digits, 16).map_err(|_| Unread::NotJson)?
            }
            _ => return Err(Unread::NotJson),
        })
    }

    fn number(&mut self) -> Result<String, Unread> {
        let begin = self.at;
        self.at += usize::from(self.peek() == Some('-'));
        let whole = self.digits()?;
        if whole > 1 && self.units[self.at - whole] == u16::from(b'0') {
            return Err(Unread::NotJson);
        }
        if self.peek() == Some('.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some('e' | 'E')) {
            self.at += 1;
            self.at += usize::from(matches!(self.peek(), Some('+' | '-')));
            self.digits()?;
        }
        Ok(String::from_utf16_lossy(&self.units[begin..self.at]))
    }

    /// How many there were; at least one.
    fn digits(&mut self) -> Result<usize, Unread> {
        let begin = self.at;
        while matches!(self.peek(), Some('0'..='9')) {
            self.at += 1;
        }
        if self.at > begin { Ok(self.at - begin) } else { Err(Unread::NotJson) }
    }
}

impl Value {
    /// `JSON.stringify`, in UTF-8.
    pub fn stringify(&self) -> String {
        let mut text = String::new();
        self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) {
        match self {
            Value::Null => text.push_str("null"),
            Value::Bool(bool) => text.push_str(if *bool { "true" } else { "false" }),
            Value::Number(literal) => {
                let number: f64 = literal.parse().unwrap();
                // `Number::toString` and nothing else is taken from a crate here; Node judges that, too.
                text.push_str(
                    if number.is_finite() { ryu_js::Buffer::new().format(number).to_owned() } else { "null".into() }
                        .as_str(),
                );
            }
            Value::String(units) => quote(units, text),
            Value::Array(values) => list(text, '[', values, ']', |text, value| value.write(text)),
            Value::Object(members) => list(text, '{', &properties(members), '}', |text, (key, value)| {
                quote(key, text);
                text.push(':');
                value.write(text);
            }),
        }
    }

    /// Whether `is` holds for this value or for any in it, or for any key (as a string).
    pub fn any(&self, is: &impl Fn(&Value) -> bool) -> bool {
        is(self)
            || match self {
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
                Value::Array(values) => values.iter().any(|value| value.any(is)),
                Value::Object(members) => {
                    members.iter().any(|(key, value)| is(&Value::String(key.clone())) || value.any(is))
                }
            }
    }
}

fn list<T>(text: &mut String, open: char, items: &[T], close: char, write: impl Fn(&mut String, &T)) {
    text.push(open);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        write(text, item);
    }
    text.push(close);
}

/// `OrdinaryOwnPropertyKeys` of the object that these members make, each with its value.
fn properties(members: &[(Vec<u16>, Value)]) -> Vec<(&[u16], &Value)> {
    let mut properties: Vec<(&[u16], &Value)> = Vec::new();
    for (key, value) in members {
        match properties.iter_mut().find(|(known, _)| known == key) {
            Some(known) => known.1 = value,
            None => properties.push((key, value)),
        }
    }
    // Stable: what are no indices stay in their order, behind those that are.
    properties.sort_by_key(|(key, _)| array_index(key).unwrap_or(u64::MAX));
    properties
}

/// The array index that a key is: a whole number below 2^32 - 1 in its one decimal spelling.
fn array_index(key: &[u16]) -> Option<u64> {
    let text = String::from_utf16(key).ok()?;
    let index = text.parse().ok().filter(|index: &u64| *index < u64::from(u32::MAX))?;
    (index.to_string() == text).then_some(index)
}

/// `QuoteJSONString`
fn quote(units: &[u16], text: &mut String) {
    text.push('"');
    for unit in char::decode_utf16(units.iter().copied()) {
        match unit {
            Ok('"') => text.push_str("\\\""),
            Ok('\\') => text.push_str("\\\\"),
            Ok('\u{8}') => text.push_str("\\b"),
            Ok('\u{c}') => text.push_str("\\f"),
            Ok('\n') => text.push_str("\\n"),
            Ok('\r') => text.push_str("\\r"),
            Ok('\t') => text.push_str("\\t"),
            Ok(control) if control < ' ' => text.push_str(&format!("\\u{:04x}", u32::from(control))),
            Ok(c) => text.push(c),
            Err(lone) => text.push_str(&format!("\\u{:04x}", lone.unpaired_surrogate())),
        }
    }
    text.push('"');
}
