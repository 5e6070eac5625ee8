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
use super::stall::{InFlight, Operation};

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
    /// `file`, which is the one at `path`, to be written to.
    pub(super) fn of(file: File, path: &Path) -> SegmentFile {
        SegmentFile { cached: file, direct: open_direct(path, OpenOptions::new().read(true).write(true)).ok() }
    }

    /// `file`, which is the one at `path`, to be read.
    pub(super) fn to_read(file: File, path: &Path) -> SegmentFile {
        SegmentFile { cached: file, direct: open_direct(path, OpenOptions::new().read(true)).ok() }
    }

    /// The same without direct I/O.
    #[cfg(test)]
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
fn open_direct(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;

    use nix::fcntl::OFlag;
    let flags = OFlag::O_DIRECT | OFlag::O_NOFOLLOW;
    options.custom_flags(flags.bits()).open(path)
}

/// Other systems have other ways, and nobody runs many deliveries there.
#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path, _: &mut OpenOptions) -> io::Result<File> {
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

/// Bytes on their way into a segment's file, one behind the other: copied together into blocks, so that all of a batch is
/// a write or few, and past the page cache.
pub(super) struct Output<'a> {
    file: &'a SegmentFile,
    blocks: &'a mut Blocks,
    /// How much of the blocks is filled.
    filled: usize,
    /// Where in the file the first of them goes.
    at: u64,
    /// Told of each write.
    in_flight: &'a InFlight,
}

impl<'a> Output<'a> {
    /// Into `file` from `at` on, a multiple of [`BLOCK`], through `blocks`, of which there is at least one.
    pub(super) fn new(file: &'a SegmentFile, at: u64, blocks: &'a mut Blocks, in_flight: &'a InFlight) -> Self {
        Output { file, blocks, filled: 0, at, in_flight }
    }

    pub(super) fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = &mut self.blocks.bytes_mut()[self.filled..];
            let (now, rest) = bytes.split_at(bytes.len().min(room.len()));
            room[..now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = rest;
            if self.filled == self.blocks.len() {
                self.write()?;
            }
        }
        Ok(())
    }

    /// Zeros up to the next block.
    pub(super) fn fill_block(&mut self) {
        let end = self.filled.next_multiple_of(BLOCK_BYTES);
        self.blocks.bytes_mut()[self.filled..end].fill(0);
        self.filled = end;
    }

    fn write(&mut self) -> io::Result<()> {
        let writing = self.in_flight.begin(Operation::Write);
        self.file.write(&self.blocks.bytes()[..self.filled], self.at)?;
        drop(writing);
        self.at += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Everything is in the file when this returns, and not yet synced.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.fill_block();
        self.write()
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
    #[cfg(target_os = "linux")]
    fn a_file_system_that_refuses_direct_writes_is_written_to_through_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let cached = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        // A file that says EINVAL to zeros, as such a file system does.
        let refuses = OpenOptions::new().write(true).open("/proc/self/coredump_filter").unwrap();
        let mut file = SegmentFile { cached, direct: Some(refuses) };
        file.try_out().unwrap();
        assert!(file.direct.is_none());
        file.try_out().unwrap();
        assert_eq!(file.cached.metadata().unwrap().len(), BLOCK);
        // Any other error is one.
        let read_only = std::fs::File::open(&path).unwrap();
        SegmentFile::through_cache(read_only).try_out().unwrap_err();
    }

    #[test]
    fn whatever_is_put_into_a_file_lies_there_one_behind_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        let file = SegmentFile::of(file, &path);
        let mut blocks = Blocks::new(2 * BLOCK_BYTES);
        let mut expected = vec![0; BLOCK_BYTES];
        for lengths in [&[1][..], &[100, 3000, 0, 30_000, 7], &[2 * BLOCK_BYTES], &[BLOCK_BYTES - 1, 1], &[]] {
            let in_flight = InFlight::default();
            let mut output = Output::new(&file, expected.len() as u64, &mut blocks, &in_flight);
            for (length, byte) in lengths.iter().zip(1..) {
                output.put(&vec![byte; *length]).unwrap();
                expected.resize(expected.len() + length, byte);
            }
            output.finish().unwrap();
            expected.resize(expected.len().next_multiple_of(BLOCK_BYTES), 0);
        }
        assert_eq!(std::fs::read(&path).unwrap(), expected);
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
