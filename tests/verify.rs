//! `verify` finds nothing on a sound database, in flight and in blocks, and names the
//! invariant that each kind of damage breaks.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but does not see that helpers are tests too")]

mod support;

use support::{TestNet, within};
use time_masternode::db::{VerifyOptions, verify_data_dir};
use time_masternode::net::TransactionStatusKind;
use time_masternode::types::SecretKey;

#[tokio::test]
async fn a_database_that_was_used_is_sound() {
    let mut net = TestNet::with_interval(4, 200);
    net.set_environment("TIME_RETENTION_BLOCKS", "2");
    net.start_all();
    let to = net.address(&SecretKey::generate());
    let mut wallet = net.wallet(0).await;
    let coins = net.coins();
    let mut coin = coins[0].clone();
    let mut last = None;
    for _ in 0..6 {
        let payment = net.pay(&coin, &to, 1);
        wallet.pay(&payment).await;
        within("confirmation", async {
            while wallet.query(payment.txid()).await.status != TransactionStatusKind::Confirmed {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
        coin = TestNet::outputs(&payment, &coin.key).remove(1);
        last = Some(payment);
    }
    // Something is final and in no block, and something is in flight for ever.
    net.kill(3);
    net.kill(2);
    let stuck = net.pay(&coins[1], &to, 2);
    wallet.broadcast(&stuck).await;
    wallet.status_of(stuck.txid(), &[TransactionStatusKind::Pending]).await;
    net.stop(0);
    net.stop(1);
    assert!(last.is_some());
    for node in 0..4 {
        for full in [false, true] {
            let options = VerifyOptions { genesis: Some(&net.genesis), full, progress: &|_, _| {} };
            let report = verify_data_dir(&net.data_dir(node), 1 << 24, options).unwrap();
            let findings: Vec<_> = report.findings().collect();
            assert!(report.is_sound(), "node {node}: {findings:#?}");
            let checked = |name| report.checks.iter().find(|check| check.name == name).unwrap().checked;
            for name in ["utxos", "addresses", "transactions", "confirmed", "changes", "blocks", "supply", "digest"] {
                assert!(checked(name) > 0, "{name} was looked at");
            }
            assert!(node > 1 || checked("locks") == 1, "the lock was looked at");
        }
    }
}
