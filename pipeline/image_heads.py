"""Loads classifiers of image features: ONNX, or the tensors of linear layers; runs no code of a file.

`data_prep.features.classify` may not import what reads weights, so `pipeline.catalog` passes it these.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.core import store
from pipeline.core.arrays import Float32Array
from pipeline.core.files.foreign import foreign
from pipeline.core.records import InputError

_ROWS_AT_ONCE = 65_536


class HeadSettings(Protocol):
    """A `[[classifier]]` (`data_prep.features.classify.Head`); hashable."""

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def activation(self) -> Literal["none", "relu", "gelu"]: ...
    @property
    def output(self) -> Literal["raw", "sigmoid", "softmax"]: ...
    @property
    def index(self) -> int: ...


def identify(head: HeadSettings) -> str:
    """Return the digest of a head's weights.

    Raises:
        InputError: if the file is missing.
    """
    if not store.exists(head.weights):
        raise InputError(f"{head.weights}: no such file; correct [[classifier]] weights of {head.name}")
    return store.digest_file(head.weights)


@functools.lru_cache(maxsize=16)  # one process classifies many tables
def load(head: HeadSettings) -> Callable[[Float32Array], Float32Array]:
    """Load a head into memory; it computes on the CPU."""
    made = OnnxHead(head) if head.weights.endswith(".onnx") else LinearHead(head)
    return functools.partial(_scores, head, made)


def _scores(head: HeadSettings, made: Any, feature_ND: Float32Array) -> Float32Array:
    from scipy.special import expit, softmax

    found = []
    for start in range(0, len(feature_ND), _ROWS_AT_ONCE):
        part_ND = feature_ND[start : start + _ROWS_AT_ONCE]
        given = np.asarray(made(part_ND), np.float32)
        if given.size == 0 or given.size % len(part_ND) or len(given) != len(part_ND):
            raise InputError(
                f"{head.weights}: gives numbers of shape {list(given.shape)} for {len(part_ND)} features; a"
                " classifier gives one row of numbers for each"
            )
        found.append(given.reshape(len(part_ND), -1))
    given_NC = np.concatenate(found)
    if head.index >= given_NC.shape[1]:
        raise InputError(
            f"{head.weights}: gives {given_NC.shape[1]} numbers for an image; correct [[classifier]] index ="
            f" {head.index}"
        )
    if head.output == "sigmoid":
        given_NC = expit(given_NC)
    elif head.output == "softmax":
        given_NC = softmax(given_NC, axis=1)
    score_N: Float32Array = given_NC[:, head.index]
    return score_N


class LinearHead:
    """Linear layers in the order of their names, such as LAION's aesthetic predictors have them."""

    def __init__(self, head: HeadSettings) -> None:
        from training.weights.tensor_files import read_tensors

        self._head = head
        tensors = {
            name: np.asarray(tensor.float().numpy())
            for name, tensor in read_tensors(head.weights).tensors.items()
        }
        names = sorted((name for name in tensors if _is_weight(name)), key=_natural)
        self._layers = [(tensors.pop(name), tensors.pop(_bias_of(name), None)) for name in names]
        if tensors or any(weight.ndim != 2 for weight, _ in self._layers) or not self._layers:
            other = next(iter(tensors), None) or next(iter(names), "no weight")
            raise InputError(
                f"{head.weights}: not only linear layers: it holds {other}; convert classifier {head.name}"
                " to ONNX"
            )
        for (before, _), (after, _) in zip(self._layers, self._layers[1:], strict=False):
            if before.shape[0] != after.shape[1]:
                raise InputError(
                    f"{head.weights}: a layer gives {before.shape[0]} numbers, and the next one takes"
                    f" {after.shape[1]}; convert classifier {head.name} to ONNX"
                )

    def __call__(self, feature_ND: Float32Array) -> Float32Array:
        _check_dim(self._head, feature_ND, self._layers[0][0].shape[1])
        value_NC = feature_ND
        for number, (weight_CD, bias_C) in enumerate(self._layers):
            if number:
                value_NC = _activated(value_NC, self._head.activation)
            value_NC = value_NC @ weight_CD.T
            if bias_C is not None:
                value_NC = value_NC + bias_C
        return value_NC


def _is_weight(name: str) -> bool:
    return name == "weight" or name.endswith(".weight")


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key by which layers.10 comes after layers.2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _activated(value_NC: Float32Array, activation: str) -> Float32Array:
    from scipy.special import ndtr

    if activation == "relu":
        return np.maximum(value_NC, 0)
    if activation == "gelu":
        activated: Float32Array = value_NC * ndtr(value_NC)
        return activated
    return value_NC


def _check_dim(head: HeadSettings, feature_ND: Float32Array, wanted: int) -> None:
    if feature_ND.shape[1] != wanted:
        raise InputError(
            f"{head.weights}: classifier {head.name} takes {wanted} numbers, but a feature of"
            f" [image_features] has {feature_ND.shape[1]}; give the encoder that it was trained with"
        )


class OnnxHead:
    """An ONNX model from features [N, dim] to numbers [N] or [N, classes]."""

    def __init__(self, head: HeadSettings) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise InputError(
                f'{head.weights}: needs onnxruntime: pip install "cnclip-pretraining[onnx]"'
            ) from None
        self._head = head
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # tasks run next to each other
        with foreign(head.weights, "ONNX model", "export it again"):
            try:
                self._session = onnxruntime.InferenceSession(
                    store.read_bytes(head.weights), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime has a class for each kind, without a common one
                said = str(error).splitlines()[0]
                raise InputError(f"{head.weights}: no ONNX model that runs here: {said}") from None
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 2 or inputs[0].type != "tensor(float)":
            found = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
            raise InputError(f"{head.weights}: takes {found}; a classifier takes one float tensor [N, dim]")
        self._input = inputs[0]

    def __call__(self, feature_ND: Float32Array) -> Any:
        rows, dim = self._input.shape
        if isinstance(dim, int):
            _check_dim(self._head, feature_ND, dim)
        if not isinstance(rows, int):
            return self._session.run(None, {self._input.name: feature_ND})[0]
        # Exported for a fixed number of rows: the last piece is filled up.
        parts = []
        for start in range(0, len(feature_ND), rows):
            piece = feature_ND[start : start + rows]
            full = np.zeros((rows, piece.shape[1]), np.float32)
            full[: len(piece)] = piece
            parts.append(self._session.run(None, {self._input.name: full})[0][: len(piece)])
        return np.concatenate(parts)
