"""What every test module starts from."""

import signal
from collections.abc import Iterator

import pytest

# Files that take the longest, in `make test` or in `make test-slow`, begin first: two workers share the rest
# evenly then.
_LONGEST = (
    "tests/test_run.py", "tests/training/test_pretrain.py", "tests/training/engine/test_zero.py",
    "tests/pipeline/test_finetune.py", "tests/data_prep/download/test_download.py",
    "tests/training/ranks/test_preemption.py", "tests/cnclip/test_api.py", "tests/training/test_tracking.py",
    "tests/training/ranks/test_watch.py", "tests/training/checkpoint/test_selection.py",
    "tests/training/data/test_statements.py", "tests/training/data/test_feature_cache.py",
    "tests/training/weights/test_export.py", "tests/training/losses/test_contrastive.py",
    "tests/training/engine/test_teacher.py", "tests/docs/test_page_commands.py",
    "tests/pipeline/launch/test_requeue.py", "tests/pipeline/tools/test_new_run.py",
    "tests/faults/test_state_files.py", "tests/faults/test_weights.py",
    "tests/training/model/test_full_size.py", "tests/faults/test_store_faults.py",
    "tests/pipeline/executors/test_ray.py", "tests/faults/test_orphans.py", "tests/faults/test_indices.py",
)  # fmt: skip


# A shell has what it starts in the background ignore Ctrl-C, and so what that starts; tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; within a file the order stays."""
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(_LONGEST)))


@pytest.fixture(autouse=True, scope="module")
def registered_models() -> Iterator[None]:
    """Forget the model sizes that a module's tests added: messages of later ones list all that are known."""
    from training.model.config import MODELS

    before = dict(MODELS)
    yield
    MODELS.clear()
    MODELS.update(before)
