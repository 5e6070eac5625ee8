//! Another role of the database may create objects in the schema `public`, and waits for the worker to call one.

use std::fmt::Write as _;

use world::World;

use crate::{fixture, setup};

/// Functions in `public` with the names of PostgreSQL's own: name, arguments, result, and the call of PostgreSQL's own.
const TRAPS: [(&str, &str, &str, &str); 13] = [
    ("format", "text, regclass, name", "text", "format($1, $2, $3)"),
    ("lower", "text", "text", "lower($1)"),
    ("strpos", "text, text", "integer", "strpos($1, $2)"),
    ("octet_length", "bytea", "integer", "octet_length($1)"),
    ("now", "", "timestamptz", "now()"),
    ("clock_timestamp", "", "timestamptz", "clock_timestamp()"),
    ("current_setting", "text", "text", "current_setting($1)"),
    ("current_database", "", "name", "current_database()"),
    ("quote_ident", "text", "text", "quote_ident($1)"),
    ("format_type", "oid, integer", "text", "format_type($1, $2)"),
    ("has_table_privilege", "oid, text", "boolean", "has_table_privilege($1, $2)"),
    ("pg_advisory_xact_lock", "bigint", "void", "pg_advisory_xact_lock($1)"),
    ("text_is", "text, text", "boolean", "$1 = $2"),
];

/// Each function counts the worker's calls in a sequence. A rollback does not undo that.
fn traps() -> String {
    let mut sql = String::new();
    for (name, arguments, result, truth) in TRAPS {
        write!(
            sql,
            "CREATE SEQUENCE public.caught_{name};
             GRANT USAGE ON SEQUENCE public.caught_{name} TO PUBLIC;
             CREATE FUNCTION public.{name}({arguments}) RETURNS {result} LANGUAGE plpgsql SET search_path = pg_catalog AS $$
             BEGIN
                 IF current_setting('application_name') = 'loop-worker' THEN
                     PERFORM nextval('public.caught_{name}');
                 END IF;
                 {};
             END $$;",
            if result == "void" { format!("PERFORM {truth}") } else { format!("RETURN {truth}") }
        )
        .unwrap();
    }
    sql + "CREATE OPERATOR public.= (LEFTARG = text, RIGHTARG = text, FUNCTION = public.text_is);"
}

/// Runs `sql` as a new role that may create in `public`. The role lives as long as the server.
fn as_another_role(sql: &str) -> String {
    let role = format!("mallory_{}", uuid::Uuid::new_v4().simple());
    format!("CREATE ROLE {role}; GRANT CREATE, USAGE ON SCHEMA public TO {role}; SET ROLE {role}; {sql} RESET ROLE;")
}

/// The functions that the worker has called.
async fn caught(world: &World) -> Vec<String> {
    let sql = "SELECT sequencename::text FROM pg_catalog.pg_sequences
               WHERE sequencename LIKE 'caught_%' AND last_value IS NOT NULL ORDER BY 1";
    world.query(sql, &[]).await.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn a_dry_run_calls_no_function_of_another_role() {
    let mut world = setup().sql(&as_another_role(&traps())).start().await;
    world.workers[0].stop().await;
    world.post(fixture!("issue_created")).await.accepted();
    world.on_stream(1).await;
    let foreseen = world.worker(&["replay", "--dry-run"]).await;
    assert_eq!((foreseen.code, foreseen.number("would insert")), (Some(0), 1), "{foreseen:?}");
    assert_eq!(caught(&world).await, [""; 0], "called as the worker's role");
    world.workers[0].start_again();
}

#[tokio::test]
async fn the_worker_and_its_commands_call_nothing_outside_pg_catalog() {
    // A default of the database that puts `public` before PostgreSQL's own functions.
    let first = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = public, pg_catalog',
                                            current_database()); END $$;";
    let sql = as_another_role(&traps()) + first;
    let world = setup().sql(&sql).worker("WORKER_BATCH_MAX", "10").start().await;
    // One is stored. One is refused by PostgreSQL, so that its batch is run row by row. One is no JSON.
    world.execute("ALTER TABLE public.issues ADD CONSTRAINT no_poison CHECK (title NOT LIKE '%poison%')").await;
    let stored = world.post(fixture!("issue_created")).await.accepted();
    let refused = world.post(r#"{"data":{"issue":{"id":"1","title":"poison"}}}"#).await.accepted();
    let dead = world.post("not JSON").await.accepted();
    world.stored(&stored).await;
    world.all_acknowledged().await;
    let run = async |arguments: &[&str], code: i32| {
        let ran = world.worker(arguments).await;
        assert_eq!(ran.code, Some(code), "{arguments:?}: {ran:?}");
        assert_eq!(caught(&world).await, [""; 0], "after {arguments:?}: {ran:?}");
        ran
    };
    run(&["status"], 0).await;
    run(&["check"], 0).await;
    run(&["migrate"], 0).await;
    run(&["audit"], 0).await;
    let listed = run(&["dead-letters", "list", "--since", "1h"], 0).await;
    assert!(listed.out.contains(&refused) && listed.out.contains(&dead), "{listed:?}");
    run(&["dead-letters", "list", "--reason", "json"], 0).await;
    run(&["dead-letters", "show", &dead], 0).await;
    assert_eq!(run(&["dead-letters", "show", "--body", &dead], 0).await.out, "not JSON");
    run(&["dead-letters", "retry", &refused], 1).await;
    run(&["dead-letters", "discard", &refused], 0).await;
    world.execute("DELETE FROM public.signals").await;
    let foreseen = run(&["replay", "--dry-run", "--restore-deleted"], 0).await;
    assert_eq!(foreseen.number("would be restored"), 1, "{foreseen:?}");
    run(&["replay", "--restore-deleted"], 0).await;
    world
        .execute(
            "DELETE FROM public.signals; DELETE FROM public.issues;
                   DELETE FROM ingest.deliveries; DELETE FROM ingest.dead_letters",
        )
        .await;
    let foreseen = run(&["replay", "--dry-run"], 1).await;
    assert_eq!(foreseen.number("would insert"), 1, "{foreseen:?}");
    run(&["replay"], 1).await;
    world.stored(&stored).await;
}
