//! `engine::fuzzing::journal`, which says what holds.
#![no_main]
gantry_fuzz::target!(journal);
