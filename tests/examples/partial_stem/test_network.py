import pytest
import torch
from torch import nn

from examples.partial_stem.network import (
    Convolution,
    Discriminators,
    Generator,
    blurred,
    halved,
    patches_of,
    scaled,
)


def parameters(module):
    return sum(each.numel() for each in module.parameters())


@pytest.mark.parametrize("side", [32, 96])
def test_completions_have_half_and_full_size(side):
    scan, mask = torch.randn(2, 1, side, side), torch.ones(2, 1, side, side)
    completion = Generator(1 / 32)(scan, mask)
    assert completion.outer.shape == (2, 1, side, side)
    assert completion.inner.shape == (2, 1, side // 2, side // 2)


def test_the_width_scales_all_networks():
    assert scaled(64, 0.125) == 8
    assert scaled(32, 0.001) == 1
    for network in (Generator, Discriminators):
        assert parameters(network(0.25)) / parameters(network(0.125)) == pytest.approx(4, rel=0.1)
    with torch.device("meta"):
        channels = {each.out_channels for each in Generator(1).modules() if hasattr(each, "stride")}
    assert channels == {1, 32, 64, 128, 256, 512, 768}


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_a_convolution_keeps_the_size_of_its_features(kernel_size, scale):
    torch.manual_seed(0)
    layer = Convolution(64, 64, kernel_size, scale)
    found = layer(torch.randn(1, 64, 32, 32))
    assert found.shape == (1, 64, 32 * scale, 32 * scale)
    assert found.square().mean().item() == pytest.approx(1, rel=0.5)
    assert (found < 0).any()


def test_discriminators_judge_each_sample_by_itself():
    torch.manual_seed(0)
    net = Discriminators(1 / 16).eval()
    patches = [torch.randn(3, 1, 32, 32) for _ in range(3)]
    said = net(patches)
    alone = net([each[1:2] for each in patches])
    assert [each.shape for each in said] == [(3,)] * 3
    for whole, one in zip(said, alone, strict=True):
        assert whole[1].item() == pytest.approx(one.item(), rel=1e-4)
    assert len({round(each[0].item(), 4) for each in said}) == 3


def test_discriminators_have_spectral_norms_of_one():
    torch.manual_seed(0)
    net = Discriminators(1 / 8).train()
    for _ in range(30):  # each pass is a power iteration
        net([torch.randn(1, 1, 32, 32)] * 3)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
            assert norm == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("side", "patch"), [(32, 32), (96, 32), (512, 64)])
def test_patches_are_cut_from_all_images_at_the_same_place(side, patch):
    image = torch.arange(float(side**2)).view(1, 1, side, side)
    for scale, (one, other) in zip((1, 2, 4), patches_of(image, image + 1), strict=True):
        assert one.shape == (1, 1, patch, patch)
        assert torch.allclose(other - one, torch.ones(()), atol=0.1)
        factor = min(scale * patch, side) / patch
        assert (one[..., 0, 1] - one[..., 0, 0]).item() == pytest.approx(factor, rel=0.4)


def test_halving_and_blurring_are_means():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert halved(image).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    flat = blurred(torch.full((1, 1, 8, 8), 3.0))
    assert torch.allclose(flat, torch.tensor(3.0))
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1
    spread = blurred(point)[0, 0]
    assert spread.sum().item() == pytest.approx(1)
    assert (spread > 0).sum() == 25
    ratio = torch.exp(torch.tensor(-4 / (2 * 2.5**2)))
    assert (spread[4, 6] / spread[4, 4]).item() == pytest.approx(ratio.item(), rel=1e-4)
