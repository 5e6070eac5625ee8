//! `cargo run`: everything on this machine. `cargo run -- send FILE`: one delivery through it.

mod progress;
mod send;
mod signals;
mod stack;
mod welcome;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command, value_parser};
use local::sentry::Sign;
use shared::core_dumps;
use shared::settings::{self, BadSettings, EX_USAGE};

fn main() -> ExitCode {
    core_dumps::forbid(); // the servers inherit the limit
    let arguments = settings::arguments(command());
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(err) => return failed(&err.into()),
    };
    let done = match arguments.subcommand() {
        Some(("send", arguments)) => runtime.block_on(send::run(send_options(arguments))),
        _ => runtime.block_on(stack::run(stack_options(&arguments))),
    };
    // A download that nobody waits for any more must not keep us.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => failed(&err),
    }
}

fn failed(err: &anyhow::Error) -> ExitCode {
    eprintln!("{err:#}");
    if err.is::<BadSettings>() { ExitCode::from(EX_USAGE) } else { ExitCode::FAILURE }
}

fn command() -> Command {
    let data_dir = Arg::new("data-dir")
        .long("data-dir")
        .value_name("DIR")
        .help("Where the stack keeps everything [default: .local in the workspace]")
        .value_parser(value_parser!(PathBuf));
    let port = Arg::new("port")
        .long("port")
        .value_name("PORT")
        .default_value("8080")
        .help("The webhook's port; 0 takes one that is free")
        .value_parser(value_parser!(u16));
    let workers = Arg::new("workers")
        .long("workers")
        .value_name("N")
        .default_value("1")
        .help("How many workers")
        .value_parser(value_parser!(u8).range(1..=64));
    let file = Arg::new("file").value_name("FILE").required(true).help("The payload, a JSON file");
    let names: Vec<&str> = Sign::ALL.iter().map(|(name, _)| *name).collect();
    let sign = Arg::new("sign").long("sign").default_value("wire").value_parser(names).help(
        "What is signed: the bytes sent, in Sentry's form (wire); their canonical JSON; the file as it is, sent as \
               it is (raw); nothing that is right (bad)",
    );
    let text = |name: &'static str, help: &'static str| Arg::new(name).long(name).value_name("TEXT").help(help);
    let send = Command::new("send")
        .about("Signs a payload the way Sentry does, posts it, waits for the rows and prints them")
        .arg(file.value_parser(value_parser!(PathBuf)))
        .arg(sign)
        .arg(text("url", "Another webhook URL than the running stack's").value_name("URL"))
        .arg(text("secret", "Another client secret than the running stack's"))
        .arg(text("resource", "Sentry-Hook-Resource; guessed from the payload unless given"))
        .arg(text("request-id", "Request-ID; the same one twice is the same delivery. A new one unless given"))
        .arg(data_dir.clone());
    Command::new("local")
        .about(
            "Loop's Sentry door on this machine: a private nats-server and PostgreSQL, the gateway and the worker. \
             Their own settings (see `gateway --help`, `worker --help`) are taken from the environment.",
        )
        .version(env!("CARGO_PKG_VERSION"))
        .args_conflicts_with_subcommands(true)
        .args([port, data_dir, workers])
        .subcommand(send)
}

fn stack_options(arguments: &ArgMatches) -> stack::Options {
    stack::Options {
        port: arguments.get_one("port").copied().unwrap_or(8080),
        data_dir: data_dir(arguments),
        workers: arguments.get_one::<u8>("workers").copied().map_or(1, usize::from),
    }
}

fn send_options(arguments: &ArgMatches) -> send::Options {
    let text = |name: &str| arguments.get_one::<String>(name).cloned();
    let named = text("sign").and_then(|sign| Sign::ALL.into_iter().find(|(name, _)| *name == sign));
    send::Options {
        file: arguments.get_one::<PathBuf>("file").cloned().unwrap_or_default(),
        sign: named.map_or(Sign::Wire, |(_, sign)| sign),
        url: text("url"),
        secret: text("secret"),
        resource: text("resource"),
        request_id: text("request-id"),
        data_dir: data_dir(arguments),
    }
}

fn data_dir(arguments: &ArgMatches) -> PathBuf {
    arguments.get_one::<PathBuf>("data-dir").cloned().unwrap_or_else(default_data_dir)
}

/// `.local` in the workspace this was built in; where we are, if it was moved elsewhere.
fn default_data_dir() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize();
    workspace.unwrap_or_default().join(".local")
}
