//! Text that others wrote, made harmless for people: as a title ([`one_line`]), on a terminal ([`printable`],
//! [`printable_lines`]), as JSON on a terminal ([`printable_json`]).

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write as _};

use unicode_properties::{GeneralCategory, UnicodeGeneralCategory as _};

/// Zero width non-joiner and joiner. Persian, Indic scripts and emoji need them.
const JOINERS: [char; 2] = ['\u{200c}', '\u{200d}'];

/// `true`: `c` steers a terminal, cannot be seen, or changes the direction of the text beside it. These are controls, line
/// and paragraph separators, format characters but [`JOINERS`], private use, noncharacters, and plane 14 (tags and
/// variation selectors).
pub fn is_hidden(c: char) -> bool {
    use GeneralCategory::{Control, Format, LineSeparator, ParagraphSeparator, PrivateUse};
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    let is_noncharacter = matches!(c, '\u{fdd0}'..='\u{fdef}') || u32::from(c) & 0xfffe == 0xfffe;
    let category = c.general_category();
    matches!(category, Control | Format | LineSeparator | ParagraphSeparator | PrivateUse) && !JOINERS.contains(&c)
        || is_noncharacter
        || matches!(c, '\u{e0000}'..='\u{effff}')
}

/// Writes `text` to stdout. A command outlives the reader of its output, such as `head`.
///
/// # Errors
/// Any but that of a reader that has gone: a full disk, say.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

/// Gives `text` as one line, without characters that [`is_hidden`] names. White space at the ends is left out, other runs
/// of white space become one space. A joiner stays between two characters that are not ASCII.
pub fn one_line(text: impl IntoIterator<Item = char>) -> impl Iterator<Item = char> {
    let mut text = text.into_iter();
    let (mut last, mut next) = (None::<char>, None::<char>);
    std::iter::from_fn(move || {
        if next.is_some() {
            last = next.take();
            return last;
        }
        let (mut space, mut joiner) = (false, None);
        let shown = loop {
            match text.next()? {
                c if c.is_whitespace() => space = true,
                c if JOINERS.contains(&c) => joiner = Some(c),
                c if is_hidden(c) => {}
                c => break c,
            }
        };
        let joins = |before: char| !before.is_ascii() && !shown.is_ascii();
        let between = match last {
            None => None,
            Some(_) if space => Some(' '),
            Some(before) => joiner.filter(|_| joins(before)),
        };
        if between.is_some() {
            next = Some(shown);
            return between;
        }
        last = Some(shown);
        last
    })
}

/// Gives a value that others wrote for one line of a terminal. Characters that [`is_hidden`] names become escapes: `\n`,
/// `\u{1b}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, is_hidden, |c, out| match c {
        '\n' | '\r' | '\t' => out.extend(c.escape_default()),
        _ => out.extend(c.escape_unicode()),
    })
}

/// The same for a text of several lines: line feeds stay.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| is_hidden(c) && c != '\n', |c, out| out.extend(c.escape_unicode()))
}

/// The same for a JSON text, with JSON's own escapes: a program reads the same values.
pub fn printable_json(json: &str) -> Cow<'_, str> {
    // Between tokens JSON has line feeds, which stay. In strings a line feed is an escape already.
    escaped(
        json,
        |c| is_hidden(c) && c != '\n',
        |c, out| {
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}").expect("a String takes every text");
            }
        },
    )
}

fn escaped(text: &str, is_escaped: impl Fn(char) -> bool, escape: impl Fn(char, &mut String)) -> Cow<'_, str> {
    let Some(first) = text.find(&is_escaped) else { return Cow::Borrowed(text) };
    let mut out = text[..first].to_owned();
    for c in text[first..].chars() {
        if is_escaped(c) { escape(c, &mut out) } else { out.push(c) }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    fn line(text: &str) -> String {
        one_line(text.chars()).collect()
    }

    #[test]
    fn a_title_is_one_line_of_what_can_be_seen() {
        let rows = [
            ("", ""),
            ("KeyError: 'berth_7'", "KeyError: 'berth_7'"),
            ("  a \r\n\t b\u{85}c\u{2028}\u{2029}d\u{a0}e\u{3000} ", "a b c d e"),
            ("a\u{1b}[31mb\u{9b}0m\u{7f}\0", "a[31mb0m"),
            ("\u{202e}gpj.\u{2066}exe\u{2069}\u{200f}\u{61c}", "gpj.exe"),
            ("pass\u{200b}\u{2060}\u{feff}\u{ad}\u{200d}word", "password"),
            ("a\u{e0041}\u{e007f}\u{e0100}\u{e000}\u{f8ff}\u{10fffd}\u{fdd0}\u{fffe}\u{1ffff}b", "ab"),
            ("a \u{200b} \u{200d} b", "a b"),
            ("\u{200d}\u{202e} \u{200c}", ""),
            // Joiners that scripts need.
            ("می‌خواهم क्‍ष 👩‍👧 ❤️‍🔥", "می‌خواهم क्‍ष 👩‍👧 ❤️‍🔥"),
            ("é\u{200d}\u{200d}\u{200c}ü\u{200d}", "é\u{200c}ü"),
            ("e\u{301} \u{fffd} Süd-7 海鸥号 🚢", "e\u{301} \u{fffd} Süd-7 海鸥号 🚢"),
        ];
        for (text, expected) in rows {
            assert_eq!(line(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_terminal_gets_escapes() {
        assert_eq!(printable("Liegeplatz „Süd-7“ \\ 🚢"), "Liegeplatz „Süd-7“ \\ 🚢");
        assert_eq!(printable("a\u{1b}[2J\n\t\u{9b}\u{202e}\u{e0041}"), r"a\u{1b}[2J\n\t\u{9b}\u{202e}\u{e0041}");
        assert_eq!(printable_lines("a\n\tb\u{1b}\n"), "a\n\\u{9}b\\u{1b}\n");
        let value = serde_json::json!({ "a\u{7f}": "\u{202e}\u{e0041}\u{1b}\n" });
        let json = serde_json::to_string_pretty(&value).unwrap();
        let shown = printable_json(&json);
        assert_eq!(shown, "{\n  \"a\\u007f\": \"\\u202e\\udb40\\udc41\\u001b\\n\"\n}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }

    /// Texts with many hidden characters.
    fn texts() -> impl Strategy<Value = String> {
        let hidden = "\0\u{7}\t\n\u{1b}\u{7f}\u{85}\u{9b}\u{a0}\u{ad}\u{61c}\u{200b}\u{200c}\u{200d}\u{200e}\u{2028}\u{2029}\
                      \u{202e}\u{2066}\u{3000}\u{e000}\u{fdd0}\u{feff}\u{ffff}\u{e0001}\u{e0041}\u{e0100}\u{10fffd} ab";
        let hidden: Vec<char> = hidden.chars().collect();
        let one = prop_oneof![select(hidden), any::<char>(), proptest::char::range('\0', '\u{3000}')];
        proptest::collection::vec(one, 0..40).prop_map(String::from_iter)
    }

    proptest! {
        #[test]
        fn no_output_holds_what_is_hidden(text in texts()) {
            let title = line(&text);
            prop_assert!(!title.contains(is_hidden), "{title:?}");
            prop_assert!(!title.contains("  ") && title.trim() == title, "{title:?}");
            prop_assert!(title.chars().all(|c| c == ' ' || !c.is_whitespace()), "{title:?}");
            prop_assert_eq!(&line(&title), &title);
            prop_assert!(!title.starts_with(JOINERS) && !title.ends_with(JOINERS), "{title:?}");
            prop_assert!(!printable(&text).contains(is_hidden));
            prop_assert!(!printable_lines(&text).replace('\n', "").contains(is_hidden));
            let json = serde_json::to_string(&text).unwrap();
            let shown = printable_json(&json);
            prop_assert!(!shown.contains(is_hidden));
            prop_assert_eq!(serde_json::from_str::<String>(&shown).unwrap(), text);
        }
    }
}
