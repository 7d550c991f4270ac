"""Inspects the inputs of a new run: caption tables, images, evaluation sets, the machine."""

import io
import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.request import urlopen

from pipeline.core.evaluation_sets import SUFFIXES, EvaluationSource, check_size, shard_stems
from pipeline.core.records import InputError

if TYPE_CHECKING:
    import polars as pl

    from data_prep.sources.readers.source import PackedKind
    from data_prep.sources.text_rows import ListCaptions

_SAMPLED_ROWS = 1000  # for recognising columns and addresses
_SAMPLED_IMAGES = 50
_MOST = 0.5  # share of a column's values that determines its role
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_URL = re.compile(r"https?://", re.IGNORECASE)
_IMAGE_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
# Common folders of images, below the table's folder.
_IMAGE_FOLDERS = ("images", "pictures", "imgs", "photos", "图片", "")


@dataclass(frozen=True, slots=True)
class Data:
    """The contents of the caption tables."""

    path: str  # as given: a file or a pattern
    url_column: str
    caption_column: str
    are_known: bool  # whether a run finds both columns without settings
    num_rows: int
    num_usable: int  # rows with an address and a caption within the bounds
    fewest_characters: int  # bounds of the middle 90% of captions, or the paper's
    most_characters: int
    images: str | None  # folder of the images; None: the addresses are URLs
    shortest_side_px: int | None  # of a sample of those images
    default_characters: tuple[int, int]  # default bounds of a run, the paper's
    default_side_px: int  # default of the smallest shorter side
    kind: str | None = None  # of a source whose images are on disk in one of the ecosystem's formats
    settings: Mapping[str, str] = field(default_factory=dict)  # of its source, besides the columns of tables
    captions_per_image: float = 1.0


@dataclass(frozen=True, slots=True)
class Machine:
    """The resources of this machine."""

    cores: int
    gpus: int


def look_at_machine() -> Machine:
    """Return the cores that this process may use and the NVIDIA devices, without loading torch."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    devices = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)]
    return Machine(cores, len(devices))


def evaluation_sets(folder: str) -> list[EvaluationSource]:
    """Return the sets in a folder: every NAME_imgs.tsv with NAME_texts.jsonl, or the folder's shards.

    Raises:
        InputError: if the folder has no set, or a set is too small to be scored.
    """
    if not os.path.isdir(folder):
        raise InputError(f"--evaluation {folder}: no such folder")
    names = sorted(
        name.removesuffix(SUFFIXES[0]) for name in os.listdir(folder) if name.endswith(SUFFIXES[0])
    )
    names = [name for name in names if os.path.isfile(os.path.join(folder, name + SUFFIXES[1]))]
    if not names and shard_stems(folder):
        names = [Path(folder).resolve().name]
    if not names:
        raise InputError(
            f"--evaluation {folder}: holds no evaluation set: needs NAME_imgs.tsv and NAME_texts.jsonl"
            " (docs/guides/your-data.md), or shards"
        )
    sets = [EvaluationSource(name=name, folder=folder) for name in names]
    for item in sets:
        check_size(item)
    return sets


def look_at_data(
    path: str,
    images: str | None,
    *,
    url_column: str | None = None,
    caption_column: str | None = None,
    list_captions: "ListCaptions | None" = None,
) -> Data:
    """Read the caption tables once, or a part of a source that brings its images; return what they hold.

    `images` is the folder of the paths in the address column; if None, it is searched for near the table.
    `list_captions` says what lists of captions become; if None, a row for each.

    Raises:
        InputError: if a table, the column of addresses or captions, or the images are missing.
    """
    from data_prep.filters.image import FilterImageConfig
    from data_prep.filters.text import FilterTextConfig
    from data_prep.sources.readers.recognise import recognise
    from data_prep.sources.table import KNOWN_COLUMNS, TableSource, find_files, first_column

    if (kind := recognise(path)) is not None:
        if wrong := "--images" if images else "--url-column" if url_column else None:
            raise InputError(
                f"{wrong}: {path} is read with kind = {kind!r}, which has its images: leave it out"
            )
        return look_at_source(path, kind, caption_column, list_captions)
    try:
        files = find_files(TableSource(path=path, name="data"))
    except InputError:
        if os.path.isdir(path):
            raise InputError(
                f"--data {path}: a folder without captions; give the table of the captions, and this folder"
                " to --images"
            ) from None
        raise InputError(f"--data {path}: no such file or folder") from None
    names, sample = _sample(files[0])
    known = {role: first_column(names, KNOWN_COLUMNS[role]) for role in ("url_column", "caption_column")}
    url = _column(path, names, "url", url_column, known["url_column"], _like_addresses(sample))
    caption = _column(
        path, names, "caption", caption_column, known["caption_column"], _like_captions(sample, url)
    )
    addresses = [str(value) for value in sample[url] if value]
    are_urls = sum(bool(_URL.match(address)) for address in addresses) > _MOST * len(addresses)
    if are_urls and images:
        raise InputError(f"--images {images}: column {url!r} of {path} holds URLs: leave --images out")
    folder = None if are_urls else _image_folder(path, files[0], addresses, images)
    paper = FilterTextConfig()
    if list_captions is None and _are_lists(files[0], url, caption, sample[caption]):
        list_captions = "each"
    num_rows, lengths = _count(files, url, caption, list_captions)
    if not sum(lengths.values()):
        raise InputError(
            f"{path}: no row has both {url!r} and {caption!r}; name them: --url-column, --caption-column"
        )
    fewest, most = _bounds(lengths, paper.min_characters, paper.max_characters)
    return Data(
        path=path,
        url_column=url,
        caption_column=caption,
        are_known=(url, caption) == (known["url_column"], known["caption_column"]),
        num_rows=num_rows,
        num_usable=sum(count for length, count in lengths.items() if fewest <= length <= most),
        fewest_characters=fewest,
        most_characters=most,
        images=folder,
        shortest_side_px=None if folder is None else _shortest_side(folder, addresses),
        default_characters=(paper.min_characters, paper.max_characters),
        default_side_px=FilterImageConfig().min_side_px,
        settings={} if list_captions is None else {"list_captions": list_captions},
        captions_per_image=_captions_per_image(files[0], url, caption, list_captions),
    )


def look_at_source(
    path: str,
    kind: "PackedKind",
    caption_column: str | None = None,
    list_captions: "ListCaptions | None" = None,
) -> Data:
    """Read the first piece of a source that brings its images; it estimates the others from it.

    Raises:
        InputError: if the source cannot be read.
    """
    import polars as pl

    from data_prep.filters.image import FilterImageConfig
    from data_prep.filters.text import FilterTextConfig
    from data_prep.sources import packed
    from data_prep.sources.readers.source import PackedSource
    from data_prep.sources.regions import Places

    def source(settings: Mapping[str, Any]) -> PackedSource:
        try:
            return PackedSource(kind=kind, path=path, name="data", **settings)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None

    given = {"caption_column": caption_column, "list_captions": list_captions}
    settings = {key: value for key, value in given.items() if value is not None}
    pieces = packed.pieces(source(settings))
    if kind == "huggingface" and caption_column is None and (likely := _likely_caption(pieces[0][0])):
        settings["caption_column"] = likely
    with tempfile.TemporaryDirectory() as place:
        to = Places(*(os.path.join(place, name) for name in ("table", "malformed", "drops", "copies")))
        try:
            found = packed.unpack(source(settings), pieces[0], to)
        except InputError as error:
            if "list_captions =" not in str(error):
                raise
            settings["list_captions"] = "each"
            found = packed.unpack(source(settings), pieces[0], to)
        rows = pl.read_parquet(to.table)
        side_px = _shortest_side_packed(path, found.source.picture_folder, rows, place)
    lengths = Counter(rows["caption"].str.len_chars().drop_nulls().to_list())
    if not lengths:
        raise InputError(f"{pieces[0][0]}: no row has both an image and a caption")
    paper = FilterTextConfig()
    fewest, most = _bounds(lengths, paper.min_characters, paper.max_characters)
    num_usable = sum(count for length, count in lengths.items() if fewest <= length <= most)
    return Data(
        path=path,
        url_column="url",
        caption_column="caption",
        are_known=True,
        num_rows=(found.num_rows + sum(found.dropped.values())) * len(pieces),
        num_usable=num_usable * len(pieces),
        fewest_characters=fewest,
        most_characters=most,
        images=None,
        shortest_side_px=side_px,
        default_characters=(paper.min_characters, paper.max_characters),
        default_side_px=FilterImageConfig().min_side_px,
        kind=kind,
        settings=settings,
        captions_per_image=rows.height / max(1, rows["url"].n_unique()),
    )


def _likely_caption(file: str) -> str | None:
    """Return the column of a Parquet table of images whose texts are Chinese, unless its name tells."""
    import polars as pl

    from data_prep.sources.readers.columns import CAPTIONS, is_caption
    from data_prep.sources.readers.tables import read_schema

    if not file.endswith(".parquet"):
        return None
    names = [name for field in read_schema(file) if is_caption(field.type) for name in [field.name]]
    if any(name.lower() in CAPTIONS for name in names):
        return None
    rows = pl.scan_parquet(file).select(names).head(_SAMPLED_ROWS).collect()
    return _like_captions({name: rows[name].to_list() for name in names}, "")


def _shortest_side_packed(path: str, folder: str | None, rows: "pl.DataFrame", copies: str) -> int | None:
    """Return the shortest side of a sample of a source's images, wherever they lie."""
    from data_prep.sources.local_server import HOST, serve
    from data_prep.sources.readers.places import served_folder

    sample = rows.head(_SAMPLED_IMAGES)
    if folder is not None:
        return _shortest_side(folder, sample["url"].to_list())
    with serve(None, {}, {"data": served_folder(path)}, {"data": copies}) as site:
        asked = [place.replace(f"http://{HOST}", site) for place in sample["picture_at"]]
        files = [io.BytesIO(urlopen(address).read()) for address in asked]
    return _shortest_of(files)


def _sample(file: str) -> tuple[list[str], dict[str, list[object]]]:
    """Return a table's columns and the first values of each."""
    from data_prep.sources import text_file
    from data_prep.sources.table import naming_damage, open_parquet

    if text_file.is_text(file):
        names = text_file.column_names(file)
        first = next(iter(text_file.read_batches(file, names)), None)
        rows = None if first is None else first.rows.head(_SAMPLED_ROWS)
    else:
        frame = open_parquet(file)
        with naming_damage(file):
            names = frame.collect_schema().names()
            rows = frame.head(_SAMPLED_ROWS).collect()
    if rows is None or not rows.height:
        raise InputError(f"{file}: holds no rows")
    return names, {name: rows[name].to_list() for name in names}


def _are_lists(file: str, url: str, caption: str, sample: Sequence[object]) -> bool:
    """Return whether captions are lists of texts, as JSON or as a column of Parquet."""
    from data_prep.sources import text_file
    from data_prep.sources.text_rows import TextLayout

    if not text_file.is_text(file):
        return any(isinstance(value, list) for value in sample)
    try:
        next(iter(text_file.read_batches(file, (url, caption), TextLayout(url=url, caption=caption))), None)
    except InputError as error:
        if "list_captions =" not in str(error):
            raise
        return True
    return False


def _read(
    file: str, url: str, caption: str, list_captions: "ListCaptions | None"
) -> "Iterator[pl.LazyFrame]":
    """Yield addresses and captions of a table; of a list that keeps all captions, the first."""
    from data_prep.sources import text_file
    from data_prep.sources.list_columns import with_one_caption
    from data_prep.sources.table import open_parquet
    from data_prep.sources.text_rows import TextLayout

    how = "first" if list_captions == "random" else list_captions
    if text_file.is_text(file):
        layout = TextLayout(url=url, caption=caption, list_captions=how)
        for batch in text_file.read_batches(file, (url, caption), layout):
            yield batch.rows.lazy()
    else:
        yield with_one_caption(open_parquet(file), caption, how)


def _captions_per_image(file: str, url: str, caption: str, list_captions: "ListCaptions | None") -> float:
    """Return the mean number of rows an image, of a table's first rows."""
    from pipeline.core.files.columns import column

    first = next(_read(file, url, caption, list_captions))
    counted = first.head(_SAMPLED_ROWS).select(column(url).n_unique().alias("images"), rows=column(url).len())
    images, rows = counted.collect().row(0)
    return float(rows / max(1, images))


def _count(
    files: Sequence[str], url: str, caption: str, list_captions: "ListCaptions | None"
) -> tuple[int, Counter[int]]:
    """Return the number of rows, and for rows with an address: characters of the caption → rows."""
    import polars as pl

    from data_prep.sources.table import naming_damage
    from pipeline.core.files.columns import column

    def counted(rows: pl.LazyFrame) -> pl.LazyFrame:
        length = pl.when(column(url).is_not_null()).then(
            column(caption).cast(pl.String, strict=False).str.len_chars()
        )
        return rows.group_by(length.alias("length")).len("rows")

    num_rows, lengths = 0, Counter[int]()
    for file in files:
        with naming_damage(file):
            for part in _read(file, url, caption, list_captions):
                for length, rows in counted(part).collect(engine="streaming").iter_rows():
                    num_rows += rows
                    if length is not None:
                        lengths[length] += rows
    return num_rows, lengths


def _column(
    path: str, names: Sequence[str], what: str, given: str | None, known: str | None, likely: str | None
) -> str:
    found = given or known or likely
    if found is None or found not in names:
        wrong = f"no column {given!r}" if given else f"no column looks like that of {what}s"
        raise InputError(f"{path}: {wrong}; found {', '.join(names)}: name it with --{what}-column")
    return found


def _like_addresses(sample: dict[str, list[object]]) -> str | None:
    """Return the first column most of whose values are URLs or names of images."""
    texts = {name: values for name, values in sample.items() if not any(isinstance(v, list) for v in values)}
    return _first_like(texts, lambda text: bool(_URL.match(text) or _IMAGE_NAME.search(text)))


def _like_captions(sample: dict[str, list[object]], url: str) -> str | None:
    """Return the first other column most of whose values, or their first items, have Chinese characters."""
    others = {name: values for name, values in sample.items() if name != url}
    return _first_like(others, lambda text: bool(_CHINESE.search(text)))


def _first_like(sample: dict[str, list[object]], is_like: Callable[[str], bool]) -> str | None:
    for name, values in sample.items():
        firsts = [value[0] if isinstance(value, list) and value else value for value in values]
        texts = [value for value in firsts if isinstance(value, str) and value]
        if texts and sum(map(is_like, texts)) > _MOST * len(texts):
            return name
    return None


def _image_folder(path: str, file: str, addresses: Sequence[str], given: str | None) -> str:
    """Return the folder of the addresses."""
    beside = os.path.dirname(file)
    candidates = [given] if given else [os.path.join(beside, name) for name in _IMAGE_FOLDERS]
    for folder in candidates:
        if any(os.path.isfile(os.path.join(folder, address)) for address in addresses):
            return folder.rstrip("/") or "."
    example = addresses[0] if addresses else "no address"
    if given:
        raise InputError(f"--images {given}: holds none of the paths in {path}, such as {example}")
    raise InputError(
        f"{path}: its addresses are paths, such as {example}: name the folder that they lie in with --images"
    )


def _shortest_side(folder: str, addresses: Sequence[str]) -> int | None:
    """Return the shortest side, in pixels, of the first readable images, or None."""
    return _shortest_of(os.path.join(folder, name) for name in itertools.islice(addresses, _SAMPLED_IMAGES))


def _shortest_of(files: Iterable[str | IO[bytes]]) -> int | None:
    from PIL import Image, UnidentifiedImageError

    sides = []
    for file in files:
        try:
            with Image.open(file) as image:  # reads the header only
                sides.append(min(image.size))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            continue  # the run will drop it with a reason
    return min(sides, default=None)


def _bounds(lengths: dict[int, int], fewest: int, most: int) -> tuple[int, int]:
    """Return the paper's bounds on characters, each relaxed if it would drop over a tenth of the captions."""
    total = sum(lengths.values())
    short = sum(count for length, count in lengths.items() if length < fewest)
    long = sum(count for length, count in lengths.items() if length > most)
    if short > total / 10:
        fewest = 1
    if long > total / 10:
        reached = 0
        for length in sorted(lengths):
            reached += lengths[length]
            most = length
            if reached >= 0.95 * total:
                break
    return fewest, most
