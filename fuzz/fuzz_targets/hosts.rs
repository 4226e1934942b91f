//! `engine::fuzzing::hosts`, which says what holds.
#![no_main]
gantry_fuzz::target!(hosts);
