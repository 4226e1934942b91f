//! `engine::fuzzing::websocket`, which says what holds.
#![no_main]
gantry_fuzz::target!(websocket);
