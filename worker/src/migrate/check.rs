//! Does what is there fit what this program writes? Column by column, out of the catalog
//! (<https://www.postgresql.org/docs/current/catalogs.html>).
//!
//! Only what would break a write is a problem. Columns that we do not write may be missing, added or changed as Loop
//! likes, as long as a row can go in without them.

use std::collections::HashMap;
use std::fmt;

use crate::store::{StoreError, Tx, within};

/// How this program fills a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filled {
    /// Always with a value.
    Always,
    /// At times with NULL.
    AtTimes,
    /// By its default.
    ByDefault,
}

/// A table this program writes.
pub(super) struct Table {
    pub(super) name: &'static str,
    /// What `ON CONFLICT` and the look-up of issues go by: needs a unique index of its own.
    key: &'static str,
    columns: &'static [(&'static str, &'static str, Filled)],
    /// The rights that the worker and its commands need.
    rights: &'static str,
    ours: bool,
}

use Filled::{Always, AtTimes, ByDefault};

/// Types as `format_type` prints them with `search_path` at `pg_catalog`.
pub(super) const TABLES: [Table; 4] = [
    Table {
        name: "public.issues",
        key: "id",
        columns: &[
            ("id", "text", Always),
            ("number", "integer", ByDefault),
            ("title", "text", Always),
            ("type", "public.issue_type", Always),
            ("status", "public.issue_status", Always),
            ("priority", "integer", Always),
            ("signal_source", "text", Always),
            ("signal_payload", "jsonb", Always),
            ("created_at", "timestamp with time zone", Always),
            ("updated_at", "timestamp with time zone", Always),
        ],
        rights: "SELECT, INSERT",
        ours: false,
    },
    Table {
        name: "public.signals",
        key: "id",
        columns: &[
            ("id", "text", Always),
            ("source", "text", Always),
            ("source_id", "text", AtTimes),
            ("type", "text", Always),
            ("severity", "public.signal_severity", Always),
            ("payload", "jsonb", Always),
            ("issue_id", "text", Always),
            ("created_at", "timestamp with time zone", Always),
        ],
        rights: "SELECT, INSERT",
        ours: false,
    },
    Table {
        name: "ingest.deliveries",
        key: "delivery_id",
        columns: &[
            ("delivery_id", "text", Always),
            ("state", "text", Always),
            ("signal_id", "text", AtTimes),
            ("issue_id", "text", AtTimes),
            ("stream_sequence", "bigint", Always),
            ("resource", "text", AtTimes),
            ("severity", "text", AtTimes),
            ("type", "text", AtTimes),
            ("source_id", "text", AtTimes),
            ("received_at", "timestamp with time zone", AtTimes),
            ("stored_at", "timestamp with time zone", ByDefault),
        ],
        rights: "SELECT, INSERT, UPDATE",
        ours: true,
    },
    Table {
        name: "ingest.dead_letters",
        key: "delivery_id",
        columns: &[
            ("delivery_id", "text", Always),
            ("stream_sequence", "bigint", Always),
            ("subject", "text", Always),
            ("headers", "jsonb", Always),
            ("body", "bytea", Always),
            ("reason", "text", Always),
            ("attempts", "integer", Always),
            ("failed_at", "timestamp with time zone", Always),
        ],
        rights: "SELECT, INSERT, DELETE",
        ours: true,
    },
];

/// The enum labels this program writes.
const LABELS: [(&str, &[&str]); 3] = [
    ("public.issue_type", &["signal"]),
    ("public.issue_status", &["triage"]),
    ("public.signal_severity", &["low", "medium", "high", "critical"]),
];

/// One thing that does not fit: where, what is there, what must be, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The table, or the enum type.
    pub object: String,
    /// The column, or the label.
    pub part: Option<String>,
    /// What is there.
    pub found: String,
    /// What this program needs.
    pub expected: String,
    /// What a person can do.
    pub remedy: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { object, part, found, expected, remedy } = self;
        let part = part.as_ref().map(|part| format!(", {part}")).unwrap_or_default();
        write!(f, "{object}{part}: found {found}, expected {expected}; {remedy}")
    }
}

/// Everything that does not fit. What does no harm goes to `notes`.
pub(super) async fn problems(tx: &Tx, notes: &mut Vec<String>) -> Result<Vec<Problem>, StoreError> {
    let mut problems = Vec::new();
    for table in &TABLES {
        check_table(tx, table, &mut problems, notes).await?;
    }
    for (name, wanted) in LABELS {
        check_labels(tx, name, wanted, &mut problems).await?;
    }
    if problems.is_empty() {
        check_rights(tx, &mut problems).await?;
    }
    if problems.is_empty() {
        check_policies(tx, &mut problems, notes).await?;
    }
    if problems.is_empty() {
        check_sequence(tx, &mut problems).await?;
    }
    Ok(problems)
}

/// Whether a table, view or type of this name (`schema.name`) is there. By the catalog, which anybody may read:
/// `to_regclass` fails where the schema may not be used.
pub(super) async fn exists(tx: &Tx, name: &str) -> Result<bool, StoreError> {
    let found = "SELECT EXISTS (SELECT FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace \
                                WHERE n.nspname || '.' || t.typname = $1)"; // a table has a type of its own name
    Ok(within(tx.query_one(found, &[&name])).await?.get(0))
}

/// Whether a schema of this name is there.
pub(super) async fn schema_exists(tx: &Tx, name: &str) -> Result<bool, StoreError> {
    let found = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)";
    Ok(within(tx.query_one(found, &[&name])).await?.get(0))
}

/// Whether the role may read the table `name`.
pub(super) async fn may_read(tx: &Tx, name: &str) -> Result<bool, StoreError> {
    let may = "SELECT has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') \
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname || '.' || c.relname = $1";
    Ok(within(tx.query_opt(may, &[&name])).await?.is_some_and(|row| row.get(0)))
}

/// A column as the catalog has it.
struct Column {
    type_name: String,
    not_null: bool,
    has_default: bool,
    /// Generated, or an identity that takes no value from outside.
    computed: bool,
}

const COLUMNS: &str = "\
    SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.atthasdef OR a.attidentity <> '',
           a.attgenerated <> '' OR a.attidentity = 'a'
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname || '.' || c.relname = $1 AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped";

/// A unique index over the key alone, as `ON CONFLICT (key)` needs it.
const UNIQUE: &str = "\
    SELECT EXISTS (
        SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
        WHERE n.nspname || '.' || c.relname = $1 AND a.attname = $2 AND i.indnkeyatts = 1
          AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL)";

async fn check_table(
    tx: &Tx,
    table: &Table,
    problems: &mut Vec<Problem>,
    notes: &mut Vec<String>,
) -> Result<(), StoreError> {
    let rows = within(tx.query(COLUMNS, &[&table.name])).await?;
    let mut columns: HashMap<String, Column> = HashMap::new();
    for row in rows {
        let column =
            Column { type_name: row.get(1), not_null: row.get(2), has_default: row.get(3), computed: row.get(4) };
        columns.insert(row.get(0), column);
    }
    let mut problem = |part: Option<&str>, found: String, expected: String, remedy: String| {
        let (object, part) = (table.name.to_string(), part.map(|column| format!("column {column}")));
        problems.push(Problem { object, part, found, expected, remedy });
    };
    if columns.is_empty() {
        let remedy = "run `worker migrate`, or start the worker without WORKER_MIGRATE=off";
        problem(None, "no such table".into(), "a table".into(), remedy.into());
        return Ok(());
    }
    for (name, type_name, filled) in table.columns {
        let Some(column) = columns.remove(*name) else {
            let remedy = format!("{}: ALTER TABLE {} ADD COLUMN {name} {type_name}", mend(table), table.name);
            problem(Some(name), "no such column".into(), (*type_name).into(), remedy);
            continue;
        };
        if column.type_name != *type_name {
            let remedy = format!(
                "{}: ALTER TABLE {} ALTER COLUMN {name} TYPE {type_name} USING {name}::{type_name}",
                mend(table),
                table.name
            );
            problem(Some(name), column.type_name, (*type_name).into(), remedy);
            continue;
        }
        let alter = format!("{}: ALTER TABLE {} ALTER COLUMN {name}", mend(table), table.name);
        match filled {
            ByDefault if !column.has_default && column.not_null => {
                let default = if *name == "number" { "nextval('public.issues_number_seq')" } else { "now()" };
                problem(Some(name), "no default".into(), "a default".into(), format!("{alter} SET DEFAULT {default}"));
            }
            AtTimes if column.not_null => {
                problem(Some(name), "NOT NULL".into(), "NULL allowed".into(), format!("{alter} DROP NOT NULL"));
            }
            Always | AtTimes if column.computed => {
                let remedy = format!("{alter} DROP EXPRESSION (or DROP IDENTITY)");
                problem(Some(name), "a generated column".into(), "one that can be written".into(), remedy);
            }
            ByDefault | AtTimes | Always => {}
        }
    }
    let mut others: Vec<_> = columns.into_iter().collect();
    others.sort_by(|(a, _), (b, _)| a.cmp(b));
    for (name, column) in others {
        if column.not_null && !column.has_default && !column.computed {
            problem(
                Some(&name),
                format!("{} NOT NULL without a default, which this program does not fill", column.type_name),
                "a default, or NULL allowed".into(),
                format!("ALTER TABLE {} ALTER COLUMN {name} SET DEFAULT ... (or DROP NOT NULL)", table.name),
            );
        } else if table.ours {
            notes.push(format!("{}: column {name} is not known to this program and stays as it is", table.name));
        }
    }
    if !within(tx.query_one(UNIQUE, &[&table.name, &table.key])).await?.get::<_, bool>(0) {
        problem(
            Some(table.key),
            "no unique index over this column alone".into(),
            "the primary key".into(),
            format!("ALTER TABLE {} ADD PRIMARY KEY ({})", table.name, table.key),
        );
    }
    Ok(())
}

/// Whose table it is decides what to try first.
fn mend(table: &Table) -> &'static str {
    if table.ours { "somebody changed it; put it back" } else { "run Loop's migrations, or if that is not it" }
}

async fn check_labels(tx: &Tx, name: &str, wanted: &[&str], problems: &mut Vec<Problem>) -> Result<(), StoreError> {
    let labels = "SELECT e.enumlabel::text FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid \
                  JOIN pg_namespace n ON n.oid = t.typnamespace WHERE n.nspname || '.' || t.typname = $1 \
                  ORDER BY e.enumsortorder";
    let rows = within(tx.query(labels, &[&name])).await?;
    let there: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    for label in wanted.iter().filter(|label| !there.iter().any(|there| there == *label)) {
        problems.push(Problem {
            object: name.into(),
            part: Some(format!("label {label}")),
            found: if there.is_empty() { "no such enum type".into() } else { format!("only {}", there.join(", ")) },
            expected: (*label).into(),
            remedy: format!("run Loop's migrations, or if that is not it: ALTER TYPE {name} ADD VALUE '{label}'"),
        });
    }
    Ok(())
}

/// What the role lacks, as the GRANT that would give it.
const RIGHTS: &str = "\
    SELECT needed, quote_ident(current_user::text)
    FROM unnest(string_to_array($2, ', ')) AS r (needed)
    JOIN pg_class c ON true JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname || '.' || c.relname = $1
      AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, needed))";

async fn check_rights(tx: &Tx, problems: &mut Vec<Problem>) -> Result<(), StoreError> {
    for table in &TABLES {
        for row in within(tx.query(RIGHTS, &[&table.name, &table.rights])).await? {
            let (right, role): (String, String) = (row.get(0), row.get(1));
            let schema = table.name.split('.').next().unwrap_or_default();
            problems.push(Problem {
                object: table.name.into(),
                part: None,
                found: format!("the role {role} may not {right}"),
                expected: table.rights.into(),
                remedy: format!(
                    "GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT {} ON {} TO {role}",
                    table.rights, table.name
                ),
            });
        }
    }
    Ok(())
}

/// Row-level security that binds the role: which of the rights (`$2`) no policy gives it, so that rows are hidden or
/// refused. (<https://www.postgresql.org/docs/current/ddl-rowsecurity.html>)
const POLICIES: &str = "\
    SELECT quote_ident(current_user::text), string_agg(needed, ', ') FILTER (WHERE NOT EXISTS (
        SELECT FROM pg_policy p
        WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd::text IN ('*', CASE needed
                  WHEN 'SELECT' THEN 'r' WHEN 'INSERT' THEN 'a' WHEN 'UPDATE' THEN 'w' ELSE 'd' END)
          AND EXISTS (SELECT FROM unnest(p.polroles) AS m (role)
                      WHERE CASE m.role WHEN 0 THEN true ELSE pg_has_role(m.role, 'USAGE') END)))
    FROM unnest(string_to_array($2, ', ')) AS r (needed)
    JOIN pg_class c ON true JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname || '.' || c.relname = $1 AND row_security_active(c.oid)
    GROUP BY 1";

async fn check_policies(tx: &Tx, problems: &mut Vec<Problem>, notes: &mut Vec<String>) -> Result<(), StoreError> {
    for table in &TABLES {
        let Some(row) = within(tx.query_opt(POLICIES, &[&table.name, &table.rights])).await? else { continue };
        let (role, missing): (String, Option<String>) = (row.get(0), row.get(1));
        match missing {
            Some(missing) => problems.push(Problem {
                object: table.name.into(),
                part: None,
                found: format!("row-level security, and no policy that lets the role {role} {missing}"),
                expected: "a role that reads and writes every row".into(),
                remedy: format!(
                    "as a superuser: ALTER ROLE {role} BYPASSRLS; or CREATE POLICY loop_worker ON {} TO {role} USING (true)",
                    table.name
                ),
            }),
            None => notes.push(format!(
                "{}: row-level security binds the role {role}; a delivery whose row a policy hides or refuses is not stored",
                table.name
            )),
        }
    }
    Ok(())
}

/// The sequence behind `issues.number`: owned by the column in Loop's schema and in ours. A number drawn from
/// elsewhere (a default of somebody's own) is left to them.
const SEQUENCE: &str = "\
    SELECT s.oid::regclass::text, has_sequence_privilege(s.oid, 'USAGE'), quote_ident(current_user::text),
           CASE WHEN has_sequence_privilege(s.oid, 'USAGE, SELECT') THEN pg_sequence_last_value(s.oid) END
    FROM pg_class s WHERE s.oid = pg_get_serial_sequence('public.issues', 'number')::regclass";

async fn check_sequence(tx: &Tx, problems: &mut Vec<Problem>) -> Result<(), StoreError> {
    // The highest number first: the sequence can only have moved on since.
    let highest: i32 = within(tx.query_one("SELECT coalesce(max(number), 0) FROM public.issues", &[])).await?.get(0);
    let Some(row) = within(tx.query_opt(SEQUENCE, &[])).await? else { return Ok(()) };
    let (name, usable, role, last): (String, bool, String, Option<i64>) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    let mut problem = |found: String, expected: String, remedy: String| {
        let (object, part) = ("public.issues".to_string(), Some("column number".to_string()));
        problems.push(Problem { object, part, found, expected, remedy });
    };
    if !usable {
        problem(
            format!("the role {role} may not use the sequence {name}"),
            "USAGE".into(),
            format!("GRANT USAGE ON SEQUENCE {name} TO {role}"),
        );
    } else if last.unwrap_or(0) < i64::from(highest) {
        problem(
            format!("its sequence at {} and numbers up to {highest}", last.unwrap_or(0)),
            "a sequence that is not behind".into(),
            format!("SELECT setval('{name}', (SELECT max(number) FROM public.issues))"),
        );
    } else if last.is_some_and(|last| last >= i64::from(i32::MAX)) {
        problem(
            format!("its sequence at {}", last.unwrap_or_default()),
            format!("numbers below {}, which is the highest that an integer holds", i32::MAX),
            "numbers are used up: Loop has to make the column bigint, or begin again with free ones".into(),
        );
    }
    Ok(())
}
