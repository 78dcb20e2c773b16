"""Bytes that a forward pass leaves for the backward pass, counted tensor by tensor.

What autograd keeps was read in the model classes of transformers 5 with attention by `sdpa` (BLOOM: its own), dropout off, and
micro-batches that are padded: then a mask is given, and key-value heads are copied for their query heads (a single one is not). A
tensor that two operations keep counts once. Below, `size` is the bytes of an element of the model's type.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.models.architecture import Architecture, Group

LOGITS_CHUNK = 256
"""Tokens whose logits exist at one time."""

FLOAT32 = 4


@dataclass(frozen=True)
class Adapters:
    """LoRA: rank, and the names of the matrices that have one (none: all). dora: with a length for each output."""

    rank: int
    targets: frozenset[str] | None = None
    dora: bool = False

    def on(self, name: str) -> bool:
        return self.targets is None or name in self.targets

    def parameters(self, shape: Architecture) -> int:
        """Two matrices beside each target, of rank x inputs and outputs x rank (Hu et al. 2021, section 4.1)."""
        found = [m for m in shape.matrices if self.on(m.name)]
        return shape.layers * sum(self.rank * (m.inputs + m.outputs) + self.dora * m.outputs for m in found)


def saved(
    shape: Architecture, size: int, tokens: int, length: int, adapters: Adapters | None, checkpointing: bool
) -> int:
    """Bytes kept by a training pass over `tokens` tokens in rows of `length`.

    With gradient checkpointing each layer keeps its input alone, and one layer at a time is computed again.
    """
    layer = layer_saved(shape, size, length, adapters)
    norms = 2 if shape.kind == "bloom" else 1  # BLOOM has one after its embeddings too
    ends = norms * norm_saved(shape, shape.hidden, size, adapters is None)
    ends += shape.embedding_width * size + length  # what the head reads, and the mask as booleans
    if checkpointing:
        return tokens * (shape.layers * shape.hidden * size + layer + ends)
    return tokens * (shape.layers * layer + ends)


def passing(shape: Architecture, size: int, tokens: int, length: int) -> int:
    """Bytes at the widest point of a pass without gradients: less than one layer of a training pass keeps."""
    return tokens * (layer_saved(shape, size, length, None) + shape.hidden * size + length)


def logits(shape: Architecture, tokens: int) -> int:
    """Two float32 chunks: the logits, and what logsumexp or the entropy makes of them (`HeadLogProbs`)."""
    return 2 * min(tokens, LOGITS_CHUNK) * shape.vocabulary * FLOAT32


def layer_saved(shape: Architecture, size: int, length: int, adapters: Adapters | None) -> int:
    """Bytes of one layer for each token of rows of `length`. adapters: none where all weights learn."""
    width = shape.heads * shape.head_size
    total = 2 * norm_saved(shape, shape.hidden, size, adapters is None)
    if shape.kind == "qwen3":  # norms on queries and keys
        total += norm_saved(shape, width, size, adapters is None)
        total += norm_saved(shape, shape.kv_heads * shape.head_size, size, adapters is None)
    total += _attention(shape, size, length) + _mlp(shape) * size
    inputs: dict[Group, int] = {"attention": shape.hidden, "up": shape.hidden, "output": 0, "down": shape.inner}
    if shape.kind == "bloom":
        inputs["output"] = width  # elsewhere it is what attention has kept
    if shape.activation == "relu":
        inputs["down"] = 0  # what relu has kept
    read = {m.group for m in shape.matrices if adapters is None or adapters.on(m.name)}
    total += size * sum(inputs[group] for group in read)
    if adapters:
        total += size * adapters.rank * sum(adapters.on(m.name) for m in shape.matrices)
    return total


def norm_saved(shape: Architecture, width: int, size: int, learns: bool) -> int:
    """RMSNorm: its input in float32, the inverse root, and what the weight multiplies. LayerNorm: its input, mean, deviation."""
    if shape.kind in ("llama", "qwen2", "qwen3"):
        return FLOAT32 * (width + 1) + size * width * learns
    return size * width + 2 * FLOAT32


def _attention(shape: Architecture, size: int, length: int) -> int:
    """Queries, keys, values. sdpa: its output, a float32 per head, and the mask in the model's type. BLOOM: all weights."""
    width = shape.heads * shape.head_size
    if shape.kind == "bloom":
        weights = FLOAT32 + (size if size != FLOAT32 else 0)  # the softmax is taken in float32
        return 3 * width * size + shape.heads * length * weights
    keys = shape.head_size if shape.kv_heads == 1 else width
    return 2 * (width + keys) * size + shape.heads * FLOAT32 + length * size


def _mlp(shape: Architecture) -> int:
    """Elements that the activation keeps.

    Gated: gate, its activation, up. gelu_new: its input, the half of it, tanh, and 1 + tanh. Others: one tensor.
    """
    if shape.kind in ("llama", "qwen2", "qwen3"):
        return 3 * shape.inner
    return 4 * shape.inner if shape.activation == "gelu_new" else shape.inner
