//! `cargo bench -p bench`: what the parts of a delivery's way cost by themselves, on one thread. To see what a change
//! does; what it is worth is in the scenarios.

use bytes::Bytes;
use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use futures_util::future::join_all;
use gateway::canonical::canonical;
use gateway::journal::{Entry, Journal, Limits};
use gateway::secrets::Secrets;
use gateway::signature::Signature;
use hyper::HeaderMap;
use local::Scratch;
use shared::delivery::Delivery;
use tokio::runtime::Runtime;
use worker::interpret::interpret;
use worker::payload::payload;

use crate::bodies::Deliveries;

#[path = "../src/bodies.rs"]
#[expect(dead_code, reason = "the scenarios use all of it")]
mod bodies;

const SIZES: [usize; 3] = [2 << 10, 16 << 10, 128 << 10];

fn main() {
    divan::main();
}

fn body(size: usize) -> Bytes {
    Deliveries::of_size(size, 1).body(0)
}

/// The canonical form of a body as Sentry writes it.
#[divan::bench(args = SIZES)]
fn canonical_form(bencher: Bencher<'_, '_>, size: usize) {
    let body = body(size);
    bencher.counter(BytesCount::new(size)).bench(|| canonical(black_box(&body)));
}

/// The raw signature, right.
#[divan::bench(args = SIZES)]
fn verification(bencher: Bencher<'_, '_>, size: usize) {
    let deliveries = Deliveries::of_size(size, 1);
    let (body, (_, signature)) = (deliveries.body(0), deliveries.tail(0));
    let secrets = Secrets::parse(world::SECRET).expect("it is a secret");
    let mut headers = HeaderMap::new();
    headers.insert("sentry-hook-signature", str::from_utf8(&signature).expect("hex").parse().expect("a value"));
    let signature = Signature::of(&headers).expect("it is well formed");
    bencher
        .counter(BytesCount::new(size))
        .bench(|| assert!(secrets.signed(black_box(&body), &signature).is_some(), "the signature is right"));
}

/// Severity, title, source.
#[divan::bench(args = SIZES)]
fn interpretation(bencher: Bencher<'_, '_>, size: usize) {
    let body = body(size);
    bencher.counter(BytesCount::new(size)).bench(|| interpret(black_box(&body)));
}

/// The body as jsonb takes it.
#[divan::bench(args = SIZES)]
fn jsonb_text(bencher: Bencher<'_, '_>, size: usize) {
    let body = body(size);
    bencher.counter(BytesCount::new(size)).bench(|| payload(black_box(&body)).map(|text| text.len()));
}

/// The id, from `Request-ID` and body.
#[divan::bench(args = SIZES)]
fn delivery_id(bencher: Bencher<'_, '_>, size: usize) {
    let body = body(size);
    let receive = || Delivery::received(body.clone(), Some(b"3f1c"), Some(b"error"), Some(b"1700000000"));
    bencher.counter(BytesCount::new(size)).bench(receive);
}

/// Appends that wait for the disk together, as many as given, 16 KB each. On the disk of the temporary folder. So many
/// rounds and no more: nothing publishes what is appended, so the journal fills.
#[divan::bench(args = [1, 32, 256], sample_count = 50, sample_size = 1)]
fn journal_append(bencher: Bencher<'_, '_>, together: usize) {
    let folder = Scratch::new("bench-micro").expect("there is a temporary folder");
    let (journal, _) = Journal::open(folder.path(), Limits::of(10 << 30)).expect("an empty journal opens");
    let delivery = Delivery::received(body(16 << 10), Some(b"3f1c"), Some(b"error"), Some(b"1700000000"));
    let entry = Entry { received_at: delivery.received_at.into(), meta: delivery.to_journal(), body: delivery.body };
    let runtime = Runtime::new().expect("a runtime starts");
    bencher.counter(ItemsCount::new(together)).bench(|| {
        let appended = runtime.block_on(join_all((0..together).map(|_| journal.append(entry.clone()))));
        assert!(appended.iter().all(Result::is_ok), "{appended:?}");
    });
    runtime.block_on(journal.close());
}
