"""The paper's supersampling network."""

from __future__ import annotations

from torch import Tensor, nn


class ConvolutionReLU(nn.Sequential):
    """A convolution that keeps the image's size, then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding="same"), nn.ReLU()
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, their output added to their input."""

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
            nn.Conv2d(narrow, 3, 5, padding="same"),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
