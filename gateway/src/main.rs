//! The `gateway` program: settings, logs, run or a command, stop.

use std::process::ExitCode;

use clap::{ArgMatches, Command};
use gateway::settings::{Config, JournalConfig};
use gateway::{check, commands, settings as own};
use shared::settings::{self, BadSettings, EX_USAGE};
use shared::text::printable_lines;
use shared::{core_dumps, shutdown, telemetry};
use tokio::runtime::Runtime;

/// The exit code of a command that SIGINT or SIGTERM has ended.
const EX_INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    core_dumps::forbid();
    let about = "Takes Sentry's webhooks, verifies them, makes them durable, and answers";
    let command = Command::new("gateway").bin_name("gateway").about(about).version(env!("CARGO_PKG_VERSION"));
    let command = settings::command(command, &own::SETTINGS).subcommand(commands::command());
    let command = command.subcommand(check::command());
    let arguments = settings::arguments(command);
    let ended = match arguments.subcommand() {
        Some(("check", check)) => look(check),
        Some((_, journal)) => operate(journal),
        None => serve(&arguments),
    };
    telemetry::tell_suppressed();
    match ended {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("gateway: {}", printable_lines(&format!("{error:#}")));
            if error.is::<BadSettings>() { ExitCode::from(EX_USAGE) } else { ExitCode::FAILURE }
        }
    }
}

fn serve(arguments: &ArgMatches) -> anyhow::Result<ExitCode> {
    let config = Config::load(&settings::flags_then_environment(arguments))?;
    config.logs.start();
    keep_freed_memory();
    run(async { gateway::run(config, shutdown::on_signal()?).await })?;
    Ok(ExitCode::SUCCESS)
}

/// Has the allocator keep what bodies leave behind, for the next bodies. Of its own accord glibc gives all but 128 KiB of it
/// back to the system, and has it back page by page: a tenth of what a delivery of 16 KB cost. Freeing one large piece of
/// memory makes it keep twice as much as that, for each thread (mallopt(3), the dynamic mmap threshold). Other allocators do
/// not mind.
fn keep_freed_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(1 << 20)));
}

fn look(arguments: &ArgMatches) -> anyhow::Result<ExitCode> {
    let config = Config::load(&settings::flags_then_environment(arguments))?;
    let looked = run(async { Ok(shutdown::on_signal()?.run_until_cancelled(check::run(arguments, &config)).await) })?;
    Ok(match looked.transpose()? {
        Some(true) => ExitCode::SUCCESS,
        Some(false) => ExitCode::FAILURE,
        None => ExitCode::from(EX_INTERRUPTED),
    })
}

fn operate(journal: &ArgMatches) -> anyhow::Result<ExitCode> {
    // Flags are global: the innermost command has them all.
    let innermost = journal.subcommand().map_or(journal, |(_, command)| command);
    let config = JournalConfig::load(&settings::flags_then_environment(innermost))?;
    config.logs.start();
    run(async { commands::run(journal, config, shutdown::on_signal()?).await })?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `program` to its end. Does not wait for blocking threads: when a start was stopped, one of them may still wait for
/// the journal's disk.
fn run<T>(program: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = Runtime::new()?;
    let ended = runtime.block_on(program);
    runtime.shutdown_background();
    ended
}
