//! Limits the bytes around the data of a chunked body: its chunks may not be too small, nor their lines too long.
//!
//! hyper reads a chunk's line byte by byte and hands over each chunk by itself. A chunk of one byte costs many times the
//! CPU of that byte in a body with a length. No limit of hyper's ends a line of zeros or spaces. So, of a chunked body:
//! - From [`LENIENT`] bytes on, its chunks have at least [`SMALLEST_MEAN`] bytes on average.
//! - What comes around its bytes is no more than [`AROUND`] and as many bytes again as its own.
//!
//! hyper does not tell where a chunk ends. A frame of it ends with its chunk, or with what one read of the socket brought,
//! whichever comes first. So there are at least as many chunks as frames less the reads. A large chunk that comes in
//! small segments counts as one, and a body with a length is not looked at.
//!
//! A chunked body is the last of its connection. hyper begins to read it before a request's handler runs.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes of a body that may come in chunks of any size.
const LENIENT: u64 = 64 << 10;
/// The fewest bytes of a chunk, on average.
const SMALLEST_MEAN: u64 = 64;
/// As many bytes as come around [`LENIENT`] bytes, each in a chunk of its own, with lines that are longer than need be.
const AROUND: u64 = 16 * LENIENT;

/// Counts the reads and frames of one connection's chunked body.
#[derive(Debug)]
pub struct Traffic {
    /// Reads of the socket, and their bytes.
    reads: AtomicU64,
    read_bytes: AtomicU64,
    /// The most `read_bytes`.
    allowed: AtomicU64,
    /// Frames that hyper handed over, and their bytes.
    frames: AtomicU64,
    body_bytes: AtomicU64,
}

impl Traffic {
    /// Begins without a limit: the connection has no chunked body yet.
    pub fn new() -> Self {
        let allowed = AtomicU64::new(u64::MAX);
        let [reads, read_bytes, frames, body_bytes] = [const { AtomicU64::new(0) }; 4];
        Traffic { reads, read_bytes, allowed, frames, body_bytes }
    }

    /// Sets the limits when a chunked body begins. Bytes of it that were read with the headers are not counted.
    pub fn begin_chunked(&self) {
        self.reads.store(0, Relaxed);
        self.read_bytes.store(0, Relaxed);
        self.allowed.store(AROUND, Relaxed);
    }

    /// Checks that more may be read from the socket.
    ///
    /// # Errors
    /// Fails with `InvalidData` beyond the limit.
    pub fn check(&self) -> io::Result<()> {
        if self.read_bytes.load(Relaxed) > self.allowed.load(Relaxed) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more bytes around a body's own than are taken"));
        }
        Ok(())
    }

    /// Counts a read of the socket.
    pub fn read(&self, bytes: usize) {
        self.reads.fetch_add(1, Relaxed);
        self.read_bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// Counts a frame of the chunked body. Returns `false` when its chunks are too small.
    pub fn frame(&self, bytes: usize) -> bool {
        let bytes = bytes as u64;
        self.allowed.fetch_add(2 * bytes, Relaxed);
        let frames = self.frames.fetch_add(1, Relaxed) + 1;
        let body = self.body_bytes.fetch_add(bytes, Relaxed) + bytes;
        let reads = self.reads.load(Relaxed) + 1; // and the one that brought the headers
        body < LENIENT || frames.saturating_sub(reads) * SMALLEST_MEAN <= body
    }
}

impl Default for Traffic {
    fn default() -> Self {
        Traffic::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds frames of `frame` bytes, with a read before each `reads_every` frames. Returns the number of frames that pass.
    fn taken(frame: usize, reads_every: usize) -> usize {
        let traffic = Traffic::new();
        traffic.begin_chunked();
        (0..200_000 / frame)
            .take_while(|number| {
                if number % reads_every == 0 {
                    traffic.read(reads_every * frame);
                }
                traffic.frame(frame)
            })
            .count()
    }

    #[test]
    fn small_chunks_are_told_from_small_segments() {
        assert_eq!(taken(1, 4_000), LENIENT as usize - 1);
        assert_eq!(taken(32, 200), LENIENT as usize / 32 - 1);
        assert_eq!(taken(64, 200), 200_000 / 64);
        assert_eq!(taken(1, 1), 200_000, "a segment a frame may be one chunk");
    }

    #[test]
    fn a_line_without_an_end_is_not_read_on() {
        let traffic = Traffic::new();
        traffic.read(usize::MAX >> 1);
        assert!(traffic.check().is_ok(), "no chunked body");
        traffic.begin_chunked();
        traffic.read(AROUND as usize);
        assert!(traffic.check().is_ok());
        traffic.read(1);
        assert!(traffic.check().is_err());
        traffic.frame(1);
        assert!(traffic.check().is_ok());
    }
}
