//! x
pub mod dead_letters;
pub mod migrate;
pub mod store;
