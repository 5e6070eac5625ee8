//! The load generator: keep-alive connections that send signed deliveries, and count the answers by status.
//!
//! It is the measuring device, and shares the machine with what it measures. So it speaks HTTP on bare sockets: what a
//! request is made of is there before the clock starts ([`crate::bodies`]), a request is one `writev` and an answer, as
//! a rule, one `read`. It takes at most one of the machine's cores, in a process that is not the server's, so that its
//! CPU is never taken for the server's.
//!
//! - [`closed`]: each connection sends its next request when it has the answer to the last. For throughput.
//! - [`open`]: requests have their times, whatever becomes of the ones before. For latency.

pub(crate) mod closed;
pub(crate) mod open;

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::sync::Arc;

use hdrhistogram::Histogram;

use crate::bodies::Deliveries;

/// Answers by status.
pub(crate) type Answers = BTreeMap<u16, u64>;

/// A request that is sent again and again, each time as another delivery.
struct Request {
    deliveries: Arc<Deliveries>,
    head: Vec<u8>,
    request_id: std::ops::Range<usize>,
    signature: std::ops::Range<usize>,
    tail: Vec<u8>,
    /// Tells the deliveries of this load from those of all others.
    salt: u64,
    number: u64,
}

impl Request {
    fn new(deliveries: Arc<Deliveries>, port: u16, salt: u64) -> Request {
        let head = format!(
            "POST /api/signals/sentry HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n\
             Sentry-Hook-Resource: error\r\nSentry-Hook-Timestamp: 1700000000\r\nContent-Length: {}\r\n\
             Request-ID: {:032}\r\nSentry-Hook-Signature: {:064}\r\n\r\n",
            deliveries.size(),
            0,
            0
        );
        let after = |name: &str| head.find(name).expect("it is written above") + name.len();
        let (request_id, signature) = (after("Request-ID: "), after("Sentry-Hook-Signature: "));
        Request {
            deliveries,
            request_id: request_id..request_id + 32,
            signature: signature..signature + 64,
            head: head.into_bytes(),
            tail: Vec::new(),
            salt,
            number: 0,
        }
    }

    /// Makes it delivery number `n` of this load.
    fn become_number(&mut self, n: u64) {
        let (tail, signature) = self.deliveries.tail(n);
        let id = (u128::from(self.salt) << 64 | u128::from(n)).to_be_bytes();
        hex::encode_to_slice(id, &mut self.head[self.request_id.clone()]).expect("16 bytes are 32 digits");
        self.head[self.signature.clone()].copy_from_slice(&signature);
        self.tail.clear();
        self.tail.extend_from_slice(&tail);
        self.number = n;
    }

    /// What is still to be written after `written` bytes.
    fn rest(&self, written: usize) -> [IoSlice<'_>; 3] {
        let mut skip = written;
        [&self.head[..], self.deliveries.text(self.number), &self.tail].map(|part| {
            let skipped = skip.min(part.len());
            skip -= skipped;
            IoSlice::new(&part[skipped..])
        })
    }

    fn len(&self) -> usize {
        self.head.len() + self.deliveries.size()
    }
}

/// Nanoseconds, from 1 us to a minute, to three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1000, 60_000_000_000, 3).expect("the bounds are in order")
}

/// Room for an answer: those of all servers here are far smaller.
const ANSWER_BYTES: usize = 4096;

/// The status and the length of the answer that `bytes` begin with, where it is whole.
///
/// # Errors
/// Where it is no answer of HTTP/1.1 with a length.
fn answer(bytes: &[u8]) -> io::Result<Option<(u16, usize)>> {
    let broken = |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("an answer that {why}"));
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(bytes).map_err(|error| broken(&format!("is none: {error}")))?;
    let httparse::Status::Complete(head) = parsed else { return Ok(None) };
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = length.and_then(|header| str::from_utf8(header.value).ok()?.parse::<usize>().ok());
    let whole = head + length.ok_or_else(|| broken("says no length"))?;
    let status = response.code.ok_or_else(|| broken("says no status"))?;
    if whole > ANSWER_BYTES {
        return Err(broken("is too long"));
    }
    Ok((bytes.len() >= whole).then_some((status, whole)))
}

/// The connection was closed where an answer should have come.
fn closed_early() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")
}

/// How many were accepted.
///
/// # Errors
/// Where any answer was not 202: whatever was measured then, it was not the accepting of deliveries.
pub(crate) fn all_accepted(answers: &Answers) -> anyhow::Result<u64> {
    let others: Vec<_> = answers.iter().filter(|(status, _)| **status != 202).collect();
    anyhow::ensure!(others.is_empty(), "answers that were not 202, by status: {others:?}");
    Ok(answers.get(&202).copied().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_when_its_body_is() {
        let text = b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}";
        for cut in 0..text.len() {
            assert_eq!(answer(&text[..cut]).unwrap(), None);
        }
        assert_eq!(answer(text).unwrap(), Some((202, text.len())));
        assert!(answer(b"HTTP/1.1 202 Accepted\r\n\r\n").is_err());
        assert!(answer(b"SSH-2.0-OpenSSH\r\n").is_err());
    }

    #[test]
    fn a_load_with_another_answer_than_202_fails() {
        assert_eq!(all_accepted(&Answers::from([(202, 7)])).unwrap(), 7);
        let told = all_accepted(&Answers::from([(202, 7), (503, 1)])).unwrap_err().to_string();
        assert!(told.contains("503"), "{told}");
    }

    #[test]
    fn each_request_is_a_delivery_of_its_own_and_is_written_whole_from_anywhere() {
        let deliveries = Arc::new(Deliveries::of_size(1024, 3));
        let mut request = Request::new(deliveries.clone(), 80, 9);
        let whole =
            |request: &Request, from| request.rest(from).iter().flat_map(|part| part.to_vec()).collect::<Vec<u8>>();
        request.become_number(1);
        let first = whole(&request, 0);
        assert_eq!(first.len(), request.len());
        assert!(first.ends_with(&deliveries.body(1)));
        for from in [1, request.head.len(), request.head.len() + 5, first.len() - 3, first.len()] {
            assert_eq!(whole(&request, from), first[from..]);
        }
        request.become_number(2);
        let second = whole(&request, 0);
        let text = String::from_utf8(second).unwrap();
        assert!(text.contains(&format!("Request-ID: {:016x}{:016x}\r\n", 9, 2)), "{text}");
        assert!(text.contains(&world::sign(world::SECRET, &deliveries.body(2))), "{text}");
    }
}
