//! Segment files past the page cache, where the file system can do that.
//!
//! What is journalled is read at most once more, and soon: copying it into pages that the kernel has to find, and has to
//! give back, costs more than the disk does. Direct I/O (`O_DIRECT`, open(2)) moves it straight between the disk and our
//! memory. It asks for whole blocks: of the file, and of memory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::format::BLOCK;

const BLOCK_BYTES: usize = BLOCK as usize;

/// A segment's file.
#[derive(Debug)]
pub(super) struct SegmentFile {
    /// Through the page cache, as any file. The kernel keeps what is seen either way the same.
    pub(super) cached: File,
    /// Past it; `None` where the file system cannot do that.
    direct: Option<File>,
}

impl SegmentFile {
    /// `file`, which is the one at `path`.
    pub(super) fn of(file: File, path: &Path) -> SegmentFile {
        SegmentFile { cached: file, direct: open_direct(path).ok() }
    }

    /// The same without direct I/O.
    pub(super) fn through_cache(file: File) -> SegmentFile {
        SegmentFile { cached: file, direct: None }
    }

    /// Writes whole blocks at a multiple of [`BLOCK`], and waits for the disk.
    pub(super) fn write(&self, blocks: &[u8], at: u64) -> io::Result<()> {
        self.blockwise().write_all_at(blocks, at)
    }

    /// Makes what was written last, however it was.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.blockwise().sync_data()
    }

    /// For whole blocks in aligned memory only.
    fn blockwise(&self) -> &File {
        self.direct.as_ref().unwrap_or(&self.cached)
    }

    /// A new file's first block, written as zeros as it has to be blank. A file system that takes the flag and then
    /// refuses to write so (EINVAL) is found out here, and written to through the cache from then on.
    pub(super) fn try_out(&mut self) -> io::Result<()> {
        match self.write(Blocks::new(BLOCK_BYTES).bytes(), 0) {
            Err(error) if self.direct.is_some() && error.kind() == io::ErrorKind::InvalidInput => {
                self.direct = None;
                Ok(())
            }
            written => written,
        }
    }

    /// Fills `blocks` with the `length` bytes from `from` on, and says where in it they are. Waits for the disk.
    ///
    /// # Errors
    /// What the disk says; [`io::ErrorKind::UnexpectedEof`] where the file ends before them.
    pub(super) fn read(&self, blocks: &mut Blocks, from: u64, length: usize) -> io::Result<usize> {
        let skip = usize::try_from(from % BLOCK).expect("a block is small");
        let buffer = &mut blocks.bytes_mut()[..(skip + length).next_multiple_of(BLOCK_BYTES)];
        let mut filled = 0;
        while filled < skip + length {
            // Only where the file ends within a block, less than a whole block comes, and what follows cannot be asked for.
            match self.blockwise().read_at(&mut buffer[filled..], from - skip as u64 + filled as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    filled += read;
                    if self.direct.is_some() && filled < skip + length && !filled.is_multiple_of(BLOCK_BYTES) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(skip)
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    OpenOptions::new().read(true).write(true).custom_flags(nix::fcntl::OFlag::O_DIRECT.bits()).open(path)
}

/// Other systems have other ways, and nobody runs many deliveries there.
#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Memory in whole blocks, beginning at a multiple of [`BLOCK`].
#[derive(Debug, Default)]
pub(super) struct Blocks {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Blocks {
    /// Zeros: `length` bytes, rounded up to whole blocks.
    pub(super) fn new(length: usize) -> Blocks {
        let length = length.next_multiple_of(BLOCK_BYTES);
        let memory = vec![0; length + BLOCK_BYTES - 1];
        let address = memory.as_ptr().addr();
        Blocks { start: address.next_multiple_of(BLOCK_BYTES) - address, memory, length }
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..][..self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.length]
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_and_begin_at_one() {
        for length in [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 100_000] {
            let blocks = Blocks::new(length);
            assert!(blocks.bytes().as_ptr().addr().is_multiple_of(BLOCK_BYTES));
            assert!(blocks.len() >= length && blocks.len() < length + BLOCK_BYTES);
            assert_eq!(blocks.bytes(), vec![0; blocks.len()]);
        }
    }

    #[test]
    fn what_is_written_past_the_cache_is_read_either_way_from_anywhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let mut direct = SegmentFile::of(file(), &path);
        direct.try_out().unwrap();
        let mut blocks = Blocks::new(4 * BLOCK_BYTES);
        for (byte, n) in blocks.bytes_mut().iter_mut().zip(0_usize..) {
            *byte = (n / 7 % 251) as u8;
        }
        let content = blocks.bytes().to_vec();
        direct.write(blocks.bytes(), 0).unwrap();
        direct.sync().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), content);
        // As a sealed segment, whose index ends anywhere.
        let end = content.len() - 100;
        direct.cached.set_len(end as u64).unwrap();
        for segment in [direct, SegmentFile::through_cache(file())] {
            for (from, length) in [(0, end), (1, 10), (4095, 2), (4096, 4096), (5000, end - 5000), (end - 1, 1)] {
                let mut blocks = Blocks::new(length + BLOCK_BYTES);
                let at = segment.read(&mut blocks, from as u64, length).unwrap();
                assert_eq!(&blocks.bytes()[at..at + length], &content[from..from + length], "{length} from {from}");
            }
            let beyond = segment.read(&mut Blocks::new(2 * BLOCK_BYTES), end as u64 - 5, 6).unwrap_err();
            assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
