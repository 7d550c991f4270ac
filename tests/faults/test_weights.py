"""Weights with random damage are read, or refused in one line."""

import io
import json
import pickletools
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_safetensors

from tests.faults.fuzzing import COUNTS, Case, fuzz, outcome_of
from tests.helpers.mutations import mutate
from training.model.clip import CLIP
from training.model.config import MODELS
from training.weights.convert import inspect
from training.weights.formats import load_model
from training.weights.layouts import to_hugging_face
from training.weights.torchscript import write_torchscript
from training.weights.weights import METADATA_KEY, header_of, state_for_file

torch.set_num_threads(1)
_OPCODES = [ord(opcode.code) for opcode in pickletools.opcodes]


@cache
def seeds() -> dict[str, dict[str, bytes]]:
    """Kind → file name → bytes of small whole weights."""
    import tempfile

    torch.manual_seed(0)
    model = CLIP(MODELS["tiny-vit"]).eval()
    state = {name: tensor.half() for name, tensor in state_for_file(model).items()}
    payload = {"epoch": 3, "name": "tiny-vit", "state_dict": {f"module.{k}": v for k, v in state.items()}}
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(payload, new)
    torch.save(payload, old, _use_new_zipfile_serialization=False)
    with tempfile.TemporaryDirectory() as folder:
        write_torchscript(f"{folder}/a.pt", {k: v for k, v in state.items() if "bert" not in k}, {})
        script = Path(folder, "a.pt").read_bytes()
    vision, text = model.config.vision, model.config.text
    config = {
        "model_type": "chinese_clip",
        "vision_config": {"num_attention_heads": getattr(vision, "heads", 0)},
        "text_config": {"num_attention_heads": text.heads},
    }
    shapes = {name: tensor.shape for name, tensor in state.items()}
    zero_model, zero_optimizer = io.BytesIO(), io.BytesIO()
    flat = torch.cat([tensor.float().reshape(-1) for tensor in state.values()])
    torch.save({"module": state, "param_shapes": [shapes]}, zero_model)
    parts = {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [flat]}
    torch.save({"optimizer_state_dict": parts}, zero_optimizer)
    return {
        "torch": {"model.pt": new.getvalue()},
        "old": {"model.pt": old.getvalue()},
        "script": {"model.pt": script},
        "safetensors": {
            "model.safetensors": save_safetensors(state, {METADATA_KEY: header_of(model.config, {})})
        },
        "hugging_face": {
            "model.safetensors": save_safetensors(to_hugging_face(state)),
            "config.json": json.dumps(config).encode(),
        },
        "deepspeed": {
            "latest": b"step1",
            "step1/mp_rank_00_model_states.pt": zero_model.getvalue(),
            "step1/zero_pp_rank_0_mp_rank_00_optim_states.pt": zero_optimizer.getvalue(),
        },
    }


def damaged(case: Case) -> Path:
    """A file or folder of weights with damage in one of its files: in its bytes, or only in its pickle."""
    kind, files = list(seeds().items())[case.number % len(seeds())]
    victim = case.rng.choice(list(files))
    root = case.folder / kind
    for name, data in files.items():
        if name == victim:
            in_pickle = data.startswith(b"PK") and case.rng.random() < 0.6
            data = _mutate_pickle(data, case) if in_pickle else mutate(data, case.rng)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root if len(files) > 1 else root / victim


def _mutate_pickle(data: bytes, case: Case) -> bytes:
    """The zip with a pickle that is damaged, and a checksum that says nothing of it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            body = source.read(name)
            archive.writestr(name, _mutate_opcodes(body, case) if name.endswith("data.pkl") else body)
    return target.getvalue()


def _mutate_opcodes(body: bytes, case: Case) -> bytes:
    if case.rng.random() < 0.5:
        return mutate(body, case.rng)
    changed = bytearray(body)
    for _ in range(case.rng.randint(1, 3)):
        changed[case.rng.randrange(len(changed))] = case.rng.choice(_OPCODES)
    return bytes(changed)


def judge(case: Case) -> str:
    path = damaged(case)
    seen = outcome_of(lambda: inspect(str(path)), path)
    loaded = outcome_of(lambda: load_model(str(path)), path)
    assert (seen, loaded) != ("refused", "read")
    return loaded


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_weights_are_read_or_refused(count: int) -> None:
    found = fuzz(judge, count)
    assert found["refused"] > count // 4
    assert found["read"] > 0
