"""Fast decode of the full-size video codec, and clips written while they are decoded.

Read in this order: `image.py` (the image decoder as steps), `temporal.py` (windows in time), `tiled.py` (bands of rows
for small cards), `video.py` (`VideoDecoder`: all of it in batches that fit), `stream.py` (decode and write at once);
`work.py` counts FLOPs, bytes and peak memory.
"""

from javis.decode.image import ImageDecoderShape
from javis.decode.stream import write_decoded
from javis.decode.video import DecodeOptions, VideoDecoder, decode_frames
from javis.decode.work import Batches, Work, choose_batches, decode_peak_bytes, decode_work

__all__ = [
    "Batches",
    "DecodeOptions",
    "ImageDecoderShape",
    "VideoDecoder",
    "Work",
    "choose_batches",
    "decode_frames",
    "decode_peak_bytes",
    "decode_work",
    "write_decoded",
]
