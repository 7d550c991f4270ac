"""The job that each rank of a training stage receives. No heavy imports here."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from pipeline.core.config import NOT_IN_DIGEST, build
from pipeline.core.files.foreign import parse_json
from pipeline.core.records import Shard
from training.config.tracking import TrackingConfig
from training.config.train import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """Everything a rank needs, in one JSON file that the launcher writes."""

    stage: str  # its name in messages: english, stage1, stage2
    model: str  # key of training.model.config.MODELS
    seed: int  # for the order of samples, augmentation, dropout and new weights
    shards: tuple[Shard, ...]  # tars in order, each with its .parquet sidecar next to it
    vocabulary: str  # path or model id that Tokenizer.load takes
    image_weights: str | None = None  # weights of any known format for a new model's image tower
    text_weights: str | None = None  # the same for the text tower
    start_checkpoint: str | None = None  # safetensors of the previous stage
    start_weights: str | None = None  # a whole Chinese CLIP of any known format to continue from
    config: TrainConfig
    evaluations: Mapping[str, str] = field(default_factory=dict)  # name → folder, for validation
    folder: str  # checkpoints/, metrics.jsonl, log.jsonl and tokens/ go here
    output_model: str  # the consolidated weights, written last
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # where rank 0 sends its curves
    openai_model: str | None = None  # where to also write them in OpenAI CLIP's layout
    # The stage's folder if it is in an object store: checkpoints and curves are copied there.
    store_folder: str | None = field(default=None, metadata=NOT_IN_DIGEST)

    def to_json(self) -> str:
        """Return the text of a job's file, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Read a job.

        Raises:
            ConfigError: if a value is wrong; it names `where` (the file) and the key.
        """
        return build(cls, parse_json(text), where)
