//! Forgets, a little at a time, what confirmed blocks have made unnecessary.
//!
//! What is to go is looked up on a thread for reading; the ledger removes the rows in one
//! of its commits, beside whatever else it does, and only then more is looked up. So the
//! past is never forgotten faster than commits go on, and no commit waits for it.

use std::sync::Weak;

use tokio::sync::oneshot;

use super::input::Input;
use super::protocol::UTXOProtocolHandler;
use crate::limits::MAX_PRUNED_PER_COMMIT;

/// Forgets until the node ends. A look-up that fails is tried again with the next block;
/// what cannot be read stops the node where it matters.
pub(super) async fn forget(handler: Weak<UTXOProtocolHandler>) {
    let Some(mut tip) = handler.upgrade().map(|handler| handler.ledger.reader().durable_tip()) else { return };
    loop {
        let height = *tip.borrow_and_update();
        while let Some(handler) = handler.upgrade() {
            let Some(keep) = handler.ledger.retention_blocks() else { return };
            let keep_above = height.saturating_sub(keep);
            let batch = handler.read_for_house(move |reader| reader.prunable(keep_above, MAX_PRUNED_PER_COMMIT)).await;
            let Ok(Some(batch)) = batch.map(crate::db::Durable::into_inner) else { break };
            let (done, pruned) = oneshot::channel();
            handler.ledger.tell(Input::Prune { batch, done });
            if pruned.await.is_err() {
                return;
            }
        }
        // The next look is at the next block.
        if tip.changed().await.is_err() {
            return;
        }
    }
}
