//! `engine::fuzzing::documents`, which says what holds.
#![no_main]
gantry_fuzz::target!(documents);
