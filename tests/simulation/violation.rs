//! A broken promise ends a run. It unwinds without a word, so that a test which plants a
//! bug can look for it in peace; whoever runs a seed prints what was found.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

/// Ends the run.
pub fn violated(what: String) -> ! {
    resume_unwind(Box::new(Violation(what)))
}

/// Ends the run unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            $crate::violation::violated(format!($($what)+));
        }
    };
}

/// Runs something; a violation comes back, any other panic goes on.
pub fn catch<T>(run: impl FnOnce() -> T) -> Result<T, Violation> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| match panic.downcast::<Violation>() {
        Ok(violation) => *violation,
        Err(other) => resume_unwind(other),
    })
}
