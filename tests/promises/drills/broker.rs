//! Brokers that forget what they acknowledged.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use futures_util::StreamExt as _;
use local::NatsServer;
use world::{World, eventually};

use crate::load::{copy, exactly_once, post, repeats, size, watchful};
use crate::wider_stream::{publish_foreign, widen};

/// Where a server keeps the stream's messages, and apart from them its consumers.
const MESSAGES: &str = "jetstream/jetstream/$G/streams/SIGNALS/msgs";

#[tokio::test]
async fn a_stream_put_back_to_an_older_copy_with_its_consumer_kept_loses_nothing() {
    put_back_with_its_consumer_kept(0).await;
}

/// Sequences have gaps there.
#[tokio::test]
async fn a_stream_that_is_shared_and_put_back_to_an_older_copy_loses_nothing() {
    put_back_with_its_consumer_kept(7).await;
}

/// So many messages of others lie between the deliveries.
async fn put_back_with_its_consumer_kept(foreign: usize) {
    let mut world = watchful().start().await;
    if foreign > 0 {
        widen(&world).await;
    }
    publish_foreign(&world, foreign).await;
    let mut ids = post(&world, 30).await;
    world.all_acknowledged().await;
    world.nats.stop().await.unwrap();
    let (messages, older) = (world.nats.options.dir.join(MESSAGES), world.folder().join("older"));
    copy(&messages, &older);
    world.nats.start_again().await.unwrap();
    // The consumer goes on to 50, the stream to 70; then the stream is back at 30.
    publish_foreign(&world, foreign).await;
    ids.extend(post(&world, 20).await);
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    ids.extend(post(&world, size(20, 2000)).await);
    published(&world).await;
    world.nats.kill().await;
    copy(&older, &messages);
    world.nats.start_again().await.unwrap();
    ids.extend(post(&world, 5).await); // these use sequences again
    world.workers[0].start_again();
    exactly_once(&world, &ids, 0).await;
    println!("{} published again", repeats(&world).await);
    assert!(repeats(&world).await >= size(20, 2000) as f64);
}

#[tokio::test]
async fn a_stream_whose_newest_block_is_cut_short_loses_nothing() {
    let mut world = watchful().start().await;
    let mut ids = post(&world, 10).await;
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    ids.extend(post(&world, size(60, 6000)).await);
    published(&world).await;
    world.nats.stop().await.unwrap();
    let blocks = fs::read_dir(world.nats.options.dir.join(MESSAGES)).unwrap().map(|file| file.unwrap().path());
    let number = |block: &PathBuf| block.file_stem()?.to_str()?.parse::<u64>().ok();
    let newest = blocks.filter(|file| file.extension().is_some_and(|is| is == "blk")).max_by_key(number).unwrap();
    let block = fs::File::options().write(true).open(newest).unwrap();
    block.set_len(block.metadata().unwrap().len() / 2).unwrap();
    world.nats.start_again().await.unwrap();
    ids.extend(post(&world, 5).await);
    world.workers[0].start_again();
    exactly_once(&world, &ids, 0).await;
    println!("{} published again", repeats(&world).await);
    assert!(repeats(&world).await >= 20.0, "the drill was one");
}

#[tokio::test]
async fn a_worker_that_acknowledges_and_stores_nothing_loses_nothing() {
    let world = watchful().start().await;
    let mut ids = post(&world, 10).await;
    world.all_acknowledged().await;
    let (stop, taken) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let consumer: PullConsumer =
        world.jetstream().await.get_stream("SIGNALS").await.unwrap().get_consumer("worker").await.unwrap();
    let rogue = tokio::spawn(acknowledge_all(consumer, stop.clone(), taken.clone()));
    for _ in 0..size(5, 50) {
        // Some of each round are its: it stands in line beside the real worker.
        let before = taken.load(Ordering::Relaxed);
        ids.extend(post(&world, 40).await);
        let took = || async { (taken.load(Ordering::Relaxed) > before).then_some(()) };
        eventually("the rogue to take something", took).await;
    }
    stop.store(true, Ordering::Relaxed);
    rogue.await.unwrap();
    exactly_once(&world, &ids, 0).await;
    let (taken, repeats) = (taken.load(Ordering::Relaxed), repeats(&world).await);
    println!("{taken} acknowledged by the rogue, {repeats} published again");
    assert!(taken > 5 && repeats >= 5.0, "the drill was one: {taken}, {repeats}");
}

/// Acknowledges what it is given, a few messages at a time, and forgets it.
async fn acknowledge_all(consumer: PullConsumer, stop: Arc<AtomicBool>, taken: Arc<AtomicUsize>) {
    while !stop.load(Ordering::Relaxed) {
        let batch = consumer.batch().max_messages(10).expires(Duration::from_millis(200));
        let mut messages = batch.messages().await.unwrap();
        while let Some(Ok(message)) = messages.next().await {
            message.double_ack().await.unwrap();
            taken.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[tokio::test]
async fn a_cluster_put_back_to_an_older_copy_loses_nothing() {
    cluster_put_back(|folder| vec![folder.join("jetstream")]).await;
}

/// Where a stream is replicated, the servers do not put a consumer right whose position lies beyond the stream's end: all
/// up to there is skipped.
#[tokio::test]
async fn a_cluster_put_back_to_an_older_copy_with_the_consumer_kept_loses_nothing() {
    cluster_put_back(|folder| {
        // The messages, and the stream's part of what the servers have agreed upon (its Raft group).
        let groups = fs::read_dir(folder.join("jetstream/jetstream/$SYS/_js_")).unwrap().map(|group| group.unwrap());
        let groups =
            groups.filter(|group| group.file_name().to_str().unwrap().starts_with("S-")).map(|group| group.path());
        let parts: Vec<_> = groups.chain([folder.join(MESSAGES)]).collect();
        assert_eq!(parts.len(), 2, "{parts:?}");
        parts
    })
    .await;
}

/// `parts` gives what of a server's folder is put back.
async fn cluster_put_back(parts: impl Fn(&Path) -> Vec<PathBuf>) {
    let mut world = watchful().cluster().start().await;
    let mut ids = post(&world, 30).await;
    world.until_confirmed().await;
    world.all_acknowledged().await;
    let older = world.folder().join("older");
    for server in servers(&mut world) {
        server.stop().await.unwrap();
        for part in parts(&server.options.dir) {
            let copied = older.join(server.port().to_string()).join(part.strip_prefix(&server.options.dir).unwrap());
            fs::create_dir_all(copied.parent().unwrap()).unwrap();
            copy(&part, &copied);
        }
    }
    start(&mut world).await;
    ids.extend(post(&world, 40).await);
    world.until_confirmed().await; // so far the consumer goes
    world.all_acknowledged().await;
    world.workers[0].kill().await;
    ids.extend(post(&world, size(20, 500)).await);
    published(&world).await;
    for server in servers(&mut world) {
        server.kill().await;
    }
    for server in servers(&mut world) {
        for part in parts(&server.options.dir) {
            let copied = older.join(server.port().to_string()).join(part.strip_prefix(&server.options.dir).unwrap());
            copy(&copied, &part);
        }
    }
    start(&mut world).await;
    ids.extend(post(&world, 10).await); // these use sequences again
    world.workers[0].start_again();
    exactly_once(&world, &ids, 0).await;
    println!("{} published again", repeats(&world).await);
    assert!(repeats(&world).await >= size(20, 500) as f64, "the drill was one");
}

fn servers(world: &mut World) -> impl Iterator<Item = &mut NatsServer> {
    std::iter::once(&mut world.nats).chain(&mut world.other_nats)
}

/// Starts all of a cluster; none is ready before the others are there.
async fn start(world: &mut World) {
    for server in servers(world) {
        server.launch_again().await.unwrap();
    }
    for server in servers(world) {
        server.ready().await.unwrap();
    }
}

/// Waits until JetStream has acknowledged all that the gateway has.
async fn published(world: &World) {
    let published =
        || async { (world.metric("gateway_journal_entries{state=\"journalled\"}").await == 0.0).then_some(()) };
    eventually("all to be published", published).await;
}
