"""Chinese CLIP from Python: models, corpora, captions, evaluation, search and whole runs.

    import cnclip

    model = cnclip.load("clip_cn_vit-b-16.pt")
    images = model.embed_images(["cat.jpg", "dog.jpg"])
    texts = model.embed_texts(["一只猫", "一只狗"])
    print(model.similarity(images, texts))

`__all__` is the complete stable API; docs/guides/python-api.md shows it with outputs. Heavy modules are
imported on first use, so `import cnclip` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cnclip import own_packages

own_packages.import_from_here()

if TYPE_CHECKING:
    from cnclip import rules
    from cnclip.captions import Filtered, filter_captions
    from cnclip.corpus import Corpus
    from cnclip.evaluation import evaluate
    from cnclip.index import Index
    from cnclip.model import Classification, Model, load, score
    from cnclip.runs import FinishedRun, run
    from pipeline.core.records import ConfigError, InputError

__all__ = [
    "Classification",
    "ConfigError",
    "Corpus",
    "Filtered",
    "FinishedRun",
    "Index",
    "InputError",
    "Model",
    "evaluate",
    "filter_captions",
    "load",
    "rules",
    "run",
    "score",
]

_HOMES = {
    "Classification": "cnclip.model",
    "ConfigError": "pipeline.core.records",
    "Corpus": "cnclip.corpus",
    "Filtered": "cnclip.captions",
    "FinishedRun": "cnclip.runs",
    "Index": "cnclip.index",
    "InputError": "pipeline.core.records",
    "Model": "cnclip.model",
    "evaluate": "cnclip.evaluation",
    "filter_captions": "cnclip.captions",
    "load": "cnclip.model",
    "run": "cnclip.runs",
    "score": "cnclip.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name == "rules":
        return importlib.import_module("cnclip.rules")
    if name == "__version__":
        from importlib.metadata import version

        return version("cnclip-pretraining")
    if name not in _HOMES:
        raise AttributeError(f"module 'cnclip' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion in notebooks."""
    return [*__all__, "__version__"]
