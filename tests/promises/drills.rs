//! The drills: what happens to disks, brokers and memory in years, in seconds, to the programs as they are. Whatever it is,
//! a 202 becomes exactly one row, and nobody has to do anything for it.
//!
//! Each drill has a short form, run by the suite. `DRILLS=long` makes each the size that its promise speaks of, and shows
//! the numbers: `DRILLS=long cargo test --release -p tests --test promises drills:: -- --nocapture --test-threads 1`.
//!
//! A machine that does not allow a drill (to trace, to mount) says SKIPPED.

mod broker;
mod disk;
mod faults;
mod hang;
mod memory;
