//! Numbers as ECMAScript reads and prints them: the nearest IEEE 754 double, in the fewest digits that tell it apart.
//!
//! Decimals of up to 15 significant digits need no arithmetic: so many survive the way to a double and back
//! (`DBL_DIG`), hence no fewer give that double, and no others as few. The rest are read by std and serde_json and
//! printed by ryu-js.

use std::io::Write as _;

/// See above.
const SURE_DIGITS: usize = 15;

/// Decimal exponents for which it holds; far beyond, doubles are subnormal or infinite.
const SURE_EXPONENTS: std::ops::Range<i32> = -280..280;

/// Up to so many bytes std always reads a number the fast way (Mushtak and Lemire, "Fast number parsing without
/// fallback", 2023: up to 19 digits).
const FAST_LENGTH: usize = 19;

/// How many bytes from the start of `written`, a JSON number, are what ECMAScript prints for it; `None` where it is not
/// as simple as that. It is for up to 15 digits without exponent, not below 10^-6 and not minus zero: all of it is
/// printed but zeros at the end of its fraction. (Sentry's serializer writes `1689194871.0`.)
pub(super) fn unchanged(written: &str) -> Option<usize> {
    let bytes = written.as_bytes();
    let digits = bytes.strip_prefix(b"-").unwrap_or(bytes);
    let whole = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let Some((point, fraction)) = digits[whole..].split_first() else {
        let minus_zero = bytes == b"-0";
        return (whole <= SURE_DIGITS && !minus_zero).then_some(bytes.len());
    };
    let decimal = *point == b'.' && fraction.iter().all(u8::is_ascii_digit);
    let below_millionth = digits[0] == b'0' && fraction.iter().take(6).all(|&digit| digit == b'0');
    if !decimal || below_millionth || whole + fraction.len() > SURE_DIGITS {
        return None;
    }
    let zeros = fraction.iter().rev().take_while(|&&digit| digit == b'0').count();
    let point = usize::from(zeros == fraction.len());
    Some(bytes.len() - zeros - point)
}

/// Appends what ECMAScript prints for `written`, a JSON number: `Number::toString`, or `null` for what overflows.
pub(super) fn print(written: &str, to: &mut Vec<u8>) {
    if let Some(decimal) = Decimal::of(written) {
        return decimal.print(to);
    }
    match value(written) {
        Some(value) => to.extend_from_slice(ryu_js::Buffer::new().format_finite(value).as_bytes()),
        None => to.extend_from_slice(b"null"),
    }
}

/// The double nearest to `written`; none if that is infinite.
fn value(written: &str) -> Option<f64> {
    if written.len() <= FAST_LENGTH {
        let value: f64 = written.parse().expect("Rust's grammar of numbers contains JSON's");
        return value.is_finite().then_some(value);
    }
    // Of 26 digits halfway between two doubles std makes 10 us of work, serde_json (feature `float_roundtrip`) 0.3 us.
    // To it, what overflows is an error, and the only one that a JSON number can be.
    serde_json::from_str(written).ok()
}

/// The number 0.d1d2d3... x 10^`point`, or 0 without digits.
struct Decimal {
    negative: bool,
    /// At most [`SURE_DIGITS`], neither the first nor the last of them zero.
    digits: [u8; SURE_DIGITS],
    count: usize,
    point: i32,
}

impl Decimal {
    /// None where the digits as written may not be the fewest.
    fn of(written: &str) -> Option<Decimal> {
        let mut decimal = Decimal { negative: false, digits: [0; SURE_DIGITS], count: 0, point: 0 };
        let (mut zeros, mut in_fraction) = (0, false); // zeros that matter only if another digit follows
        for (i, byte) in written.bytes().enumerate() {
            match byte {
                b'-' => decimal.negative = true,
                b'.' => in_fraction = true,
                b'e' | b'E' => {
                    decimal.point = decimal.point.checked_add(written[i + 1..].parse().ok()?)?;
                    break;
                }
                digit => {
                    decimal.point += i32::from(!in_fraction && (digit != b'0' || decimal.count > 0));
                    decimal.point -= i32::from(in_fraction && digit == b'0' && decimal.count == 0);
                    if digit == b'0' {
                        zeros += usize::from(decimal.count > 0);
                        continue;
                    }
                    let at = decimal.count + zeros;
                    let digits = decimal.digits.get_mut(decimal.count..=at)?;
                    digits.fill(b'0');
                    digits[zeros] = digit;
                    (decimal.count, zeros) = (at + 1, 0);
                }
            }
        }
        (decimal.count == 0 || SURE_EXPONENTS.contains(&decimal.point)).then_some(decimal)
    }

    /// `Number::toString`: `point` is its n, `count` its k.
    fn print(&self, to: &mut Vec<u8>) {
        let zeros = |to: &mut Vec<u8>, count: usize| to.resize(to.len() + count, b'0');
        let digits = &self.digits[..self.count];
        let [first, more @ ..] = digits else {
            return to.push(b'0');
        };
        if self.negative {
            to.push(b'-');
        }
        let whole = usize::try_from(self.point).unwrap_or(0);
        match self.point {
            1..=21 if whole >= self.count => {
                to.extend_from_slice(digits);
                zeros(to, whole - self.count);
            }
            1..=21 => {
                to.extend_from_slice(&digits[..whole]);
                to.push(b'.');
                to.extend_from_slice(&digits[whole..]);
            }
            -5..=0 => {
                to.extend_from_slice(b"0.");
                zeros(to, self.point.unsigned_abs() as usize);
                to.extend_from_slice(digits);
            }
            _ => {
                to.push(*first);
                if !more.is_empty() {
                    to.push(b'.');
                    to.extend_from_slice(more);
                }
                write!(to, "e{:+}", self.point - 1).expect("a Vec takes all that is written to it");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(written: &str) -> String {
        let mut to = Vec::new();
        print(written, &mut to);
        String::from_utf8(to).unwrap()
    }

    /// What is printed without arithmetic, against what is printed with it.
    #[test]
    fn short_cuts_change_nothing() {
        let with_arithmetic = |written: &str| {
            let value: f64 = written.parse().unwrap();
            if value.is_finite() { ryu_js::Buffer::new().format_finite(value).to_owned() } else { "null".into() }
        };
        let mantissas = [
            "0",
            "0.0",
            "0.000",
            "1",
            "9",
            "10",
            "1000",
            "1.5",
            "1.50",
            "12.0",
            "0.5",
            "0.001",
            "0.0012300",
            "120.034",
            "999999999999999",
            "123456789.012345",
            "0.000000123456789",
            "999999999999999.0",
            "1234567890123456",
            "0.1234567890123456",
            "9007199254740993",
            "1000000000000000000000",
            "100000000000000000000",
            "1000000000000000000001",
        ];
        let exponents = [
            -400, -325, -324, -309, -308, -290, -281, -280, -30, -22, -8, -7, -6, -5, -1, 0, 1, 5, 6, 7, 14, 15, 20,
            21, 22, 279, 280, 300, 308, 309,
        ];
        for mantissa in mantissas {
            for sign in ["", "-"] {
                let plain = format!("{sign}{mantissa}");
                let spelled = exponents
                    .iter()
                    .flat_map(|exponent| [format!("{plain}e{exponent}"), format!("{plain}E{exponent:+}")]);
                for written in spelled.chain([plain.clone()]) {
                    assert_eq!(printed(&written), with_arithmetic(&written), "of {written}");
                    if let Some(length) = unchanged(&written) {
                        assert_eq!(written[..length], with_arithmetic(&written), "of {written}");
                    }
                }
            }
        }
    }

    #[test]
    fn exponents_of_any_length() {
        for (written, expected) in [
            ("0e99999999999999999999", "0"),
            ("-0.000e-99999999999999999999", "0"),
            ("1e99999999999999999999", "null"),
            ("1e-99999999999999999999", "0"),
            ("1e2147483647", "null"),
            ("10e2147483647", "null"),
            ("0.1e-2147483648", "0"),
            ("1e00000000000000000000000005", "100000"),
        ] {
            assert_eq!(printed(written), expected, "of {written}");
        }
    }
}
