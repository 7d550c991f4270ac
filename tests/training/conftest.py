"""Makes timm and torchvision importable, whatever a test imports first."""

import torch

import training.model  # noqa: F401

torch.set_num_threads(1)  # small tensors: more threads only wait for each other
