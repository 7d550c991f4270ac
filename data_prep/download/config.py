"""`[download]`: how images are asked for and how they are stored."""

import ipaddress
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Le

from pipeline.core.config import IN_DIGEST_IF_SET, NOT_IN_DIGEST
from pipeline.core.shard_format import MAX_IMAGE_PIXELS


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadConfig:
    """`[download]`: settings of img2dataset. The paper trains at 224 px and 336 px (section 2.2)."""

    short_side_px: Annotated[int, Ge(1)] = 256
    """Shorter side to which larger images are reduced, in pixels; 256 leaves room for a crop of 224."""
    jpeg_quality: Annotated[int, Ge(1), Le(100)] = 95
    """JPEG quality of images that are encoded. An upright RGB JPEG that is not larger than `short_side_px`
    keeps its bytes, without its metadata.
    """
    max_pixels: Annotated[int, Ge(1)] = MAX_IMAGE_PIXELS
    """Largest number of pixels in an image's header; above it, it is refused as a decompression bomb."""
    scaled_decode: bool = False
    """Whether JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if that still exceeds `short_side_px`. This
    is faster and changes pixels slightly; `benchmarks/data_prep/resize.py` measures both.
    """
    timeout_seconds: Annotated[float, Gt(0)] = 10.0
    """Limit for a whole request, in seconds."""
    retries: Annotated[int, Ge(0)] = 1
    """Further attempts after a failure that may be transient: a time-out, a lost connection, status 503, …"""
    retry_after_seconds: Annotated[float, Ge(0)] = field(default=10.0, metadata=NOT_IN_DIGEST)
    """Longest pause in seconds that a host gets if it asks for one with status 429 or 503 and `Retry-After`.
    If it asks for longer, the address is left for `cnclip retry`.
    """
    host_requests_per_second: Annotated[float, Ge(0)] = field(default=50.0, metadata=NOT_IN_DIGEST)
    """Most requests a second to one host, of all processes of a machine; 0 is no limit. Status 429 and 503
    halve a host's rate, and answers restore it.
    """
    host_connections: Annotated[int, Ge(0)] = field(default=32, metadata=NOT_IN_DIGEST)
    """Most connections to one host, of all processes of a machine, but at least one each; 0 is no limit."""
    host_failures: Annotated[int, Ge(0)] = field(default=10, metadata=NOT_IN_DIGEST)
    """Failures in a row (connection, time-out, TLS, status 429 or 503) after which a host is left alone for a
    minute, then for two, …; its addresses fail meanwhile and are left for `cnclip retry`. 0 is never.
    """
    robots_txt: bool = field(default=False, metadata=IN_DIGEST_IF_SET)
    """Whether cnclip reads and obeys each host's robots.txt. Off, as in img2dataset: a table's addresses are
    not found by crawling, and it costs one more request for each host.
    """
    tdm_reservation: bool = field(default=False, metadata=IN_DIGEST_IF_SET)
    """Whether images with the header `TDM-Reservation: 1` are left out. Off, as in img2dataset;
    `X-Robots-Tag` always counts.
    """
    allowed_networks: tuple[str, ...] = ()
    """Networks that may be fetched from although they are not public, such as `10.0.0.0/8`."""
    outage_share: Annotated[float, Gt(0)] = field(default=0.9, metadata=NOT_IN_DIGEST)
    """Share of a partition's addresses that fail for lack of a network (DNS, connection, time-out) at which
    the stage stops, because that is an outage rather than dead links; above 1 is off.
    """
    stall_seconds: Annotated[float, Gt(0)] = field(default=600.0, metadata=NOT_IN_DIGEST)
    """Seconds without a byte after which a worker counts as hung."""
    reuse: tuple[str, ...] = field(default=(), metadata=NOT_IN_DIGEST)
    """Folders of finished runs whose images are taken for rows that this run has in common with them."""
    processes: Annotated[int, Ge(1)] = field(default=2, metadata=NOT_IN_DIGEST)
    """Download processes."""
    threads: Annotated[int, Ge(1)] = field(default=32, metadata=NOT_IN_DIGEST)
    """Connections of each process."""

    def __post_init__(self) -> None:
        for network in self.allowed_networks:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError as error:
                raise ValueError(f"allowed_networks: {error}") from None
