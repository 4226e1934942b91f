//! `engine::fuzzing::ttrpc`, which says what holds.
#![no_main]
gantry_fuzz::target!(ttrpc);
