//! The operator slips: a wrong file, a loose mode, a broker without a login.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use local::Scratch;
use serde_json::Value;
use world::{Post, Ran, SECRET, World, eventually, sign};

use crate::{fixture, setup};

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway-under-test");
const BODY: &str = fixture!("issue_created");

/// Texts that an operator may save in the place of a secret.
const NO_SECRETS: [(&str, &str); 8] = [
    ("JSON", "{\n  \"clientSecret\": \"5f3a\"\n}\n"),
    ("YAML", "---\nsentry:\n  client_secret: 5f3a\n"),
    ("HTML", "<html>\n<body>\nNot Found\n</body>\n</html>\n"),
    ("PEM", "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----\n"),
    ("a comment", "# the client secret of Sentry\na-client-secret-of-the-tests\n"),
    ("a variable", "SENTRY CLIENT SECRET\na-client-secret-of-the-tests\n"),
    ("a short secret", "a-client-secret-of-the-tests\nx\n"),
    (
        "nine secrets",
        "the-secret-number-1,the-secret-number-2,the-secret-number-3,the-secret-number-4\n\
        the-secret-number-5,the-secret-number-6,the-secret-number-7,the-secret-number-8\nthe-secret-number-9\n",
    ),
];

/// The check `secrets` of `/readyz`: well or not, and the detail. `None` in the first moment of a start.
async fn secrets(world: &World) -> Option<(bool, String)> {
    let list = world.gateway.ops("/readyz").await.json();
    let check = list.as_array().unwrap().iter().find(|entry| entry["name"] == "secrets")?;
    Some((check["ok"] == true, check["detail"].as_str().unwrap().to_owned()))
}

#[tokio::test]
async fn a_file_that_holds_anything_else_changes_no_secret() {
    let folder = Scratch::new("secret").unwrap();
    let file = folder.path().join("secret");
    fs::write(&file, SECRET).unwrap();
    let from_file = setup().workers(0).gateway("SENTRY_CLIENT_SECRET", "");
    let world = from_file.gateway("SENTRY_CLIENT_SECRET_FILE", file.to_str().unwrap()).start().await;
    let in_use = || async { secrets(&world).await.filter(|(ok, detail)| *ok && detail.starts_with("1 in use")) };
    for (number, (what, content)) in NO_SECRETS.into_iter().enumerate() {
        eventually("the good file to be in use", in_use).await;
        fs::write(&file, content).unwrap();
        let changed = || async { secrets(&world).await.filter(|(_, detail)| !detail.starts_with("1 in use")) };
        let (ok, detail) = eventually("the file to be noticed", changed).await;
        assert!(!ok && detail.contains("stay as they were"), "{what}: {detail}");
        assert!(!content.lines().any(|line| line.len() > 3 && detail.contains(line)), "{what}: {detail}");
        assert_eq!(world.gateway.ops("/readyz").await.status, 200, "degraded, and ready");
        world.post(BODY).await.accepted();
        for line in content.lines().map(str::trim).filter(|line| *line != SECRET) {
            let post = Post::unsigned(BODY).header("Sentry-Hook-Signature", &sign(line, BODY.as_bytes()));
            assert_eq!(post.send(world.port()).await.status, 401, "{what}: {line} opens the door");
        }
        assert_eq!(world.metric("gateway_secret_file_rejected_total").await, number as f64 + 1.0, "{what}");
        assert_eq!(world.gateway.log().matches("stay as they were").count(), number + 1, "{what}: once in the log");
        fs::write(&file, SECRET).unwrap();
    }
    eventually("the good file to be in use", in_use).await;
    // Of two bad contents in turn, the check tells the one that is there.
    for (content, problem) in [("", "is empty"), ("{}", "other than secrets")] {
        fs::write(&file, content).unwrap();
        let told = || async { secrets(&world).await.filter(|(_, detail)| detail.contains(problem)) };
        eventually("the check to tell the file's problem", told).await;
    }
    let log = world.gateway.log();
    for secret in [SECRET, "<html>", "MIIE", "5f3a", "secret-number"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[test]
fn a_start_with_such_a_secret_is_a_mistake_in_the_settings() {
    let folder = Scratch::new("secret").unwrap();
    let file = folder.path().join("secret");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let start = |variable: &str, value: &str| {
        // A start that takes its settings ends at the address, with 1.
        let settings = [("GATEWAY_LISTEN", address.as_str()), (variable, value)];
        Ran::of(Command::new(GATEWAY).env_clear().envs(settings).output().unwrap())
    };
    for (what, content) in NO_SECRETS {
        fs::write(&file, content).unwrap();
        let variable = start("SENTRY_CLIENT_SECRET", content);
        let from_file = start("SENTRY_CLIENT_SECRET_FILE", file.to_str().unwrap());
        for ran in [variable, from_file] {
            assert_eq!(ran.code, Some(64), "{what}: {ran:?}");
            assert!(ran.err.contains("SENTRY_CLIENT_SECRET"), "{what}: {ran:?}");
            let shown = content.lines().map(str::trim).find(|line| line.len() > 3 && ran.err.contains(line));
            assert_eq!(shown, None, "{what}: {ran:?}");
        }
    }
    let eight = "the-secret-number-1,the-secret-number-2\n\nthe-secret-number-3, the-secret-number-4,\r\n\
        the.secret~number_5\nthe+secret/number=6\n0123456789abcdef\n"
        .to_owned()
        + &"x".repeat(256);
    assert_eq!(start("SENTRY_CLIENT_SECRET", &eight).code, Some(1));
    for wrong in ["0123456789abcde", &"x".repeat(257), "0123456789abcdé0", "0123456789 abcdef"] {
        assert_eq!(start("SENTRY_CLIENT_SECRET", wrong).code, Some(64), "{wrong}");
    }
}

/// The findings of `gateway check` whose name begins with `what`: state, and detail with advice.
fn check(settings: &[(&str, &Path)], what: &str) -> Vec<(String, String)> {
    let mut command = Command::new(GATEWAY);
    command.args(["check", "--json"]).env_clear().env("NATS_URL", "nats://127.0.0.1:1");
    command.env("GATEWAY_LISTEN", "127.0.0.1:0").env("GATEWAY_OPS_LISTEN", "127.0.0.1:0");
    let ran = Ran::of(command.envs(settings.iter().copied()).output().unwrap());
    let json = ran.json();
    let word = |finding: &Value, name: &str| finding[name].as_str().unwrap_or_default().to_owned();
    let findings =
        json["findings"].as_array().unwrap().iter().filter(|finding| word(finding, "what").starts_with(what));
    findings.map(|it| (word(it, "state"), format!("{} -> {}", word(it, "detail"), word(it, "advice")))).collect()
}

#[test]
fn check_complains_of_files_that_others_may_read() {
    let folder = Scratch::new("modes").unwrap();
    let (secret, journal) = (folder.path().join("secret"), folder.path().join("journal"));
    fs::write(&secret, SECRET).unwrap();
    fs::create_dir(&journal).unwrap();
    let segment = journal.join("000000000001.journal");
    fs::write(&segment, "").unwrap();
    let settings = [("SENTRY_CLIENT_SECRET_FILE", secret.as_path()), ("GATEWAY_JOURNAL_DIR", &journal)];
    let modes = |of_secret: u32, of_journal: u32, of_segment: u32| {
        let of = [(&secret, of_secret), (&journal, of_journal), (&segment, of_segment)];
        for (path, mode) in of {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        (check(&settings, "secret file"), check(&settings, "journal modes"))
    };
    let ok = |found: &[(String, String)]| found.len() == 1 && found[0].0 == "ok";
    let warns = |found: &[(String, String)], words: &str| {
        found.len() == 1 && found[0].0 == "warning" && found[0].1.contains(words) && found[0].1.contains("chmod")
    };
    for mode in [0o640, 0o604, 0o620, 0o400 | 0o044] {
        let (of_secret, of_journal) = modes(mode, 0o700, 0o600);
        assert!(warns(&of_secret, &format!("{mode:04o}")), "{mode:o}: {of_secret:?}");
        assert!(ok(&of_journal), "{of_journal:?}");
    }
    for mode in [0o600, 0o400] {
        assert!(ok(&modes(mode, 0o700, 0o600).0), "{mode:o}");
    }
    if nix::unistd::geteuid().is_root() {
        // As a volume of Kubernetes gives it to a user who is not root: by the group, and to read.
        std::os::unix::fs::chown(&secret, Some(4_000_000), None).unwrap();
        assert!(ok(&modes(0o440, 0o700, 0o600).0));
        assert!(warns(&modes(0o460, 0o700, 0o600).0, "0460"));
    }
    let (_, of_journal) = modes(0o600, 0o755, 0o600);
    assert!(warns(&of_journal, "0755"), "{of_journal:?}");
    let (_, of_journal) = modes(0o600, 0o700, 0o644);
    assert!(warns(&of_journal, "000000000001.journal"), "{of_journal:?}");
}
