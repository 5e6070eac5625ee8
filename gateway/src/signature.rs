//! The signature: proof that a delivery comes from somebody who knows the client secret.
//!
//! `Sentry-Hook-Signature` is 64 hex digits, the HMAC-SHA256 (RFC 2104) with the client secret over either of
//! - *raw*: the body's bytes. This is what Sentry signs.
//! - *canonical*: the UTF-8 of `JSON.stringify(JSON.parse(body))` (see [`crate::canonical`]). This is what Loop's
//!   documentation says; it differs from raw wherever Python and JavaScript write JSON differently.
//!
//! Both prove knowledge of the secret. Raw is tried first, it costs one pass; canonical only when raw fails, a bounded
//! number at once, so that unsigned floods cannot spend our CPU and genuine deliveries never wait for them.

use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::HeaderMap;
use tokio::sync::{Semaphore, watch};

use crate::canonical::canonical;
use crate::metrics::VerifyTimes;
use crate::reject::Reject;
use crate::secrets::Secrets;

/// The header that holds the signature.
pub const SIGNATURE: &str = "sentry-hook-signature";

/// How much of a body is hashed before others get their turn, some tens of microseconds' worth: a delivery of 2 KB never
/// waits for all of 8 MiB, let alone for as many of those as there may be in memory.
const PIECE: usize = 64 * 1024;
/// From this size on, the canonical form is made on a thread that may block.
const INLINE_MAX: usize = 16 * 1024;
/// How long a delivery waits for its turn to have its canonical form made, before it is told to come back.
const TURN_MAX: Duration = Duration::from_millis(500);

/// What a signature may be over: `SENTRY_SIGNATURE_FORM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Either.
    Any,
    /// Only the canonical form.
    Canonical,
    /// Only the body's bytes.
    Raw,
}

impl Form {
    /// The form of that name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "any" => Some(Form::Any),
            "canonical" => Some(Form::Canonical),
            "raw" => Some(Form::Raw),
            _ => None,
        }
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Form::Any => "any",
            Form::Canonical => "canonical",
            Form::Raw => "raw",
        }
    }
}

/// What the sender put into [`SIGNATURE`]: well formed, not yet believed.
#[derive(Clone)]
pub struct Signature(pub(crate) [u8; 32]);

impl Signature {
    /// Takes it from a request's headers.
    ///
    /// # Errors
    /// Where it is missing, or is not exactly one value of 64 hex digits.
    pub fn of(headers: &HeaderMap) -> Result<Self, Reject> {
        let mut values = headers.get_all(SIGNATURE).into_iter();
        let value = values.next().ok_or(Reject::SignatureMissing)?;
        let mut tag = [0; 32];
        match (values.next(), hex::decode_to_slice(value, &mut tag)) {
            (None, Ok(())) => Ok(Signature(tag)),
            _ => Err(Reject::SignatureMalformed),
        }
    }
}

/// A body whose signature was right. Only [`Verifier::verify`] makes one, so nothing else can go on from here.
#[derive(Debug)]
pub struct VerifiedBody {
    bytes: Bytes,
    form: Form,
    digest: BodyDigest,
}

/// 128 bits of a right signature: a digest of a body, keyed with the client secret. Two different bodies have the same
/// digest only when both have the same canonical form and were signed over that form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyDigest(pub(crate) [u64; 2]);

impl BodyDigest {
    fn of(signature: &Signature) -> Self {
        let half = |at: usize| std::array::from_fn(|byte| signature.0[at + byte]);
        BodyDigest([u64::from_be_bytes(half(0)), u64::from_be_bytes(half(8))])
    }
}

impl VerifiedBody {
    fn new(bytes: Bytes, form: Form, signature: &Signature) -> Self {
        VerifiedBody { bytes, form, digest: BodyDigest::of(signature) }
    }

    /// Its digest.
    pub fn digest(&self) -> BodyDigest {
        self.digest
    }

    /// The signed form: [`Form::Raw`] or [`Form::Canonical`].
    pub fn form(&self) -> Form {
        self.form
    }

    /// The bytes.
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }
}

/// Verifies bodies.
#[derive(Debug)]
pub struct Verifier {
    /// As they are now: they may change while this runs.
    secrets: watch::Receiver<Secrets>,
    form: Form,
    /// How many canonical forms are made at once.
    turns: Semaphore,
    times: VerifyTimes,
}

impl Verifier {
    /// A verifier that takes signatures of `form` by any of `secrets`, and makes `canonical` canonical forms at once.
    pub fn new(secrets: watch::Receiver<Secrets>, form: Form, canonical: usize) -> Self {
        Verifier { secrets, form, turns: Semaphore::new(canonical), times: VerifyTimes::default() }
    }

    /// One that tells `times` how long it took.
    #[must_use]
    pub fn timed(self, times: VerifyTimes) -> Self {
        Verifier { times, ..self }
    }

    /// The secrets that may have signed.
    pub fn secrets(&self) -> Secrets {
        self.secrets.borrow().clone()
    }

    /// Gives the body back as a verified one.
    ///
    /// # Errors
    /// [`Reject::BadSignature`] where no secret gives this signature; [`Reject::VerifyBusy`] where too many canonical
    /// forms wait to be made.
    pub async fn verify(&self, body: Bytes, signature: &Signature) -> Result<VerifiedBody, Reject> {
        let secrets = self.secrets();
        match self.find_form(&secrets, &body, signature).await? {
            Some((form, place)) => {
                secrets.count_right(place);
                Ok(VerifiedBody::new(body, form, signature))
            }
            None => {
                secrets.count_wrong();
                Err(Reject::BadSignature)
            }
        }
    }

    /// The signed form, and the place of the secret that has signed it.
    async fn find_form(
        &self,
        secrets: &Secrets,
        body: &Bytes,
        signature: &Signature,
    ) -> Result<Option<(Form, usize)>, Reject> {
        if self.form != Form::Canonical {
            let begin = Instant::now();
            let matched = signed(secrets, body, signature).await;
            self.times.raw(matched.is_some(), begin.elapsed());
            if let Some(place) = matched {
                return Ok(Some((Form::Raw, place)));
            }
        }
        if self.form == Form::Raw {
            return Ok(None);
        }
        let turn = tokio::time::timeout(TURN_MAX, self.turns.acquire()).await.map_err(|_| Reject::VerifyBusy)?;
        let _turn = turn.expect("this semaphore is never closed");
        let begin = Instant::now();
        let matched = if body.len() <= INLINE_MAX {
            canonical(body).ok().and_then(|form| secrets.signed(&form, signature))
        } else {
            let (secrets, body, signature) = (secrets.clone(), body.clone(), signature.clone());
            let check = move || canonical(&body).ok().and_then(|form| secrets.signed(&form, &signature));
            tokio::task::spawn_blocking(check).await.expect("making a canonical form does not panic")
        };
        self.times.canonical(matched.is_some(), begin.elapsed());
        Ok(matched.map(|place| (Form::Canonical, place)))
    }
}

/// [`Secrets::signed`], which lets others go on between the pieces.
async fn signed(secrets: &Secrets, body: &[u8], signature: &Signature) -> Option<usize> {
    let mut signing = secrets.begin();
    let mut pieces = body.chunks(PIECE).peekable();
    while let Some(piece) = pieces.next() {
        signing.update(piece);
        if pieces.peek().is_some() {
            tokio::task::yield_now().await;
        }
    }
    signing.gives(signature)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::Source;

    /// Computed with Python: `hmac.new(b"a-secret-of-the-tests", b'{"a":1.0}', "sha256").hexdigest()`.
    const RAW: &str = "3139449d69a3aebfacd017cdedf9a8adfff6d1f2c5c38931579876af2bcd3275";
    /// The same over `{"a":1}`.
    const CANONICAL: &str = "8d045858cfbb3a3ef9aa8387eab52fcd3e049de5b010796b6dd1910b23704552";
    const BODY: &[u8] = br#"{"a":1.0}"#;

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (SIGNATURE.parse().unwrap(), value.parse().unwrap())).collect()
    }

    const SECRET: &str = "a-secret-of-the-tests";

    async fn verifies(secrets: &str, form: Form, signature: &str) -> bool {
        let verifier = Verifier::new(Source::fixed(Secrets::parse(secrets).unwrap()).current(), form, 1);
        let signature = Signature::of(&headers(&[signature])).unwrap();
        match verifier.verify(Bytes::from_static(BODY), &signature).await {
            Ok(body) => body.into_bytes() == BODY,
            Err(reject) => {
                assert!(matches!(reject, Reject::BadSignature), "{reject:?}");
                false
            }
        }
    }

    #[tokio::test]
    async fn each_form_takes_what_it_says() {
        let table = [(Form::Any, true, true), (Form::Raw, true, false), (Form::Canonical, false, true)];
        for (form, raw, canonical) in table {
            assert_eq!(verifies(SECRET, form, RAW).await, raw, "{form:?}");
            assert_eq!(verifies(SECRET, form, CANONICAL).await, canonical, "{form:?}");
            assert!(!verifies(SECRET, form, &"0".repeat(64)).await, "{form:?}");
        }
    }

    #[tokio::test]
    async fn any_of_several_secrets_may_have_signed() {
        assert!(verifies(&format!("the-other-secret, {SECRET}"), Form::Any, RAW).await);
        assert!(verifies(&format!("{SECRET},the-other-secret"), Form::Any, CANONICAL).await);
        assert!(!verifies("the-other-secret,the-third-secret", Form::Any, RAW).await);
    }

    #[test]
    fn a_signature_is_64_hex_digits_and_nothing_else() {
        assert!(Signature::of(&headers(&[RAW])).is_ok());
        assert!(Signature::of(&headers(&[&RAW.to_uppercase()])).is_ok());
        assert!(matches!(Signature::of(&headers(&[])), Err(Reject::SignatureMissing)));
        let prefixed = format!("sha256={RAW}");
        for bad in ["", "0", &RAW[1..], &prefixed, &format!("{RAW}0"), &format!("{}g", &RAW[1..])] {
            assert!(matches!(Signature::of(&headers(&[bad])), Err(Reject::SignatureMalformed)), "{bad}");
        }
        assert!(matches!(Signature::of(&headers(&[RAW, RAW])), Err(Reject::SignatureMalformed)));
    }
}
