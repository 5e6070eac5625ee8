//! `cargo run --release -p bench -- SCENARIO [--quick]`: how fast the door is, beside what anybody could put in its
//! place, on this machine, now.
//!
//! # How it is measured
//! - Real servers: the gateway and the worker of this tree, built with this program; nats-server and PostgreSQL as the
//!   tests start them, on the disk of the system's temporary folder (`TMPDIR` names another).
//! - Ratios of what ran in the same minute: contenders take turns (A B A B), five rounds; a round's ratio is of its own
//!   pair, and the table has the median and the spread of the ratios. Absolute numbers stand beside them as notes: they
//!   are this machine's.
//! - CPU and memory are the server's own, as the system counts them for its process; the load is another process.
//! - Any answer but 202 ends a run: fast refusals are no throughput.
//!
//! Read [`scenarios`] for what is compared with what and why that is fair, [`load`] for the measuring device.

mod baselines;
mod bodies;
#[cfg(test)]
mod bodies_tests;
mod database;
mod load;
mod process;
mod programs;
mod python;
mod report;
mod scenarios;
mod servers;
mod stats;
mod stream;
mod unnest;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::programs::Built;
use crate::report::Report;
use crate::scenarios::Bench;

/// Every scenario, in the order of `all`, and what it may take at most, in minutes.
const SCENARIOS: [(&str, &str, u64); 9] = [
    ("accept", "Deliveries accepted a second, NATS away and NATS there, against servers that do less", 20),
    ("tail", "The slowest answers at saturation, against a gateway that waits for JetStream instead of its disk", 10),
    ("outage", "How long an answer takes while NATS is down, against while it is up", 10),
    ("drain", "Deliveries published a second after an outage, against async-nats publishing alone", 15),
    ("persist", "Deliveries stored a second by one worker, against a loop that inserts rows from memory", 15),
    ("latency", "From the POST to the COMMIT at a modest rate", 5),
    ("replay", "Deliveries a second that a replay finds to be there, against reading them alone", 15),
    ("canonical", "The canonical form of a body, against serde_json::Value and Node", 5),
    ("memory", "Memory, and whether a delivery costs more where there are many already", 30),
];

fn main() -> ExitCode {
    let arguments = command().get_matches();
    let done = match arguments.subcommand() {
        Some(("serve-bare-hyper", arguments)) => {
            let port = arguments.get_one::<u16>("port").copied().unwrap_or_default();
            baselines::bare_hyper(port, arguments.get_flag("verify"))
        }
        Some(("serve-minimal-gateway", arguments)) => {
            let port = arguments.get_one::<u16>("port").copied().unwrap_or_default();
            let nats = arguments.get_one::<String>("nats").map(String::as_str).unwrap_or_default();
            baselines::minimal_gateway(port, nats)
        }
        Some((name, arguments)) => measure(name, arguments),
        None => unreachable!("clap asks for a scenario"),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> Command {
    let quick = Arg::new("quick")
        .long("quick")
        .action(ArgAction::SetTrue)
        .help("Small and short, to show that everything runs; its numbers mean nothing");
    let out = Arg::new("out")
        .long("out")
        .value_name("DIR")
        .value_parser(value_parser!(PathBuf))
        .help("Where SCENARIO.json and SCENARIO.svg go [default: bench/ in the target folder]");
    let scenario = |name, about| Command::new(name).about(about).args([quick.clone(), out.clone()]);
    let bare = Command::new("serve-bare-hyper")
        .hide(true)
        .arg(Arg::new("port").long("port").required(true).value_parser(value_parser!(u16)))
        .arg(Arg::new("verify").long("verify").action(ArgAction::SetTrue));
    let minimal = Command::new("serve-minimal-gateway")
        .hide(true)
        .arg(Arg::new("port").long("port").required(true).value_parser(value_parser!(u16)))
        .arg(Arg::new("nats").long("nats").required(true));
    Command::new("bench")
        .about("How fast the door is, beside what anybody could put in its place, on this machine")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(SCENARIOS.map(|(name, about, _)| scenario(name, about)))
        .subcommand(scenario("all", "All of them, one after the other"))
        .subcommand(bare)
        .subcommand(minimal)
}

fn measure(name: &str, arguments: &ArgMatches) -> anyhow::Result<()> {
    // A thousand connections are more files than a shell allows by default; what is started here inherits it.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most.min(65_536), most)?;
    let bench = Bench { built: Built::now()?, quick: arguments.get_flag("quick") };
    let beside = bench.built.bench.ancestors().nth(2).context("this program is in no target folder")?.join("bench");
    let out = arguments.get_one::<PathBuf>("out").cloned().unwrap_or(beside);
    let chosen = SCENARIOS.into_iter().filter(|(scenario, _, _)| name == "all" || name == *scenario);
    let (mut report, mut failed) = (Report::default(), vec![]);
    let runtime = tokio::runtime::Runtime::new()?;
    for (scenario, _, minutes) in chosen {
        eprintln!("{scenario}");
        let ran = async {
            let within = Duration::from_secs(minutes * 60);
            let ran = tokio::time::timeout(within, Box::pin(run(scenario, &bench))).await;
            ran.with_context(|| format!("not done within {minutes} minutes"))?
        };
        match runtime.block_on(ran) {
            Ok(found) => report.extend(found),
            Err(error) => {
                eprintln!("  failed: {error:#}");
                failed.push(scenario);
            }
        }
    }
    println!("{}", report.table());
    report.write(&out, name, &machine(&bench))?;
    anyhow::ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

async fn run(scenario: &str, bench: &Bench) -> anyhow::Result<Report> {
    match scenario {
        "accept" => scenarios::accept::run(bench).await,
        "tail" => scenarios::tail::run(bench).await,
        "outage" => scenarios::outage::run(bench).await,
        "drain" => scenarios::drain::run(bench).await,
        "persist" => scenarios::persist::run(bench).await,
        "latency" => scenarios::latency::run(bench).await,
        "replay" => scenarios::replay::run(bench).await,
        "canonical" => scenarios::canonical::run(bench).await,
        "memory" => scenarios::memory::run(bench).await,
        other => unreachable!("clap lets no scenario {other} pass"),
    }
}

/// What the numbers were measured on.
fn machine(bench: &Bench) -> serde_json::Value {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    serde_json::json!({
        "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        "cpu": model,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "optimised": !cfg!(debug_assertions),
        "quick": bench.quick,
    })
}
