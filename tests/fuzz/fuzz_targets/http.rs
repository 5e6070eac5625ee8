#![no_main]

use std::sync::LazyLock;

use checks::http::{Door, check};

static DOOR: LazyLock<Door> = LazyLock::new(Door::new);

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    check(&DOOR, input);
});
