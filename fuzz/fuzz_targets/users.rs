//! `engine::fuzzing::users`, which says what holds.
#![no_main]
gantry_fuzz::target!(users);
