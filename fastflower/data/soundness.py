"""Whether encoded bytes are a whole picture, and which library reads them: by their structure, before any is decoded.

Files are walked from segment to segment, chunk to chunk or box to box, since what ends a picture may also stand within
it (a thumbnail in EXIF is a JPEG of its own). The structures are those of ITU-T T.81 (JPEG), the PNG, GIF89a, WebP
container, TIFF 6.0 and BMP specifications, Netpbm's, and ISO/IEC 14496-12 (AVIF, HEIC) and 15444-1 (JPEG 2000).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import numpy as np
from nvidia import nvimgcodec

from fastflower.arrays import Bytes
from fastflower.data import converted
from fastflower.data.converted import UnreadableError

_BARE_MARKERS = (0x01, *range(0xD0, 0xD9))  # of JPEG, without a length: TEM, RST0 to RST7, SOI
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_EXIF = b"Exif\0\0"
_NUMBER = rb"(?:\s|#[^\n]*\n)+(\d{1,9})"
_RASTER = re.compile(rb"P(?:4%(n)b%(n)b|[56]%(n)b%(n)b%(n)b)\s" % {b"n": _NUMBER})


def is_sound(encoded: Bytes) -> bool:
    """Whether encoded image bytes ([length] uint8) have a picture's header and are not cut off."""
    if _is_pillows(encoded):
        return converted.why_not(encoded) is None and not is_cut_off(encoded)
    return has_header(encoded) and not is_cut_off(encoded)


def has_header(encoded: Bytes) -> bool:
    """Whether encoded image bytes ([length] uint8) begin as a picture that DALI's decoder library knows (6 µs)."""
    return header_shape(encoded)[1] > 0


def header_shape(encoded: Bytes) -> tuple[int, int]:
    """Height and width of a picture that DALI reads, by its header, not turned by EXIF; 0 where it has none (6 µs)."""
    try:
        stream = nvimgcodec.CodeStream(encoded)  # which parses it
        return stream.height, stream.width
    except RuntimeError:
        return 0, 0


def needs_conversion(encoded: Bytes) -> bool:
    """Whether DALI does not read encoded image bytes ([length] uint8) as they are, but what `convert` makes of them."""
    return _is_pillows(encoded) or bool(_spare_exif(encoded))


def _is_pillows(encoded: Bytes) -> bool:
    """Whether encoded image bytes are of a kind that DALI does not read, and Pillow may.

    Those are GIF, AVIF and HEIC, some of TIFF, and WebP with an odd chunk before another, whose padding DALI 2.4 takes
    for a chunk. JPEG 2000 is one too, since damaged ones end the process in DALI 2.4.
    """
    start = bytes(encoded[:12])
    if start.startswith((b"\xff\xd8", b"\x89PNG")):
        return False
    if start.startswith(b"RIFF") and start.endswith(b"WEBP"):
        return _has_padding_inside(encoded)
    if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return not has_header(encoded) or converted.is_lzma(encoded)
    return converted.kind_of(encoded) is not None


def convert(encoded: Bytes) -> Bytes:
    """What DALI reads of a picture's encoded bytes, [length] uint8: these, or what `converted.to_pixmap` makes of them.

    Of several EXIF blocks one stays, by which Pillow turns the picture too: DALI 2.4 takes the size by one and turns
    by another, and writes beyond its memory.

    Raises:
        UnreadableError: they are no whole picture, or of a kind that nothing here reads; says why, where it is known.
    """
    if _is_pillows(encoded):
        if is_cut_off(encoded):
            raise UnreadableError("it is cut off")
        return converted.to_pixmap(encoded)
    if not is_sound(encoded):
        raise UnreadableError("")
    spare = _spare_exif(encoded)
    return np.delete(encoded, np.r_[tuple(spare)]) if spare else encoded


def size_of(encoded: Bytes) -> tuple[int, int]:
    """Height and width of a whole picture by its header, not turned by EXIF.

    Raises:
        UnreadableError: see `convert`.
    """
    if _is_pillows(encoded):
        return converted.size_of(encoded)
    if not is_sound(encoded):
        raise UnreadableError("")
    return header_shape(encoded)


def is_cut_off(encoded: Bytes) -> bool:
    """Whether encoded image bytes ([length] uint8) lack their end, by their structure; other bytes may follow it.

    Of compressed BMP and of what is no picture there is no telling.
    """
    start = bytes(encoded[:12])
    try:
        if start.startswith(b"\xff\xd8"):
            return _jpeg_is_cut_off(encoded)
        if start.startswith(b"\x89PNG"):
            return _png_is_cut_off(encoded)
        if start.startswith(b"RIFF"):
            return len(encoded) < 8 + _number(encoded, 4)  # its size, without these eight
        if start.startswith(b"GIF8"):
            return _gif_is_cut_off(encoded)
        if start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            return converted.tiff_end(encoded) > len(encoded)
        if start.startswith(b"BM"):
            return _bitmap_end(encoded) > len(encoded)
        if start[4:8] in (b"ftyp", b"jP  "):
            return _boxes_are_cut_off(encoded)
        if start.startswith(b"\xff\x4f\xff\x51"):
            return b"\xff\xd9" not in bytes(encoded[-64:])  # the end of a bare code stream of JPEG 2000
        if start.startswith((b"P4", b"P5", b"P6")):
            return _raster_end(encoded) > len(encoded)
    except (IndexError, struct.error):  # it ends within the header
        return True
    return False


def _number(encoded: Bytes, offset: int, kind: str = "<I") -> int:
    (number,) = struct.unpack_from(kind, encoded.data, offset)
    return int(number)


def _segments(encoded: Bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, beginning and end of a JPEG's segments, up to the first scan's header or the picture's end.

    Raises:
        IndexError, struct.error: the bytes end before.
    """
    position, marker = 2, 0
    while marker not in (_START_OF_SCAN, _END_OF_IMAGE):
        while encoded[position] != 0xFF or encoded[position + 1] in (0x00, 0xFF):  # decoders pass over what is between
            position += 1
        start, marker = position, int(encoded[position + 1])
        position += 2
        if marker not in (_END_OF_IMAGE, *_BARE_MARKERS):
            position += _number(encoded, position, ">H")
        yield marker, start, position


def _jpeg_is_cut_off(encoded: Bytes) -> bool:
    """Segments up to the first scan have their lengths. From there on only a marker follows 0xFF, or a stuffed zero."""
    *_, (marker, _, end) = _segments(encoded)
    if marker == _END_OF_IMAGE:
        return True  # before there was any picture
    ended = end <= len(encoded) - 2 and bytes(encoded[-2:]) == b"\xff\xd9"  # as nearly all do
    return not ended and b"\xff\xd9" not in encoded[end:].tobytes()


def _chunks(encoded: Bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, beginning and end of a PNG's chunks, with length and checksum, up to the last; any may end beyond the file.

    Raises:
        struct.error: the bytes end before.
    """
    kind, end = b"", 8
    while kind != b"IEND":
        start, end = end, end + 12 + _number(encoded, end, ">I")
        kind = bytes(encoded[start + 4 : start + 8])
        yield kind, start, end


def _png_is_cut_off(encoded: Bytes) -> bool:
    return any(end > len(encoded) for _, _, end in _chunks(encoded))


def _spare_exif(encoded: Bytes) -> list[slice]:
    """Where the EXIF blocks are by which a picture is not turned: of a JPEG all but the first, of a PNG but the last.

    There is no telling where the file is cut off.
    """
    start_of_file = bytes(encoded[:4])
    try:
        if start_of_file.startswith(b"\xff\xd8"):
            return [slice(start, end) for kind, start, end in _segments(encoded) if _is_exif(encoded, kind, start)][1:]
        if start_of_file == b"\x89PNG":
            return [slice(start, end) for kind, start, end in _chunks(encoded) if kind == b"eXIf"][:-1]
    except (IndexError, struct.error):
        pass
    return []


def _is_exif(encoded: Bytes, marker: int, start: int) -> bool:
    """Whether a JPEG's segment is."""
    return marker == _APP1 and bytes(encoded[start + 4 : start + 10]) == _EXIF


def _has_padding_inside(encoded: Bytes) -> bool:
    """Whether a chunk of a WebP file is of odd length, and another follows it."""
    position, end = 12, min(len(encoded), 8 + _number(encoded, 4))
    while position + 8 <= end:
        length = _number(encoded, position + 4)
        position += 8 + length + length % 2
        if length % 2 and position + 8 <= end:
            return True
    return False


def _gif_is_cut_off(encoded: Bytes) -> bool:
    """Up to the end of its first picture."""
    position = 13 + _color_table(int(encoded[10]))
    while encoded[position] == 0x21:  # an extension, of blocks
        position = _after_blocks(encoded, position + 2)
    if encoded[position] != 0x2C:
        return True
    return _after_blocks(encoded, position + 11 + _color_table(int(encoded[position + 9]))) > len(encoded)


def _color_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_blocks(encoded: Bytes, position: int) -> int:
    while length := int(encoded[position]):
        position += 1 + length
    return position + 1


def _boxes_are_cut_off(encoded: Bytes) -> bool:
    """Boxes up to the one with the compressed picture; a last one without a length goes to the end of the file."""
    position, complete = 0, False
    while position + 8 <= len(encoded):
        length, kind = _number(encoded, position, ">I"), bytes(encoded[position + 4 : position + 8])
        if length == 1:
            length = _number(encoded, position + 8, ">Q")
        if not length:
            return kind == b"jp2c" and b"\xff\xd9" not in bytes(encoded[-64:])
        if complete and not kind.isalnum():  # no box: other bytes
            return False
        position += max(length, 8)
        if position > len(encoded):
            return True
        if kind == b"jp2c":
            return False
        complete |= kind == b"mdat"
    return not complete


def _bitmap_end(encoded: Bytes) -> int:
    """Where the pixels of a BMP file end, 0 where that cannot be told."""
    pixels, header = _number(encoded, 10), _number(encoded, 14)
    if header == 12:
        width, height, depth, compression = *struct.unpack_from("<HHxxH", encoded.data, 18), 0
    else:
        width, height, depth, compression = struct.unpack_from("<iixxHI", encoded.data, 18)
    row = (width * depth + 31) // 32 * 4
    return pixels + row * abs(height) if compression in (0, 3) else 0


def _raster_end(encoded: Bytes) -> int:
    """Where the pixels of a binary PBM, PGM or PPM file end, 0 where that cannot be told."""
    head = _RASTER.match(bytes(encoded[:4096]))
    if not head:
        return 0
    numbers = [int(number) for number in head.groups() if number is not None]
    width, height, *most = numbers
    if not most:
        return head.end() + (width + 7) // 8 * height
    channels = 3 if encoded[1] == ord("6") else 1
    return head.end() + width * height * channels * (2 if most[0] > 255 else 1)
