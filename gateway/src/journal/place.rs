//! Where an entry is, and the text of it that travels with a message and comes back in a receipt.

use std::fmt;
use std::str::FromStr;

/// The place of one entry in one journal. Ordered by age. As text it is a token of letters, digits and dots, for the
/// header `Receipt-To`.
///
/// A place names the segment, the entry in it, and a check that follows from random bytes of that segment: a receipt
/// for another journal, or for a segment of the same number in a journal made anew, names no entry at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub(super) segment: u64,
    pub(super) index: u32,
    pub(super) check: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{:08x}", self.segment, self.index, self.check)
    }
}

impl Place {
    /// The place as bytes: segment, index and check, little-endian.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.segment.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.index.to_le_bytes());
        bytes[12..].copy_from_slice(&self.check.to_le_bytes());
        bytes
    }
}

/// A text that is not the place of any entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a place in a journal")]
pub struct NotAPlace;

impl FromStr for Place {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Place, NotAPlace> {
        // Only the one spelling that `Display` writes: no signs, no leading zeros to make two texts of one place.
        let place = || {
            let mut parts = text.split('.');
            let segment = parts.next()?.parse().ok()?;
            let index = parts.next()?.parse().ok()?;
            let check = u32::from_str_radix(parts.next()?, 16).ok()?;
            Some(Place { segment, index, check })
        };
        place().filter(|place| place.to_string() == text).ok_or(NotAPlace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_place_reads_back() {
        for place in [Place { segment: 1, index: 0, check: 0 }, Place { segment: u64::MAX, index: u32::MAX, check: 10 }]
        {
            assert_eq!(place.to_string().parse(), Ok(place));
        }
        for text in [
            "",
            "1",
            "1.2",
            "1.2.3",
            "1.2.00000003.",
            "01.2.00000003",
            "+1.2.00000003",
            "1.2.0000000G",
            "1.-2.00000003",
        ] {
            assert_eq!(text.parse::<Place>(), Err(NotAPlace), "{text:?}");
        }
    }
}
