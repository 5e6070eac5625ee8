//! `cargo run`: everything on this machine.

fn main() {}
