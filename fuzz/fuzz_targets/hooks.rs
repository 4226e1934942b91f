//! `engine::fuzzing::hooks`, which says what holds.
#![no_main]
gantry_fuzz::target!(hooks);
