//! Whom long work on a database tells how far it is.

/// Looks on while a database is copied, exported, imported or migrated.
pub trait Watcher {
    /// So much of something is done, of a total if that is known.
    fn progress(&self, _what: &'static str, _done: u64, _total: Option<u64>) {}

    /// A database is being opened: if it is damaged, that may never end.
    fn opening(&self) {}

    /// It is open.
    fn opened(&self) {}
}

/// Nobody looks on.
impl Watcher for () {}

/// Opens something while somebody looks on.
pub(super) fn watched<T>(watcher: &dyn Watcher, open: impl FnOnce() -> T) -> T {
    watcher.opening();
    let opened = open();
    watcher.opened();
    opened
}
