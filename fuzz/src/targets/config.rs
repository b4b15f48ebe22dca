//! The configuration: a file that is understood is written and understood again as the
//! same, and one that is not UTF-8 is not guessed at.

use std::path::Path;

use time_masternode::config::{Options, commented};

use super::Outcome;
use super::keyfiles::Scratch;

/// More than this no configuration is fuzzed with; the program reads up to a mebibyte.
const MAX_LENGTH: usize = 64 * 1024;

/// The bytes of a configuration file.
pub fn config(data: &[u8]) -> Outcome {
    if data.len() > MAX_LENGTH {
        return Outcome::Refused;
    }
    let parsed = std::str::from_utf8(data).ok().and_then(|text| toml::from_str::<Options>(text).ok());
    let read = Scratch::with(data, |path| Options::read(path).ok().map(|options| inside(options, path)));
    match (parsed, read) {
        (None, None) => Outcome::Refused,
        (Some(options), Some(read)) => {
            assert_eq!(joined(options.clone()), read, "a file means what its text means, beside the file");
            understood(&options);
            Outcome::Accepted
        }
        (parsed, read) => panic!("parsed as {parsed:?} and read as {read:?}"),
    }
}

/// What was read from a file, with the file's directory taken away from its paths.
fn inside(options: Options, file: &Path) -> Options {
    let base = file.parent().expect("a file is in a directory");
    let path =
        |path: Option<std::path::PathBuf>| path.map(|p| p.strip_prefix(base).map_or(p.clone(), Path::to_path_buf));
    Options {
        data_dir: path(options.data_dir),
        genesis_file: path(options.genesis_file),
        key_file: path(options.key_file),
        key_passphrase_file: path(options.key_passphrase_file),
        ..options
    }
}

/// The same spelling of paths as after joining and taking apart: `a//b/.` is `a/b`.
fn joined(options: Options) -> Options {
    let base = Path::new("/base");
    let beside = |path: Option<std::path::PathBuf>| path.map(|path| base.join(path));
    inside(
        Options {
            data_dir: beside(options.data_dir),
            genesis_file: beside(options.genesis_file),
            key_file: beside(options.key_file),
            key_passphrase_file: beside(options.key_passphrase_file),
            ..options
        },
        &base.join("file"),
    )
}

fn understood(options: &Options) {
    let written = commented(options);
    let again: Options = toml::from_str(&written).unwrap_or_else(|error| panic!("{error}\n{written}"));
    assert_eq!(again, *options, "\n{written}");
    assert_eq!(commented(&again), written, "one configuration has one file");
    assert_eq!(options.clone().or(Options::default()), *options);
    assert_eq!(Options::default().or(options.clone()), *options);
    assert_eq!(options.clone().or(options.clone()), *options);
}
