//! That the load is what [`crate::bodies`] says. Apart from it, because the micro-benchmarks have that file, too.

use std::collections::HashSet;

use world::SECRET;

use crate::bodies::Deliveries;

#[test]
fn bodies_are_json_of_their_size_and_no_two_are_alike() {
    for size in [1024, 2048, 16_384, 131_072] {
        let deliveries = Deliveries::of_size(size, 7);
        let mut seen = HashSet::new();
        for n in 0..50 {
            let body = deliveries.body(n);
            assert_eq!(body.len(), size);
            let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert!(value["data"]["error"]["title"].is_string(), "{value}");
            assert!(worker::interpret::interpret(&body).unwrap().title.starts_with("Sentry: KeyError: "));
            assert!(seen.insert(body));
        }
    }
}

#[test]
fn the_signature_is_that_of_the_whole_body() {
    let deliveries = Deliveries::of_size(2048, 1);
    let (tail, signature) = deliveries.tail(u64::MAX - 3);
    let body = [deliveries.text(u64::MAX - 3), &tail].concat();
    assert_eq!(body, deliveries.body(u64::MAX - 3));
    assert_eq!(world::sign(SECRET, &body).as_bytes(), signature);
}
