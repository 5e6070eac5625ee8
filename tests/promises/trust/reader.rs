//! A program that reads the stream tries to settle deliveries that are not stored.
