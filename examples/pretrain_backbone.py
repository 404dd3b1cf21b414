"""Pretrain a small ViT by masked autoencoding (He et al., 2022), as the one that ships with spt_fast was.

    python examples/pretrain_backbone.py IMAGE_FOLDER --out runs/backbone [--epochs 100] [--resume]

IMAGE_FOLDER holds one sub-folder per class, as torchvision's ImageFolder expects; labels are not used. All
images are resized to one size and kept as bytes (12 kB each at 64 pixels), on the device that trains. Order,
crops, flips and masks of an epoch are drawn from the seed and the epoch's number, and OUT/checkpoint.pt is
replaced at the end of each, so that a run that was stopped goes on with --resume as if it had not been. The
learning rate is constant after a warm-up and falls linearly over the last fifth: a run can also be resumed
with another number of epochs, or started from a backbone of an earlier run with --start.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import build_sincos2d_pos_embed, set_fused_attn
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from spt_fast.support.files import check_output_path

DECAY_FRACTION = 0.2
# The area and shape of a crop, as MAE draws them.
CROP_AREA, CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


class MaskedAutoencoder(nn.Module):
    """A timm ViT that sees a quarter of the patches, and a light decoder that paints the rest."""

    def __init__(self, architecture: dict[str, int], decoder_width: int, mask_ratio: float) -> None:
        super().__init__()
        self.encoder = VisionTransformer(
            **architecture, class_token=False, global_pool="avg", fc_norm=False, num_classes=0
        )
        self.patch_size = architecture["patch_size"]
        grid = self.encoder.patch_embed.grid_size
        self.num_patches = grid[0] * grid[1]
        self.num_visible = round(self.num_patches * (1 - mask_ratio))
        self.encoder.pos_embed = nn.Parameter(
            _position_table(grid, architecture["embed_dim"]), requires_grad=False
        )
        self.decoder_embed = nn.Linear(architecture["embed_dim"], decoder_width)
        self.mask_token = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder_pos = nn.Buffer(_position_table(grid, decoder_width))
        self.decoder = nn.Sequential(
            *[Block(decoder_width, decoder_width // 32, qkv_bias=True) for _ in range(2)]
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_head = nn.Linear(decoder_width, 3 * self.patch_size**2)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error on the hidden patches, each patch normalised to zero mean, unit variance."""
        batch = images.shape[0]
        order = torch.rand(batch, self.num_patches, generator=generator).argsort(dim=1).to(images.device)
        visible, hidden = order[:, : self.num_visible], order[:, self.num_visible :]

        # Only the patches that are seen are embedded: the convolution is a product of patches and weights.
        patches = _patchify(images, self.patch_size)
        embed = self.encoder.patch_embed.proj
        tokens = F.linear(_gather(patches, visible), embed.weight.flatten(1), embed.bias)
        tokens = tokens + _gather(self.encoder.pos_embed.expand(batch, -1, -1), visible)
        tokens = self.encoder.norm(self.encoder.blocks(tokens))

        known = self.decoder_embed(tokens) + _gather(self.decoder_pos.expand(batch, -1, -1), visible)
        unknown = self.mask_token + _gather(self.decoder_pos.expand(batch, -1, -1), hidden)
        decoded = self.decoder(torch.cat([known, unknown.to(known.dtype)], dim=1))
        predicted = self.decoder_head(self.decoder_norm(decoded[:, self.num_visible :]))

        target = _gather(patches, hidden)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (predicted.float() - target).square().mean()


def _position_table(grid: tuple[int, int], width: int) -> Tensor:
    return build_sincos2d_pos_embed(list(grid), dim=width, interleave_sin_cos=False).unsqueeze(0)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _patchify(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, patches, 3 * size**2]; a patch's values in the order of a convolution's weights."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def load_images(folder: Path, size: int) -> Tensor:
    """All images of an ImageFolder as one uint8 tensor [M, 3, size, size]."""
    samples = ImageFolder(str(folder))
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    for i in tqdm(range(len(samples)), desc="reading", unit="img", mininterval=1):
        image, _ = samples[i]
        images[i] = pil_to_tensor(image.convert("RGB").resize((size, size)))
    return images


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of bytes [M, 3, H, W], in [0, 1], to four digits."""
    histograms = [torch.bincount(images[:, c].flatten(), minlength=256).double() for c in range(3)]
    levels = torch.arange(256, dtype=torch.double) / 255
    means = [float((h * levels).sum() / h.sum()) for h in histograms]
    squares = [float((h * levels.square()).sum() / h.sum()) for h in histograms]
    deviations = [math.sqrt(square - mean**2) for square, mean in zip(squares, means, strict=True)]
    return [round(mean, 4) for mean in means], [round(deviation, 4) for deviation in deviations]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each image, resized to the image's size, and a random flip: floats in 0..255."""
    batch, _, height, width = images.shape
    area = torch.empty(batch).uniform_(*CROP_AREA, generator=generator)
    bounds = [math.log(ratio) for ratio in CROP_RATIO]
    ratio = torch.empty(batch).uniform_(*bounds, generator=generator).exp()
    # Sides as shares of the image; a side that would be longer than the image is the image's.
    across, down = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    centre = torch.rand(2, batch, generator=generator) * 2 - 1
    mirror = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
    transform = torch.zeros(batch, 2, 3)
    transform[:, 0, 0], transform[:, 0, 2] = across * mirror, (1 - across) * centre[0]
    transform[:, 1, 1], transform[:, 1, 2] = down, (1 - down) * centre[1]
    grid = F.affine_grid(transform.to(images.device), [batch, 3, height, width], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def batches(images: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """An epoch's augmented batches [size, 3, H, W] in random order; the rest of the division is left out."""
    order = torch.randperm(len(images), generator=generator)
    for rows in order[: len(images) // size * size].split(size):
        yield augment(images[rows.to(images.device)], generator)


def learning_rate(progress: float, warmup: float, peak: float) -> float:
    """Warm-up, plateau, linear fall; `progress` and `warmup` are shares of the run in [0, 1]."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * min(1.0, (1 - progress) / DECAY_FRACTION)


def build_optimizer(model: nn.Module, peak: float, weight_decay: float) -> torch.optim.AdamW:
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def train_epoch(
    model: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    statistics: tuple[list[float], list[float]],
    epoch: int,
    args: argparse.Namespace,
) -> float:
    """One epoch, counted from 0; returns the mean loss.

    Raises:
        RuntimeError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    mean, std = (255 * torch.tensor(values, device=images.device).view(3, 1, 1) for values in statistics)
    steps, total = len(images) // args.batch_size, 0.0
    name = f"epoch {epoch + 1}/{args.epochs}"
    shown = tqdm(batches(images, args.batch_size, generator), desc=name, total=steps, mininterval=5)
    for step, batch in enumerate(shown):
        progress = (epoch + step / steps) / args.epochs
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.warmup_epochs / args.epochs, args.lr)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.bf16):
            loss = model((batch - mean) / std, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"loss is {value} at epoch {epoch + 1}, step {step}; lower --lr")
        total += value
        shown.set_postfix_str(f"loss {total / (step + 1):.4f}", refresh=False)
    return total / steps


def save_encoder(model: MaskedAutoencoder, path: Path, facts: dict[str, object]) -> None:
    """Encoder weights in half precision; `facts` travel as safetensors metadata."""
    weights = model.encoder.state_dict()
    state = {name: value.half().cpu().contiguous() for name, value in weights.items()}
    save_file(state, str(path), metadata={key: json.dumps(value) for key, value in facts.items()})


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Replace the file as a whole: a run that is killed while it writes leaves the one before."""
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for backbone.safetensors, log and checkpoint"
    )
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup-epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--decoder-width", type=int, default=64)
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--start", type=Path, help="a backbone.safetensors whose encoder to begin with")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.image_size % args.patch_size:
        parser.error(
            f"--image-size must be a multiple of --patch-size, got {args.image_size}, {args.patch_size}"
        )
    return args


def open_images(args: argparse.Namespace) -> tuple[Tensor, tuple[list[float], list[float]]]:
    """All images as bytes on the device, and their channel statistics."""
    images = load_images(args.folder, args.image_size)
    if len(images) < args.batch_size:
        raise SystemExit(f"--batch-size must be at most {len(images)}, the images, got {args.batch_size}")
    return images.to(args.device), channel_statistics(images)


def build_model(architecture: dict[str, int], args: argparse.Namespace) -> MaskedAutoencoder:
    """A new model by the seed, with the encoder of `--start` if there is one."""
    torch.manual_seed(args.seed)
    model = MaskedAutoencoder(architecture, args.decoder_width, args.mask_ratio)
    if args.start is not None:
        model.encoder.load_state_dict({name: value.float() for name, value in load_file(args.start).items()})
    return model.to(args.device)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    backbone = check_output_path(args.out / "backbone.safetensors", overwrite=True)
    if checkpoint.exists() and not args.resume:
        raise SystemExit(f"--out must be a folder without a run, got {args.out}: go on with --resume")
    # Few tokens: on CPUs plain products beat the fused attention, whose backward is slow in bfloat16.
    set_fused_attn(args.device != "cpu")
    images, statistics = open_images(args)
    architecture = {
        "img_size": args.image_size,
        "patch_size": args.patch_size,
        "embed_dim": args.width,
        "depth": args.depth,
        "num_heads": args.heads,
    }
    model = build_model(architecture, args)
    optimizer = build_optimizer(model, args.lr, args.weight_decay)
    first_epoch = 0
    if args.resume:
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]

    for epoch in range(first_epoch, args.epochs):
        started = time.time()
        loss = train_epoch(model, optimizer, images, statistics, epoch, args)
        facts = {"architecture": architecture, "mean": statistics[0], "std": statistics[1]}
        facts |= {"epochs": epoch + 1, "loss": loss}
        save_encoder(model, backbone, facts)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        save_checkpoint(state, checkpoint)
        with log.open("a") as stream:
            stream.write(json.dumps(facts | {"seconds": time.time() - started}) + "\n")


if __name__ == "__main__":
    main()
