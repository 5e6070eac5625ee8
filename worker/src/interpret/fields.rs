//! What of a delivery is read at all: the members that the rules of [`super`] ask for, by name.
//!
//! Reads as JavaScript does. Of several members with one key the last counts, whole: each is put where the one before
//! it was, so nothing of that remains. Keys are one by value, not by spelling. A member that is missing, null or of
//! another shape than expected is simply not there.
//!
//! Values are pieces of the text, decoded when somebody asks; what no rule wants is passed over. The functions call
//! each other as deep as the structs below are nested, never as deep as the input.

use std::borrow::Cow;

use shared::json::{NotJson, Reader, Str, Token, Unit};
use shared::text::one_line;

/// How many characters (Unicode scalar values) of a text are kept.
const LONGEST_TEXT: usize = 500;

/// A member that is wanted as a text or a number.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum Field<'a> {
    /// Missing or null.
    #[default]
    Absent,
    Text(Str<'a>),
    Number(&'a str),
    /// `true`, `false`, an object, an array.
    Other,
}

impl Field<'_> {
    /// A string, cut to what is kept.
    pub(super) fn text(self) -> Option<String> {
        match self {
            Field::Text(text) => Some(cut(text.units().map(storable))),
            Field::Number(_) | Field::Other | Field::Absent => None,
        }
    }

    /// A string, cut to what is kept, or JavaScript's string of a number (`1e21` is "1e+21").
    pub(super) fn text_or_number(self) -> Option<String> {
        match self {
            Field::Number(literal) => literal.parse().ok().map(javascript_number),
            Field::Text(_) | Field::Other | Field::Absent => self.text(),
        }
    }

    /// A string as part of a title: [`one_line`] of it, cut to what is kept. None where that is empty. A string that was
    /// empty as it came stays an empty title.
    pub(super) fn line(self) -> Option<String> {
        match self {
            Field::Text(text) => {
                let line = cut(one_line(text.units().map(storable)));
                (text.raw.is_empty() || !line.is_empty()).then_some(line)
            }
            Field::Number(_) | Field::Other | Field::Absent => None,
        }
    }

    /// The same, or JavaScript's string of a number.
    pub(super) fn line_or_number(self) -> Option<String> {
        match self {
            Field::Number(_) => self.text_or_number(),
            Field::Text(_) | Field::Other | Field::Absent => self.line(),
        }
    }

    /// A number, or a string that is one in decimal, as JavaScript's `Number()` reads it: white space around it,
    /// signs, `.5`, `1e3`, but neither hexadecimal nor `Infinity`. What f64 has no finite number for is none.
    pub(super) fn number(self) -> Option<f64> {
        let text = match self {
            Field::Text(text) => text.to_text(),
            Field::Number(literal) => Cow::Borrowed(literal),
            Field::Other | Field::Absent => return None,
        };
        let digits = text.trim_matches(is_javascript_space);
        // Rust's grammar is ECMAScript's StrDecimalLiteral but for `inf` and `nan`.
        let is_decimal = digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E'));
        digits.parse().ok().filter(|number: &f64| is_decimal && number.is_finite())
    }
}

/// At most [`LONGEST_TEXT`] of these characters, with an ellipsis where there were more.
pub(super) fn cut(chars: impl IntoIterator<Item = char>) -> String {
    let mut chars = chars.into_iter();
    let mut kept: String = chars.by_ref().take(LONGEST_TEXT).collect();
    if chars.next().is_some() {
        kept.push('…');
    }
    kept
}

/// A number as JavaScript prints it (ECMA-262, Number::toString).
pub(super) fn javascript_number(number: f64) -> String {
    ryu_js::Buffer::new().format(number).to_owned()
}

/// What PostgreSQL's text cannot hold becomes U+FFFD.
fn storable(unit: Unit) -> char {
    match unit {
        Unit::Char('\0') | Unit::LoneSurrogate(_) => char::REPLACEMENT_CHARACTER,
        Unit::Char(c) => c,
    }
}

/// What `String.prototype.trim` removes (ECMA-262, WhiteSpace and LineTerminator).
fn is_javascript_space(c: char) -> bool {
    c == '\u{feff}' || (c.is_whitespace() && c != '\u{85}')
}

/// What is read out of a value. Its default is what is read out of null.
pub(super) trait Wanted<'a>: Default {
    /// Reads the next value, whole, whatever it is.
    fn read(reader: &mut Reader<'a>) -> Result<Self, NotJson>;

    /// Whether there was anything but null.
    fn is_present(&self) -> bool;
}

impl<'a> Wanted<'a> for Field<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, NotJson> {
        let outside = reader.depth();
        Ok(match reader.next()? {
            Some(Token::String(text)) => Field::Text(text),
            Some(Token::Number(literal)) => Field::Number(literal),
            Some(Token::Null) | None => Field::Absent,
            Some(_) => {
                leave(reader, outside)?;
                Field::Other
            }
        })
    }

    fn is_present(&self) -> bool {
        !matches!(self, Field::Absent)
    }
}

/// Reads on to where only `outside` objects and arrays are open.
fn leave(reader: &mut Reader<'_>, outside: usize) -> Result<(), NotJson> {
    while reader.depth() > outside {
        reader.next()?;
    }
    Ok(())
}

/// Reads a value; of an object, each member by `member`, which must read the member's value whole. Whether it was
/// anything but null.
fn members<'a>(
    reader: &mut Reader<'a>,
    mut member: impl FnMut(Str<'a>, &mut Reader<'a>) -> Result<(), NotJson>,
) -> Result<bool, NotJson> {
    let outside = reader.depth();
    match reader.next()? {
        Some(Token::ObjectStart) => {
            while let Some(Token::Key(key)) = reader.next()? {
                member(key, reader)?;
            }
        }
        Some(Token::Null) | None => return Ok(false),
        Some(_) => leave(reader, outside)?,
    }
    Ok(true)
}

/// Objects, each with the members that are wanted of it: what the rules call it, what is read of it, its key.
macro_rules! objects {
    ($($(#[$doc:meta])* $object:ident { $($member:ident: $kind:ident = $key:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(super) struct $object<'a> {
            is_present: bool,
            $(pub(super) $member: $kind<'a>,)*
        }

        impl<'a> Wanted<'a> for $object<'a> {
            fn read(reader: &mut Reader<'a>) -> Result<Self, NotJson> {
                let mut object = Self::default();
                object.is_present = members(reader, |key, reader| {
                    match &*key.to_text() {
                        $($key => object.$member = Wanted::read(reader)?,)*
                        _ => drop(Field::read(reader)?),
                    }
                    Ok(())
                })?;
                Ok(object)
            }

            fn is_present(&self) -> bool {
                self.is_present
            }
        }
    )*};
}

objects! {
    /// The top level.
    Delivery {
        action: Field = "action",
        actor: Actor = "actor",
        data: Data = "data",
    }

    /// Who did it.
    Actor {
        name: Field = "name",
    }

    /// Its members tell what kind of delivery it is.
    Data {
        issue: Report = "issue",
        error: Report = "error",
        event: Report = "event",
        // metric_alert
        metric_alert: MetricAlert = "metric_alert",
        description_title: Field = "description_title",
        // comment
        comment: Field = "comment",
        comment_id: Field = "comment_id",
        issue_id: Field = "issue_id",
        // installation
        installation: Installation = "installation",
        // seer
        run_id: Field = "run_id",
        group_id: Field = "group_id",
        root_cause: RootCause = "root_cause",
        solution: Solution = "solution",
        code_changes: CodeChanges = "code_changes",
        pull_requests: PullRequests = "pull_requests",
        // preprod_artifact
        build_id: Field = "buildId",
        build_configuration: Field = "buildConfiguration",
        app_info: AppInfo = "appInfo",
        platform: Field = "platform",
        state: Field = "state",
        error_code: Field = "errorCode",
        error_message: Field = "errorMessage",
    }

    /// An issue, error or event: of one shape, as far as it matters.
    Report {
        title: Field = "title",
        count: Field = "count",
        level: Field = "level",
        id: Field = "id",
        issue_id: Field = "issue_id",
    }

    /// An incident of a metric alert.
    MetricAlert {
        title: Field = "title",
    }

    /// Which app was put into which organization.
    Installation {
        app: Named = "app",
        organization: Named = "organization",
    }

    /// What Sentry names by a slug.
    Named {
        slug: Field = "slug",
    }

    /// What Seer takes for the cause.
    RootCause {
        one_line_description: Field = "one_line_description",
    }

    /// How Seer would mend it.
    Solution {
        one_line_summary: Field = "one_line_summary",
    }

    /// A pull request and where it is.
    RepositoryPullRequest {
        repository: Field = "repo_name",
        pull_request: PullRequest = "pull_request",
    }

    /// The pull request itself.
    PullRequest {
        url: Field = "pr_url",
    }

    /// A build's app.
    AppInfo {
        id: Field = "appId",
        name: Field = "name",
        version: Field = "version",
    }
}

impl<'a> Delivery<'a> {
    /// Reads a whole text.
    pub(super) fn scan(text: &'a str) -> Result<Self, NotJson> {
        let mut reader = Reader::new(text);
        let delivery = Delivery::read(&mut reader)?;
        reader.next()?; // nothing but white space may follow
        Ok(delivery)
    }
}

/// Seer's changes, an object with repositories as keys.
#[derive(Debug, Default)]
pub(super) struct CodeChanges<'a> {
    is_present: bool,
    /// The repository that is named first.
    pub(super) repository: Field<'a>,
}

impl<'a> Wanted<'a> for CodeChanges<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, NotJson> {
        let mut repository = Field::Absent;
        let is_present = members(reader, |key, reader| {
            if !repository.is_present() {
                repository = Field::Text(key);
            }
            Field::read(reader).map(drop)
        })?;
        Ok(CodeChanges { is_present, repository })
    }

    fn is_present(&self) -> bool {
        self.is_present
    }
}

/// Seer's pull requests, an array.
#[derive(Debug, Default)]
pub(super) struct PullRequests<'a> {
    is_present: bool,
    pub(super) first: RepositoryPullRequest<'a>,
}

impl<'a> Wanted<'a> for PullRequests<'a> {
    fn read(reader: &mut Reader<'a>) -> Result<Self, NotJson> {
        let outside = reader.depth();
        let mut first = RepositoryPullRequest::default();
        let token = reader.next()?;
        if token == Some(Token::ArrayStart) {
            first = Wanted::read(reader)?; // the end of an empty array reads as something without members
        }
        leave(reader, outside)?;
        Ok(PullRequests { is_present: token != Some(Token::Null), first })
    }

    fn is_present(&self) -> bool {
        self.is_present
    }
}
