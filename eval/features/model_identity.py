"""Which model features are of: a digest of its weights, kept next to the features and in their index.

Two models of one width give features that fit each other's indices and mean nothing there. So whatever writes
features writes `model.json` next to them, an index takes it over, and a query of another model is refused.
The digest is of the tensors, not of a file: the same weights in another format are the same model. Features
of images that were decoded in another way (`pipeline.core.files.images`) do not fit: other pixels were seen.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eval.features.layout import EMBEDDING_FOLDERS
from pipeline.core import store
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import InputError

if TYPE_CHECKING:  # images are decoded with OpenCV, which takes long to import
    from pipeline.core.files.images import Decode
    from training.model.clip import CLIP

_FILE = "model.json"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A model's name, the digest of its weights, and how it was shown images."""

    name: str  # of its size, such as ViT-B-16
    weights_sha256: str  # over names, shapes and float32 values of all tensors, in order of their names
    decode: str = (
        ""  # of images: upright or reference; empty for features that were made before this was kept
    )

    def __str__(self) -> str:
        return f"{self.name} {self.weights_sha256[:12]}"


def identify(model: "CLIP", decode: "Decode" = "upright") -> ModelIdentity:
    """Return the identity of a model in memory, on any device, with this decoding of images."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return ModelIdentity(model.config.name, digest.hexdigest(), decode)


def write_identity(folder: str, identity: ModelIdentity) -> None:
    """Write `model.json` into a folder of features."""
    store.write_text(store.join(folder, _FILE), json.dumps(asdict(identity), indent=1) + "\n")


def read_identity(features: str) -> ModelIdentity | None:
    """Return the model of a folder of features, or of a `.npy` file in it; None if nothing says it.

    Raises:
        InputError: for a damaged `model.json`.
    """
    folder = os.path.dirname(features) or "." if features.endswith(".npy") else features.rstrip("/")
    if os.path.basename(folder) in EMBEDDING_FOLDERS.values():
        folder = os.path.dirname(folder) or "."
    path = store.join(folder, _FILE)
    if not store.exists(path):
        return None
    try:
        identity = ModelIdentity(**parse_json(store.read_text(path)))
        if not isinstance(identity.name, str) or not isinstance(identity.weights_sha256, str):
            raise ValueError("a name and a digest are texts")
        return identity
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: does not say which model the features are of ({error})") from None


def check_same_model(what: str, found: ModelIdentity | None, wanted: ModelIdentity | None) -> None:
    """Refuse two models that are known and differ; `what` names the index or the features.

    Raises:
        InputError: for such models.
    """
    if found is None or wanted is None:
        return
    if found.weights_sha256 != wanted.weights_sha256:
        raise InputError(
            f"{what}: of the model {found}, but this is {wanted}: features of two models cannot be compared;"
            " embed and index again"
        )
    if found.decode and wanted.decode and found.decode != wanted.decode:
        raise InputError(
            f"{what}: its images were decoded as `--decode {found.decode}` does, these as `--decode"
            f" {wanted.decode}`: odd files have other features; embed and index again"
        )
