"""Two ways to run one transformer block with prompts: as extra keys and values, or as extra tokens.

Both act on one block at a time and know nothing of the model around it. `kv_forward` calls the block's own
submodules; it does not call the block's attention module as a whole, so hooks on that one do not fire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import (  # type: ignore[attr-defined]
    Attention,
    Block,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from spt_fast.ops.prompt_attention import prompt_attention


def kv_blocker(block: nn.Module) -> str | None:
    """Why prompts as keys and values would not be exact in `block`, or None where they are.

    Classes are compared exactly: a subclass may compute something else.
    """
    if type(block) not in _KV_FORWARDS:
        known = ", ".join(cls.__name__ for cls in _KV_FORWARDS)
        return f"{type(block).__name__} is none of the blocks it knows ({known})"
    if "forward" in vars(block):
        return f"the forward of this {type(block).__name__} has been replaced"
    for attention in _attentions(block):
        if type(attention) is not Attention:
            return f"its attention is {type(attention).__name__}, not timm's Attention"
        if "forward" in vars(attention):
            return "the forward of its attention has been replaced"
        if _has_hooks(attention):
            return "its attention has hooks, which would not be called"
    return None


def kv_forward(block: nn.Module, x: Tensor, prompts: Tensor) -> Tensor:
    """`block` over tokens x [B, N, D] that also attend to prompts [N_p, D]; [B, N, D] (eq. 6, 13).

    What eq. 6 and 13 discard is not computed: prompts are no queries and pass through no MLP, and their norm,
    keys and values are computed once for all images. `kv_blocker(block)` must be None.
    """
    return _KV_FORWARDS[type(block)](block, x, prompts)


def append_prompts(x: Tensor, prompts: Tensor) -> Tensor:
    """Tokens [B, N, D] and prompts [N_p, D] to [B, N + N_p, D], prompts last.

    A block with no position information treats every order alike; at the end they leave the positions of
    prefix and patch tokens as the model's head expects them.
    """
    return torch.cat((x, prompts.expand(x.shape[0], -1, -1)), dim=1)


def drop_prompts(x: Tensor, num_prompts: int) -> Tensor:
    """Undo `append_prompts`: [B, N + N_p, D] to [B, N, D]."""
    return x[:, : x.shape[1] - num_prompts]


def concat_blocker(block: nn.Module) -> str | None:
    """Why appended tokens would be wrong in `block`, or None: it must treat its tokens as a set."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    for name in [name for name, _ in block.named_modules()] + [name for name, _ in tensors]:
        if any(mark in name for mark in ("rel_pos", "relative_position", "rope")):
            return f"{type(block).__name__} ties positions to its tokens (`{name}`), and prompts have none"
    return None


def _kv_block(block: nn.Module, x: Tensor, prompts: Tensor) -> Tensor:
    b: Any = block
    x = x + b.drop_path1(b.ls1(_attend(b.attn, b.norm1(x), _norm_prompts(b.norm1, prompts))))
    return x + b.drop_path2(b.ls2(b.mlp(b.norm2(x))))  # type: ignore[no-any-return]


def _kv_res_post_block(block: nn.Module, x: Tensor, prompts: Tensor) -> Tensor:
    b: Any = block
    x = x + b.drop_path1(b.norm1(_attend(b.attn, x, prompts)))
    return x + b.drop_path2(b.norm2(b.mlp(x)))  # type: ignore[no-any-return]


def _kv_parallel_things_block(block: nn.Module, x: Tensor, prompts: Tensor) -> Tensor:
    b: Any = block
    branches = [
        path.drop_path(path.ls(_attend(path.attn, path.norm(x), _norm_prompts(path.norm, prompts))))
        for path in b.attns
    ]
    x = x + torch.stack(branches).sum(dim=0)
    return x + torch.stack([ffn(x) for ffn in b.ffns]).sum(dim=0)


_KV_FORWARDS: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    Block: _kv_block,
    ResPostBlock: _kv_res_post_block,
    ParallelThingsBlock: _kv_parallel_things_block,
}


def _attentions(block: nn.Module) -> list[nn.Module]:
    if type(block) is ParallelThingsBlock:
        return [path.attn for path in block.attns]  # type: ignore[misc]
    return [block.attn]  # type: ignore[list-item]


def _attend(attn: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """timm's Attention over x [B, N, D] with the keys and values of prompts [N_p, D] added; [B, N, D]."""
    batch, tokens, _ = x.shape
    # Unbound before heads and tokens change places: the way back then joins three gradients in one copy.
    projected = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).unbind(2)
    q, k, v = (part.transpose(1, 2) for part in projected)
    prompt_k, prompt_v = _prompt_keys_values(attn, prompts)
    out = prompt_attention(
        attn.q_norm(q), attn.k_norm(k), v, attn.k_norm(prompt_k), prompt_v, scale=attn.scale
    )
    out = out.transpose(1, 2).reshape(batch, tokens, attn.num_heads * attn.head_dim)
    # Older timm has no norm or no gate here.
    if getattr(attn, "norm", None) is not None:
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))  # type: ignore[no-any-return]


def _prompt_keys_values(attn: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [H, N_p, d] of normalised prompts [N_p, D]."""
    num_prompts, heads = prompts.shape[0], attn.num_heads
    if type(attn.qkv) is nn.Linear and not _has_hooks(attn.qkv):
        # The query third of the projection has no use here.
        first_key = attn.qkv.out_features // 3
        bias = None if attn.qkv.bias is None else attn.qkv.bias[first_key:]
        projected = F.linear(prompts, attn.qkv.weight[first_key:], bias)
    else:
        projected = attn.qkv(prompts[None])[0].unflatten(-1, (3, -1))[:, 1:]
    keys, values = projected.reshape(num_prompts, 2, heads, attn.head_dim).permute(1, 2, 0, 3).unbind(0)
    return keys, values


def _norm_prompts(norm: Any, prompts: Tensor) -> Tensor:
    return norm(prompts[None])[0]  # type: ignore[no-any-return]


def _has_hooks(module: nn.Module) -> bool:
    return any(
        getattr(module, name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
