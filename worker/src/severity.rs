//! How grave a delivery is: the four severities, their names, their priorities and the levels that lead to them.
//!
//! | level and count | severity | priority |
//! |---|---|---|
//! | `fatal` | critical | 1 |
//! | `error`, count >= 100 | critical | 1 |
//! | `error` | high | 2 |
//! | `warning` | medium | 3 |
//! | all other levels | low | 4 |

use std::{fmt, str::FromStr};

/// From how many events on an error is critical.
const MANY_EVENTS: f64 = 100.0;

/// How grave a signal is; the labels of Loop's enum type `signal_severity`. Gravest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// Somebody should look now.
    Critical,
    /// An error as it comes.
    High,
    /// A warning.
    Medium,
    /// Everything else.
    Low,
}

/// A name that is none of [`Severity::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no severity is named {0:?}: use critical, high, medium or low")]
pub struct UnknownSeverity(String);

impl Severity {
    /// Every severity, gravest first.
    pub const ALL: [Severity; 4] = [Severity::Critical, Severity::High, Severity::Medium, Severity::Low];

    /// The severity of what Sentry calls `level` and has seen `count` times. Levels are case-sensitive.
    pub fn of_level(level: &str, count: f64) -> Severity {
        match level {
            "fatal" => Severity::Critical,
            "error" if count >= MANY_EVENTS => Severity::Critical,
            "error" => Severity::High,
            "warning" => Severity::Medium,
            _ => Severity::Low,
        }
    }

    /// The severity of a metric alert, which has no level: its `action` names the threshold that was crossed.
    pub fn of_metric_alert(action: &str) -> Severity {
        match action {
            "critical" => Severity::Critical,
            "warning" => Severity::Medium,
            _ => Severity::Low,
        }
    }

    /// The label in PostgreSQL, and the name people read.
    pub const fn as_str(self) -> &'static str {
        match self {
            Severity::Critical => "critical",
            Severity::High => "high",
            Severity::Medium => "medium",
            Severity::Low => "low",
        }
    }

    /// `issues.priority`: 1 is the most urgent, 4 the least.
    pub const fn priority(self) -> i32 {
        match self {
            Severity::Critical => 1,
            Severity::High => 2,
            Severity::Medium => 3,
            Severity::Low => 4,
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Severity {
    type Err = UnknownSeverity;

    fn from_str(name: &str) -> Result<Self, UnknownSeverity> {
        let named = |severity: &Severity| severity.as_str() == name;
        Severity::ALL.into_iter().find(named).ok_or_else(|| UnknownSeverity(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_counts_lead_to_severities() {
        let rows = [
            ("fatal", 1.0, Severity::Critical),
            ("fatal", 1e6, Severity::Critical),
            ("error", 1e6, Severity::Critical),
            ("error", 100.0, Severity::Critical),
            ("error", 99.999, Severity::High),
            ("error", 1.0, Severity::High),
            ("error", -100.0, Severity::High),
            ("warning", 1e6, Severity::Medium),
            ("info", 1e6, Severity::Low),
            ("debug", 1.0, Severity::Low),
            ("sample", 1.0, Severity::Low),
            ("", 1.0, Severity::Low),
            ("ERROR", 1e6, Severity::Low), // levels are case-sensitive
            ("Fatal", 1.0, Severity::Low),
            ("error ", 1.0, Severity::Low),
        ];
        for (level, count, severity) in rows {
            assert_eq!(Severity::of_level(level, count), severity, "{level:?} seen {count} times");
        }
    }

    #[test]
    fn actions_of_metric_alerts_lead_to_severities() {
        let rows = [
            ("critical", Severity::Critical),
            ("warning", Severity::Medium),
            ("resolved", Severity::Low),
            ("event", Severity::Low),
            ("Critical", Severity::Low),
        ];
        for (action, severity) in rows {
            assert_eq!(Severity::of_metric_alert(action), severity, "{action:?}");
        }
    }

    #[test]
    fn names_and_priorities_are_those_of_loop() {
        let table = Severity::ALL.map(|severity| (severity.to_string(), severity.priority()));
        let expected = [("critical", 1), ("high", 2), ("medium", 3), ("low", 4)].map(|(name, p)| (name.to_owned(), p));
        assert_eq!(table, expected);
        for severity in Severity::ALL {
            assert_eq!(severity.as_str().parse(), Ok(severity));
        }
        assert!("urgent".parse::<Severity>().is_err());
        assert!("High".parse::<Severity>().is_err());
    }
}
