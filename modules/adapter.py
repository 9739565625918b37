"""ST-Adapter's temporal adapter (Pan et al., 2022): a bottleneck with a convolution over time."""

from __future__ import annotations

from torch import Tensor, nn

from modules import ModelError
from modules.linear import Linear


class TemporalAdapter(nn.Module):
    """A(a) = fc2(conv(fc1(a))), the convolution depth-wise and over time only.

    It starts as fc2's zero bias, that is as nothing: the convolution's weight and bias are 0.

    Args:
        width: D_v.
        channels: C of the bottleneck.
        kernel_size: k frames, odd; zeros are padded at both ends of the video.

    Raises:
        ModelError: an even kernel, which would shift the frames.
    """

    def __init__(self, width: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ModelError(f"temporal kernel size must be odd and positive: {kernel_size}")
        self.fc1 = Linear(width, channels)
        self.conv = nn.Conv2d(
            channels, channels, (kernel_size, 1), padding=(kernel_size // 2, 0), groups=channels
        )
        self.fc2 = Linear(channels, width)
        for parameter in (self.conv.weight, self.conv.bias, self.fc1.bias, self.fc2.bias):
            nn.init.zeros_(parameter)

    def forward(self, patches: Tensor, num_frames: int) -> Tensor:
        """Mix every patch position over time: [B·N_f, G², D_v] to the same shape."""
        x = self.fc1(patches).unflatten(0, (-1, num_frames))  # [B, N_f, G², C]
        # Seen as an image of N_f × G² pixels this is channels-last already: the convolution copies
        # nothing, and is 5 to 10 times faster than a sum of shifted products on a CPU.
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(x.flatten(0, 1))
