//! The `worker` program: settings, logs, run or a command, stop.

use std::process::ExitCode;

use clap::{ArgMatches, Command};
use shared::settings::{self, EX_USAGE};
use shared::text::{print, printable_lines};
use shared::{core_dumps, operator, shutdown, telemetry};
use tokio::runtime::Runtime;
use worker::{Config, commands};

fn main() -> ExitCode {
    core_dumps::forbid();
    let about = "Turns Sentry's deliveries from the stream into Loop's signals and issues";
    let migrate =
        Command::new("migrate").about("Make the tables that are missing, check those that are there, and stop");
    let command = Command::new("worker").bin_name("worker").about(about).version(env!("CARGO_PKG_VERSION"));
    let command = command.subcommand(migrate).subcommands(commands::all());
    let arguments = settings::arguments(settings::command(command, &worker::settings::SETTINGS));
    let innermost = std::iter::successors(Some(&arguments), |matches| Some(matches.subcommand()?.1)).last();
    let lookup = settings::flags_then_environment(innermost.unwrap_or(&arguments));
    let mut config = match Config::load(&lookup) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("worker: {mistakes}");
            return ExitCode::from(EX_USAGE);
        }
    };
    if arguments.subcommand().is_some() && lookup("RUST_LOG").is_none() {
        // The operator reads the command's output. Only warnings and the line about its end belong between.
        config.logs.filter = format!("warn,{}=info", operator::TARGET);
    }
    config.logs.start();
    let exit = start(&arguments, config).unwrap_or_else(|error| {
        eprintln!("worker: {}", printable_lines(&format!("{error:#}")));
        ExitCode::FAILURE
    });
    telemetry::tell_suppressed();
    exit
}

/// Runs the worker or a command to its end. Does not wait for blocking threads: a resolver that hangs holds one of them.
fn start(arguments: &ArgMatches, config: Config) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::new()?;
    let ended = runtime.block_on(execute(arguments, config));
    runtime.shutdown_background();
    ended
}

async fn execute(arguments: &ArgMatches, config: Config) -> anyhow::Result<ExitCode> {
    let shutdown = shutdown::on_signal()?;
    if let Some(exit) = commands::execute(arguments, &config, &shutdown).await {
        return Ok(exit);
    }
    if arguments.subcommand_name() == Some("migrate") {
        return match commands::until_interrupted(&shutdown, migrate(&config)).await {
            Some(ended) => ended.map(|()| ExitCode::SUCCESS),
            None => {
                operator::log_end("worker migrate", "", "interrupted");
                Ok(ExitCode::from(commands::EX_INTERRUPTED))
            }
        };
    }
    worker::run(config, shutdown).await?;
    Ok(ExitCode::SUCCESS)
}

async fn migrate(config: &Config) -> anyhow::Result<()> {
    let ended = worker::migrate_now(config).await;
    let result = match &ended {
        Ok(report) if report.changed() => format!("created {}", report.created().collect::<Vec<_>>().join(", ")),
        Ok(_) => "nothing created".to_owned(),
        Err(_) => "failed, nothing created".to_owned(),
    };
    operator::log_end("worker migrate", "", &result);
    Ok(print(&ended?.to_string())?)
}
