//! The `gateway` program: settings, logs, run or a command, stop.

use std::process::ExitCode;

use clap::{ArgMatches, Command};
use gateway::settings::{Config, JournalConfig};
use gateway::{commands, settings as own};
use shared::settings::{self, BadSettings, EX_USAGE};
use shared::shutdown;

fn main() -> ExitCode {
    let about = "Takes Sentry's webhooks, verifies them, makes them durable, and answers";
    let command = Command::new("gateway").bin_name("gateway").about(about).version(env!("CARGO_PKG_VERSION"));
    let command = settings::command(command, &own::SETTINGS).subcommand(commands::command());
    let arguments = settings::arguments(command);
    let ended = match arguments.subcommand() {
        Some((_, journal)) => operate(journal),
        None => serve(&arguments),
    };
    match ended {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("gateway: {error:#}");
            ExitCode::FAILURE
        }
        Err(mistakes) => {
            eprintln!("gateway: {mistakes}");
            ExitCode::from(EX_USAGE)
        }
    }
}

fn serve(arguments: &ArgMatches) -> Result<anyhow::Result<()>, BadSettings> {
    let config = Config::load(&settings::flags_then_environment(arguments))?;
    config.logs.start();
    Ok(in_runtime(async { gateway::run(config, shutdown::on_signal()?).await }))
}

fn operate(journal: &ArgMatches) -> Result<anyhow::Result<()>, BadSettings> {
    let (_, innermost) = journal.subcommand().unwrap_or(("", journal));
    let config = JournalConfig::load(&settings::flags_then_environment(innermost))?;
    config.logs.start();
    Ok(in_runtime(async { commands::run(journal, config, shutdown::on_signal()?).await }))
}

fn in_runtime(program: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(program)
}
