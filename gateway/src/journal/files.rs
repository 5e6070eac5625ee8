//! The journal's directory: names, the lock, the gateway's id, and how files come and go in it.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::access;
use super::direct::SegmentFile;
use super::format::LARGEST_SEGMENT;

const SEGMENT: &str = "journal";
const MARKS: &str = "marks";
const DAMAGED: &str = "damaged";
/// A file that takes its real name once it is whole.
const UNFINISHED: &str = "new";
pub(super) const LOCK: &str = "lock";
pub(super) const ID: &str = "gateway-id";
pub(super) const RECEIPT_KEY: &str = "receipt-key";
/// The most bytes that are read of a file with one line.
const LINE: usize = 256;
/// Random bytes in a gateway's id.
const ID_BYTES: usize = 8;

/// What a file in the directory is, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Segment,
    Marks,
    Damaged,
    Unfinished,
}

fn named(dir: &Path, number: u64, extension: &str) -> PathBuf {
    dir.join(format!("{number:012}.{extension}"))
}

pub(super) fn segment(dir: &Path, number: u64) -> PathBuf {
    named(dir, number, SEGMENT)
}

pub(super) fn marks(dir: &Path, number: u64) -> PathBuf {
    named(dir, number, MARKS)
}

pub(super) fn damaged(dir: &Path, number: u64) -> PathBuf {
    named(dir, number, DAMAGED)
}

/// The journal's files: kind and number. Others' files are left alone.
pub(super) fn list(dir: &Path) -> io::Result<Vec<(Kind, u64)>> {
    let mut files = Vec::new();
    for file in fs::read_dir(dir)? {
        let name = file?.file_name();
        let Some((number, extension)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
        let kind = match extension {
            SEGMENT => Kind::Segment,
            MARKS => Kind::Marks,
            DAMAGED => Kind::Damaged,
            "marks.new" => Kind::Unfinished,
            _ => continue,
        };
        // Only names that are written here: `7.journal` is somebody else's, and after the last number there is none.
        if let Ok(number) = number.parse()
            && named(dir, number, extension).file_name() == Some(&name)
            && number < u64::MAX
        {
            files.push((kind, number));
        }
    }
    files.sort_unstable_by_key(|&(kind, number)| (number, kind));
    Ok(files)
}

/// Every file that the journal makes in `dir`, by its path.
pub(super) fn all(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let path = |(kind, number)| match kind {
        Kind::Segment => segment(dir, number),
        Kind::Marks => marks(dir, number),
        Kind::Damaged => damaged(dir, number),
        Kind::Unfinished => marks(dir, number).with_extension("marks.new"),
    };
    let unfinished = |name| format!("{name}.{UNFINISHED}");
    let others = [LOCK.to_owned(), ID.to_owned(), RECEIPT_KEY.to_owned(), unfinished(ID), unfinished(RECEIPT_KEY)];
    let others = others.map(|name| dir.join(name));
    let others = others.into_iter().filter(|path| fs::symlink_metadata(path).is_ok());
    Ok(list(dir)?.into_iter().map(path).chain(others).collect())
}

/// The bytes of a file. A file that is longer than any segment was not written by the journal: it may be a hole, and only
/// its allocated blocks count.
pub(super) fn taken(found: &Metadata) -> u64 {
    if found.len() <= LARGEST_SEGMENT { found.len() } else { found.blocks() * 512 }
}

/// Makes the names in `dir` last: a file that was synced can still be lost with its name.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes the directory and those above it where they are missing, and their names last.
pub(super) fn create_dir(dir: &Path) -> io::Result<()> {
    let missing: Vec<_> =
        dir.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.is_dir()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    access::create_directory(dir)?;
    for made in missing {
        let parent = made.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // The parent may be one that we may write to but not open for reading; then the name is as lasting as the
        // system makes it.
        let _ = sync_dir(parent);
    }
    Ok(())
}

/// A new segment file of `size` bytes, all zeros, its space reserved where the file system can do that, name and space
/// already lasting.
pub(super) fn create_segment(dir: &Path, number: u64, size: u64) -> io::Result<SegmentFile> {
    let path = segment(dir, number);
    let file = access::create_new(&path)?;
    let mut file = SegmentFile::of(file, &path);
    let made = reserve(&file.cached, size).and_then(|()| file.try_out());
    match made.and_then(|()| file.cached.sync_all()).and_then(|()| sync_dir(dir)) {
        Ok(()) => Ok(file),
        Err(error) => {
            // A full disk should not hold the file that did not fit on it.
            let _ = fs::remove_file(&path);
            Err(error)
        }
    }
}

fn reserve(file: &File, size: u64) -> io::Result<()> {
    match fs4::FileExt::allocate(file, size) {
        Ok(()) => {}
        // NFS before 4.2, ZFS and others cannot. The file works without it: a full disk is noticed later, when
        // writing, and each sync has a little more to do.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
        Err(error) => return Err(error),
    }
    if file.metadata()?.len() < size { file.set_len(size) } else { Ok(()) }
}

/// Writes a file that appears whole or not at all. Lasting only with `sync`.
pub(super) fn write_whole(dir: &Path, path: &Path, content: &[u8], sync: bool) -> io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".");
    unfinished.push(UNFINISHED);
    let unfinished = PathBuf::from(unfinished);
    remove(&unfinished)?;
    let mut file = access::create_new(&unfinished)?;
    file.write_all(content)?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&unfinished, path)?;
    if sync { sync_dir(dir) } else { Ok(()) }
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The lock on the directory. The kernel lets go of it when its holder ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "it is held, not used")] File);

/// Why the lock was not to be had.
#[derive(Debug)]
pub(super) enum LockError {
    /// Somebody else holds it; their process id, if they wrote it.
    Held(Option<u32>),
    Io(io::Error),
}

pub(super) fn lock(dir: &Path) -> Result<Lock, LockError> {
    let path = dir.join(LOCK);
    let file = access::open(OpenOptions::new().read(true).write(true).create(true).truncate(false), &path);
    let mut file = file.map_err(LockError::Io)?;
    access::own(&file);
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(LockError::Held(process_id(&file)));
        }
        Err(TryLockError::Error(error)) => return Err(LockError::Io(error)),
    }
    // Only for the message above; a disk too full for it must not keep the gateway from publishing what it has.
    let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(Lock(file))
}

/// The process id in a lock's file, if there is one.
fn process_id(file: &File) -> Option<u32> {
    let mut holder = String::new();
    let _ = file.take(LINE as u64).read_to_string(&mut holder);
    holder.trim().parse().ok()
}

/// Who holds the lock, without taking it: `Some` with the process id, if they wrote it.
pub(super) fn holder(dir: &Path) -> io::Result<Option<Option<u32>>> {
    let file = match access::open(OpenOptions::new().read(true), &dir.join(LOCK)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // Shared, and let go of at once when the file is closed: two who look do not take each other for a holder.
    match file.try_lock_shared() {
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => Ok(Some(process_id(&file))),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// The gateway's id, made at the first start and kept. A token of lower-case letters and digits.
///
/// A file that holds none (somebody edited it) is replaced: receipts for the old id get lost, which costs one repeat
/// of each entry they were for.
pub(super) fn gateway_id(dir: &Path) -> io::Result<String> {
    if let Some(id) = read_gateway_id(dir)? {
        return Ok(id);
    }
    let mut random = [0; ID_BYTES];
    getrandom::fill(&mut random)?;
    let id = hex::encode(random);
    write_whole(dir, &dir.join(ID), format!("{id}\n").as_bytes(), true)?;
    Ok(id)
}

/// The id that is kept there, if there is a valid one.
pub(super) fn read_gateway_id(dir: &Path) -> io::Result<Option<String>> {
    let text = match access::read_small(&dir.join(ID), LINE) {
        Ok(text) => String::from_utf8(text).unwrap_or_default(),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => return Ok(None),
        Err(error) => return Err(error),
    };
    let id = text.trim();
    let token = id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    Ok((token && !id.is_empty() && id.len() <= 64).then(|| id.to_owned()))
}

/// The key of the tags in receipts, made at the first start and kept: 32 random bytes, in hex, for the gateway's user
/// alone. A file that holds none is replaced: receipts under the old key are refused, which costs one repeat of each
/// entry they were for. A key that cannot be written, as on a full disk, serves this process alone: a start must not
/// fail for it.
pub(super) fn receipt_key(dir: &Path) -> io::Result<[u8; 32]> {
    if let Some(key) = read_receipt_key(dir)? {
        return Ok(key);
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key)?;
    let path = dir.join(RECEIPT_KEY);
    if let Err(error) = write_whole(dir, &path, format!("{}\n", hex::encode(key)).as_bytes(), true) {
        tracing::warn!(
            file = %path.display(), %error,
            "the key of receipts is not kept: the next start makes another, and repeats entries whose receipts come after it"
        );
    }
    Ok(key)
}

/// The key that is kept there, if there is a valid one.
pub(super) fn read_receipt_key(dir: &Path) -> io::Result<Option<[u8; 32]>> {
    let text = match access::read_small(&dir.join(RECEIPT_KEY), LINE) {
        Ok(text) => String::from_utf8(text).unwrap_or_default(),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut key = [0; 32];
    Ok(hex::decode_to_slice(text.trim(), &mut key).is_ok().then_some(key))
}
