"""Decode images in base64, as CN-CLIP's TSV and LMDB hold them."""

import base64

_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_base64_image(encoded: bytes) -> bytes:
    """The image's bytes; ValueError where it is not base64.

    Both alphabets are taken: CN-CLIP's code reads the URL-safe one, in which MUGE comes, and its README's
    recipe writes the standard one.
    """
    return base64.b64decode(encoded.translate(_URL_SAFE), validate=True)
