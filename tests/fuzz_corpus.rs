//! Replays the corpora of the fuzz targets: what was once found stays mended, and the
//! invariants hold on real messages. `fuzz/README.md` says how to search for more.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

#[path = "../fuzz/src/targets/mod.rs"]
mod targets;

use targets::{ALL, Outcome};

/// What is checked in has to stay small.
const MAX_BYTES: u64 = 256 * 1024;

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

#[test]
fn every_corpus_holds_and_reaches_both_answers() {
    for (name, body) in ALL {
        let (mut accepted, mut refused) = (0, 0);
        for file in files(&corpora().join(name)) {
            // The file at fault stands above the panic.
            println!("{}", file.display());
            match body(&std::fs::read(&file).unwrap()) {
                Outcome::Accepted => accepted += 1,
                Outcome::Refused => refused += 1,
            }
        }
        assert!(accepted > 0 && refused > 0, "{name}: {accepted} accepted, {refused} refused");
    }
}

#[test]
fn every_target_has_a_corpus_and_a_program() {
    let names: BTreeSet<String> = ALL.iter().map(|(name, _)| (*name).to_owned()).collect();
    let stems = |directory: &Path| -> BTreeSet<String> {
        files(directory).iter().map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(stems(&corpora()), names);
    assert_eq!(stems(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets")), names);
    let bytes: u64 =
        ALL.iter().flat_map(|(name, _)| files(&corpora().join(name))).map(|file| file.metadata().unwrap().len()).sum();
    assert!(bytes <= MAX_BYTES, "{bytes} bytes of corpora");
}
