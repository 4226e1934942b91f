//! `engine::fuzzing::filters`, which says what holds.
#![no_main]
gantry_fuzz::target!(filters);
