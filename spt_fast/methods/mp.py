"""Moment probing: a head that also sees how the patch tokens vary together (Gao et al., ICCV 2023).

The patch tokens after the final norm pass a linear layer D -> 512 and are split into four groups of 128
channels, each through the same LayerNorm. The cross-covariances of neighbouring groups over the N_e tokens,

    C_g = (X_g - mean)^T (X_(g+1) - mean) / N_e    for g = 1, 2, 3,

have their columns brought to length 1. As an image of three channels, 128 x 128, they pass two convolutions
3 -> 3 (3 x 3, stride 2, no bias) with a GELU between, and a linear layer 2,883 -> C. The logits are the mean
of these and of the classifier's own. Nothing before the head changes.

Numbers: 512 D + 930 + 2,884 C of the head beside its classifier, so 394,146 + 3,653 C with it at D = 768. The
released code removes one mean of all channels and tokens, which is nearly zero behind a LayerNorm; here each
channel has its own, as in a covariance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim
from spt_fast.methods.added_modules import learned_like
from spt_fast.methods.base import Blocks, Common, TunedViT

if TYPE_CHECKING:
    from typing_extensions import Unpack

_WIDTH, _GROUPS = 512, 4
# Of 128 x 128 after two convolutions.
_SIDE = 31


class MomentProbing(TunedViT):
    """A head of two classifiers, that of the model and one of moments of the patch tokens; no options.

    `head` is a ModuleList of both, and files hold both under "head."; `num_classes` is of both. Without a
    classifier, as with `num_classes=0`, the model is refused.

    Raises:
        TypeError: the model lacks `forward_features` or `forward_head`, or has two classifiers.
        ValueError: it is to have no classifier.
    """

    method = "mp"

    def __init__(self, model: nn.Module, **common: Unpack[Common]) -> None:
        super().__init__(model, {}, **common)
        self._take_over()

    def _install(self, blocks: Blocks) -> None:
        for name in ("forward_features", "forward_head"):
            if not callable(getattr(self.model, name, None)):
                raise TypeError(
                    f"{self.method} needs timm's `{name}`, which {type(self.model).__name__} lacks"
                )
        classifier = super().head
        if isinstance(classifier, nn.ModuleList) and len(classifier) > 1:
            raise TypeError(f"{self.method} needs a model with one classifier, got {len(classifier)}")
        if not any(True for _ in classifier.parameters()):
            raise ValueError(f"{self.method} is a head: num_classes must be an integer >= 1, or None, got 0")
        self.moments = MomentHead(embed_dim(self.model), self.num_classes).to(**learned_like(self.model))

    @property
    def head(self) -> nn.ModuleList:
        """The trainable classifiers: that of the model, and that of moments."""
        return nn.ModuleList([super().head, self.moments])

    def _learned(self) -> dict[str, Tensor]:
        return {name: each for name, each in super()._learned().items() if not name.startswith("moments.")}

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, height, width]."""
        return self.forward_head(self.forward_features(images))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returned; with `pre_logits`, the inputs of the classifier."""
        found = super().forward_head(tokens, pre_logits)
        if pre_logits:
            return found
        return (found + self._run(self._of_moments, tokens).to(found.dtype)) / 2

    def _of_moments(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self._num_prefix_tokens :]
        # Where the model averages first, its norm comes afterwards; otherwise this is none.
        norm = getattr(self.model, "fc_norm", None)
        return self.moments(patches if norm is None else norm(patches))  # type: ignore[no-any-return]


class MomentHead(nn.Module):
    """Logits [B, C], in the dtype of its weights, of patch tokens [B, N_e, D]."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH // _GROUPS)
        channels = _GROUPS - 1
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, bias=False),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, stride=2, bias=False),
        )
        self.classifier = nn.Linear(channels * _SIDE**2, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        groups = self.norm(self.project(tokens.to(self.project.weight.dtype)).unflatten(-1, (_GROUPS, -1)))
        groups = (groups - groups.mean(dim=1, keepdim=True)).permute(0, 2, 3, 1)
        covariances = groups[:, :-1] @ groups[:, 1:].mT / groups.shape[-1]
        features = self.convolutions(F.normalize(covariances, dim=-2)).flatten(1)
        return self.classifier(features)  # type: ignore[no-any-return]
