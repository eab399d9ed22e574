"""Pictures of samples, converted to the 8-bit images that dashboards show.

``wandb.Image`` keeps only the lowest eight bits of each number. Without a conversion, floats in
[0, 1] would be black, and 16-bit numbers would be taken modulo 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lightning_alrc._spikes.record import Spike
from lightning_alrc._trainer.rank_zero import rank_zero_warn

__all__ = ["Renderer", "displayable"]

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""The modes of PIL images that a PNG file stores unchanged."""

NUMBER_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")
"""The modes of PIL images whose pixels are floats, or integers of more than 8 bits."""


class Renderer:
    """Makes the pictures of spikes with the user's function.

    Args:
        render: returns a spike's picture, in a form that :func:`displayable` takes, or ``None``.
    """

    def __init__(self, render: Callable[[Spike], Any]) -> None:
        self._render = render
        self.has_warned = False
        """whether this fit has warned of a failure"""

    def images(self, spikes: Iterable[Spike], convert: Callable[[Any], Any]) -> list[Any]:
        """The picture of each spike, in order; ``None`` for no picture, or if ``render`` fails.

        Args:
            spikes: the spikes.
            convert: converts what :func:`displayable` returns to what a dashboard shows.
        """
        images = []
        for spike in spikes:
            try:
                picture = self._render(spike)
                images.append(None if picture is None else convert(displayable(picture)))
            except Exception as error:  # one missing file must not cost the other pictures
                images.append(None)
                if not self.has_warned:
                    rank_zero_warn(
                        f"a spike has no picture, because render failed: {error!r}, for {spike}"
                    )
                self.has_warned = True
        return images


def displayable(picture: Any) -> Any:
    """A picture with 8 bits a channel, for ``wandb.Image``.

    Args:
        picture: one of

            - a tensor [channels, height, width] or [height, width];
            - a NumPy array or nested lists, [height, width, channels] or [height, width];
            - a PIL image.

            Further leading dimensions must have size 1.

    Returns:
        Usually an array. Bools, and floats in [0, 1], are scaled to the range from 0 to 255.
        Floats outside [0, 1] are clamped, and NaN is black. Unsigned 16-bit integers are scaled so
        that 65,535 becomes 255. Other integers are scaled only if a value is above 255. In this
        case, the number that becomes 255 is 65,535, or the largest value if it is above 65,535.
        Negative integers are black. A PIL image with more than 8 bits a channel is treated like an
        array. A PIL image in a mode that PNG cannot store is converted to RGB. Anything else is
        returned unchanged.
    """
    import numpy as np
    from PIL.Image import Image

    if isinstance(picture, Image):
        if picture.mode in EIGHT_BIT_MODES:
            return picture
        if picture.mode not in NUMBER_MODES:
            return picture.convert("RGB")
        picture = np.asarray(picture)
    if isinstance(picture, np.ndarray) and picture.dtype == object:
        picture = picture.tolist()  # for a 0-d array, the object in it
        if not isinstance(picture, list):
            return displayable(picture)
    if isinstance(picture, (list, tuple)):
        picture = np.asarray(picture)
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        if picture.is_floating_point():
            picture = picture.float()  # NumPy has no bfloat16
        while picture.ndim > 3 and len(picture) == 1:
            picture = picture[0]
        picture = (picture.movedim(0, -1) if picture.ndim == 3 else picture).numpy()
    if not isinstance(picture, np.ndarray):
        return picture
    while picture.ndim > 3 and len(picture) == 1:
        picture = picture[0]
    return _to_bytes(picture)


def _to_bytes(picture: Any) -> Any:
    """An array of uint8, of the same shape."""
    import numpy as np

    kind = picture.dtype.kind
    if kind not in "fbui" or picture.dtype == np.uint8:
        return picture
    largest = 1.0
    if kind in "ui":
        is_wide = picture.dtype == np.uint16 or picture.max() > 255
        largest = 255.0 if not is_wide else max(65535.0, float(picture.max()))
    unit = np.nan_to_num(picture.astype(np.float64) / largest).clip(0, 1)
    return (unit * 255).round().astype(np.uint8)
