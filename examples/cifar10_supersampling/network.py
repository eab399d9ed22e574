"""The paper's supersampling network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def _bfloat16_is_slow() -> bool:
    """Whether autocast asks for bfloat16 of a CPU without instructions for it.

    PyTorch 2.14 convolves in bfloat16 ten times slower than in float32 there.
    """
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    onednn = torch.backends.mkldnn.is_available()
    return not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Convolution(nn.Conv2d):
    """A convolution that keeps the image's size, with weights [out, height, width, in].

    On a CPU, convolutions are fastest with this memory layout. Weights of
    ``to(memory_format=torch.channels_last)`` have this layout, too, but are not contiguous. So
    a fused optimizer copies the weights, their gradients and its moments at each step.

    Attributes:
        as_product: convolve by one matrix product. `torch.vmap` over many networks then makes one
            product of stacked matrices instead of a grouped convolution. Grouped convolutions of
            PyTorch 2.14 have wrong gradients in float64 on a CPU for groups with one image.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding="same")
        self.weight = nn.Parameter(self.weight.detach().permute(0, 2, 3, 1).contiguous())
        self.as_product = False

    @property
    def kernel(self) -> Tensor:
        """The weights as [out, in, height, width]."""
        return self.weight.permute(0, 3, 1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve features, [batch, in, height, width]."""
        if self.as_product:
            return self._product(features)
        if features.device.type == "cpu" and _bfloat16_is_slow():
            return self._rounded(features)
        return self._conv_forward(features, self.kernel, self.bias)

    def _rounded(self, features: Tensor) -> Tensor:
        """Convolve in float32 what is rounded to bfloat16, and round the result.

        Products in bfloat16 are summed in float32, too, so results and gradients are the same but
        for the order of the sums.
        """

        def rounded(values: Tensor) -> Tensor:
            return values.bfloat16().float()

        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else rounded(self.bias)
            return self._conv_forward(rounded(features), rounded(self.kernel), bias).bfloat16()

    def _product(self, features: Tensor) -> Tensor:
        rows, columns = self.kernel_size
        around = (columns // 2, columns // 2, rows // 2, rows // 2)
        patches = functional.pad(features, around).unfold(2, rows, 1).unfold(3, columns, 1)
        convolved = torch.einsum("bihwyx,oyxi->bohw", patches, self.weight)
        if self.bias is None:
            return convolved
        return convolved + self.bias.to(convolved.dtype)[:, None, None]


class ConvolutionReLU(nn.Sequential):
    """A convolution that keeps the image's size, then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(Convolution(in_channels, out_channels, kernel_size), nn.ReLU())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; their output is added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvolutionReLU(channels, channels, 3), ConvolutionReLU(channels, channels, 3)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape, [batch, channels, height, width]."""
        residual: Tensor = self.body(features)
        return features + residual


class SupersamplingNetwork(nn.Sequential):
    """Convolution 5x5x64 and 3x3x128, three residual blocks, 3x3x64, and a linear 5x5x3.

    Weights start as Glorot and Bengio's uniform ("Xavier"), biases at zero. Images are
    [batch, 3, height, width], in and out.

    Args:
        width: factor on the number of channels; 1 is the paper's network.
    """

    def __init__(self, width: float = 1.0) -> None:
        if not width > 0:
            raise ValueError(f"width must be a number above 0, got {width!r}")
        narrow, wide = max(1, round(64 * width)), max(1, round(128 * width))
        super().__init__(
            ConvolutionReLU(3, narrow, 5),
            ConvolutionReLU(narrow, wide, 3),
            ResidualBlock(wide),
            ResidualBlock(wide),
            ResidualBlock(wide),
            ConvolutionReLU(wide, narrow, 3),
            Convolution(narrow, 3, 5),
        )
        for layer in self.modules():
            if isinstance(layer, Convolution):
                # Drawing in place would follow the memory order, and change the network of a seed.
                drawn = nn.init.xavier_uniform_(torch.empty(layer.kernel.shape))
                layer.kernel.detach().copy_(drawn)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
