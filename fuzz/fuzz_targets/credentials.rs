//! docker's config.json, as ctr reads it: what is found is printed without its secret, and errors do not hold it.
#![no_main]

#[allow(dead_code, reason = "the program's other modules use it")]
#[path = "../../ctr/src/credentials.rs"]
mod credentials;

libfuzzer_sys::fuzz_target!(|data: &[u8]| credentials::fuzz(data));
