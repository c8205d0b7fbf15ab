"""Traditional augmentation of a whole batch at once: one resampling and one colour transform for every tile.

`traditional` is what dermatology classifiers do (flips, quarter turns, a small affine, colour jitter); `dihedral` only
flips and turns, which need no resampling. A tile has no up or down, so all eight views are equally likely.
Proven by tests/classify/test_augment.py against torchvision's functions.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lesion.tiles import views

NAMES = ("traditional", "dihedral", "none")
ANGLE, SCALE, SHIFT, SHEAR = 20.0, 0.15, 0.06, 5.0  # degrees, relative, share of the side, degrees: uniform in +-
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.15, 0.15, 0.15, 0.03  # relative; hue in turns
TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))  # first row: grey
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights expect


def augment(images_u8: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Randomly changed, normalised pixels [B,3,R,R] fp32 channels-last of `images_u8` [B,R,R,3] uint8.

    All random numbers come from `generator`, drawn on the CPU, so that they are the same on every device.
    """
    if name == "none":
        return normalise(images_u8)
    count, where = len(images_u8), images_u8.device
    pixels = images_u8.permute(0, 3, 1, 2)
    view = torch.randint(views.VIEWS, (count,), generator=generator)
    if name == "dihedral":
        return normalise(dihedral(pixels, view.to(where)).permute(0, 2, 3, 1))
    spread = torch.rand(count, 9, generator=generator) * 2 - 1
    pixels = pixels.contiguous().to(torch.float32)
    grid = F.affine_grid(affine_matrix(view, spread[:, :5]).to(where), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return jitter(pixels, spread[:, 5:].to(where)).contiguous(memory_format=torch.channels_last)


def normalise(images_u8: Tensor) -> Tensor:
    """Pixels [B,3,R,R] fp32 channels-last with ImageNet's mean and deviation, of [B,R,R,3] uint8."""
    pixels = images_u8.permute(0, 3, 1, 2).to(torch.float32)
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] * 255 for v in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def dihedral(pixels: Tensor, view: Tensor) -> Tensor:
    """Each of `pixels` [B,C,R,R] in its view [B] 0..7 of lesion.tiles.views; exact."""
    out = torch.empty_like(pixels)
    for number in range(views.VIEWS):
        chosen = view == number
        out[chosen] = views.dihedral(pixels[chosen], number)
    return out


def affine_matrix(view: Tensor, spread: Tensor) -> Tensor:
    """Where each output pixel comes from, [B,2,3] in `affine_grid`'s coordinates: small affine of the chosen view.

    view [B] 0..7 as in `dihedral`; spread [B,5] in [-1, 1] for angle, scale, shift x, shift y, shear.
    """
    angle, shear = spread[:, 0] * math.radians(ANGLE), torch.tan(spread[:, 4] * math.radians(SHEAR))
    scale = 1 / (1 + spread[:, 1] * SCALE)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    small = torch.stack([cos, cos * shear - sin, sin, sin * shear + cos], dim=1).view(-1, 2, 2)
    quarter = torch.tensor([[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]]],
                           dtype=torch.float32)[view % 4]
    mirror = torch.where(view >= 4, -1.0, 1.0)
    turned = quarter @ torch.diag_embed(torch.stack([mirror, torch.ones_like(mirror)], dim=1))
    return torch.cat([turned @ small, spread[:, 2:4, None] * SHIFT * 2], dim=2)


def jitter(pixels: Tensor, spread: Tensor) -> Tensor:
    """Colour jitter and ImageNet normalisation of `pixels` [B,3,R,R] in 0..255 as one 3x3 matrix and offset a tile.

    spread [B,4] in [-1, 1] for brightness, contrast (about the tile's mean grey), saturation and hue (a rotation of the
    chroma plane in YIQ). Not clipped: the network has no use for it.
    """
    amounts = torch.tensor((BRIGHTNESS, CONTRAST, SATURATION), device=pixels.device)
    gain, contrast, saturation = (1 + spread[:, :3] * amounts).T
    turn = spread[:, 3] * HUE * 2 * math.pi
    to_yiq = torch.tensor(TO_YIQ, device=pixels.device)
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    cos, sin = torch.cos(turn) * saturation, torch.sin(turn) * saturation
    chroma = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ chroma @ to_yiq * (gain * contrast)[:, None, None]
    grey = (pixels.mean((2, 3)) @ to_yiq[0]) * gain
    offset = (grey * (1 - contrast))[:, None].expand(-1, 3)
    mean, std = (torch.tensor(v, device=pixels.device) * 255 for v in (MEAN, STD))
    matrix, offset = matrix / std[None, :, None], (offset - mean) / std
    return torch.baddbmm(offset[:, :, None], matrix, pixels.flatten(2)).view_as(pixels)
