"""The attention modules of timm with the keys and values of prompts added, in two steps.

`attention_keys_values` turns prompts into keys and values, which are the same for every image; `attend` is
the forward of the attention. Hooks on its parts see the tokens of the image, in the shapes that they have in
timm; prompts pass by without calling them. There is no dropout of attention weights: a frozen backbone is in
evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat  # type: ignore[attr-defined]
from timm.models import beit, eva
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from torch import Tensor, nn

from spt_fast.ops.prompt_attention import packed_prompt_attention, prompt_attention
from spt_fast.ops.prompt_attention_cpu import join_prompts

# Older timm has none.
_ATTENTION_ROPE: type[nn.Module] | None = getattr(timm.layers, "AttentionRope", None)
_ROTARY = tuple(cls for cls in (eva.EvaAttention, _ATTENTION_ROPE) if cls is not None)
KNOWN_ATTENTIONS: tuple[type[nn.Module], ...] = (Attention, beit.Attention, *_ROTARY)


class KeysValues(NamedTuple):
    """What one attention module makes of one layer's prompts: `keys` and `values`, both [H, N_p, d].

    [B, H, N_p, d] where each of B images has its own.
    """

    keys: Tensor
    values: Tensor


def attention_keys_values(attn: Any, prompts: Tensor) -> KeysValues:
    """Of normalised prompts [N_p, D] or [B, N_p, D]; not rotated, since prompts have no position."""
    keys, values = (_split_heads(attn, each) for each in _project_prompts(attn, prompts))
    norm = getattr(attn, "k_norm", None)
    keys = keys if norm is None else norm.forward(keys)
    return KeysValues(_share_heads(attn, keys), _share_heads(attn, values))


def attend(attn: Any, x: Tensor, prompts: KeysValues, position: Tensor | None = None) -> Tensor:
    """The attention module over tokens x [B, N, D] and prompts, which have no position; [B, N, D].

    `position` is what the module takes beside x: the rotary embedding of the patches, or BEiT's shared bias.
    """
    return _leave(attn, x, _mix(attn, x, prompts, position))


def cross_attend(attn: Any, x: Tensor, prompts: KeysValues) -> Tensor:
    """timm's Attention with tokens x [B, N, D] as queries of prompts alone, [H, N_p, d]; [B, N, D]."""
    q = _queries(attn, x)
    # All images have the same keys: their queries are one long sequence, without a copy of keys for each.
    queries = q.flatten(0, 1).transpose(0, 1)
    out = F.scaled_dot_product_attention(queries, prompts.keys, prompts.values, scale=attn.scale)
    return _leave(attn, x, out.transpose(0, 1).reshape(*x.shape[:2], -1))


def cross_weights(attn: Any, x: Tensor, prompts: KeysValues) -> Tensor:
    """The softmax weights [B, H, N, N_p] of `cross_attend`."""
    scores = (_queries(attn, x).transpose(1, 2) * attn.scale) @ prompts.keys.mT
    return scores.softmax(dim=-1)  # type: ignore[no-any-return]


def _queries(attn: Any, x: Tensor) -> Tensor:
    """Queries [B, N, H, d] of tokens [B, N, D], normalised."""
    heads = _project_queries(attn, x).reshape(*x.shape[:2], attn.num_heads, _head_width(attn))
    return _normed(attn, "q_norm", heads)


def _leave(attn: Any, x: Tensor, out: Tensor) -> Tensor:
    """What the module makes of its heads' outputs [B, N, H * d]."""
    # Older timm has no norm and no gate here.
    if getattr(attn, "norm", None) is not None:
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))  # type: ignore[no-any-return]


def _mix(attn: Any, x: Tensor, prompts: KeysValues, position: Tensor | None) -> Tensor:
    """The heads' outputs side by side, [B, N, H * d]."""
    bias = _relative_bias(attn, position) if isinstance(attn, beit.Attention) else None
    shows_weights = not attn.fused_attn and has_hooks(attn.attn_drop)
    if _rotary_of(attn, position) is None and bias is None and _is_plain(attn) and not shows_weights:
        packed = _packed_heads(attn, x)
        return packed_prompt_attention(packed, prompts.keys, prompts.values, scale=attn.scale)
    q, k, v = _placed_heads(attn, x, position)
    if shows_weights:
        weights: Tensor = attn.attn_drop(_softmax(q, k, prompts, bias, attn.scale))
        out = weights @ join_prompts(v, prompts.values)
    elif bias is None:
        out = prompt_attention(q, k, v, prompts.keys, prompts.values, scale=attn.scale)
    else:
        out = _biased_attention(q, k, v, prompts, bias, attn.scale)
    return out.transpose(1, 2).flatten(2)


def attention_weights(attn: Any, x: Tensor, prompts: KeysValues, position: Tensor | None = None) -> Tensor:
    """The softmax weights [B, H, N, N + N_p] of `attend`, those of prompts last."""
    bias = _relative_bias(attn, position) if isinstance(attn, beit.Attention) else None
    q, k, _ = _placed_heads(attn, x, position)
    return _softmax(q, k, prompts, bias, attn.scale)


def _softmax(q: Tensor, k: Tensor, prompts: KeysValues, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ join_prompts(k, prompts.keys).mT
    if bias is not None:
        scores = scores + F.pad(bias, (0, prompts.keys.shape[-2]))
    return scores.softmax(dim=-1)


def _placed_heads(attn: Any, x: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, d] as they enter the scores: normalised and rotated."""
    q, k, v = _queries_keys_values(attn, x)
    rotary = _rotary_of(attn, position)
    if rotary is not None:
        q, k = _rotate(attn, q, rotary).type_as(v), _rotate(attn, k, rotary).type_as(v)
    return q, _share_heads(attn, k), _share_heads(attn, v)


def _rotary_of(attn: Any, position: Tensor | None) -> Tensor | None:
    return position if isinstance(attn, _ROTARY) else None


def _is_plain(attn: Any) -> bool:
    """Whether nothing stands between one projection and the scores."""
    norms = [getattr(attn, name, None) for name in ("q_norm", "k_norm")]
    return attn.qkv is not None and all(
        norm is None or (type(norm) is nn.Identity and not has_hooks(norm)) for norm in norms
    )


def _queries_keys_values(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, H, N, d] of the projections, queries and keys normalised."""
    if attn.qkv is None:
        q, k, v = (_split_heads(attn, project(x)) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
    else:
        # Unbound before heads and tokens change places, so that backward joins three gradients in one copy.
        q, k, v = (part.transpose(1, 2) for part in _packed_heads(attn, x).unbind(2))
    return _normed(attn, "q_norm", q), _normed(attn, "k_norm", k), v


def _packed_heads(attn: Any, x: Tensor) -> Tensor:
    """Queries, keys and values, [B, N, 3, H, d]."""
    return _fused_projection(attn, x, attn.qkv).reshape(*x.shape[:2], 3, attn.num_heads, _head_width(attn))


def _fused_projection(attn: Any, x: Tensor, qkv: Callable[[Tensor], Tensor]) -> Tensor:
    """Queries, keys and values side by side, [..., N, 3 * H * d]; `qkv` calls the projection."""
    if getattr(attn, "q_bias", None) is None:
        return qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


def _project_queries(attn: Any, x: Tensor) -> Tensor:
    """Queries [..., N, H * d] alone."""
    if type(attn.qkv) is not nn.Linear or "forward" in vars(attn.qkv) or has_hooks(attn.qkv):
        return attn.qkv(x).chunk(3, dim=-1)[0]  # type: ignore[no-any-return]
    first_key = attn.qkv.out_features // 3
    bias = None if attn.qkv.bias is None else attn.qkv.bias[:first_key]
    return F.linear(x, attn.qkv.weight[:first_key], bias)


def _project_prompts(attn: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of prompts [..., N_p, D], each [..., N_p, heads * d]; calls no hooks."""
    if attn.qkv is None:
        return attn.k_proj.forward(prompts), attn.v_proj.forward(prompts)
    if type(attn.qkv) is not nn.Linear or "forward" in vars(attn.qkv):
        _, keys, values = _fused_projection(attn, prompts, attn.qkv.forward).chunk(3, dim=-1)
        return keys, values
    # Prompts are no queries: the first third of the projection is not needed.
    first_key = attn.qkv.out_features // 3
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat((attn.k_bias, attn.v_bias))
    else:
        bias = None if attn.qkv.bias is None else attn.qkv.bias[first_key:]
    keys, values = F.linear(prompts, attn.qkv.weight[first_key:], bias).chunk(2, dim=-1)
    return keys, values


def _split_heads(attn: Any, projected: Tensor) -> Tensor:
    """[..., N, heads * d] to [..., heads, N, d]; with grouped queries, keys and values have fewer heads."""
    width = _head_width(attn)
    return projected.reshape(*projected.shape[:-1], projected.shape[-1] // width, width).transpose(-3, -2)


def _head_width(attn: Any) -> int:
    # Not every attention of timm has `head_dim`.
    return attn.proj.in_features // attn.num_heads  # type: ignore[no-any-return]


def _share_heads(attn: Any, keys_or_values: Tensor) -> Tensor:
    """[..., heads, N, d] with each head repeated for the queries that share it."""
    groups = getattr(attn, "num_kv_groups", 1)
    return keys_or_values if groups == 1 else keys_or_values.repeat_interleave(groups, dim=-3)


def _normed(attn: Any, name: str, heads: Tensor) -> Tensor:
    norm = getattr(attn, name, None)
    return heads if norm is None else norm(heads)


def _rotate(attn: Any, heads: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the patches of heads [B, H, N, d]; prefix tokens have no position."""
    prefix, patches = heads.tensor_split((attn.num_prefix_tokens,), dim=2)
    # Older timm knows one layout only and takes no argument for it.
    layout = {"half": True} if getattr(attn, "rotate_half", False) else {}
    return torch.cat((prefix, apply_rot_embed_cat(patches, rotary, **layout)), dim=2)


def _relative_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    """BEiT's bias on the scores of image tokens, [1, H, N, N]: its own, plus the one all blocks share."""
    if attn.relative_position_bias_table is None:
        return shared
    own: Tensor = attn._get_rel_pos_bias()
    return own if shared is None else own + shared


def _biased_attention(
    q: Tensor, k: Tensor, v: Tensor, prompts: KeysValues, bias: Tensor, scale: float
) -> Tensor:
    """Attention with a bias on the scores of image tokens, and none on those of prompts."""
    keys, values = join_prompts(k, prompts.keys), join_prompts(v, prompts.values)
    mask = F.pad(bias.to(q.dtype), (0, prompts.keys.shape[1]))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its forward."""
    return any(
        getattr(module, name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
