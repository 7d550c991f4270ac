"""Which files of a model's repository are needed, and which of them is opened.

No heavy imports here.
"""

import os
from collections.abc import Collection

from pipeline.core.files.foreign import foreign, parse_json
from pipeline.core.records import InputError
from training.weights.hub.names import WEIGHT_ENDINGS, HubId

_INDEX = ".index.json"
# In the order of preference: safetensors hold no code, pickles come last.
_WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "open_clip_model.safetensors",
    "weights.safetensors",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
    "open_clip_pytorch_model.bin",
)
# What is read next to weights: configurations (heads, activation) and vocabularies.
_BESIDE = ("config.json", "open_clip_config.json", "vocab.txt", "sentencepiece.bpe.model")
_SHOWN = 12


def choose_weights(wanted: HubId, names: Collection[str]) -> str:
    """Return the file of a repository that is opened.

    Raises:
        InputError: if the file that is asked for is not there, or none or several could be meant.
    """
    if wanted.file is not None:
        if wanted.file in names:
            return wanted.file
        raise InputError(f"{wanted}: no such file in {wanted.repo}: it holds {_listed(names)}")
    for name in _WEIGHTS:
        if name in names:
            return name
    top = sorted(name for name in names if "/" not in name and name.endswith(WEIGHT_ENDINGS))
    found = [name for name in top if name.endswith(".safetensors")] or top
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{wanted}: holds {_listed(found)}: give one of them, as in {wanted}:{found[0]}")
    raise InputError(
        f"{wanted}: holds no weights that cnclip reads (safetensors, PyTorch): it holds {_listed(names)}"
    )


def files_beside(weights: str, names: Collection[str]) -> list[str]:
    """Return the files next to the weights that are read with them."""
    folder = os.path.dirname(weights)
    return [name for file in _BESIDE if (name := os.path.join(folder, file)) in names and name != weights]


def is_index(weights: str) -> bool:
    """Return whether a file only lists the files that the weights are in."""
    return weights.endswith(_INDEX)


def parts_of(index: str, weights: str) -> list[str]:
    """Return the files that an index lists; `index` is its local path, `weights` its name in the repository.

    Raises:
        InputError: if it lists no files, or files of another folder.
    """
    with foreign(index, "index of weights"):
        with open(index, "rb") as file:
            parts = sorted(set(parse_json(file.read())["weight_map"].values()))
        if not parts or any(part != os.path.basename(part) for part in parts):
            raise ValueError("no weight_map of file names")
    return [os.path.join(os.path.dirname(weights), part) for part in parts]


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = f", … ({len(names)} in all)" if len(names) > len(shown) else ""
    return (", ".join(shown) or "nothing") + more
