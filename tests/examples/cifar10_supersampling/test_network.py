import copy

import pytest
import torch
from torch import nn

from examples.cifar10_supersampling import network as implementation
from examples.cifar10_supersampling.network import Convolution, ResidualBlock, SupersamplingNetwork


def convolutions(network):
    return [layer for layer in network.modules() if isinstance(layer, Convolution)]


def test_the_papers_layers():
    shapes = [tuple(layer.kernel.shape) for layer in convolutions(SupersamplingNetwork(1.0))]
    assert shapes == [
        (64, 3, 5, 5),
        (128, 64, 3, 3),
        *[(128, 128, 3, 3)] * 6,
        (64, 128, 3, 3),
        (3, 64, 5, 5),
    ]


def test_a_convolution_equals_pytorchs():
    torch.manual_seed(0)
    layer = Convolution(3, 4, 5)
    features = torch.randn(2, 3, 8, 8)
    expected = nn.functional.conv2d(features, layer.kernel.contiguous(), layer.bias, padding="same")
    torch.testing.assert_close(layer(features), expected)


@pytest.mark.parametrize("slow", [False, True])
def test_a_convolution_in_bfloat16_is_rounded_once(slow, monkeypatch):
    monkeypatch.setattr(implementation, "_bfloat16_is_slow", lambda: slow)
    torch.manual_seed(0)
    layer = Convolution(8, 16, 3)
    features = torch.randn(1, 8, 16, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        convolved = layer(features)
    assert convolved.dtype == torch.bfloat16
    convolved.float().sum().backward()

    def rounded(values):
        return values.detach().bfloat16().double().requires_grad_()

    inputs, kernel, bias = rounded(features), rounded(layer.kernel), rounded(layer.bias)
    expected = nn.functional.conv2d(inputs, kernel, bias, padding="same")
    expected.sum().backward()
    half_a_step = {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(convolved.double(), expected, **half_a_step)
    if slow:  # Some CPUs sum gradients in bfloat16.
        torch.testing.assert_close(features.grad.double(), inputs.grad, **half_a_step)
        weight = layer.weight.grad.permute(0, 3, 1, 2)
        torch.testing.assert_close(weight.double(), kernel.grad, **half_a_step)
        torch.testing.assert_close(layer.bias.grad.double(), bias.grad, **half_a_step)


def test_only_a_cpu_that_lacks_bfloat16_rounds():
    assert not implementation._bfloat16_is_slow()
    with torch.autocast("cpu", torch.float16):
        assert not implementation._bfloat16_is_slow()
    with torch.autocast("cpu", torch.bfloat16):
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert implementation._bfloat16_is_slow() is not native


@pytest.mark.parametrize("bf16", [False, True])
def test_a_fused_optimizer_has_nothing_to_copy(bf16):
    network = SupersamplingNetwork(0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        network(torch.randn(2, 3, 32, 32)).mean().backward()
    for layer in convolutions(network):
        assert layer.kernel.is_contiguous(memory_format=torch.channels_last)
        assert layer.weight.is_contiguous()
        assert layer.weight.grad.is_contiguous()


def test_xavier_weights_and_zero_biases():
    for layer in convolutions(SupersamplingNetwork(0.5)):
        outputs, inputs, *kernel = layer.kernel.shape
        bound = (6 / ((inputs + outputs) * kernel[0] * kernel[1])) ** 0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not layer.bias.any()


def test_residual_block_adds_to_its_input():
    block = ResidualBlock(4)
    features = torch.randn(2, 4, 8, 8)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(block(features), features)


def test_images_keep_their_shape_and_the_last_layer_is_linear():
    torch.manual_seed(0)
    restored = SupersamplingNetwork(0.1)(torch.randn(2, 3, 32, 32))
    assert restored.shape == (2, 3, 32, 32)
    assert restored.min() < 0


@pytest.mark.parametrize("width", [0, -1, float("nan")])
def test_a_wrong_width_raises(width):
    with pytest.raises(ValueError, match=f"width must be a number above 0, got {width}"):
        SupersamplingNetwork(width)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_stacked_networks_of_matrix_products_give_each_networks_result(batch_size):
    networks = [SupersamplingNetwork(0.05).double() for _ in range(3)]
    skeleton = copy.deepcopy(networks[0])
    for layer in skeleton.modules():
        if isinstance(layer, Convolution):
            layer.as_product = True
    weights, _ = torch.func.stack_module_state(networks)
    images = torch.randn(3, batch_size, 3, 8, 8, dtype=torch.float64)
    restored = torch.vmap(lambda own, of: torch.func.functional_call(skeleton, own, (of,)))(
        weights, images
    )
    gradients = torch.autograd.grad(restored.square().sum(), list(weights.values()))
    for index, network in enumerate(networks):
        expected = network(images[index])
        torch.testing.assert_close(restored[index], expected)
        theirs = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
        for ours, their in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(ours[index], their, rtol=1e-10, atol=1e-10)
