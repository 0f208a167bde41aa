"""Runtimes: the same logits from each, the cache of compiled networks, and what cannot be chosen."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import Threshold, tiny_plan
from torch import Tensor, nn

from medseg.errors import UsageError
from medseg.model import runtime_cache
from medseg.model.runtime import PACKAGES, make_runtime
from medseg.model.runtime_cache import fingerprint, read, write
from medseg.networks.build import build_network, placed

CPU = torch.device("cpu")
PLAN = tiny_plan()


def needs(runtime: str) -> pytest.MarkDecorator:
    missing = [package for package in PACKAGES[runtime] if find_spec(package) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not installed: pip install medseg[{runtime}]"
    )


each_runtime = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in PACKAGES])


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return placed(build_network(PLAN.network, 1, PLAN.outputs), CPU).eval()


def one_layer(seed: int = 0) -> nn.Module:
    """Return a network that is converted in no time."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, PLAN.outputs, 3, padding=1)).eval()


def patches(count: int = 1) -> Tensor:
    """Return noise on a slope, cut out of something larger, as the sliding window does."""
    torch.manual_seed(1)
    return torch.randn(count, 1, 20, 16, 8)[:, :, 2:18] + torch.linspace(-2, 2, 16)[:, None]


def mean_logits(networks: Sequence[nn.Module], images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.stack([network(images) for network in networks]).mean(dim=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache" / "networks"
    monkeypatch.setattr(runtime_cache, "folder", lambda: folder)
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return the networks that are converted from now on."""
    from medseg.model import runtime_openvino

    convert, converted = runtime_openvino._converted, []

    def counted(network: nn.Module, *others: object) -> object:
        converted.append(network)
        return convert(network, *others)

    monkeypatch.setattr(runtime_openvino, "_converted", counted)
    return converted


@each_runtime
def test_every_runtime_gives_the_logits_of_torch(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    networks, images = [network(0), network(1)], patches(2)
    runtime = make_runtime(PLAN, networks, device=CPU, runtime=name)
    logits, expected = runtime(images), mean_logits(networks, images)
    assert logits.shape == (2, PLAN.outputs, *PLAN.patch)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits.argmax(dim=1) == expected.argmax(dim=1)).double().mean() > 0.9999
    torch.testing.assert_close(runtime(images[1:]), logits[1:], rtol=0, atol=1e-4)
    assert (runtime.name, runtime.precision, runtime.device) == (name, "float32", CPU)
    assert set(runtime.versions) == {"torch", PACKAGES[name][0]}
    assert capfd.readouterr() == ("", "")


@needs("openvino")
@pytest.mark.parametrize(
    "layer",
    [
        Threshold(0.5),
        nn.Conv3d(1, 2, 1),
        nn.Conv3d(1, 2, 1, bias=False),
        nn.Conv3d(1, 2, 1, padding=1),
        nn.Sequential(nn.Conv3d(1, 4, 1), nn.Conv3d(4, 2, 1, groups=2), nn.GroupNorm(1, 2)),
    ],
    ids=["slices", "pointwise", "no bias", "padded", "groups"],
)
def test_openvino_takes_any_layer(layer: nn.Module) -> None:
    net = nn.Sequential(layer).eval()
    with torch.inference_mode():
        logits = make_runtime(PLAN, [net], device=CPU, runtime="openvino")(patches())
    torch.testing.assert_close(logits, mean_logits([net], patches()), rtol=1e-5, atol=1e-5)


@needs("openvino")
def test_conversion_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    modules, expected = list(net.modules()), mean_logits([net], patches())
    make_runtime(PLAN, [net], device=CPU, runtime="openvino")
    with pytest.raises(RuntimeError, match="tracing"):
        make_runtime(tiny_plan(patch=(4, 4, 4)), [net], device=CPU, runtime="openvino")
    assert all(one is other for one, other in zip(modules, net.modules(), strict=True))
    assert torch.equal(mean_logits([net], patches()), expected)


def test_the_default_is_openvino_on_a_cpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = find_spec("openvino") is not None
    assert make_runtime(PLAN, [network()], device=CPU).name == ("openvino" if there else "torch")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert make_runtime(PLAN, [network()], device=CPU).name == "torch"


@pytest.mark.parametrize(("device", "precision"), [("cpu", "float32"), ("mps", "float32"), ("cuda", "float16")])
def test_torch_takes_the_precision_that_suits_the_device(device: str, precision: str) -> None:
    runtime = make_runtime(PLAN, [network()], device=torch.device(device), runtime="torch")
    assert (runtime.name, runtime.precision) == ("torch", precision)


@pytest.mark.parametrize(
    ("device", "options", "match"),
    [
        ("cpu", {"runtime": "tensorrt"}, "There is no runtime 'tensorrt'.* torch, openvino, onnx"),
        ("cuda", {"runtime": "openvino"}, "runs on the CPU and not on cuda"),
        ("cpu", {"runtime": "torch", "precision": "float16"}, "does not compute in float16.* say float32"),
        ("mps", {"precision": "int8"}, "does not compute in int8.* say float32 or float16"),
        ("cpu", {"threads": 0}, "at least one thread; here it is 0"),
    ],
)
def test_what_cannot_be_chosen(device: str, options: dict[str, str], match: str) -> None:
    if options.get("runtime") == "openvino" and find_spec("openvino") is None:
        pytest.skip("openvino is not installed: pip install medseg[openvino]")
    with pytest.raises(UsageError, match=match):
        make_runtime(PLAN, [network()], device=torch.device(device), **options)


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_a_runtime_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name][-1], None)
    with pytest.raises(UsageError, match=rf'not installed. Install it with: pip install "medseg\[{name}\]"') as caught:
        make_runtime(PLAN, [network()], device=CPU, runtime=name)
    assert caught.value.reason == "not_installed"


def test_torch_uses_the_threads_that_it_is_given_and_no_longer_than_it_runs() -> None:
    class Count(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            if len(image) > 1:
                raise RuntimeError("broken")
            return image + torch.get_num_threads()

    before = torch.get_num_threads()
    runtime = make_runtime(PLAN, [Count()], device=CPU, runtime="torch", threads=before + 2)
    assert runtime(torch.zeros(1, 1, 2, 2, 2)).unique().item() == runtime.threads == before + 2
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="broken"):
        runtime(torch.zeros(2, 1, 2, 2, 2))
    assert torch.get_num_threads() == before


@needs("openvino")
def test_openvino_is_compiled_as_it_was_asked(conversions: list[nn.Module]) -> None:
    from medseg.model import runtime_openvino

    for _ in range(2):  # converted, then from the cache
        compiled = runtime_openvino._compiled(network(), PLAN, "float32", 1)
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
        assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert len(conversions) == 1
    operations = {node.get_type_name() for node in runtime_openvino._converted(network(), PLAN).get_ops()}
    assert {"MVN", "MatMul"} <= operations
    assert "GroupNormalization" not in operations


@needs("openvino")
@pytest.mark.parametrize(
    ("able", "expected"), [(["FP32", "INT8"], ("float32",)), (["BF16", "FP16"], ("float32", "float16", "bfloat16"))]
)
def test_openvino_offers_what_the_cpu_can(
    able: list[str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.model import runtime_openvino

    monkeypatch.setattr(runtime_openvino._openvino().Core, "get_property", lambda *_: able)
    assert runtime_openvino.precisions() == expected


@needs("openvino")
def test_a_network_is_compiled_once(conversions: list[nn.Module], cache: Path) -> None:
    def run(seed: int) -> Tensor:
        return make_runtime(PLAN, [one_layer(seed)], device=CPU, runtime="openvino")(patches())

    first = run(seed=0)
    assert torch.equal(run(seed=0), first)
    assert len(conversions) == len(list(cache.iterdir())) == 1
    assert not torch.equal(run(seed=1), first)
    assert len(conversions) == len(list(cache.iterdir())) == 2


@needs("openvino")
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "foreign"])
def test_a_damaged_cache_is_replaced(damage: str, conversions: list[nn.Module], cache: Path) -> None:
    expected = make_runtime(PLAN, [one_layer()], device=CPU, runtime="openvino")(patches())
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    foreign = pickle.dumps(Dangerous())
    file.write_bytes(
        {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:middle],
            "empty": b"",
            "foreign": hashlib.sha256(foreign).digest() + foreign,
        }[damage]
    )
    for _ in range(2):
        assert torch.equal(make_runtime(PLAN, [one_layer()], device=CPU, runtime="openvino")(patches()), expected)
    assert len(conversions) == 2


class Dangerous:
    """Fails the test where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("code from the cache was run",)


@needs("openvino")
def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(runtime_cache, "folder", lambda: tmp_path / "file" / "networks")
    assert make_runtime(PLAN, [one_layer()], device=CPU, runtime="openvino")(patches()).isfinite().all()


def test_without_a_home_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_cache, "folder", lambda: Path("~/.cache/medseg/networks"))
    monkeypatch.chdir(tmp_path)
    write("a", b"content")
    assert (list(tmp_path.iterdir()), read("a")) == ([], None)


@needs("onnx")
def test_onnx_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("exported again")

    first = make_runtime(PLAN, [Threshold(0.5)], device=CPU, runtime="onnx")
    monkeypatch.setattr(torch.onnx, "export", broken)
    again = make_runtime(PLAN, [Threshold(0.5)], device=CPU, runtime="onnx", threads=1)
    assert torch.equal(first(patches()), again(patches()))


def test_the_name_of_a_network_covers_all_that_it_computes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = network()
    with torch.no_grad():
        next(changed.parameters()).flatten()[0] += 1e-6
    steeper = network()
    next(module for module in steeper.modules() if isinstance(module, nn.LeakyReLU)).negative_slope = 0.02
    names = {
        fingerprint(network()),
        fingerprint(network(), PLAN.patch),
        fingerprint(network(), (8, 16, 16)),
        fingerprint(changed),
        fingerprint(steeper),
        fingerprint(Threshold(1.0)),
        fingerprint(Threshold(2.0)),
    }
    assert len(names) == 7
    assert fingerprint(network()) in names
    (tmp_path / "networks.py").write_text("other code")
    monkeypatch.setattr(runtime_cache, "__file__", str(tmp_path / "runtime_cache.py"))
    assert fingerprint(network()) not in names


def test_the_cache_keeps_what_was_used_last(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_cache, "KEPT", 2)
    for age, name in enumerate(("a", "b")):
        write(name, name.encode())
        os.utime(cache / name, (age, age))
    assert read("a") == b"a"
    write("c", b"c")
    assert read("b") is None
    assert {file.name for file in cache.iterdir()} == {"a", "c"}


def test_writers_at_the_same_time_leave_one_whole_file() -> None:
    contents = [bytes([value]) * 100_000 for value in range(8)]
    write("name", contents[0])

    def write_and_read(content: bytes) -> bytes | None:
        write("name", content)
        return read("name")

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write_and_read, contents * 4)) <= set(contents)


@needs("openvino")
@needs("onnx")
def test_no_runtime_reports_to_anybody(tmp_path: Path) -> None:
    code = """
import sys
from medseg.model.runtime_onnx import _onnxruntime
from medseg.model.runtime_openvino import _openvino
_openvino().Core(), _onnxruntime().SessionOptions()
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
from openvino.tools.ovc import telemetry_utils
assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
"""
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*"))
