//! The house rules that a compiler does not check: which room may import which, what the
//! core must not touch, and that no file grows beyond reading.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

use std::path::{Path, PathBuf};

fn sources(directory: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut found, mut open) = (Vec::new(), vec![root.join(directory)]);
    while let Some(path) = open.pop() {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    assert!(!found.is_empty(), "{directory}");
    found
}

/// The code without its tests, comments and documentation.
fn code(text: &str) -> String {
    let before_tests = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let lines = before_tests.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

fn forbid(directory: &str, words: &[&str]) {
    for (path, text) in sources(directory) {
        let code = code(&text);
        for word in words {
            assert!(!code.contains(word), "{} must not contain {word:?}", path.display());
        }
    }
}

#[test]
fn imports_point_one_way() {
    let rooms = |names: &[&str]| names.iter().map(|name| format!("crate::{name}")).collect::<Vec<_>>();
    let forbid_rooms = |directory: &str, names: &[&str]| {
        let words = rooms(names);
        forbid(directory, &words.iter().map(String::as_str).collect::<Vec<_>>());
    };
    forbid_rooms("src/types", &["consensus", "db", "net", "node", "config", "devnet", "keyfile", "files"]);
    forbid_rooms("src/consensus", &["db", "net", "node", "config", "devnet", "keyfile", "files"]);
    forbid_rooms("src/db", &["net", "node", "config", "devnet", "keyfile"]);
    forbid_rooms("src/net", &["db", "node", "config", "devnet", "keyfile"]);
    forbid_rooms("src/node", &["config", "devnet", "keyfile"]);
}

#[test]
fn the_core_is_pure() {
    let impure = [
        "Instant",
        "SystemTime",
        "std::fs",
        "std::net",
        "std::thread",
        "tokio",
        "sled",
        "async ",
        "rand::",
        "println!",
        "HashMap",
        "HashSet",
        "serde_json",
    ];
    forbid("src/consensus", &impure);
    forbid(
        "src/types",
        &["Instant", "SystemTime", "std::fs", "std::net", "std::thread", "tokio", "sled", "async ", "serde_json::"],
    );
}

#[test]
fn only_the_database_knows_sled_and_only_the_network_owns_sockets() {
    for directory in ["src/types", "src/consensus", "src/net", "src/node", "tools"] {
        forbid(directory, &["sled::"]);
    }
    for directory in ["src/types", "src/consensus", "src/db"] {
        forbid(directory, &["TcpStream", "TcpListener", "tungstenite"]);
    }
}

#[test]
fn nothing_outside_tests_unwraps_or_swallows() {
    for directory in ["src", "tools"] {
        forbid(directory, &[".unwrap()", "todo!", "unimplemented!", "let _ ="]);
    }
}

#[test]
fn no_file_is_beyond_reading() {
    for directory in ["src", "tools", "benches"] {
        for (path, text) in sources(directory) {
            let lines = code(&text).lines().filter(|line| !line.trim().is_empty()).count();
            assert!(lines <= 500, "{} has {lines} lines of code", path.display());
        }
    }
}

#[test]
fn the_names_of_the_trees_are_in_the_table() {
    let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/db/mod.rs")).unwrap();
    for name in time_masternode::db::TREE_NAMES {
        assert!(table.contains(&format!("//! | `{name}` |")), "{name}");
    }
}
