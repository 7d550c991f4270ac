"""The encoder's former place, kept for one release: use `training.encoder`."""

from training.encoder import Encoder, load

__all__ = ["Encoder", "load"]
