//! `gateway check` and `worker check`: the look before a deployment. What would be used, and whether it would work.
//!
//! A check changes nothing and makes nothing, beside a file that is gone when it ends; each try takes a few seconds at
//! most. What both programs look at is here: NATS ([`nats`]), addresses ([`address`]).

pub mod nats;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use clap::{Arg, ArgAction, Command};
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::settings::InUse;
use crate::text::{printable, printable_json};

/// How something was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// The check has no right to try it, or no way to try it without an effect.
    #[serde(rename = "not tried")]
    NotTried,
    /// It works, and somebody should know.
    Warning,
    /// A promise would be broken, or nothing would work.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which.
    pub what: String,
    /// How it was found.
    pub state: State,
    /// What was found.
    pub detail: String,
    /// What to do about it, where it is not as it should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Finding { what: what.into(), state: State::Ok, detail: detail.into(), advice: None }
    }

    /// It works, but.
    pub fn warning(what: impl Into<String>, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        let advice = Some(advice.into());
        Finding { what: what.into(), state: State::Warning, detail: detail.into(), advice }
    }

    /// The check could not try it.
    pub fn not_tried(what: impl Into<String>, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Finding { state: State::NotTried, ..Finding::warning(what, detail, advice) }
    }

    /// It does not work.
    pub fn problem(what: impl Into<String>, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Finding { state: State::Problem, ..Finding::warning(what, detail, advice) }
    }
}

/// What a check has to say.
#[derive(Debug, Serialize)]
pub struct Report {
    program: &'static str,
    well: bool,
    settings: Vec<InUse>,
    findings: Vec<Finding>,
}

impl Report {
    /// About `program`.
    pub fn new(program: &'static str, settings: Vec<InUse>, findings: Vec<Finding>) -> Self {
        let well = findings.iter().all(|finding| finding.state != State::Problem);
        Report { program, well, settings, findings }
    }

    /// Whether the program would do what it promises. Warnings are no reason against it.
    pub fn is_well(&self) -> bool {
        self.well
    }

    /// For machines: an object with `program`, `well`, `settings` (`variable`, `value`, `from`) and `findings` (`what`,
    /// `state`, `detail`, `advice`).
    pub fn to_json(&self) -> String {
        let json = serde_json::to_string_pretty(self).expect("strings and booleans are JSON");
        printable_json(&json).into_owned()
    }

    fn count(&self, state: State) -> usize {
        self.findings.iter().filter(|finding| finding.state == state).count()
    }
}

impl fmt::Display for Report {
    /// For people: aligned lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widest = |texts: &mut dyn Iterator<Item = usize>| texts.max().unwrap_or(0);
        let name = widest(&mut self.settings.iter().map(|setting| setting.variable.len()));
        let value = widest(&mut self.settings.iter().map(|setting| setting.value.chars().count())).min(48);
        writeln!(f, "What the {} would use", self.program)?;
        for setting in &self.settings {
            let InUse { variable, value: shown, from } = setting;
            let shown = printable(shown);
            writeln!(f, "  {variable:name$}  {shown:value$}  {from}")?;
        }
        let what = widest(&mut self.findings.iter().map(|finding| finding.what.chars().count()));
        writeln!(f, "\nWhat was found")?;
        for Finding { what: name, state, detail, advice } in &self.findings {
            let state = match state {
                State::Ok => "ok",
                State::NotTried => "not tried",
                State::Warning => "warning",
                State::Problem => "PROBLEM",
            };
            // A server chooses its name and the words of its errors.
            writeln!(f, "  {state:9}  {:what$}  {}", printable(name), printable(detail))?;
            if let Some(advice) = advice {
                writeln!(f, "  {:9}  {:what$}  -> {}", "", "", printable(advice))?;
            }
        }
        let (problems, warnings) = (self.count(State::Problem), self.count(State::Warning));
        writeln!(f, "\n{problems} problem(s), {warnings} warning(s)")
    }
}

/// `check`, for the parser of `program`.
pub fn command(about: &'static str) -> Command {
    let json = Arg::new("json").long("json").action(ArgAction::SetTrue).help("JSON, for programs");
    Command::new("check")
        .about(about)
        .after_help("Changes nothing. Exit codes: 0 no problem; 1 a problem; 64 a mistake in the settings.")
        .arg(json)
}

/// Whether a program could listen on `address`, which `setting` names. `holder` is said of one that is taken by the
/// program itself, which runs already.
pub fn address(setting: &str, address: SocketAddr, holder: Option<&str>) -> Finding {
    let what = format!("address {address}");
    match TcpListener::bind(address) {
        Ok(_) => Finding::ok(what, "free"),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match holder {
            Some(holder) => Finding::ok(what, format!("taken, by {holder} if all is as it looks")),
            None => {
                let advice = format!("stop the program that listens there, or set {setting} to another");
                Finding::problem(what, "taken (by whom cannot be told from here)", advice)
            }
        },
        Err(error) => {
            let advice = if error.kind() == io::ErrorKind::PermissionDenied {
                "ports below 1024 are for root: take another, or grant the right"
            } else {
                "it has to be an address of this machine; 0.0.0.0 is all of them"
            };
            Finding::problem(what, format!("cannot be listened on: {error}"), format!("{advice} ({setting})"))
        }
    }
}

/// The same for an ops listener, which can be asked who it is.
pub async fn ops_address(setting: &str, ops: SocketAddr) -> Finding {
    let taken = address(setting, ops, None);
    let answers = async {
        let mut socket = TcpStream::connect(ops).await.ok()?;
        socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: check\r\nConnection: close\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        socket.take(4096).read_to_string(&mut answer).await.ok()?;
        answer.contains(crate::ops::HEALTHY).then_some(())
    };
    match taken.state {
        State::Problem if timeout(ASK_FOR, answers).await == Ok(Some(())) => {
            Finding::ok(taken.what, "taken, by a gateway or worker that runs: right if it has these settings")
        }
        State::Problem | State::Warning | State::NotTried | State::Ok => taken,
    }
}

/// How long whoever listens may take to say who it is.
const ASK_FOR: Duration = Duration::from_secs(2);

/// A size for people: `9.0 MB`, `10.0 GiB`.
pub fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::From;

    #[test]
    fn a_report_is_lines_for_people_and_json_for_machines() {
        let settings = vec![InUse { variable: "NATS_URL", value: "nats://n:4222".into(), from: From::Default }];
        let findings = vec![Finding::ok("a", "fine"), Finding::warning("long name", "well", "look")];
        let report = Report::new("gateway", settings.clone(), findings.clone());
        assert!(report.is_well());
        let text = report.to_string();
        assert!(text.contains("  ok         a          fine\n") && text.contains("-> look\n"), "{text}");
        assert!(text.contains("NATS_URL  nats://n:4222  default"), "{text}");
        let report = Report::new("gateway", settings, [findings, vec![Finding::problem("b", "no", "do")]].concat());
        let json: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!((&json["well"], &json["findings"][2]["state"]), (&false.into(), &"problem".into()));
        assert_eq!(json["settings"][0]["from"], "default");
    }

    #[test]
    fn an_address_that_is_taken_is_a_problem_unless_by_ourselves() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address_taken = taken.local_addr().unwrap();
        assert_eq!(address("X", address_taken, None).state, State::Problem);
        assert_eq!(address("X", address_taken, Some("the gateway")).state, State::Ok);
        drop(taken);
        assert_eq!(address("X", "192.0.2.1:1".parse().unwrap(), None).state, State::Problem);
    }
}
