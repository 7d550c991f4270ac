"""Formats of images by their first bytes: those that are read, and the names of those that are not.

Only `plugin_of` loads a decoder, the one that it is asked for, and `name_tiff` Pillow's reader of tags.
"""

import functools
import io
import re

# Bytes that begin in the way of an image and still are none were damaged; others never were an image.
SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM",
    b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+",
)  # fmt: skip
_TIFF_SIGNATURES = SIGNATURES[-4:]
# Tags of TIFF 6.0 (Adobe, 1992): size, where the pixels are, bits of each sample, and what they mean.
_WIDTH, _HEIGHT, _BITS, _STRIPS, _TILES, _SAMPLE_FORMAT = 256, 257, 258, 273, 324, 339
_FLOAT = 3
_SAMPLE_FORMATS = {1: "integers", 2: "signed integers", _FLOAT: "floats", 5: "complex", 6: "complex"}
# What careless scripts send before an image, and browsers pass over: line ends, blanks, the mark of UTF-8.
_LEADING = b"\xef\xbb\xbf\r\n\t "
LONGEST_START = 4096  # bytes that `name_format` looks at

# Of containers in boxes (ISO/IEC 14496-12): the brands that tell what is inside, the first that is found.
_BRANDS = {
    "avif": (b"avif", b"avis"),
    "heic": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
    "heif": (b"mif1", b"msf1", b"mif2"),  # with none of the brands above: another codec
    "cr3": (b"crx ",),
    "mov": (b"qt  ",),
}
_STARTS = {
    "jxl": (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"),
    "jp2": (b"\x00\x00\x00\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "psd": (b"8BPS",),
    "pdf": (b"%PDF-",),
    "eps": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "jxr": (b"II\xbc\x01", b"II\xbc\x00"),
    "dds": (b"DDS ",),
    "exr": (b"v/1\x01",),
    "hdr": (b"#?RADIANCE", b"#?RGBE"),
    "icns": (b"icns",),
    "xcf": (b"gimp xcf",),
    "qoi": (b"qoif",),
    "bpg": (b"BPG\xfb",),
    "flif": (b"FLIF",),
    "djvu": (b"AT&TFORM",),
    "mng": (b"\x8aMNG\r\n\x1a\n",),
    "jng": (b"\x8bJNG\r\n\x1a\n",),
    "wmf": (b"\xd7\xcd\xc6\x9a",),
    "webm": (b"\x1a\x45\xdf\xa3",),
}
_SVG = re.compile(
    rb"(<\?xml[^>]*>|<!DOCTYPE\s+svg[^>]*>|<!--.*?-->|\s)*<(\w+:)?svg[\s>]", re.DOTALL | re.IGNORECASE
)
# An icon: reserved, kind, number of images, then the first image, whose fourth byte is reserved, too.
_ICO = re.compile(rb"\x00\x00[\x01\x02]\x00[\x01-\xff]\x00...\x00", re.DOTALL)

# Plugins for Pillow, which the extra `formats` installs: the format here, and the name that Pillow gives it.
_PLUGINS = {"heic": "HEIF", "heif": "HEIF", "jxl": "JXL"}


def skip_leading(data: bytes) -> bytes:
    """Return the bytes from where an image can begin."""
    return data.lstrip(_LEADING)


def name_format(data: bytes) -> str | None:
    """Return the name of a format that is not among `SIGNATURES`, as its files end; None if it is unknown."""
    if data[4:8] == b"ftyp":
        size = min(int.from_bytes(data[:4]), LONGEST_START)
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, size, 4))]
        for name, its_brands in _BRANDS.items():
            if any(brand in its_brands for brand in brands):
                return name
        return "jxl" if data[8:12] == b"jxl " else "mp4"
    for name, starts in _STARTS.items():
        if data.startswith(starts):
            return name
    if _SVG.match(data[:LONGEST_START]):
        return "svg"
    return "ico" if _ICO.match(data) else None


def name_tiff(data: bytes) -> tuple[str, str] | None:
    """Return name and layout of a TIFF that Pillow refuses although its header is whole, None for others."""
    if not data.startswith(_TIFF_SIGNATURES):
        return None
    from PIL import TiffImagePlugin

    try:
        file = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if b"+" in data[:4] else 8))
        file.seek(tags.next)
        tags.load(file)
        if not {_WIDTH, _HEIGHT} <= {*tags} or not {_STRIPS, _TILES} & {*tags}:
            return None
        bits = tags.get(_BITS, (1,))
        formats = tags.get(_SAMPLE_FORMAT, (1,))
    except Exception:  # of damaged bytes
        return None
    kind = _SAMPLE_FORMATS.get(formats[0], f"values of format {formats[0]}")
    layout = f"{len(bits)} x {bits[0]} bits a pixel, {kind}"
    return ("tiff_float" if formats[0] == _FLOAT else "tiff_layout"), layout


def begins_as_image(data: bytes) -> bool:
    """Return whether bytes begin in the way of an image, read or not."""
    data = skip_leading(data)
    return data.startswith(SIGNATURES) or name_format(data) is not None


@functools.cache
def plugin_of(name: str) -> tuple[str, ...]:
    """Load the plugin that reads a format; return the names that Pillow has for it, none without a plugin."""
    try:
        if name in ("heic", "heif"):
            import pillow_heif

            pillow_heif.register_heif_opener()
        elif name == "jxl":
            import pillow_jxl  # noqa: F401  registers itself
    except ImportError:
        return ()
    return (_PLUGINS[name],) if name in _PLUGINS else ()
