"""Features of the Fréchet Inception Distance (Heusel et al. 2017): the 2048 channel means before the last layer, pool3 in the paper's graph.

The weights are those of that graph, ported to torch by pytorch-fid (pt_inception-2015-12-05-6726825d.pth): 1,008 outputs, and pooling that
neither counts a border nor, in the last block, averages at all. torchvision's network has the same parameters and another pooling, which is put
right here by hooks; torchvision's own ImageNet weights would give figures that no published one compares with, and are refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SIZE_PX, OUTPUTS, CHANNELS = 299, 1008, 2048
BLOCKS = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b", "Mixed_7c")  # with a pooled branch


def load(file: str | Path) -> nn.Module:
    """The network of the FID with the weights in `file`, its last layer taken off. Raises ValueError when they are not the FID's."""
    from torchvision.models import inception_v3

    if not Path(file).is_file():
        raise ValueError(f"report.inception = {str(file)!r} is no file: give pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or null")
    state = torch.load(file, map_location="cpu", weights_only=True)
    if (outputs := len(state.get("fc.weight", ()))) != OUTPUTS:
        raise ValueError(f"{file} holds no weights of the FID's Inception ({OUTPUTS} outputs, got {outputs or 'none'}): give pytorch-fid's")
    net = inception_v3(num_classes=OUTPUTS, aux_logits=False, transform_input=False, init_weights=False)
    net.load_state_dict(state)
    net.fc = nn.Identity()
    return pool_as_fid(net).eval()


def pool_as_fid(net: nn.Module) -> nn.Module:
    """`net`, torchvision's Inception, with the pooling of the FID's graph."""
    for name in BLOCKS[:-1]:
        getattr(net, name).branch_pool.register_forward_pre_hook(_uncounted)
    last, seen = getattr(net, BLOCKS[-1]), {}
    last.register_forward_pre_hook(lambda module, inputs: seen.update(block=inputs[0]))
    last.branch_pool.register_forward_pre_hook(lambda module, inputs: (F.max_pool2d(seen.pop("block"), 3, stride=1, padding=1),))
    return net


def _uncounted(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A 3 x 3 mean that counted the padding around the map, as a mean over what is inside it."""
    (mean,) = inputs
    return (mean / F.avg_pool2d(torch.ones_like(mean[:1, :1]), 3, stride=1, padding=1),)


@torch.inference_mode()
def features(net: nn.Module, images: np.ndarray, batch: int = 16) -> np.ndarray:
    """uint8 [N, S, S] -> float32 [N, 2048]; grey in all three channels, values -1..1, bilinear to SIZE_PX as pytorch-fid does."""
    device, found = next(net.parameters()).device, []
    for start in range(0, len(images), batch):
        x = torch.from_numpy(images[start : start + batch]).to(device)[:, None].float() / 255
        x = F.interpolate(x, size=(SIZE_PX, SIZE_PX), mode="bilinear", align_corners=False)
        found.append(net((2 * x - 1).expand(-1, 3, -1, -1)).cpu().numpy())
    return np.concatenate(found)
