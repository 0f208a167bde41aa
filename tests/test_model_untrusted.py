"""Attacks on whoever imports a model: each is refused, and leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path

import nnunet_files as files
import numpy as np
import pytest
import torch

from medseg.errors import ModelError
from medseg.model import untrusted
from medseg.model.importing import import_model
from medseg.model.untrusted import checksum, read_checkpoint, unpacked, weights_in

pytestmark = pytest.mark.filterwarnings("ignore:The model does not say how its training images were stored")


class Attack:
    """Runs a command where it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch '{self.witness}'",)


class Reflection:
    """Evaluates code where it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(self.witness)!r}).touch()",)


@pytest.mark.parametrize("attack", [Attack, Reflection])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, attack, legacy):
    witness, source = tmp_path / "witness", files.write_model(tmp_path / "source")
    file = source / "fold_0" / "checkpoint_final.pth"
    content = files.checkpoint(files.weights(), logging=attack(witness))
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ModelError, match="refused, and nothing of it was run" if not legacy else "PyTorch 1.6"
    ) as caught:
        import_model(source, tmp_path / "model")
    assert caught.value.path == file
    assert not witness.exists()
    assert not (tmp_path / "model").exists()
    # The attack is real: this is what simply loading the file would have done.
    torch.load(file, weights_only=False)
    assert witness.exists()


def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    witness, file = tmp_path / "witness", tmp_path / "model.pth"
    file.write_bytes(pickle.dumps(Attack(witness)))
    with pytest.raises(ModelError, match="PyTorch 1.6"):
        read_checkpoint(file)
    assert not witness.exists()


def test_numbers_of_numpy_and_devices_are_read(tmp_path):
    torch.save(files.checkpoint({"a": torch.ones(2)}), tmp_path / "model.pth")
    content = read_checkpoint(tmp_path / "model.pth")
    assert content["logging"]["ema_fg_dice"] == [0.5, 0.25]
    assert content["init_args"]["device"] == torch.device("cpu")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_a_damaged_checkpoint(tmp_path, damage):
    file = tmp_path / "model.pth"
    torch.save({"a": torch.ones(2000)}, file)
    if damage == "missing":
        file.unlink()
    elif damage == "text":
        file.write_text("no checkpoint")
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else 3000])
    with pytest.raises(ModelError, match="damaged, or is not one of PyTorch 1.6"):
        read_checkpoint(file)


def test_a_checkpoint_that_was_compressed_is_not_read(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    with pytest.raises(ModelError, match="compressed, which PyTorch never does"):
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(10**12),
        torch.ones(3).to_sparse(),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, device="meta"),
        "text",
    ],
    ids=["repeated", "sparse", "integer", "nowhere", "text"],
)
def test_only_plain_tensors_are_weights(tensor):
    with pytest.raises(ModelError, match="something else among its weights"):
        weights_in({"a": tensor}, str)
    with pytest.raises(ModelError, match="no weights where they should be"):
        weights_in([tensor], str)


def test_plans_that_ask_for_more_than_memory_are_refused_by_their_shapes(tmp_path):
    huge = files.architecture(features_per_stage=[65536] * 3)
    source = files.write_model(
        tmp_path / "source", plan=files.plans({"3d_fullres": files.configuration(architecture=huge)})
    )
    with pytest.raises(ModelError, match="do not fit the plan"):
        import_model(source, tmp_path / "model")
    deep = files.architecture(n_conv_per_stage=[10**9] * 3)
    files.write_model(source, plan=files.plans({"3d_fullres": files.configuration(architecture=deep)}))
    with pytest.raises(ModelError, match="n_conv_per_stage"):
        import_model(source, tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["../outside.json", "a/../../outside.json", "/outside.json", "C:/outside.json", "a\\..\\outside.json"]
)
def test_an_archive_whose_names_lead_out_of_it(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("plans.json", "{}")
        archive.writestr(name, "{}")
    with pytest.raises(ModelError, match="names that lead out of its folder"):
        import_model(tmp_path / "model.zip", tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]


def test_an_archive_with_a_link(tmp_path):
    link = zipfile.ZipInfo("plans.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ModelError, match="or links"):
        import_model(tmp_path / "model.zip", tmp_path / "model")


def test_a_zip_bomb(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plans.json", b" " * 2**24)
    assert (tmp_path / "model.zip").stat().st_size < 2**16
    monkeypatch.setattr(untrusted, "_extract", None)
    with pytest.raises(ModelError, match="unpack to more than 20 times their size"):
        import_model(tmp_path / "model.zip", tmp_path / "model")


def test_many_small_zip_bombs(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"fold_{number}/checkpoint_final.pth", b" " * 2**20)
    monkeypatch.setattr(untrusted, "_extract", None)
    with pytest.raises(ModelError, match="unpack to more than 20 times their size"):
        import_model(tmp_path / "model.zip", tmp_path / "model")


def test_an_archive_that_lies_about_sizes(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plans.json", b" " * 2**24)
    content = (tmp_path / "model.zip").read_bytes()
    lie = content.replace(struct.pack("<I", 2**24), struct.pack("<I", 1000))
    assert lie != content
    (tmp_path / "model.zip").write_bytes(lie)
    with (
        pytest.raises(ModelError, match="missing, damaged, encrypted or no zip file"),
        unpacked(tmp_path / "model.zip", lambda _: True),
    ):
        pass


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_with_one_name_twice_or_too_many(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("plans.json", "{}")
        archive.writestr("plans.json", "[]")
    with pytest.raises(ModelError, match="too many files, or one name twice"):
        import_model(tmp_path / "model.zip", tmp_path / "model")
    monkeypatch.setattr(untrusted, "MOST_MEMBERS", 1)
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        archive.writestr("a", "")
        archive.writestr("b", "")
    with pytest.raises(ModelError, match="too many files"):
        import_model(tmp_path / "many.zip", tmp_path / "model")


def test_a_checksum_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert checksum(tmp_path / "file").startswith("ba7816bf8f01cfea")
    assert np.frombuffer(bytes.fromhex(checksum(tmp_path / "file")), np.uint8).size == 32


SCALAR = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x0b\0\0\0V2147483647tRtR"
BYTEARRAY = b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR"
COPY = b"c_codecs\nencode\n(h\x01X\x06\0\0\0latin1tR"
LONG_TEXT = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x01"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"\x80\x02J\x01.", "damaged"),
        (b"\x80\x02J\0\0\0\0Q.", "damaged|refused"),
        (b"\x80\x02X\xff\xff\xff\xff.", "damaged"),
        (b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b".", "damaged|refused|no weights|fit together"),
        (b"\x80\x02](" + SCALAR * 100 + b"e.", "damaged"),
        (b"\x80\x02](" + BYTEARRAY * 100 + b"e.", "far more than its size"),
        (b"\x80\x02](" + LONG_TEXT + COPY * 300 + b"e.", "far more than its size"),
        (b"", "damaged"),
        (b".", "damaged|refused"),
    ],
)
def test_checkpoints_of_a_few_bytes(tmp_path, body, text):
    source = files.write_model(tmp_path / "source")
    with zipfile.ZipFile(source / "fold_0" / "checkpoint_final.pth", "w") as archive:
        for name, raw in (("data.pkl", body), ("byteorder", b"little"), ("data/0", bytes(64)), ("version", b"3\n")):
            archive.writestr(f"a/{name}", raw)
    with pytest.raises(ModelError, match=text):
        import_model(source, tmp_path / "model")


def test_a_damaged_lzma_member_and_a_name_that_is_not_utf_8(tmp_path):
    with zipfile.ZipFile(tmp_path / "l.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("plans.json", bytes(500))
    raw = bytearray((tmp_path / "l.zip").read_bytes())
    raw[44:49] = b"\xff" * 5  # the properties of the decoder, behind a name of ten letters
    (tmp_path / "l.zip").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "u.zip", "w") as archive:
        archive.writestr("\u00e9", b"1")
    (tmp_path / "u.zip").write_bytes((tmp_path / "u.zip").read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
    os.mkfifo(tmp_path / "pipe.zip")
    for name, text in (("l.zip", "damaged"), ("u.zip", "damaged"), ("pipe.zip", "neither")):
        with pytest.raises(ModelError, match=text):
            import_model(tmp_path / name, tmp_path / "model")
