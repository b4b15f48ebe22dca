//! Messages: what is understood is written and understood again as the same, and what is
//! not is answered with an error that can be sent.

use serde_json::Value;
use time_masternode::limits::{MAX_FRAME_BYTES, MAX_TEXT};
use time_masternode::net::{ErrorCode, ErrorMessage, Incoming, NetworkMessage, encode, parse};

use super::Outcome;

/// An error's text is at most this long, whatever caused it.
const MAX_ERROR_TEXT: usize = 16 * MAX_TEXT;

/// A frame's body, as [`parse`] gets it.
pub fn messages(data: &[u8]) -> Outcome {
    if data.len() > MAX_FRAME_BYTES {
        return Outcome::Refused;
    }
    match parse(data) {
        Ok(incoming) => {
            understood(data, &incoming);
            Outcome::Accepted
        }
        Err(error) => {
            refused(data, error);
            Outcome::Refused
        }
    }
}

fn understood(data: &[u8], incoming: &Incoming) {
    let Incoming { message, request_id } = incoming;
    assert!(request_id.as_ref().is_none_or(|id| id.len() <= MAX_TEXT));
    let value = serde_json::to_value(message).expect("a message is JSON");
    let tags: Vec<&String> = value.as_object().expect("a message is an object").keys().collect();
    assert_eq!(tags.len(), 1);
    assert!(NetworkMessage::NAMES.contains(&tags[0].as_str()), "{tags:?}");
    if let Ok(Value::Object(sent)) = serde_json::from_slice(data) {
        assert_eq!(sent.keys().collect::<Vec<_>>(), tags, "the tag is the one that was sent");
    }

    let written = encode(message, request_id.as_deref());
    let again = parse(&written).expect("what this program writes it reads");
    assert_eq!(again.request_id, *request_id);
    // An error carries the id in a field of its own, too, and there the answer's is put.
    match (&again.message, message, request_id) {
        (NetworkMessage::Error(again), NetworkMessage::Error(error), Some(id)) => {
            assert_eq!(*again, ErrorMessage { request_id: Some(id.clone()), ..error.clone() });
        }
        (again, message, _) => assert_eq!(again, message),
    }
    assert_eq!(encode(&again.message, request_id.as_deref()), written, "one message has one encoding");
    if request_id.is_some() {
        assert_eq!(parse(&encode(message, None)).expect("it is read without an id too").message, *message);
    }
}

fn refused(data: &[u8], error: ErrorMessage) {
    assert!(matches!(error.code, ErrorCode::Malformed | ErrorCode::UnknownMessage), "{error:?}");
    assert!(error.message.len() <= MAX_ERROR_TEXT, "{} bytes of error", error.message.len());
    assert!(error.request_id.as_ref().is_none_or(|id| id.len() <= MAX_TEXT));
    if error.code == ErrorCode::UnknownMessage
        && let Ok(Value::Object(sent)) = serde_json::from_slice(data)
    {
        assert!(sent.keys().all(|tag| !NetworkMessage::NAMES.contains(&tag.as_str())), "{error:?}");
    }
    let request_id = error.request_id.clone();
    let answer = encode(&NetworkMessage::Error(error.clone()), request_id.as_deref());
    let read = parse(&answer).expect("an error is a message");
    assert_eq!(read, Incoming { message: NetworkMessage::Error(error), request_id });
}
