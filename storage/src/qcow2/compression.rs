//! Decompressing clusters. Compressed clusters are only ever read; a write replaces them by plain ones.

use std::io::{self, Read};

use super::header::Compression;
use super::layout::corrupt;

/// The most a Zstandard frame may make the decoder remember. A frame holds one cluster, at most 2 MiB; encoders
/// choose windows up to the next power of two and more.
const MAX_WINDOW_BYTES: u64 = 8 << 20;

/// Fills `cluster` from a compressed stream. What follows in `data` is not looked at: another cluster's data may
/// begin in the last sector.
pub(super) fn decompress(kind: Compression, data: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    let result = match kind {
        Compression::Deflate => flate2::read::DeflateDecoder::new(data).read_exact(cluster),
        Compression::Zstd => {
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(data, MAX_WINDOW_BYTES)
                .map_err(io::Error::other)
                .and_then(|mut decoder| decoder.read_exact(cluster))
        }
    };
    result.map_err(|error| corrupt(format_args!("a compressed cluster cannot be decompressed: {error}")))
}
