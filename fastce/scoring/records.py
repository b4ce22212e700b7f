"""Nothing lost: the files of parts, the record of each, and what is made of them at the end.

A folder of results has

- ``plan.json``: the parts, in order, with a hash of all that each depends on;
- ``parts/NAME.KEY.npy``: the losses of a part's rows; ``parts/NAME.KEY.json``: its record, with its
  sums and the checksum of its losses, written last;
- when all records exist: ``SHARD.loss.npy`` (or ``.parquet``), the losses of each file of logits, and
  ``figures.json``.

A file appears under its name complete and on disk, or not at all. Names are the same in each attempt,
and so are the bytes: a part that is done twice, by two processes or by one that was thought dead,
changes nothing. A record is trusted if no byte of it has changed, its key is the one expected and the
losses have its checksum. So it does not matter when and how often a run is killed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.atomic import atomic_file, sync_folder
from fastce.scoring.exact import ExactSums
from fastce.scoring.figures import Figures, Input, Tally
from fastce.scoring.formats import InputError, Source
from fastce.scoring.formats.npy import NpyWriter
from fastce.scoring.shards import Part, Shard

_SCHEMA_VERSION = 1

# The names of files that are being written, and the age at which no process writes them any more.
_UNFINISHED = "*." + "[0-9a-f]" * 32 + ".part"
_ABANDONED_SECONDS = 24 * 3600


class IncompleteError(RuntimeError):
    """Some parts are not done; those that are done are safe, and another run goes on from them."""


class Folder:
    """A folder of results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = path / "parts"

    def make(self) -> None:
        """Make the folder if it is missing."""
        if not self.parts.is_dir():
            self.parts.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path)
            sync_folder(self.path.parent)

    def remove_abandoned(self) -> None:
        """Remove the half-written files that killed runs have left; live ones are younger."""
        for folder in (self.path, self.parts):
            for path in folder.glob(_UNFINISHED):
                with suppress(OSError):  # another process was faster
                    if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                        path.unlink()

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Write what is to be done."""
        _write_json(self.path / "plan.json", _sealed(plan))

    def read_plan(self) -> dict[str, Any]:
        """Return what is to be done."""
        plan = _read_sealed(self.path / "plan.json")
        if plan is None or plan.get("schema_version") != _SCHEMA_VERSION:
            raise InputError(
                f"{self.path}: expected a folder of results, got no intact plan.json; run again"
            )
        for named in (*plan["shards"], *plan["parts"]):
            if Path(named["name"]).name != named["name"]:
                raise InputError(f"{self.path / 'plan.json'}: expected names, got {named['name']!r}")
        return plan

    @contextmanager
    def losses(self, name: str) -> Iterator[Any]:
        """Open the file of a part's losses, for writing, and its checksum."""
        with atomic_file(self.parts / f"{name}.npy") as file:
            yield _Hashing(file)

    def write_record(self, name: str, record: dict[str, Any]) -> None:
        """Write the record of a part whose losses are on disk."""
        path = self.parts / f"{name}.json"
        earlier = _read_sealed(path)
        if earlier is not None and earlier != record:
            raise RuntimeError(
                f"{path}: two attempts at one part gave different results; "
                "this must not happen, please report it"
            )
        _write_json(path, _sealed(record))

    def read_record(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the record of a part if it can be trusted."""
        record = _read_sealed(self.parts / f"{name}.json")
        if record is None or record.get("key") != key:
            return None
        return record if _file_checksum(self.parts / f"{name}.npy") == record["sha256"] else None

    def part_losses(self, record: dict[str, Any]) -> NDArray[Any]:
        """Return the losses of a part, which must be those of its record."""
        path = self.parts / f"{record['name']}.npy"
        if _file_checksum(path) != record["sha256"]:
            raise IncompleteError(f"{path}: was changed since it was written; run again")
        losses: NDArray[Any] = np.load(path, allow_pickle=False)
        return losses

    def copy_part(self, record: dict[str, Any], source: Folder) -> None:
        """Take the losses and the record of a part from another folder."""
        losses = source.part_losses(record)
        with self.losses(record["name"]) as file:
            NpyWriter(file, losses.shape, losses.dtype).write(losses)
        self.write_record(record["name"], record)


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


def _file_checksum(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with a checksum of them all."""
    return {**values, "checksum": hashlib.sha256(_as_json(values)).hexdigest()}


def _read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `_sealed` was given, if no byte of the file has changed."""
    try:
        data = path.read_bytes()
        values = json.loads(data)
        del values["checksum"]
        return values if data == _as_json(_sealed(values)) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _as_json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1, allow_nan=False).encode() + b"\n"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(_as_json(values))


def make_plan(
    shards: Sequence[Shard],
    parts: Sequence[Part],
    keys: Sequence[str],
    *,
    hash_inputs: bool,
    **about: Any,
) -> dict[str, Any]:
    """Return what is to be done, as JSON values: enough to finish without the inputs."""
    sources = [source for s in shards for source in (s.logits, s.targets, s.mask) if source is not None]
    files: dict[str, dict[str, Any]] = {
        str(s.path.absolute()): {"bytes": s.n_bytes, "mtime_ns": s.mtime_ns} for s in sources
    }
    if hash_inputs:
        for path, file in files.items():
            file["sha256"] = _file_checksum(Path(path))

    def input_json(source: Source) -> dict[str, Any]:
        sha256 = files[str(source.path.absolute())].get("sha256")
        return asdict(replace(input_of(source), sha256=sha256))

    return {
        "schema_version": _SCHEMA_VERSION,
        **about,
        "files": [{"path": path, **status} for path, status in files.items()],
        "shards": [
            {
                "name": shard.name,
                "shape": list(shard.logits.shape[:-1]),
                "loss_dtype": shard.loss_dtype.name,
                "logits": input_json(shard.logits),
                "targets": input_json(shard.targets),
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


def finish(
    folder: Folder, plan: dict[str, Any], found: Sequence[dict[str, Any]], figures: Figures
) -> None:
    """Write the losses of each shard, and last the figures, from the parts and their records."""
    sync_folder(folder.parts)  # a run that was killed may not have come to it
    for i, shard in enumerate(plan["shards"]):
        path = folder.path / _losses_name(plan, shard)
        with atomic_file(path) as file:
            _write_losses(path, file, folder, plan, found, i)
    _write_json(folder.path / "figures.json", _document(plan, figures))


def _document(plan: dict[str, Any], figures: Figures) -> dict[str, Any]:
    """Return what figures.json says: without the times of the run, so that all attempts agree."""
    return figures.as_dict() | {"run": plan["by"]}


def _losses_name(plan: dict[str, Any], shard: dict[str, Any]) -> str:
    return f"{shard['name']}.loss.{plan['loss_format']}"


def _write_losses(
    path: Path,
    file: Any,
    folder: Folder,
    plan: dict[str, Any],
    found: Sequence[dict[str, Any]],
    shard: int,
) -> None:
    about = plan["shards"][shard]
    parts = zip(plan["parts"], found, strict=True)
    losses = (folder.part_losses(record) for part, record in parts if part["shard"] == shard)
    if path.suffix == ".npy":
        writer = NpyWriter(file, tuple(about["shape"]), np.dtype(about["loss_dtype"]))
        for block in losses:
            writer.write(block)
        return
    from fastce.scoring.formats.arrow import batch_writer

    with batch_writer(path, file, {"loss": (about["loss_dtype"], ())}) as write:
        for block in losses:
            write({"loss": block})


def merge(folders: Sequence[Path], out: Path) -> Figures:
    """Finish runs over shares of the parts, in one folder or several; ``out`` may be one of them.

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
    found, sources, missing = [], [], []
    for part in plan["parts"]:
        some = [(r, f) for f in given if (r := f.read_record(part["name"], part["key"])) is not None]
        if not some:
            missing.append(part["name"])
            continue
        if any(record != some[0][0] for record, _ in some):
            raise RuntimeError(f"{part['name']}: two folders have different records of this part")
        found.append(some[0][0])
        sources.append(some[0][1])
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {len(plan['parts'])} parts are missing, the first is {missing[0]}; "
            "run their shards, then merge again"
        )
    folder = Folder(out)
    folder.make()
    folder.write_plan(plan)
    for record, source in zip(found, sources, strict=True):
        if source.path.resolve() != out.resolve():
            folder.copy_part(record, source)
    figures = figures_of(plan, found)
    finish(folder, plan, found, figures)
    return figures


def verify(path: Path) -> list[str]:
    """Check every record of a folder against the files; return what is wrong.

    The losses of each part must have the record's checksum and exactly the record's sum, every part
    of the plan must be there, the losses of each shard must be those of its parts, the figures those
    of the records, and the inputs that are still there must be as they were when they were scored.

    Raises
    ------
    InputError
        If it is not a folder of results.
    """
    folder = Folder(path)
    plan = folder.read_plan()
    wrong, found = [], []
    for part in plan["parts"]:
        record = folder.read_record(part["name"], part["key"])
        if record is None:
            wrong.append(f"parts/{part['name']}: no record that agrees with its losses")
            continue
        found.append(record)
        losses = folder.part_losses(record)
        if len(losses) != part["rows"] or record["tally"]["rows"] != part["rows"]:
            wrong.append(f"parts/{part['name']}: expected {part['rows']} rows, got {len(losses)}")
        sums = ExactSums()
        sums.add(losses)
        if sums.as_json()[0] != record["tally"]["sums"]["loss"]:
            wrong.append(f"parts/{part['name']}: the losses do not have the sum of the record")
    if not wrong:
        wrong += _verify_results(folder, plan, found)
    for given in plan["files"]:
        file = Path(given["path"])
        if file.is_file():
            status = file.stat()
            same = (status.st_size, status.st_mtime_ns) == (given["bytes"], given["mtime_ns"])
            if not same or ("sha256" in given and given["sha256"] != _file_checksum(file)):
                wrong.append(f"{file}: was changed since it was scored")
    return wrong


def _verify_results(folder: Folder, plan: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    document = folder.path / "figures.json"
    if not document.is_file():
        return ["figures.json: missing; run again, or merge"]
    wrong = []
    if document.read_bytes() != _as_json(_document(plan, figures_of(plan, found))):
        wrong.append("figures.json: not what the records say")
    for i, shard in enumerate(plan["shards"]):
        name = _losses_name(plan, shard)
        with TemporaryFile() as file:
            _write_losses(folder.path / name, file, folder, plan, found, i)
            file.seek(0)
            expected = hashlib.file_digest(file, "sha256").hexdigest()
        if _file_checksum(folder.path / name) != expected:
            wrong.append(f"{name}: not the losses of its parts")
    return wrong
