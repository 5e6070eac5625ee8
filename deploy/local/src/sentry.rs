//! Plays Sentry: signs a payload as Sentry does and posts it, headers and time limit included
//! (getsentry/sentry, `sentry_apps` and `SafeSession`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http_body_util::Full;
use hyper::{Request, Response, Uri};
use sha2::Sha256;

use crate::{http, wire};

/// Sentry gives up after this time.
const TIME_LIMIT: Duration = Duration::from_secs(1);

/// What is posted and what is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// As Sentry does: its own form of the JSON is posted, and those bytes are signed.
    Wire,
    /// Sentry's form is posted, its canonical form (`JSON.stringify`) is signed.
    Canonical,
    /// The file is posted as it is, and its bytes are signed. The only one for what is no JSON.
    Raw,
    /// Sentry's form is posted with a signature that is wrong.
    Bad,
}

impl Sign {
    /// Every one, by the name a person gives it.
    pub const ALL: [(&'static str, Sign); 4] =
        [("wire", Sign::Wire), ("canonical", Sign::Canonical), ("raw", Sign::Raw), ("bad", Sign::Bad)];
}

/// A delivery, ready to be posted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The request's body.
    pub body: Vec<u8>,
    /// 64 hex digits.
    pub signature: String,
    /// `Sentry-Hook-Resource`
    pub resource: String,
    /// `Request-ID`: what makes a delivery posted twice the same delivery.
    pub request_id: String,
}

impl Delivery {
    /// Signs `payload` (a file's bytes) with `secret`; the resource is guessed from the payload unless it is given.
    ///
    /// # Errors
    /// When the payload is no JSON, unless it is signed [`Sign::Raw`].
    pub fn sign(payload: &[u8], secret: &str, sign: Sign, resource: Option<&str>) -> anyhow::Result<Delivery> {
        let wired = wire::of(payload);
        let guessed = wired.as_ref().map_or("issue", |wire| wire.resource);
        let resource = resource.unwrap_or(guessed).to_owned();
        let body = match sign {
            Sign::Raw => payload.to_vec(),
            Sign::Wire | Sign::Canonical | Sign::Bad => {
                wired.context("Sentry sends JSON only; `--sign raw` posts the file as it is")?.body
            }
        };
        let signature = match sign {
            Sign::Wire | Sign::Raw => hmac_of(secret, &body),
            Sign::Canonical => hmac_of(secret, &gateway::canonical::canonical(&body)?),
            Sign::Bad => "0".repeat(64),
        };
        let request_id = uuid::Uuid::new_v4().simple().to_string();
        Ok(Delivery { body, signature, resource, request_id })
    }

    /// Posts it, once: for internal integrations Sentry tries no second time.
    ///
    /// # Errors
    /// When there is no answer within Sentry's time limit of one second.
    pub async fn post(&self, url: &Uri) -> anyhow::Result<Response<Bytes>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let request = Request::post(url)
            .header("User-Agent", "sentry/26.8.0 (https://sentry.io)")
            .header("Accept-Encoding", "gzip, deflate")
            .header("Accept", "*/*")
            .header("Connection", "keep-alive")
            .header("Content-Type", "application/json")
            .header("Request-ID", &self.request_id)
            .header("Sentry-Hook-Resource", &self.resource)
            .header("Sentry-Hook-Timestamp", now.to_string())
            .header("Sentry-Hook-Signature", &self.signature)
            .body(Full::from(self.body.clone()))
            .context("the resource or the request id cannot stand in a header")?;
        http::exchange(request, TIME_LIMIT).await
    }
}

fn hmac_of(secret: &str, bytes: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC accepts a key of any length");
    mac.update(bytes);
    hex::encode(mac.finalize().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOAD: &[u8] = br#"{ "data": {"event": {"n": 1.0}}, "action": "triggered" }"#;

    #[test]
    fn each_way_signs_what_it_says() {
        let signed = |sign| Delivery::sign(PAYLOAD, "secret", sign, None).unwrap();
        // openssl dgst -sha256 -hmac secret, of the bytes on the left.
        let wire = signed(Sign::Wire);
        assert_eq!(wire.body, br#"{"action":"triggered","data":{"event":{"n":1.0}}}"#);
        assert_eq!(wire.signature, WIRE_SIGNATURE);
        assert_eq!(wire.resource, "event_alert");
        let raw = signed(Sign::Raw);
        assert_eq!((raw.body.as_slice(), raw.signature.as_str()), (PAYLOAD, RAW_SIGNATURE));
        let bad = signed(Sign::Bad);
        assert_eq!((bad.body, bad.signature.len()), (wire.body, 64));
        assert_ne!(bad.signature, wire.signature);
        assert_ne!(raw.request_id, wire.request_id);
    }

    #[test]
    fn what_is_no_json_can_only_be_sent_raw() {
        let refused = Delivery::sign(b"{", "secret", Sign::Wire, None).unwrap_err();
        assert!(refused.to_string().contains("--sign raw"));
        assert_eq!(Delivery::sign(b"{", "secret", Sign::Raw, Some("error")).unwrap().resource, "error");
    }

    const WIRE_SIGNATURE: &str = "bec8f9aed8583f6de505e899d76ffb549bcf59295bca5b6e2d5c99db5fa2e125";
    const RAW_SIGNATURE: &str = "f8574670dae30c382c0646b0b0c62e01d180e26cd6d84ddd1367b30305749130";
}
