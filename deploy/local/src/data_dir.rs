//! The folder in which one stack keeps everything, and the lock that keeps a second stack out of it.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::account;

/// A folder that is ours alone for as long as this lives.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// The kernel releases the lock when this is closed, at `kill -9` too.
    _lock: File,
}

impl DataDir {
    /// Makes the folder if it is missing and locks it.
    ///
    /// # Errors
    /// When another process holds it (the text names that process), or it cannot be made or written.
    pub fn take(path: &Path) -> anyhow::Result<DataDir> {
        let at = || format!("cannot use the data directory {}", path.display());
        let absolute = std::path::absolute(path).with_context(at)?;
        account::make_passable(&absolute).with_context(at)?;
        let path = absolute.canonicalize().with_context(at)?;
        let file = path.join("lock");
        let mut lock =
            File::options().read(true).write(true).create(true).truncate(false).open(file).with_context(at)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                lock.read_to_string(&mut holder).with_context(at)?;
                let holder = holder.trim();
                bail!(
                    "{} is in use by process {holder}, another `cargo run`. Stop that one (Ctrl-C where it runs, or \
                     kill {holder}), or give this one a folder of its own: cargo run -- --data-dir DIR",
                    path.display()
                );
            }
            Err(TryLockError::Error(err)) => return Err(err).with_context(at),
        }
        let write_pid = |lock: &mut File| -> io::Result<()> {
            lock.set_len(0)?;
            lock.rewind()?;
            writeln!(lock, "{}", std::process::id())
        };
        write_pid(&mut lock).with_context(at)?;
        Ok(DataDir { path, _lock: lock })
    }

    /// Its absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A secret of this stack: read from the file `name`, or made (64 random hex digits) and kept there, readable by us
    /// alone.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn secret(&self, name: &str) -> anyhow::Result<String> {
        let path = self.path.join(name);
        match fs::read_to_string(&path) {
            Ok(secret) if !secret.trim().is_empty() => return Ok(secret.trim().to_owned()),
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                return Err(err).with_context(|| format!("cannot read {}", path.display()));
            }
            _ => {}
        }
        // Two UUIDs of version 4: 244 bits from the system's random generator.
        let secret = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        self.write_private(name, &secret)?;
        Ok(secret)
    }

    /// Writes the file `name` (mode 0600) whole or not at all: beside its place, then renamed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_private(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path.join(name);
        write_private(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Writes a file that its owner alone can read, whole or not at all: beside its place, then renamed.
pub(crate) fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let part = path.with_added_extension("part");
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&part)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?; // `open` leaves the mode of a file that exists
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&part, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    #[test]
    fn a_second_taker_is_told_who_holds_the_folder() {
        let scratch = Scratch::new("data-dir").unwrap();
        let folder = scratch.path().join("below/it");
        let held = DataDir::take(&folder).unwrap();
        let refused = DataDir::take(&folder).unwrap_err().to_string();
        assert!(refused.contains(&format!("in use by process {}", std::process::id())), "{refused}");
        assert!(refused.contains("--data-dir"));
        drop(held);
        DataDir::take(&folder).unwrap();
    }

    #[test]
    fn a_secret_is_made_once_and_private() {
        let scratch = Scratch::new("data-dir").unwrap();
        let folder = DataDir::take(scratch.path()).unwrap();
        let secret = folder.secret("client-secret").unwrap();
        assert_eq!(secret.len(), 64);
        assert_eq!(folder.secret("client-secret").unwrap(), secret);
        assert_ne!(folder.secret("another").unwrap(), secret);
        let mode = fs::metadata(folder.path().join("client-secret")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
