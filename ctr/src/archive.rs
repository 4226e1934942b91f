//! Seeing through compression, which the first bytes tell.

use std::io::{BufRead, BufReader, Read};

/// How gzip and zstd begin.
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// The bytes beneath gzip or zstd, or as they are.
pub(crate) fn decompress(raw: impl Read + 'static) -> std::io::Result<Box<dyn Read>> {
    let mut raw = BufReader::with_capacity(256 << 10, raw);
    let head = raw.fill_buf()?;
    if head.starts_with(&GZIP) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(raw)));
    }
    if head.starts_with(&ZSTD) {
        return Ok(Box::new(zstd::stream::read::Decoder::with_buffer(raw)?));
    }
    Ok(Box::new(raw))
}
