"""Decode images in base64, as CN-CLIP's TSV and LMDB hold them."""

import base64

from pipeline.core.shard_format import MAX_IMAGE_BASE64_BYTES, too_large

_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_base64_image(encoded: bytes) -> bytes:
    """Return the image's bytes.

    Both alphabets are taken: CN-CLIP's code reads the URL-safe one, in which MUGE comes, and its README's
    recipe writes the standard one.

    Raises:
        ValueError: if it is not base64, or larger than an image may be.
    """
    if len(encoded) > MAX_IMAGE_BASE64_BYTES:
        raise ValueError(too_large())
    return base64.b64decode(encoded.translate(_URL_SAFE), validate=True)
