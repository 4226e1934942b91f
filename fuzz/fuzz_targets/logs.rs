//! `engine::fuzzing::logs`, which says what holds.
#![no_main]
gantry_fuzz::target!(logs);
