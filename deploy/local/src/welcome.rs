//! What a person reads when everything runs.

use std::io::IsTerminal as _;
use std::path::Path;

use crate::stack::{SECRET_FILE, Stack};

/// Prints, on stdout, where everything is and what to do next.
pub(crate) fn print(stack: &Stack) {
    let folder = stack.data_dir.path();
    let here = std::env::current_dir().ok();
    let short = |path: &Path| {
        let within =
            here.as_deref().and_then(|here| path.strip_prefix(here).ok()).filter(|path| path.components().count() > 0);
        within.unwrap_or(path).display().to_string()
    };
    let (dim, bold, plain) =
        if std::io::stdout().is_terminal() { ("\x1b[2m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
    let which = match folder == crate::default_data_dir() {
        true => String::new(),
        false => format!(" --data-dir {}", short(folder)),
    };
    let stack_env = short(&folder.join(local::stack_env::NAME));
    // A shell looks for a name without a slash in PATH.
    let source = if stack_env.contains('/') { stack_env } else { format!("./{stack_env}") };
    let ours = stack.programs.postgres_bin.join("psql");
    let psql = if on_path("psql") || !ours.exists() { "psql".to_owned() } else { ours.display().to_string() };
    let elsewhere = stack.postgres.home();
    println!(
        "
{bold}Sentry's door is open.{plain}

  Webhook URL     {bold}{url}{plain}
  Client secret   {bold}{secret}{plain}
                  {dim}{secret_file}: write your integration's own into it to receive from Sentry itself{plain}

  Send one        cargo run -- send tests/fixtures/issue_created.json{which}
  Look inside     . {source} && {psql} \"$DATABASE_URL\"
  Health          curl {gateway}/readyz {worker}/readyz
  Data            {data} {dim}(delete it to begin anew){plain}",
        url = stack.env.webhook_url,
        secret = stack.env.secret,
        secret_file = short(&folder.join(SECRET_FILE)),
        gateway = stack.env.gateway_ops_url,
        worker = stack.env.worker_ops_url,
        data = short(folder),
    );
    if !elsewhere.starts_with(folder) {
        let why = "PostgreSQL does not run as root, and the user it runs as cannot enter the above";
        println!("                  and {} {dim}({why}){plain}", elsewhere.display());
    }
    println!("\n  Ctrl-C stops everything.\n");
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}
