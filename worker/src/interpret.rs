//! START HERE: what a delivery says. Raw body in, what the two rows need out; no clock, no I/O.
//!
//! What kind of delivery it is follows from what `data` holds, never from a header (headers are not signed):
//! - `issue`, `error` or `event`: a report on errors. Title, count and level are each taken from the first of the three
//!   that has it; what none has is `Unknown error`, 1, `error`. Title `Sentry: {title} ({count} events)`, severity by
//!   level and count. The Sentry issue is `issue.id`, else `error.issue_id`, else `event.issue_id`.
//! - else `metric_alert`: titled by `description_title`, else by its own `title`; severity by `action`.
//! - else a notice (a comment, an installation, a step of Seer's, a build): a title made of what is there, severity
//!   low. The Sentry issue is `issue_id`, else `group_id`.
//! - else, or without any `data`: a report that says nothing, so all its defaults.
//!
//! Null is as good as missing everywhere, and so is a title without a character that can be seen. Sentry's documentation
//! shows the shapes (docs.sentry.io/organization/integrations/integration-platform/webhooks).

mod fields;
mod notice;

use shared::json::{NotJson, decode};

use crate::severity::Severity;
use fields::{Data, Delivery, Field, Wanted, javascript_number};

/// What a delivery says: what its signal and its issue get besides the payload. PostgreSQL can store every text here:
/// what a text column cannot hold (U+0000, lone surrogates) became U+FFFD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meaning {
    /// `signals.severity`, and by [`Severity::priority`] `issues.priority`.
    pub severity: Severity,
    /// `signals.type`: the delivery's `action`, or `event`. At most 500 characters and an ellipsis, as they came: programs
    /// compare it. A program that prints it escapes it.
    pub kind: String,
    /// `issues.title`, whole: one line without hidden characters ([`shared::text::one_line`]). Of what Sentry says in it,
    /// at most 500 characters and an ellipsis.
    pub title: String,
    /// `signals.source_id`: the Sentry issue it is about, if any. At most 500 characters and an ellipsis, as they came:
    /// two ids that differ stay two.
    pub source_id: Option<String>,
}

/// Reads what `body` says. Total on JSON of any shape: what is missing or of another type takes its default.
///
/// # Errors
/// [`NotJson`] where `JSON.parse` refuses the body, too.
pub fn interpret(body: &[u8]) -> Result<Meaning, NotJson> {
    let text = decode(body);
    let delivery = Delivery::scan(&text)?;
    let data = &delivery.data;
    let kind = delivery.action.text().unwrap_or_else(|| "event".into());
    let (severity, title, source_id) = match Subject::of(data) {
        Subject::Errors => (error_severity(data), error_title(data), error_issue(data)),
        Subject::MetricAlert => (Severity::of_metric_alert(&kind), metric_alert_title(data), None),
        Subject::Comment => (Severity::Low, notice::comment(&delivery), notice_issue(data)),
        Subject::Installation => (Severity::Low, notice::installation(&delivery), notice_issue(data)),
        Subject::Seer => (Severity::Low, notice::seer(&delivery), notice_issue(data)),
        Subject::Build => (Severity::Low, notice::build(&delivery), notice_issue(data)),
    };
    Ok(Meaning { severity, kind, title: format!("Sentry: {title}"), source_id })
}

/// What a delivery is about.
#[derive(Debug, Clone, Copy)]
enum Subject {
    /// Resources `issue`, `error`, `event_alert`, and whatever cannot be told.
    Errors,
    MetricAlert,
    Comment,
    Installation,
    Seer,
    /// Resource `preprod_artifact`.
    Build,
}

impl Subject {
    /// The first of these of which `data` holds something.
    fn of(data: &Data<'_>) -> Subject {
        let is_errors = data.issue.is_present() || data.error.is_present() || data.event.is_present();
        let is_comment = data.comment.is_present() || data.comment_id.is_present();
        let is_seer = data.run_id.is_present()
            || data.group_id.is_present()
            || data.root_cause.is_present()
            || data.solution.is_present()
            || data.code_changes.is_present()
            || data.pull_requests.is_present();
        let is_build =
            data.build_id.is_present() || data.app_info.is_present() || data.build_configuration.is_present();
        let subjects = [
            (is_errors, Subject::Errors),
            (data.metric_alert.is_present(), Subject::MetricAlert),
            (is_comment, Subject::Comment),
            (data.installation.is_present(), Subject::Installation),
            (is_seer, Subject::Seer),
            (is_build, Subject::Build),
        ];
        subjects.into_iter().find(|(is_it, _)| *is_it).map_or(Subject::Errors, |(_, subject)| subject)
    }
}

/// By level and count. A level that is no string is one of "all other levels".
fn error_severity(data: &Data<'_>) -> Severity {
    let levels = [data.issue.level, data.error.level, data.event.level];
    match levels.into_iter().find(Field::is_present).unwrap_or_default() {
        Field::Absent => Severity::of_level("error", count(data)),
        Field::Text(level) => Severity::of_level(&level.to_text(), count(data)),
        Field::Number(_) | Field::Other => Severity::Low,
    }
}

fn error_title(data: &Data<'_>) -> String {
    let title = first_line([data.issue.title, data.error.title, data.event.title]);
    let title = title.as_deref().unwrap_or(UNKNOWN);
    format!("{title} ({} events)", javascript_number(count(data)))
}

fn error_issue(data: &Data<'_>) -> Option<String> {
    first_text([data.issue.id, data.error.issue_id, data.event.issue_id])
}

/// How many events Sentry has seen.
fn count(data: &Data<'_>) -> f64 {
    let counts = [data.issue.count, data.error.count, data.event.count];
    counts.into_iter().find_map(Field::number).unwrap_or(1.0)
}

fn metric_alert_title(data: &Data<'_>) -> String {
    first_line([data.description_title, data.metric_alert.title]).unwrap_or_else(|| UNKNOWN.into())
}

fn notice_issue(data: &Data<'_>) -> Option<String> {
    first_text([data.issue_id, data.group_id])
}

/// The title of what has none.
const UNKNOWN: &str = "Unknown error";

/// The first of these that is a string, or a number in JavaScript's spelling.
fn first_text<const N: usize>(fields: [Field<'_>; N]) -> Option<String> {
    fields.into_iter().find_map(Field::text_or_number)
}

/// The same for a title: the first that has a character to show.
fn first_line<const N: usize>(fields: [Field<'_>; N]) -> Option<String> {
    fields.into_iter().find_map(Field::line_or_number)
}

#[cfg(test)]
mod tests;
