//! Each detail of ECMA-262 by itself. `tests/canonical` compares the whole with Node.

use super::canonical;

/// The canonical form of `text`. Canonicalising it again must change nothing.
fn form(text: impl AsRef<[u8]>) -> String {
    let form = canonical(text.as_ref()).unwrap();
    assert_eq!(canonical(&form).unwrap(), form, "a canonical form is its own canonical form");
    String::from_utf8(form).unwrap()
}

#[track_caller]
fn check<const N: usize>(cases: [(&str, &str); N]) {
    for (text, expected) in cases {
        assert_eq!(form(text), expected, "of {text}");
    }
}

#[test]
fn what_is_canonical_stays() {
    for text in [r#"{"a":[1,-2.5,"x",true,false,null,{}],"":{"b":[]}}"#, "0", "\"\"", "null", "[]", "{}", "[[],[{}]]"] {
        assert_eq!(form(text), text);
    }
}

#[test]
fn white_space_between_tokens_goes_and_stays_in_strings() {
    check([
        (" \t\r\n{ \"a b\" : [ 1 ,\t2\r, { } , [ ] ] ,\n\"c\"\n:\n\" d \" } ", r#"{"a b":[1,2,{},[]],"c":" d "}"#),
        ("[1 ]", "[1]"),
        (" 7 ", "7"),
        (r#"{"\u0061" :1, "b": 2}"#, r#"{"a":1,"b":2}"#),
    ]);
}

#[test]
fn numbers_print_as_number_to_string() {
    check([
        ("[1.0,1.50,-2.0,100,0.0,10.010]", "[1,1.5,-2,100,0,10.01]"),
        ("[-0,-0.0,-0e5,0e999,-1e-400]", "[0,0,0,0,0]"),
        ("[1e21,1e20,123456789012345680000,1E+2,1e-2]", "[1e+21,100000000000000000000,123456789012345680000,100,0.01]"),
        ("[0.000001,0.0000001,-0.0000015,1e-7,0.00000100]", "[0.000001,1e-7,-0.0000015,1e-7,0.000001]"),
        ("[1e400,-1e400,1.7976931348623159e308]", "[null,null,null]"),
        ("[1.7976931348623158e308,5e-324,2e-324,3e-324]", "[1.7976931348623157e+308,5e-324,0,5e-324]"),
        (
            "[9007199254740993,9007199254740992,999999999999999,9999999999999999]",
            "[9007199254740992,9007199254740992,999999999999999,10000000000000000]",
        ),
        (
            "[0.1,0.30000000000000004,1689194871.123456,1689194871.0,12345678901234.5]",
            "[0.1,0.30000000000000004,1689194871.123456,1689194871,12345678901234.5]",
        ),
        ("[1.00000000000000011102230246251565404236316680908203125]", "[1]"),
        ("[1.00000000000000011102230246251565404236316680908203126]", "[1.0000000000000002]"),
    ]);
}

#[test]
fn strings_are_spelled_as_quote_json_string() {
    check([
        (r#""\"\\\/\b\f\n\r\t""#, r#""\"\\/\b\f\n\r\t""#),
        (r#""\u0022\u005C\u002f\u0008\u000C\u000a\u000d\u0009""#, r#""\"\\/\b\f\n\r\t""#),
        (r#""\u0000\u000B\u001F\u0020\u007F""#, "\"\\u0000\\u000b\\u001f \u{7f}\""),
        (r#""\u00E9\u2028\u2029\uFEFF\uFFFF\ud83d\uDE00""#, "\"é\u{2028}\u{2029}\u{feff}\u{ffff}😀\""),
        (r#""\uD83D""#, r#""\ud83d""#),
        (r#""\uDE00\uD83D x\uDBFF\uD83D\uDE00\uD83D\n""#, r#""\ude00\ud83d x\udbff😀\ud83d\n""#),
        (r#""\ud83d\u0041\ud83d\\u0041""#, r#""\ud83dA\ud83d\\u0041""#),
    ]);
}

#[test]
fn bytes_decode_as_text_decoder_does() {
    assert_eq!(form(b"\xEF\xBB\xBF\"\xEF\xBB\xBF\""), "\"\u{feff}\"");
    assert_eq!(
        form(b"\"\xC0\x80 \xED\xA0\xBD \xF0\x9F\x98 \xFF\""),
        "\"\u{fffd}\u{fffd} \u{fffd}\u{fffd}\u{fffd} \u{fffd} \u{fffd}\""
    );
    assert!(canonical(b"\xEF\xBB\xBF\xEF\xBB\xBF1").is_err(), "only one byte order mark goes");
}

#[test]
fn array_indices_come_first_ascending() {
    check([
        (r#"{"b":0,"1":1}"#, r#"{"1":1,"b":0}"#),
        (r#"{"10":0,"9":1}"#, r#"{"9":1,"10":0}"#),
        (r#"{"1":0,"2":1,"a":2}"#, r#"{"1":0,"2":1,"a":2}"#),
        (
            r#"{"4294967295":0,"4294967294":1,"00":2,"0":3,"-1":4,"1.5":5}"#,
            r#"{"0":3,"4294967294":1,"4294967295":0,"00":2,"-1":4,"1.5":5}"#,
        ),
        (r#"{"a":0,"\u0031":1}"#, r#"{"1":1,"a":0}"#),
        (
            r#"{ "x" : {"b":0,"1":1} , "2" : {"3":0,"2":[{"z":0,"0":0}]} }"#,
            r#"{"2":{"2":[{"0":0,"z":0}],"3":0},"x":{"1":1,"b":0}}"#,
        ),
    ]);
}

#[test]
fn of_equal_keys_the_first_place_and_the_last_value() {
    check([
        (r#"{"a":1,"b":2,"a":3}"#, r#"{"a":3,"b":2}"#),
        (r#"{"a":1,"\u0061":{"c":1,"c":[]}}"#, r#"{"a":{"c":[]}}"#),
        (r#"{"":1,"":2,"":3}"#, r#"{"":3}"#),
        (r#"{"1":1,"a":2,"1":3,"0":4}"#, r#"{"0":4,"1":3,"a":2}"#),
        (r#"{"é":1,"\u00e9":2,"\ud83d":3,"\uD83D":4}"#, r#"{"é":2,"\ud83d":4}"#),
        (r#"{"a":{"b":0,"1":1},"x":{"b":0,"1":2},"a":[]}"#, r#"{"a":[],"x":{"1":2,"b":0}}"#),
        (r#"{"__proto__":1,"constructor":2,"__proto__":3}"#, r#"{"__proto__":3,"constructor":2}"#),
        // One tag, three keys.
        (
            r#"{"abcdefgh-abcdefgh":1,"abcdefgh+abcdefgh":2,"abcdefgh-abcdefgh":3}"#,
            r#"{"abcdefgh-abcdefgh":3,"abcdefgh+abcdefgh":2}"#,
        ),
    ]);
}

#[test]
fn any_number_of_members_is_ordered_alike() {
    for count in (1..200).chain([1000]) {
        let member = |key: String, value: usize| format!("\"{key}\":{value}");
        let names: Vec<String> = (0..count).map(|i| member(format!("k{i}"), i)).collect();
        assert_eq!(form(format!("{{{}}}", names.join(","))), format!("{{{}}}", names.join(",")));

        let again: Vec<String> = (0..count).map(|i| member(format!("k{i}"), i + count)).collect();
        let twice = format!("{{{},{}}}", names.join(","), again.join(","));
        assert_eq!(form(twice), format!("{{{}}}", again.join(",")));

        let indices: Vec<String> = (0..count).map(|i| member(i.to_string(), i)).collect();
        let backwards: Vec<String> = names.iter().chain(indices.iter().rev()).cloned().collect();
        let expected = format!("{{{},{}}}", indices.join(","), names.join(","));
        assert_eq!(form(format!("{{{}}}", backwards.join(","))), expected);
    }
}

#[test]
fn a_key_may_end_with_the_text() {
    // The digest of a key reads eight bytes at once, also where the text has fewer left.
    check([(r#"{"\/":1}"#, r#"{"/":1}"#), (r#"{"":1}"#, r#"{"":1}"#), (r#"[{"\n":0}]"#, r#"[{"\n":0}]"#)]);
}

#[test]
fn what_is_not_json_has_no_canonical_form() {
    for text in ["", "{", "[1,]", r#"{"a":1,"a"}"#, "01", "\"\u{1}\"", "NaN", "1 1", r#""\x""#, "[1}", "\u{a0}1"] {
        assert!(canonical(text.as_bytes()).is_err(), "{text:?}");
    }
}
