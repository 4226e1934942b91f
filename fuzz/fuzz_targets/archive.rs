//! `engine::fuzzing::archive`, which says what holds.
#![no_main]
gantry_fuzz::target!(archive, scratch);
