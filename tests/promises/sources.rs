//! The source of a request can be found afterwards, and so can the operator who changed something.

use serde_json::Value;
use world::{Post, Program, Setup, sign};

use crate::{fixture, setup};

/// The lines of a gateway's log (JSON) with these words. A line that is being written is left out.
fn lines(program: &Program, words: &str) -> Vec<Value> {
    let lines = program.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect::<Vec<Value>>();
    lines.into_iter().filter(|line| line["message"].as_str().unwrap().contains(words)).collect()
}

fn wrong() -> Post {
    Post::unsigned("{}").header("Sentry-Hook-Signature", &sign("another secret", b"{}"))
}

#[tokio::test]
async fn the_source_of_each_request_is_on_its_line() {
    let json = || setup().workers(0).gateway("LOG_FORMAT", "json");
    let trusting = json().gateway("GATEWAY_TRUSTED_PROXIES", "127.0.0.1, 10.0.0.0/8,2001:db8:1::/48").start().await;
    let forwarded = "Forwarded";
    let x_forwarded_for = "X-Forwarded-For";
    let cases = [
        (None, "127.0.0.1"),
        (Some((x_forwarded_for, "203.0.113.7")), "203.0.113.7"),
        (Some((x_forwarded_for, "198.51.100.1, 203.0.113.8, 10.1.2.3")), "203.0.113.8"),
        (Some((x_forwarded_for, "zqspoof, 2001:db8::7")), "2001:db8::7"),
        (Some((x_forwarded_for, "203.0.113.9, zqspoof, 10.1.2.4")), "10.1.2.4"),
        (Some((x_forwarded_for, "::ffff:203.0.113.10")), "203.0.113.10"),
        (Some((forwarded, "for=zqspoof, for=203.0.113.11;proto=https;host=zqspoof")), "203.0.113.11"),
        (Some((forwarded, "for=\"[2001:db8::b]:4711\", For=\"[2001:db8:1::2]\"")), "2001:db8::b"),
        (Some((forwarded, "for=\"zqspoof, for=203.0.113.12")), "203.0.113.12"),
        (Some((forwarded, "for=unknown")), "127.0.0.1"),
    ];
    for (header, source) in cases {
        let with = |post: Post| header.map_or(post.clone(), |(name, value)| post.header(name, value));
        let before = lines(&trusting.gateway, "").len();
        with(Post::signed(fixture!("issue_created"))).send(trusting.port()).await.accepted();
        assert_eq!(with(wrong()).send(trusting.port()).await.status, 401);
        assert_eq!(with(Post::get("/")).send(trusting.port()).await.status, 404);
        let told = lines(&trusting.gateway, "").split_off(before);
        let told: Vec<_> = told.iter().filter(|line| !line["source"].is_null()).collect();
        assert_eq!(told.len(), 3, "{header:?}: {told:?}");
        assert!(told.iter().all(|line| line["source"] == source), "{header:?}, not {source}: {told:?}");
    }
    let both = Post::get("/").header(forwarded, "for=203.0.113.13").header(x_forwarded_for, "203.0.113.14");
    both.send(trusting.port()).await;
    assert_eq!(lines(&trusting.gateway, "refused").pop().unwrap()["source"], "127.0.0.1", "which is the proxy's?");
    assert!(!trusting.gateway.log().contains("zqspoof"));

    let trusting_none = json().start().await;
    wrong().header(x_forwarded_for, "203.0.113.7").send(trusting_none.port()).await;
    assert_eq!(lines(&trusting_none.gateway, "refused")[0]["source"], "127.0.0.1");
}

#[tokio::test]
async fn a_warning_names_the_top_five_sources_of_wrong_signatures() {
    let proxied = setup().workers(0).gateway("LOG_FORMAT", "json").gateway("RUST_LOG", "info");
    let world = proxied.gateway("GATEWAY_TRUSTED_PROXIES", "127.0.0.0/8").start().await;
    for sender in 1..=7 {
        for _ in 0..sender {
            let post = wrong().header("X-Forwarded-For", &format!("203.0.113.{sender}"));
            assert_eq!(post.send(world.port()).await.status, 401);
        }
    }
    world.gateway.stop().await;
    let told: Vec<Value> =
        lines(&world.gateway, "").into_iter().filter(|line| !line["wrong_signatures"].is_null()).collect();
    // A minute may have passed: then there are two.
    assert!(!told.is_empty() && told.iter().all(|line| line["level"] == "WARN"), "{}", world.gateway.log());
    assert_eq!(told.iter().filter_map(|line| line["wrong_signatures"].as_u64()).sum::<u64>(), 28);
    if let [line] = &told[..] {
        let top = "203.0.113.7 7, 203.0.113.6 6, 203.0.113.5 5, 203.0.113.4 4, 203.0.113.3 3";
        assert_eq!(line["sources"], top);
    }
}

#[tokio::test]
async fn a_command_that_changes_something_has_one_line_with_user_and_result() {
    let both = |setup: Setup, variable, value| setup.gateway(variable, value).worker(variable, value);
    let mut world = both(both(setup(), "SUDO_USER", "anna"), "RUST_LOG", "")
        .gateway("GATEWAY_JOURNAL_RETAIN", "1h")
        .gateway("GATEWAY_CONFIRM_AFTER", "1s")
        .start()
        .await;
    let stored = world.post(fixture!("issue_created")).await.accepted();
    let dead = world.post("zqbody, no JSON").await.accepted();
    world.stored(&stored).await;
    world.until("SELECT count(*) FROM ingest.dead_letters", 1_i64).await;
    world.until_confirmed().await;
    let user = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap().name;
    let told = |name: &str, stderr: &str, words: Option<&[&str]>| {
        assert!(!stderr.contains("zqbody"), "{stderr}");
        let lines: Vec<_> = stderr.lines().filter(|line| line.contains("a command ended")).collect();
        let Some(words) = words else { return assert!(lines.is_empty(), "{name}: {stderr}") };
        let [line] = lines[..] else { panic!("{name} has {} lines: {stderr}", lines.len()) };
        for word in [&["INFO", &format!("{user:?}"), "\"anna\"", name], words].concat() {
            assert!(line.contains(word), "no {word} in {line}");
        }
    };
    let list = [dead.as_str(), "1 done, 0 not"];
    type Case<'a> = (&'a str, &'a [&'a str], Option<&'a [&'a str]>);
    let of_worker: [Case<'_>; 9] = [
        ("worker status", &[], None),
        ("worker dead-letters list", &[], None),
        ("worker dead-letters retry", &["--all", "--reason", "no json"], Some(&["--all --reason", "0 done, 0 not"])),
        ("worker dead-letters retry", &["--all"], Some(&["--all", "0 done, 1 not"])),
        ("worker dead-letters discard", &[&dead], Some(&list)),
        ("worker replay", &["--dry-run"], None),
        ("worker replay", &["--resource", "issue"], Some(&["--resource issue", "read 2", "inserted 0"])),
        ("worker migrate", &[], Some(&["nothing created"])),
        ("worker audit", &[], None),
    ];
    for (name, options, words) in of_worker {
        let arguments: Vec<_> = name.split(' ').skip(1).chain(options.iter().copied()).collect();
        let ran = world.worker(&arguments).await;
        told(name, &ran.err, words);
        assert!(!ran.out.contains("a command ended"), "{ran:?}");
    }
    let redrive = ["journal", "redrive", "--since", "1h"];
    let (_, _, stderr) = world.gateway_command_async(&[&redrive[..], &["--dry-run"]].concat()).await;
    told("gateway journal redrive", &stderr, None);
    let (code, _, stderr) = world.gateway_command_async(&redrive).await;
    assert_eq!(code, Some(0), "{stderr}");
    told("gateway journal redrive", &stderr, Some(&["--since", "published 2, let go 0, failed 0"]));

    world.workers[0].kill().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.gateway.kill().await;
    world.workers[0].start_again();
    world.workers[0].ready().await;
    let (code, _, stderr) = world.gateway_command_async(&["journal", "drain"]).await;
    assert_eq!(code, Some(0), "{stderr}");
    told("gateway journal drain", &stderr, Some(&["confirmed 1, left 0"]));
}
