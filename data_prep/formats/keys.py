"""The keys of rows and the digests of addresses."""

import polars as pl
import polars_hash as plh

KEY_HEX_DIGITS = 32  # 128 bits: no collision to be expected among billions of rows
_URL_HASH_HEX_DIGITS = 16
_SEPARATOR = "\u0000"


def with_key(frame: pl.LazyFrame, normalise: bool = False) -> pl.LazyFrame:
    """Add the column `key` to a table with url and caption: the start of the sha256 of both, 32 hex digits.

    Sorting by it shuffles the corpus once, the same way on any number of machines, and brings exact
    duplicates together; with `normalise` also pairs that differ only in the caption's width, case, white
    space and punctuation or in the address's scheme and fragment.
    """
    url, caption = pl.col("url").fill_null(""), pl.col("caption").fill_null("")
    if normalise:
        url = url.str.replace(r"^(?i)https?://(www\.)?", "").str.replace(r"#.*$", "")
        plain = caption.str.normalize("NFKC").str.to_lowercase().str.replace_all(r"[\p{P}\p{Z}\p{C}]", "")
        caption = pl.when(plain == "").then(caption).otherwise(plain)  # "！！" and "？？" stay two captions
    pair = pl.concat_str([url, caption], separator=_SEPARATOR)
    return (
        frame.with_columns(_pair=pair)
        .with_columns(key=plh.col("_pair").chash.sha2_256().str.slice(0, KEY_HEX_DIGITS))
        .drop("_pair")
    )


def url_hash(name: str = "url") -> pl.Expr:
    """Return the digest of a URL as drop tables keep it, 16 hex digits."""
    hashed: pl.Expr = plh.col(name).chash.sha2_256().str.slice(0, _URL_HASH_HEX_DIGITS)
    return hashed
