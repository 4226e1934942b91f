//! `engine::fuzzing::config`, which says what holds.
#![no_main]
gantry_fuzz::target!(config);
