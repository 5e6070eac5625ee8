//! The programs that are measured.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

/// The gateway and the worker of this tree, and this program itself (which has the baselines in it), all built alike.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    pub(crate) gateway: PathBuf,
    pub(crate) worker: PathBuf,
    pub(crate) bench: PathBuf,
}

impl Built {
    /// Has cargo build the two beside this program, in the same profile: `cargo run` builds only the program it runs,
    /// and a gateway of last week would be measured without a word. Where they are fresh, that takes a moment.
    ///
    /// # Errors
    /// Where they cannot be built.
    pub(crate) fn now() -> anyhow::Result<Built> {
        let bench = std::env::current_exe().context("cannot tell where this program is")?;
        let folder = bench.parent().context("this program is in no folder")?;
        let profile = match folder.file_name().and_then(|name| name.to_str()) {
            Some("debug") => "dev",
            Some(name) => name,
            None => bail!("{} is not where cargo puts programs (target/<profile>)", bench.display()),
        };
        let target = folder.parent().context("this program is in no target folder")?;
        build(profile, target)?;
        let program = |name: &str| {
            let path = folder.join(name);
            if path.is_file() { Ok(path) } else { bail!("cargo did not put {name} into {}", folder.display()) }
        };
        Ok(Built { gateway: program("gateway-under-bench")?, worker: program("worker-under-bench")?, bench })
    }
}

fn build(profile: &str, target: &Path) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()); // set by `cargo run`
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--package", "bench", "--profile", profile]).arg("--target-dir").arg(target);
    command.args(["--bin", "gateway-under-bench", "--bin", "worker-under-bench"]);
    // The tree that this program was built from, wherever it is run.
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    let status = command.status().context("cannot run cargo, which builds what is measured")?;
    if status.success() { Ok(()) } else { bail!("the programs to be measured do not build (above)") }
}
