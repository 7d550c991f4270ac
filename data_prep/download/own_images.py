"""Decides which rows may fetch images from the run's own server, and builds their addresses there.

The server gives out files from the user's disk, so the downloader refuses its addresses if they come from a
table or a redirect. Only this module, which knows each row's source, adds the token that the server requires:
for rows of a table with an image folder and of packed sources, for their own files, and for rows of a
generated corpus, for its site.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import polars as pl

from data_prep import corpus_facts
from data_prep.sources.local_server import HOST, IMAGES, PACKED, UNPACKED, local_site, serve
from data_prep.sources.readers.source import IMAGE_AT
from pipeline.core.stage import Context


@dataclass(frozen=True, slots=True)
class OwnImages:
    """The run's own server, if it has one, and what each source may request from it."""

    site: str | None = None  # prefix of its addresses: http://127.0.0.1:PORT/TOKEN
    # Source → prefix of the addresses of its images, in `url` and in `picture_at`.
    by_url: dict[str, str] = field(default_factory=dict)
    by_place: dict[str, str] = field(default_factory=dict)
    by_copy: dict[str, str] = field(default_factory=dict)  # as by_place, of images that the run has a copy of

    def address(self, columns: Sequence[str]) -> pl.Expr:
        """Return the address that each row's image is fetched from."""
        url = self._own(pl.col("url"), self.by_url).fill_null(pl.col("url"))
        if IMAGE_AT not in columns:
            return url
        places = (self._own(pl.col(IMAGE_AT), prefixes) for prefixes in (self.by_place, self.by_copy))
        return pl.coalesce(*places, url)

    def _own(self, address: pl.Expr, prefixes: dict[str, str]) -> pl.Expr:
        """Return the server's address of a file that the row's source owns; null for all others."""
        if self.site is None or not prefixes:
            return pl.lit(None, dtype=pl.String)
        prefix = pl.col("source").replace_strict(prefixes, default=None, return_dtype=pl.String)
        rest = address.str.strip_prefix(f"http://{HOST}")
        return pl.when(address.str.starts_with(prefix)).then(pl.lit(self.site) + rest)


@contextlib.contextmanager
def served(context: Context) -> Iterator[OwnImages]:
    """Serve the corpus's own images on loopback, if it has any, for the duration of a `with` block."""
    site, images = corpus_facts.site_folder(context), corpus_facts.image_folders(context)
    packed, unpacked = corpus_facts.packed_folders(context), corpus_facts.unpacked_folders(context)
    if site is None and not images and not packed:
        yield OwnImages()
        return
    by_url = {name: f"http://{HOST}/{IMAGES}/{name}/" for name in images}
    if site is not None:
        tables = corpus_facts.tables_of(context.parents["corpus"])
        by_url |= {table.place.source.name: f"http://{HOST}/" for table in tables}
    by_place = {name: f"http://{HOST}/{PACKED}/{quote(name)}/" for name in packed}
    by_copy = {name: f"http://{HOST}/{UNPACKED}/{quote(name)}/" for name in unpacked}
    with contextlib.ExitStack() as stack:
        folder = None if site is None else stack.enter_context(local_site(site))
        address = stack.enter_context(serve(folder, images, packed, unpacked))
        yield OwnImages(address, by_url, by_place, by_copy)
