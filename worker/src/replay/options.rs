//! What `worker replay` can be told.

use clap::builder::RangedU64ValueParser;
use clap::{Arg, ArgMatches, Command};
use shared::delivery::Resource;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::commands::{flag, time, time_option};
use crate::reading::{From, Span, Until};

const AFTER_HELP: &str = "\
Times are the stream's: when NATS stored a message, which is when the gateway received it or later.
Without --since and --from-seq the whole stream is read. What comes in while it runs is left to the workers.
After a restore of the database: replay from well before the backup; what is there already costs only a look-up.

A row that is deleted stays deleted. With --restore-deleted each missing row of a stored delivery is written again with
its id and times (the issue gets a new number); where only the signal or only the issue is gone, the other is left as
it is.

A dead letter that was discarded stays so. With --restore-discarded it is read again from the stream: what this version
and the database take is stored, the rest is a dead letter again.

--dry-run says what a replay would do. It tries rows on temporary tables, so it foresees what types, NOT NULL and CHECK
constraints refuse, not what a trigger, a foreign key or a unique index that somebody added would.

Exit codes: 0 done; 1 done, and something could not be stored or restored; 2 could not go on; 64 wrong arguments;
130 interrupted. After 2 and 130 it says how to go on.";

pub(crate) fn command() -> Command {
    Command::new("replay")
        .about("Store what is on the stream and missing in the database; touch nothing that is there")
        .after_help(AFTER_HELP)
        .arg(time_option("since", "From this time on (RFC 3339, or how long ago: 2h)"))
        .arg(
            Arg::new("from-seq")
                .long("from-seq")
                .value_name("SEQUENCE")
                .value_parser(RangedU64ValueParser::<u64>::new().range(1..))
                .conflicts_with("since")
                .help("From this sequence of the stream on"),
        )
        .arg(
            Arg::new("until")
                .long("until")
                .value_name("TIME|SEQUENCE")
                .value_parser(until)
                .help("To this sequence, or before this time [default: what is the newest message now]"),
        )
        .arg(
            Arg::new("resource")
                .long("resource")
                .value_name("NAME")
                .value_parser(resource)
                .help("Only deliveries of this resource, such as issue, error, event_alert or metric_alert"),
        )
        .arg(
            Arg::new("rate")
                .long("rate")
                .value_name("N")
                .value_parser(RangedU64ValueParser::<u64>::new().range(1..))
                .help("Read at most so many messages a second"),
        )
        .arg(flag("dry-run", "Change nothing, say what would be done"))
        .arg(flag("restore-deleted", "Also write rows again that were stored and then deleted"))
        .arg(flag("restore-discarded", "Also take back what `worker dead-letters discard` gave up"))
        .arg(flag("verbose", "A line a message: sequence, delivery, what became of it"))
}

fn until(text: &str) -> Result<Until, String> {
    let sequence = text.parse().ok().map(Until::Sequence);
    let time = || time(text).map(Until::Time).map_err(|expected| format!("a sequence of the stream, or {expected}"));
    sequence.map_or_else(time, Ok)
}

fn resource(text: &str) -> Result<Resource, String> {
    let resource = Resource::of(Some(text));
    let same = resource.as_str() == text;
    same.then_some(resource).ok_or_else(|| "a resource has up to 40 of a-z, 0-9 and _".into())
}

/// What a replay was told.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) span: Span,
    pub(super) rate: Option<u64>,
    pub(super) dry_run: bool,
    pub(super) restore_deleted: bool,
    pub(super) restore_discarded: bool,
    pub(super) verbose: bool,
}

impl Options {
    pub(super) fn of(matches: &ArgMatches) -> Options {
        let since = matches.get_one::<OffsetDateTime>("since").map(|since| From::Time(*since));
        let first = matches.get_one::<u64>("from-seq").map(|first| From::Sequence(*first));
        Options {
            span: Span {
                from: since.or(first).unwrap_or(From::Oldest),
                until: matches.get_one("until").copied().unwrap_or(Until::Newest),
                resource: matches.get_one("resource").cloned(),
            },
            rate: matches.get_one("rate").copied(),
            dry_run: matches.get_flag("dry-run"),
            restore_deleted: matches.get_flag("restore-deleted"),
            restore_discarded: matches.get_flag("restore-discarded"),
            verbose: matches.get_flag("verbose"),
        }
    }

    /// The span and the options, as arguments of the command.
    pub(super) fn filter(&self) -> String {
        let from = match self.span.from {
            From::Oldest => String::new(),
            From::Sequence(first) => format!(" --from-seq {first}"),
            From::Time(time) => format!(" --since {}", time.format(&Rfc3339).unwrap_or_default()),
        };
        format!("{from}{}", self.all_but_from()).trim_start().to_owned()
    }

    /// The command that goes on at sequence `next`.
    pub(super) fn going_on(&self, next: u64) -> String {
        format!("worker replay --from-seq {next}{}", self.all_but_from())
    }

    fn all_but_from(&self) -> String {
        let Options {
            span: Span { from: _, until, resource },
            rate,
            dry_run,
            restore_deleted,
            restore_discarded,
            verbose,
        } = self;
        let mut command = String::new();
        match until {
            Until::Newest => {}
            Until::Sequence(last) => command += &format!(" --until {last}"),
            Until::Time(time) => command += &format!(" --until {}", time.format(&Rfc3339).unwrap_or_default()),
        }
        if let Some(resource) = resource {
            command += &format!(" --resource {}", resource.as_str());
        }
        if let Some(rate) = rate {
            command += &format!(" --rate {rate}");
        }
        let flags = [
            (dry_run, "dry-run"),
            (restore_deleted, "restore-deleted"),
            (restore_discarded, "restore-discarded"),
            (verbose, "verbose"),
        ];
        flags.iter().filter(|(set, _)| **set).for_each(|(_, flag)| command += &format!(" --{flag}"));
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &str) -> Result<Options, clap::Error> {
        command().try_get_matches_from(arguments.split(' ')).map(|matches| Options::of(&matches))
    }

    #[test]
    fn what_goes_on_is_what_was_asked_for() {
        let asked = "replay --from-seq 7 --until 2026-01-31T08:00:00Z --resource issue --rate 9 --dry-run \
                     --restore-deleted --restore-discarded --verbose";
        let going_on = parse(asked).unwrap().going_on(8);
        assert_eq!(going_on, format!("worker {}", asked.replace("--from-seq 7", "--from-seq 8")));
        assert_eq!(parse("replay --until 9").unwrap().going_on(8), "worker replay --from-seq 8 --until 9");
        assert_eq!(parse("replay").unwrap().span, Span { from: From::Oldest, until: Until::Newest, resource: None });
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "replay --since 2h --from-seq 7",
            "replay --from-seq 0",
            "replay --since 7",
            "replay --until x",
            "replay --rate 0",
            "replay --resource a.b",
            "replay 7",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
