//! Titles of what is no report on errors. Sentry gives these none, so each is made of what a person would ask for:
//! what happened, and to what. What a delivery lacks is left out.

use shared::text::one_line;

use super::{
    fields::{Delivery, cut},
    first_line,
};

/// `comment created by colleen: adding a comment`
pub(super) fn comment(delivery: &Delivery<'_>) -> String {
    let author = delivery.actor.name.line().map(|name| format!("by {name}"));
    title([Some("comment".into()), action(delivery), author], delivery.data.comment.line())
}

/// `installation created: webhooks-galore in test-org`
pub(super) fn installation(delivery: &Delivery<'_>) -> String {
    let installation = &delivery.data.installation;
    let organization = installation.organization.slug.line().map(|slug| format!("in {slug}"));
    let detail = joined([installation.app.slug.line(), organization], " ");
    title([Some("installation".into()), action(delivery)], detail)
}

/// `Seer root cause completed: a null check is missing`; of a step that says nothing, `Seer coding started: issue 42`
pub(super) fn seer(delivery: &Delivery<'_>) -> String {
    let data = &delivery.data;
    let pull_request = &data.pull_requests.first;
    let found = first_line([
        data.root_cause.one_line_description,
        data.solution.one_line_summary,
        pull_request.pull_request.url,
        pull_request.repository,
        data.code_changes.repository,
    ]);
    let issue = || first_line([data.issue_id, data.group_id]).map(|id| format!("issue {id}"));
    title([Some("Seer".into()), action(delivery)], found.or_else(issue))
}

/// `build distribution completed: MyApp 1.0 (ANDROID)`; Sentry sends failures as `completed`, too, and says in `state`
/// what they are: `size analysis failed: MyApp 1.0 (APPLE): timed out`
pub(super) fn build(delivery: &Delivery<'_>) -> String {
    let data = &delivery.data;
    let build = || data.build_id.line_or_number().map(|id| format!("build {id}"));
    let app = first_line([data.app_info.name, data.app_info.id]).or_else(build);
    let platform = data.platform.line().map(|platform| format!("({platform})"));
    let app = joined([app, data.app_info.version.line_or_number(), platform], " ");
    let happened = action(delivery).unwrap_or_else(|| "build".into());
    if data.state.text().as_deref() != Some("FAILED") {
        return title([Some(happened)], app);
    }
    let happened = format!("{} failed", happened.trim_end_matches(" completed"));
    title([Some(happened)], joined([app, first_line([data.error_message, data.error_code])], ": "))
}

/// `root_cause_started` as people write it.
fn action(delivery: &Delivery<'_>) -> Option<String> {
    let words = delivery.action.line()?.replace('_', " ");
    Some(if words == "pr created" { "PR created".into() } else { words })
}

/// `what happened: to what`, on one line.
fn title<const N: usize>(happened: [Option<String>; N], detail: Option<String>) -> String {
    let whole = joined([joined(happened, " "), detail], ": ").unwrap_or_default();
    cut(one_line(whole.chars()))
}

/// Those of the parts that say something.
fn joined<const N: usize>(parts: [Option<String>; N], separator: &str) -> Option<String> {
    let parts: Vec<_> = parts.into_iter().flatten().filter(|part| !part.trim().is_empty()).collect();
    (!parts.is_empty()).then(|| parts.join(separator))
}
