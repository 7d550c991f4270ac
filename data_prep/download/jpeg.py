"""JPEGs from the web that are stored as they came: nothing is lost by encoding a second time."""

import re

_START, _END = b"\xff\xd8", b"\xff\xd9"
# ISO/IEC 10918-1, table B.1.
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive
_TABLES = (0xC4, 0xDB, 0xDD)  # Huffman, quantisation, restart interval
_SCAN = 0xDA
_JFIF, _ADOBE, _COMMENT = 0xE0, 0xEE, 0xFE
_METADATA = (*range(0xE0, 0xF0), _COMMENT)
_YCBCR = b"\x01"  # the transform in Adobe's segment
# Of the three components of a frame. libjpeg takes other numbers for other colours if no segment says more.
_NUMBERS = (1, 2, 3)
_MOST_SEGMENTS = 1000  # a progressive JPEG has some 40; a hostile one may have millions
_LEAST_LENGTH = 2  # of a segment: its own two bytes
# In a scan, a marker other than a restart; FF00 is a byte of data.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def plain_jpeg(data: bytes) -> bytes | None:
    """Return a JPEG of 8-bit YCbCr without comments, EXIF, colour profile and what follows its end.

    The decoded pixels are the same: a decoder that gives RGB ignores all of these but a rotation, which is
    the caller's to look at. A JPEG without them is returned as it came. None: the file is another kind of
    JPEG, or no whole one.
    """
    if not data.startswith(_START):
        return None
    parts, at, has_frame, has_scan = [_START], len(_START), False, False
    for _ in range(_MOST_SEGMENTS):
        length = int.from_bytes(data[at + 2 : at + 4])
        if data[at : at + 1] != b"\xff" or length < _LEAST_LENGTH:
            return None
        marker, end = data[at + 1], at + 2 + length
        segment = data[at:end]
        if marker in _FRAMES:
            if has_frame or not _is_colour(segment):
                return None
            has_frame = True
        elif marker == _SCAN:
            found = _NEXT_MARKER.search(data, end)
            if not has_frame or found is None:
                return None
            has_scan, end = True, found.start()
        elif marker not in (*_TABLES, *_METADATA) or (marker == _ADOBE and segment[15:16] != _YCBCR):
            return None
        if marker not in _METADATA or (marker == _JFIF and segment[4:9] == b"JFIF\0"):
            parts.append(data[at:end])
        at = end
        if has_scan and data[at : at + 2] == _END:
            return b"".join([*parts, _END])
    return None


def _is_colour(frame: bytes) -> bool:
    """Return whether the segment of a frame has 8 bits and three components, numbered as for YCbCr."""
    return len(frame) == 19 and frame[4] == 8 and (frame[10], frame[13], frame[16]) == _NUMBERS
