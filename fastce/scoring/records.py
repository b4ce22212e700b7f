"""Nothing lost: the files of parts, the record of each, and what is made of them at the end.

A folder of results has

- ``plan.json``: the parts, in order, with a hash of all that each depends on;
- ``parts/NAME.KEY.npy``: the losses of a part's rows; ``parts/NAME.KEY.json``: its record, with its
  sums and the checksum of its losses, written last;
- when all records exist: ``SHARD.loss.npy``, the losses of each file of logits, and ``figures.json``.

A file appears under its name complete and on disk, or not at all. Names are the same in each attempt,
and so are the bytes: a part that is done twice, by two processes or by one that was thought dead,
changes nothing. A record is trusted if its key is the one expected and the losses have its checksum.
So it does not matter when and how often a run is killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.atomic import atomic_file
from fastce.scoring.exact import ExactSums
from fastce.scoring.figures import Figures, Input, Tally
from fastce.scoring.formats import InputError, Source
from fastce.scoring.formats.npy import NpyWriter
from fastce.scoring.shards import Part

_SCHEMA_VERSION = 1


class IncompleteError(RuntimeError):
    """Some parts are not done; those that are done are safe, and another run goes on from them."""


class Folder:
    """A folder of results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = path / "parts"

    def make(self) -> None:
        """Make the folder if it is missing."""
        self.parts.mkdir(parents=True, exist_ok=True)

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Write what is to be done."""
        _write_json(self.path / "plan.json", plan)

    def read_plan(self) -> dict[str, Any]:
        """Return what is to be done."""
        plan = _read_json(self.path / "plan.json")
        if plan is None or plan.get("schema_version") != _SCHEMA_VERSION:
            raise InputError(f"{self.path}: expected a folder of results, got no readable plan.json")
        return plan

    @contextmanager
    def losses(self, name: str) -> Any:
        """Open the file of a part's losses, for writing, and its checksum."""
        with atomic_file(self.parts / f"{name}.npy") as file:
            yield _Hashing(file)

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Write the record of a part whose losses are on disk."""
        earlier = _read_json(self.parts / f"{name}.json")
        if earlier is not None and earlier != record:
            raise RuntimeError(
                f"{self.parts / name}: two attempts at one part gave different results; "
                "this must not happen, please report it"
            )
        _write_json(self.parts / f"{name}.json", record, indent=None)

    def read_record(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the record of a part if it can be trusted."""
        record = _read_json(self.parts / f"{name}.json")
        if record is None or record.get("key") != key:
            return None
        return record if self._checksum(name) == record.get("sha256") else None

    def _checksum(self, name: str) -> str | None:
        try:
            with (self.parts / f"{name}.npy").open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None

    def part_losses(self, name: str) -> NDArray[Any]:
        """Return the losses of a part."""
        losses: NDArray[Any] = np.load(self.parts / f"{name}.npy", allow_pickle=False)
        return losses


class _Hashing:
    """A file that is written and hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def hexdigest(self) -> str:
        """Return the checksum of what was written."""
        return self._hash.hexdigest()


def _write_json(path: Path, values: dict[str, Any], indent: int | None = 1) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(values, indent=indent, allow_nan=False).encode() + b"\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def make_plan(parts: Sequence[Part], keys: Sequence[str], **about: Any) -> dict[str, Any]:
    """Return what is to be done, as JSON values: enough to finish without the inputs."""
    shards = list(dict.fromkeys(part.shard for part in parts))
    return {
        "schema_version": _SCHEMA_VERSION,
        **about,
        "shards": [
            {
                "name": shard.name,
                "shape": list(shard.logits.shape[:-1]),
                "loss_dtype": shard.loss_dtype.name,
                "logits": asdict(input_of(shard.logits)),
                "targets": asdict(input_of(shard.targets)),
            }
            for shard in shards
        ],
        "parts": [
            {
                "name": f"{part.name}.{key[:12]}",
                "key": key,
                "shard": shards.index(part.shard),
                "rows": part.n_rows,
            }
            for part, key in zip(parts, keys, strict=True)
        ],
    }


def input_of(source: Source) -> Input:
    """Return what figures say of an array that was read."""
    return Input(source.label, source.shape, source.dtype_name, source.n_bytes)


def figures_of(plan: dict[str, Any], records: Iterable[dict[str, Any]]) -> Figures:
    """Return the figures of parts, from their records."""
    tally = Tally(plan["options"]["top_k"], plan["options"]["n_bins"])
    for record in records:
        tally.merge(Tally.from_json(record["tally"]))
    return replace(
        tally.figures(n_bytes=plan["n_bytes"], n_words=plan["n_words"]),
        logits=_inputs(plan, "logits"),
        targets=_inputs(plan, "targets"),
        options=plan["options"],
        warnings=tuple(plan["warnings"]),
    )


def _inputs(plan: dict[str, Any], what: str) -> tuple[Input, ...]:
    unique = {json.dumps(shard[what]): shard[what] for shard in plan["shards"]}
    return tuple(Input(**{**values, "shape": tuple(values["shape"])}) for values in unique.values())


def finish(folder: Folder, plan: dict[str, Any], figures: Figures, sources: Sequence[Folder]) -> None:
    """Write the losses of each shard, and last the figures; ``sources`` have the parts' files."""
    for i, shard in enumerate(plan["shards"]):
        with atomic_file(folder.path / f"{shard['name']}.loss.npy") as file:
            writer = NpyWriter(file, tuple(shard["shape"]), np.dtype(shard["loss_dtype"]))
            for part, source in zip(plan["parts"], sources, strict=True):
                if part["shard"] == i:
                    writer.write(source.part_losses(part["name"]))
    # Without the times of the run: every attempt leaves the same bytes.
    _write_json(folder.path / "figures.json", figures.as_dict() | {"run": plan["by"]})


def merge(folders: Sequence[Path], out: Path) -> Figures:
    """Finish runs over shares of the parts, in one folder or several.

    Raises
    ------
    InputError
        If a folder holds no plan, or another plan than the first.
    IncompleteError
        If parts are missing.
    """
    given = [Folder(path) for path in folders]
    plan = given[0].read_plan()
    for other in given[1:]:
        if other.read_plan() != plan:
            raise InputError(
                f"{other.path}: expected a run over the same files with the same options as "
                f"{given[0].path}, got another plan.json"
            )
    records, sources, missing = [], [], []
    for part in plan["parts"]:
        found = [(r, f) for f in given if (r := f.read_record(part["name"], part["key"])) is not None]
        if not found:
            missing.append(part["name"])
            continue
        if any(record != found[0][0] for record, _ in found):
            raise RuntimeError(f"{part['name']}: two folders have different records of this part")
        records.append(found[0][0])
        sources.append(found[0][1])
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {len(plan['parts'])} parts are missing, the first is {missing[0]}; "
            "run their shards, then merge again"
        )
    folder = Folder(out)
    folder.make()
    folder.write_plan(plan)
    figures = figures_of(plan, records)
    finish(folder, plan, figures, sources)
    return figures


def verify(path: Path) -> list[str]:
    """Check every record of a folder against the files; return what is wrong.

    The losses of each part must have the record's checksum and exactly the record's sum, every part
    of the plan must be there, the losses of each shard must be those of its parts, the figures those
    of the records, and the inputs still of the size that was scored.

    Raises
    ------
    InputError
        If it is not a folder of results.
    """
    folder = Folder(path)
    plan = folder.read_plan()
    wrong, records = [], []
    for part in plan["parts"]:
        record = folder.read_record(part["name"], part["key"])
        if record is None:
            wrong.append(f"parts/{part['name']}: no record that agrees with its losses")
            continue
        records.append(record)
        losses = folder.part_losses(part["name"])
        if len(losses) != part["rows"] or record["tally"]["rows"] != part["rows"]:
            wrong.append(f"parts/{part['name']}: expected {part['rows']} rows, got {len(losses)}")
        sums = ExactSums()
        sums.add(losses)
        if sums.as_json()[0] != record["tally"]["sums"]["loss"]:
            wrong.append(f"parts/{part['name']}: the losses do not have the sum of the record")
    if not wrong:
        wrong += _verify_results(folder, plan, records)
    for shard in plan["shards"]:
        for what in ("logits", "targets"):
            source = Path(shard[what]["path"].partition("::")[0])
            if source.is_file() and source.stat().st_size != shard[what]["bytes"]:
                wrong.append(f"{source}: was changed since it was scored")
    return wrong


def _verify_results(folder: Folder, plan: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    document = _read_json(folder.path / "figures.json")
    if document is None:
        return ["figures.json: missing; run again, or merge"]
    wrong = []
    expected = figures_of(plan, records).as_dict() | {"run": plan["by"]}
    if document != json.loads(json.dumps(expected)):
        wrong.append("figures.json: not what the records say")
    for i, shard in enumerate(plan["shards"]):
        losses = [folder.part_losses(part["name"]) for part in plan["parts"] if part["shard"] == i] or [
            np.empty(0, shard["loss_dtype"])
        ]
        name = f"{shard['name']}.loss.npy"
        try:
            whole = np.load(folder.path / name, allow_pickle=False)
        except (OSError, ValueError) as error:
            wrong.append(f"{name}: cannot be read: {error}")
            continue
        parts = np.concatenate(losses).tobytes()
        if whole.shape != tuple(shard["shape"]) or whole.tobytes() != parts:
            wrong.append(f"{name}: not the losses of its parts")
    return wrong
