//! The `gateway` program: settings, logs, run, stop.

use std::process::ExitCode;

use clap::Command;
use gateway::Config;
use shared::settings::{self, EX_USAGE};
use shared::shutdown;

fn main() -> ExitCode {
    let about = "Takes Sentry's webhooks, verifies them, makes them durable, and answers";
    let command = Command::new("gateway").bin_name("gateway").about(about).version(env!("CARGO_PKG_VERSION"));
    let arguments = settings::arguments(settings::command(command, &gateway::settings::SETTINGS));
    let config = match Config::load(&settings::flags_then_environment(&arguments)) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("gateway: {mistakes}");
            return ExitCode::from(EX_USAGE);
        }
    };
    config.logs.start();
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gateway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn serve(config: Config) -> anyhow::Result<()> {
    gateway::run(config, shutdown::on_signal()?).await
}
