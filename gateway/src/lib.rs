//! x
pub mod canonical;
