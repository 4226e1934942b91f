//! `engine::fuzzing::cni`, which says what holds.
#![no_main]
gantry_fuzz::target!(cni);
