//! Rights on the journal's directory and its files, and the one way to open them.
//!
//! Deliveries lie here as they came, so the directory has mode 0700 and each file 0600, whatever the umask. Opening the
//! journal narrows modes that an earlier version left open. A file that is opened is never a symbolic
//! link (it could lead a write elsewhere), nor a FIFO or a device (it could hold the start up).

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::geteuid;

use super::files;
use super::recover::OpenError;

const DIRECTORY: u32 = 0o700;
const FILE: u32 = 0o600;
/// The rights of the group and of others.
const OTHERS: u32 = 0o077;
/// The mode bits that are rights, and the sticky bit.
const MODE: u32 = 0o7777;
const STICKY: u32 = 0o1000;
const OTHERS_WRITE: u32 = 0o002;

/// Opens a file of the journal with `options`.
///
/// # Errors
/// Fails when the system does, or when `path` names no regular file.
pub(super) fn open(options: &OpenOptions, path: &Path) -> io::Result<File> {
    // Non-blocking, or the open of a FIFO waits for its other end. A regular file is opened as without it.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let opened = options.clone().mode(FILE).custom_flags(flags.bits()).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(number) if number == Errno::ELOOP as i32 => {
            io::Error::other("it is a symbolic link, and the journal follows none: remove it")
        }
        _ => error,
    })?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file: remove it")) }
}

/// Makes a file that was not there, readable by its owner alone.
///
/// # Errors
/// Fails when the system does.
pub(super) fn create_new(path: &Path) -> io::Result<File> {
    let file = open(OpenOptions::new().read(true).write(true).create_new(true), path)?;
    own(&file);
    Ok(file)
}

/// Gives a file that was just opened the mode of the journal's files. The umask may have taken the owner's rights, too.
/// A file system without modes, or a file of another user's, is used as it is.
pub(super) fn own(file: &File) {
    let _ = file.set_permissions(Permissions::from_mode(FILE));
}

/// The content of a small file of the journal.
///
/// # Errors
/// Fails when the system does, or with [`io::ErrorKind::InvalidData`] when the file has more than `limit` bytes.
pub(super) fn read_small(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    open(OpenOptions::new().read(true), path)?.take(limit as u64 + 1).read_to_end(&mut content)?;
    if content.len() > limit { Err(io::ErrorKind::InvalidData.into()) } else { Ok(content) }
}

/// Makes the directory if it is missing.
///
/// # Errors
/// Fails when the system does.
pub(super) fn create_directory(dir: &Path) -> io::Result<()> {
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    match DirBuilder::new().mode(DIRECTORY).create(dir) {
        Ok(()) => fs::set_permissions(dir, Permissions::from_mode(DIRECTORY)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// The owner of the directory, if that is neither this process's user nor root.
///
/// # Errors
/// Fails when the system does.
pub fn foreign_owner(dir: &Path) -> io::Result<Option<u32>> {
    let owner = fs::metadata(dir)?.uid();
    Ok((owner != 0 && owner != geteuid().as_raw()).then_some(owner))
}

/// The directory and the files of the journal that the group or others have rights on, and their modes.
///
/// # Errors
/// Fails when the directory cannot be read.
pub fn open_to_others(dir: &Path) -> io::Result<Vec<(PathBuf, u32)>> {
    let mut found = vec![(dir.to_owned(), fs::metadata(dir)?)];
    // The gateway may remove a file meanwhile: that one is left out.
    found
        .extend(files::all(dir)?.into_iter().filter_map(|path| Some((path.clone(), fs::symlink_metadata(path).ok()?))));
    let modes =
        found.into_iter().filter(|(_, found)| !found.is_symlink()).map(|(path, found)| (path, found.mode() & MODE));
    Ok(modes.filter(|(_, mode)| mode & OTHERS != 0).collect())
}

/// Checks the directory's owner, and takes from all others their rights on it.
///
/// Root may run on the directory of another user, as containers do with one of the host's: that is only warned of.
///
/// # Errors
/// Fails with [`OpenError::ForeignOwner`], because that owner could read and replace its files, or when the system does.
pub(super) fn tighten_directory(dir: &Path) -> Result<(), OpenError> {
    if let Some(owner) = foreign_owner(dir).map_err(OpenError::at(dir))? {
        let user = geteuid();
        if !user.is_root() {
            return Err(OpenError::ForeignOwner { dir: dir.to_owned(), owner, user: user.as_raw() });
        }
        tracing::warn!(
            dir = %dir.display(),
            "the journal's directory belongs to user {owner}, who can read and replace what is in it: chown it to root"
        );
    }
    let found = fs::metadata(dir).map_err(OpenError::at(dir))?;
    let mode = found.mode() & MODE;
    if mode & OTHERS == 0 {
        return Ok(());
    }
    if is_shared(dir, &found).map_err(OpenError::at(dir))? {
        tracing::warn!(
            dir = %dir.display(),
            "the journal's directory holds other directories, too, and keeps its mode {mode:04o}: give the journal one of its own"
        );
        return Ok(());
    }
    match fs::set_permissions(dir, Permissions::from_mode(DIRECTORY)) {
        Ok(()) => {
            tracing::info!(dir = %dir.display(), "the mode of the journal's directory was {mode:04o}, and is 0700 now")
        }
        // A volume of root's that is open to this user's group. The files are this user's alone.
        Err(error) if mode & OTHERS_WRITE == 0 => {
            tracing::info!(dir = %dir.display(), %error, "the journal's directory keeps its mode {mode:04o}");
        }
        Err(error) => tracing::warn!(
            dir = %dir.display(), %error,
            "every user of this machine may write to the journal's directory, and its mode {mode:04o} cannot be changed: chmod 700 it"
        ),
    }
    Ok(())
}

/// Tells if a directory serves other programs, too, as /tmp does. The journal does not change the mode of such a directory.
fn is_shared(dir: &Path, found: &Metadata) -> io::Result<bool> {
    if found.mode() & STICKY != 0 {
        return Ok(true);
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.file_name() != "lost+found" {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Takes from all others their rights on the journal's files. A file on which that fails is warned of, and used all the
/// same.
pub(super) fn tighten_files(dir: &Path) {
    for path in files::all(dir).unwrap_or_default() {
        let narrow = || {
            let found = fs::symlink_metadata(&path)?;
            if !found.is_file() || found.mode() & OTHERS == 0 {
                return Ok(());
            }
            open(OpenOptions::new().read(true), &path)?.set_permissions(Permissions::from_mode(FILE))
        };
        if let Err(error) = narrow() {
            tracing::warn!(file = %path.display(), %error, "other users have rights on a file of the journal: chmod 600 it");
        }
    }
}
