//! The alternative in Python: found or fetched, and started.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use local::ports;
use tokio::process::Command;
use world::SECRET;

use crate::servers::Server;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/aiohttp_gateway.py");
const PACKAGES: [&str; 2] = ["aiohttp==3.14.5", "nats-py==2.16.0"];
/// A machine without network must not be waited for.
const FETCH_WITHIN: Duration = Duration::from_secs(180);

/// The Python that has the packages, in an environment of its own in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Python(PathBuf);

impl Python {
    /// Makes the environment where it is missing.
    ///
    /// # Errors
    /// Why this machine cannot have it.
    pub(crate) async fn find_or_fetch() -> anyhow::Result<Python> {
        let cache = local::programs::cache_folder().context("there is no place to keep Python's packages")?;
        let folder = cache.join(format!("bench-{}", PACKAGES.join("-").replace("==", "-")));
        let python = |folder: &Path| folder.join("bin/python");
        if !python(&folder).is_file() {
            eprintln!("  Downloading {} from PyPI (once, into {})", PACKAGES.join(" and "), cache.display());
            // Renamed when it is whole. (Its scripts then name a place that is no more; its `python` works.)
            let part = cache.join(format!("bench-part-{}", std::process::id()));
            let made = tokio::time::timeout(FETCH_WITHIN, make(&part, &python(&part))).await;
            let made = made.unwrap_or_else(|_| bail!("PyPI did not answer within {FETCH_WITHIN:?}"));
            let made = made.and_then(|()| std::fs::rename(&part, &folder).context("cannot put it into the cache"));
            let _ = std::fs::remove_dir_all(&part); // gone already where all went well
            made?;
        }
        Ok(Python(python(&folder)))
    }

    /// The gateway in Python, publishing to `nats_url`.
    pub(crate) async fn gateway(&self, nats_url: &str) -> anyhow::Result<Server> {
        let port = ports::free()?;
        let mut command = std::process::Command::new(&self.0);
        command.args([SCRIPT, &port.to_string(), nats_url]).env("SENTRY_CLIENT_SECRET", SECRET);
        Server::other("aiohttp", command, port).await
    }
}

async fn make(folder: &Path, python: &Path) -> anyhow::Result<()> {
    run(Command::new("python3").args(["-m", "venv"]).arg(folder)).await.context("python3 -m venv failed")?;
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"];
    run(Command::new(python).args(install).args(PACKAGES)).await.context("pip install failed")
}

async fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
    if output.status.success() {
        return Ok(());
    }
    let told = String::from_utf8_lossy(&output.stderr);
    bail!("{}", told.trim().lines().last().unwrap_or("it said nothing"))
}
