from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nnunet_files
import numpy as np
import pytest
from datasets import make_balls, make_shells
from dicom_files import some_labels, write_source
from models import threshold_model, tiny_model
from test_model_segmenter import ball

import medseg
import medseg.io.files
import medseg.model.run
from medseg import cli
from medseg.io import load, save
from medseg.model.weights import save_weights
from medseg.report.metrics import Scores
from medseg.volume import Grid, Volume

SAMPLES = Path(__file__).parent.parent / "data_samples"


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function that runs a command line and returns (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medseg", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    model = tiny_model()
    model.plan.save(folder / "plan.json")
    save_weights(model.networks[0], folder / "fold_0.safetensors")
    return folder


@pytest.fixture
def scan(tmp_path):
    affine = np.diag([-1.0, 1.5, 2.0, 1.0])
    volume = ball(Grid((20, 16, 12), affine), 6)
    save(volume, tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_version(run):
    assert run("--version")[:2] == (0, f"medseg {medseg.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_no_arguments_show_the_help(run, arguments):
    code, out, _ = run(*arguments)
    assert "segment" in out
    assert "train" in out
    assert code in (0, 2)


def test_help_and_import_load_no_torch_and_answer_at_once():
    code = (
        "import sys, time; began = time.perf_counter(); import medseg, medseg.cli\n"
        "sys.argv = ['medseg', '--help']\n"
        "try: medseg.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'monai', 'SimpleITK', 'scipy', 'matplotlib', 'pydicom'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_info_of_a_volume(run, scan):
    code, out, _ = run("info", scan, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["shape"] == [20, 16, 12]
    assert facts["spacing_mm"] == [1.0, 1.5, 2.0]
    assert facts["orientation"] == "LAS"
    assert facts["channels"] == 1
    assert "LAS" in run("info", scan)[1]


def test_info_of_a_volume_with_voxels_that_are_no_numbers(run, tmp_path):
    array = np.zeros((1, 4, 4, 4), np.float32)
    array[0, 1, 1, :2] = np.nan, np.inf
    save(Volume(array, Grid((4, 4, 4), np.eye(4))), tmp_path / "image.nii.gz")
    code, out, err = run("info", tmp_path / "image.nii.gz", "--json")
    assert (code, err, json.loads(out)["mean"]) == (0, "", None)
    assert "mean  NaN or infinite" in run("info", tmp_path / "image.nii.gz")[1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in Unicode alone")
def test_a_name_that_the_terminal_cannot_show(run, scan, model_folder, tmp_path):
    named = tmp_path / os.fsdecode(b"M\xfcller [red].nii.gz")
    scan.rename(named)
    code, out, err = run("segment", model_folder, named, tmp_path / f"labels_{named.name}", "--report", tmp_path / "r")
    assert (code, err, (tmp_path / "r").is_file()) == (0, "", True)
    assert r"M\udcfcller[red].nii.gz" in "".join(out.split())


def test_info_of_a_study_gives_each_series_its_verdict(run):
    code, out, _ = run("info", SAMPLES / "ct_study", "--json")
    series = json.loads(out)["series"]
    assert code == 0
    assert len(series) == 4
    assert sorted(one["verdict"] for one in series) == ["accepted", "accepted", "refused", "refused"]
    table = run("info", SAMPLES / "ct_study")[1]
    assert table.count("accepted") == 2
    assert "only serves to plan" in table  # the refusal in words, below the table
    assert "description" not in series[0]
    assert "description" in run("info", SAMPLES / "ct_study", "--descriptions", "--json")[1]


def test_info_of_a_folder_without_dicom_says_that_volumes_are_there(run, scan, tmp_path):
    code, _, err = run("info", tmp_path)
    assert (code, err) == (
        1,
        f"medseg: {tmp_path}: There is no DICOM file here, but there are volumes: name one of them.\n",
    )
    scan.unlink()
    assert run("info", tmp_path)[2] == f"medseg: {tmp_path}: There is no DICOM file here.\n"


def test_convert_there_and_back_keeps_voxels_and_place(run, scan, tmp_path):
    assert run("convert", scan, tmp_path / "a.nrrd")[0] == 0
    assert run("convert", tmp_path / "a.nrrd", tmp_path / "b.mha")[0] == 0
    assert run("convert", tmp_path / "b.mha", tmp_path / "c.nii.gz")[0] == 0
    first, last = load(scan), load(tmp_path / "c.nii.gz")
    assert last.grid.matches(first.grid)
    np.testing.assert_array_equal(last.array, first.array)


def test_convert_a_dicom_series(run, tmp_path):
    assert run("convert", SAMPLES / "ct_study/axial_soft", tmp_path / "ct.nii.gz")[0] == 0
    volume = load(tmp_path / "ct.nii.gz")
    assert volume.array.dtype == np.int16
    assert volume.array.min() < -900


def test_segment_a_file(run, scan, model_folder, tmp_path):
    code, out, err = run("segment", model_folder, scan, tmp_path / "labels.nii.gz")
    assert (code, err) == (0, "")
    assert "ball" in out
    assert load(tmp_path / "labels.nii.gz").grid.matches(load(scan).grid)


def test_a_comma_may_be_part_of_a_name(run, scan, model_folder, tmp_path):
    named = scan.rename(tmp_path / "a,b.nii.gz")
    assert run("segment", model_folder, named, tmp_path / "labels.nii.gz")[0] == 0
    assert run("segment", model_folder, tmp_path / "c,d.nii.gz", tmp_path / "labels.nii.gz")[0] == 1


def test_segment_prints_volumes_for_machines(run, scan, model_folder, tmp_path):
    code, out, _ = run("segment", model_folder, scan, tmp_path / "labels.nii.gz", "--json", "--step", "1.0")
    result = json.loads(out)[0]
    labels = load(tmp_path / "labels.nii.gz")
    assert code == 0
    assert result["error"] is None
    assert result["labels"][0]["name"] == "ball"
    assert result["labels"][0]["volume_ml"] == pytest.approx(float((labels.array == 1).sum()) * 3 / 1000)


def test_a_report_is_written_with_times_and_tiles(run, scan, model_folder, tmp_path):
    command = ("segment", model_folder, scan, tmp_path / "labels.nii.gz", "--report", tmp_path / "report.json")
    assert run(*command, "--no-reuse", "--mirror")[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())[0]
    assert report["tiles_run"] > 0
    assert report["tiles_reused"] == 0
    assert {"read", "prepare", "network", "blend", "export", "measure", "write"} <= set(report["stages"])


def test_segment_tells_how_sure_it_is(run, scan, model_folder, tmp_path):
    wanted = ("--probabilities", "--uncertainty", "--expected-volumes")
    code, out, err = run("segment", model_folder, scan, tmp_path / "a.b.nii.gz", *wanted)
    assert (code, err) == (0, "")
    assert "expected" in out
    probability = medseg.load(tmp_path / "a.b_probability_1.nii.gz")
    labels = medseg.load(tmp_path / "a.b.nii.gz")
    np.testing.assert_array_equal(probability.array > 0.5, labels.array == 1)
    uncertainty = medseg.load(tmp_path / "a.b_uncertainty.nii.gz")
    p = np.clip(probability.array.astype(np.float64), 1e-12, 1 - 1e-12)
    np.testing.assert_allclose(uncertainty.array, -(p * np.log2(p) + (1 - p) * np.log2(1 - p)), atol=1e-5)
    code, out, _ = run("segment", model_folder, scan, tmp_path / "labels.nii.gz", "--expected-volumes", "--json")
    row = json.loads(out)[0]["labels"][0]
    assert row["expected_volume_ml"] == pytest.approx(probability.array.sum() * labels.grid.voxel_mm3 / 1000, rel=1e-5)
    assert sorted(path.name for path in tmp_path.glob("labels*")) == ["labels.labels.json", "labels.nii.gz"]


def test_segment_with_a_crf(run, scan, model_folder, tmp_path):
    for option, used in (("--crf", True), ("--no-crf", False)):
        command = ("segment", model_folder, scan, tmp_path / "labels.nii.gz", option, "--json")
        code, out, _ = run(*command)
        assert code == 0
        assert ("crf" in json.loads(out)[0]) == used
        assert ("crf" in json.loads(out)[0]["stages"]) == used


def test_segment_a_box(run, scan, model_folder, tmp_path):
    assert run("segment", model_folder, scan, tmp_path / "labels.nii.gz", "--roi=-9,0,0,-1,6,6")[0] == 0
    labels = load(tmp_path / "labels.nii.gz").array[0]
    outside = np.ones(labels.shape, bool)
    outside[1:10, 0:5, 0:4] = False
    assert (labels[outside] == 0).all()


def test_no_input_is_replaced(run, scan, model_folder, tmp_path):
    (tmp_path / "link.nii.gz").symlink_to(scan)
    (tmp_path / "x_uncertainty.nii.gz").write_bytes(scan.read_bytes())
    save(threshold_model(50).segment(load(scan)), tmp_path / "labels.nii.gz")
    (tmp_path / "names.json").write_text('{"labels": {"ball": 1}}')
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    for command in [
        ("segment", model_folder, scan, scan),
        ("segment", model_folder, scan, tmp_path / "model" / ".." / scan.name),
        ("segment", model_folder, tmp_path / "link.nii.gz", scan),
        ("segment", model_folder, f"{tmp_path / 'labels.nii.gz'},{scan}", scan),
        ("segment", model_folder, tmp_path / "x_uncertainty.nii.gz", tmp_path / "x.nii.gz", "--uncertainty"),
        ("segment", model_folder, scan, tmp_path / "out.nii.gz", "--report", scan),
        ("segment", model_folder, scan, tmp_path / "out.nii.gz", "--report", tmp_path / "out.nii.gz"),
        ("convert", scan, scan),
        ("report", scan, tmp_path / "labels.nii.gz", tmp_path / "names.json", "--labels", tmp_path / "names.json"),
    ]:
        code, _, err = run(*command)
        assert code == 2
        assert "would replace" in err
        assert "Traceback" not in err
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}


def test_no_slice_is_replaced_by_labels_of_its_series(run, tmp_path):
    write_source(tmp_path / "ct")
    save(some_labels(load(tmp_path / "ct").grid), tmp_path / "labels.nii.gz")
    slice_of_it = min((tmp_path / "ct").iterdir())
    slice_of_it = slice_of_it.rename(slice_of_it.with_suffix(".dcm"))
    content = slice_of_it.read_bytes()
    for command in (
        ("convert", tmp_path / "labels.nii.gz", slice_of_it, "--source", tmp_path / "ct"),
        ("convert", tmp_path / "labels.nii.gz", slice_of_it, "--source", tmp_path / "ct", "--to", "rtstruct"),
        ("report", tmp_path / "ct", tmp_path / "labels.nii.gz", slice_of_it),
    ):
        code, _, err = run(*command)
        assert code == 2
        assert "would replace" in err
    assert slice_of_it.read_bytes() == content


@pytest.mark.parametrize("options", [("out.txt",), ("no/out.nii.gz",), ("model",), ("a.nrrd", "--report", "no/r.json")])
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    run, scan, model_folder, tmp_path, monkeypatch, options
):
    def work(*_args: object, **_options: object) -> None:
        raise AssertionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medseg.model.run.load", work)
    code, _, err = run("segment", model_folder, scan, *options)
    assert code == 1
    assert err.startswith(f"medseg: {options[-1]}: The ")


def test_results_are_shown_though_a_report_could_not_be_written(run, scan, model_folder, tmp_path, monkeypatch):
    real = medseg.io.files.written_whole

    def full(path: Path) -> object:
        if path.name == "r.json":
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr("medseg.io.files.written_whole", full)
    code, out, err = run("segment", model_folder, scan, tmp_path / "a.nii.gz", "--report", tmp_path / "r.json")
    assert code == 1
    assert "ball" in out
    assert "No space left" in err


@pytest.mark.parametrize("box", ["1,2,3", "a,b,c,d,e,f"])
def test_a_box_that_is_none_is_wrong_use(run, scan, model_folder, tmp_path, box):
    code, _, err = run("segment", model_folder, scan, tmp_path / "labels.nii.gz", "--roi", box)
    assert code == 2
    assert "six numbers in mm" in err


def test_segment_a_folder_goes_on_after_a_bad_file_and_says_so(run, scan, model_folder, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "a.nii.gz").write_bytes(scan.read_bytes())
    (folder / "b.nii.gz").write_bytes(scan.read_bytes()[:400])
    (folder / "c.nii.gz").write_bytes(scan.read_bytes())
    code, out, err = run("segment", model_folder, folder, tmp_path / "labels")
    assert code == 1
    assert sorted(file.name for file in (tmp_path / "labels").iterdir()) == [
        *("a.labels.json", "a.nii.gz", "c.labels.json", "c.nii.gz"),
    ]
    assert "b.nii.gz" in err
    assert "Traceback" not in out + err
    code, _, err = run("segment", model_folder, folder, folder)
    assert code == 2
    assert "would replace the images" in err


FAULTS = {
    "read": (MemoryError(), "The memory did not suffice."),
    "segment": (RuntimeError("SMITH: can't allocate memory"), "The memory did not suffice."),
    "finish": (RuntimeError("SMITH"), r"Unexpected RuntimeError at \S+:\d+"),
}


@pytest.mark.parametrize("stage", FAULTS)
def test_what_nobody_foresaw_costs_one_scan_of_a_folder(run, scan, model_folder, tmp_path, monkeypatch, stage):
    error, said = FAULTS[stage]
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    real = getattr(medseg.model.run._Job, stage)

    def fails(job, *arguments):
        if job.source.name == "b.nii.gz":
            raise error
        return real(job, *arguments)

    monkeypatch.setattr(medseg.model.run._Job, stage, fails)
    code, _, err = run("segment", model_folder, folder, tmp_path / "labels", "--report", tmp_path / "report.json")
    assert code == 1
    assert sorted(file.name for file in (tmp_path / "labels").iterdir()) == [
        *("a.labels.json", "a.nii.gz", "c.labels.json", "c.nii.gz"),
    ]
    assert re.search(rf"b\.nii\.gz: {said}", err.replace("\n", ""))
    assert "SMITH" not in err
    assert len(json.loads((tmp_path / "report.json").read_text())) == 3


def test_segment_a_folder_says_which_scan_a_link_does_not_lead_to(run, scan, model_folder, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "a.nii.gz").symlink_to(scan)
    (folder / "b.nii.gz").symlink_to(tmp_path / "not_fetched.nii.gz")
    (folder / "._a.nii.gz").write_bytes(b"as macOS leaves them")
    code, _, err = run("segment", model_folder, folder, tmp_path / "labels")
    assert sorted(file.name for file in (tmp_path / "labels").iterdir()) == ["a.labels.json", "a.nii.gz"]
    assert code == 1
    assert err.replace("\n", "").endswith(
        "b.nii.gz: The link leads to a file that is not there. Fetch that file, or copy it again."
    )


def test_segment_a_folder_takes_whatever_can_be_read(run, scan, model_folder, tmp_path):
    import nibabel
    import SimpleITK

    folder, image = tmp_path / "scans", nibabel.load(scan)
    folder.mkdir()
    (folder / "A.NII.GZ").write_bytes(scan.read_bytes())
    nibabel.save(nibabel.Nifti1Pair(image.get_fdata(dtype=np.float32), image.affine), folder / "b.img")
    for name in ("C.HDR", "C.IMG"):
        (folder / name).write_bytes((folder / f"b{name[1:].lower()}").read_bytes())
    for name in ("d.mhd", "e.nhdr"):
        SimpleITK.WriteImage(SimpleITK.ReadImage(scan), folder / name)
    (folder / "notes.txt").touch()
    code, _, err = run("segment", model_folder, folder, tmp_path / "labels", "--uncertainty")
    assert (code, err) == (0, "")
    names = ["A.NII.GZ", "C.nii.gz", "b.nii.gz", "d.mha", "e.nrrd"]
    written = sorted(file.name for file in (tmp_path / "labels").iterdir())
    assert sorted(names) == [name for name in written if "uncertainty" not in name and not name.endswith(".json")]
    assert len(written) == 15
    expected = load(tmp_path / "labels" / "A.NII.GZ")
    assert expected.array.any()
    for name in names:
        assert load(tmp_path / "labels" / name).grid.matches(expected.grid)
        np.testing.assert_array_equal(load(tmp_path / "labels" / name).array, expected.array)


@pytest.mark.parametrize(("other", "options"), [("scan.mha", ()), ("scan_uncertainty.nii.gz", ("--uncertainty",))])
def test_two_scans_of_a_folder_do_not_become_one_output(run, scan, model_folder, tmp_path, other, options):
    import SimpleITK

    folder = tmp_path / "scans"
    folder.mkdir()
    image = SimpleITK.ReadImage(scan)
    SimpleITK.WriteImage(image, folder / ("scan.mhd" if other == "scan.mha" else "scan.nii.gz"))
    SimpleITK.WriteImage(image, folder / other)
    code, _, err = run("segment", model_folder, folder, tmp_path / "labels", *options)
    assert code == 2
    assert "Two scans would give one output" in err
    assert not [*(tmp_path / "labels").iterdir()]


def test_segment_two_channels(run, scan, model_folder, tmp_path):
    code, _, err = run("segment", model_folder, f"{scan},{scan}", tmp_path / "labels.nii.gz")
    assert code == 1
    assert "needs 1 channel(s) (MR) and the input has 2" in err


def test_an_orientation_that_is_not_stated_must_be_given(run, model_folder, tmp_path):
    import nibabel

    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32), None)
    image.header.set_zooms((1, 1, 2))
    nibabel.save(image, tmp_path / "nowhere.nii.gz")
    code, _, err = run("segment", model_folder, tmp_path / "nowhere.nii.gz", tmp_path / "labels.nii.gz")
    assert code == 1
    assert "(assume_orientation, --assume-orientation), for example RAS" in err
    assert not (tmp_path / "labels.nii.gz").exists()
    command = ("segment", model_folder, tmp_path / "nowhere.nii.gz", tmp_path / "labels.nii.gz")
    assert run(*command, "--assume-orientation", "LPS")[0] == 0
    written = nibabel.load(tmp_path / "labels.nii.gz").header
    assert (int(written["qform_code"]), int(written["sform_code"])) == (0, 0)
    assert run("convert", tmp_path / "nowhere.nii.gz", tmp_path / "c.nii.gz", "--assume-orientation", "LPS")[0] == 0
    assert load(tmp_path / "c.nii.gz").grid.orientation == "LPS"


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "missing.nii.gz"),
        ("convert", "missing.nii.gz", "out.nii.gz"),
        ("segment", "no_model", "missing.nii.gz", "out.nii.gz"),
        ("train", "missing", "model"),
        ("evaluate", "missing", "missing"),
    ],
)
def test_what_is_missing_is_one_line_with_the_path_as_typed(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code in (1, 2)
    assert err.startswith(f"medseg: {arguments[1]}")
    assert len(err.splitlines()) <= 2
    assert "Traceback" not in out + err


def test_wrong_use_ends_with_2(run, tmp_path):
    assert run("segment", "hippocampus")[0] == 2
    assert run("dance")[0] == 2
    assert (
        run("train", make_balls(tmp_path / "b", 2, (4, 4, 4)), tmp_path / "m", "--budget", "soon", "--folds", 2)[0] == 2
    )


def test_ctrl_c_leaves_no_traceback_and_no_file(run, scan, model_folder, tmp_path, monkeypatch):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medseg.model.segmenter.Model.segment", interrupted)
    code, out, err = run("segment", model_folder, scan, tmp_path / "labels.nii.gz")
    assert code == 130
    assert "Traceback" not in out + err
    assert not (tmp_path / "labels.nii.gz").exists()


def test_memory_that_runs_out_is_one_line(run, monkeypatch, scan):
    def large(*_args: object, **_options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("medseg.report.describe.describe", large)
    code, out, err = run("info", scan)
    assert (code, out) == (1, "")
    assert err.startswith("medseg: Memory ran out")
    assert len(err.splitlines()) == 1


def test_a_warning_is_one_line_without_a_file_name(run, monkeypatch, scan):
    import warnings

    def odd(*_args: object, **_options: object) -> dict[str, object]:
        warnings.warn("This file is odd.", stacklevel=1)
        return {}

    monkeypatch.setattr("medseg.report.describe.describe", odd)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = run("info", scan)
    assert (code, err) == (0, "warning: This file is odd.\n")


def test_plan_says_why_and_training_follows_it(run, tmp_path):
    dataset = make_balls(tmp_path / "balls", cases=4, shape=(16, 18, 14))
    code, out, err = run("plan", dataset, tmp_path / "model")
    assert (code, err) == (0, "")
    assert "median" in out
    told = json.loads(run("plan", dataset, tmp_path / "model", "--json")[1])
    assert {row["decision"] for row in told["decisions"]} >= {"spacing_mm", "patch", "network"}
    assert set(told["costs"]) >= {"parameters", "gflop_patch", "step_gb", "scan_s"}
    assert told["costs"]["missing"] == ""
    assert "GFLOP a patch" in out
    assert (tmp_path / "model/plan.json").is_file()
    code, _, err = run("plan", dataset, tmp_path / "other", "--from", tmp_path / "model")
    assert (code, err) == (0, "")
    assert (tmp_path / "other/plan.json").read_text() == (tmp_path / "model/plan.json").read_text()


def test_train_segment_evaluate(run, tmp_path):
    dataset = make_balls(tmp_path / "balls", cases=4, shape=(10, 12, 10))
    command = ("train", dataset, tmp_path / "model", "--budget", "2steps", "--folds", 2)
    code, out, _ = run(*command, "--json")
    assert code == 0
    scores = json.loads(out)
    assert len(scores["cases"]) == 2
    code, out, _ = run("evaluate", tmp_path / "model", dataset)
    assert code == 0
    assert "4 cases" in out
    assert run("segment", tmp_path / "model", dataset / "images", tmp_path / "predictions")[0] == 0
    (tmp_path / "predictions/case_1.nii.gz").unlink()
    code, out, err = run("evaluate", tmp_path / "predictions", dataset / "labels", "--json")
    assert code == 1
    assert [failed["case"] for failed in json.loads(out)["failed"]] == ["case_1"]
    assert "case_1: no usable prediction" in err


def test_train_all_folds(run, tmp_path):
    dataset = make_balls(tmp_path / "balls", cases=4, shape=(10, 12, 10))
    command = ("train", dataset, tmp_path / "model", "--budget", "2steps", "--folds", 2, "--fold", "all")
    code, out, _ = run(*command)
    assert code == 0
    assert "All folds, validation cases: 4 cases" in out
    assert "Largest piece alone" in out
    assert "| all | ball |" in (tmp_path / "model/MODEL_CARD.md").read_text()
    code, out, _ = run(*command, "--json")
    assert code == 0
    assert json.loads(out)["mean"] == json.loads((tmp_path / "model/scores.json").read_text())["mean"]
    assert run(*command[:-1], "some")[0] == 2


def test_one_case_is_planned_trained_on_and_evaluated(run, tmp_path):
    dataset, model = make_balls(tmp_path / "balls", cases=1, shape=(10, 12, 10)), tmp_path / "model"
    assert run("plan", dataset, model)[0] == 0
    code, out, err = run("train", dataset, model, "--budget", "2steps")
    assert (code, out) == (1, "")
    assert "At least two cases" in err
    assert "--fold none" in err
    command = ("train", dataset, model, "--budget", "2steps", "--fold", "none")
    for options, shown in (((), ""), (("--json",), [])):
        code, out, err = run(*command, *options)
        assert (code, json.loads(out)["cases"] if options else out) == (0, shown)
        assert "none was kept aside" in err
    code, out, _ = run("evaluate", model, dataset)
    assert (code, "1 case" in out) == (0, True)
    image, labels = dataset / "images/case_0.nii.gz", tmp_path / "found.nii.gz"
    assert run("segment", model, image, labels)[0] == 0
    assert run("report", image, labels, tmp_path / "volumes.csv")[0] == 0


def test_evaluate_knows_regions_and_ignored_voxels_from_the_dataset(run, tmp_path):
    root = make_shells(tmp_path / "shells", ignore=7, cases=2)
    code, out, _ = run("evaluate", root / "labels", root / "labels", "--json")
    scores = json.loads(out)
    assert code == 0
    assert [(label["name"], label["dice"]) for label in scores["labels"]] == [("ball", 1.0), ("core", 1.0)]
    (tmp_path / "names.json").write_text('{"labels": {"shell": 1, "core": 2, "unseen": 7}}')
    code, out, _ = run("evaluate", root / "labels", root / "labels", "--json", "--labels", tmp_path / "names.json")
    assert [label["name"] for label in json.loads(out)["labels"]] == ["shell", "core", "unseen"]


def test_evaluate_leaves_out_what_was_not_drawn(run, tmp_path):
    root = make_shells(tmp_path / "shells", regions=False, cases=2)
    (root / "cases.json").write_text('[{"case": "case_0", "structures": ["core"], "group": "one"}]')
    code, out, _ = run("evaluate", root / "labels", root / "labels", "--json")
    cases = {case["case"]: [label["name"] for label in case["labels"]] for case in json.loads(out)["cases"]}
    assert (code, cases) == (0, {"case_0": ["core"], "case_1": ["shell", "core"]})


def test_other_names_for_labels_leave_what_the_dataset_says_of_its_cases(run, tmp_path):
    root = make_shells(tmp_path / "shells", regions=False, ignore=7, cases=2)
    (root / "cases.json").write_text('[{"case": "case_0", "structures": ["core"]}]')
    whole = load(root / "labels/case_1.nii.gz")
    (tmp_path / "found").mkdir()
    shutil.copy(root / "labels/case_0.nii.gz", tmp_path / "found")
    filled = np.where(whole.array == 7, 2, whole.array)  # wrong, but nobody knows: it is to be ignored
    save(whole.with_array(filled), tmp_path / "found/case_1.nii.gz")
    (tmp_path / "names.json").write_text('{"labels": {"rim": 1, "middle": 2}}')
    command = ("evaluate", tmp_path / "found", root / "labels", "--labels", tmp_path / "names.json", "--json")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    cases = {case["case"]: {one["name"]: one["dice"] for one in case["labels"]} for case in json.loads(out)["cases"]}
    assert cases == {"case_0": {"middle": 1.0}, "case_1": {"rim": 1.0, "middle": 1.0}}


def test_evaluate_refuses_options_that_would_do_nothing_and_loses_no_scores(run, model_folder, tmp_path):
    root = make_balls(tmp_path / "balls", cases=2, shape=(8, 8, 8))
    labels = root / "labels"
    assert run("evaluate", labels, labels, "--device", "cpu")[0] == 2
    assert run("evaluate", model_folder, root, "--labels", root / "dataset.json")[0] == 2
    assert run("evaluate", labels, labels, "--tolerance-mm", "nan")[0] == 2
    code, out, err = run("evaluate", labels, labels, "--csv", tmp_path / "nowhere/scores.csv")
    assert code == 1
    assert "2 cases" in out
    assert "could not be written" in err


def test_evaluate_refuses_a_dataset_of_other_labels_than_the_models(run, model_folder, tmp_path):
    root = make_balls(tmp_path / "balls", cases=2, shape=(8, 8, 8))
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(description | {"labels": {"liver": 5}}))
    code, _, err = run("evaluate", model_folder, root)
    assert code == 1
    assert "and the dataset has values 5. Give references with the labels of the model" in err


def test_only_the_first_of_several_processes_shows_scores(run, tmp_path, monkeypatch):
    monkeypatch.setattr("medseg.train.loop.train_dataset", lambda *_, **__: Scores(()))
    monkeypatch.setenv("RANK", "1")
    assert run("train", tmp_path, tmp_path / "model", "--fold", "all", "--json") == (0, "", "")
    assert run("train", tmp_path, tmp_path / "model", "--fold", "\N{SUPERSCRIPT TWO}")[0] == 2
    assert run("batch", "hippocampus", tmp_path, tmp_path / "out", "--shard", "\N{SUPERSCRIPT TWO}/3")[0] == 2


def test_evaluating_a_perfect_prediction(run, tmp_path):
    image = ball(Grid((20, 20, 20), np.eye(4)), 6)
    labels = threshold_model(50).segment(image)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(labels, tmp_path / folder / "x.nii.gz")
    code, out, _ = run("evaluate", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0
    assert json.loads(out)["mean"]["dice"] == 1.0


def test_a_label_volume_is_a_volume(tmp_path):
    save(Volume(np.zeros((1, 2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4))), tmp_path / "x.nii.gz")
    assert load(tmp_path / "x.nii.gz").array.shape == (1, 2, 2, 2)


def test_import(run, tmp_path):
    source = nnunet_files.write_model(tmp_path / "source")
    code, shown, _ = run("import", source, tmp_path / "model", "--orientation", "RAS", "--folds", "0")
    assert (code, shown) == (0, "Dataset007_Test 3d_fullres: 1 channel(s), 2 label(s), orientation RAS\n")
    assert (tmp_path / "model" / "plan.json").is_file()
    code, _, shown = run("import", source, tmp_path / "other", "--folds", "first")
    assert (code, shown) == (2, "medseg: Folds are whole numbers, such as 0,1; not 'first'.\n")


def test_a_series_is_not_looked_through_for_each_map(run, model_folder, tmp_path, monkeypatch):
    from medseg.io import dicom_series

    looked, find = [], dicom_series.find_series
    monkeypatch.setattr(dicom_series, "find_series", lambda path: looked.append(path) or find(path))
    series = write_source(tmp_path / "ct")
    assert run("segment", model_folder, series, tmp_path / "a.nii.gz", "--anyway")[0] == 0
    once = len(looked)
    soft = ("--probabilities", "--uncertainty")
    assert run("segment", model_folder, series, tmp_path / "b.nii.gz", "--anyway", *soft)[0] == 0
    assert len(looked) == 2 * once > 0
    assert load(tmp_path / "b_uncertainty.nii.gz").grid.matches(load(tmp_path / "b.nii.gz").grid)
