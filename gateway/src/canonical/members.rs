//! The members of objects while the draft is written, and the draft put right afterwards.
//!
//! Each open object has its members on one stack. When it closes they are dropped, unless their order is not the
//! canonical one ([`order`](super::order)): then a [`Rearrangement`] is kept, which lists the pieces of the draft that
//! the object is made of. Pieces may hold other rearranged objects; [`Members::put_right`] takes them apart from the
//! outside in, on a stack of its own, so that each byte is copied once however deep it lies.

use std::hash::{BuildHasher as _, RandomState};
use std::ops::Range;

use super::order::Order;

/// Up to so many members, an object's tags are compared.
const FEW: usize = 64;

/// A member of an open object. Places are offsets in the draft.
#[derive(Debug, Clone, Copy)]
struct Member {
    /// Of the key's opening quote.
    start: u32,
    /// Of the key without its quotes.
    key_length: u32,
    /// How many rearrangements were kept before it.
    before: u32,
    /// See [`tag`].
    tag: u32,
}

/// A stretch of the draft.
#[derive(Debug, Clone, Copy)]
struct Piece {
    start: u32,
    end: u32,
    /// How many rearrangements were kept before its end. The last of them lies inside, and in no other that does, or it
    /// lies before the piece and none is inside.
    before: u32,
}

/// What stands between the braces of an object, in another order.
#[derive(Debug)]
struct Rearrangement {
    start: u32,
    end: u32,
    /// How many rearrangements were kept before its start; those between them and itself lie inside.
    before: u32,
    /// Which of `pieces` it is made of, commas included.
    pieces: Range<u32>,
}

/// The members of the objects that are open, and the rearrangements of those that closed.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// For each open object, where in `members` its own begin.
    open: Vec<u32>,
    members: Vec<Member>,
    /// As their objects closed: inner before outer.
    rearrangements: Vec<Rearrangement>,
    pieces: Vec<Piece>,
    order: Order,
    hasher: RandomState,
}

impl Members {
    /// An object begins.
    pub(super) fn open(&mut self) {
        self.open.push(count(&self.members));
    }

    /// A member of the innermost object begins at `start` in the draft. `text[key]` is its key, spelled as there and
    /// without quotes.
    #[inline(always)] // it comes with every second token
    pub(super) fn add(&mut self, start: u32, text: &[u8], key: Range<usize>) {
        let (key_length, before) = (key.len() as u32, count(&self.rearrangements));
        self.members.push(Member { start, key_length, before, tag: tag(text, key) });
    }

    /// Whether the innermost object's members may be in another order than the canonical one.
    pub(super) fn need_a_look(&self) -> bool {
        let members = self.innermost();
        members.iter().fold(0, |all, member| all | member.tag) & DIGIT != 0 || may_repeat(members)
    }

    /// Keeps how the innermost object, which ends where `draft` does, must be rearranged, if it must.
    pub(super) fn arrange(&mut self, draft: &[u8]) {
        let first = *self.open.last().expect(OPEN);
        let members = &self.members[first as usize..];
        let key = |member: usize| members[member].key(draft);
        // Who foresees equal digests for different keys makes us compare keys: harmless for few.
        let few = members.len() <= FEW;
        let digest = |member: usize| if few { members[member].tag } else { self.hasher.hash_one(key(member)) as u32 };
        if !self.order.find(members.len(), key, may_repeat(members).then_some(digest)) {
            return;
        }
        let first_piece = count(&self.pieces);
        let (end, all) = (count(draft), count(&self.rearrangements));
        for (place, i) in self.order.members().enumerate() {
            let (end, before) = members.get(i + 1).map_or((end, all), |next| (next.start - 1, next.before));
            let mut piece = Piece { start: members[i].start, end, before };
            if place > 0 && i > 0 {
                piece.start -= 1; // the comma before it
            } else if place > 0 {
                // What was first has no comma before it and borrows that of the second.
                self.pieces.push(Piece { start: end, end: end + 1, before });
            }
            self.pieces.push(piece);
        }
        let pieces = first_piece..count(&self.pieces);
        self.rearrangements.push(Rearrangement { start: members[0].start, end, before: members[0].before, pieces });
    }

    /// The innermost object ends.
    pub(super) fn close(&mut self) {
        let first = self.open.pop().expect(OPEN);
        self.members.truncate(first as usize);
    }

    /// The draft with every rearrangement made.
    pub(super) fn put_right(self, draft: Vec<u8>) -> Vec<u8> {
        if self.rearrangements.is_empty() {
            return draft;
        }
        // From back to front: of the rearrangements in a piece, the one kept last is outermost, and the last in it.
        let mut right = vec![0; draft.len()];
        let mut front = right.len();
        let mut rest = vec![Piece { start: 0, end: count(&draft), before: count(&self.rearrangements) }];
        while let Some(piece) = rest.pop() {
            let last = piece.before.checked_sub(1).map(|last| &self.rearrangements[last as usize]);
            let inside = last.filter(|last| last.start > piece.start);
            let as_it_is = &draft[inside.map_or(piece.start, |inside| inside.end) as usize..piece.end as usize];
            right[front - as_it_is.len()..front].copy_from_slice(as_it_is);
            front -= as_it_is.len();
            if let Some(inside) = inside {
                rest.push(Piece { start: piece.start, end: inside.start, before: inside.before });
                rest.extend_from_slice(&self.pieces[inside.pieces.start as usize..inside.pieces.end as usize]);
            }
        }
        right.drain(..front); // what equal keys left over
        right
    }

    fn innermost(&self) -> &[Member] {
        let first = *self.open.last().expect(OPEN);
        &self.members[first as usize..]
    }
}

/// Why some object is open.
const OPEN: &str = "the reader ends no object that it did not begin";

impl Member {
    fn key<'a>(&self, draft: &'a [u8]) -> &'a [u8] {
        let start = self.start as usize + 1;
        &draft[start..start + self.key_length as usize]
    }
}

/// Whether two of these keys may be equal.
fn may_repeat(members: &[Member]) -> bool {
    if members.len() > FEW {
        return true;
    }
    // Most often each tag has a bit of its own; only one that has not is compared with those before it.
    let mut bits = [0_u64; 4];
    members.iter().enumerate().any(|(i, one)| {
        let (word, bit) = (one.tag as usize >> 30, one.tag >> 24 & 63);
        let taken = bits[word] >> bit & 1 == 1;
        bits[word] |= 1 << bit;
        taken && members[..i].iter().any(|other| one.tag == other.tag)
    })
}

/// In a tag: the key begins with a digit.
const DIGIT: u32 = 1;

/// A short digest of the key `text[key]`: of its length, its first and its last eight bytes. Equal keys have equal
/// tags.
#[inline(always)]
fn tag(text: &[u8], key: Range<usize>) -> u32 {
    // Of a shorter key both words are all of it (of an empty one, its closing quote).
    let mask = u64::MAX >> (64 - 8 * key.len().clamp(1, 8));
    let first = word(text, key.start) & mask;
    let last = word(text, key.start.max(key.end.saturating_sub(8))) & mask;
    let mixed = first.wrapping_mul(3) ^ last.rotate_left(7) ^ key.len() as u64;
    let digit = (first as u8).is_ascii_digit();
    (mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32 & !DIGIT | if digit { DIGIT } else { 0 }
}

/// Eight bytes from `at` on, zeros where the text is over.
#[inline(always)]
fn word(text: &[u8], at: usize) -> u64 {
    let rest = &text[at..];
    rest.first_chunk().map_or_else(|| short_word(rest), |chunk| u64::from_le_bytes(*chunk))
}

#[cold]
fn short_word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

/// The draft is shorter than 2^32 bytes, so there are fewer of anything in it.
fn count<T>(all: &[T]) -> u32 {
    all.len() as u32
}
