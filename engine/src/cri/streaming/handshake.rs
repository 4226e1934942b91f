//! What a client asks for in its headers, and what it is answered: no I/O.

use axum::http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION,
    UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// The protocol that all streams are carried by, as a client asks for it.
pub(super) const SPDY: &str = "SPDY/3.1";
const VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// An answer, whose text is for a person.
pub(super) type Answer = Response<String>;

/// Whether a client asks for a WebSocket.
pub(super) fn is_websocket(headers: &HeaderMap) -> bool {
    has(headers, &CONNECTION, "upgrade") && has(headers, &UPGRADE, "websocket")
}

/// What is chosen of `served` for a client that speaks SPDY, and the answer that says so; none, and the refusal.
pub(super) fn spdy<T: Copy>(headers: &HeaderMap, served: &[(&'static str, T)]) -> (Option<T>, Answer) {
    if !(has(headers, &CONNECTION, "upgrade") && has(headers, &UPGRADE, SPDY)) {
        return (
            None,
            refusal(
                StatusCode::BAD_REQUEST,
                format!(
                    "streams are carried by {SPDY} or by a WebSocket; send the headers Connection and Upgrade"
                ),
            ),
        );
    }
    if !headers.contains_key(VERSION) {
        return (None, refusal(StatusCode::BAD_REQUEST, format!("the header {VERSION} is missing")));
    }
    let wanted = values(headers, &VERSION);
    let Some((name, chosen)) = choose(&wanted, served) else {
        let mut answer = refusal(
            StatusCode::FORBIDDEN,
            format!("none of the protocols {wanted:?} is served; these are: {:?}", names(served)),
        );
        for (name, _) in served {
            answer.headers_mut().append(ACCEPTED, HeaderValue::from_static(name));
        }
        return (None, answer);
    };
    let mut answer = switching(SPDY);
    answer.headers_mut().insert(VERSION, HeaderValue::from_static(name));
    (Some(chosen), answer)
}

/// The same for a WebSocket. A client that names no protocol gets the one that is called "".
pub(super) fn websocket<T: Copy>(headers: &HeaderMap, served: &[(&'static str, T)]) -> (Option<T>, Answer) {
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let mut answer = refusal(
            StatusCode::UPGRADE_REQUIRED,
            "only version 13 of the WebSocket protocol is served".into(),
        );
        answer.headers_mut().insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return (None, answer);
    }
    let Some(key) = headers.get(SEC_WEBSOCKET_KEY) else {
        return (
            None,
            refusal(StatusCode::BAD_REQUEST, format!("the header {SEC_WEBSOCKET_KEY} is missing")),
        );
    };
    // Base64 is fit for a header.
    let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes())).ok();
    let mut wanted = values(headers, &SEC_WEBSOCKET_PROTOCOL);
    if wanted.is_empty() {
        wanted.push("");
    }
    let Some((name, chosen)) = choose(&wanted, served) else {
        return (
            None,
            refusal(
                StatusCode::FORBIDDEN,
                format!("none of the protocols {wanted:?} is served; these are: {:?}", names(served)),
            ),
        );
    };
    let mut answer = switching("websocket");
    answer.headers_mut().extend(accept.map(|accept| (SEC_WEBSOCKET_ACCEPT, accept)));
    if !name.is_empty() {
        answer.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(name));
    }
    (Some(chosen), answer)
}

/// An answer that says why there is no other.
pub(super) fn refusal(status: StatusCode, why: String) -> Answer {
    let mut answer = Response::new(why + "\n");
    *answer.status_mut() = status;
    answer
}

fn switching(to: &'static str) -> Answer {
    let mut answer = Response::new(String::new());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.headers_mut().insert(UPGRADE, HeaderValue::from_static(to));
    answer
}

/// The first that the client names and we serve.
fn choose<T: Copy>(wanted: &[&str], served: &[(&'static str, T)]) -> Option<(&'static str, T)> {
    wanted.iter().find_map(|wanted| served.iter().find(|(name, _)| name == wanted).copied())
}

fn names<T>(served: &[(&'static str, T)]) -> Vec<&'static str> {
    served.iter().map(|(name, _)| *name).collect()
}

fn has(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    values(headers, name).iter().any(|value| value.eq_ignore_ascii_case(word))
}

/// All that a header lists, with commas or in several lines.
fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a str> {
    let lines = headers.get_all(name).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|value| !value.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        let mut headers = HeaderMap::new();
        for (name, value) in pairs.iter().map(pair) {
            headers.append(name, value);
        }
        headers
    }

    const SERVED: &[(&str, u8)] = &[("v4.channel.k8s.io", 4), ("channel.k8s.io", 1), ("", 0)];

    #[test]
    fn the_first_that_a_client_names_is_chosen() {
        let upgrade = [("connection", "keep-alive, Upgrade"), ("upgrade", "spdy/3.1")];
        let version = "x-stream-protocol-version";
        let wanted = [(version, "v9.channel.k8s.io, channel.k8s.io"), (version, "v4.channel.k8s.io")];
        let (chosen, answer) = spdy(&headers(&[&upgrade[..], &wanted[..]].concat()), SERVED);
        assert_eq!((chosen, answer.status()), (Some(1), StatusCode::SWITCHING_PROTOCOLS));
        assert_eq!(answer.headers()[VERSION], "channel.k8s.io");
        assert_eq!(answer.headers()[UPGRADE], SPDY);
    }

    #[test]
    fn who_names_nothing_that_is_served_hears_what_is() {
        let upgrade = [("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
        let unknown = [&upgrade[..], &[("x-stream-protocol-version", "v9.channel.k8s.io")]].concat();
        let refused = spdy(&headers(&unknown), SERVED).1;
        assert_eq!(
            (refused.status(), refused.headers().get_all(ACCEPTED).iter().count()),
            (StatusCode::FORBIDDEN, 3)
        );
        assert_eq!(spdy(&headers(&upgrade), SERVED).1.status(), StatusCode::BAD_REQUEST);
        assert_eq!(spdy(&headers(&[]), SERVED).1.status(), StatusCode::BAD_REQUEST);
    }

    #[test]
    fn a_websocket_is_answered_as_its_standard_says() {
        // The example of RFC 6455.
        let asked = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        assert!(is_websocket(&headers(&asked)) && !is_websocket(&headers(&asked[1..])));
        let (chosen, answer) = websocket(&headers(&asked), SERVED);
        assert_eq!((chosen, answer.headers().get(SEC_WEBSOCKET_PROTOCOL)), (Some(0), None));
        assert_eq!(answer.headers()[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let named = [&asked[..], &[("sec-websocket-protocol", "v4.channel.k8s.io")]].concat();
        let (chosen, answer) = websocket(&headers(&named), SERVED);
        assert_eq!(
            (chosen, &answer.headers()[SEC_WEBSOCKET_PROTOCOL]),
            (Some(4), &HeaderValue::from_static("v4.channel.k8s.io"))
        );
        let other = [&asked[..], &[("sec-websocket-protocol", "chat")]].concat();
        assert_eq!(websocket(&headers(&other), SERVED).1.status(), StatusCode::FORBIDDEN);
        assert_eq!(websocket(&headers(&asked[..2]), SERVED).1.status(), StatusCode::UPGRADE_REQUIRED);
    }
}
