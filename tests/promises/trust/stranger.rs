//! A client that reaches the broker's address tries to stop the programs behind it.
