"""Gates: conditions on figures that make a run fail, such as ``ppl>12``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

_SHORT = {
    "ppl": "perplexity",
    "nll": "mean_nll",
    "bpt": "bits_per_token",
    "bpb": "bits_per_byte",
    "accuracy": "top_k_accuracy.1",
    "kld": "kl.mean.value",
    "kld_mean": "kl.mean.value",
    "kld_max": "kl.maximum",
    "same_top": "same_top.value",
    "ppl_ratio": "perplexity.ratio.value",
}
_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


class Gate(NamedTuple):
    """A condition under which a run fails."""

    text: str
    path: list[str]  #: to the figure, in the figures as JSON
    fails: Callable[[float, float], bool]
    limit: float


def parse_gates(texts: Sequence[str], names: Collection[str]) -> list[Gate]:
    """Read conditions such as ``ppl>12``, over figures of these names.

    Raises
    ------
    ValueError
        If one is not a condition, or names no figure.
    """
    gates = []
    for text in texts:
        found = re.fullmatch(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            if found is None:
                raise ValueError(text)
            limit = float(found[3])
        except ValueError:
            raise ValueError(f"fail_if: expected a condition such as 'ppl>12', got {text!r}") from None
        name = found[1]
        path = (name if name in names else _SHORT.get(name, name)).split(".")
        if path[0] not in names:
            raise ValueError(
                f"fail_if: expected a figure out of {', '.join(sorted(names))}, or in short "
                f"{', '.join(_SHORT)}; got {name!r}"
            )
        gates.append(Gate(text.strip(), path, _COMPARISONS[found[2]], limit))
    return gates


def failed(gates: Sequence[Gate], figures: Mapping[str, Any]) -> list[str]:
    """Return what to say of each gate that fails; a figure that is no number fails every gate."""
    said = []
    for gate in gates:
        value: Any = figures
        for step in gate.path:
            value = value.get(step) if isinstance(value, Mapping) else None
        name = ".".join(gate.path)
        if not isinstance(value, (int, float)):
            said.append(f"{gate.text}: {name} is not a number here")
        elif gate.fails(value, gate.limit):
            said.append(f"{gate.text}: {name} = {value:.6g}")
    return said
