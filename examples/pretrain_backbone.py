"""Pretrain the small ViT that ships with spt_fast, by masked autoencoding (He et al., 2022).

    python examples/pretrain_backbone.py IMAGE_FOLDER --out runs/backbone [--epochs 100]

IMAGE_FOLDER holds one sub-folder per class, as torchvision's ImageFolder expects; the labels are
not used. All images are resized to 32x32 and kept in memory as bytes (3 kB each). The learning
rate is constant after a warm-up and falls linearly over the last fifth, so that a run can be
resumed with another number of epochs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from spt_fast.support.files import check_output_path

IMAGE_SIZE = 32
PATCH_SIZE = 4
CROP_PADDING = 4
DECAY_FRACTION = 0.2
# Channel statistics of CIFAR-10's training images; part of the shipped backbone's contract.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class MaskedAutoencoder(nn.Module):
    """A timm ViT that sees a quarter of the patches, and a light decoder that paints the rest."""

    def __init__(self, width: int, depth: int, num_heads: int, decoder_width: int, mask_ratio: float) -> None:
        super().__init__()
        self.encoder = VisionTransformer(
            img_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            num_classes=0,
        )
        grid = self.encoder.patch_embed.grid_size
        self.num_patches = grid[0] * grid[1]
        self.num_visible = round(self.num_patches * (1 - mask_ratio))
        self.encoder.pos_embed = nn.Parameter(_position_table(grid, width), requires_grad=False)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.decoder_pos = nn.Buffer(_position_table(grid, decoder_width))
        self.decoder = nn.Sequential(
            *[Block(decoder_width, decoder_width // 32, qkv_bias=True) for _ in range(2)]
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_head = nn.Linear(decoder_width, 3 * PATCH_SIZE**2)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error on the hidden patches, each patch normalised to zero mean, unit variance."""
        batch = images.shape[0]
        order = torch.rand(batch, self.num_patches, generator=generator).argsort(dim=1)
        visible, hidden = order[:, : self.num_visible], order[:, self.num_visible :]

        tokens = self.encoder.patch_embed(images) + self.encoder.pos_embed
        tokens = _gather(tokens, visible)
        tokens = self.encoder.norm(self.encoder.blocks(tokens))

        known = self.decoder_embed(tokens) + _gather(self.decoder_pos.expand(batch, -1, -1), visible)
        unknown = self.mask_token + _gather(self.decoder_pos.expand(batch, -1, -1), hidden)
        decoded = self.decoder(torch.cat([known, unknown.to(known.dtype)], dim=1))
        predicted = self.decoder_head(self.decoder_norm(decoded[:, self.num_visible :]))

        target = _gather(_patchify(images), hidden)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (predicted.float() - target).square().mean()


def _position_table(grid: tuple[int, int], width: int) -> Tensor:
    return build_sincos2d_pos_embed(list(grid), dim=width, interleave_sin_cos=False).unsqueeze(0)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _patchify(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, patches, 3 * PATCH_SIZE**2]."""
    return nn.functional.unfold(images, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)


def load_images(folder: Path) -> Tensor:
    """All images of an ImageFolder as one uint8 tensor [M, 3, 32, 32]."""
    samples = ImageFolder(str(folder))
    images = torch.empty(len(samples), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for i in tqdm(range(len(samples)), desc="reading", unit="img"):
        image, _ = samples[i]
        images[i] = pil_to_tensor(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)))
    return images


def augment(images: Tensor) -> Tensor:
    """Random shift by up to CROP_PADDING pixels and random flip, drawn for each image; then normalise."""
    batch, _, height, width = images.shape
    padded = nn.functional.pad(images.float(), [CROP_PADDING] * 4, mode="reflect")
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, batch, 1))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    flip = torch.rand(batch, 1) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (cropped / 255 - mean) / std


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
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def save_encoder(model: MaskedAutoencoder, path: Path, facts: dict[str, object]) -> None:
    """Encoder weights in half precision; `facts` travel as safetensors metadata."""
    state = {name: value.detach().half().contiguous() for name, value in model.encoder.state_dict().items()}
    save_file(state, str(path), metadata={key: json.dumps(value) for key, value in facts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for backbone.safetensors, log and checkpoint"
    )
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
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    images = load_images(args.folder)
    model = MaskedAutoencoder(args.width, args.depth, args.heads, args.decoder_width, args.mask_ratio)
    optimizer = build_optimizer(model, args.lr, args.weight_decay)
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    backbone = check_output_path(args.out / "backbone.safetensors", overwrite=True)
    first_epoch = 0
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]

    steps_per_epoch = len(images) // args.batch_size
    for epoch in range(first_epoch, args.epochs):
        started, total = time.time(), 0.0
        order = torch.randperm(len(images))
        for step in tqdm(
            range(steps_per_epoch), desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, mininterval=5
        ):
            progress = (epoch + step / steps_per_epoch) / args.epochs
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.warmup_epochs / args.epochs, args.lr)
            batch = augment(images[order[step * args.batch_size : (step + 1) * args.batch_size]])
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = model(batch)
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"loss is {loss.item()} at epoch {epoch + 1}, step {step}; lower --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item()
        facts = {
            "architecture": {
                "img_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "embed_dim": args.width,
                "depth": args.depth,
                "num_heads": args.heads,
            },
            "mean": MEAN,
            "std": STD,
            "epochs": epoch + 1,
            "loss": total / steps_per_epoch,
        }
        with log.open("a") as stream:
            stream.write(json.dumps(facts | {"seconds": time.time() - started}) + "\n")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, checkpoint
        )
        save_encoder(model, backbone, facts)


if __name__ == "__main__":
    main()
