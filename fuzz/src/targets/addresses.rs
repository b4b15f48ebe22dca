//! Addresses, and the other short texts that people type: outpoints, hashes, amounts. One
//! value has one text, and every text that is refused is refused for a reason.

use time_masternode::types::{Address, AddressError, Amount, Network, OutPoint, Txid};

use super::Outcome;
use super::oracle::bech32m;

/// Texts longer than this are looked at by nobody: they are no addresses.
const MAX_LENGTH: usize = 4_096;

/// Any text.
pub fn addresses(data: &[u8]) -> Outcome {
    let Ok(text) = std::str::from_utf8(data) else { return Outcome::Refused };
    if text.len() > MAX_LENGTH {
        return Outcome::Refused;
    }
    outpoints(text);
    amounts(text);
    let parsed = text.parse::<Address>();
    let network_of = |hrp: &str| Network::ALL.into_iter().find(|network| network.hrp() == hrp);
    let expected = bech32m(text)
        .filter(|(hrp, payload)| network_of(hrp).is_some() && payload.len() == Address::PAYLOAD_LEN && payload[0] == 0);
    assert_eq!(parsed.is_ok(), expected.is_some(), "{text:?}: {parsed:?}, and it decodes as {expected:?}");
    match (parsed, expected) {
        (Ok(address), Some((hrp, payload))) => {
            assert_eq!((Some(address.network()), address.payload().as_slice()), (network_of(&hrp), payload.as_slice()));
            accepted(text, &address);
            Outcome::Accepted
        }
        (Err(error), _) => {
            refused(text, &error);
            Outcome::Refused
        }
        (Ok(_), None) => unreachable!("compared above"),
    }
}

fn accepted(text: &str, address: &Address) {
    assert_eq!(address.to_string(), text.to_ascii_lowercase(), "an address has one text");
    for network in Network::ALL {
        let expected = if network == address.network() {
            Ok(*address)
        } else {
            Err(AddressError::Network { expected: network, found: address.network() })
        };
        assert_eq!(Address::parse(text, network), expected);
        let moved = Address::from_payload(network, *address.payload()).expect("the payload is of a known version");
        assert_eq!(moved.to_string().parse(), Ok(moved), "what is written is read");
        assert_eq!(moved == *address, network == address.network());
    }
    let json = serde_json::to_string(address).expect("an address is JSON");
    assert_eq!(serde_json::from_str::<Address>(&json).expect("it is read again"), *address);
    let bytes = bincode::serialize(address).expect("an address is a row's part");
    assert_eq!(bincode::deserialize::<Address>(&bytes).expect("it is read again"), *address);
    // A checksum of six characters notices every single wrong one; here a few places.
    for place in [0, text.len() / 2, text.len() - 1] {
        let mut changed = text.as_bytes().to_vec();
        changed[place] = if changed[place].eq_ignore_ascii_case(&b'q') { b'p' } else { b'q' };
        let changed = String::from_utf8(changed).expect("an address is ASCII");
        assert!(changed.parse::<Address>().is_err(), "{changed}");
    }
}

fn refused(text: &str, error: &AddressError) {
    let mixed = text.bytes().any(|b| b.is_ascii_uppercase()) && text.bytes().any(|b| b.is_ascii_lowercase());
    let decoded = bech32m(text);
    let is_true = match error {
        AddressError::MixedCase => mixed,
        AddressError::Format | AddressError::Checksum => decoded.is_none(),
        AddressError::Prefix(prefix) => decoded
            .is_none_or(|(hrp, _)| Network::ALL.iter().all(|n| n.hrp() != hrp) && hrp.starts_with(prefix.as_str())),
        AddressError::Version(version) => decoded.is_none_or(|(_, payload)| payload[0] == *version && *version != 0),
        AddressError::Length => decoded.is_none_or(|(_, payload)| payload.len() != Address::PAYLOAD_LEN),
        AddressError::Network { .. } => false,
    };
    assert!(is_true, "{error:?} of {text:?}");
    assert!(error.to_string().len() <= 256, "an error does not repeat a stranger's text at length");
}

fn outpoints(text: &str) {
    if let Ok(outpoint) = text.parse::<OutPoint>() {
        assert_eq!(outpoint.to_string(), text, "an outpoint has one text");
    }
    if let Ok(txid) = text.parse::<Txid>() {
        assert_eq!(txid.to_string(), text, "a hash has one text");
        let outpoint = OutPoint { txid, vout: u32::MAX };
        assert_eq!(outpoint.to_string().parse(), Ok(outpoint));
    }
}

fn amounts(text: &str) {
    let Some(amount) = Amount::parse_time(text) else { return };
    assert!(amount <= Amount::MAX);
    assert_eq!(Amount::parse_time(&amount.to_string()), Some(amount), "what is printed is read as the same");
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    assert!(digits(whole) && digits(fraction) && fraction.len() <= 8, "{text:?} is {amount}");
    let units = format!("{whole}{fraction:0<8}").parse::<u128>().expect("they are digits");
    assert_eq!(units, u128::from(amount.units()));
}
