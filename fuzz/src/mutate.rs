//! Changes JSON as JSON.
//!
//! Random bytes hardly ever are a message. Here a good message becomes another that is
//! still JSON and nearly good: a number at the edge of its range, a hash with one digit
//! changed, an element twice, a part of it in another place. One time in four the
//! fuzzer's own changes of bytes are used instead.

use std::path::Path;
use std::sync::LazyLock;

use serde_json::{Map, Value};

/// A small generator (xorshift64*): the fuzzer gives the seed, so runs can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % n.max(1)
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

const EDGES: [u64; 14] = [
    0,
    1,
    2,
    255,
    256,
    4_096,
    4_097,
    u32::MAX as u64,
    u32::MAX as u64 + 1,
    (1 << 53) - 1,
    1 << 53,
    i64::MAX as u64,
    i64::MAX as u64 + 1,
    u64::MAX,
];
/// Texts that mean something somewhere.
const WORDS: [&str; 26] = [
    "",
    "Approve",
    "Commit",
    "Abort",
    "Prevote",
    "Precommit",
    "Unspent",
    "Locked",
    "SpentFinalized",
    "Confirmed",
    "Rejected",
    "Masternode",
    "Observer",
    "Wallet",
    "mainnet",
    "testnet",
    "devnet",
    "Malformed",
    "request_id",
    "resume_token",
    "log_id",
    "Block",
    "Proposal",
    "Vote",
    "argon2id",
    "xchacha20poly1305",
];
/// Elements that an array may be grown to at once: beyond the largest small limit, 256.
const MAX_REPEATED: usize = 300;

/// The changed bytes, or `None` if the fuzzer is to change bytes itself. Of what is no JSON
/// a good message of `seeds` is made first, and now and then of what is, for otherwise
/// nearly everything that the fuzzer keeps soon is some new kind of nonsense.
pub fn json(seeds: &[Value], data: &[u8], max_size: usize, seed: u32) -> Option<Vec<u8>> {
    let mut random = Random(u64::from(seed) << 1 | 1);
    random.next();
    let parsed = match random.below(8) {
        0 | 1 => return None,
        2 | 3 => None,
        _ => serde_json::from_slice(data).ok(),
    };
    let mut value: Value = match parsed {
        Some(value) => value,
        None if seeds.is_empty() => return None,
        None => random.pick(seeds).clone(),
    };
    let donor = value.clone();
    let changes = [1, 1, 1, 2, 3][random.below(5)];
    for _ in 0..changes {
        let place = random.below(count(&value));
        let mut left = place;
        if let Some(node) = nth(&mut value, &mut left) {
            change(node, &donor, &mut random);
        }
    }
    serde_json::to_vec(&value).ok().filter(|bytes| bytes.len() <= max_size)
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum::<usize>(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// The node at a place in depth-first order.
fn nth<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, left)),
        Value::Object(fields) => fields.values_mut().find_map(|field| nth(field, left)),
        _ => None,
    }
}

fn change(node: &mut Value, donor: &Value, random: &mut Random) {
    if random.below(12) == 0 {
        let mut copy = donor.clone();
        let mut left = random.below(count(donor));
        if let Some(part) = nth(&mut copy, &mut left) {
            *node = part.take();
        }
        return;
    }
    match node {
        Value::Number(number) => *node = change_number(number.as_u64(), random),
        Value::String(text) => change_text(text, random),
        Value::Array(items) => change_array(items, random),
        Value::Object(fields) => change_object(fields, random),
        Value::Bool(yes) => *yes = !*yes,
        Value::Null => *node = [Value::from(7), Value::from("text"), Value::from(vec![0])][random.below(3)].clone(),
    }
}

fn change_number(number: Option<u64>, random: &mut Random) -> Value {
    let number = number.unwrap_or(0);
    match random.below(7) {
        0 => number.wrapping_add(1).into(),
        1 => number.wrapping_sub(1).into(),
        2 => Value::from(-1),
        3 => Value::from(i64::MIN),
        4 => (number ^ 1 << random.below(64)).into(),
        5 => Value::Null,
        _ => (*random.pick(&EDGES)).into(),
    }
}

fn change_text(text: &mut String, random: &mut Random) {
    let characters: Vec<char> = text.chars().collect();
    let place = random.below(characters.len());
    let replace = |with: char| characters.iter().enumerate().map(|(i, c)| if i == place { with } else { *c }).collect();
    *text = match random.below(9) {
        0 | 1 => replace(*random.pick(&b"0123456789abcdef".map(char::from))),
        2 => replace(*random.pick(&b"qpzry9x8gf2tvdw0s3jn54khce6mua7l1:.AZ".map(char::from))),
        3 => characters[..place].iter().collect(),
        4 => format!("{text}{}", random.pick(&['0', 'q', '\u{0}', '"', 'é', '\u{10ffff}'])),
        5 => text.to_uppercase(),
        6 => text.repeat(1 + random.below(4)),
        7 => characters[place.min(characters.len())..].iter().collect(),
        _ => (*random.pick(&WORDS)).to_owned(),
    };
}

fn change_array(items: &mut Vec<Value>, random: &mut Random) {
    let place = random.below(items.len());
    match (random.below(6), items.get(place).cloned()) {
        (0, Some(_)) => drop(items.remove(place)),
        (1 | 2, Some(item)) => items.insert(place, item),
        (3, Some(_)) => items.swap(place, 0),
        (4, Some(item)) => items.extend(vec![item; random.below(MAX_REPEATED)]),
        (5, _) => items.truncate(place),
        (_, _) => items.push(Value::Null),
    }
}

fn change_object(fields: &mut Map<String, Value>, random: &mut Random) {
    let names: Vec<String> = fields.keys().cloned().collect();
    if names.is_empty() || random.below(3) == 0 {
        fields.insert((*random.pick(&WORDS)).to_owned(), Value::from("x"));
        return;
    }
    let name = random.pick(&names);
    let Some(value) = fields.remove(name) else { return };
    match random.below(4) {
        0 => {}
        1 => drop(fields.insert((*random.pick(&WORDS)).to_owned(), value)),
        2 => drop(fields.insert(random.pick(&names).clone(), value)),
        _ => drop(fields.insert(name.clone(), Value::Null)),
    }
}

/// The JSON of a target's corpus as it is checked in.
pub struct Seeds(LazyLock<Vec<Value>>);

impl Seeds {
    /// Those of a target; `read` is [`seeds_of`] for its name.
    pub const fn new(read: fn() -> Vec<Value>) -> Self {
        Self(LazyLock::new(read))
    }

    /// What `fuzz_mutator!` wants: changes the first `size` bytes of `data` and gives the
    /// new size, at most `max_size`.
    pub fn change(&self, data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
        match json(&self.0, &data[..size], max_size.min(data.len()), seed) {
            Some(changed) => {
                data[..changed.len()].copy_from_slice(&changed);
                changed.len()
            }
            None => libfuzzer_sys::fuzzer_mutate(data, size, max_size),
        }
    }
}

/// What is JSON in the corpus of a target; nothing where the sources are not at hand.
pub fn seeds_of(target: &str) -> Vec<Value> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.iter().filter_map(|file| serde_json::from_slice(&std::fs::read(file).ok()?).ok()).collect()
}
