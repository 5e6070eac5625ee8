//! What the load is made of: Sentry-like JSON of a given size, no two of them alike, each signed.
//!
//! A body is what Sentry sends of an error: frames with their lines of code, breadcrumbs, tags, all from a seeded
//! generator, written as Sentry's serializer writes them (`\u00e9`, `1.0`). A few hundred are made before the clock
//! starts. What makes each request's body one of its own is the installation's number at its end; the HMAC's state
//! over all before that is kept, so that signing anew costs two blocks of SHA-256 whatever the size.

use bytes::Bytes;
use fastrand::Rng;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use world::SECRET;

/// The end of each body: a number of 16 hex digits, and what closes the JSON.
const TAIL: usize = 16 + 3;
/// Memory that the bodies of one size take together, where that is enough for [`FEWEST`] of them.
const POOL_BYTES: usize = 4 << 20;
const FEWEST: usize = 8;
const MOST: usize = 1024;

const WORDS: &str = "\
    account action adapter address agent alias array asset attempt audit auth avatar backend backoff badge balance \
    bank batch bearer berth billing binding block bridge broker bucket buffer build bundle button cache calendar \
    canvas card cargo cart catalog channel chart checkout child chunk cipher client clock cluster codec column \
    command commit config consumer context cookie counter coupon courier credit cursor customer daemon dashboard \
    database deadline decoder default deploy device digest dispatch docket document domain draft driver editor email \
    encoder endpoint engine entity entry envelope event exchange export factory failure feature feed field filter \
    finance flag folder forecast format frame gateway gauge geometry grant graph guard handler harbor header health \
    history hook import index inbox ingest inspector invoice issuer item journal kernel keyring label lambda latch \
    layer ledger lease legacy limit link listener loader locale locker login lookup mailer manifest mapper margin \
    marker matrix member memory merge message meter migration mirror model module monitor mutex namespace network \
    node notify object offer operator option order origin outbox owner packet pager parcel parser partner patch \
    payload payment permit pipeline pivot planner plugin policy pool portal prefix preview price printer probe \
    process profile project promise proxy publish quantity query queue quota ranking reader receipt record redirect \
    refund region registry release render replica report request reserve resolver resource response retry return \
    revision role rollback route runner schedule schema scope search secret segment sender sequence serializer \
    server session settings shard shipment signal sink snapshot socket source stage statement status storage stream \
    subject summary supplier support switch symbol tariff tenant terminal thread ticket timeout token topic trace \
    tracker transfer trigger tunnel update upload vault vendor vessel viewport voucher wallet warehouse watcher \
    webhook widget window worker workflow wrapper writer yard zone";

/// Deliveries of one size, signed with [`SECRET`].
pub(crate) struct Deliveries {
    size: usize,
    begun: Vec<Begun>,
}

/// A body without its tail.
struct Begun {
    text: Vec<u8>,
    mac: Hmac<Sha256>,
}

impl Deliveries {
    /// Of `size` bytes each, from 1 KB on. The same seed gives the same ones.
    pub(crate) fn of_size(size: usize, seed: u64) -> Deliveries {
        let mut rng = Rng::with_seed(seed);
        let count = (POOL_BYTES / size).clamp(FEWEST, MOST);
        let keyed = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("HMAC takes a key of any length");
        let words: Vec<&str> = WORDS.split_ascii_whitespace().collect();
        let begin = |_| {
            let text = begin(&mut rng, &words, size - TAIL);
            let mac = keyed.clone().chain_update(&text);
            Begun { text, mac }
        };
        Deliveries { size, begun: (0..count).map(begin).collect() }
    }

    /// The size of each.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// From how many on they begin alike, all but the tail.
    pub(crate) fn distinct(&self) -> u64 {
        self.begun.len() as u64
    }

    /// Body number `n` but for its tail.
    pub(crate) fn text(&self, n: u64) -> &[u8] {
        &self.begun(n).text
    }

    /// The tail of body number `n`, and the signature of the whole in hex.
    pub(crate) fn tail(&self, n: u64) -> ([u8; TAIL], [u8; 64]) {
        let (tail, mut signature) = (tail(n), [0; 64]);
        let tag = self.begun(n).mac.clone().chain_update(tail).finalize().into_bytes();
        hex::encode_to_slice(tag, &mut signature).expect("32 bytes are 64 digits");
        (tail, signature)
    }

    /// Body number `n`, whole.
    pub(crate) fn body(&self, n: u64) -> Bytes {
        Bytes::from([self.text(n), &tail(n)].concat())
    }

    fn begun(&self, n: u64) -> &Begun {
        &self.begun[usize::try_from(n % self.begun.len() as u64).expect("less than a length")]
    }
}

fn tail(n: u64) -> [u8; TAIL] {
    let mut tail = *b"0000000000000000\"}}";
    hex::encode_to_slice(n.to_be_bytes(), &mut tail[..16]).expect("8 bytes are 16 digits");
    tail
}

/// An error as Sentry tells it, up to where the tail begins, in exactly `length` bytes.
fn begin(rng: &mut Rng, words: &[&'static str], length: usize) -> Vec<u8> {
    const END: &str = r#""}}},"installation":{"uuid":""#;
    let mut text = Text { rng, words, out: String::with_capacity(length) };
    text.head();
    text.list("frames", length * 3 / 4, Text::frame);
    text.out.push_str(r#"}}]},"breadcrumbs":{"values":["#);
    text.items(length.saturating_sub(200 + END.len()), Text::breadcrumb);
    text.out.push_str(r#"]},"extra":{"trace":""#);
    // To the byte.
    while text.out.len() + END.len() < length {
        let digit = char::from_digit(text.rng.u32(0..36), 36).unwrap_or('0');
        text.out.push(digit);
    }
    text.out.push_str(END);
    assert_eq!(text.out.len(), length, "a body of {length} bytes is too small for an error");
    text.out.into_bytes()
}

struct Text<'a> {
    rng: &'a mut Rng,
    words: &'a [&'static str],
    out: String,
}

impl Text<'_> {
    fn word(&mut self) -> &'static str {
        self.words[self.rng.usize(0..self.words.len())]
    }

    fn phrase(&mut self, count: usize, between: &str) -> String {
        (0..count).map(|_| self.word()).collect::<Vec<_>>().join(between)
    }

    fn hex(&mut self) -> String {
        format!("{:016x}", self.rng.u64(..))
    }

    fn head(&mut self) {
        let (action, level) = (self.word(), ["error", "error", "warning", "fatal", "info"][self.rng.usize(0..5)]);
        let (title, culprit, id) = (self.phrase(4, " "), self.phrase(3, "."), self.rng.u64(1 << 32..1 << 33));
        let (event, environment, at) = (self.hex(), self.word(), self.rng.u32(1_600_000_000..1_800_000_000));
        let (city, release) = (self.word(), self.hex());
        self.out.push_str(&format!(
            r#"{{"action":"{action}","data":{{"error":{{"event_id":"{event}{release}","issue_id":"{id}","level":"{level}","#
        ));
        self.out.push_str(&format!(
            r#""title":"KeyError: {title}","culprit":"{culprit}","platform":"python","received":{at}.0,"timestamp":{at}.437,"#
        ));
        self.out.push_str(&format!(
            r#""user":{{"id":"{id}","geo":{{"city":"Caf\u00e9 {city}","region":null}}}},"release":"{release}","#
        ));
        self.out.push_str(&format!(
            r#""tags":[["environment","{environment}"],["handled","no"]],"exception":{{"values":[{{"stacktrace":{{"#
        ));
    }

    /// `"name":[...]`
    fn list(&mut self, name: &str, up_to: usize, item: fn(&mut Self)) {
        self.out.push_str(&format!(r#""{name}":["#));
        self.items(up_to, item);
        self.out.push(']');
    }

    /// Items, until the text would be longer than `up_to`.
    fn items(&mut self, up_to: usize, item: fn(&mut Self)) {
        let first = self.out.len();
        loop {
            let before = self.out.len();
            if before > first {
                self.out.push(',');
            }
            item(self);
            if self.out.len() > up_to {
                self.out.truncate(before);
                return;
            }
        }
    }

    fn frame(&mut self) {
        let (file, module, function) = (self.phrase(4, "/"), self.phrase(3, "."), self.phrase(2, "_"));
        let (line, column, address) = (self.rng.u32(1..4000), self.rng.u32(1..120), self.hex());
        let (name, value, call) = (self.word(), self.hex(), self.phrase(2, "."));
        let (before, after) = (self.phrase(4, ", "), self.phrase(5, " "));
        self.out.push_str(&format!(
            r#"{{"filename":"{file}.py","module":"{module}","function":"{function}","lineno":{line},"colno":{column},"#
        ));
        self.out.push_str(&format!(
            r#""abs_path":"/srv/{file}.py","instruction_addr":"0x{address}","in_app":{},"pre_context":["def {function}({before}):"],"#,
            line % 2 == 0,
        ));
        self.out.push_str(&format!(
            r#""context_line":"    {name} = {call}(\"{value}\")","post_context":["        # {after}",""],"vars":{{"{name}":"'{value}'"}}}}"#
        ));
    }

    fn breadcrumb(&mut self) {
        let (category, message, at) =
            (self.phrase(2, "."), self.phrase(6, " "), self.rng.u32(1_600_000_000..1_800_000_000));
        let (id, took) = (self.hex(), self.rng.f64());
        self.out.push_str(&format!(
            r#"{{"timestamp":{at}.25,"category":"{category}","message":"{message} {id}","data":{{"took":{took:.6}}},"level":"info"}}"#
        ));
    }
}
