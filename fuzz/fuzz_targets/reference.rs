//! `engine::fuzzing::reference`, which says what holds.
#![no_main]
gantry_fuzz::target!(reference);
