//! `stack.env` in the data directory: where the parts of a running stack are, for shells and for `send`.
//!
//! `NAME=value` a line, quoted only where a shell needs it. Written, whole, when a stack is ready, and removed when it
//! ends, however that happens (and again when one starts, in case the watchdog was killed, too): where there is such a
//! file, a stack runs, and a script may wait for it.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::Context as _;

use crate::data_dir::DataDir;
use crate::watchdog;

/// The file's name.
pub const NAME: &str = "stack.env";

/// Where the parts of a stack are.
#[derive(Clone, PartialEq, Eq)]
pub struct StackEnv {
    /// `WEBHOOK_URL`: where Sentry, or who plays it, posts.
    pub webhook_url: String,
    /// `SENTRY_CLIENT_SECRET`
    pub secret: String,
    /// `DATABASE_URL`, with its password.
    pub database_url: String,
    /// `NATS_URL`, with its password.
    pub nats_url: String,
    /// `GATEWAY_OPS_URL`
    pub gateway_ops_url: String,
    /// `WORKER_OPS_URL`, of the first worker.
    pub worker_ops_url: String,
}

impl StackEnv {
    /// Writes the file, readable by us alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, data_dir: &DataDir) -> anyhow::Result<()> {
        watchdog::guard_file(&data_dir.path().join(NAME)).context("cannot start the watchdog (/bin/sh)")?;
        data_dir.write_private(NAME, &self.to_text())
    }

    /// Removes the file, if there is one.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove(data_dir: &DataDir) -> anyhow::Result<()> {
        let path = data_dir.path().join(NAME);
        match fs::remove_file(&path) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                Err(err).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => {
                watchdog::release_file(&path);
                Ok(())
            }
        }
    }

    /// Reads the file in `data_dir`; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read, or a name is missing.
    pub fn read(data_dir: &Path) -> anyhow::Result<Option<StackEnv>> {
        let path = data_dir.join(NAME);
        match fs::read_to_string(&path) {
            Ok(text) => StackEnv::of_text(&text).with_context(|| format!("cannot use {}", path.display())).map(Some),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(err) => Err(err).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    fn to_text(&self) -> String {
        let lines = [
            ("WEBHOOK_URL", &self.webhook_url),
            ("SENTRY_CLIENT_SECRET", &self.secret),
            ("DATABASE_URL", &self.database_url),
            ("NATS_URL", &self.nats_url),
            ("GATEWAY_OPS_URL", &self.gateway_ops_url),
            ("WORKER_OPS_URL", &self.worker_ops_url),
        ];
        lines.iter().map(|(name, value)| format!("{name}={}\n", quoted(value))).collect()
    }

    fn of_text(text: &str) -> anyhow::Result<StackEnv> {
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.map(unquoted).with_context(|| format!("{name} is missing"))
        };
        Ok(StackEnv {
            webhook_url: value("WEBHOOK_URL")?,
            secret: value("SENTRY_CLIENT_SECRET")?,
            database_url: value("DATABASE_URL")?,
            nats_url: value("NATS_URL")?,
            gateway_ops_url: value("GATEWAY_OPS_URL")?,
            worker_ops_url: value("WORKER_OPS_URL")?,
        })
    }
}

/// As a shell reads it back. URLs and our own secrets need no quotes, and other readers of such files know none.
fn quoted(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":/@._-,%+=".contains(&byte);
    if value.bytes().all(plain) { value.to_owned() } else { format!("'{}'", value.replace('\'', r"'\''")) }
}

fn unquoted(value: &str) -> String {
    let inner = value.strip_prefix('\'').and_then(|value| value.strip_suffix('\''));
    inner.map_or_else(|| value.to_owned(), |inner| inner.replace(r"'\''", "'"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::Scratch;

    #[test]
    fn a_shell_and_we_read_the_same() {
        let scratch = Scratch::new("stack-env").unwrap();
        let folder = DataDir::take(scratch.path()).unwrap();
        let odd = "it's $HOME `x` \"y\" \\ #z".to_owned();
        let url = |path: &str| format!("http://127.0.0.1:8080/{path}");
        let written = StackEnv {
            webhook_url: url("api/signals/sentry"),
            secret: odd.clone(),
            database_url: "postgres://loop:0a1b@127.0.0.1:5432/loop".into(),
            nats_url: "nats://127.0.0.1:4222".into(),
            gateway_ops_url: url(""),
            worker_ops_url: url(""),
        };
        assert!(StackEnv::read(scratch.path()).unwrap().is_none());
        written.write(&folder).unwrap();
        assert!(StackEnv::read(scratch.path()).unwrap().is_some_and(|read| read == written));
        let script = format!(
            ". {}/{NAME}; printf '%s\\n%s' \"$SENTRY_CLIENT_SECRET\" \"$DATABASE_URL\"",
            scratch.path().display()
        );
        let shell = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(shell.stdout).unwrap(), format!("{odd}\n{}", written.database_url));
        StackEnv::remove(&folder).unwrap();
        StackEnv::remove(&folder).unwrap();
        assert!(StackEnv::read(scratch.path()).unwrap().is_none());
    }
}
