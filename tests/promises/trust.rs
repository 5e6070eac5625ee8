//! Trust: each actor tries what the threat model (`.github/SECURITY.md`) says that actor cannot do.
//!
//! | module | actor |
//! |---|---|
//! | `stranger` | reaches the broker's address, has no login |
//! | `publisher` | may publish `signals.sentry.*`, and nothing else |
//! | `reader` | reads the stream, and may publish receipts |
//! | `local_user` | another user of the gateway's machine |
//! | `operator` | the operator, who slips |
//! | `database_role` | another role of the worker's database |

mod database_role;
mod local_user;
mod operator;
mod publisher;
mod reader;
mod stranger;
