"""What every test module starts from."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def registered_models() -> Iterator[None]:
    """Forget the model sizes that a module's tests added: messages of later ones list all that are known."""
    from training.model.config import MODELS

    before = dict(MODELS)
    yield
    MODELS.clear()
    MODELS.update(before)
