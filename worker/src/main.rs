//! The `worker` program: settings, logs, run or a command, stop.

use std::process::ExitCode;

use clap::{ArgMatches, Command};
use shared::settings::{self, EX_USAGE};
use shared::text::printable_lines;
use shared::{core_dumps, operator, shutdown, telemetry};
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
    let exit = execute(&arguments, config);
    telemetry::tell_suppressed();
    exit
}

#[tokio::main]
async fn execute(arguments: &ArgMatches, config: Config) -> ExitCode {
    if let Some(exit) = commands::execute(arguments, &config).await {
        return exit;
    }
    let ended = match arguments.subcommand_name() {
        Some("migrate") => migrate(&config).await,
        _ => run(config).await,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("worker: {}", printable_lines(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

async fn migrate(config: &Config) -> anyhow::Result<()> {
    let ended = worker::migrate_now(config).await;
    let result = match &ended {
        Ok(report) if report.changed() => format!("created {}", report.created().collect::<Vec<_>>().join(", ")),
        Ok(_) => "nothing created".to_owned(),
        Err(_) => "failed, nothing created".to_owned(),
    };
    operator::log_end("worker migrate", "", &result);
    print!("{}", ended?);
    Ok(())
}

async fn run(config: Config) -> anyhow::Result<()> {
    worker::run(config, shutdown::on_signal()?).await
}
