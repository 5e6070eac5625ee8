//! Checks that the programs in the cache are those that were unpacked there, and that no other user can change them.
//!
//! They run with our rights, which may be root's. So a start first checks each of their folders and files. It must belong
//! to us or to root. Neither the group nor others may write to it. A file must have the size and the SHA-256 noted at
//! unpacking.

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::unistd::geteuid;
use sha2::{Digest as _, Sha256};

/// The file that holds the sums: a line for each file with sum, size and name.
const SUMS: &str = "SHA256SUMS";
/// The rights of the group and of others to write.
const OTHERS_WRITE: u32 = 0o022;

/// Notes the sums of these files of `folder`, by their names in it.
///
/// # Errors
/// Fails when a file cannot be read, or the sums cannot be written.
pub(crate) fn note(folder: &Path, names: &[PathBuf]) -> anyhow::Result<()> {
    let mut sums = String::new();
    for name in names {
        let path = folder.join(name);
        let name = name.to_str().context("a name in the wheel is no UTF-8")?;
        sums += &format!("{} {} {name}\n", sum(&path)?, fs::metadata(&path)?.len());
    }
    let path = folder.join(SUMS);
    fs::write(&path, sums)?;
    Ok(fs::set_permissions(&path, Permissions::from_mode(0o644))?)
}

/// Checks every file of `folder` whose sum was noted, of which `program` must be one.
///
/// # Errors
/// An error names the file or folder that differs.
pub(crate) fn verify(folder: &Path, program: &str) -> anyhow::Result<()> {
    let mut owned = HashSet::new();
    let mut check_once = |path: &Path| if owned.insert(path.to_owned()) { check_owner(path) } else { Ok(()) };
    check_once(folder)?;
    check_once(&folder.join(SUMS))?;
    let sums = fs::read_to_string(folder.join(SUMS)).context("its sums cannot be read")?;
    let mut found = false;
    for line in sums.lines() {
        let mut parts = line.splitn(3, ' ');
        let (Some(noted_sum), Some(noted_size), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
            bail!("its sums are damaged");
        };
        let path = folder.join(name);
        for parent in path.ancestors().take_while(|parent| *parent != folder) {
            check_once(parent)?;
        }
        let size = fs::metadata(&path)?.len().to_string(); // compared first, so that no endless file is read
        if size != noted_size || sum(&path)? != noted_sum {
            bail!("{} is not what was unpacked", path.display());
        }
        found |= name == program;
    }
    if found { Ok(()) } else { bail!("{} was not unpacked", folder.join(program).display()) }
}

/// Checks that a file or folder belongs to us or to root, and that no other user may write to it.
///
/// # Errors
/// Fails when it is not so, or when the file or folder is missing.
pub(crate) fn check_owner(path: &Path) -> anyhow::Result<()> {
    let found = fs::symlink_metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    if found.is_symlink() {
        bail!("{} is a symbolic link", path.display());
    }
    if found.uid() != 0 && found.uid() != geteuid().as_raw() {
        bail!("{} belongs to user {}", path.display(), found.uid());
    }
    if found.mode() & OTHERS_WRITE != 0 {
        bail!("other users may write to {} (mode {:o})", path.display(), found.mode() & 0o7777);
    }
    Ok(())
}

/// SHA-256 in hex.
fn sum(path: &Path) -> anyhow::Result<String> {
    let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex::encode(Sha256::digest(content)))
}
