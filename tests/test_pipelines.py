from __future__ import annotations

import pytest
from datasets import make_balls

from medseg.io import load
from pipelines import unet3d


def test_the_script_trains_and_segments_on_the_grid_of_its_image(tmp_path, capsys):
    dataset = make_balls(tmp_path / "balls", cases=5, shape=(10, 12, 10))
    image, labels = dataset / "images/case_1.nii.gz", tmp_path / "labels.nii.gz"
    unet3d.main(str(dataset), str(tmp_path / "model"), str(image), str(labels), "2steps")
    assert load(labels).grid.matches(load(image).grid)
    assert "as the image's" in capsys.readouterr().out


def test_labels_elsewhere_end_the_script(tmp_path, monkeypatch):
    dataset = make_balls(tmp_path / "balls", cases=5, shape=(10, 12, 10))
    image, other = dataset / "images/case_1.nii.gz", dataset / "labels/case_2.nii.gz"
    read = unet3d.medseg.load
    monkeypatch.setattr(
        unet3d.medseg, "load", lambda path: read(other if path == "labels.nii.gz" else path), raising=False
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="do not lie on the grid"):
        unet3d.main(str(dataset), str(tmp_path / "model"), str(image), "labels.nii.gz", "1steps")
