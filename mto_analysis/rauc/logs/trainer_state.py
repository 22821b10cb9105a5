"""trainer_state.json of Hugging Face transformers: one document whose ``log_history`` mixes three kinds of entries."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.records import Log, choose_score

__all__ = ["is_trainer_state", "read_trainer_state"]


def is_trainer_state(head: bytes) -> bool:
    """Whether this is one JSON document with a history, not lines."""
    return head.lstrip()[:1] == b"{" and b'"log_history"' in head


def read_trainer_state(name: str, data: bytes, score_key: str | None) -> Log:
    """Evaluation entries of the history; ``line`` is the entry's place in it, counted from 1.

    Raises:
        DataError: If the document is cut or has no evaluation.
    """
    try:
        history: Any = json.loads(data)["log_history"]
        entries = [(place, dict(entry)) for place, entry in enumerate(history, 1)]
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno}: the JSON document is broken ({error.msg})") from error
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise DataError(f"{name}: log_history is not a list of entries") from error
    names = list(dict.fromkeys(key for _, entry in entries for key in entry))
    score = choose_score(names, score_key, name)
    found = [(entry.get("epoch"), entry[score], place) for place, entry in entries if entry.get(score) is not None]
    rows = pd.DataFrame(found, columns=["epoch", "score", "line"])
    for column in ("epoch", "score"):
        rows[column] = pd.to_numeric(rows[column], errors="coerce").astype(float)
    return Log(name, "transformers trainer state", rows, epochs_completed=True, column=score)
