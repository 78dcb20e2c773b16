"""Check that a folder's weights are exactly those of the model that is built from it.

transformers initialises missing weights at random and ignores unknown ones; it only logs this, in a worker's log.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedModel

PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "model.", "transformer.")
"""Prefixes that other programs add to names (DataParallel, torch.compile, PEFT) or remove."""

_HEADS = re.compile(r"^(lm_head|embed_out|output)\.")
"""A language model's head, which a scalar model does not have."""

_MASKS = re.compile(r"(^|\.)(attn|attention|self_attention)\.(masked_)?bias$")
"""Causal masks, which old versions of transformers saved among the weights."""


def refuse_unfilled(path: str, model: PreTrainedModel, info: Mapping[str, Any], begins_head: bool) -> None:
    """Raise ValueError where weights are missing, unknown or of another shape. info: from_pretrained's loading info.

    begins_head: the scalar head may be missing where the folder has none under any name.
    """
    scalar = not model.can_generate()
    missing = set(info["missing_keys"])
    extra = {name for name in info["unexpected_keys"] if not _MASKS.search(name)}
    if scalar:
        extra = {name for name in extra if not _HEADS.match(name)}
        if begins_head and not extra:
            missing = {name for name in missing if not name.startswith("score.")}
    mismatched = {
        name: f"{tuple(in_folder)} in the folder, {tuple(in_model)} in the model"
        for name, in_folder, in_model in info["mismatched_keys"]
    }
    if not (missing or extra or mismatched):
        return
    parts = [
        f"{len(names)} {kind} ({_few(names)})" for names, kind in ((missing, "missing"), (extra, "unknown")) if names
    ]
    parts += [f"{name} has another shape ({shapes})" for name, shapes in sorted(mismatched.items())[:3]]
    hint = _hint(missing, extra, scalar)
    raise ValueError(f"{path}: its weights do not fill a {type(model).__name__}: {'; '.join(parts)}{hint}")


def _few(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _hint(missing: Collection[str], extra: Collection[str], scalar: bool) -> str:
    for prefix in PREFIXES:
        if any(name.removeprefix(prefix) in missing for name in extra if name.startswith(prefix)):
            return f". The folder's names begin with {prefix!r}: save the model itself, without its wrapper"
    if scalar and any(name.startswith("score.") for name in missing):
        return ". A model that scores needs a head named `score` with one output, as one of `troupe rm` has"
    return ""
