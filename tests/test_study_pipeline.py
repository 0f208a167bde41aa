"""Pipelines say what they mean or are refused in words; rules choose, and say why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_grid
from dicom_files import ORIENTATIONS, write_series
from test_process_register import phantom

from medseg import cli
from medseg.errors import UsageError
from medseg.study.check import check_pipeline, explain
from medseg.study.choose import choose
from medseg.study.find import find_studies
from medseg.study.pipeline import Pipeline, Rule, load_pipeline
from medseg.study.run import Job, read_job

ROOT = Path(__file__).parents[1]
RULE = {"name": "CT", "modality": ["CT"]}
PIPELINE = {"format": 1, "name": "p", "model": "hippocampus", "channels": [RULE], "outputs": ["nifti"]}


def pipeline(**changes: object) -> Pipeline:
    return Pipeline.model_validate(PIPELINE | changes)


def written(folder: Path, **changes: object) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(PIPELINE | changes))  # JSON is YAML
    return path


class TestFiles:
    @pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda path: path.stem)
    def test_each_pipeline_that_ships_can_run(self, path):
        loaded = load_pipeline(path)
        assert check_pipeline(loaded).is_dir()
        assert load_pipeline(path.stem) == loaded
        assert loaded.name == path.stem

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"format": 2}, "1 problem: format"),
            ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
            ({"channels": []}, "channels"),
            ({"channels": [RULE | {"modality": []}]}, r"channels\.0\.modality"),
            ({"channels": [RULE | {"description": "("}]}, r"channels\.0\.description"),
            ({"channels": [RULE | {"slices": [5, 2]}]}, "a range is its lower end and its upper end"),
            ({"channels": [RULE | {"prefer": ["beauty"]}]}, "prefer"),
            ({"cleanup": [{"minimal_ml": 0}]}, "minimal_ml"),
            ({"outputs": [], "name": None}, "2 problems: name.*; outputs"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, changes, text):
        with pytest.raises(UsageError, match=text) as caught:
            load_pipeline(written(tmp_path, **changes))
        assert caught.value.path == tmp_path / "pipeline.yaml"

    def test_no_yaml_no_code_no_file(self, tmp_path):
        path = tmp_path / "x.yaml"
        twice = "channels:\n  - {name: T1, modality: [MR], description: t1, description: mprage}\n"
        for text in ("a: [", "!!python/object/apply:os.system ['true']", twice, "a: 2020-13-45", "[" * 5000):
            path.write_text(text)
            with pytest.raises(UsageError, match="not valid YAML"):
                load_pipeline(path)
        path.write_bytes("name: Schädel".encode("latin-1"))
        with pytest.raises(UsageError, match="not UTF-8"):
            load_pipeline(path)
        path.write_text("a" * (2**20 + 1))
        with pytest.raises(UsageError, match="larger than 1 MB"):
            load_pipeline(path)
        with pytest.raises(UsageError, match=r"neither a YAML file nor one that medseg ships \(hippocampus\)"):
            load_pipeline("nothing")

    def test_a_model_beside_the_file_is_found_and_the_digest_does_not_know_where(self, tmp_path):
        (tmp_path / "mine").mkdir()
        loaded = load_pipeline(written(tmp_path, model="mine"))
        assert loaded.model == str(tmp_path / "mine")
        assert loaded.digest == pipeline().digest != pipeline(mirror=True).digest


class TestCheck:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"channels": [RULE, RULE]}, r"the model has 1 channel\(s\) \(MRI\), not 2"),
            ({"cleanup": [{"labels": ["Anterior", "Liver"]}]}, "the model has no label 'Liver'"),
            ({"outputs": ["nifti", "stl"]}, "there is no output 'stl' but nifti, json, csv, picture, seg"),
        ],
    )
    def test_what_is_not_there_is_named(self, changes, text):
        with pytest.raises(UsageError, match=text):
            check_pipeline(pipeline(**changes))

    def test_a_crf_is_settings_or_a_word_and_older_pipelines_keep_their_digest(self):
        plain = pipeline()
        assert plain.crf is None
        digests = {plain.digest, *(pipeline(crf=crf).digest for crf in (True, False, {"appearance": 2}))}
        assert len(digests) == 4
        assert pipeline(crf=None).digest == plain.digest
        assert check_pipeline(pipeline(crf={"reach_mm": 4})).is_dir()
        with pytest.raises(UsageError, match="pipeline cannot run: .* smaller reach_mm"):
            check_pipeline(pipeline(crf={"reach_mm": 40}))

    def test_some_outputs_need_packages(self, monkeypatch):
        monkeypatch.setattr("medseg.study.check.find_spec", lambda _: None)
        with pytest.raises(UsageError, match=r"a picture needs matplotlib.*; DICOM outputs need highdicom"):
            check_pipeline(pipeline(outputs=["picture", "seg"]))


def chosen(folder: Path, *rules: dict):
    (study,) = find_studies(folder)
    selection = choose(study.series, [Rule.model_validate(RULE | rule) for rule in rules])
    numbers = [choice.series.number if choice.series else None for choice in selection.choices]
    return numbers, [choice.reasons for choice in selection.choices], selection.refusal


@pytest.fixture
def study(tmp_path):
    """Return a study of four CT series: 1 thick, 2 thin with contrast, 3 thin and coronal, 4 with a slice missing."""
    common = {"StudyInstanceUID": "1.2.3"}
    write_series(tmp_path / "1", range(6), step_mm=(0, 0, 5), SeriesNumber=1, SeriesDescription="Head 5.0", **common)
    write_series(tmp_path / "2", range(8), step_mm=(0, 0, 1), SeriesNumber=2, ContrastBolusAgent="Iodine", **common)
    write_series(tmp_path / "3", range(9), orientation=ORIENTATIONS["coronal"], SeriesNumber=3, **common)
    write_series(tmp_path / "4", [0, 1, 3, 4, 5, 6], SeriesNumber=4, SeriesDescription="Lung", **common)
    return tmp_path


class TestChoice:
    @pytest.mark.parametrize(
        ("rule", "number"),
        [
            ({}, "1"),
            ({"prefer": ["thin_slices"]}, "2"),
            ({"prefer": ["no_contrast", "more_slices"]}, "3"),
            ({"prefer": ["contrast"]}, "2"),
            ({"contrast": True}, "2"),
            ({"orientation": ["coronal", "sagittal"]}, "3"),
            ({"slice_mm": [2, 3]}, "3"),
            ({"description": "head"}, "1"),
            ({"not_description": "head", "contrast": False}, "3"),
            ({"prefer": [{"description": "HEAD"}, "thin_slices"]}, "1"),
            ({"slices": [9, 99]}, "3"),
            ({"in_plane_mm": [1.25, 1.25], "prefer": ["fine_pixels", "original", "accepted"]}, "1"),
        ],
    )
    def test_the_rule_and_its_preferences_decide(self, study, rule, number):
        numbers, _, refusal = chosen(study, rule)
        assert (numbers, refusal) == ([number], None)

    @pytest.mark.parametrize("sizes", [(0.625, 0.6249), (0.6249, 0.625), (0.6251, 0.625), (1, 1.0099), (0.995, 1.0049)])
    def test_lengths_that_nearly_agree_are_no_reason(self, tmp_path, sizes):
        for number, size in enumerate(sizes, start=1):
            own = {"PixelSpacing": [size, size], "StudyInstanceUID": "1.2.3", "SeriesNumber": number}
            write_series(tmp_path / str(number), range(6 + number), step_mm=(0, 0, size), **own)
        for name in ("thin_slices", "fine_pixels"):
            assert chosen(tmp_path, {"prefer": [name, "more_slices"]})[0] == ["2"]
            assert chosen(tmp_path, {"prefer": [name]})[0] == ["1"]

    @pytest.mark.parametrize(("sizes", "number"), [((0.64, 0.625), "2"), ((0.625, 0.64), "1")])
    def test_lengths_that_differ_are_a_reason(self, tmp_path, sizes, number):
        for place, size in enumerate(sizes, start=1):
            own = {"PixelSpacing": [size, size], "StudyInstanceUID": "1.2.3", "SeriesNumber": place}
            write_series(tmp_path / str(place), range(8), step_mm=(0, 0, size), **own)
        for name in ("thin_slices", "fine_pixels"):
            assert chosen(tmp_path, {"prefer": [name]})[0] == [number]

    @pytest.mark.parametrize(
        ("size", "fits"), [(1.2496, True), (1.2504, True), (1.2505, True), (1.26, False), (1.24, False)]
    )
    def test_a_range_has_room_for_rounding(self, tmp_path, size, fits):
        write_series(tmp_path, range(6), PixelSpacing=[size, size], SeriesNumber=1)
        assert chosen(tmp_path, {"in_plane_mm": [1.25, 1.25]})[0] == (["1"] if fits else [None])

    def test_every_series_has_its_reason(self, study):
        _, (reasons,), _ = chosen(study, {"orientation": ["axial"], "prefer": ["thin_slices"]})
        assert reasons == (
            "not taken: another fits better by thin slices",
            "taken",
            "not taken: its slices are coronal",
            "not taken: refused: missing_slice",
        )
        _, (reasons,), refusal = chosen(study, {"modality": ["MR"]})
        assert set(reasons) == {"not taken: its modality is CT"}
        assert refusal.reason == "no_series"
        assert "4 not taken: its modality is CT" in str(refusal)

    def test_the_refusal_of_the_series_that_was_meant_is_the_reason(self, study):
        numbers, _, refusal = chosen(study, {"description": "lung"})
        assert (numbers, refusal.reason) == ([None], "missing_slice")

    def test_a_series_serves_one_channel(self, study):
        numbers, reasons, _ = chosen(study, {"contrast": False}, {"contrast": False}, {"slices": [7, 99]})
        assert numbers == ["1", "3", "2"]
        assert "not taken: serves another channel" in reasons[1]

    @pytest.mark.parametrize(
        ("frames", "refused"), [(("1.1", "1.2"), True), (("1.1", "1.1"), False), (("1.1", ""), True)]
    )
    def test_channels_in_different_frames_are_refused(self, tmp_path, frames, refused):
        for number, frame in enumerate(frames):
            write_series(
                tmp_path / str(number), step_mm=(0, 0, 2 + number), StudyInstanceUID="1.2", SeriesNumber=number,
                FrameOfReferenceUID=frame,
            )  # fmt: skip
        _, _, refusal = chosen(tmp_path, {}, {})
        assert (refusal is not None) == refused
        if refused:
            assert refusal.reason == "frame_of_reference"

    def test_irregular_steps_only_where_they_are_allowed(self, tmp_path):
        write_series(tmp_path, [0, 1, 1.9, 3, 4], SeriesNumber=1)
        assert chosen(tmp_path, {})[0] == ["1"]
        _, (reasons,), refusal = chosen(tmp_path, {"repaired": False})
        assert (reasons, refusal.reason) == (("not taken: its steps are irregular and repaired is false",), "no_series")


def test_the_command_explains_the_choice(study, capsys, monkeypatch):
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["medseg", "pipeline", "check", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as done:
            return int(done.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    assert run("hippocampus") == (0, "hippocampus: the pipeline can run\n")
    code, shown = run("hippocampus", study)
    assert code == 1
    assert "its modality is CT" in shown
    code, shown = run(written(study, channels=[RULE | {"contrast": True}]), study, "--json")
    assert code == 0
    assert [row["reason"] == "taken" for row in json.loads(shown)["studies"][0]["choices"]].count(True) == 1
    (study / "2" / "cut.dcm").touch()
    assert explain(pipeline(), study)[0]["refusal"]["reason"] == "unreadable"


class TestRegistration:
    RULES = (
        {"name": "T1", "modality": ["MR"], "description": "t1"},
        {"name": "T2", "modality": ["MR"], "description": "t2"},
    )

    @pytest.fixture
    def heads(self, tmp_path):
        """Return a study of one head in two frames of reference, in the second 9 mm to the left and 6 mm lower."""
        image = phantom(make_grid("LPS", (48, 44, 22))).array[0].round().astype(np.int16)

        def each(contrast, shift_mm):
            def pixels(k):
                values = image[:, :, k].T
                position = [shift_mm[0], shift_mm[1], 2.5 * k + shift_mm[2]]
                return {"PixelData": (200 - values if contrast else values).tobytes(), "ImagePositionPatient": position}

            return pixels

        common = {"StudyInstanceUID": "1.2.3", "Modality": "MR", "shape": (44, 48)}
        common |= {"PixelSpacing": [1.1, 0.9], "SliceThickness": 2.5}
        write_series(tmp_path / "1", range(22), SeriesDescription="T1", each=each(False, (0, 0, 0)), **common)
        write_series(
            tmp_path / "2", range(22), SeriesDescription="T2", each=each(True, (9, 0, -6)), FrameOfReferenceUID="1.9",
            **common,
        )  # fmt: skip
        return tmp_path

    def test_channels_in_two_spaces_are_refused_unless_registration_is_asked_for(self, heads):
        (study,) = find_studies(heads)
        rules = [Rule.model_validate(rule) for rule in self.RULES]
        assert choose(study.series, rules).refusal.reason == "frame_of_reference"
        assert choose(study.series, rules, register=True).refusal is None
        asked = pipeline(channels=self.RULES, registration="rigid")
        assert explain(asked, heads)[0]["refusal"] is None
        assert explain(pipeline(channels=self.RULES), heads)[0]["refusal"]["reason"] == "frame_of_reference"

    def test_the_manifest_says_how(self, heads):
        job = Job("study", {file: file.name for file in heads.rglob("*") if file.is_file()})
        read_job(job, pipeline(channels=self.RULES, registration="rigid"))
        (fact,) = job.facts["registrations"]
        assert (fact["channel"], fact["kind"]) == (1, "rigid")
        matrix = np.array(fact["matrix"])
        center = job.image.grid.to_world((np.array(job.image.grid.shape) - 1) / 2)
        assert matrix[:3, :3] @ center + matrix[:3, 3] - center == pytest.approx([-9, 0, -6], abs=0.5)
        assert fact["simpleitk"]
        inside = job.image.array[0] > 0
        assert np.corrcoef(job.image.array[0][inside], job.image.array[1][inside])[0, 1] < -0.7
