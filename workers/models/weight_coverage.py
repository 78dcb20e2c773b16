"""Whether a folder's weights are exactly those of the model that is built from it.

transformers draws what a folder lacks at random, leaves out what the model does not have, and says so in a report that nobody
reads in a worker's log.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedModel

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.", "transformer.")
"""What other programs put before names: DataParallel, torch.compile, PEFT; or what they left out."""

_HEADS = re.compile(r"^(lm_head|embed_out|output)\.")
"""A language model's head, which a scalar model has no use for."""

_MASKS = re.compile(r"(^|\.)(attn|attention|self_attention)\.(masked_)?bias$")
"""Causal masks that old versions saved as if they were weights."""


def refuse_unfilled(path: str, model: PreTrainedModel, info: Mapping[str, Any], begins_head: bool) -> None:
    """Raises ValueError where weights are missing, left over, or of another shape. info: from_pretrained's loading info.

    begins_head: the scalar head may be missing where the folder has none under any name.
    """
    scalar = not model.can_generate()
    missing = set(info["missing_keys"])
    extra = {name for name in info["unexpected_keys"] if not _MASKS.search(name)}
    if scalar:
        extra = {name for name in extra if not _HEADS.match(name)}
        if begins_head and not extra:
            missing = {name for name in missing if not name.startswith("score.")}
    other = {
        name: f"{tuple(there)} in the folder, {tuple(here)} in the model"
        for name, there, here in info["mismatched_keys"]
    }
    if not (missing or extra or other):
        return
    parts = [
        f"{len(names)} {what} ({_few(names)})" for names, what in ((missing, "missing"), (extra, "unknown")) if names
    ]
    parts += [f"{name} has another shape ({shapes})" for name, shapes in sorted(other.items())[:3]]
    hint = _hint(missing, extra, scalar)
    raise ValueError(f"{path}: its weights do not fill a {type(model).__name__}: {'; '.join(parts)}{hint}")


def _few(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _hint(missing: Collection[str], extra: Collection[str], scalar: bool) -> str:
    for prefix in PREFIXES:
        if any(name.removeprefix(prefix) in missing for name in extra if name.startswith(prefix)):
            return f". The folder's names begin with {prefix!r}: save the model itself, without what was put around it"
    if scalar and any(name.startswith("score.") for name in missing):
        return ". A model that scores needs a head named `score` with one output, as one of `troupe rm` has"
    return ""
