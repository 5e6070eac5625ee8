//! How far an entry has come, and the one byte that says so.

use std::time::Duration;

/// How far a delivery has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// On disk, and not known to be in the stream.
    Journalled,
    /// In the stream; not known to be stored.
    Published,
    /// Stored for good; nothing more to do.
    Confirmed,
    /// Refused by NATS for a reason that waiting does not mend.
    SetAside,
}

impl State {
    /// In the order in which a delivery goes through them.
    pub const ALL: [State; 4] = [State::Journalled, State::Published, State::Confirmed, State::SetAside];

    /// The name that metrics and `gateway journal status` use.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Journalled => "journalled",
            State::Published => "published",
            State::Confirmed => "confirmed",
            State::SetAside => "set_aside",
        }
    }
}

/// Why NATS will not take an entry as things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Larger than the server's `max_payload` or the stream's `max_msg_size`.
    TooLarge,
    /// No stream listens on its subject, or the subject is not valid.
    Subject,
    /// The account may not publish there.
    Permission,
    /// Any other answer that says never.
    Other,
}

impl Refusal {
    /// In the order of their numbers in a marks file.
    pub const ALL: [Refusal; 4] = [Refusal::TooLarge, Refusal::Subject, Refusal::Permission, Refusal::Other];

    /// The name that metrics and `gateway journal status` use.
    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::TooLarge => "too_large",
            Refusal::Subject => "subject",
            Refusal::Permission => "permission",
            Refusal::Other => "other",
        }
    }
}

/// The ground on which an entry is taken to be in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// JetStream's ack to this process, or the stream itself, so long ago (to a tenth of a second).
    Published(Duration),
    /// The marks of an earlier process, which had JetStream's ack.
    Marks,
    /// JetStream's ack for a duplicate: the message may be another entry's. A receipt may have come already.
    Duplicate {
        /// The entry's receipt has come.
        receipted: bool,
    },
}

/// The state of an entry, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bits(u8);

impl Bits {
    const PUBLISHED: u8 = 1;
    const CONFIRMED: u8 = 2;
    const SET_ASIDE: u8 = 4;
    /// Handed to a publisher. Not kept across a restart.
    const TAKEN: u8 = 8;
    /// No entry can be read here. Found out anew at each start.
    const HOLE: u8 = 16;
    /// The upper three bits of a set-aside entry: which [`Refusal`].
    const REFUSAL: u32 = 5;
    /// Of an entry that is not set aside: its receipt has come, JetStream's ack has not. Not kept across a restart.
    const RECEIPTED: u8 = 32;
    /// Of an entry that is not set aside: an earlier process had JetStream's ack for it.
    const WAS_PUBLISHED: u8 = 64;
    /// Of an entry that is not set aside: its sequence is known, and the stream has not shown yet that it is there.
    const UNVERIFIED: u8 = 128;

    pub(super) const NEW: Bits = Bits(0);
    /// As good as new, but somebody has it.
    pub(super) const HELD: Bits = Bits(Bits::TAKEN);
    pub(super) const IN_STREAM: Bits = Bits(Bits::PUBLISHED);
    pub(super) const STORED: Bits = Bits(Bits::CONFIRMED);
    pub(super) const GONE: Bits = Bits(Bits::HOLE);

    /// From a byte of a marks file.
    pub(super) fn from_marks(byte: u8) -> Bits {
        Bits(byte)
    }

    /// As it is written to a marks file. A hole is left out: it is what the file says, not what happened to it.
    pub(super) fn to_marks(self) -> u8 {
        let kept = if self.has(Bits::SET_ASIDE) { self.0 } else { self.0 & !Bits::RECEIPTED };
        if self == Bits::GONE { 0 } else { kept & !Bits::TAKEN }
    }

    /// As a publisher has it. A receipt that has come stays with it.
    pub(super) fn taken(self) -> Bits {
        Bits(self.0 & Bits::RECEIPTED | Bits::TAKEN)
    }

    /// The same, with the receipt that has come before JetStream's ack.
    pub(super) fn receipted(self) -> Bits {
        Bits(self.0 | Bits::RECEIPTED)
    }

    /// Returns `true` when the receipt has come before JetStream's ack.
    pub(super) fn is_receipted(self) -> bool {
        self.state() == Some(State::Journalled) && self.has(Bits::RECEIPTED)
    }

    /// Returns `true` when an earlier process had JetStream's ack for it and this one has not handed it out yet.
    pub(super) fn was_published(self) -> bool {
        self.state() == Some(State::Journalled) && self.has(Bits::WAS_PUBLISHED)
    }

    /// The same, acknowledged as a duplicate: the stream has yet to show that the message there is this entry's.
    pub(super) fn unverified(self) -> Bits {
        Bits(self.0 & Bits::RECEIPTED | Bits::UNVERIFIED)
    }

    /// Returns `true` while the stream is to be asked for the entry, which is not published meanwhile.
    pub(super) fn is_unverified(self) -> bool {
        self.state() == Some(State::Journalled) && self.has(Bits::UNVERIFIED)
    }

    /// The ground on which an unverified entry is taken to be in the stream.
    pub(super) fn evidence(self) -> Evidence {
        if self.was_published() { Evidence::Marks } else { Evidence::Duplicate { receipted: self.is_receipted() } }
    }

    /// Returns `true` where the marks hold the entry's sequence.
    pub(super) fn has_sequence(self) -> bool {
        self.state() == Some(State::Published) || self.is_unverified()
    }

    fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }

    /// `None` where there is no entry.
    pub(super) fn state(self) -> Option<State> {
        if self.has(Bits::HOLE) {
            None
        } else if self.has(Bits::CONFIRMED) {
            Some(State::Confirmed)
        } else if self.has(Bits::SET_ASIDE) {
            Some(State::SetAside)
        } else if self.has(Bits::PUBLISHED) {
            Some(State::Published)
        } else {
            Some(State::Journalled)
        }
    }

    pub(super) fn refusal(self) -> Option<Refusal> {
        let number = usize::from(self.0 >> Bits::REFUSAL);
        (self.state() == Some(State::SetAside)).then(|| Refusal::ALL.get(number).copied().unwrap_or(Refusal::Other))
    }

    /// Whether a publisher may take it.
    pub(super) fn waits(self) -> bool {
        self.state() == Some(State::Journalled) && !self.has(Bits::TAKEN | Bits::UNVERIFIED)
    }

    pub(super) fn set_aside(refusal: Refusal) -> Bits {
        let number = Refusal::ALL.iter().position(|&other| other == refusal).expect("ALL has every refusal");
        Bits(Bits::SET_ASIDE | u8::try_from(number).expect("there are at most eight refusals") << Bits::REFUSAL)
    }

    /// The part of this that is still true after a restart. A publish is not: the stream may have lost the message
    /// meanwhile. An entry with a `sequence` is unverified; one without (0) is published again. That it was published is
    /// remembered, for the receipt that may come.
    pub(super) fn after_restart(self, sequence: u64) -> Bits {
        let unverified = if sequence == 0 { 0 } else { Bits::UNVERIFIED };
        match self.state() {
            Some(State::Confirmed) => Bits(Bits::CONFIRMED),
            Some(State::SetAside) => self,
            Some(State::Published) => Bits(Bits::WAS_PUBLISHED | unverified),
            Some(State::Journalled) => Bits(self.0 & (Bits::WAS_PUBLISHED | unverified)),
            None => Bits::NEW,
        }
    }
}

/// A number of entries, and the bytes that their records take on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// How many.
    pub entries: u64,
    /// Their records' bytes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.entries += other.entries;
        self.bytes += other.bytes;
    }
}
