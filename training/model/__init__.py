"""The two-tower model: sizes, towers, tokenizer, image preprocessing, and weights in and out."""

from training.model import torchvision_ops

torchvision_ops.install()
