"""Networks with attention: what it computes, how it adapts, and how far it sees."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from medseg.networks.attention import Attention, MixFFN, TransformerBlock
from medseg.networks.build import build_network
from medseg.networks.kinds import Network, SegFormerNumbers, TransUNetNumbers
from medseg.train.architectures import attention_heads, described, numbers_for

PLAIN = Network(
    features=(4, 6, 8),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    heads=1,
)
TRANS = TransUNetNumbers(unet=PLAIN, layers=2, attention_heads=2)
SEG = SegFormerNumbers(
    features=(4, 8),
    layers=(1, 2),
    attention_heads=(1, 2),
    kernels=((1, 3, 3), (3, 3, 3)),
    strides=((1, 4, 4), (2, 2, 2)),
    decoder_features=6,
)
KINDS = {"transunet": TRANS, "segformer": SEG}

each_kind = pytest.mark.parametrize("kind", KINDS)


def drawn(module: nn.Module) -> nn.Module:
    """Return a module whose weights are all drawn at random, those that begin at 0 too."""
    torch.manual_seed(0)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.5)
    return module.eval()


def test_attention_is_a_mean_of_values_weighed_by_the_softmax_of_products():
    attention = drawn(Attention(6, 2))
    tokens = torch.randn(1, 1, 1, 4, 6)
    query, key, value = (layer(tokens)[0, 0, 0] for layer in (attention.query, attention.key, attention.value))
    expected = []
    for half in (slice(0, 3), slice(3, 6)):
        weights = (query[:, half] @ key[:, half].T / math.sqrt(3)).exp()
        expected.append(weights / weights.sum(dim=1, keepdim=True) @ value[:, half])
    expected = attention.project(torch.cat(expected, dim=1))
    torch.testing.assert_close(attention(tokens)[0, 0, 0], expected)


def test_attention_without_positions_does_not_mind_the_order_of_voxels():
    attention = drawn(Attention(4, 2))
    tokens = torch.randn(2, 2, 3, 2, 4)
    order = torch.randperm(12)
    mixed = tokens.flatten(1, 3)[:, order].view(tokens.shape)
    expected = attention(tokens).flatten(1, 3)[:, order].view(tokens.shape)
    torch.testing.assert_close(attention(mixed), expected)


def test_keys_of_blocks_that_are_all_alike_are_the_keys_of_their_voxels():
    """A reduction that takes the first voxel of each block, normalized as whole attention sees them."""
    reduced, whole = drawn(Attention(4, 2, (1, 2, 2))), drawn(Attention(4, 2))
    whole.load_state_dict({name: weight for name, weight in reduced.state_dict().items() if "reduce" not in name})
    conv, norm = reduced.reduce
    with torch.no_grad():
        for weight in (conv.weight, conv.bias, norm.bias):
            weight.zero_()
        conv.weight[:, :, 0, 0, 0] = torch.eye(4)
        norm.weight.fill_(1)
    blocks = nn.functional.layer_norm(torch.randn(1, 2, 2, 3, 4), (4,))
    tokens = blocks.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(reduced(tokens), whole(tokens), rtol=1e-3, atol=1e-4)


def test_a_reduction_of_one_is_whole_attention():
    assert not list(Attention(4, 2, (1, 1, 1)).reduce.parameters())


def test_a_new_block_is_its_skips_and_has_the_size_of_its_image():
    block, image = build_network(TRANS, 1, 2).encoder[-1][-1], torch.randn(2, 8, 3, 4, 5)
    assert isinstance(block, TransformerBlock)
    torch.testing.assert_close(block(image), image)
    assert drawn(block)(image).shape == image.shape


def test_the_mlp_tells_equal_voxels_apart_by_the_border():
    mlp = drawn(MixFFN(4, 8, (3, 3, 3)))
    told = mlp(torch.ones(1, 5, 5, 5, 4))
    assert not torch.allclose(told[0, 0, 2, 2], told[0, 2, 2, 2])
    torch.testing.assert_close(told[0, 1, 2, 2], told[0, 2, 2, 2])


def test_linear_layers_begin_narrow():
    block = build_network(TransUNetNumbers(unet=PLAIN, layers=1, attention_heads=2, mlp_ratio=16), 1, 2).encoder[-1][-1]
    assert 0.015 < float(block.mlp.expand.weight.detach().std()) < 0.025
    assert not block.mlp.expand.bias.any()


def test_a_transunet_whose_blocks_add_nothing_is_the_unet():
    network = build_network(TRANS, 2, 3).eval()
    plain = build_network(PLAIN, 2, 3).eval()
    assert [len(stage) for stage in network.encoder] == [2, 2, 4]
    found = plain.load_state_dict(network.state_dict(), strict=False)
    assert not found.missing_keys
    assert all(name.startswith(("encoder.2.2", "encoder.2.3")) for name in found.unexpected_keys)
    image = torch.randn(1, 2, 6, 16, 16)
    torch.testing.assert_close(network(image), plain(image))
    nn.init.normal_(network.encoder[2][3].mlp.contract.weight)
    assert not torch.allclose(network(image), plain(image))


@each_kind
def test_a_change_in_one_corner_is_seen_in_the_other(kind):
    network = drawn(build_network(KINDS[kind], 1, 2))
    image = torch.randn(1, 1, 8, 48, 48)
    changed = image.clone()
    changed[..., 0, 0, 0] += 5
    with torch.inference_mode():
        moved = (network(changed) - network(image)).abs()[0, :, -1, -1, -1]
    assert float(moved.min()) > 1e-6


def test_maps_of_a_segformer_are_as_fine_as_its_strides_say():
    network = build_network(SEG, 1, 2)
    embeddings = [stage[0] for stage in network.stages]
    assert [embedding.kernel_size for embedding in embeddings] == [(1, 7, 7), (3, 3, 3)]
    image, sizes = torch.randn(1, 1, 4, 24, 16), []
    for stage in network.stages:
        image = stage(image)
        sizes.append(tuple(image.shape[1:]))
    assert sizes == [(4, 4, 6, 4), (8, 2, 3, 2)]
    assert SEG.reductions == ((2, 2, 2), (1, 1, 1))
    assert network.stages[0][2].attention.reduce[0].stride == (2, 2, 2)


def test_the_first_patches_of_a_segformer_are_as_flat_as_its_voxels_are_long():
    numbers = numbers_for((16, 128, 128), (5.0, 0.8, 0.8), 16, network="segformer")
    assert numbers.strides == ((1, 4, 4), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert numbers.reductions[0] == (4, 8, 8)
    assert build_network(numbers, 1, 2).stages[0][0].kernel_size == (3, 7, 7)


def test_a_segformer_of_a_large_patch_has_the_stages_of_the_paper():
    numbers = numbers_for((128, 128, 128), (1.0, 1.0, 1.0), 16, network="segformer")
    assert numbers.strides == ((4, 4, 4), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert [max(reduction) for reduction in numbers.reductions] == [8, 4, 2, 1]
    assert numbers.features == (32, 64, 128, 256)
    assert numbers.attention_heads == (1, 2, 4, 8)


@each_kind
def test_sizes_and_widths_are_followed(kind):
    patch, spacing = (32, 48, 32), (1.0, 1.0, 1.0)

    def weights(**options) -> int:
        numbers = numbers_for(patch, spacing, 4, network=kind, **options)
        return sum(weight.numel() for weight in build_network(numbers, 1, 2).parameters())

    small, medium, large = (weights(size=size) for size in "SML")
    assert small < medium < large
    assert weights(width=6) > medium
    assert weights(depth=2) < medium


def test_a_plan_says_what_they_are():
    words = described(TRANS)
    assert words.startswith("transunet: 3 resolutions, features 4 x 6 x 8")
    assert words.endswith("2 transformer blocks of 2 attention heads in the bottleneck")
    assert described(SEG) == (
        "segformer: features 4 x 8, transformer blocks 1 x 2, attention heads 1 x 2, strides 1x4x4, 2x2x2"
    )


@pytest.mark.parametrize(("width", "heads"), [(4, 1), (32, 1), (128, 4), (152, 4), (136, 4), (67, 1), (65536, 64)])
def test_heads_divide_the_width(width, heads):
    assert attention_heads(width) == heads


@each_kind
@pytest.mark.parametrize("field", ["attention_heads", "mlp_ratio"])
def test_heads_that_do_not_fit_and_nonsense_are_refused(kind, field):
    numbers = KINDS[kind].model_dump()
    wrong = {"attention_heads": {"transunet": 3, "segformer": (1, 3)}[kind], "mlp_ratio": 10**9}[field]
    with pytest.raises(ValidationError, match=field):
        type(KINDS[kind]).model_validate(numbers | {field: wrong})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": (1,)}, "one entry per stage"),
        ({"kernels": ((2, 3, 3), (3, 3, 3))}, "kernels are odd"),
        ({"strides": ((1, 64, 64), (1, 64, 64))}, "at most 512"),
        ({"features": (10**7, 8)}, "features"),
    ],
)
def test_a_segformer_that_contradicts_itself_is_refused(change, said):
    with pytest.raises(ValidationError, match=said):
        SegFormerNumbers.model_validate(SEG.model_dump() | change)
