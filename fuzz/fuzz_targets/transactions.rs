#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use time_masternode_fuzz::mutate::{Seeds, seeds_of};
use time_masternode_fuzz::targets;

static SEEDS: Seeds = Seeds::new(|| seeds_of("transactions"));

fuzz_target!(|data: &[u8]| {
    targets::transactions(data);
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { SEEDS.change(data, size, max_size, seed) });
