"""Where a dataset made of studies lies on disk: what is shared, and beside it what leads back to the patients."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from medseg.errors import DatasetError, OutputError
from medseg.io import save
from medseg.io.files import written_whole
from medseg.io.leftovers import is_leftover, sweep
from medseg.io.text import read_json
from medseg.study.cohort import Entry
from medseg.study.ledger import Ledger, add_rows, key_in, own_folder, state
from medseg.study.rules import DatasetRules
from medseg.volume import Volume

ENDING = ".nii.gz"

UNDER_WAY = "under_way"
"""The reason in the record of a study whose files are being written; it stays where that is cut off."""


@dataclass(frozen=True)
class CaseOutcome:
    """What became of a study: "taken", "refused" or "failed", with reason and text; all of it goes into no shared file.

    `structures` are the labels that were drawn, `untaken` the names of structures that no rule took, `group` the keyed
    hash of the patient. `kept` says that an earlier run did it.
    """

    case: str
    status: str
    reason: str | None = None
    text: str | None = None
    structures: tuple[str, ...] = ()
    untaken: tuple[str, ...] = ()
    group: str = ""
    warnings: tuple[str, ...] = ()
    registrations: tuple[dict[str, Any], ...] = ()
    kept: bool = False


class _Record(BaseModel):
    """What became of a study, as its file has it: the outcome, and what it was made of."""

    case: str
    status: str
    reason: str | None
    text: str | None
    structures: list[str]
    untaken: list[str]
    group: str
    warnings: list[str]
    registrations: list[dict[str, Any]]
    rules: str
    state: str
    bytes: dict[str, int]


@dataclass(frozen=True)
class DatasetFolder:
    """The training folder, and what lies beside it for its owner alone."""

    out: Path
    private: Path
    key: bytes
    rules: DatasetRules

    @classmethod
    def open(cls, out: str | PathLike[str], rules: DatasetRules) -> DatasetFolder:
        """Return the folder, made where it is none yet; cases that other rules made are removed. Raises OutputError."""
        folder = Path(out).resolve()
        private = folder.with_name(f"{folder.name}.private")
        try:
            for part in (folder / "images", folder / "labels"):
                part.mkdir(parents=True, exist_ok=True)
            own_folder(private)
            (private / "cases").mkdir(exist_ok=True)
            for part in (folder, folder / "images", folder / "labels", private, private / "cases"):
                sweep(part)
            opened = cls(folder, private, key_in(private / "key"), rules)
            for file in opened.record_files():
                record = _read_record(file)
                if record is None or record["rules"] != rules.digest or record["reason"] == UNDER_WAY:
                    opened.remove(file.stem)
        except OSError as error:
            raise OutputError(
                f"The dataset cannot be written: {error.strerror or 'its key is damaged'}. Check that its folder may "
                "be written to and has space left.",
                path=folder,
            ) from error
        return opened

    def name(self, what: str) -> str:
        """Return the keyed hash of a UID, path or ID."""
        return Ledger(self.out, self.key).name(what)

    def record_files(self) -> list[Path]:
        """Return the files of records, one for each study that was looked at, in this run or before."""
        return sorted(file for file in (self.private / "cases").glob("*.json") if not is_leftover(file.name))

    def remove(self, case: str) -> None:
        """Remove what an earlier run made of a study, and dataset.json: until all is told anew, nobody trains on it."""
        (self.out / "dataset.json").unlink(missing_ok=True)
        for file in (*(self.out / "images").glob(f"{case}*"), *(self.out / "labels").glob(f"{case}*")):
            file.unlink()
        (self.private / "cases" / f"{case}.json").unlink(missing_ok=True)

    def remember(self, entries: Sequence[Entry]) -> None:
        """Write which study and path each case is."""
        rows = [(self.name(one.identity), one.uid, str(one.files[0].parent)) for one in entries]
        add_rows(self.private / "studies.csv", rows)

    def kept(self, entry: Entry) -> CaseOutcome | None:
        """Return what an earlier run made of a study with the same rules and files, where it is still there."""
        record = _read_record(self.private / "cases" / f"{self.name(entry.identity)}.json")
        if record is None:
            return None
        sizes = {name: (self.out / name).stat().st_size for name in record["bytes"] if (self.out / name).is_file()}
        if record["state"] != self._state(entry) or sizes != record["bytes"] or record["status"] == "failed":
            return None
        known = {name: record[name] for name in asdict(CaseOutcome("", "")) if name != "kept"}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return CaseOutcome(**known | lists, kept=True)

    def write(self, entry: Entry, outcome: CaseOutcome, image: Volume | None, labels: Volume | None) -> CaseOutcome:
        """Write the files of a case, if it is taken, and then what became of the study. Raises OutputError."""
        self.remove(outcome.case)
        self._record(entry, CaseOutcome(outcome.case, "failed", UNDER_WAY), [])  # no file without a record
        files = []
        if outcome.status == "taken" and image is not None and labels is not None:
            channels = image.array
            for number, channel in enumerate(channels):
                suffix = "" if len(channels) == 1 else f"_{number:04d}"
                files.append(f"images/{outcome.case}{suffix}{ENDING}")
                save(image.with_array(channel[None]), self.out / files[-1])
            files.append(f"labels/{outcome.case}{ENDING}")
            save(labels, self.out / files[-1])
        self._record(entry, outcome, files)
        return outcome

    def _record(self, entry: Entry, outcome: CaseOutcome, files: Sequence[str]) -> None:
        record = {
            **asdict(outcome),
            "rules": self.rules.digest,
            "state": self._state(entry),
            "bytes": {name: (self.out / name).stat().st_size for name in files},
        }
        _write_json(record, self.private / "cases" / f"{outcome.case}.json")

    def write_tables(self, outcomes: Sequence[CaseOutcome]) -> None:
        """Write dataset.json and cases.json, and the tables for the owner. Raises OutputError."""
        records = [record for file in self.record_files() if (record := _read_record(file))]
        taken = [record for record in records if record["status"] == "taken"]
        content = {
            "name": self.rules.name,
            "channel_names": {str(number): rule.name for number, rule in enumerate(self.rules.channels)},
            "labels": {"background": 0, **{rule.name: value for value, rule in enumerate(self.rules.labels, start=1)}},
            "numTraining": len(taken),
            "file_ending": ENDING,
        }
        cases = [{name: record[name] for name in ("case", "structures", "group")} for record in taken]
        _write_json(cases, self.out / "cases.json")
        _write_json(content, self.out / "dataset.json")  # last: without it nobody trains
        rows = [
            (one.case, one.status, one.reason, one.text, "; ".join(one.structures), "; ".join(one.warnings))
            for one in outcomes
        ]
        names = ("case", "status", "reason", "text", "structures", "warnings")
        _write_csv([names, *rows], self.private / "summary.csv")
        _write_csv([("structure", "times"), *untaken(outcomes)], self.private / "structures.csv")

    def _state(self, entry: Entry) -> str:
        return state([(self.name(str(file)), file) for file in (*entry.files, *entry.objects)])


def untaken(outcomes: Sequence[CaseOutcome]) -> list[tuple[str, int]]:
    """Return the names of structures that no rule took, and how often each was met, the most frequent first."""
    return Counter(name for one in outcomes for name in one.untaken).most_common()


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return what became of a study, or None where the record is missing or damaged: the study is done again then."""
    try:
        content: dict[str, Any] = read_json(path, "The record of a case", DatasetError)
        return content if _Record.model_validate(content).case == path.stem else None
    except (DatasetError, ValueError):
        return None


def _write_json(content: object, path: Path) -> None:
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_csv(rows: Sequence[Sequence[object]], path: Path) -> None:
    with written_whole(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
