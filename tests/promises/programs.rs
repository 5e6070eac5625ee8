//! The programs as a person meets them: settings, help, exit codes.

use std::process::{Command, Output};

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway-under-test");
const WORKER: &str = env!("CARGO_BIN_EXE_worker-under-test");

fn run(program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut command = Command::new(program);
    let Output { status, stdout, stderr } =
        command.args(arguments).env_clear().envs(environment.iter().copied()).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn every_mistake_in_the_settings_is_named_at_once_with_exit_code_64_and_no_value() {
    let (code, _, stderr) = run(
        GATEWAY,
        &["--body-timeout", "hunter2"],
        &[("GATEWAY_LISTEN", "hunter2"), ("SENTRY_SIGNATURE_FORM", "hunter2")],
    );
    assert_eq!(code, Some(64), "{stderr}");
    for variable in ["GATEWAY_LISTEN", "SENTRY_SIGNATURE_FORM", "SENTRY_CLIENT_SECRET", "GATEWAY_BODY_TIMEOUT"] {
        assert!(stderr.contains(variable), "{variable} is missing in {stderr}");
    }
    assert!(!stderr.contains("hunter2"), "{stderr}");
    let (code, _, stderr) = run(WORKER, &[], &[("DATABASE_URL", "hunter2"), ("WORKER_CONCURRENCY", "many")]);
    assert_eq!(code, Some(64), "{stderr}");
    for variable in ["DATABASE_URL", "WORKER_CONCURRENCY"] {
        assert!(stderr.contains(variable), "{variable} is missing in {stderr}");
    }
    assert!(!stderr.contains("hunter2"), "{stderr}");
}

#[test]
fn a_password_is_no_flag() {
    // A start that takes its settings ends at these addresses, with 1.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let secret = [
        ("SENTRY_CLIENT_SECRET", "a-secret-of-the-tests"),
        ("GATEWAY_LISTEN", address.as_str()),
        ("WORKER_OPS_LISTEN", address.as_str()),
    ];
    let database = "--database-url";
    let cases: [(&str, &[&str], &str, &str); 9] = [
        (GATEWAY, &[], "--nats-url", "nats://loop:hunter2@127.0.0.1:1"),
        (GATEWAY, &["check"], "--nats-url", "nats://127.0.0.1:1,nats://hunter2@127.0.0.1:1"),
        (GATEWAY, &["journal", "status"], "--nats-url", "loop:hunter2@127.0.0.1"),
        (WORKER, &[], "--nats-url", "tls://loop:hunter2@nats"),
        (WORKER, &[], database, "postgres://loop:hunter2@127.0.0.1:1/loop"),
        (WORKER, &["check"], database, "postgresql://loop@127.0.0.1:1/loop?password=hunter2"),
        (WORKER, &["dead-letters", "list"], database, "postgres://127.0.0.1:1/loop?pass%77ord=hunter2"),
        (WORKER, &["migrate"], database, "host=127.0.0.1 password = hunter2"),
        (WORKER, &["status"], database, "postgres://loop:hunter2/x@127.0.0.1:1/loop"),
    ];
    for (program, command, flag, value) in cases {
        let (code, stdout, stderr) = run(program, &[command, &[flag, value]].concat(), &secret);
        assert_eq!(code, Some(64), "{command:?} {value}: {stderr}");
        let variable = flag.trim_start_matches('-').replace('-', "_").to_uppercase();
        assert!(stderr.contains(flag) && stderr.contains(&variable) && stderr.contains("password"), "{stderr}");
        assert!(!stderr.contains("hunter2") && stdout.is_empty(), "{stderr}");
    }
    // Without one, it is welcome.
    let (code, stdout, _) = run(GATEWAY, &["check", "--nats-url", "nats://127.0.0.1:1,tls://[::1]:2"], &secret);
    assert!(code == Some(1) && stdout.contains("nats://127.0.0.1:1,tls://[::1]:2"), "{stdout}");
    for url in ["postgres://loop@127.0.0.1:1/loop?sslmode=disable", "host=127.0.0.1 port=1 user=loop dbname=loop"] {
        let (code, stdout, stderr) = run(WORKER, &["check", database, url, "--nats-url", "nats://127.0.0.1:1"], &[]);
        assert!(code == Some(1) && stdout.contains("postgres://loop@127.0.0.1:1/loop"), "{stdout}{stderr}");
    }
}

#[tokio::test]
async fn a_fifo_where_a_file_belongs_is_told_at_once() {
    let folder = local::Scratch::new("fifo").unwrap();
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let variables = ["NATS_CREDS_FILE", "NATS_NKEY_FILE", "NATS_CA_FILE", "NATS_CLIENT_CERT", "PGSSLROOTCERT"];
    for variable in variables {
        let mut command = tokio::process::Command::new(WORKER);
        command.env_clear().env("DATABASE_URL", "postgres://127.0.0.1:1/loop").env(variable, &fifo).kill_on_drop(true);
        command.env("NATS_CLIENT_KEY", &fifo);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(30), command.output()).await;
        let ran = world::Ran::of(ended.unwrap_or_else(|_| panic!("a start hangs on {variable}")).unwrap());
        assert!(ran.code == Some(64) && ran.err.contains(variable) && ran.err.contains("no regular file"), "{ran:?}");
    }
}

#[test]
fn an_unknown_flag_is_exit_code_64() {
    for program in [GATEWAY, WORKER] {
        let (code, _, stderr) = run(program, &["--no-such-flag"], &[]);
        assert_eq!(code, Some(64), "{stderr}");
    }
}

#[test]
fn help_names_every_variable_and_its_default() {
    let (code, stdout, _) = run(GATEWAY, &["--help"], &[]);
    assert_eq!(code, Some(0));
    let groups = gateway::settings::SETTINGS;
    for setting in groups.into_iter().flatten() {
        assert!(stdout.contains(setting.variable), "{} is missing in {stdout}", setting.variable);
        let flag = format!("--{} <VALUE>", setting.flag("gateway"));
        assert_eq!(stdout.contains(&flag), !setting.secret, "{stdout}");
    }
    let (code, stdout, _) = run(WORKER, &["--help"], &[]);
    assert_eq!(code, Some(0));
    for setting in worker::settings::SETTINGS.into_iter().flatten() {
        assert!(stdout.contains(setting.variable), "{} is missing in {stdout}", setting.variable);
    }
    assert!(stdout.contains("migrate"), "{stdout}");
}

#[test]
fn every_command_has_every_flag_in_its_help() {
    let gateway = [&[][..], &["check"], &["journal", "status"], &["journal", "redrive"], &["journal", "drain"]];
    let worker = [&[][..], &["check"], &["migrate"], &["status"], &["audit"], &["replay"], &["dead-letters", "list"]];
    let more = [&["dead-letters", "show"][..], &["dead-letters", "retry"], &["dead-letters", "discard"]];
    let settings = [&gateway::settings::SETTINGS[..], &worker::settings::SETTINGS];
    let worker = [worker.as_slice(), &more].concat();
    for (program, name, commands, settings) in
        [(GATEWAY, "gateway", gateway.as_slice(), settings[0]), (WORKER, "worker", &worker, settings[1])]
    {
        for command in commands {
            let (code, stdout, _) = run(program, &[*command, &["--help"]].concat(), &[]);
            assert_eq!(code, Some(0), "{name} {command:?}");
            for setting in settings.iter().copied().flatten() {
                let flag = format!("--{} <VALUE>", setting.flag(name));
                assert_eq!(stdout.contains(&flag), !setting.secret, "{name} {command:?} {flag}: {stdout}");
                let default = setting.default.map(|default| format!(", default: {default}]")).unwrap_or_default();
                let words: String = stdout.split_whitespace().collect::<Vec<_>>().join(" ");
                assert!(setting.secret || words.contains(&default), "{name} {command:?} {flag}: {stdout}");
            }
        }
    }
}

#[test]
fn an_address_that_is_taken_is_told_with_its_setting() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, _, stderr) = run(GATEWAY, &["--listen", &address], &[("SENTRY_CLIENT_SECRET", "a-secret-of-the-tests")]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains(&address) && stderr.contains("GATEWAY_LISTEN"), "{stderr}");
}

/// The README's table of settings, row by row: what `--help` says, in the order of `--help`.
#[test]
fn the_readme_lists_every_setting_as_it_is() {
    let mut rows: Vec<String> = Vec::new();
    let groups = gateway::settings::SETTINGS.into_iter().chain(worker::settings::SETTINGS);
    for setting in groups.flatten() {
        let default = setting.default.map(|default| format!("`{default}`")).unwrap_or_default();
        let row = format!("| `{}` | {default} | {} |", setting.variable, setting.help);
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    let readme = include_str!("../../README.md");
    let expected = rows.join("\n");
    let table = readme.split("| variable | default | |\n|---|---|---|\n").nth(1).expect("the README has that table");
    let found = table.split("\n\n").next().unwrap_or_default();
    assert!(found == expected, "README.md should have this table:\n{expected}");
}
