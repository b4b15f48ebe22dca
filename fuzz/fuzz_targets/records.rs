#![no_main]

use libfuzzer_sys::fuzz_target;
use time_masternode_fuzz::targets;

fuzz_target!(|data: &[u8]| {
    targets::records(data);
});
