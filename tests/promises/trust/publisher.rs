//! A program that may publish `signals.sentry.*` puts hostile messages on the stream.
