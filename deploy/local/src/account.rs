//! Who PostgreSQL runs as. It refuses to run as root, so for root it is another user, and what it reads and writes must
//! lie where that user can reach.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use nix::unistd::{Uid, User};

/// An unprivileged user of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) name: String,
    uid: u32,
    gid: u32,
}

/// Whether we are root.
pub(crate) fn is_root() -> bool {
    Uid::effective().is_root()
}

/// Whom PostgreSQL must run as: `postgres` if there is such a user, else `nobody`; `None` when we are not root and it
/// simply runs as we do.
///
/// # Errors
/// When we are root and the machine knows neither.
pub(crate) fn for_postgres() -> anyhow::Result<Option<Account>> {
    if !is_root() {
        return Ok(None);
    }
    let known = |name| User::from_name(name).ok().flatten().filter(|user: &User| !user.uid.is_root());
    let user = known("postgres").or_else(|| known("nobody")).context(
        "PostgreSQL refuses to run as root, and this machine has neither a user `postgres` nor `nobody` to run it as; \
         run this as an ordinary user, or make one of them (useradd --system postgres)",
    )?;
    Ok(Some(Account { name: user.name, uid: user.uid.as_raw(), gid: user.gid.as_raw() }))
}

impl Account {
    /// Makes `command` run as this user, without root's groups (std drops them with the uid).
    pub(crate) fn runs(&self, command: &mut Command) {
        command.uid(self.uid).gid(self.gid);
    }

    /// Hands a file or folder to this user.
    pub(crate) fn owns(&self, path: &Path) -> io::Result<()> {
        std::os::unix::fs::chown(path, Some(self.uid), Some(self.gid))
    }

    /// The first folder on the way to `path` (an absolute path; what is not there yet is passed over) that this user
    /// may not enter, by its mode bits.
    pub(crate) fn barred_by(&self, path: &Path) -> Option<PathBuf> {
        let barred = |folder: &&Path| fs::metadata(folder).is_ok_and(|found| found.is_dir() && !self.may_enter(&found));
        let mut folders: Vec<&Path> = path.ancestors().collect();
        folders.reverse();
        folders.iter().find(|folder| barred(folder)).map(|folder| folder.to_path_buf())
    }

    fn may_enter(&self, folder: &fs::Metadata) -> bool {
        // The first class that fits decides alone, as the kernel does it.
        let execute = match (folder.uid() == self.uid, folder.gid() == self.gid) {
            (true, _) => 0o100,
            (false, true) => 0o010,
            (false, false) => 0o001,
        };
        folder.mode() & execute != 0
    }
}

/// Makes a folder, and those above it that are missing, that others may pass through when we are root (PostgreSQL's
/// user must) and that is ours alone otherwise. One that exists is left as it is.
pub(crate) fn make_passable(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        make_passable(parent)?;
    }
    match fs::create_dir(folder) {
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => Ok(()), // another process did
        Err(err) => Err(err),
        Ok(()) => fs::set_permissions(folder, Permissions::from_mode(if is_root() { 0o711 } else { 0o700 })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_class_that_fits_decides_who_may_enter() {
        let folder = std::env::temp_dir().join(format!("account-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&folder).unwrap();
        let inside = folder.join("not/there/yet");
        let found = fs::metadata(&folder).unwrap();
        let account = |uid, gid| Account { name: "somebody".into(), uid, gid };
        let (owner, group) = (account(found.uid(), 1 << 30), account(1 << 30, found.gid()));
        let other = account(1 << 30, 1 << 30);
        for (mode, let_in) in
            [(0o700, [true, false, false]), (0o071, [false, true, true]), (0o601, [false, false, true])]
        {
            fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
            let passed = [&owner, &group, &other].map(|who| who.barred_by(&inside).as_ref() != Some(&folder));
            assert_eq!(passed, let_in, "mode {mode:o}");
        }
        fs::remove_dir(&folder).unwrap();
    }
}
