"""The file of a run: one JSON object that holds every sample, written after each one, so that an
interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = "treespec-bench"
VERSION = 1
OWN_ACCEPTANCE = "the models' own"
# Settings that may differ between the sittings of one run.
_FREE_SETTINGS = ("minutes",)


class ResultsError(ValueError):
    """A results file that cannot be used; the message names it and says why."""


def load(path: Path) -> dict[str, Any]:
    """The record in a results file.

    Raises:
        ResultsError: if it cannot be read, is no record of this command, or has another version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise ResultsError(f"{str(path)!r} is not JSON") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ResultsError(f"{str(path)!r} is not a results file of `treespec bench`")
    if record.get("version") != VERSION:
        raise ResultsError(
            f"{str(path)!r} has schema version {record.get('version')!r}; this treespec reads "
            f"version {VERSION}: measure again, or use the treespec that wrote it"
        )
    return record


def load_finished(path: Path) -> dict[str, Any]:
    """The record of a run that came to its end.

    Raises:
        ResultsError: as `load`; also for a run that is unfinished or found a differing text.
    """
    record = load(path)
    if record["failure"]:
        raise ResultsError(f"{str(path)!r} holds no times: {record['failure']}")
    if not record["finished"]:
        raise ResultsError(
            f"{str(path)!r} is unfinished, {len(record['samples'])} samples so far: go on with "
            f"treespec bench {record['kind']} --resume {path}"
        )
    return record


def load_unfinished(path: Path, kind: str) -> dict[str, Any]:
    """The record of a run that can be gone on with.

    Raises:
        ResultsError: as `load`; also for a run that is finished, found a differing text, or is of
            another kind.
    """
    record = load(path)
    if record["failure"]:
        raise ResultsError(
            f"{str(path)!r} records a run that failed ({record['failure']}): name another file"
        )
    if record["finished"]:
        raise ResultsError(f"{str(path)!r} holds a finished run: name another file")
    if record["kind"] != kind:
        raise ResultsError(f"{str(path)!r} holds a {record['kind']} run, not a {kind} run")
    return record


def save(path: Path, record: dict[str, Any]) -> None:
    """Writes a record so that the file is always a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class RunFile:
    """A run under way and its file.

    Args:
        path: where the record is kept.
        record: its contents.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self._done = {(sample["method"], sample["task"]) for sample in record["samples"]}

    @classmethod
    def open(cls, path: Path, kind: str, settings: dict, about: dict) -> RunFile:
        """A new run, or the unfinished one of the same settings that `path` holds.

        Args:
            path: of the results file.
            kind: "reference" or "suite".
            settings: what defines the run.
            about: `environment`, `models` and `acceptance`.

        Raises:
            ResultsError: as `load_unfinished`; also for a run of other settings, or one measured on
                another machine or by other versions.
        """
        if not path.exists():
            record: dict[str, Any] = {"schema": SCHEMA, "version": VERSION, "kind": kind}
            record |= {"settings": settings, **about, "methods": [], "not_run": {}, "tasks": []}
            record |= {"samples": [], "failure": None, "finished": False, "stopped_by": None}
            record |= {"oracle": {}, "sittings": 0, "elapsed_s": 0.0, "rows": []}
            return cls(path, record)
        record = load_unfinished(path, kind)
        _same(path, "setting", record["settings"], settings, _FREE_SETTINGS)
        _same(path, "environment", record["environment"], about["environment"], ())
        record["settings"] = settings
        return cls(path, record)

    def has(self, method: str, task: str) -> bool:
        """Whether a sample is there already."""
        return (method, task) in self._done

    def add(self, sample: dict[str, Any]) -> None:
        """Keeps a sample, on disk at once."""
        self.record["samples"].append(sample)
        self._done.add((sample["method"], sample["task"]))
        self.save()

    def drop(self, method: str, tasks: set[str], label: str, reason: str) -> None:
        """Takes a method out of some tasks, `label` saying which; a row must not stand on a part of
        them."""
        self.record["not_run"][method + label] = reason
        self.record["samples"] = [
            sample
            for sample in self.record["samples"]
            if sample["method"] != method or sample["task"] not in tasks
        ]
        self.save()

    def fail(self, reason: str) -> None:
        """Ends the run without any time."""
        self.record |= {"failure": reason, "samples": [], "rows": []}
        self.save()

    def finish(self, rows: list[dict], stopped_by: str | None) -> None:
        """Ends the run with its rows; texts and paths were kept only to go on."""
        self.record |= {"rows": rows, "finished": True, "stopped_by": stopped_by, "oracle": {}}
        names = {role: self.record["models"][role] for role in ("target", "draft")}
        self.record["settings"] = {**self.record["settings"], **names}
        self.save()

    def save(self) -> None:
        save(self.path, self.record)


def _same(path: Path, what: str, there: dict, here: dict, free: tuple[str, ...]) -> None:
    for key in sorted({*there, *here} - set(free)):
        if there.get(key) != here.get(key):
            raise ResultsError(
                f"{str(path)!r} holds a run with another {what}: {key} is {there.get(key)!r} "
                f"there and {here.get(key)!r} here; name another file"
            )


def environment() -> dict[str, Any]:
    """Where figures come from: processor, GPU and driver, threads, versions and commit."""
    import torch

    from treespec import environment as treespec_environment

    devices = treespec_environment.devices()
    gpu = devices[1] if len(devices) > 1 else None
    return {
        "platform": platform.system(),
        "cpu": devices[0]["name"],
        "cores": devices[0]["cores"],
        "capability": devices[0]["capability"],
        "threads": torch.get_num_threads(),
        "gpu": gpu["name"] if gpu else None,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "versions": {**treespec_environment.versions(), **_more_versions()},
        "commit": _commit(),
    }


def _more_versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"scikit-learn": version("scikit-learn")}
    except PackageNotFoundError:
        return {"scikit-learn": None}


def _commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "setup.py").is_file():
        return None
    commit = _first_line("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = _first_line(
        "git", "-C", str(root), "status", "--porcelain", "-uno", "--", "treespec", "kernels"
    )
    return f"{commit}+" if commit and changed else commit


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
