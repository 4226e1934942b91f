//! `engine::fuzzing::cdi`, which says what holds.
#![no_main]
gantry_fuzz::target!(cdi);
