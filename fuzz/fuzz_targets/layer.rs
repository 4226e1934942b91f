//! `engine::fuzzing::layer`, which says what holds.
#![no_main]
gantry_fuzz::target!(layer, scratch);
