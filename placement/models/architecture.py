"""The shape of a language model, read from its config.json, and how many parameters it has, exactly.

The counts follow the model classes of transformers 5 (`modeling_*.py`): which matrices a layer has, and which have a bias.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from placement.models.known_models import known_config

Kind = Literal["gpt2", "llama", "qwen2", "qwen3", "opt", "bloom"]
Group = Literal["attention", "output", "up", "down"]


class Matrix(NamedTuple):
    """A linear layer. Layers of one `group` read the same tensor."""

    name: str
    group: Group
    inputs: int
    outputs: int
    bias: bool = True

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.bias * self.outputs


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder: word embeddings, equal layers, a final norm, a head.

    Attributes:
        embedding_width: width of the word embeddings and of the head (in OPT it may be smaller than `hidden`).
        inner: width within the MLP.
        activation: the MLP's activation function, by its name in transformers.
        matrices: the linear layers of one decoder layer.
        norms: parameters of the norms of one layer.
        other_embeddings: parameters beside the word embeddings: positions, a norm, projections.
        final_norm: parameters of the norm before the head.
        tied: the head uses the word embeddings as its weights.
    """

    kind: Kind
    vocabulary: int
    hidden: int
    embedding_width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    activation: str
    matrices: tuple[Matrix, ...]
    norms: int
    other_embeddings: int
    final_norm: int
    tied: bool

    @property
    def word_embeddings(self) -> int:
        return self.vocabulary * self.embedding_width

    @property
    def embeddings(self) -> int:
        return self.word_embeddings + self.other_embeddings

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return sum(matrix.parameters for matrix in self.matrices) + self.norms

    @property
    def head(self) -> int:
        """Parameters of the head; 0 where it uses the embeddings."""
        return 0 if self.tied else self.word_embeddings

    @property
    def parameters(self) -> int:
        return self.embeddings + self.layers * self.layer + self.final_norm + self.head

    @property
    def scalar_parameters(self) -> int:
        """Parameters with a scalar head instead: a critic, a reward model (`...ForSequenceClassification`, no bias)."""
        return self.parameters - self.head + self.embedding_width

    @property
    def largest(self) -> int:
        """Elements of the largest weight tensor."""
        return max(self.word_embeddings, *(matrix.inputs * matrix.outputs for matrix in self.matrices))

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * itemsize

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """The architecture that a config.json describes.

        Raises:
            ValueError: the model type is not supported, or a number is missing; the message names it.
        """
        kind: Any = config.get("model_type")
        if kind not in _READERS:
            raise ValueError(f"model_type is {kind!r}; supported are {', '.join(_READERS)}")
        try:
            shape = cls(kind=kind, **_READERS[kind](config))
        except KeyError as missing:
            raise ValueError(f"{kind}: {missing} is missing") from None
        for name in ("vocabulary", "hidden", "embedding_width", "layers", "heads", "kv_heads", "head_size", "inner"):
            if not isinstance(value := getattr(shape, name), int) or value < 1:
                raise ValueError(f"{kind}: {name} is {value!r}; must be a whole number of at least 1")
        return shape

    @classmethod
    def of(cls, model: str | Path) -> Self:
        """The shape of a `model.path`: `preset:8b`, a folder, or a hub name that was downloaded or is among known_models.

        Raises:
            ValueError: there is no config.json of a supported model type.
        """
        name = str(model)
        if name.startswith(PRESET):
            return cls.preset(name.removeprefix(PRESET))
        if file := _config_file(name):
            return cls._of_file(file)
        if config := known_config(name):
            return cls.read(config)
        raise ValueError(
            f"{name} is neither a local folder with a config.json nor {PRESET}NAME nor a hub name with a known shape"
        )

    @classmethod
    def _of_file(cls, file: Path) -> Self:
        try:
            return cls.read(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> Self:
        """A shape of LADDER. Raises ValueError for any other name."""
        if name not in LADDER:
            raise ValueError(f"{PRESET}{name}: no such preset; there are {', '.join(LADDER)}")
        return cls.read(preset_config(name))


PRESET = "preset:"
"""Prefix of a `model.path` that names a shape of LADDER."""


def preset_config(name: str) -> dict[str, Any]:
    """The config.json of a shape of LADDER."""
    hidden, layers, heads, positions = LADDER[name]
    shape = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": positions}
    return {"model_type": "gpt2", "vocab_size": 50257} | shape


def _config_file(model: str) -> Path | None:
    """The config.json of a folder or, for a hub name, of the latest downloaded snapshot."""
    if (file := Path(model) / "config.json").is_file():
        return file
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    files = cache.glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json") if "*" not in model else ()
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


LADDER: dict[str, tuple[int, int, int, int]] = {
    "s": (768, 12, 12, 1024),
    "m": (1024, 24, 16, 1024),
    "l": (1280, 36, 20, 1024),
    "xl": (1600, 48, 25, 1024),
    "2b": (2048, 40, 16, 1024),
    "4b": (2304, 64, 16, 1024),
    **{
        f"{b}b": (4096, layers, 16, 1024)
        for b, layers in zip((6, 8, 10, 12, 15, 18), (30, 40, 50, 60, 78, 90), strict=True)
    },
    **{
        f"{b}b": (8192, layers, 16, 1024)
        for b, layers in zip((20, 24, 28, 30, 32, 36, 40), (25, 30, 35, 37, 40, 45, 50), strict=True)
    },
    "175b": (12288, 96, 96, 2048),
}
"""GPT-2 shapes of Colossal-AI's `benchmark_gpt_dummy.py`: name -> embedding, layers, heads, positions.

The original lists 30b without a shape; 37 layers come closest.
"""


def _square(hidden: int, inner: int, names: tuple[str, str, str, str]) -> tuple[Matrix, ...]:
    """Query, key and value in one matrix; output; and an MLP of two matrices."""
    qkv, output, up, down = names
    return (
        Matrix(qkv, "attention", hidden, 3 * hidden),
        Matrix(output, "output", hidden, hidden),
        Matrix(up, "up", hidden, inner),
        Matrix(down, "down", inner, hidden),
    )


def _multi_head(hidden: int, heads: int) -> dict[str, int]:
    """Attention in which each head has its own keys and values."""
    return {"heads": heads, "kv_heads": heads, "head_size": hidden // heads}


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = config["n_embd"], config["n_head"]
    inner = config.get("n_inner") or 4 * hidden
    return {
        "vocabulary": config["vocab_size"],
        "hidden": hidden,
        "embedding_width": hidden,
        "layers": config["n_layer"],
        **_multi_head(hidden, heads),
        "inner": inner,
        "activation": config.get("activation_function", "gelu_new"),
        "matrices": _square(hidden, inner, ("c_attn", "c_proj", "c_fc", "c_proj")),
        "norms": 4 * hidden,
        "other_embeddings": config["n_positions"] * hidden,
        "final_norm": 2 * hidden,
        "tied": config.get("tie_word_embeddings", True),
    }


def _bloom(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = config.get("n_embed") or config["hidden_size"], config["n_head"]
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return {
        "vocabulary": config["vocab_size"],
        "hidden": hidden,
        "embedding_width": hidden,
        "layers": config["n_layer"],
        **_multi_head(hidden, heads),
        "inner": 4 * hidden,
        "activation": "bloom_gelu",
        "matrices": _square(hidden, 4 * hidden, names),
        "norms": 4 * hidden,
        "other_embeddings": 2 * hidden,
        "final_norm": 2 * hidden,
        "tied": config.get("tie_word_embeddings", True),
    }


def _opt(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, inner, heads = config["hidden_size"], config["ffn_dim"], config["num_attention_heads"]
    width = config.get("word_embed_proj_dim") or hidden
    bias = config.get("enable_bias", True)
    norm = 2 * hidden * config.get("layer_norm_elementwise_affine", True)
    ends = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
    projections = 2 * width * hidden if width != hidden else 0
    return {
        "vocabulary": config["vocab_size"],
        "hidden": hidden,
        "embedding_width": width,
        "layers": config["num_hidden_layers"],
        **_multi_head(hidden, heads),
        "inner": inner,
        "activation": config.get("activation_function", "relu"),
        "matrices": (
            *(Matrix(f"{name}_proj", "attention", hidden, hidden, bias) for name in "qkv"),
            Matrix("out_proj", "output", hidden, hidden, bias),
            Matrix("fc1", "up", hidden, inner, bias),
            Matrix("fc2", "down", inner, hidden, bias),
        ),
        "norms": 2 * norm,
        "other_embeddings": (config["max_position_embeddings"] + 2) * hidden
        + projections,  # OPT's position table starts at 2
        "final_norm": norm if ends else 0,
        "tied": config.get("tie_word_embeddings", True),
    }


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama, Qwen2 (biases on query, key and value) and Qwen3 (a norm on each query and key)."""
    kind, hidden, inner, heads = (
        config[n] for n in ("model_type", "hidden_size", "intermediate_size", "num_attention_heads")
    )
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    bias, mlp_bias = config.get("attention_bias", False), kind == "llama" and config.get("mlp_bias", False)
    qkv_bias = kind == "qwen2" or bias
    return {
        "vocabulary": config["vocab_size"],
        "hidden": hidden,
        "embedding_width": hidden,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": size,
        "inner": inner,
        "activation": config.get("hidden_act", "silu"),
        "matrices": (
            Matrix("q_proj", "attention", hidden, heads * size, qkv_bias),
            Matrix("k_proj", "attention", hidden, kv_heads * size, qkv_bias),
            Matrix("v_proj", "attention", hidden, kv_heads * size, qkv_bias),
            Matrix("o_proj", "output", heads * size, hidden, kind != "qwen2" and bias),
            Matrix("gate_proj", "up", hidden, inner, mlp_bias),
            Matrix("up_proj", "up", hidden, inner, mlp_bias),
            Matrix("down_proj", "down", inner, hidden, mlp_bias),
        ),
        "norms": 2 * hidden + (2 * size if kind == "qwen3" else 0),
        "other_embeddings": 0,
        "final_norm": hidden,
        "tied": config.get("tie_word_embeddings", False),
    }


_READERS: dict[Any, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "opt": _opt,
    "bloom": _bloom,
}
