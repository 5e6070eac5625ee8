//! x
pub mod interpret;
pub mod payload;
pub mod severity;
