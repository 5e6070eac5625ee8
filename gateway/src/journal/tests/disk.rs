//! A real disk that is full: a small tmpfs, where the test may mount one.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use super::super::{AppendError, files};
use super::*;

struct Mounted(PathBuf);

impl Mounted {
    /// `None` where this process may not mount.
    fn small(dir: &Path, megabytes: u32) -> Option<Mounted> {
        let options = format!("size={megabytes}m");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "journal-test"]).arg(dir).output();
        mount.is_ok_and(|done| done.status.success()).then(|| Mounted(dir.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the threads of a failed test may still have files open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_refuses_loses_nothing_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_disk) = Mounted::small(dir.path(), 2) else {
        eprintln!("SKIPPED: this process may not mount a tmpfs");
        return;
    };
    // The limit says more than the disk has; the usual segment alone is larger than the disk.
    let limits = Limits::of(1 << 30);
    assert!(limits.segment_bytes > 2 << 20);
    let (journal, _) = open(dir.path(), limits).await;
    assert!(journal.trouble().is_none(), "a smaller segment fits");
    let mut accepted = Vec::new();
    let error = loop {
        match journal.append(entry(u32::try_from(accepted.len()).unwrap(), 20_000)).await {
            Ok(place) => accepted.push(place),
            Err(error) => break error,
        }
        assert!(accepted.len() < 1000);
    };
    assert!(matches!(error, AppendError::DiskFull(_)), "{error}");
    assert!(accepted.len() > 30, "{} entries filled the disk", accepted.len());
    assert!(matches!(journal.trouble().unwrap().problem, AppendError::DiskFull(_)));

    // Still full after a restart, which must not keep what is there from being delivered.
    drop(journal);
    let (journal, recovered) = open(dir.path(), limits).await;
    assert!(recovered.damages.is_empty(), "{recovered:?}");
    assert_eq!(recovered.unpublished, accepted.len() as u64);
    let taken = journal.take(1000, 1 << 30).await;
    assert_eq!(taken.len(), accepted.len());
    for (id, stored) in (0..).zip(&taken) {
        assert!(same(stored, &entry(id, 20_000)));
    }

    journal.mark_confirmed(&accepted).await;
    eventually(|| journal.trouble().is_none()).await;
    let place = journal.append(entry(5000, 20_000)).await.unwrap();
    assert!(same(&journal.read(place).await.unwrap(), &entry(5000, 20_000)));
}

/// An earlier version leaves a journal without a key for receipts.
#[tokio::test]
async fn a_full_disk_without_a_key_for_receipts_keeps_no_entry_from_being_published() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_disk) = Mounted::small(dir.path(), 2) else {
        eprintln!("SKIPPED: this process may not mount a tmpfs");
        return;
    };
    let (journal, _) = open(dir.path(), Limits::of(1 << 20)).await;
    journal.append(entry(1, 500)).await.unwrap();
    drop(journal);
    eventually(|| files::lock(dir.path()).is_ok()).await;
    fs::remove_file(dir.path().join(files::RECEIPT_KEY)).unwrap();
    let mut filler = fs::File::create(dir.path().join("filler")).unwrap();
    while filler.write_all(&[0; 4096]).is_ok() {}
    let (journal, recovered) = open(dir.path(), Limits::of(1 << 20)).await;
    assert_eq!((recovered.unpublished, journal.take(1, 1 << 20).await.len()), (1, 1));
}
