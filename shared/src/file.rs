//! Files that settings name: opened without waiting for another program.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::fcntl::OFlag;

/// Opens a regular file to read it. Symbolic links are followed: Kubernetes and systemd give secrets so.
///
/// # Errors
/// Fails when the system does, and for a FIFO, a device or a directory: those could hold the program up.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // Non-blocking, or the open of a FIFO waits for its other end. A regular file is opened as without it.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
}

/// Reads a whole regular file.
///
/// # Errors
/// As [`open_regular`].
pub fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    open_regular(path)?.read_to_end(&mut content)?;
    Ok(content)
}
