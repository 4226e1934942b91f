//! Bits that nobody can guess: for ids that must not collide, and for tokens.

use std::fs::File;
use std::io::Read as _;

use crate::error::{Error, Result};

/// The kernel's device for them, which never blocks once the machine is up.
const SOURCE: &str = "/dev/urandom";

/// So many bytes of them.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open(SOURCE)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| Error::io("read", SOURCE, &error))?;
    Ok(bytes)
}
