//! Has `src/db/durable.c` linked into every program, before the C library's function of that name.

fn main() {
    println!("cargo::rerun-if-changed=src/db/durable.c");
    // Elsewhere sled syncs the file itself.
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    // Not linked by `cc` itself: nothing of ours asks for the function, so the linker is told to take all of it.
    cc::Build::new().file("src/db/durable.c").warnings_into_errors(true).cargo_metadata(false).compile("durable");
    let directory = std::env::var("OUT_DIR").expect("cargo sets it");
    println!("cargo::rustc-link-search=native={directory}");
    println!("cargo::rustc-link-lib=static:+whole-archive=durable");
}
