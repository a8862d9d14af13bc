"""A program that passes lines on, all but those that decoders write about damaged pictures.

They come from the libraries behind DALI, each of which writes to standard error in its own way. It is run as a file and
imports nothing of fastflower; see `fastflower.runtime.output.without_decoders`.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from typing import BinaryIO

COLOR = r"(\x1b\[[0-9;]*m)?"
DECODERS = re.compile(
    "|".join(
        (
            rf"{COLOR}\[(ERROR|WARNING)\] {COLOR}\[\w+\] ",  # nvImageCodec
            r"\[ *(ERROR|WARN):[0-9]+@[0-9.]+\] global ",  # OpenCV
            r"libpng (error|warning): ",
            r"(_?TIFF\w*|MissingRequired|LZW\w*|ZIP\w*|PixarLog\w*|Fax\w*|PackBits\w*|JPEG\w+)?: ",  # libtiff
            # libjpeg on what a file holds (its jerror.h)
            r"Corrupt JPEG data: ",
            r"Premature end of (JPEG|input) file",
            r"Invalid (JPEG file structure|component ID|progressive|SOS parameters|crop request|scan script)",
            r"Bogus (Huffman table|marker length|sampling factors|D[AHQ][CT]|JPEG colorspace|virtual array)",
            r"Unsupported (marker type|JPEG process|JPEG data precision|color conversion)",
            r"(Huffman|Quantization|Arithmetic) table 0x",
            r"Huffman code size table overflow|Missing Huffman code|Inconsistent progression sequence",
            r"Unknown Adobe color transform|Warning: unknown JFIF revision|Warning: thumbnail image",
            r"Input file read error|Empty (JPEG image|input file)|JPEG datastream contains no image|Not a JPEG file",
            r"Didn't expect more than one scan|Too many color components|Maximum supported image dimension",
            r"Sampling factors too large|(CCIR601|Fractional) sampling not implemented|DCT (coefficient|scaled output)",
        )
    ).encode()
)


def pass_on(source: BinaryIO, target: BinaryIO) -> None:
    """Copy lines until the source ends, all but those of decoders, and empty lines behind these."""
    left_out = False
    for line in source:
        left_out = bool(DECODERS.match(line)) or (left_out and not line.strip())
        if not left_out:
            target.write(line)
            target.flush()


def main() -> None:
    """The process: pass lines on until all who could write some are gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # which schedulers send to all processes of a job
    with contextlib.suppress(BrokenPipeError):
        pass_on(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
