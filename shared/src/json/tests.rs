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
        "",
        " ",
        "{",
        "[",
        "]",
        "}",
        "[1,]",
        "[,1]",
        "{\"a\":1,}",
        "{\"a\"}",
        "{\"a\":}",
        "{a:1}",
        "{1:1}",
        "[1 2]",
        "01",
        "-",
        "-01",
        "1.",
        ".5",
        "+1",
        "1e",
        "1e+",
        "0x1",
        "NaN",
        "Infinity",
        "tru",
        "nul",
        "truefalse",
        "1 1",
        "\"",
        "\"\\",
        "\"\\x\"",
        "\"\\u12\"",
        "\"\\u12g4\"",
        "\"\t\"",
        "'a'",
        "[1}",
        "{\"a\":1]",
        "\u{feff}1",
        "\u{a0}1",
        "\u{b}1",
        "1\0",
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
fn escapes_say_where_they_are() {
    let escapes: Vec<_> = Str { raw: r"aé\u00e9b\n\\\ud83d\ude00\/", escaped: true }.escapes().collect();
    let expected =
        [(3..9, 'é'), (10..12, '\n'), (12..14, '\\'), (14..26, '😀'), (26..28, '/')].map(|(at, c)| (at, Unit::Char(c)));
    assert_eq!(escapes, expected);
    assert_eq!(Str { raw: "no", escaped: false }.escapes().next(), None);
}

#[test]
fn tokens_say_where_they_are() {
    let mut reader = Reader::new("{\"k\" :[ 10,\"v\"]}");
    let mut read = Vec::new();
    while reader.next().unwrap().is_some() {
        read.push((reader.start(), reader.offset(), reader.spaced(), reader.depth()));
    }
    let key = (1, 6, true, 1);
    assert_eq!(
        read,
        [
            (0, 1, false, 1),
            key,
            (6, 7, false, 2),
            (8, 10, true, 2),
            (11, 14, false, 2),
            (14, 15, false, 1),
            (15, 16, false, 0)
        ]
    );
}

#[test]
fn errors_say_where_it_stops_being_json() {
    for (text, at) in
        [("[1,,2]", 3), ("{\"a\" 1}", 5), ("[1 2]", 3), ("\"ab\\x\"", 3), ("\"a\nb\"", 2), ("\"abc", 4), ("tru", 0)]
    {
        assert_eq!(tokens(text).unwrap_err().at, at, "{text}");
    }
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
