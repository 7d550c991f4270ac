"""Names that stand for weights instead of a path: the paper's models, and ids of a hub.

No heavy imports here.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from pipeline.core import store
from pipeline.core.records import InputError
from training.model.config import MODELS

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?(?::(?P<file>\w[\w./-]*))?", re.ASCII
)
_NAME = re.compile(r"(?P<name>[\w.-]+)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
WEIGHT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
_FILE_ENDINGS = (*WEIGHT_ENDINGS, ".toml", ".txt", ".json", ".onnx")
_LIKE = 0.6  # similarity from which a name is suggested


@dataclass(frozen=True, slots=True)
class HubId:
    """A model of a hub: `owner/name`, at a branch, tag or commit, and one file of it if a file is named."""

    repo: str
    revision: str = "main"
    file: str | None = None

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a whole commit hash, which can never mean other files."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}{f':{self.file}' if self.file else ''}"


# The paper's models where their owners publish them, in Hugging Face's layout; RN50 is a file of cn_clip's.
PUBLISHED: Mapping[str, HubId] = MappingProxyType(
    {
        "RN50": HubId("OFA-Sys/chinese-clip-rn50", file="clip_cn_rn50.pt"),
        "ViT-B-16": HubId("OFA-Sys/chinese-clip-vit-base-patch16"),
        "ViT-L-14": HubId("OFA-Sys/chinese-clip-vit-large-patch14"),
        "ViT-L-14-336": HubId("OFA-Sys/chinese-clip-vit-large-patch14-336px"),
        "ViT-H-14": HubId("OFA-Sys/chinese-clip-vit-huge-patch14"),
    }
)


def is_name(text: str) -> bool:
    """Return whether a text is a published model's name, with or without a revision, and no file here."""
    found = _NAME.fullmatch(text)
    return found is not None and found["name"] in PUBLISHED and not store.exists(text)


def find_id(text: str) -> HubId | None:
    """Return the model that a text names; None if it is a path (what exists on disk always is).

    `owner/name` is a path if it ends as files of weights do, or if there is a folder `owner` here;
    `owner/name@revision` and `owner/name:file` never are.

    Raises:
        InputError: if the text is one word and neither a file nor a name, or a path that leaves its model.
    """
    if not store.is_local(text) or os.path.exists(text):
        return None
    if (name := _NAME.fullmatch(text)) is not None:
        return _by_name(text, name["name"], name["revision"])
    found = _ID.fullmatch(text)
    if found is None:
        return None
    plain = found["revision"] is None and found["file"] is None
    if (near := _same_letters(found["repo"])) is not None:
        raise InputError(f"{text}: no such file, and no owner of models: did you mean {near}?")
    if plain and (text.endswith(_FILE_ENDINGS) or os.path.isdir(text.partition("/")[0])):
        return None
    if ".." in f"{found['revision']}/{found['file']}".split("/"):
        raise InputError(f"{text}: names a file outside the model: leave out `..`")
    return HubId(found["repo"], found["revision"] or "main", found["file"])


def _by_name(text: str, name: str, revision: str | None) -> HubId | None:
    if name in PUBLISHED:
        return PUBLISHED[name] if revision is None else replace(PUBLISHED[name], revision=revision)
    if text.endswith(_FILE_ENDINGS):
        return None
    if name in MODELS:
        raise InputError(
            f"{text}: no such file or folder, and no Chinese CLIP of this size is published: give a path, or"
            f" one of {', '.join(PUBLISHED)}"
        )
    near = _same_letters(name) or next(
        iter(difflib.get_close_matches(name.lower(), [known.lower() for known in PUBLISHED], 1, _LIKE)), None
    )
    if near is not None:
        near = next(known for known in PUBLISHED if known.lower() == near.lower())
        raise InputError(f"{text}: no such file or folder, and no name of weights: did you mean {near}?")
    raise InputError(
        f"{text}: no such file or folder, and no name of weights: give a path, one of {', '.join(PUBLISHED)},"
        " or a hub's owner/name"
    )


def _same_letters(name: str) -> str | None:
    """Return the published name that differs in case and punctuation only, such as ViT-B-16 of `vit-b/16`."""
    letters = _letters(name)
    return next((known for known in PUBLISHED if _letters(known) == letters), None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
