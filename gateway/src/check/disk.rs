//! The journal's directory and its disk: every 202 rests on them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statfs::{Statfs, statfs};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access, geteuid};
use shared::check::{Finding, size};

use crate::journal::{Outside, foreign_owner, later_versions, open_to_others};
use crate::settings::JournalSettings;

/// How often the probe is synced, and what is written each time: about one delivery.
const SYNCS: usize = 8;
const SYNCED_BYTES: usize = 16 << 10;
/// The probe ends after this time, however far it is.
const PROBE_FOR: Duration = Duration::from_secs(4);
/// Every answer waits for one sync, or for two where one has just begun. Sentry waits a second.
const SLOW: Duration = Duration::from_millis(100);

/// Looks at it. Blocks.
pub(super) fn look(journal: &JournalSettings) -> Vec<Finding> {
    let JournalSettings { dir, limits, .. } = journal;
    let what = format!("journal {}", dir.display());
    let (there, found) = directory(&what, dir);
    let mut findings = vec![found];
    let Some(there) = there else { return findings };
    let outside = if there == *dir { Outside::look(dir).ok() } else { None };
    if let Some(held_by) = outside.as_ref().and_then(|outside| outside.held_by) {
        let id = held_by.map(|id| format!(" (process {id})")).unwrap_or_default();
        let detail = format!("a gateway has it open{id}: right if it is the one that these settings are for");
        findings.push(Finding::ok("journal lock", detail));
    }
    if there == *dir {
        findings.push(modes(dir));
        findings.push(format(dir));
    }
    findings.push(kind(&there));
    let taken = outside.map_or(0, |outside| outside.bytes);
    findings.push(room(&there, taken, limits.max_bytes_on_disk, limits.segment_bytes));
    if there == *dir {
        findings.push(probe(dir));
    }
    findings
}

/// The finding where [`look`] has no answer in time.
pub(super) fn hangs(dir: &Path, within: Duration) -> Finding {
    let detail = format!("no answer within {} s of its disk", within.as_secs());
    let advice = "no delivery would be taken while it hangs: look at the disk, or at the server of its file system";
    Finding::problem(format!("journal {}", dir.display()), detail, advice)
}

/// Whether the directory can be used, and what stands for it: itself, or the nearest above that is there.
fn directory(what: &str, dir: &Path) -> (Option<PathBuf>, Finding) {
    let advice = "GATEWAY_JOURNAL_DIR names a directory of this gateway's own, which its user may write to";
    let there = dir.ancestors().find(|above| above.as_os_str().is_empty() || fs::symlink_metadata(above).is_ok());
    let there = match there {
        Some(above) if above.as_os_str().is_empty() => PathBuf::from("."),
        Some(above) => above.to_owned(),
        None => PathBuf::from("/"),
    };
    if !there.is_dir() {
        return (None, Finding::problem(what, format!("{} is no directory", there.display()), advice));
    }
    let may = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
    if let Err(error) = access(&there, may) {
        let detail = format!("{} cannot be written to: {}", there.display(), error.desc());
        return (None, Finding::problem(what, detail, advice));
    }
    let detail = if there == *dir { "there, and may be written to" } else { "not there yet: the gateway makes it" };
    (Some(there), Finding::ok(what, detail))
}

/// The owner of the journal, and the files of it that other users have rights on.
fn modes(dir: &Path) -> Finding {
    let what = "journal modes";
    let (owner, open) = match (foreign_owner(dir), open_to_others(dir)) {
        (Ok(owner), Ok(open)) => (owner, open),
        (Err(error), _) | (_, Err(error)) => {
            return Finding::warning(what, format!("the system does not tell: {error}"), "look with ls -la");
        }
    };
    if let Some(owner) = owner {
        let detail = format!("the directory belongs to user {owner}, who can read and replace what is in it");
        let advice = "chown -R it to the gateway's user, or have GATEWAY_JOURNAL_DIR name another directory";
        return if geteuid().is_root() {
            Finding::warning(what, detail, advice)
        } else {
            Finding::problem(what, detail, advice)
        };
    }
    let Some((first, mode)) = open.first() else { return Finding::ok(what, "its owner's alone") };
    let more = match open.len() {
        1 => String::new(),
        number => format!(", and {} more", number - 1),
    };
    let detail = format!("the group or others have rights on {} (mode {mode:04o}){more}", first.display());
    let advice = "deliveries lie there as they came: chmod 700 the directory and chmod 600 its files; the next start of a \
                  gateway does so, too";
    Finding::warning(what, detail, advice)
}

/// The version of the format of what is there. A start refuses a later one, and touches nothing.
fn format(dir: &Path) -> Finding {
    let what = "journal format";
    let later = match later_versions(dir) {
        Ok(later) => later,
        Err(error) => return Finding::warning(what, format!("a file cannot be read: {error}"), "look with ls -la"),
    };
    let Some((file, version)) = later.first() else { return Finding::ok(what, "nothing of a later version") };
    let detail = format!("{} has version {version}, which this gateway does not know", file.display());
    let advice = "run the version that wrote it, or a newer one; this one would not start on it";
    Finding::problem(what, detail, advice)
}

/// What a file system means for a journal.
enum Kind {
    Disk(String),
    Memory(&'static str),
    Layers,
    Network(&'static str),
}

fn kind(there: &Path) -> Finding {
    let what = "journal file system";
    let found = match statfs(there) {
        Ok(found) => found,
        Err(error) => return Finding::warning(what, format!("the system does not tell: {error}"), "look at its mount"),
    };
    match kind_of(&found) {
        Kind::Disk(name) => Finding::ok(what, name),
        Kind::Memory(name) => {
            let advice = "put GATEWAY_JOURNAL_DIR on a disk: what is in memory is gone with the machine or the container, and \
                          a 202 was promised to last";
            Finding::warning(what, format!("{name}, which is memory"), advice)
        }
        Kind::Layers => {
            let advice = "mount a volume at GATEWAY_JOURNAL_DIR: a container's own layer goes with the container";
            Finding::warning(what, "overlay, as of a container's own file system", advice)
        }
        Kind::Network(name) => {
            let advice = "a local disk answers faster and fails less; a sync that takes a second is a delivery lost";
            Finding::warning(what, name, advice)
        }
    }
}

/// By the magic number that Linux gives each (statfs(2), linux/magic.h).
#[cfg(target_os = "linux")]
fn kind_of(found: &Statfs) -> Kind {
    use nix::sys::statfs as is;
    // What nix has no name for. As the kernel writes them; the type's width and sign differ between platforms.
    let number = u32::try_from(i128::from(found.filesystem_type().0) & 0xffff_ffff).unwrap_or(0);
    match found.filesystem_type() {
        is::TMPFS_MAGIC => Kind::Memory("tmpfs"),
        is::OVERLAYFS_SUPER_MAGIC => Kind::Layers,
        is::NFS_SUPER_MAGIC => Kind::Network("NFS, over the network"),
        is::SMB_SUPER_MAGIC => Kind::Network("SMB, over the network"),
        is::FUSE_SUPER_MAGIC => Kind::Network("FUSE, often over the network"),
        is::EXT4_SUPER_MAGIC => Kind::Disk("ext4".into()),
        is::BTRFS_SUPER_MAGIC => Kind::Disk("btrfs".into()),
        is::F2FS_SUPER_MAGIC => Kind::Disk("f2fs".into()),
        _ => match number {
            0x5846_5342 => Kind::Disk("xfs".into()),
            0x2fc1_2fc1 => Kind::Disk("zfs".into()),
            0x8584_58f6 => Kind::Memory("ramfs"),
            0xff53_4d42 | 0xfe53_4d42 => Kind::Network("SMB, over the network"),
            0x00c3_6400 => Kind::Network("Ceph, over the network"),
            0x0102_1997 => Kind::Network("9p, a folder of another system"),
            other => Kind::Disk(format!("kind {other:#x}, not known to be memory or a network")),
        },
    }
}

/// By name.
#[cfg(not(target_os = "linux"))]
fn kind_of(found: &Statfs) -> Kind {
    match found.filesystem_type_name() {
        "tmpfs" => Kind::Memory("tmpfs"),
        "nfs" => Kind::Network("NFS, over the network"),
        "smbfs" => Kind::Network("SMB, over the network"),
        name => Kind::Disk(name.to_owned()),
    }
}

fn room(there: &Path, taken: u64, max_bytes: u64, segment_bytes: u64) -> Finding {
    let what = "journal space";
    let free = match statvfs(there) {
        #[allow(clippy::useless_conversion, reason = "both are narrower on some platforms")]
        Ok(found) => u64::from(found.blocks_available()).saturating_mul(u64::from(found.fragment_size())),
        Err(error) => return Finding::warning(what, format!("the system does not tell: {error}"), "look with df"),
    };
    let detail = format!("{} free, {} taken by the journal; it may take {}", size(free), size(taken), size(max_bytes));
    // At its limit, a journal makes no further segment.
    let makes_another = taken.saturating_add(segment_bytes) <= max_bytes || taken < segment_bytes;
    if makes_another && free < segment_bytes {
        let advice = format!(
            "make room: the journal's next segment of {} does not fit, and without it every delivery is answered 503",
            size(segment_bytes)
        );
        return Finding::problem(what, detail, advice);
    }
    if free.saturating_add(taken) < max_bytes {
        let advice = "the disk will be full before the journal is: deliveries are answered 503 from then on. Lower \
                      GATEWAY_JOURNAL_MAX_BYTES or enlarge the disk";
        return Finding::warning(what, detail, advice);
    }
    Finding::ok(what, detail)
}

/// A file that goes when this does.
struct Probe(PathBuf);

impl Drop for Probe {
    fn drop(&mut self) {
        // Left over, it is 128 KiB under a name that says what it was.
        let _ = fs::remove_file(&self.0);
    }
}

/// Writes and syncs as the journal does, and says how long that takes.
fn probe(dir: &Path) -> Finding {
    let what = "journal sync";
    match time_syncs(dir) {
        Ok(mut took) => {
            took.sort();
            let (median, slowest) = (took[took.len() / 2], took[took.len() - 1]);
            let detail =
                format!("{median:.1?} for {} (slowest {slowest:.1?} of {})", size(SYNCED_BYTES as u64), took.len());
            if median < SLOW {
                return Finding::ok(what, detail);
            }
            let advice = "every answer waits for a sync, and Sentry waits a second: take a faster disk";
            Finding::warning(what, detail, advice)
        }
        Err(error) => {
            let advice = "no delivery would be taken: is the disk full, read-only or failing?";
            Finding::problem(what, format!("cannot write a file there: {error}"), advice)
        }
    }
}

/// At least one, where there is no error.
fn time_syncs(dir: &Path) -> io::Result<Vec<Duration>> {
    let path = dir.join(format!("check-{}.probe", std::process::id()));
    let mut file: File = OpenOptions::new().write(true).create_new(true).open(&path)?;
    let _probe = Probe(path);
    let begin = Instant::now();
    let mut took = Vec::new();
    while took.len() < SYNCS && (took.is_empty() || begin.elapsed() < PROBE_FOR) {
        file.write_all(&[0x5a; SYNCED_BYTES])?;
        let sync = Instant::now();
        file.sync_data()?;
        took.push(sync.elapsed());
    }
    Ok(took)
}

#[cfg(test)]
mod tests {
    use shared::check::State;

    use super::*;
    use crate::journal::Limits;

    fn settings(dir: &Path, max_bytes: u64) -> JournalSettings {
        JournalSettings { dir: dir.to_owned(), limits: Limits::of(max_bytes), confirm_after: Duration::ZERO }
    }

    fn state_of(findings: &[Finding], what: &str) -> Option<State> {
        findings.iter().find(|finding| finding.what.starts_with(what)).map(|finding| finding.state)
    }

    #[test]
    fn a_directory_that_is_missing_is_looked_for_above_and_nothing_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let findings = look(&settings(&folder.path().join("not/yet"), 1 << 20));
        assert_eq!(state_of(&findings, "journal /"), Some(State::Ok), "{findings:?}");
        assert_eq!(state_of(&findings, "journal sync"), None, "nothing is written outside of it");
        let findings = look(&settings(folder.path(), 1 << 20));
        assert_eq!(state_of(&findings, "journal sync"), Some(State::Ok), "{findings:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn what_cannot_hold_a_journal_is_a_problem() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for dir in [file.clone(), file.join("below"), PathBuf::from("/proc/self/journal")] {
            let findings = look(&settings(&dir, 1 << 20));
            assert!(findings.iter().any(|finding| finding.state == State::Problem), "{dir:?}: {findings:?}");
        }
    }

    #[test]
    fn more_than_the_disk_has_is_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        let room = |bytes| state_of(&look(&settings(folder.path(), bytes)), "journal space");
        assert_eq!((room(4 << 20), room(1 << 60)), (Some(State::Ok), Some(State::Warning)));
        assert_eq!(super::room(folder.path(), 0, 1 << 60, 1 << 60).state, State::Problem, "not one segment");
        // A journal that is there needs room for its next segment, unless it has all that it may take.
        let taken = |taken| super::room(folder.path(), taken, 3 << 60, 1 << 60).state;
        assert_eq!((taken(1 << 60), taken(3 << 60)), (State::Problem, State::Ok));
    }
}
