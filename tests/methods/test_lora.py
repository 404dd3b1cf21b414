"""LoRA and peft's other tuners: the formula, files, the model back bit for bit, merging."""

from __future__ import annotations

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from timm.models import beit
from torch import Tensor, nn

import spt_fast

pytest.importorskip("peft")


@pytest.mark.parametrize("options", [{}, {"rank": 3, "alpha": 7.5}])
def test_outputs_and_gradients_are_those_of_the_formula(pair, book, flavour, options):
    both = pair("lora", {**flavour, "init_values": 0.5}, **options)
    scale = options.get("alpha", 8) / options.get("rank", 8)
    layers = [block.attn.qkv for block in both.tuned.model.blocks]

    def block(index: int, block: Any, x: Tensor) -> Tensor:
        a, b = layers[index].lora_A["default"].weight, layers[index].lora_B["default"].weight
        x = x + block.ls1(
            book.attention(block.attn, block.norm1(x), lambda z: block.attn.qkv(z) + scale * z @ a.T @ b.T)
        )
        return x + block.ls2(block.mlp(block.norm2(x)))

    both.check(both.plain.forward_head(book.vit(both.plain, both.images, block)))


def test_counts(count):
    """4 r D L, and the paper's column for VTAB: the mean over its tasks, with heads of 49.47 classes."""
    found = count("lora")
    assert found == {"B": 294_912, "L": 4 * 8 * 1024 * 24, "H": 4 * 8 * 1280 * 32}
    # The paper says 0.32.
    assert (found["B"] + 769 * 940 / 19) / 1e6 == pytest.approx(0.333, abs=0.0005)


def test_starts_as_the_model(make_vit, make_images):
    model = make_vit().eval()
    expected = model(make_images())
    assert torch.equal(spt_fast.tune(model, "lora").eval()(make_images()), expected)


def test_dropout_is_of_training_only(make_vit, make_images):
    tuned = spt_fast.tune(make_vit(), "lora", dropout=0.5, num_classes=3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.train()
    assert not torch.equal(tuned(make_images()), tuned(make_images()))
    assert not tuned.model.blocks[0].attn.qkv.base_layer.training
    tuned.eval()
    assert torch.equal(tuned(make_images()), tuned(make_images()))


OTHERS = {
    "lora": {"target": "qkv,fc2", "config": {"use_dora": True, "r": 4}},
    "ia3": {"config": '{"feedforward_modules": []}'},
    "oft": {"config": {"oft_block_size": 8}},
    "lokr": {"target": ["proj"]},
    "loha": {"config": {"r": 2}},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_release_and_merge_of_tuners(check, kind):
    options = {"type": kind, **OTHERS[kind]}
    check.life("peft", **options)
    check.merge("peft", options, init_values=0.5)


@pytest.mark.parametrize("flavour", [{}, {"qkv_bias": False, "qk_norm": True}], ids=["plain", "no-bias"])
def test_merges(check, flavour):
    check.merge("lora", {"rank": 4, "alpha": 2.0}, **flavour)


def test_files_and_release(check):
    check.life("lora", target="qkv,proj", rank=2)


def test_half_precision_checkpointing_and_compile(check):
    check.variants("lora")


def test_learns(check):
    check.learns("lora")


def test_refuses_what_it_cannot_take(check, make_vit):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    check.refused(beit.Beit(**sizes, qkv_bias=True), "lora needs an attention that calls its `qkv`", "lora")
    check.refused(make_vit(), "peft cannot tune the blocks of this model .*fc9", "lora", target="fc9")
    for method, option, value, message in (
        ("lora", "rank", 0, "rank must be an integer >= 1"),
        ("lora", "alpha", -1, "alpha must be a finite number > 0 or None"),
        ("lora", "dropout", 1, "dropout must be a finite number >= 0 and < 1"),
        ("lora", "target", "qkv,", "target must be names of layers"),
        ("lora", "target", [], "target must be names of layers"),
        ("peft", "type", "prompt_tuning", "type must be one of .*'lora'"),
        ("peft", "config", {"rank": 2}, "config must be arguments of peft's LoraConfig .*'rank'"),
        ("peft", "config", "r=2", "config must be a dict of what JSON knows"),
        ("peft", "config", {"r": object()}, "config must be a dict of what JSON knows"),
        ("peft", "config", {"bias": "all"}, "config must say nothing of 'bias'"),
        (
            "peft",
            "config",
            {"init_lora_weights": "pissa"},
            "must not let peft change the weights of the model",
        ),
        (
            "peft",
            "config",
            {"init_lora_weights": "olora"},
            "must not let peft change the weights of the model",
        ),
    ):
        check.refused(make_vit(), message, method, **{option: value})


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_release_of_narrow_models(make_vit):
    """peft's parts are float32 there, also copies of the model's own."""
    model = make_vit().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    tuned = spt_fast.tune(model, "peft", type="ln_tuning", target="norm1", num_classes=3)
    assert tuned.model.blocks[0].norm1 is not tuned.release().blocks[0].norm1
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


def test_says_where_merging_is_impossible(make_vit, make_images):
    tuned = spt_fast.tune(make_vit(), "peft", type="lily", config={"r": 4}, num_classes=3).eval()
    logits = tuned(make_images())
    with pytest.raises(ValueError, match="what peft's LILY can do"):
        tuned.merge()
    assert torch.equal(tuned(make_images()), logits)


def test_says_what_to_install(monkeypatch, vit):
    """peft is loaded when a model is tuned, not before."""
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    for name in ("peft_config", "peft_tuners", "lora"):
        spec = importlib.util.find_spec(f"spt_fast.methods.{name}")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with pytest.raises(ImportError, match=r"pip install 'spt_fast\[peft\]'"):
        spt_fast.tune(vit, "lora")
    monkeypatch.undo()
    assert isinstance(spt_fast.tune(vit, "lora"), nn.Module)
