//! A journal that an older gateway left is delivered by this one.
//!
//! `fixtures/journals/N` was written by the last gateway of format version N, with the secret of the tests.
//! Segment 1 (five deliveries) was sealed by an orderly stop. The gateway was killed while it wrote segment 2 (four). Zeros
//! at the end of segment 2 are left out.

use std::fs::{self, File};
use std::path::Path;

use world::World;

use crate::setup;

/// Bytes that those gateways reserved for a segment.
const RESERVED: u64 = 1 << 20;

async fn is_delivered(version: &str) {
    let mut world = setup().start().await;
    world.gateway.stop().await;
    let journal = world.folder().join("gateway-0");
    fs::remove_dir_all(&journal).unwrap();
    fs::create_dir(&journal).unwrap();
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/journals").join(version);
    for file in fs::read_dir(&old).unwrap().map(|file| file.unwrap().path()) {
        fs::copy(&file, journal.join(file.file_name().unwrap())).unwrap();
    }
    File::options().write(true).open(journal.join("000000000002.journal")).unwrap().set_len(RESERVED).unwrap();
    world.gateway.start_again();
    world.gateway.ready().await;
    world.settled(9).await;
    world.until_confirmed().await;
    assert_eq!(titles(&world).await, [100, 101, 102, 103, 104, 200, 201, 202, 203]);
    let damage = world.metric("gateway_journal_damaged_records_total").await;
    assert_eq!(damage, 0.0, "{}", world.gateway.log());
}

/// The number in the title of each issue.
async fn titles(world: &World) -> Vec<i32> {
    let sql = "SELECT substring(title FROM 'from an older journal ([0-9]+) \\(7 events\\)')::integer \
               FROM issues ORDER BY 1";
    world.query(sql, &[]).await.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn a_journal_of_format_1_is_delivered() {
    is_delivered("1").await;
}

#[tokio::test]
async fn a_journal_of_format_2_from_before_receipts_had_tags_is_delivered() {
    is_delivered("2").await;
}
