//! Blocks of headers: pairs of texts, compressed by one zlib stream for each way of a connection, which goes on from block to
//! block and begins with a dictionary of the protocol.
//!
//! ```text
//!  zlib( count 32 | { length 32 | name | length 32 | value }* )     flushed after each block
//! ```
//!
//! Invariant: a block that swells to more than [`BLOCK_MAX`] bytes is refused, since what comes after it could not be read.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use bytes::{Buf as _, BufMut as _, Bytes};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

use super::frame::Violation;

/// The most that a block may have uncompressed.
pub(crate) const BLOCK_MAX: usize = 64 << 10;

/// The headers of a stream, by name in lower case.
pub(crate) type Headers = BTreeMap<String, String>;

/// The words of the dictionary that have their lengths before them.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
    content-length content-location content-md5 content-range content-type date etag expect expires from host if-match \
    if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
    proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade \
    user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie \
    keep-alive origin";
/// What follows them.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
    404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,\
    publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS.split_whitespace() {
        dictionary.put_u32(word.len() as u32);
        dictionary.put_slice(word.replace('_', " ").as_bytes());
    }
    dictionary.put_slice(TAIL.as_bytes());
    dictionary
});

/// Reads the blocks that come one way.
pub(crate) struct Inflater(Decompress);

/// Makes the blocks that go one way.
pub(crate) struct Deflater(Compress);

impl Inflater {
    /// For a connection's beginning.
    pub(crate) fn new() -> Self {
        Inflater(Decompress::new(true))
    }

    /// The headers of the next block. After a violation it is of no use any more.
    pub(crate) fn inflate(&mut self, block: &[u8]) -> Result<Headers, Violation> {
        let mut out = Vec::with_capacity(1 << 10);
        let begin = self.0.total_in();
        loop {
            let rest = &block[(self.0.total_in() - begin) as usize..];
            match self.0.decompress_vec(rest, &mut out, FlushDecompress::Sync) {
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    let set = self.0.set_dictionary(&DICTIONARY);
                    set.map_err(|_| Violation("headers compressed with an unknown dictionary"))?;
                    continue;
                }
                Err(_) => return Err(Violation("headers that are not compressed as they should be")),
            }
            if out.len() > BLOCK_MAX {
                return Err(Violation("headers of more than 64 KiB"));
            }
            if out.len() < out.capacity() {
                // There was room, so that all there is has come out.
                break;
            }
            out.reserve(out.len());
        }
        match (self.0.total_in() - begin) as usize == block.len() {
            true => parse(&out),
            false => Err(Violation("headers that end before their frame does")),
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, Violation> {
    const SHORT: Violation = Violation("headers that are shorter than they say");
    let text = |block: &mut &[u8]| -> Result<String, Violation> {
        let length = block.try_get_u32().map_err(|_| SHORT)? as usize;
        let (text, rest) = block.split_at_checked(length).ok_or(SHORT)?;
        *block = rest;
        Ok(String::from_utf8_lossy(text).into_owned())
    };
    let count = block.try_get_u32().map_err(|_| SHORT)?;
    let mut headers = Headers::new();
    for _ in 0..count {
        let name = text(&mut block)?.to_ascii_lowercase();
        let mut value = text(&mut block)?;
        // Several values stand together, a zero byte between them: the first is meant.
        value.truncate(value.find('\0').unwrap_or(value.len()));
        headers.entry(name).or_insert(value);
    }
    Ok(headers)
}

impl Deflater {
    /// For a connection's beginning.
    pub(crate) fn new() -> Self {
        let mut compress = Compress::new(Compression::fast(), true);
        // It fails once something was compressed, and nothing was.
        let _ = compress.set_dictionary(&DICTIONARY);
        Deflater(compress)
    }

    /// The next block.
    pub(crate) fn deflate(&mut self, headers: &Headers) -> Bytes {
        let mut block = Vec::new();
        block.put_u32(headers.len() as u32);
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.put_u32(text.len() as u32);
            block.put_slice(text.as_bytes());
        }
        let mut out = Vec::with_capacity(block.len() + 64);
        let begin = self.0.total_in();
        loop {
            let rest = &block[(self.0.total_in() - begin) as usize..];
            // It fails when it was told to end, which it never is.
            let _ = self.0.compress_vec(rest, &mut out, FlushCompress::Sync);
            if out.len() < out.capacity() {
                return out.into();
            }
            out.reserve(64);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn the_dictionary_is_that_of_the_protocol() {
        assert_eq!(DICTIONARY.len(), 1423);
        // Its check sum, which stands in each first block.
        assert_eq!(
            Compress::new(Compression::fast(), true).set_dictionary(&DICTIONARY).unwrap(),
            0xe3c6_a7c2
        );
    }

    #[test]
    fn a_block_of_another_implementation_is_read() {
        // Python: c = zlib.compressobj(9, zdict=dictionary); c.compress(block) + c.flush(zlib.Z_SYNC_FLUSH), twice.
        let first = hex::decode(FIRST).unwrap();
        let second = hex::decode(SECOND).unwrap();
        let mut inflater = Inflater::new();
        assert_eq!(inflater.inflate(&first).unwrap(), headers(&[("streamtype", "error")]));
        assert_eq!(inflater.inflate(&second).unwrap(), headers(&[("port", "80"), ("streamtype", "data")]));
    }

    const FIRST: &str = "78f9e3c6a7c202a62346703a2b294a4dcc851625aca9a08006000000ffff";
    const SECOND: &str = "02651c48d15c044ac64c1606180a41654e22000000ffff";

    #[test]
    fn a_block_that_swells_is_refused() {
        let mut deflater = Deflater::new();
        let bomb = deflater.deflate(&headers(&[("a", &"x".repeat(BLOCK_MAX))]));
        assert!(bomb.len() < 4096);
        assert_eq!(Inflater::new().inflate(&bomb), Err(Violation("headers of more than 64 KiB")));
        let most = deflater.deflate(&Headers::new());
        assert!(Inflater::new().inflate(&most).is_err(), "the second block has no dictionary of its own");
    }

    #[test]
    fn a_block_may_not_end_within_its_frame() {
        let mut block = Deflater::new().deflate(&headers(&[("port", "80")])).to_vec();
        let whole = Inflater::new().inflate(&block);
        assert_eq!(whole.unwrap(), headers(&[("port", "80")]));
        block.truncate(block.len() / 2);
        assert!(Inflater::new().inflate(&block).is_err());
        assert!(Inflater::new().inflate(&[]).is_err());
        assert_eq!(
            parse(&[0, 0, 0, 1, 0, 0, 0, 9, b'a']),
            Err(Violation("headers that are shorter than they say"))
        );
        assert!(parse(&[0xff; 64]).is_err());
    }

    #[test]
    fn the_first_of_several_values_is_meant() {
        let mut block = vec![0, 0, 0, 1, 0, 0, 0, 1, b'A', 0, 0, 0, 3];
        block.extend(b"x\0y");
        assert_eq!(parse(&block).unwrap(), headers(&[("a", "x")]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn blocks_come_out_as_they_went_in(
            blocks in prop::collection::vec(prop::collection::btree_map("[a-z:-]{1,20}", "[ -~]{0,200}", 0..8), 1..4)
        ) {
            let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
            for block in blocks {
                prop_assert_eq!(inflater.inflate(&deflater.deflate(&block)).unwrap(), block);
            }
        }

        #[test]
        fn no_block_makes_it_panic(
            good in any::<bool>(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
            noise in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut block = Deflater::new().deflate(&headers(&[("port", "80"), ("streamtype", "data")])).to_vec();
            let position = at.index(block.len());
            block[position] = byte;
            let mut inflater = Inflater::new();
            let _ = inflater.inflate(if good { &block } else { &noise });
            let _ = inflater.inflate(&noise);
            let _ = parse(&noise);
        }
    }
}
