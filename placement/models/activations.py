"""Bytes that a forward pass keeps for the backward pass, counted tensor by tensor.

The tensors that autograd saves were read in the model classes of transformers 5 with `sdpa` attention (BLOOM: its own), dropout
off and padded micro-batches: these have a mask, and key-value heads are copied for their query heads (a single one is not). A
tensor that two operations save counts once. Below, `size` is the bytes of an element of the model's type.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.models.architecture import Architecture, Group

LOGITS_CHUNK = 256
"""Tokens whose logits exist at the same time."""

FLOAT32 = 4


@dataclass(frozen=True)
class Adapters:
    """LoRA: rank, and the names of the matrices with adapters (None: all). dora: with a magnitude for each output."""

    rank: int
    targets: frozenset[str] | None = None
    dora: bool = False

    def on(self, name: str) -> bool:
        return self.targets is None or name in self.targets

    def parameters(self, shape: Architecture) -> int:
        """Two matrices beside each target, of rank x inputs and outputs x rank (Hu et al. 2021, section 4.1)."""
        targets = [m for m in shape.matrices if self.on(m.name)]
        return shape.layers * sum(self.rank * (m.inputs + m.outputs) + self.dora * m.outputs for m in targets)


def saved_bytes(
    shape: Architecture, size: int, tokens: int, length: int, adapters: Adapters | None, checkpointing: bool
) -> int:
    """Bytes kept by a training pass over `tokens` tokens in rows of `length`.

    With gradient checkpointing each layer keeps only its input, and one layer at a time is recomputed.
    """
    layer = layer_saved_bytes(shape, size, length, adapters)
    norms = 2 if shape.kind == "bloom" else 1  # BLOOM also has one after its embeddings
    ends = norms * norm_saved_bytes(shape, shape.hidden, size, adapters is None)
    ends += shape.embedding_width * size + length  # the head's input, and the mask as booleans
    if checkpointing:
        return tokens * (shape.layers * shape.hidden * size + layer + ends)
    return tokens * (shape.layers * layer + ends)


def inference_bytes(shape: Architecture, size: int, tokens: int, length: int) -> int:
    """Peak bytes of a pass without gradients: less than one layer of a training pass keeps."""
    return tokens * (layer_saved_bytes(shape, size, length, None) + shape.hidden * size + length)


def logits_bytes(shape: Architecture, tokens: int) -> int:
    """Bytes of two float32 chunks: the logits, and the intermediate result of logsumexp or entropy (`HeadLogProbs`)."""
    return 2 * min(tokens, LOGITS_CHUNK) * shape.vocabulary * FLOAT32


def layer_saved_bytes(shape: Architecture, size: int, length: int, adapters: Adapters | None) -> int:
    """Bytes of one layer for each token of rows of `length`. adapters: None where all weights are trained."""
    width = shape.heads * shape.head_size
    total = 2 * norm_saved_bytes(shape, shape.hidden, size, adapters is None)
    if shape.kind == "qwen3":  # norms on queries and keys
        total += norm_saved_bytes(shape, width, size, adapters is None)
        total += norm_saved_bytes(shape, shape.kv_heads * shape.head_size, size, adapters is None)
    total += _attention_bytes(shape, size, length) + _mlp_elements(shape) * size
    inputs: dict[Group, int] = {"attention": shape.hidden, "up": shape.hidden, "output": 0, "down": shape.inner}
    if shape.kind == "bloom":
        inputs["output"] = width  # elsewhere attention has saved it already
    if shape.activation == "relu":
        inputs["down"] = 0  # relu has saved it already
    read = {m.group for m in shape.matrices if adapters is None or adapters.on(m.name)}
    total += size * sum(inputs[group] for group in read)
    if adapters:
        total += size * adapters.rank * sum(adapters.on(m.name) for m in shape.matrices)
    return total


def norm_saved_bytes(shape: Architecture, width: int, size: int, trained: bool) -> int:
    """RMSNorm saves its input in float32, the inverse root, and the weight's factor. LayerNorm: its input, mean, deviation."""
    if shape.kind in ("llama", "qwen2", "qwen3"):
        return FLOAT32 * (width + 1) + size * width * trained
    return size * width + 2 * FLOAT32


def _attention_bytes(shape: Architecture, size: int, length: int) -> int:
    """Queries, keys, values. sdpa: also its output, a float32 per head, the mask in the model's type. BLOOM: all weights."""
    width = shape.heads * shape.head_size
    if shape.kind == "bloom":
        weights = FLOAT32 + (size if size != FLOAT32 else 0)  # the softmax is taken in float32
        return 3 * width * size + shape.heads * length * weights
    keys = shape.head_size if shape.kv_heads == 1 else width
    return 2 * (width + keys) * size + shape.heads * FLOAT32 + length * size


def _mlp_elements(shape: Architecture) -> int:
    """Elements that the activation function saves.

    Gated: gate, its activation, up. gelu_new: its input, half of it, tanh, and 1 + tanh. Others: one tensor.
    """
    if shape.kind in ("llama", "qwen2", "qwen3"):
        return 3 * shape.inner
    return 4 * shape.inner if shape.activation == "gelu_new" else shape.inner
