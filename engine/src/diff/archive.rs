//! Reading tar, member by member, from a stream that nobody vouches for.
//!
//! ```text
//! archive = { member } zero-block zero-block ...
//! member  = { extension } header data padding          all in blocks of 512 bytes
//! extension: 'x' pax records "LENGTH KEY=VALUE\n" | 'L', 'K' GNU long name, long link | 'g' pax for all (skipped)
//! sparse data: old GNU (map in the header), pax 0.0 and 0.1 (map in the records), pax 1.0 (map before the data)
//! ```
//!
//! The `tar` crate decodes the header's fields. The framing is ours, because it must bound what an extension may take
//! of memory and keep an attribute's value as the bytes it is.
//!
//! Invariant: memory is bounded whatever the stream says, and every field has been range-checked.

use std::io::{self, BufRead, Read};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tar::{EntryType, Header};

const BLOCK: u64 = 512;
/// Where a header has mode, owner, group, size and time. Writers leave out what they do not know, and other readers take it
/// for 0.
const NUMBERS: [std::ops::Range<usize>; 5] = [100..108, 108..116, 116..124, 124..136, 136..148];
/// The most bytes of one extension, and of one sparse map.
const EXTENSION_BYTES: u64 = 1 << 20;
/// The most extensions before one header.
const EXTENSIONS: usize = 16;
/// The largest file: what ext4 can hold. Bounds what a sparse map may claim with no data behind it.
const FILE_BYTES: u64 = 16 << 40;
/// The last second that nanoseconds since 1970 can express in 63 bits, which is the range other engines keep.
const LAST_SECOND: u64 = i64::MAX as u64 / 1_000_000_000;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The stream beneath failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The stream ends within a member.
    #[error("the archive is cut short at byte {0}")]
    Truncated(u64),
    /// What stands there is not tar, or not sane.
    #[error("the archive is malformed at byte {at}: {what}")]
    Malformed {
        /// What is wrong.
        what: String,
        /// Bytes of the uncompressed stream before this header.
        at: u64,
    },
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; its data follows.
    File,
    /// A folder.
    Folder,
    /// A symlink; the target may be anything.
    Symlink(Vec<u8>),
    /// Another name of the member or file with this path.
    HardLink(Vec<u8>),
    /// A character device: major, minor.
    Character(u32, u32),
    /// A block device: major, minor.
    Block(u32, u32),
    /// A pipe.
    Fifo,
}

/// One member of an archive, its data not included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// As written; may be absolute, hold "..", or name nothing at all.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the data.
    pub modified: SystemTime,
    /// Last access, where it is written and later than the last change; else the last change.
    pub accessed: SystemTime,
    /// Length of a regular file once unpacked, in bytes.
    pub size: u64,
    /// Extended attributes: name, value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// For a sparse file, where its data goes: offset, length, in order.
    pub holes: Option<Vec<(u64, u64)>>,
}

/// A tar stream; [`Archive::next`] yields members, and reading yields the data of the last one.
pub struct Archive<R> {
    input: R,
    /// Bytes of the stream consumed.
    at: u64,
    /// Bytes of the member's data not read yet.
    left: u64,
    /// Bytes between the data and the next header.
    padding: u64,
}

/// What the extensions before a header say.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<SystemTime>,
    accessed: Option<SystemTime>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_major: u64,
    sparse_size: Option<u64>,
    sparse_path: Option<Vec<u8>>,
    sparse_map: Option<Vec<(u64, u64)>>,
    sparse_offset: Option<u64>,
}

impl<R: BufRead> Archive<R> {
    /// An archive that is read from `input`.
    pub fn new(input: R) -> Self {
        Archive { input, at: 0, left: 0, padding: 0 }
    }

    /// The next member, after skipping what was not read of the one before; None at the end of the archive.
    #[expect(clippy::should_implement_trait, reason = "an iterator could not lend the member's data")]
    pub fn next(&mut self) -> Result<Option<Member>, ArchiveError> {
        let mut extensions = Extensions::default();
        let mut count = 0;
        loop {
            self.skip(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let start = self.at;
            let Some(block) = self.header(start)? else {
                return if count == 0 { Ok(None) } else { Err(ArchiveError::Truncated(self.at)) };
            };
            let header = Header::from_byte_slice(&block);
            let malformed = |what: String| ArchiveError::Malformed { what, at: start };
            let number = |field: &str, value: io::Result<u64>| {
                value.map_err(|error| malformed(format!("field {field}: {error}")))
            };
            let size = number("size", header.entry_size())?;
            match header.entry_type() {
                EntryType::XHeader => {
                    let data = self.extension(size, start)?;
                    extensions.read_pax(&data).map_err(malformed)?;
                }
                EntryType::GNULongName => extensions.path = Some(self.long_name(size, start)?),
                EntryType::GNULongLink => extensions.link = Some(self.long_name(size, start)?),
                EntryType::XGlobalHeader => self.frame(size, start)?,
                _ => return self.member(&block, extensions, start).map(Some),
            }
            count += 1;
            if count > EXTENSIONS {
                return Err(malformed(format!("more than {EXTENSIONS} extensions before one member")));
            }
        }
    }

    /// The stream beneath, to be read to its end: bytes after the archive are part of the layer.
    pub fn into_input(self) -> R {
        self.input
    }

    fn member(
        &mut self,
        block: &[u8; BLOCK as usize],
        extensions: Extensions,
        start: u64,
    ) -> Result<Member, ArchiveError> {
        let malformed = |what: String| ArchiveError::Malformed { what, at: start };
        let field = |name: &str, error: io::Error| malformed(format!("field {name}: {error}"));
        let header = Header::from_byte_slice(block);
        let sparse_path = extensions
            .sparse_path
            .filter(|_| extensions.sparse_size.is_some() || extensions.sparse_map.is_some());
        let path = sparse_path.or(extensions.path).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extensions.link.unwrap_or_else(|| {
            header.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default()
        });
        if path.contains(&0) || link.contains(&0) {
            return Err(malformed("a name holds a NUL byte".into()));
        }
        let mut size = match extensions.size {
            Some(size) => size,
            None => header.entry_size().map_err(|error| field("size", error))?,
        };
        let device = || -> Result<(u32, u32), ArchiveError> {
            let major = header.device_major().map_err(|error| field("major", error))?;
            let minor = header.device_minor().map_err(|error| field("minor", error))?;
            Ok((major.unwrap_or(0), minor.unwrap_or(0)))
        };
        // Before POSIX, a folder was a file whose name ends in a slash.
        let old_folder = header.as_bytes()[156] == 0 && path.ends_with(b"/");
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::GNUSparse if !old_folder => Kind::File,
            EntryType::Regular | EntryType::Directory => Kind::Folder,
            EntryType::Symlink => Kind::Symlink(link),
            EntryType::Link => Kind::HardLink(link),
            EntryType::Char => device().map(|(major, minor)| Kind::Character(major, minor))?,
            EntryType::Block => device().map(|(major, minor)| Kind::Block(major, minor))?,
            EntryType::Fifo => Kind::Fifo,
            other => {
                return Err(malformed(format!(
                    "a member of type {:?} is not supported",
                    char::from(other.as_byte())
                )));
            }
        };
        let id = |name: &str, value: u64| {
            u32::try_from(value)
                .ok()
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| malformed(format!("{name} {value} does not fit 32 bits")))
        };
        let uid = match extensions.uid {
            Some(uid) => uid,
            None => header.uid().map_err(|error| field("uid", error))?,
        };
        let gid = match extensions.gid {
            Some(gid) => gid,
            None => header.gid().map_err(|error| field("gid", error))?,
        };
        let modified = match extensions.modified {
            Some(modified) => modified,
            None => seconds(header.mtime().map_err(|error| field("mtime", error))?),
        };
        let mut member = Member {
            path,
            mode: header.mode().map_err(|error| field("mode", error))? & 0o7777,
            uid: id("uid", uid)?,
            gid: id("gid", gid)?,
            modified,
            accessed: extensions.accessed.unwrap_or(modified).max(modified),
            size: 0,
            xattrs: extensions.xattrs,
            holes: None,
            kind,
        };
        if member.kind != Kind::File {
            // A size has no meaning here, and other readers take no data for it.
            return Ok(member);
        }
        let mut map = extensions.sparse_map;
        let mut real = extensions.sparse_size;
        if header.entry_type() == EntryType::GNUSparse {
            let gnu = header.as_gnu().ok_or_else(|| malformed("sparse, but no GNU header".into()))?;
            real = Some(gnu.real_size().map_err(|error| field("realsize", error))?);
            map = Some(self.old_sparse_map(gnu, start)?);
        }
        self.frame(size, start)?;
        if extensions.sparse_major == 1 && real.is_some() {
            let before = self.left;
            map = Some(self.new_sparse_map(start)?);
            size -= before - self.left;
        }
        member.size = size;
        if let Some(map) = map {
            member.size = real.unwrap_or(size);
            check_map(&map, size, member.size).map_err(malformed)?;
            member.holes = Some(map);
        }
        if member.size > FILE_BYTES {
            return Err(malformed(format!("a file of {} bytes is too large", member.size)));
        }
        Ok(member)
    }

    /// Reads a header block. None at the end: two zero blocks, or the end of the stream.
    fn header(&mut self, start: u64) -> Result<Option<[u8; BLOCK as usize]>, ArchiveError> {
        let mut block = [0_u8; BLOCK as usize];
        if !self.fill(&mut block)? {
            return Ok(None);
        }
        if block == [0; BLOCK as usize] {
            if !self.fill(&mut block)? || block == [0; BLOCK as usize] {
                return Ok(None);
            }
            return Err(ArchiveError::Malformed { what: "a lone zero block".into(), at: start });
        }
        let wrong = |_| ArchiveError::Malformed { what: "not a tar header".into(), at: start };
        let written = Header::from_byte_slice(&block).cksum().map_err(wrong)?;
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        let field: u32 = block[148..156].iter().map(|byte| u32::from(*byte)).sum();
        if sum - field + 8 * u32::from(b' ') != written {
            return Err(ArchiveError::Malformed { what: "wrong checksum of a tar header".into(), at: start });
        }
        for field in NUMBERS {
            if block[field.clone()].iter().all(|byte| matches!(byte, 0 | b' ')) {
                block[field.start] = b'0';
            }
        }
        Ok(Some(block))
    }

    /// Says how much data follows the header just read.
    fn frame(&mut self, size: u64, start: u64) -> Result<(), ArchiveError> {
        if size > i64::MAX as u64 - BLOCK {
            return Err(ArchiveError::Malformed { what: format!("a size of {size} bytes"), at: start });
        }
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK) - size;
        Ok(())
    }

    fn extension(&mut self, size: u64, start: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > EXTENSION_BYTES {
            let what = format!("an extension of {size} bytes; at most {EXTENSION_BYTES} are taken");
            return Err(ArchiveError::Malformed { what, at: start });
        }
        self.frame(size, start)?;
        let mut data = Vec::new();
        self.by_ref().take(size).read_to_end(&mut data)?;
        if data.len() as u64 != size {
            return Err(ArchiveError::Truncated(self.at));
        }
        Ok(data)
    }

    fn long_name(&mut self, size: u64, start: u64) -> Result<Vec<u8>, ArchiveError> {
        let mut name = self.extension(size, start)?;
        if let Some(end) = name.iter().position(|byte| *byte == 0) {
            name.truncate(end);
        }
        Ok(name)
    }

    /// Old GNU: four pairs in the header, then blocks of 21 while each says that another follows.
    fn old_sparse_map(&mut self, gnu: &tar::GnuHeader, start: u64) -> Result<Vec<(u64, u64)>, ArchiveError> {
        let bad =
            |error: io::Error| ArchiveError::Malformed { what: format!("sparse map: {error}"), at: start };
        let pairs =
            |headers: &[tar::GnuSparseHeader], map: &mut Vec<(u64, u64)>| -> Result<(), ArchiveError> {
                for pair in headers.iter().take_while(|pair| !pair.is_empty()) {
                    map.push((pair.offset().map_err(bad)?, pair.length().map_err(bad)?));
                }
                Ok(())
            };
        let mut map = Vec::new();
        pairs(&gnu.sparse, &mut map)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            if !self.fill(block.as_mut_bytes())? {
                return Err(ArchiveError::Truncated(self.at));
            }
            pairs(block.sparse(), &mut map)?;
            if map.len() as u64 > EXTENSION_BYTES / 24 {
                return Err(bad(io::ErrorKind::FileTooLarge.into()));
            }
            more = block.is_extended();
        }
        Ok(map)
    }

    /// Pax 1.0: the data begins with decimal numbers, one a line: count, then offset and length of each; then padding.
    fn new_sparse_map(&mut self, start: u64) -> Result<Vec<(u64, u64)>, ArchiveError> {
        let bad = |what: &str| ArchiveError::Malformed { what: format!("sparse map: {what}"), at: start };
        let mut taken = 0;
        let mut line = || -> Result<u64, ArchiveError> {
            let mut text = Vec::new();
            loop {
                let mut byte = [0];
                if self.read(&mut byte)? == 0 {
                    return Err(bad("it does not end"));
                }
                taken += 1;
                if byte[0] == b'\n' {
                    return decimal(&text).ok_or_else(|| bad("not a number"));
                }
                text.push(byte[0]);
                if text.len() > 20 || taken > EXTENSION_BYTES {
                    return Err(bad("it is too long"));
                }
            }
        };
        let count = line()?;
        let mut map = Vec::new();
        for _ in 0..count {
            map.push((line()?, line()?));
        }
        self.skip_data(taken.next_multiple_of(BLOCK) - taken)?;
        Ok(map)
    }

    fn skip_data(&mut self, bytes: u64) -> Result<(), ArchiveError> {
        if bytes > self.left {
            return Err(ArchiveError::Truncated(self.at));
        }
        self.left -= bytes;
        self.skip(bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), ArchiveError> {
        let skipped = io::copy(&mut (&mut self.input).take(bytes), &mut io::sink())?;
        self.at += skipped;
        if skipped == bytes { Ok(()) } else { Err(ArchiveError::Truncated(self.at)) }
    }

    /// Fills a block; false when the stream ends right before it.
    fn fill(&mut self, block: &mut [u8]) -> Result<bool, ArchiveError> {
        let mut filled = 0;
        while filled < block.len() {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(ArchiveError::Truncated(self.at)),
                Ok(count) => {
                    filled += count;
                    self.at += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

impl<R: BufRead> Archive<R> {
    /// The next bytes of the last member's data, which [`Archive::take_peeked`] then takes; empty at their end.
    pub fn peek(&mut self) -> io::Result<&[u8]> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let at = self.at;
        let bytes = self.input.fill_buf()?;
        if bytes.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, ArchiveError::Truncated(at)));
        }
        Ok(&bytes[..usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()))])
    }

    /// Takes so many of the bytes that [`Archive::peek`] gave.
    pub fn take_peeked(&mut self, count: usize) {
        self.input.consume(count);
        self.at += count as u64;
        self.left -= count as u64;
    }
}

/// The data of the last member, as it is packed.
impl<R: BufRead> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if want == 0 {
            return Ok(0);
        }
        let count = self.input.read(&mut buffer[..want])?;
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, ArchiveError::Truncated(self.at)));
        }
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

impl Extensions {
    fn read_pax(&mut self, mut data: &[u8]) -> Result<(), String> {
        while !data.is_empty() {
            let space = data.iter().position(|byte| *byte == b' ').ok_or("pax record without a length")?;
            let length = decimal(&data[..space])
                .and_then(|length| usize::try_from(length).ok())
                .filter(|length| *length > space + 1 && *length <= data.len())
                .ok_or("pax record with a wrong length")?;
            let record = data[space + 1..length].strip_suffix(b"\n").ok_or("pax record without a newline")?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or("pax record without a value")?;
            self.read_record(&record[..equals], &record[equals + 1..])?;
            data = &data[length..];
        }
        Ok(())
    }

    fn read_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let number = || {
            decimal(value)
                .ok_or_else(|| format!("pax record {} is not a number", String::from_utf8_lossy(key)))
        };
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            if name.is_empty() || name.contains(&0) {
                return Err("an extended attribute without a proper name".into());
            }
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        // An empty value means what the header says.
        if value.is_empty() {
            return Ok(());
        }
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.modified = Some(pax_time(value).ok_or("pax record mtime is not a time")?),
            b"atime" => self.accessed = Some(pax_time(value).ok_or("pax record atime is not a time")?),
            b"GNU.sparse.major" => self.sparse_major = number()?,
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse_size = Some(number()?),
            b"GNU.sparse.name" => self.sparse_path = Some(value.to_vec()),
            b"GNU.sparse.offset" => self.sparse_offset = Some(number()?),
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse_offset.take().ok_or("sparse length without an offset")?;
                self.sparse_map.get_or_insert_default().push((offset, number()?));
            }
            b"GNU.sparse.map" => {
                let numbers: Option<Vec<u64>> = value.split(|byte| *byte == b',').map(decimal).collect();
                let numbers =
                    numbers.filter(|n| n.len() % 2 == 0).ok_or("sparse map is not pairs of numbers")?;
                self.sparse_map = Some(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect());
            }
            _ => {}
        }
        Ok(())
    }
}

/// A map must ascend, stay within the file, and use up exactly the data there is.
fn check_map(map: &[(u64, u64)], packed: u64, real: u64) -> Result<(), String> {
    let (mut end, mut total) = (0_u64, 0_u64);
    for &(offset, length) in map {
        if offset < end {
            return Err("the sparse map overlaps itself".into());
        }
        end =
            offset.checked_add(length).filter(|end| *end <= real).ok_or("the sparse map leaves the file")?;
        total += length;
    }
    if total == packed { Ok(()) } else { Err("the sparse map does not fit the data".into()) }
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Times out of range become 1970, as other engines have it.
fn seconds(seconds: u64) -> SystemTime {
    if seconds > LAST_SECOND { UNIX_EPOCH } else { UNIX_EPOCH + Duration::from_secs(seconds) }
}

fn pax_time(text: &[u8]) -> Option<SystemTime> {
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    if let Some(before) = whole.strip_prefix(b"-") {
        return decimal(before).map(|_| UNIX_EPOCH);
    }
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let whole = decimal(whole)?;
    let digits: Vec<u8> = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9).collect();
    let time = seconds(whole);
    if time == UNIX_EPOCH && whole != 0 {
        Some(time)
    } else {
        Some(time + Duration::from_nanos(decimal(&digits)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(7);
        header.set_path("name").unwrap();
        header.set_cksum();
        header
    }

    fn block(kind: EntryType, data: &[u8]) -> Vec<u8> {
        let mut bytes = header(kind, data.len() as u64).as_bytes().to_vec();
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    #[test]
    fn what_a_writer_left_out_is_zero() {
        let mut header = header(EntryType::Regular, 0);
        for field in NUMBERS {
            header.as_mut_bytes()[field].fill(0);
        }
        header.set_cksum();
        let mut archive = Archive::new(&header.as_bytes()[..]);
        let member = archive.next().unwrap().unwrap();
        assert_eq!((member.mode, member.uid, member.gid, member.size), (0, 0, 0, 0));
        assert_eq!(member.modified, UNIX_EPOCH);
    }

    fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        block(EntryType::XHeader, &data)
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>, ArchiveError> {
        let mut archive = Archive::new(bytes);
        let mut members = Vec::new();
        while let Some(member) = archive.next()? {
            let mut data = Vec::new();
            archive.read_to_end(&mut data)?;
            members.push((member, data));
        }
        Ok(members)
    }

    fn fails(bytes: &[u8], words: &str) {
        let error = read(bytes).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn extensions_win_over_the_header() {
        let mut bytes = pax(&[
            ("path", b"a/long"),
            ("uid", b"4000000000"),
            ("mtime", b"5.25"),
            ("atime", b"9"),
            ("SCHILY.xattr.security.capability", b"\x01\n=\0\x02"),
            ("comment", b"x"),
        ]);
        bytes.extend(block(EntryType::Regular, b"data"));
        bytes.extend(block(EntryType::GNULongName, &[b"l/".repeat(200), vec![0]].concat()));
        bytes.extend(block(EntryType::XGlobalHeader, b"14 path=global\n"));
        bytes.extend(block(EntryType::Directory, b""));
        let members = read(&bytes).unwrap();
        let (file, data) = &members[0];
        assert_eq!(
            (&file.path[..], &data[..], file.uid, file.size),
            (&b"a/long"[..], &b"data"[..], 4_000_000_000, 4)
        );
        assert_eq!(file.modified, UNIX_EPOCH + Duration::from_millis(5250));
        assert_eq!(file.accessed, UNIX_EPOCH + Duration::from_secs(9));
        assert_eq!(file.xattrs, [(b"security.capability".to_vec(), b"\x01\n=\0\x02".to_vec())]);
        assert_eq!((members[1].0.path.len(), &members[1].0.kind), (400, &Kind::Folder));
    }

    #[test]
    fn hostile_archives_are_refused() {
        let file = block(EntryType::Regular, b"data");
        fails(&file[..600], "cut short");
        fails(&file[..100], "cut short");
        fails(&[1; 512], "tar header");
        let mut wrong = file.clone();
        wrong[0] ^= 1;
        fails(&wrong, "checksum");
        fails(&[vec![0; 512], file.clone()].concat(), "lone zero block");
        let mut huge = header(EntryType::XHeader, 1 << 40);
        huge.set_cksum();
        fails(huge.as_bytes(), "extension of");
        fails(&block(EntryType::Regular, b"x").repeat(1)[..512], "cut short");
        fails(&pax(&[("path", b"x")]).repeat(20), "more than 16 extensions");
        fails(&pax(&[("path", b"x")]), "cut short");
        fails(&[pax(&[("uid", b"4294967295")]), file.clone()].concat(), "does not fit");
        fails(&[pax(&[("uid", b"-5")]), file.clone()].concat(), "not a number");
        fails(&[pax(&[("path", b"a\0b")]), file.clone()].concat(), "NUL");
        fails(&[pax(&[("size", b"9223372036854775807")]), file.clone()].concat(), "size");
        for (records, words) in [
            (&b"99 path=x\n"[..], "wrong length"),
            (b"10 path=xyz", "newline"),
            (b"7 path\n", "without a value"),
            (b"x", "without a length"),
            (b"18446744073709551615 path=x\n", "wrong length"),
        ] {
            fails(&[block(EntryType::XHeader, records), file.clone()].concat(), words);
        }
        fails(&block(EntryType::new(b'Z'), b""), "not supported");
    }

    #[test]
    fn sparse_maps() {
        let file = block(EntryType::Regular, b"abcd");
        let good =
            [pax(&[("GNU.sparse.map", b"0,1,10,3"), ("GNU.sparse.size", b"20")]), file.clone()].concat();
        let (member, data) = read(&good).unwrap().remove(0);
        assert_eq!((member.size, member.holes), (20, Some(vec![(0, 1), (10, 3)])));
        assert_eq!(data, b"abcd");
        for (map, size, words) in [
            (&b"0,2,1,2"[..], &b"20"[..], "overlaps"),
            (b"0,1,10,3", b"12", "leaves the file"),
            (b"0,1,10,2", b"20", "does not fit"),
            (b"0,1,10", b"20", "pairs"),
            (b"18446744073709551615,4", b"20", "leaves the file"),
            (b"0,4", b"9000000000000000000", "too large"),
        ] {
            let records = pax(&[("GNU.sparse.map", map), ("GNU.sparse.size", size)]);
            fails(&[records, file.clone()].concat(), words);
        }
        let mut packed = b"2\n0\n1\n10\n3\n".to_vec();
        packed.resize(512, 0);
        packed.extend_from_slice(b"abcd");
        let records = pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"real"),
            ("GNU.sparse.realsize", b"20"),
        ]);
        let (member, data) = read(&[records, block(EntryType::Regular, &packed)].concat()).unwrap().remove(0);
        assert_eq!(
            (&member.path[..], member.size, member.holes),
            (&b"real"[..], 20, Some(vec![(0, 1), (10, 3)]))
        );
        assert_eq!(data, b"abcd");
    }

    proptest! {
        #[test]
        fn never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), at in 0_usize..512, to: u8) {
            let _ = read(&bytes);
            let mut good = [pax(&[("path", b"a/long"), ("GNU.sparse.map", b"0,4")]), block(EntryType::Regular, b"data")].concat();
            good[at] = to;
            let sum: u32 = good[..512].iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
            good[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            good[155] = b' ';
            good.append(&mut bytes);
            let _ = read(&good);
        }
    }
}
