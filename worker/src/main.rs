//! The `worker` program: settings, logs, run or a command, stop.

use std::process::ExitCode;

use clap::Command;
use shared::settings::{self, EX_USAGE};
use shared::shutdown;
use worker::Config;

fn main() -> ExitCode {
    let about = "Turns Sentry's deliveries from the stream into Loop's signals and issues";
    let migrate =
        Command::new("migrate").about("Make the tables that are missing, check those that are there, and stop");
    let command =
        Command::new("worker").bin_name("worker").about(about).version(env!("CARGO_PKG_VERSION")).subcommand(migrate);
    let arguments = settings::arguments(settings::command(command, &worker::settings::SETTINGS));
    let (name, matches) = arguments.subcommand().map_or(("run", &arguments), |(name, matches)| (name, matches));
    let config = match Config::load(&settings::flags_then_environment(matches)) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("worker: {mistakes}");
            return ExitCode::from(EX_USAGE);
        }
    };
    config.logs.start();
    match execute(name, config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn execute(command: &str, config: Config) -> anyhow::Result<()> {
    match command {
        "migrate" => {
            print!("{}", worker::migrate_now(&config).await?);
            Ok(())
        }
        _ => worker::run(config, shutdown::on_signal()?).await,
    }
}
