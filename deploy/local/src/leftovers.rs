//! Servers of an earlier run that even the watchdog missed (it was killed, too): found by what they are and the folder
//! they work in, and ended before new ones start on the same data.
//!
//! A pid file would tell less: it can be lost, and after a reboot its number is another program's.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use sysinfo::{Process, ProcessRefreshKind, ProcessesToUpdate, UpdateKind};

use crate::process::{nix_pid, table};
use crate::{nats, postgres};

/// How long they may take to end when asked, before they are killed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Ends every nats-server that was started with [`crate::NatsOptions::dir`] `nats_dir` and every PostgreSQL that was
/// started with [`crate::PostgresOptions::dir`] `postgres_dir`, and gives their numbers. The caller holds the lock on
/// the folders, so that they are nobody else's. Blocks.
///
/// # Errors
/// When one is there that cannot be ended (another user's).
pub fn end(nats_dir: &Path, postgres_dir: &Path) -> anyhow::Result<Vec<u32>> {
    let (home, _) = postgres::home(postgres_dir)?;
    let folders = Folders { nats_config: nats::config_file(nats_dir), postgres_data: postgres::data(&home) };
    let found = folders.servers()?;
    let begin = Instant::now();
    let mut left = found.clone();
    for (pid, farewell) in &found {
        let _ = kill(nix_pid(*pid), *farewell); // whether it worked is seen below
        let _ = kill(nix_pid(*pid), Signal::SIGCONT);
    }
    while !left.is_empty() {
        std::thread::sleep(Duration::from_millis(20));
        left = folders.servers()?;
        let late = begin.elapsed();
        if late > PATIENCE * 2 {
            let pids: Vec<_> = left.iter().map(|(pid, _)| pid.to_string()).collect();
            bail!("servers of an earlier run still use this data and cannot be ended: kill -9 {}", pids.join(" "));
        }
        if late > PATIENCE {
            for (pid, _) in &left {
                let _ = kill(nix_pid(*pid), Signal::SIGKILL);
            }
        }
    }
    forget_postmaster(&folders.postgres_data)?;
    Ok(found.into_iter().map(|(pid, _)| pid).collect())
}

struct Folders {
    nats_config: PathBuf,
    postgres_data: PathBuf,
}

impl Folders {
    /// Every server at work in these folders, and the signal that asks it to end.
    fn servers(&self) -> anyhow::Result<Vec<(u32, Signal)>> {
        let what = ProcessRefreshKind::nothing().with_cmd(UpdateKind::Always).with_cwd(UpdateKind::Always);
        let system = table(ProcessesToUpdate::All, what)?;
        let servers = system.processes().iter().filter(|(_, process)| process.thread_kind().is_none());
        Ok(servers.filter_map(|(pid, process)| Some((pid.as_u32(), self.farewell(process)?))).collect())
    }

    fn farewell(&self, process: &Process) -> Option<Signal> {
        if process.status() == sysinfo::ProcessStatus::Zombie {
            return None; // has ended, and waits for whoever adopted it
        }
        let named = |path: &Path| process.cmd().iter().any(|word| Path::new(word) == path);
        // Not by the folder alone: an editor with the configuration open names it, too.
        let name = process.name().to_str()?;
        if name.starts_with("nats-server") {
            return named(&self.nats_config).then_some(Signal::SIGTERM);
        }
        if !name.starts_with("postgres") {
            return None;
        }
        // Its backends do not name the folder but work in it; they may outlive the main process for a moment.
        let works_there = process.cwd() == Some(&self.postgres_data);
        if named(&self.postgres_data) { Some(Signal::SIGINT) } else { works_there.then_some(Signal::SIGTERM) }
    }
}

/// Removes postmaster.pid, for PostgreSQL would not start if the number in it were another program's by now. It guards
/// against backends still at work on the data; that there are none is known here.
fn forget_postmaster(data: &Path) -> anyhow::Result<()> {
    let file = data.join("postmaster.pid");
    match fs::remove_file(&file) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(err).with_context(|| format!("cannot remove {}", file.display()))
        }
        _ => Ok(()),
    }
}
