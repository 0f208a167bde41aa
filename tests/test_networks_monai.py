"""MONAI's networks in medseg: where their last layers are, images of any size, and the sizes that are planned."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from medseg.errors import UsageError
from medseg.networks.build import build_network
from medseg.networks.layers import is_head
from medseg.networks.monai_kinds import (
    MonaiDynUNet,
    MonaiMedNeXt,
    MonaiSegResNet,
    MonaiUNet,
)
from medseg.train.architectures import Frame, mednext, segresnet

DYNUNET = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (4, 8, 8)}
KINDS = [
    MonaiUNet(channels=(4, 8, 8), strides=(2, 2), num_res_units=1),
    MonaiSegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
    MonaiDynUNet(**DYNUNET, deep_supervision=True),
    MonaiMedNeXt(init_filters=4, kernel_size=3, deep_supervision=True, blocks_down=(1, 1), blocks_up=(1, 1)),
]
each_kind = pytest.mark.parametrize("numbers", KINDS, ids=lambda numbers: numbers.kind)


@each_kind
def test_the_last_layers_are_those_whose_shape_depends_on_the_outputs(numbers):
    """But for activations behind them, which have the same shape for all outputs."""
    few, more = (build_network(numbers, 1, outputs) for outputs in (3, 4))
    other = more.state_dict()
    for name, weight in few.state_dict().items():
        behind = numbers.kind == "monai_unet" and name.endswith("adn.A.weight")
        assert behind or is_head(few, name) == (weight.shape != other[name].shape), name


@each_kind
def test_odd_images_keep_their_size_in_training_and_in_use(numbers):
    torch.manual_seed(0)
    network, image = build_network(numbers, 1, 3), torch.randn(1, 1, 15, 18, 13)
    with torch.no_grad():
        used, taught = network.eval()(image), network.train()(image)
    heads = taught if isinstance(taught, list) else [taught]
    assert used.shape == heads[0].shape == (1, 3, 15, 18, 13)
    assert isinstance(taught, list) == getattr(numbers, "deep_supervision", False)
    torch.testing.assert_close(heads[0], used)


def frame(widest, depth=None, width=16):
    return Frame(widest=widest, spacing_mm=(1.0, 1.0, 1.0), width=width, depth=depth)


@pytest.mark.parametrize(
    ("widest", "levels"),
    [((32, 48, 32), 4), ((16, 128, 128), 5), ((10, 12, 10), 2), ((3, 3, 3), 2), ((1, 256, 256), 2), ((512,) * 3, 7)],
    ids=str,
)
def test_all_axes_are_halved_while_the_map_keeps_four_voxels_on_average(widest, levels):
    numbers = segresnet(frame(widest))
    assert len(numbers.blocks_down) == levels
    assert numbers.divisor == (2 ** (levels - 1),) * 3
    assert mednext(frame(widest)).divisor == numbers.divisor


def test_depth_and_width_are_those_that_are_asked_for():
    assert segresnet(frame((32, 48, 32), depth=2)).blocks_down == (1, 2)
    assert mednext(frame((32, 48, 32), depth=3)).blocks_up == (2, 2)
    assert segresnet(frame((32, 48, 32), width=6)).norm == ("GROUP", {"num_groups": 2})
    for rule in (segresnet, mednext):
        for depth in (1, 5):
            with pytest.raises(UsageError, match=f"2 to 4 resolutions, and not {depth}"):
                rule(frame((32, 48, 32), depth=depth))


def test_a_mednext_of_a_single_voxel_is_refused():
    with pytest.raises(UsageError, match="over 2 voxels"):
        mednext(frame((2, 2, 2)))


def test_contradictory_numbers_of_a_mednext_are_refused():
    with pytest.raises(ValidationError, match="one entry per resolution"):
        MonaiMedNeXt(blocks_down=(2, 2), blocks_up=(2,))
    with pytest.raises(ValidationError, match="one entry per resolution"):
        MonaiMedNeXt(blocks_down=(2, 2), blocks_up=(2, 2), encoder_expansion_ratio=(2, 2, 2))
