//! Core dumps: none. A dump would put the client secrets and the payloads of deliveries on a disk.

use nix::sys::resource::{Resource, setrlimit};

/// Sets the limit of core files to 0 for this process and its children, so that no user but root raises it again.
/// A program that the kernel pipes dumps to (systemd-coredump, apport) heeds that limit by itself.
pub fn forbid() {
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        eprintln!("core dumps cannot be forbidden: {error}");
    }
}
