//! The canonical form.

use gateway::canonical::canonical;

use crate::javascript::{self, Unread};

/// Of any body: JavaScript reads it if and only if we do, and then writes the very same bytes; writing them again changes
/// nothing; what it costs in memory is bounded.
pub fn check(body: &[u8]) {
    let form = canonical(body);
    match (javascript::parse(body), &form) {
        (Ok(value), Ok(form)) => assert_eq!(String::from_utf8_lossy(form), value.stringify(), "another form"),
        (Ok(_), Err(problem)) => panic!("JSON, but {problem}"),
        (Err(Unread::NotJson), Ok(_)) => panic!("a canonical form of what is no JSON"),
        (Err(Unread::NotJson), Err(_)) | (Err(Unread::TooDeep), _) => {}
    }
    let Ok(form) = form else { return };
    assert!(str::from_utf8(&form).is_ok(), "not UTF-8");
    assert!(form.len() <= 8 * body.len(), "{} bytes became {}", body.len(), form.len());
    assert!(canonical(&form).is_ok_and(|again| again == form), "not its own canonical form");
}
