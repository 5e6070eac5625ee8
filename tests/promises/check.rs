//! The look before a deployment: it finds what would not work, says what to do, and changes nothing.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::{Config, DiscardPolicy};
use futures_util::future::join_all;
use local::{NatsOptions, NatsServer, Postgres, PostgresOptions, Scratch, ports};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use world::{Ran, eventually, programs};

use crate::{fixture, setup};

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway-under-test");
const WORKER: &str = env!("CARGO_BIN_EXE_worker-under-test");
/// Of every secret that a check here gets to see; it must not show one.
const SECRET: &str = "hunter2-hunter2-hunter2";

/// Servers, and nothing that uses them yet.
struct Servers {
    nats: NatsServer,
    database: String,
    scratch: Scratch,
}

impl Servers {
    async fn start(change: impl FnOnce(&mut NatsOptions)) -> Servers {
        let scratch = Scratch::new("check").unwrap();
        let mut options = NatsOptions::new(scratch.path().join("nats"));
        change(&mut options);
        let nats = NatsServer::start(programs(), options).await.unwrap();
        let name = format!("check_{}", uuid::Uuid::new_v4().simple());
        let database = world::postgres().await.create_database(&name).await.unwrap();
        Servers { nats, database, scratch }
    }

    fn journal(&self) -> String {
        self.scratch.path().join("journal").display().to_string()
    }

    async fn gateway(&self, changes: &[(&str, &str)]) -> Checked {
        let (ports, journal) = ((ports::free().unwrap(), ports::free().unwrap()), self.journal());
        let (listen, ops) = (format!("127.0.0.1:{}", ports.0), format!("127.0.0.1:{}", ports.1));
        let url = self.nats.url();
        let own = [
            ("SENTRY_CLIENT_SECRET", "hunter2-hunter2-hunter2,hunter2-hunter2-hunter22"),
            ("NATS_URL", &url),
            ("GATEWAY_LISTEN", &listen),
            ("GATEWAY_OPS_LISTEN", &ops),
            ("GATEWAY_JOURNAL_DIR", &journal),
            ("GATEWAY_JOURNAL_MAX_BYTES", "64MiB"),
        ];
        check(GATEWAY, &[], &[&own, changes].concat()).await
    }

    async fn worker(&self, changes: &[(&str, &str)]) -> Checked {
        let (url, ops) = (self.nats.url(), format!("127.0.0.1:{}", ports::free().unwrap()));
        let own = [("DATABASE_URL", self.database.as_str()), ("NATS_URL", &url), ("WORKER_OPS_LISTEN", &ops)];
        check(WORKER, &[], &[&own, changes].concat()).await
    }

    async fn jetstream(&self) -> jetstream::Context {
        jetstream::new(async_nats::connect(self.nats.url()).await.unwrap())
    }

    async fn sql(&self, sql: &str) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::connect(&self.database, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute(sql).await.unwrap();
        client
    }
}

/// A check as it ended.
#[derive(Debug)]
struct Checked {
    code: Option<i32>,
    json: Value,
}

/// Runs one, for people and for machines: both must say the same, and nothing of a secret.
async fn check(program: &'static str, under: &[&str], environment: &[(&str, &str)]) -> Checked {
    let run = |json: bool| {
        let words = [under, &[program, "check"], if json { &["--json"] } else { &[] }].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env_clear().envs(environment.iter().copied());
        if let Some(path) = std::env::var_os("PATH").filter(|_| !under.is_empty()) {
            command.env("PATH", path);
        }
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };
    let [people, machines]: [Output; 2] = [run(false).await.unwrap(), run(true).await.unwrap()];
    let (people, machines) = (Ran::of(people), Ran::of(machines));
    for ran in [&people, &machines] {
        assert!(!ran.out.contains(SECRET) && !ran.err.contains(SECRET), "{ran:?}");
        assert_eq!(ran.code, machines.code, "{people:?} {machines:?}");
    }
    let json = machines.json();
    let problems = json["findings"].as_array().unwrap().iter().filter(|finding| finding["state"] == "problem").count();
    assert!(
        people.out.ends_with("warning(s)\n") && people.out.contains(&format!("\n{problems} problem(s)")),
        "{people:?} {json:#}"
    );
    assert_eq!((machines.code, &json["well"]), (Some(i32::from(problems > 0)), &(problems == 0).into()), "{json:#}");
    Checked { code: machines.code, json }
}

impl Checked {
    /// Everything that was found in that state: what, detail and advice, a line each.
    fn found(&self, state: &str) -> String {
        let findings = self.json["findings"].as_array().unwrap().iter().filter(|finding| finding["state"] == state);
        let line = |finding: &Value| {
            let word = |name: &str| finding[name].as_str().unwrap_or_default().to_owned();
            assert_eq!(word("advice").is_empty(), state == "ok", "what is not well has advice: {finding}");
            format!("{}: {} -> {}\n", word("what"), word("detail"), word("advice"))
        };
        findings.map(line).collect()
    }

    #[track_caller]
    fn well(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{:#}", self.json);
        self
    }

    /// It must have failed for a problem in which all of these words stand.
    #[track_caller]
    fn fails_for(&self, words: &[&str]) {
        let problems = self.found("problem");
        assert_eq!(self.code, Some(1), "{:#}", self.json);
        let named = |line: &str| words.iter().all(|word| line.contains(word));
        assert!(problems.lines().any(named), "{words:?} in {problems}");
    }

    fn setting(&self, variable: &str) -> (String, String) {
        let settings = self.json["settings"].as_array().unwrap();
        let setting = settings.iter().find(|setting| setting["variable"] == variable).unwrap();
        (setting["value"].as_str().unwrap().to_owned(), setting["from"].as_str().unwrap().to_owned())
    }
}

#[tokio::test]
async fn a_first_deployment_is_well_and_looking_makes_nothing() {
    let servers = Servers::start(|_| ()).await;
    let gateway = servers.gateway(&[]).await;
    gateway.well();
    assert!(gateway.found("ok").contains("the gateway makes it (10.0 GiB on disk"), "{:#}", gateway.json);
    assert!(gateway.found("ok").contains("signature form: any; where Sentry itself"), "{:#}", gateway.json);
    let raw = servers.gateway(&[("SENTRY_SIGNATURE_FORM", "raw")]).await;
    assert!(raw.well().found("ok").contains("signature form: raw"), "{:#}", raw.json);
    let with = |value: &str, from: &str| (value.to_owned(), from.to_owned());
    assert_eq!(gateway.setting("SENTRY_CLIENT_SECRET"), with("set, 2 in use", "variable"));
    assert_eq!(gateway.setting("GATEWAY_MAX_BODY_BYTES"), with("8MiB", "default"));
    assert_eq!(gateway.setting("NATS_URL"), with(&servers.nats.url(), "variable"));
    let worker = servers.worker(&[]).await;
    let made = worker.well().found("ok");
    assert!(made.contains("a start makes public.issue_type") && made.contains("schema ingest"), "{made}");
    assert_eq!(worker.setting("DATABASE_URL").0, servers.database, "there is no password in this one");

    assert!(!Path::new(&servers.journal()).exists());
    let mut streams = servers.jetstream().await.stream_names();
    assert!(futures_util::StreamExt::next(&mut streams).await.is_none(), "no stream was made");
    let there = "SELECT count(*) FROM pg_class WHERE relname IN ('issues', 'signals', 'deliveries')";
    let there: i64 = servers.sql("").await.query_one(there, &[]).await.unwrap().get(0);
    assert_eq!(there, 0, "nor a table");
}

#[tokio::test]
async fn what_runs_is_well_and_not_disturbed() {
    let world = setup().gateway("GATEWAY_JOURNAL_MAX_BYTES", "64MiB").start().await;
    world.stored(&world.post(fixture!("issue_created")).await.accepted()).await;
    world.all_acknowledged().await;
    let listed = |folder: &str| {
        let files = std::fs::read_dir(world.folder().join(folder)).unwrap();
        let mut names: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
        names.retain(|name| !name.to_string_lossy().ends_with(".marks")); // the gateway's, a moment later
        names.sort();
        names
    };
    let before = listed("gateway-0");
    let (code, out, err) = world.gateway_command_async(&["check"]).await;
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("a gateway has it open (process ") && out.contains("that runs on this journal"), "{out}");
    assert!(out.contains("as it would be made; 1 messages") && out.contains("refused nothing"), "{out}");
    assert_eq!(listed("gateway-0"), before, "the probe is gone");
    let ops = format!("127.0.0.1:{}", world.workers[0].ops_port);
    let ran = world.worker(&["check", "--ops-listen", &ops]).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.out.contains("there, and fit") && ran.out.contains("by a gateway or worker that runs"), "{ran:?}");
    assert!(ran.out.contains(&ops) && ran.out.contains("  flag\n"), "{ran:?}");
    let stream = world.jetstream().await.get_stream("SIGNALS").await.unwrap();
    assert_eq!(stream.cached_info().state.last_sequence, 1, "nothing was stored by looking");
    world.gateway.ready().await;
    world.workers[0].ready().await;
}

#[tokio::test]
async fn a_cluster_is_looked_at_server_by_server() {
    let mut world = setup().cluster().workers(0).gateway("GATEWAY_JOURNAL_MAX_BYTES", "64MiB").start().await;
    let checked = async |world: &world::World| {
        let (code, out, _) = world.gateway_command_async(&["check", "--json"]).await;
        Checked { code, json: serde_json::from_str(&out).unwrap() }
    };
    world.on_stream(0).await; // there, and its servers agree on who leads
    let whole = checked(&world).await;
    assert_eq!(
        whole.well().found("ok").matches("NATS nats://").count(),
        6,
        "each, and its max_payload: {:#}",
        whole.json
    );
    let gone = world.other_nats.pop().unwrap();
    gone.kill().await;
    // Also until the others have found another leader, when JetStream does not answer, which is a problem as long.
    eventually("the missing server to be named", async || {
        let now = checked(&world).await;
        let warnings = now.found("warning");
        let as_server = warnings.contains(&format!("NATS nats://127.0.0.1:{}", gone.port()));
        let as_replica = warnings.contains("stream SIGNALS, replicas: away or not up to date");
        (now.code == Some(0) && as_server && as_replica).then_some(())
    })
    .await;
}

#[tokio::test]
async fn nats_away_hanging_or_too_small_is_named() {
    let servers = Servers::start(|options| options.max_payload = Some("1MB".into())).await;
    let (url, there) = (format!("nats://user:{SECRET}@127.0.0.1:{}", ports::free().unwrap()), servers.nats.url());
    for checked in [servers.gateway(&[("NATS_URL", &url)]).await, servers.worker(&[("NATS_URL", &url)]).await] {
        checked.fails_for(&["NATS nats://127.0.0.1:", "NATS_URL says where it is"]);
    }
    servers.gateway(&[]).await.fails_for(&["max_payload", "max_payload: 9MB", "GATEWAY_MAX_BODY_BYTES"]);
    servers.gateway(&[("GATEWAY_MAX_BODY_BYTES", "900000")]).await.well();
    let one_away = servers.worker(&[("NATS_URL", &format!("{url},{there}"))]).await;
    assert!(one_away.well().found("warning").contains("NATS nats://127.0.0.1:"), "the other takes its place");
    servers.gateway(&[("NATS_REPLICAS", "3")]).await.fails_for(&["replicas", "alone", "NATS_REPLICAS"]);
    servers.nats.process().freeze().unwrap();
    servers.gateway(&[]).await.fails_for(&["NATS nats://", "hangs"]);
    servers.nats.process().thaw().unwrap();
}

#[tokio::test]
async fn a_stream_or_consumer_that_would_break_a_promise_is_named() {
    let servers = Servers::start(|_| ()).await;
    let jetstream = servers.jetstream().await;
    let good = Config {
        name: "SIGNALS".into(),
        subjects: vec!["signals.sentry.*".into()],
        discard: DiscardPolicy::New,
        max_bytes: 1 << 20,
        ..Config::default()
    };
    jetstream.create_stream(Config { discard: DiscardPolicy::Old, ..good.clone() }).await.unwrap();
    for checked in [servers.gateway(&[]).await, servers.worker(&[]).await] {
        checked.fails_for(&["stream SIGNALS, discard", "would drop what no worker has read"]);
    }
    let stream = jetstream.get_stream("SIGNALS").await.unwrap();
    assert_eq!(stream.cached_info().config.discard, DiscardPolicy::Old, "and left as it is");
    jetstream.update_stream(good.clone()).await.unwrap();
    let warned = servers.gateway(&[]).await;
    assert!(warned.well().found("warning").contains("stream SIGNALS, max_bytes: 1048576"), "{:#}", warned.json);
    let only_some = Config { subjects: vec!["signals.sentry.issue".into()], ..good };
    jetstream.update_stream(only_some).await.unwrap();
    let warned = servers.gateway(&[]).await;
    assert!(warned.well().found("warning").contains("no stream takes it"), "{:#}", warned.json);
    let gives_up = pull::Config { durable_name: Some("worker".into()), max_deliver: 5, ..pull::Config::default() };
    stream.create_consumer(gives_up).await.unwrap();
    servers.worker(&[]).await.fails_for(&["consumer worker", "max_deliver 5"]);
    let stream = jetstream.get_stream("SIGNALS").await.unwrap();
    assert_eq!(stream.cached_info().state.last_sequence, 0, "nothing was stored by looking");
}

#[tokio::test]
async fn a_login_that_may_too_little_is_named_with_what_it_lacks() {
    let users = format!(
        "accounts {{ A {{ jetstream {{ max_file: 1GB, max_streams: 1 }}, users: [
            {{ user: all, password: {SECRET} }},
            {{ user: mute, password: {SECRET}, permissions: {{ publish: {{ deny: [\"signals.>\", \"receipts.>\"] }} }} }},
            {{ user: deaf, password: {SECRET}, permissions: {{ subscribe: {{ deny: \"receipts.>\" }} }} }},
        ] }} }}"
    );
    let servers = Servers::start(|options| options.extra = users).await;
    let as_user = |user: &str| format!("nats://{user}:{SECRET}@127.0.0.1:{}", servers.nats.port());
    servers.gateway(&[]).await.fails_for(&["NATS nats://", "it wants a login"]);
    let wrong = format!("nats://all:{SECRET}x@127.0.0.1:{}", servers.nats.port());
    servers.worker(&[("NATS_URL", &wrong)]).await.fails_for(&["NATS nats://", "it refuses the user and the password"]);
    let all = as_user("all");
    servers.gateway(&[("NATS_URL", &all)]).await.fails_for(&["NATS account, storage", "lower NATS_MAX_BYTES"]);
    let fits = [("NATS_URL", all.as_str()), ("NATS_MAX_BYTES", "100MB")];
    servers.gateway(&fits).await.well();
    let (mute, deaf) = (as_user("mute"), as_user("deaf"));
    let mute_first = [("NATS_URL", mute.as_str()), ("NATS_MAX_BYTES", "100MB")];
    servers.gateway(&mute_first).await.fails_for(&["NATS permissions", "Publish", "signals.sentry.check"]);
    let client = async_nats::ConnectOptions::with_user_and_password("all".into(), SECRET.into());
    let client = client.connect(servers.nats.url()).await.unwrap();
    let config = Config {
        name: "SIGNALS".into(),
        subjects: vec!["signals.sentry.*".into()],
        discard: DiscardPolicy::New,
        max_bytes: 1_000_000,
        ..Config::default()
    };
    jetstream::new(client).create_stream(config).await.unwrap();
    servers.gateway(&fits).await.well();
    let other = [("NATS_URL", all.as_str()), ("NATS_STREAM", "OTHER"), ("NATS_MAX_BYTES", "1MB")];
    servers.gateway(&other).await.fails_for(&["NATS account, streams"]);
    servers.gateway(&[("NATS_URL", &mute)]).await.fails_for(&["NATS permissions", "Publish", "signals.sentry.check"]);
    servers.worker(&[("NATS_URL", &mute)]).await.fails_for(&["NATS permissions", "Publish", "receipts.check"]);
    servers.gateway(&[("NATS_URL", &deaf)]).await.fails_for(&["NATS permissions", "Subscription", "receipts.check"]);
    servers.worker(&[("NATS_URL", &deaf)]).await.well();
}

/// The subjects that the gateway publishes to, as a locked broker allows them.
const GATEWAY_RIGHTS: [&str; 6] = [
    "signals.sentry.*",
    "$JS.API.STREAM.INFO.SIGNALS",
    "$JS.API.STREAM.CREATE.SIGNALS",
    "$JS.API.STREAM.MSG.GET.SIGNALS",
    "$JS.API.CONSUMER.INFO.SIGNALS.worker",
    "$JS.API.INFO", // the last of both lists: the programs work without it
];
/// The same for the worker.
const WORKER_RIGHTS: [&str; 11] = [
    "receipts.*",
    "$JS.ACK.SIGNALS.worker.>",
    "$JS.API.STREAM.INFO.SIGNALS",
    "$JS.API.STREAM.MSG.GET.SIGNALS",
    "$JS.API.STREAM.PURGE.SIGNALS",
    "$JS.API.CONSUMER.INFO.SIGNALS.worker",
    "$JS.API.CONSUMER.CREATE.SIGNALS.worker.signals.sentry.*",
    "$JS.API.CONSUMER.MSG.NEXT.SIGNALS.worker",
    "$JS.ACK.*.*.SIGNALS.worker.>",
    "$JS.API.CONSUMER.RESET.SIGNALS.worker",
    "$JS.API.INFO",
];
/// A check tries this many of each list, from the first on, and names one that is missing.
const MISSED: (usize, usize) = (5, 8);

/// A login with these permissions, in the language of NATS's configuration.
fn user(name: &str, publish: &[&str], subscribe: &[&str]) -> String {
    format!(
        "{{ user: {name}, password: {SECRET}, permissions: {{ publish: {{ allow: {publish:?} }}, \
         subscribe: {{ allow: {subscribe:?} }} }} }}\n"
    )
}

/// A broker with the logins `gateway`, `worker` and `operator` (all rights). `gateway-N` and `worker-N` lack the Nth
/// right. `gateway-deaf` may not subscribe to receipts.
async fn locked() -> Servers {
    let without = |rights: &[&'static str], left_out: usize| {
        let mut rights = rights.to_vec();
        rights.remove(left_out);
        rights
    };
    let inboxes = ["_INBOX.>", "_INBOX_gateway.>", "_INBOX_worker.>"];
    let hears = [&inboxes[..], &["receipts.*"]].concat();
    let mut users = format!("{{ user: operator, password: {SECRET} }}\n");
    users += &user("gateway", &GATEWAY_RIGHTS, &hears);
    users += &user("worker", &WORKER_RIGHTS, &inboxes);
    users += &user("gateway-deaf", &GATEWAY_RIGHTS, &inboxes);
    for left_out in 0..GATEWAY_RIGHTS.len() {
        users += &user(&format!("gateway-{left_out}"), &without(&GATEWAY_RIGHTS, left_out), &hears);
    }
    for left_out in 0..WORKER_RIGHTS.len() {
        users += &user(&format!("worker-{left_out}"), &without(&WORKER_RIGHTS, left_out), &inboxes);
    }
    let accounts = format!(
        "accounts {{
            DOOR {{ jetstream {{ max_file: 30GB, max_mem: 0, max_streams: 2, max_consumers: 32 }}, users: [\n{users}] }}
            SYS {{ users = [ {{ user: sys, password: {SECRET} }} ] }}
        }}
        system_account: SYS"
    );
    Servers::start(|options| options.extra = accounts).await
}

impl Servers {
    fn url_of(&self, user: &str) -> String {
        format!("nats://{user}:{SECRET}@127.0.0.1:{}", self.nats.port())
    }
}

#[tokio::test]
async fn a_login_with_what_its_program_needs_is_no_problem() {
    let servers = locked().await;
    let (gateway, worker) = (servers.url_of("gateway"), servers.url_of("worker"));
    // Neither program asks for the account's limits.
    let unasked = (
        servers.url_of(&format!("gateway-{}", GATEWAY_RIGHTS.len() - 1)),
        servers.url_of(&format!("worker-{}", WORKER_RIGHTS.len() - 1)),
    );
    let all_well = async || {
        for url in [&gateway, &unasked.0] {
            let checked = servers.gateway(&[("NATS_URL", url)]).await;
            assert!(!checked.well().found("warning").contains("without a login"), "{:#}", checked.json);
        }
        for url in [&worker, &unasked.1] {
            let checked = servers.worker(&[("NATS_URL", url)]).await;
            assert!(!checked.well().found("warning").contains("without a login"), "{:#}", checked.json);
        }
        for checked in
            [servers.gateway(&[("NATS_URL", &unasked.0)]).await, servers.worker(&[("NATS_URL", &unasked.1)]).await]
        {
            assert!(checked.found("not tried").contains("$JS.API.INFO"), "{:#}", checked.json);
        }
    };
    all_well().await;
    servers.door().await;
    all_well().await;
}

#[tokio::test]
async fn a_right_that_a_login_lacks_is_named_and_trying_it_has_no_effect() {
    let servers = locked().await;
    // With the tables there, the many checks at once rehearse no migration: each would wait for the others.
    worker::store::Store::new(&servers.database.parse().unwrap(), 1).migrate().await.unwrap();
    // Before the programs have made stream and consumer, and after.
    for there in [false, true] {
        if there {
            servers.door().await;
        }
        join_all((0..MISSED.0).map(async |left_out| {
            let url = servers.url_of(&format!("gateway-{left_out}"));
            let right = GATEWAY_RIGHTS[left_out].trim_end_matches('*');
            servers.gateway(&[("NATS_URL", &url)]).await.fails_for(&["NATS permissions", right]);
        }))
        .await;
        join_all((0..MISSED.1).map(async |left_out| {
            let url = servers.url_of(&format!("worker-{left_out}"));
            let right = WORKER_RIGHTS[left_out].trim_end_matches(['*', '>']);
            servers.worker(&[("NATS_URL", &url)]).await.fails_for(&["NATS permissions", right]);
        }))
        .await;
        let deaf = servers.gateway(&[("NATS_URL", &servers.url_of("gateway-deaf"))]).await;
        deaf.fails_for(&["NATS permissions", "Subscription", "receipts."]);
    }
    let options = async_nats::ConnectOptions::with_user_and_password("operator".into(), SECRET.into());
    let stream =
        jetstream::new(options.connect(servers.nats.url()).await.unwrap()).get_stream("SIGNALS").await.unwrap();
    let state = &stream.cached_info().state;
    assert_eq!(
        (state.messages, state.first_sequence, state.last_sequence),
        (3, 1, 3),
        "nothing purged, nothing stored"
    );
    let consumer = stream.consumer_info("worker").await.unwrap();
    let moved = (consumer.delivered.stream_sequence, consumer.ack_floor.stream_sequence, consumer.num_pending);
    assert_eq!((moved, consumer.num_ack_pending), ((0, 0, 3), 0), "nothing delivered, nothing acknowledged");
    assert_eq!(consumer.num_waiting, 0, "and no request waits for the next message");
}

/// A port whose bytes reach this server half a second later, and come back as late.
async fn far_away(port: u16) -> u16 {
    async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            tokio::time::sleep(Duration::from_millis(500)).await;
            if to.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            tokio::spawn(carry(from_client, to_server));
            tokio::spawn(carry(from_server, to_client));
        }
    });
    here
}

#[tokio::test]
async fn a_refusal_that_comes_late_is_waited_for() {
    let servers = locked().await;
    let far = far_away(servers.nats.port()).await;
    let url_of = |user: String| format!("nats://{user}:{SECRET}@127.0.0.1:{far}");
    let unasked = url_of(format!("worker-{}", WORKER_RIGHTS.len() - 1));
    let checked = servers.worker(&[("NATS_URL", &unasked)]).await;
    assert!(checked.well().found("not tried").contains("$JS.API.INFO"), "{:#}", checked.json);
    let left_out = servers.worker(&[("NATS_URL", &url_of("worker-2".into()))]).await;
    left_out.fails_for(&["NATS permissions", WORKER_RIGHTS[2]]);
    assert_eq!(left_out.found("problem").lines().count(), 1, "{:#}", left_out.json);
}

impl Servers {
    /// The stream with three messages and the consumer, as the programs make them.
    async fn door(&self) {
        let options = async_nats::ConnectOptions::with_user_and_password("operator".into(), SECRET.into());
        let jetstream = jetstream::new(options.connect(self.nats.url()).await.unwrap());
        let config = Config {
            name: "SIGNALS".into(),
            subjects: vec!["signals.sentry.*".into()],
            discard: DiscardPolicy::New,
            max_bytes: 10 << 30,
            ..Config::default()
        };
        let stream = jetstream.create_stream(config).await.unwrap();
        let pull =
            pull::Config { durable_name: Some("worker".into()), max_ack_pending: 16_384, ..pull::Config::default() };
        stream.create_consumer(pull).await.unwrap();
        for body in ["1", "2", "3"] {
            jetstream.publish("signals.sentry.issue", body.into()).await.unwrap().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_broker_without_logins_or_encryption_is_warned_of() {
    const OPEN: &str = "NATS takes clients without a login";
    const CLEAR: &str = "the connection to NATS is not encrypted";
    let open = Servers::start(|_| ()).await;
    for checked in [open.gateway(&[]).await, open.worker(&[]).await] {
        let warnings = checked.well().found("warning");
        assert!(warnings.contains(OPEN) && !warnings.contains(CLEAR), "loopback needs no encryption: {warnings}");
    }
    // The check has a login. The broker takes clients without one as well.
    let port = ports::free().unwrap();
    let users = format!(
        "listen: \"0.0.0.0:{port}\"
        accounts {{ A {{ jetstream: enabled, users: [ {{ user: all, password: {SECRET} }}, {{ user: guest, password: x }} ] }} }}
        no_auth_user: guest"
    );
    let mut servers = Servers::start(|options| (options.port, options.extra) = (Some(port), users.clone())).await;
    let url = format!("nats://all:{SECRET}@127.0.0.1:{port}");
    for checked in [servers.gateway(&[("NATS_URL", &url)]).await, servers.worker(&[("NATS_URL", &url)]).await] {
        assert!(checked.well().found("warning").contains(OPEN), "{:#}", checked.json);
    }
    servers.nats.stop().await.unwrap();
    servers.nats.options.extra = users.replace("no_auth_user: guest", "");
    servers.nats.start_again().await.unwrap();
    let Some(address) = world::own_address() else {
        return world::skipped("a_broker_that_speaks_in_clear", "this machine has no address but loopback");
    };
    let url = format!("nats://all:{SECRET}@{address}:{port}");
    for checked in [servers.gateway(&[("NATS_URL", &url)]).await, servers.worker(&[("NATS_URL", &url)]).await] {
        let warnings = checked.well().found("warning");
        assert!(warnings.contains(CLEAR) && !warnings.contains(OPEN), "{warnings}");
    }
}

#[tokio::test]
async fn a_stream_that_could_not_be_made_is_named() {
    // Another stream has the subjects: all of them, or one.
    let wide = Servers::start(|_| ()).await;
    for (name, subject) in [("OTHER", "signals.>"), ("OTHER", "signals.*.error")] {
        let config = Config { name: name.into(), subjects: vec![subject.into()], ..Config::default() };
        wide.jetstream().await.create_stream(config).await.unwrap();
        let checked = wide.gateway(&[]).await;
        checked.fails_for(&["stream SIGNALS, subjects", "OTHER", "signals.sentry.*"]);
        wide.jetstream().await.delete_stream(name).await.unwrap();
    }
    wide.gateway(&[]).await.well();
    // A login that may not list streams: what all of one stream's subjects show is seen, and the rest is not called well.
    let locked = locked().await;
    let url = locked.url_of("gateway");
    let unlisted = locked.gateway(&[("NATS_URL", &url)]).await;
    assert!(unlisted.well().found("not tried").contains("stream SIGNALS, subjects"), "{:#}", unlisted.json);
    let options = async_nats::ConnectOptions::with_user_and_password("operator".into(), SECRET.into());
    let operator = jetstream::new(options.connect(locked.nats.url()).await.unwrap());
    let config = Config { name: "OTHER".into(), subjects: vec!["signals.>".into()], ..Config::default() };
    operator.create_stream(config).await.unwrap();
    locked.gateway(&[("NATS_URL", &url)]).await.fails_for(&["stream SIGNALS, subjects", "signals.sentry.check"]);
    let state = operator.get_stream("OTHER").await.unwrap().cached_info().state.clone();
    assert_eq!(state.messages, 0, "nothing was stored by looking");

    // The server has less room than the stream may take. The account has no limit.
    let small = Servers::start(|options| options.jetstream = "max_file_store: 1GB".into()).await;
    small.gateway(&[]).await.fails_for(&["stream SIGNALS, storage", "max_file", "NATS_MAX_BYTES"]);
    small.gateway(&[("NATS_MAX_BYTES", "500MB")]).await.well();
    let mut streams = small.jetstream().await.stream_names();
    assert!(futures_util::StreamExt::next(&mut streams).await.is_none(), "no stream was made");
}

#[tokio::test]
async fn a_journal_that_could_not_be_opened_is_named() {
    let servers = Servers::start(|_| ()).await;
    let journal = std::path::PathBuf::from(servers.journal());
    let limits = gateway::journal::Limits::of(64 << 20);
    let (opened, _) = gateway::journal::Journal::open(&journal, limits).unwrap();
    opened.close().await;
    drop(opened);
    servers.gateway(&[]).await.well();
    // A later version's file: as ours, with another version and the checksum that goes with it.
    let mut header = vec![0_u8; 64];
    header[..8].copy_from_slice(b"LOOPJRNL");
    header[8..12].copy_from_slice(&99_u32.to_le_bytes());
    let checksum = crc32c(&[&header[..12], &header[16..]].concat());
    header[12..16].copy_from_slice(&checksum.to_le_bytes());
    header.resize(4096, 0);
    let file = journal.join("000000000099.journal");
    std::fs::write(&file, header).unwrap();
    let opens = gateway::journal::Journal::open(&journal, limits);
    assert!(opens.is_err_and(|error| error.to_string().contains("version 99")), "the file is what it is meant to be");
    servers.gateway(&[]).await.fails_for(&["journal format", "000000000099.journal", "99"]);
}

/// CRC-32C, bit by bit (RFC 3720 appendix B.4).
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

#[tokio::test]
async fn a_look_at_a_journal_stops_no_start() {
    let mut world = setup().workers(0).start().await;
    world.gateway.stop().await;
    let lock = std::fs::File::open(world.folder().join("gateway-0/lock")).unwrap();
    lock.lock_shared().unwrap(); // as a look does, for a moment
    world.gateway.start_again();
    eventually("the start to meet the lock", async || {
        let waits = world.gateway.log().contains("waiting for the journal");
        (waits || !world.gateway.process().is_alive()).then_some(())
    })
    .await;
    drop(lock);
    world.gateway.ready().await;
}

#[tokio::test]
async fn a_place_that_cannot_hold_the_journal_is_named() {
    let servers = Servers::start(|_| ()).await;
    let file = servers.scratch.path().join("file");
    std::fs::write(&file, "").unwrap();
    for dir in [file.clone(), file.join("below")] {
        let dir = dir.display().to_string();
        servers.gateway(&[("GATEWAY_JOURNAL_DIR", &dir)]).await.fails_for(&["journal /", "no directory"]);
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    servers.gateway(&[("GATEWAY_LISTEN", &address)]).await.fails_for(&[&address, "taken", "GATEWAY_LISTEN"]);
    let many = [("GATEWAY_MAX_CONNECTIONS", "1000000"), ("GATEWAY_IDLE_TIMEOUT", "30s")];
    let checked = servers.gateway(&many).await;
    assert!(checked.found("warning").contains("idle time-out: 30s"), "{:#}", checked.json);
}

#[tokio::test]
async fn memory_and_full_disks_are_no_place_for_a_journal() {
    // A mount in a namespace of its own, which ends with the check: see `drills::disk`.
    const FULL: &str = "mkdir -p \"$GATEWAY_JOURNAL_DIR\" && mount -t tmpfs -o size=8m check \"$GATEWAY_JOURNAL_DIR\" \
        && head -c \"$FILL\" /dev/zero > \"$GATEWAY_JOURNAL_DIR/other\" ; exec \"$0\" \"$@\"";
    let servers = Servers::start(|_| ()).await;
    let as_root = ["unshare", "--mount", "/bin/sh", "-c", FULL];
    let as_others = ["unshare", "--map-root-user", "--mount", "/bin/sh", "-c", FULL];
    let under: &[&str] = if nix::unistd::geteuid().is_root() { &as_root } else { &as_others };
    let tried = Command::new(under[0]).args(&under[1..under.len() - 1]).arg("mount -t tmpfs x /mnt").output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        return world::skipped("memory_and_full_disks_are_no_place_for_a_journal", "may not mount a tmpfs");
    }
    let (url, dir) = (servers.nats.url(), servers.journal());
    let check_filled = async |fill: &str| {
        let environment = [
            ("SENTRY_CLIENT_SECRET", SECRET),
            ("NATS_URL", &url),
            ("GATEWAY_LISTEN", "127.0.0.1:0"),
            ("GATEWAY_OPS_LISTEN", "127.0.0.1:0"),
            ("GATEWAY_JOURNAL_DIR", &dir),
            ("GATEWAY_JOURNAL_MAX_BYTES", "64MiB"),
            ("FILL", fill),
        ];
        check(GATEWAY, under, &environment).await
    };
    let in_memory = check_filled("1").await;
    let warnings = in_memory.well().found("warning");
    assert!(warnings.contains("tmpfs, which is memory") && warnings.contains("journal space"), "{warnings}");
    let full = check_filled("9000000").await;
    full.fails_for(&["journal sync", "cannot write a file"]);
    full.fails_for(&["journal space", "make room"]);
}

#[tokio::test]
async fn a_database_that_would_not_do_is_named() {
    let servers = Servers::start(|_| ()).await;
    let closed = format!("postgres://loop:{SECRET}@127.0.0.1:{}/loop", ports::free().unwrap());
    servers.worker(&[("DATABASE_URL", &closed)]).await.fails_for(&["PostgreSQL 127.0.0.1:", "DATABASE_URL says where"]);
    let missing = servers.database.replace("/check_", "/no_check_");
    servers.worker(&[("DATABASE_URL", &missing)]).await.fails_for(&["PostgreSQL", "make the database"]);
    servers.worker(&[("WORKER_MIGRATE", "off")]).await.fails_for(&["table public.issues", "worker migrate"]);

    // A role that may do nothing, then one that may only read.
    let role = format!("check_{}", uuid::Uuid::new_v4().simple());
    servers.sql(&format!("CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")).await;
    let limited = servers.database.replace("//loop@", &format!("//{role}:{SECRET}@"));
    let limited = [("DATABASE_URL", limited.as_str())];
    servers.worker(&limited).await.fails_for(&["tables", &role, "GRANT"]);
    worker::store::Store::new(&servers.database.parse().unwrap(), 1).migrate().await.unwrap();
    let checked = servers.worker(&limited).await;
    checked.fails_for(&["table public.signals", "may not INSERT", "GRANT"]);
    assert!(
        checked.setting("DATABASE_URL").0.contains(&format!("//{role}@")),
        "the role is shown, its password is not"
    );
    servers.worker(&[("WORKER_CONCURRENCY", "64")]).await.well();
    // Only `worker replay --dry-run` needs this.
    let name = servers.database.rsplit('/').next().unwrap();
    servers.sql(&format!("REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC")).await;
    let warned = servers.worker(&limited).await.found("warning");
    assert!(warned.contains("temporary tables") && warned.contains("GRANT TEMPORARY ON DATABASE"), "{warned}");
    assert!(!servers.worker(&[]).await.found("warning").contains("temporary tables"), "the owner may");
    servers.sql(&format!("ALTER ROLE {role} CONNECTION LIMIT 3")).await;
    servers.worker(&limited).await.fails_for(&["connections", "3 are allowed"]);

    let name = servers.database.rsplit('/').next().unwrap();
    servers.sql(&format!("REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")).await;
    servers
        .worker(&limited)
        .await
        .fails_for(&["permission denied", &format!("GRANT CONNECT ON DATABASE {name} TO {role}")]);

    servers.sql("ALTER TABLE signals ALTER COLUMN source_id TYPE varchar(9)").await;
    servers.worker(&[]).await.fails_for(&["table public.signals, column source_id", "ALTER TABLE"]);
    servers.sql("ALTER TABLE signals ALTER COLUMN source_id TYPE text").await;
    servers.worker(&[]).await.well();
    servers.sql(&format!("ALTER DATABASE {name} SET synchronous_commit = off")).await;
    let weak = servers.worker(&[]).await;
    assert!(weak.well().found("warning").contains("synchronous_commit"), "{:#}", weak.json);
    servers.sql(&format!("ALTER DATABASE {name} SET default_transaction_read_only = on")).await;
    servers.worker(&[]).await.fails_for(&["PostgreSQL", "standby", "primary"]);
}

#[tokio::test]
async fn a_migration_that_runs_is_no_problem_of_the_database() {
    let servers = Servers::start(|_| ()).await;
    let migrating = servers.sql("SELECT pg_advisory_lock(7813586407274147444)").await; // the lock of migrations
    let checked = servers.worker(&[]).await;
    assert!(checked.well().found("not tried").contains("tables: "), "{:#}", checked.json);
    drop(migrating);
    let made = || async { servers.worker(&[]).await.found("ok").contains("a start makes").then_some(()) };
    eventually("the lock to be free", made).await;
}

#[tokio::test]
async fn a_database_that_hangs_is_named_and_not_waited_for() {
    let servers = Servers::start(|_| ()).await;
    let postgres = PostgresOptions::for_tests(servers.scratch.path().join("postgres"));
    let postgres = Postgres::start(programs(), postgres).await.unwrap();
    let url = postgres.create_database("door").await.unwrap();
    postgres.process().freeze().unwrap();
    servers.worker(&[("DATABASE_URL", &url)]).await.fails_for(&["PostgreSQL 127.0.0.1:", "no answer within"]);
    postgres.process().thaw().unwrap();
}

#[tokio::test]
async fn a_server_that_answers_and_takes_no_connection_is_not_called_away() {
    let servers = Servers::start(|options| options.extra = "max_connections: 1".into()).await;
    let name = servers.database.rsplit('/').next().unwrap();
    servers.sql(&format!("UPDATE pg_database SET datallowconn = false WHERE datname = '{name}'")).await;
    let checked = servers.worker(&[]).await;
    checked.fails_for(&["PostgreSQL", "55000", "look at its log"]);
    let only = world::RawClient::connect(servers.nats.port()).await;
    let checked = servers.gateway(&[]).await;
    checked.fails_for(&["NATS nats://127.0.0.1:", "maximum connections exceeded", "look at its log"]);
    drop(only);
}

#[tokio::test]
async fn a_journal_whose_disk_hangs_is_named_and_not_waited_for() {
    const TEST: &str = "a_journal_whose_disk_hangs_is_named_and_not_waited_for";
    const UNDER: [&str; 7] =
        ["strace", "-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-einject=fdatasync:delay_enter=12000000"];
    let may_trace = Command::new("strace").args(["-o", "/dev/null", "/bin/true"]).output();
    if !may_trace.is_ok_and(|tried| tried.status.success()) {
        return world::skipped(TEST, "there is no `strace` on PATH that may trace");
    }
    let servers = Servers::start(|_| ()).await;
    let (url, dir) = (servers.nats.url(), servers.journal());
    std::fs::create_dir(&dir).unwrap();
    let environment = [
        ("SENTRY_CLIENT_SECRET", SECRET),
        ("NATS_URL", url.as_str()),
        ("GATEWAY_LISTEN", "127.0.0.1:0"),
        ("GATEWAY_OPS_LISTEN", "127.0.0.1:0"),
        ("GATEWAY_JOURNAL_DIR", &dir),
        ("GATEWAY_JOURNAL_MAX_BYTES", "64MiB"),
    ];
    check(GATEWAY, &UNDER, &environment).await.fails_for(&["journal", "no answer within"]);
}

#[test]
fn mistakes_in_the_settings_are_64_for_a_check_as_for_a_start() {
    for (program, wrong) in
        [(GATEWAY, ["GATEWAY_LISTEN", "NATS_REPLICAS"]), (WORKER, ["DATABASE_URL", "NATS_REPLICAS"])]
    {
        let environment = wrong.map(|variable| (variable, SECRET));
        let ran = Command::new(program).args(["check", "--json"]).env_clear().envs(environment).output().unwrap();
        let ran = Ran::of(ran);
        assert_eq!((ran.code, ran.out.as_str()), (Some(64), ""), "{ran:?}");
        assert!(wrong.iter().all(|variable| ran.err.contains(variable)) && !ran.err.contains(SECRET), "{ran:?}");
    }
}
