//! `engine::fuzzing::spdy`, which says what holds.
#![no_main]
gantry_fuzz::target!(spdy);
