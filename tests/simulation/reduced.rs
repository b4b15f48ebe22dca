//! What the simulator found, each reduced to its core.

use time_masternode::consensus::FenceState;
use time_masternode::db::{Database, MemoryDisk, Owner};

use super::core_net::Setting;

/// The power goes while a new database is being made, at each of its writes, and what was
/// being written reaches the platter or does not. It opens all the same, and a member that
/// may have voted before stands behind its fence.
#[test]
fn a_database_whose_making_was_cut_off_opens_behind_its_fence() {
    let setting = Setting::of(4);
    let public_key = Some(setting.keys[0].public_key());
    let owner = Owner { genesis: &setting.genesis, public_key, first_start: false };
    let mut cut = 0;
    for writes in 0.. {
        let mut whole = false;
        for keep in [false, true] {
            let disk = MemoryDisk::new();
            disk.fail_after(writes);
            whole = Database::open_in_memory(&disk, owner).is_ok();
            cut += u64::from(!whole);
            disk.lose_power(keep);
            let opened = Database::open_in_memory(&disk, owner);
            let recovered = opened.unwrap_or_else(|e| panic!("cut off after {writes}, kept: {keep}: {e}")).recovered;
            assert_eq!(recovered.suspension, None);
            let coins = setting.genesis.transaction().outputs().len() as u64;
            assert_eq!(recovered.fence, Some((FenceState::Asking, coins)));
        }
        if whole {
            break;
        }
    }
    assert!(cut > 4, "the making has several writes");
}
