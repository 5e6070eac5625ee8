//! Disks that fill up.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A small disk of its own at a folder, in memory, mounted as long as this lives.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of this size (as mount(8) reads it: `24m`) over a folder, which is made where it is missing. None where
    /// this process may not mount; then the test that needs it is skipped, and says so.
    pub fn mount(folder: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(folder).unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder).output();
        mounted.is_ok_and(|mounted| mounted.status.success()).then(|| SmallDisk(folder.to_owned()))
    }

    /// Whether there is no room for a delivery of 100 kB.
    pub fn is_full(&self) -> bool {
        let system = nix::sys::statvfs::statvfs(&self.0).unwrap();
        system.blocks_available() * system.fragment_size() < 100_000
    }

    /// Makes it larger, or smaller.
    pub fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server may still have files open there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
