//! The order of one object's keys (ECMA-262 section 10.1.11, `OrdinaryOwnPropertyKeys`): those that are array indices
//! first, ascending, then the others in order of first appearance. Of equal keys, the last value.

/// Works out orders. Keeps its lists from one object to the next to save allocations.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// Array index and member, ascending once `find` is done.
    indices: Vec<Pair>,
    /// Digest of the key and member, for keys that are no array indices.
    names: Vec<Pair>,
    /// For each member the one that gives the value in its place, or `NONE`.
    value_of: Vec<u32>,
}

/// A number in the high half, the member that it belongs to in the low.
type Pair = u64;

/// The member whose place this is moved, or gave way to an equal key before it.
const NONE: u32 = u32::MAX;

impl Order {
    /// Works out the order of `count` members. `key` gives the key of each, spelled canonically and without quotes;
    /// `digest`, where two keys may be equal, a number that is equal for equal keys and seldom for others. Returns
    /// whether there is anything to rearrange.
    pub(super) fn find<'k>(
        &mut self,
        count: usize,
        key: impl Fn(usize) -> &'k [u8],
        digest: Option<impl Fn(usize) -> u32>,
    ) -> bool {
        self.indices.clear();
        self.names.clear();
        self.value_of.clear();
        for member in 0..count {
            if let Some(index) = array_index(key(member)) {
                self.indices.push(pair(index, member));
                self.value_of.push(NONE);
                continue;
            }
            self.names.extend(digest.as_ref().map(|digest| pair(digest(member), member)));
            self.value_of.push(member as u32);
        }
        let names_last = self.value_of.iter().take(self.indices.len()).all(|&value| value == NONE);
        let ascending = self.indices.is_sorted_by(|a, b| high(*a) < high(*b));
        if !ascending {
            self.indices.sort_unstable();
        }
        let joined = digest.is_some() && self.join_equal_names(key);
        joined || !ascending || !names_last
    }

    /// Whether there were any.
    fn join_equal_names<'k>(&mut self, key: impl Fn(usize) -> &'k [u8]) -> bool {
        let mut joined = false;
        let key = |name: &Pair| key(low(*name));
        self.names.sort_unstable();
        for same_digest in self.names.chunk_by_mut(|a, b| high(*a) == high(*b)).filter(|names| names.len() > 1) {
            // Equal digests are in order of appearance, and mostly of equal keys: then this is one pass.
            same_digest.sort_by(|a, b| key(a).cmp(key(b)));
            for equal in same_digest.chunk_by(|a, b| key(a) == key(b)).filter(|names| names.len() > 1) {
                joined = true;
                let (first, last) = (low(equal[0]), low(equal[equal.len() - 1]));
                for name in equal {
                    self.value_of[low(*name)] = NONE;
                }
                self.value_of[first] = last as u32;
            }
        }
        joined
    }

    /// The members found last, in order; those whose key comes again are left out.
    pub(super) fn members(&self) -> impl Iterator<Item = usize> {
        let by_index = self.indices.chunk_by(|a, b| high(*a) == high(*b)).map(|equal| low(equal[equal.len() - 1]));
        let by_name = self.value_of.iter().filter(|&&value| value != NONE).map(|&value| value as usize);
        by_index.chain(by_name)
    }
}

fn pair(high: u32, member: usize) -> Pair {
    u64::from(high) << 32 | member as u64
}

fn high(pair: Pair) -> u64 {
    pair >> 32
}

fn low(pair: Pair) -> usize {
    (pair & 0xFFFF_FFFF) as usize
}

/// The array index that `key` is: `0` to `4294967294` without a leading zero (ECMA-262 section 6.1.7).
fn array_index(key: &[u8]) -> Option<u32> {
    let canonical = match key {
        [b'0'] => true,
        [b'1'..=b'9', rest @ ..] => rest.len() < 10 && rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    if !canonical {
        return None;
    }
    let index = key.iter().fold(0, |index, digit| index * 10 + u64::from(digit - b'0'));
    u32::try_from(index).ok().filter(|&index| index != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn array_indices_end_below_two_to_the_32() {
        for (key, index) in [("0", 0), ("9", 9), ("10", 10), ("4294967294", 4_294_967_294)] {
            assert_eq!(array_index(key.as_bytes()), Some(index));
        }
        for key in
            ["", "00", "01", "-0", "-1", "1.0", "1e3", " 1", "1a", "4294967295", "9999999999", "10000000000", "١"]
        {
            assert_eq!(array_index(key.as_bytes()), None, "{key}");
        }
    }

    #[test]
    fn keys_of_equal_digest_are_told_apart() {
        let keys: [&[u8]; 6] = [b"a", b"b", b"a", b"c", b"b", b"a"];
        // As if every key had the digest 7.
        let names = (0..keys.len()).map(|member| pair(7, member)).collect();
        let mut order = Order { indices: Vec::new(), names, value_of: (0..6).collect() };
        assert!(order.join_equal_names(|member| keys[member]));
        assert_eq!(order.members().collect::<Vec<_>>(), [5, 4, 3]);
    }
}
