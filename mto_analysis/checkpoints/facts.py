"""Plain facts that lie around the weights: a trainer's arguments or config, a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError

__all__ = ["count", "hf_config", "number", "section", "whole"]


def section(facts: Any, *path: str) -> Mapping[str, Any]:
    """A mapping inside mappings; empty where something on the way is missing.

    Example:
        >>> section({"DATA": {"IMG_SIZE": 192}}, "DATA")
        {'IMG_SIZE': 192}
    """
    for name in path:
        facts = facts.get(name) if isinstance(facts, Mapping) else None
    return facts if isinstance(facts, Mapping) else {}


def whole(facts: Mapping[str, Any], name: str) -> int | None:
    """A positive whole number, or ``None`` where there is no such fact."""
    value = facts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def count(facts: Mapping[str, Any], name: str) -> int | None:
    """A positive whole number of a ``config.json``, or ``None`` where it is not named.

    Raises:
        CheckpointError: If it is something else.
    """
    if facts.get(name) is None:
        return None
    if (value := whole(facts, name)) is None:
        raise CheckpointError(f"config.json: {name} must be a positive whole number, got {facts[name]!r}")
    return value


def number(facts: Mapping[str, Any], name: str, default: float) -> float:
    """A number, or the default where there is no such fact.

    Raises:
        CheckpointError: If it is something else.
    """
    value = facts.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"the file's {name} must be a number, got {value!r}")
    return float(value)


def hf_config(raw: RawCheckpoint) -> Mapping[str, Any]:
    """The ``config.json`` of a Hugging Face folder.

    Raises:
        CheckpointError: If there is none, or it asks for another activation than GELU.
    """
    if raw.config is None:
        raise CheckpointError("needs its config.json beside it; give the whole folder")
    if (activation := raw.config.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"config.json: hidden_act must be gelu, got {activation!r}")
    return raw.config
