//! `engine::fuzzing::auth`, which says what holds.
#![no_main]
gantry_fuzz::target!(auth);
