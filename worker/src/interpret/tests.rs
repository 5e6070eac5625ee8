use super::*;

fn read(body: &str) -> Meaning {
    interpret(body.as_bytes()).unwrap()
}

/// An issue delivery with these members in `data.issue`.
fn issue(members: &str) -> Meaning {
    read(&format!(r#"{{"action":"created","data":{{"issue":{{{members}}}}}}}"#))
}

/// What the worker makes of a body that says nothing.
fn nothing_said() -> Meaning {
    let title = "Sentry: Unknown error (1 events)".into();
    Meaning { severity: Severity::High, kind: "event".into(), title, source_id: None }
}

macro_rules! fixture {
    ($name:literal) => {
        interpret(include_bytes!(concat!("../../../tests/fixtures/", $name, ".json"))).unwrap()
    };
}

#[test]
fn every_kind_of_delivery_says_what_it_is_about() {
    use Severity::{Critical, High, Low, Medium};
    let cases = [
        (fixture!("issue_created"), High, "created", "KeyError: 'berth_7' (3 events)", Some("6120045871")),
        (
            fixture!("issue_unresolved_523_events"),
            Critical,
            "unresolved",
            "TimeoutError: tide table did not answer within 30 s (523 events)",
            Some("6119987402"),
        ),
        (
            fixture!("issue_created_fatal"),
            Critical,
            "created",
            "MemoryError: cannot allocate the chart cache (1 events)",
            Some("6120100033"),
        ),
        (
            fixture!("issue_created_non_ascii"),
            Medium,
            "created",
            "ValueError: Liegeplatz „Süd-7“ ist für 海鸥号 🚢 zu kurz (12 events)",
            Some("6120077219"),
        ),
        (
            fixture!("issue_activity_alert_triggered"),
            High,
            "triggered",
            "KeyError: 'berth_7' (4 events)",
            Some("6120045871"),
        ),
        (fixture!("error_created"), High, "created", "KeyError: 'berth_7' (1 events)", Some("6120045871")),
        (
            fixture!("event_alert_triggered"),
            Medium,
            "triggered",
            "RangeError: draught 11.4 m exceeds the basin (1 events)",
            Some("6120063318"),
        ),
        (fixture!("metric_alert_critical"), Critical, "critical", "Critical: Reservations failing", None),
        (fixture!("metric_alert_warning"), Medium, "warning", "Warning: Reservations failing", None),
        (fixture!("metric_alert_resolved"), Low, "resolved", "Resolved: Reservations failing", None),
        (
            fixture!("comment_created"),
            Low,
            "created",
            "comment created by Ines Okafor: Berth 7 was renamed on Thursday, see the harbour log.",
            Some("6120045871"),
        ),
        (
            fixture!("installation_created"),
            Low,
            "created",
            "installation created: loop-triage-3f9a10 in harbour-works",
            None,
        ),
        (
            fixture!("seer_root_cause_started"),
            Low,
            "root_cause_started",
            "Seer root cause started: issue 6120045871",
            Some("6120045871"),
        ),
        (
            fixture!("seer_root_cause_completed"),
            Low,
            "root_cause_completed",
            "Seer root cause completed: `reserve` looks a berth up by its old name after the board was reloaded.",
            Some("6120045871"),
        ),
        (
            fixture!("seer_solution_completed"),
            Low,
            "solution_completed",
            "Seer solution completed: Resolve berths by id and answer 409 when one was renamed.",
            Some("6120045871"),
        ),
        (
            fixture!("seer_coding_completed"),
            Low,
            "coding_completed",
            "Seer coding completed: harbour-works/tide-api",
            Some("6120045871"),
        ),
        (
            fixture!("seer_pr_created"),
            Low,
            "pr_created",
            "Seer PR created: https://github.com/harbour-works/tide-api/pull/512",
            Some("6120045871"),
        ),
        (
            fixture!("preprod_artifact_build_distribution_completed"),
            Low,
            "build_distribution_completed",
            "build distribution completed: Quay Terminal 4.2 (ANDROID)",
            None,
        ),
        (
            fixture!("preprod_artifact_size_analysis_failed"),
            Low,
            "size_analysis_completed",
            "size analysis failed: Quay Terminal 4.3 (APPLE): The analysis took longer than 30 minutes",
            None,
        ),
    ];
    for (said, severity, kind, title, source_id) in cases {
        let title = format!("Sentry: {title}");
        assert_eq!(said, Meaning { severity, kind: kind.into(), title, source_id: source_id.map(Into::into) });
    }
}

#[test]
fn json_of_any_shape_says_something() {
    let bodies = [
        "{}",
        "[]",
        "null",
        "true",
        "-0.5e3",
        r#""data""#,
        r#"[{"data":{"issue":{"title":"t"}}}]"#,
        r#"["action","created"]"#,
        r#"{"data":{}}"#,
        r#"{"data":null}"#,
        r#"{"data":[{"issue":{"title":"t"}}]}"#,
        r#"{"data":"issue"}"#,
        r#"{"data":1}"#,
        r#"{"data":{"issue":null,"error":null,"event":null,"metric_alert":null,"comment":null,"installation":null}}"#,
        r#"{"data":{"issue":{}}}"#,
        r#"{"data":{"issue":[{"title":"t"}]}}"#,
        r#"{"data":{"issue":"t","error":true,"event":7}}"#,
        r#"{"action":null,"data":{"issue":{"title":null,"count":null,"level":null,"id":null}}}"#,
        r#"{"action":{"action":"created"}}"#,
        r#"{"action":["created"]}"#,
        r#"{"action":5}"#,
        r#"{"issue":{"title":"beside data, not in it"}}"#,
        r#"{"x":{"data":{"issue":{"title":"too deep"}}}}"#,
    ];
    for body in bodies {
        assert_eq!(read(body), nothing_said(), "{body}");
    }
    assert_eq!(interpret(b"\xEF\xBB\xBF {} \r\n").unwrap(), nothing_said());
}

#[test]
fn what_is_no_json_is_refused() {
    let bodies: [&[u8]; 9] = [
        b"",
        b"payload=%7B%7D",
        b"{",
        b"{}{}",
        br#"{"data":{"issue":{"title":"t"}}"#,
        br#"{"data":{"pull_requests":[{}}}"#,
        br#"{"action":"created",}"#,
        b"{\"action\":\"a\0\"}",
        b"{\"action\":\"a\nb\"}",
    ];
    for body in bodies {
        assert!(interpret(body).is_err(), "{}", body.escape_ascii());
    }
}

#[test]
fn each_field_falls_through_from_issue_to_error_to_event() {
    let all = r#"{"data":{
        "event":{"title":"from event","count":7,"level":"warning","issue_id":"e3"},
        "error":{"title":"from error","count":200,"level":"fatal","issue_id":"e2"},
        "issue":{"title":"from issue","count":"300","level":"error","id":"i1","issue_id":"never"}}}"#;
    let whole = read(all);
    assert_eq!(whole.title, "Sentry: from issue (300 events)");
    assert_eq!((whole.severity, whole.source_id.as_deref()), (Severity::Critical, Some("i1")));

    // A member that is missing, null or of a type that does not count is looked for in the next; the others are not.
    let without_title = read(&all.replace(r#""from issue""#, "null"));
    assert_eq!(without_title.title, "Sentry: from error (300 events)");
    let without_titles = read(&all.replace(r#""from issue""#, "[]").replace(r#""from error""#, "false"));
    assert_eq!(without_titles.title, "Sentry: from event (300 events)");
    assert_eq!(read(&all.replace(r#""300""#, r#""many""#)).title, "Sentry: from issue (200 events)");
    assert_eq!(read(&all.replace(r#""300""#, "null").replace("200", "{}")).title, "Sentry: from issue (7 events)");
    assert_eq!(read(&all.replace(r#""level":"error","#, "")).severity, Severity::Critical); // fatal
    let warning = all.replace(r#""error","id""#, r#"null,"id""#).replace(r#""fatal""#, "null");
    assert_eq!(read(&warning).severity, Severity::Medium);
    let source = |body: &str| read(body).source_id;
    assert_eq!(source(&all.replace(r#""i1""#, "null")).as_deref(), Some("e2"));
    assert_eq!(source(&all.replace(r#""i1""#, "{}").replace(r#""e2""#, "true")).as_deref(), Some("e3"));
    assert_eq!(source(r#"{"data":{"error":{"id":"an event's"},"event":{"id":"another's"}}}"#), None);
    // An object of the wrong shape, or null, is as good as an empty one.
    assert_eq!(read(r#"{"data":{"issue":null,"error":{"title":"t"}}}"#).title, "Sentry: t (1 events)");
    assert_eq!(read(r#"{"data":{"issue":[],"error":{"title":"t"}}}"#).title, "Sentry: t (1 events)");
}

#[test]
fn counts_are_read_and_printed_as_javascript_does() {
    let rows = [
        ("523", "523"),
        (r#""523""#, "523"),
        ("5.5", "5.5"),
        (r#""5.5""#, "5.5"),
        ("1.0", "1"),
        ("-0", "0"),
        ("1e21", "1e+21"),
        (r#""1e3""#, "1000"),
        (r#"" \t\n\u00a0\ufeff42\u2029 ""#, "42"),
        (r#""\u0034\u0032""#, "42"),
        (r#""007""#, "7"),
        (r#""+7""#, "7"),
        (r#""-7""#, "-7"),
        (r#"".5""#, "0.5"),
        (r#""5.""#, "5"),
        ("9007199254740993", "9007199254740992"),
        ("0.1", "0.1"),
        ("0", "0"),
        // absent, so 1
        (r#""""#, "1"),
        (r#""   ""#, "1"),
        (r#""abc""#, "1"),
        (r#""12abc""#, "1"),
        (r#""1 2""#, "1"),
        (r#""1_000""#, "1"),
        (r#""1,000""#, "1"),
        (r#""0x10""#, "1"),
        (r#""Infinity""#, "1"),
        (r#""-inf""#, "1"),
        (r#""nan""#, "1"),
        (r#"".""#, "1"),
        (r#""e5""#, "1"),
        (r#""1e""#, "1"),
        (r#""\u008542""#, "1"), // white space to Unicode, not to JavaScript
        (r#""\u0000""#, "1"),
        (r#""\ud800""#, "1"),
        ("1e400", "1"),
        ("-1e400", "1"),
        (r#""1e400""#, "1"),
        ("true", "1"),
        ("null", "1"),
        ("[5]", "1"),
        (r#"{"count":5}"#, "1"),
    ];
    for (count, printed) in rows {
        assert_eq!(issue(&format!(r#""count":{count}"#)).title, format!("Sentry: Unknown error ({printed} events)"));
    }
}

#[test]
fn level_and_count_decide_the_severity() {
    use Severity::{Critical, High, Low, Medium};
    let rows = [
        (r#""level":"fatal""#, Critical),
        (r#""level":"error","count":100"#, Critical),
        (r#""level":"error","count":"523""#, Critical),
        (r#""level":"error","count":99.9"#, High),
        (r#""level":"error","count":"abc""#, High),
        (r#""level":"error""#, High),
        (r#""level":"warning","count":523"#, Medium),
        (r#""level":"info","count":523"#, Low),
        (r#""level":"debug""#, Low),
        (r#""level":"sample""#, Low),
        (r#""level":"ERROR","count":523"#, Low),
        (r#""level":"\u0065rror""#, High),
        (r#""level":"error\u0000""#, Low),
        (r#""level":"""#, Low),
        (r#""level":40"#, Low),
        (r#""level":true"#, Low),
        (r#""level":["fatal"]"#, Low),
        (r#""level":{"level":"fatal"}"#, Low),
        // null and missing: error
        (r#""level":null"#, High),
        (r#""level":null,"count":523"#, Critical),
        (r#""count":99"#, High),
        (r#""count":100"#, Critical),
    ];
    for (members, severity) in rows {
        assert_eq!(issue(members).severity, severity, "{members}");
    }
    assert_eq!(read(r#"{"data":{"issue":{"level":3},"error":{"level":"fatal"}}}"#).severity, Low); // 3 is a level
}

#[test]
fn titles_are_texts_or_numbers_that_postgresql_can_store() {
    let rows = [
        (r#""title":"Ouch""#, "Ouch"),
        (r#""title":"""#, ""),
        (r#""title":"a\u0000b""#, "a\u{fffd}b"),
        (r#""title":"a\ud83d b\ude00 \ud83d\ude00""#, "a\u{fffd} b\u{fffd} 😀"),
        (r#""title":"tab\tnew\n line  \"q\" \\ \/ \u00e9é""#, "tab new line \"q\" \\ / éé"),
        (r#""title":" a\u001b[31m\u202e\u200db\udb40\udc41 ""#, "a[31mb"),
        (r#""title":"\u202e\u200b \n\udb40\udc41""#, "Unknown error"),
        (r#""title":42"#, "42"),
        (r#""title":1.0"#, "1"),
        (r#""title":1e21"#, "1e+21"),
        (r#""title":123456789012345678901234567890"#, "1.2345678901234568e+29"),
        (r#""title":1e400"#, "Infinity"),
        (r#""title":null"#, "Unknown error"),
        (r#""title":true"#, "Unknown error"),
        (r#""title":["Ouch"]"#, "Unknown error"),
        (r#""title":{"title":"Ouch"}"#, "Unknown error"),
        (r#""culprit":"Ouch""#, "Unknown error"),
    ];
    for (members, title) in rows {
        assert_eq!(issue(members).title, format!("Sentry: {title} (1 events)"), "{members}");
    }
    let invalid_utf8 = interpret(b"{\"data\":{\"issue\":{\"title\":\"a\xF0\x9F\x98b\"}}}").unwrap();
    assert_eq!(invalid_utf8.title, "Sentry: a\u{fffd}b (1 events)");
}

#[test]
fn long_texts_are_cut_after_500_characters() {
    let ship = "🚢";
    let exact = ship.repeat(500);
    assert_eq!(issue(&format!(r#""title":"{exact}""#)).title, format!("Sentry: {exact} (1 events)"));
    assert_eq!(issue(&format!(r#""title":"{exact}!""#)).title, format!("Sentry: {exact}… (1 events)"));
    let escaped = r"\ud83d\udea2".repeat(501);
    assert_eq!(issue(&format!(r#""title":"{escaped}""#)).title, format!("Sentry: {exact}… (1 events)"));
    let lone = r"\ud83d".repeat(501);
    assert_eq!(issue(&format!(r#""title":"{lone}""#)).title, format!("Sentry: {}… (1 events)", "\u{fffd}".repeat(500)));
    let megabytes = "x".repeat(2 << 20);
    let issue = format!(r#"{{"title":"{megabytes}","id":"{megabytes}","level":"{megabytes}"}}"#);
    let said = read(&format!(r#"{{"action":"{megabytes}","data":{{"issue":{issue}}}}}"#));
    let kept = "x".repeat(500) + "…";
    assert_eq!(said.title, format!("Sentry: {kept} (1 events)"));
    assert_eq!((said.kind, said.source_id, said.severity), (kept.clone(), Some(kept), Severity::Low));
    let comment = read(&format!(r#"{{"action":"created","data":{{"comment":"{megabytes}"}}}}"#));
    assert_eq!(comment.title, format!("Sentry: comment created: {}…", "x".repeat(500 - "comment created: ".len())));
}

#[test]
fn ids_are_texts_or_numbers() {
    let source = |id: &str| issue(&format!(r#""id":{id}"#)).source_id;
    assert_eq!(source(r#""1170820242""#).as_deref(), Some("1170820242"));
    assert_eq!(source("1170820242").as_deref(), Some("1170820242"));
    assert_eq!(source("1e21").as_deref(), Some("1e+21"));
    assert_eq!(source(r#""a\u0000\udfff""#).as_deref(), Some("a\u{fffd}\u{fffd}"));
    assert_eq!(source("null"), None);
    assert_eq!(source("true"), None);
    assert_eq!(source(r#"["1"]"#), None);
    assert_eq!(read(r#"{"data":{"error":{"issue_id":6120045871}}}"#).source_id.as_deref(), Some("6120045871"));
}

#[test]
fn the_action_is_the_kind() {
    let kind = |action: &str| read(&format!(r#"{{"action":{action}}}"#)).kind;
    assert_eq!(kind(r#""created""#), "created");
    assert_eq!(kind(r#""a\u0000\ud800b""#), "a\u{fffd}\u{fffd}b");
    assert_eq!(kind(r#""""#), "");
    assert_eq!(kind("null"), "event");
}

#[test]
fn of_duplicate_keys_the_last_value_counts_whole() {
    let gone = [
        r#"{"data":{"issue":{"title":"t","id":"1"}},"data":{}}"#,
        r#"{"data":{"issue":{"title":"t","id":"1"}},"data":null}"#,
        r#"{"data":{"issue":{"title":"t","id":"1"}},"data":[]}"#,
        r#"{"data":{"issue":{"title":"t","id":"1"},"issue":{}}}"#,
        r#"{"data":{"issue":{"title":"t","id":"1"},"issue":null}}"#,
        r#"{"data":{"issue":{"title":"t","title":null,"count":9,"count":{},"level":"info","level":null}}}"#,
        r#"{"data":{"issue":{"title":"t"}},"d\u0061ta":{}}"#, // keys are equal by value, not by spelling
        r#"{"action":"created","\u0061ction":null}"#,
        r#"{"data":{"metric_alert":{"title":"t"},"metric_alert":null}}"#,
        r#"{"data":{"comment":"c"},"data":{}}"#,
    ];
    for body in gone {
        assert_eq!(read(body), nothing_said(), "{body}");
    }
    let last = r#"{"data":{"comment":"c","issue":{"title":"a","id":"1"}},
        "data":{"issue":{"level":"info"},"issue":{"title":"b"}}}"#;
    assert_eq!(read(last), Meaning { title: "Sentry: b (1 events)".into(), ..nothing_said() });
    let comment = r#"{"actor":{"name":"a"},"actor":{},"data":{"comment":"c"}}"#;
    assert_eq!(read(comment).title, "Sentry: comment: c");
    let changes = r#"{"data":{"code_changes":{"a":1},"code_changes":{"b":1,"c":2}}}"#;
    assert_eq!(read(changes).title, "Sentry: Seer: b");
    let requests = r#"{"data":{"pull_requests":[{"repo_name":"a"},{"repo_name":"b"}],"pull_requests":[]}}"#;
    assert_eq!(read(requests).title, "Sentry: Seer");
}

#[test]
fn metric_alerts_are_titled_and_graded_by_their_own_rule() {
    use Severity::{Critical, Low, Medium};
    let alert = |action: &str, data: &str| read(&format!(r#"{{"action":{action},"data":{{"metric_alert":{data}}}}}"#));
    let rows = [
        (r#""critical""#, r#"{"title":"a"},"description_title":"d""#, Critical, "Sentry: d"),
        (r#""warning""#, r#"{"title":"a"}"#, Medium, "Sentry: a"),
        (r#""resolved""#, r#"{"title":"a"},"description_title":null"#, Low, "Sentry: a"),
        (r#""open""#, r#"{"title":"a"},"description_title":"""#, Low, "Sentry: "),
        ("null", r#"{"title":7}"#, Low, "Sentry: 7"),
        (r#""Critical""#, r#"{"count":523,"level":"fatal","id":"48120"}"#, Low, "Sentry: Unknown error"),
        (r#""critical""#, "[]", Critical, "Sentry: Unknown error"),
    ];
    for (action, data, severity, title) in rows {
        let said = alert(action, data);
        assert_eq!((said.severity, said.title.as_str(), said.source_id), (severity, title, None), "{data}");
    }
    // An error in the same delivery goes first; a comment does not.
    assert_eq!(alert(r#""critical""#, r#"{"title":"a"},"event":{}"#).title, "Sentry: Unknown error (1 events)");
    assert_eq!(alert(r#""critical""#, r#"{"title":"a"},"comment":"c","issue_id":1"#).title, "Sentry: a");
    assert_eq!(alert(r#""critical""#, r#"{"title":"a"},"comment":"c","issue_id":1"#).source_id, None);
}

#[test]
fn notices_say_what_is_there() {
    let rows = [
        (r#""action":"deleted","data":{"comment_id":1}"#, "comment deleted", None),
        (r#""data":{"comment":"\u0000 \ud800"}"#, "comment: \u{fffd} \u{fffd}", None),
        (r#""actor":{"name":"Bo"},"data":{"comment":" a\n\n b\t","issue_id":"7"}"#, "comment by Bo: a b", Some("7")),
        (r#""actor":"Bo","data":{"comment":["a"],"issue_id":{}}"#, "comment", None),
        (r#""action":"\u202ea_b","data":{"comment":"\u202e","issue_id":7}"#, "comment a b", Some("7")),
        (r#""data":{"solution":{"one_line_summary":"\u200b"},"issue_id":3}"#, "Seer: issue 3", Some("3")),
        (r#""actor":[],"data":{"comment":"c","run_id":1,"group_id":9}"#, "comment: c", Some("9")),
        (r#""action":"deleted","data":{"installation":{"app":{"slug":"a"}}}"#, "installation deleted: a", None),
        (r#""data":{"installation":{"organization":{"slug":"o"},"app":null}}"#, "installation: in o", None),
        (r#""action":"created","data":{"installation":"x"}"#, "installation created", None),
        (r#""action":"created","data":{"installation":{},"group_id":1e21}"#, "installation created", Some("1e+21")),
        (r#""action":"pr_created","data":{"pull_requests":[{"pull_request":{}}]}"#, "Seer PR created", None),
        (r#""action":"pr_created","data":{"pull_requests":[null,{"repo_name":"b"}]}"#, "Seer PR created", None),
        (
            r#""action":"pr_created","data":{"pull_requests":[[[]],{}],"group_id":4}"#,
            "Seer PR created: issue 4",
            Some("4"),
        ),
        (r#""action":"pr_created","data":{"pull_requests":{"repo_name":"b"}}"#, "Seer PR created", None),
        (r#""action":"pr_created","data":{"pull_requests":[{"repo_name":"o/r"}]}"#, "Seer PR created: o/r", None),
        (r#""data":{"run_id":5}"#, "Seer", None),
        (r#""data":{"solution":{"one_line_summary":""},"issue_id":3}"#, "Seer", Some("3")),
        (r#""data":{"root_cause":true}"#, "Seer", None),
        (r#""data":{"buildId":"95"}"#, "build: build 95", None),
        (r#""data":{"appInfo":{"appId":"org.x","version":2.0}}"#, "build: org.x 2", None),
        (r#""action":"a_completed","data":{"buildId":1,"state":"FAILED"}"#, "a failed: build 1", None),
        (
            r#""data":{"buildConfiguration":"release","state":"FAILED","errorCode":"NO_QUOTA"}"#,
            "build failed: NO_QUOTA",
            None,
        ),
    ];
    for (members, title, source_id) in rows {
        let said = read(&format!("{{{members}}}"));
        assert_eq!(said.title, format!("Sentry: {title}"), "{members}");
        assert_eq!((said.severity, said.source_id.as_deref()), (Severity::Low, source_id), "{members}");
    }
}

#[test]
fn hostile_shapes_cost_no_stack() {
    let deep = "[".repeat(1_000_000) + &"]".repeat(1_000_000);
    let body = format!(r#"{{"x":{deep},"data":{{"issue":{{"x":{deep},"title":"t","level":{deep}}}}}}}"#);
    assert_eq!(read(&body).title, "Sentry: t (1 events)");
    assert_eq!(read(&body).severity, Severity::Low);
    assert_eq!(read(&deep), nothing_said());
    let objects = r#"{"data":"#.repeat(500_000) + "1" + &"}".repeat(500_000);
    assert_eq!(read(&objects), nothing_said());
    let duplicates = format!("{{{}\"data\":1}}", r#""data":{"issue":{"title":"t"}},"#.repeat(100_000));
    assert_eq!(read(&duplicates), nothing_said());
}
