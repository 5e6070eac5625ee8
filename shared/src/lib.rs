//! shared
pub mod json;
