"""Facts about a model from its config.json: parameters, activations, FLOPs, and the shapes of a stage's models."""

from placement.models.activations import LOGITS_CHUNK, Adapters
from placement.models.architecture import LADDER, Architecture, preset_config
from placement.models.flops import SampleFlops
from placement.models.shapes import KV_BLOCK, Shapes, read_shapes

__all__ = [
    "KV_BLOCK",
    "LADDER",
    "LOGITS_CHUNK",
    "Adapters",
    "Architecture",
    "SampleFlops",
    "Shapes",
    "preset_config",
    "read_shapes",
]
