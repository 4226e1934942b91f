//! Frames of SPDY/3.1, from bytes and to bytes.
//!
//! ```text
//!  control   1 | version 15 | type 16 | flags 8 | length 24 | what the type says
//!  data      0 | stream 31            | flags 8 | length 24 | bytes
//! ```
//!
//! Numbers are big-endian. Invariants: no byte of a peer makes this panic, and what is kept of one is bounded: a control frame has
//! a longest length, and a data frame, which may be of 16 MiB, comes out in pieces as it arrives.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// The version in control frames; 3.1 says 3.
const VERSION: u16 = 3;
/// The longest control frame that is read. Those of streams are of some hundred bytes.
pub(crate) const CONTROL_MAX: usize = 64 << 10;
/// The longest piece of a data frame.
pub(crate) const PIECE: usize = 32 << 10;
const HEADER: usize = 8;
const FIN: u8 = 1;
const UNIDIRECTIONAL: u8 = 2;
/// The stream's number, without the bit that is for nobody.
const STREAM: u32 = 0x7fff_ffff;

/// Why a stream is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Reset {
    /// It was closed already, or never there.
    InvalidStream = 2,
    /// There are too many.
    Refused = 3,
    /// It is not wanted any more.
    Cancel = 5,
    /// The window was overrun.
    FlowControl = 7,
}

/// What makes a connection of no use: the peer does not speak the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Violation(pub(crate) &'static str);

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Opens a stream.
    SynStream { stream: u32, fin: bool, unidirectional: bool, headers: Bytes },
    /// Accepts a stream.
    SynReply { stream: u32, fin: bool, headers: Bytes },
    /// Ends a stream both ways, at once.
    RstStream { stream: u32, status: u32 },
    /// Numbers and values; of interest is the one.
    Settings { initial_window: Option<u32> },
    /// To be sent back.
    Ping { id: u32 },
    /// No stream after `last` will be heeded.
    GoAway { last: u32, status: u32 },
    /// More headers of a stream.
    Headers { stream: u32, fin: bool, headers: Bytes },
    /// The peer has room for so much more.
    WindowUpdate { stream: u32, delta: u32 },
    /// Bytes of a stream; of those that were one frame, the last piece alone has `fin`.
    Data { stream: u32, fin: bool, bytes: Bytes },
    /// A control frame that is not known here, and so of no effect.
    Unknown,
}

const INITIAL_WINDOW: u32 = 7;

/// Takes frames from bytes as they come.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    /// What is to come of a data frame: stream, whether it is the stream's last, how much.
    data: Option<(u32, bool, usize)>,
}

impl Decoder {
    /// The next frame, once all of it is there; None until then.
    pub(crate) fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, Violation> {
        if let Some((stream, fin, left)) = self.data {
            return Ok(self.piece(buffer, stream, fin, left));
        }
        let Some(header) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let (word, flags) = (u32::from_be_bytes([header[0], header[1], header[2], header[3]]), header[4]);
        let length = usize::from(header[5]) << 16 | usize::from(header[6]) << 8 | usize::from(header[7]);
        if word & !STREAM == 0 {
            buffer.advance(HEADER);
            if word == 0 {
                return Err(Violation("data for the stream 0"));
            }
            if length == 0 {
                return Ok(Some(Frame::Data { stream: word, fin: flags & FIN != 0, bytes: Bytes::new() }));
            }
            return Ok(self.piece(buffer, word, flags & FIN != 0, length));
        }
        if (word >> 16 & 0x7fff) as u16 != VERSION {
            return Err(Violation("a control frame of another version than 3"));
        }
        if length > CONTROL_MAX {
            return Err(Violation("a control frame of more than 64 KiB"));
        }
        if buffer.len() < HEADER + length {
            return Ok(None);
        }
        buffer.advance(HEADER);
        control(word as u16, flags, buffer.split_to(length).freeze()).map(Some)
    }

    /// What is there of a data frame.
    fn piece(&mut self, buffer: &mut BytesMut, stream: u32, fin: bool, left: usize) -> Option<Frame> {
        let length = left.min(buffer.len()).min(PIECE);
        let left = left - length;
        self.data = (left > 0).then_some((stream, fin, left));
        (length > 0).then(|| Frame::Data {
            stream,
            fin: fin && left == 0,
            bytes: buffer.split_to(length).freeze(),
        })
    }
}

fn control(kind: u16, flags: u8, mut payload: Bytes) -> Result<Frame, Violation> {
    let fin = flags & FIN != 0;
    let mut word = || payload.try_get_u32().map_err(|_| Violation("a control frame that is too short"));
    Ok(match kind {
        1 => {
            let stream = word()? & STREAM;
            let _associated = word()?;
            if payload.len() < 2 {
                return Err(Violation("a SYN_STREAM that is too short"));
            }
            // Priority and credentials are for nobody here.
            payload.advance(2);
            Frame::SynStream { stream, fin, unidirectional: flags & UNIDIRECTIONAL != 0, headers: payload }
        }
        2 => Frame::SynReply { stream: word()? & STREAM, fin, headers: payload },
        3 => Frame::RstStream { stream: word()? & STREAM, status: word()? },
        4 => {
            let count = word()? as usize;
            if payload.len() != count.saturating_mul(8) {
                return Err(Violation("SETTINGS that are not as long as they say"));
            }
            let mut initial_window = None;
            while payload.remaining() >= 8 {
                let (id, value) = (payload.get_u32() & 0x00ff_ffff, payload.get_u32());
                if id == INITIAL_WINDOW {
                    initial_window = Some(value);
                }
            }
            Frame::Settings { initial_window }
        }
        6 => Frame::Ping { id: word()? },
        7 => Frame::GoAway { last: word()? & STREAM, status: word()? },
        8 => Frame::Headers { stream: word()? & STREAM, fin, headers: payload },
        9 => Frame::WindowUpdate { stream: word()? & STREAM, delta: word()? & STREAM },
        _ => Frame::Unknown,
    })
}

impl Frame {
    /// Appends the frame. A data frame has to be shorter than 16 MiB, headers than that less ten bytes.
    pub(crate) fn encode(&self, out: &mut BytesMut) {
        let fin_flag = |fin: bool| if fin { FIN } else { 0 };
        let mut control = |kind: u16, flags: u8, words: &[u32], rest: &[u8]| {
            out.put_u16(0x8000 | VERSION);
            out.put_u16(kind);
            out.put_u8(flags);
            out.put_uint((words.len() * 4 + rest.len()) as u64, 3);
            words.iter().for_each(|word| out.put_u32(*word));
            out.put_slice(rest);
        };
        match self {
            Frame::SynStream { stream, fin, unidirectional, headers } => {
                let flags = fin_flag(*fin) | if *unidirectional { UNIDIRECTIONAL } else { 0 };
                let rest = [&[0, 0], &headers[..]].concat();
                control(1, flags, &[*stream, 0], &rest);
            }
            Frame::SynReply { stream, fin, headers } => control(2, fin_flag(*fin), &[*stream], headers),
            Frame::RstStream { stream, status } => control(3, 0, &[*stream, *status], &[]),
            Frame::Settings { initial_window: Some(value) } => {
                control(4, 0, &[1, INITIAL_WINDOW, *value], &[]);
            }
            Frame::Settings { initial_window: None } => control(4, 0, &[0], &[]),
            Frame::Ping { id } => control(6, 0, &[*id], &[]),
            Frame::GoAway { last, status } => control(7, 0, &[*last, *status], &[]),
            Frame::Headers { stream, fin, headers } => control(8, fin_flag(*fin), &[*stream], headers),
            Frame::WindowUpdate { stream, delta } => control(9, 0, &[*stream, *delta], &[]),
            Frame::Data { stream, fin, bytes } => {
                out.put_u32(*stream);
                out.put_u8(fin_flag(*fin));
                out.put_uint(bytes.len() as u64, 3);
                out.put_slice(bytes);
            }
            Frame::Unknown => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(decoder: &mut Decoder, bytes: &[u8]) -> Result<Vec<Frame>, Violation> {
        let mut buffer = BytesMut::from(bytes);
        let mut frames = Vec::new();
        while let Some(frame) = decoder.decode(&mut buffer)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    fn encoded(frame: &Frame) -> Vec<u8> {
        let mut out = BytesMut::new();
        frame.encode(&mut out);
        out.to_vec()
    }

    #[test]
    fn frames_are_as_the_protocol_draws_them() {
        let ping = [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1];
        assert_eq!(encoded(&Frame::Ping { id: 1 }), ping);
        let data = [0, 0, 0, 5, 1, 0, 0, 2, b'h', b'i'];
        assert_eq!(encoded(&Frame::Data { stream: 5, fin: true, bytes: Bytes::from_static(b"hi") }), data);
        let syn = [0x80, 3, 0, 1, 2, 0, 0, 12, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 9, 9];
        let headers = Bytes::from_static(&[9, 9]);
        let frame = Frame::SynStream { stream: 7, fin: false, unidirectional: true, headers };
        assert_eq!(encoded(&frame), syn);
        assert_eq!(all(&mut Decoder::default(), &[&ping[..], &syn[..]].concat()).unwrap()[1], frame);
    }

    #[test]
    fn a_long_data_frame_comes_in_pieces_and_ends_with_the_last() {
        let bytes = Bytes::from(vec![7; 3 * PIECE + 1]);
        let whole = encoded(&Frame::Data { stream: 1, fin: true, bytes: bytes.clone() });
        let frames = all(&mut Decoder::default(), &whole).unwrap();
        let sizes: Vec<_> = frames
            .iter()
            .map(|frame| match frame {
                Frame::Data { stream: 1, fin, bytes } => (bytes.len(), *fin),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(sizes, [(PIECE, false), (PIECE, false), (PIECE, false), (1, true)]);
        let empty = encoded(&Frame::Data { stream: 1, fin: true, bytes: Bytes::new() });
        assert_eq!(all(&mut Decoder::default(), &empty).unwrap().len(), 1);
    }

    #[test]
    fn what_no_client_of_the_protocol_says_is_refused() {
        for (bytes, why) in [
            (&b"\0\0\0\0\0\0\0\x01x"[..], "data for the stream 0"),
            (b"\x80\x02\0\x06\0\0\0\x04\0\0\0\x01", "another version"),
            (b"\x80\x03\0\x01\0\x01\0\x01", "more than 64 KiB"),
            (b"\x80\x03\0\x03\0\0\0\x04\0\0\0\x01", "too short"),
            (b"\x80\x03\0\x01\0\0\0\x09\0\0\0\x01\0\0\0\0\0", "too short"),
            (b"\x80\x03\0\x04\0\0\0\x04\xff\xff\xff\xff", "not as long as they say"),
            (b"GET / HTTP/1.1\r\n", ""),
        ] {
            match all(&mut Decoder::default(), bytes) {
                Err(Violation(text)) => assert!(text.contains(why), "{text}"),
                // Text looks like data of a stream that nobody opened; the session says so.
                Ok(frames) => assert!(matches!(frames[..], [Frame::Data { .. }]), "{bytes:?}: {frames:?}"),
            }
        }
        assert_eq!(all(&mut Decoder::default(), b"\x80\x03\0\x63\0\0\0\x01x"), Ok(vec![Frame::Unknown]));
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let stream = 1..0x8000_0000_u32;
        let some = prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
        prop_oneof![
            (stream.clone(), any::<bool>(), any::<bool>(), some.clone()).prop_map(
                |(stream, fin, unidirectional, headers)| Frame::SynStream {
                    stream,
                    fin,
                    unidirectional,
                    headers
                }
            ),
            (stream.clone(), any::<bool>(), some.clone())
                .prop_map(|(stream, fin, headers)| Frame::SynReply { stream, fin, headers }),
            (stream.clone(), any::<bool>(), some.clone()).prop_map(|(stream, fin, headers)| Frame::Headers {
                stream,
                fin,
                headers
            }),
            (stream.clone(), any::<bool>(), some).prop_map(|(stream, fin, bytes)| Frame::Data {
                stream,
                fin,
                bytes
            }),
            (stream.clone(), any::<u32>()).prop_map(|(stream, status)| Frame::RstStream { stream, status }),
            (stream.clone(), any::<u32>()).prop_map(|(last, status)| Frame::GoAway { last, status }),
            (stream.clone(), stream.clone())
                .prop_map(|(stream, delta)| Frame::WindowUpdate { stream, delta }),
            any::<u32>().prop_map(|id| Frame::Ping { id }),
            any::<Option<u32>>().prop_map(|initial_window| Frame::Settings { initial_window }),
        ]
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(frames in prop::collection::vec(frame(), 0..10)) {
            let bytes: Vec<u8> = frames.iter().flat_map(encoded).collect();
            prop_assert_eq!(all(&mut Decoder::default(), &bytes).unwrap(), frames);
        }

        /// However the bytes arrive, the same comes out, but for where data is cut.
        #[test]
        fn it_does_not_matter_how_bytes_arrive(
            frames in prop::collection::vec(frame(), 0..10), size in 1..50_usize,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(encoded).collect();
            let (mut decoder, mut buffer, mut out) = (Decoder::default(), BytesMut::new(), Vec::new());
            for arrived in bytes.chunks(size) {
                buffer.extend_from_slice(arrived);
                while let Some(frame) = decoder.decode(&mut buffer).unwrap() {
                    out.push(frame);
                }
            }
            let joined = |frames: &[Frame]| {
                let mut joined: Vec<Frame> = Vec::new();
                let mut open = false;
                for frame in frames {
                    match (joined.last_mut(), frame) {
                        (Some(Frame::Data { stream, fin, bytes }), Frame::Data { stream: of, fin: last, bytes: more })
                            if open && stream == of =>
                        {
                            *bytes = [&bytes[..], &more[..]].concat().into();
                            *fin = *last;
                        }
                        _ => joined.push(frame.clone()),
                    }
                    open = matches!(frame, Frame::Data { fin: false, .. });
                }
                joined
            };
            prop_assert_eq!(joined(&out), joined(&frames));
        }

        #[test]
        fn no_bytes_make_it_panic_or_wait_for_more_than_it_may(
            bytes in prop::collection::vec(any::<u8>(), 0..2000), control in any::<bool>(),
        ) {
            let mut bytes = bytes;
            if control && bytes.len() > 4 {
                bytes[..3].copy_from_slice(&[0x80, 3, 0]);
                bytes[3] %= 12;
            }
            let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::from(&bytes[..]));
            while let Ok(Some(_)) = decoder.decode(&mut buffer) {}
            prop_assert!(buffer.len() <= CONTROL_MAX + HEADER);
        }
    }
}
