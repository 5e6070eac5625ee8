//! The log's line about an operator's command that changed something.

use nix::unistd::{User, getuid};

/// The target of these lines. A program whose commands log only warnings adds `command=info` to its filter.
pub const TARGET: &str = "command";

/// Longest user name on Linux (`useradd(8)`).
const NAME_MAX: usize = 32;

/// Logs the end of a command that changes something: the operator, the command, its filter as arguments, its result in
/// numbers. Call it once in a command, also where the command ends with an error.
pub fn log_end(command: &str, filter: &str, result: &str) {
    let id = getuid();
    let user = User::from_uid(id).ok().flatten().map_or_else(|| id.to_string(), |user| user.name);
    let sudo_user = std::env::var("SUDO_USER").ok().filter(|name| is_name(name));
    tracing::info!(target: TARGET, user, sudo_user, command, filter, result, "a command ended");
}

/// Joins delivery ids for the filter: the first ten, and how many more there are.
pub fn ids<'a>(ids: impl ExactSizeIterator<Item = &'a str>) -> String {
    const NAMED: usize = 10;
    let more = ids.len().saturating_sub(NAMED);
    let mut text = ids.take(NAMED).collect::<Vec<_>>().join(" ");
    if more > 0 {
        text += &format!(" and {more} more");
    }
    text
}

/// `true`: a user name. An environment variable can hold any text.
fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-$".contains(&byte);
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_name() {
        assert!(["anna", "_a-1.b", "host$"].into_iter().all(is_name));
        assert!(!["", "a b", "a\n", "\u{1b}", "é", &"a".repeat(33)].into_iter().any(is_name));
    }

    #[test]
    fn many_ids_are_ten_and_a_number() {
        let twelve: Vec<_> = (0..12).map(|number| number.to_string()).collect();
        assert_eq!(ids(twelve[..2].iter().map(String::as_str)), "0 1");
        assert_eq!(ids(twelve.iter().map(String::as_str)), "0 1 2 3 4 5 6 7 8 9 and 2 more");
    }
}
