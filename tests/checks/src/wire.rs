//! What goes over a connection: requests as a script of bytes says, and the answers, read strictly (RFC 9112).

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::javascript;

/// The client secret.
pub(crate) const SECRET: &str = "a-client-secret-of-the-checks";

// Bytes of a script that stand for something else. None of them is in any UTF-8 text.
/// Here the sender pauses.
const PAUSE: u8 = 0xfa;
/// The length of the next marked piece in hex, as in a chunk.
const HEX_LENGTH: u8 = 0xfb;
/// The length of the next marked piece, as in Content-Length.
const LENGTH: u8 = 0xfc;
/// The signature over the canonical form of the next marked piece.
const CANONICAL_SIGNATURE: u8 = 0xfd;
/// Begins and ends a marked piece.
const MARK: u8 = 0xfe;
/// The signature over the next marked piece.
const SIGNATURE: u8 = 0xff;

pub(crate) fn sign(signed: &[u8]) -> String {
    let mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("HMAC takes a key of any length");
    hex::encode(mac.chain_update(signed).finalize().into_bytes())
}

/// The signatures that are right for a body: over its bytes, and over its canonical form where it has one.
pub(crate) fn right_signatures(body: &[u8]) -> Vec<String> {
    let canonical = javascript::parse(body).ok().map(|value| sign(value.stringify().as_bytes()));
    [sign(body)].into_iter().chain(canonical).collect()
}

/// The bytes that a script stands for, in the pieces in which they are sent.
pub(crate) fn pieces(script: &[u8]) -> Vec<Vec<u8>> {
    let mut marked: Vec<Vec<u8>> = Vec::new();
    let mut inside = false;
    for &byte in script {
        match byte {
            MARK => {
                inside = !inside;
                if inside {
                    marked.push(Vec::new());
                }
            }
            PAUSE..=SIGNATURE => {}
            byte if inside => marked.last_mut().expect("it was begun").push(byte),
            _ => {}
        }
    }
    let (mut pieces, mut next, mut inside) = (vec![Vec::new()], 0, false);
    for &byte in script {
        let piece = marked.get(next).map_or(&[][..], Vec::as_slice);
        let text = match byte {
            PAUSE => {
                pieces.push(Vec::new());
                continue;
            }
            MARK => {
                inside = !inside;
                next += usize::from(inside);
                continue;
            }
            HEX_LENGTH => format!("{:x}", piece.len()).into_bytes(),
            LENGTH => piece.len().to_string().into_bytes(),
            SIGNATURE => sign(piece).into_bytes(),
            CANONICAL_SIGNATURE => right_signatures(piece).pop().expect("there is one at least").into_bytes(),
            byte => vec![byte],
        };
        pieces.last_mut().expect("there is one at least").extend(text);
    }
    pieces
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// It announces a body and has none, as one to HEAD.
    pub(crate) is_to_head: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }
}

/// All answers on a connection, which must be whole. `asked_for_heads` says that a refusal may be one to HEAD, and have no
/// body whatever it announces.
pub(crate) fn answers(mut bytes: &[u8], asked_for_heads: bool) -> Vec<Answer> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("an answer without an end") + 4;
        let head = str::from_utf8(&bytes[..end - 4]).expect("an answer in ASCII");
        bytes = &bytes[end..];
        let mut lines = head.split("\r\n");
        let line = lines.next().expect("a text has a first line");
        let (version, rest) = line.split_at_checked(9).unwrap_or_else(|| panic!("{line:?}"));
        assert!(["HTTP/1.1 ", "HTTP/1.0 "].contains(&version), "{line:?}");
        let status = rest.split(' ').next().and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("{line:?}"));
        let header = |line: &str| {
            let (name, value) = line.split_once(": ").unwrap_or_else(|| panic!("{line:?}"));
            assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "{line:?}");
            assert!(value.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{line:?}");
            (name.to_ascii_lowercase(), value.to_owned())
        };
        let mut answer = Answer { status, headers: lines.map(header).collect(), body: Vec::new(), is_to_head: false };
        if status == 100 {
            assert!(answer.headers.is_empty());
            continue;
        }
        let length: usize = answer.header("content-length").expect("a length").parse().expect("a number");
        // 400: without a host, or with two.
        answer.is_to_head = asked_for_heads && [400, 404, 405].contains(&status) && !bytes.starts_with(b"{");
        if !answer.is_to_head {
            let (body, rest) = bytes.split_at_checked(length).expect("a whole body");
            answer.body = body.to_vec();
            bytes = rest;
        }
        answers.push(answer);
    }
    answers
}
