"""`Prototypes`: select, repeated layers, save and load, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.prototypes.build import build_prototypes
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import write_safetensors

Loader = list[tuple[Tensor, Tensor]]
MakeLoader = Callable[..., Loader]
MakeViT = Callable[..., VisionTransformer]


def build(model: VisionTransformer, loader: Loader, **options: Any) -> Prototypes:
    return build_prototypes(model, loader, **{"num_prompts": 6, "progress": False, **options})


def assert_same(ours: Prototypes, theirs: Prototypes) -> None:
    """Equal in every bit of every public field."""
    for name in ("prompts", "counts", "inertia"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("num_images", "num_tokens", "metadata"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.last_output is None) == (theirs.last_output is None)
    if ours.last_output is not None and theirs.last_output is not None:
        assert_same(ours.last_output, theirs.last_output)


@pytest.fixture
def vit(make_vit: MakeViT) -> VisionTransformer:
    """Two blocks: the time of a test goes with the number of layers."""
    return make_vit(depth=2)


@pytest.fixture(scope="module")
def protos(make_vit: MakeViT, make_loader: MakeLoader) -> Prototypes:
    """Of `vit` and `loader`, with the last block's output."""
    return build(make_vit(depth=2), make_loader(), last_output=True)


def fields(layers: int = 3, num_prompts: int = 6, width: int = 32) -> dict[str, Any]:
    """Valid fields of Prototypes."""
    return {
        "prompts": torch.randn(layers, num_prompts, width),
        "counts": torch.ones(layers, num_prompts, dtype=torch.float64),
        "inertia": torch.ones(layers, dtype=torch.float64),
        "num_images": 4,
        "num_tokens": 64,
        "metadata": {"strategy": "kmeans", "mode": "stream"},
    }


def file_tensors() -> dict[str, Tensor]:
    """The tensors of a file of prototypes with these fields."""
    tensors = {name: torch.as_tensor(value) for name, value in fields().items() if name != "metadata"}
    return {"inertia_sum" if name == "inertia" else name: tensor for name, tensor in tensors.items()}


class TestSelect:
    def test_gives_what_building_would_give(
        self, vit: VisionTransformer, loader: Loader, protos: Prototypes
    ) -> None:
        for num_prompts in (1, 11):
            built = build(vit, loader, last_output=True, num_prompts=num_prompts, capacity=20_000)
            assert_same(protos.select(num_prompts), built)

    def test_may_be_asked_again(self, protos: Prototypes) -> None:
        assert_same(protos.select(3).select(6), protos)

    def test_solves_a_length_once(self, vit: VisionTransformer, loader: Loader) -> None:
        protos = build(vit, loader)
        first = protos.select(3)
        assert first.select(6) is protos
        assert protos.select(3) is first is first.select(6).select(3)

    def test_bar(
        self, protos: Prototypes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TQDM_DISABLE", "")
        protos.select(17, progress=True)
        assert "3/3" in capsys.readouterr().err
        protos.select(18)
        assert capsys.readouterr().err == ""

    def test_inertia_falls_with_more_prompts(self, protos: Prototypes) -> None:
        inertia = torch.stack([protos.select(k).inertia for k in (1, 4, 16)])
        assert bool((inertia.diff(dim=0) < 0).all())

    def test_goes_up_to_what_was_kept_and_no_further(self, vit: VisionTransformer, loader: Loader) -> None:
        protos = build(vit, loader, capacity=30)
        assert protos.select(30).prompts.shape == (2, 30, 32)
        with pytest.raises(ValueError, match=r"num_prompts must be at most 30, .* got 31"):
            protos.select(31)

    @pytest.mark.parametrize("num_prompts", [0, -3])
    def test_refuses_less_than_one(self, protos: Prototypes, num_prompts: int) -> None:
        with pytest.raises(ValueError, match=f"num_prompts must be an integer >= 1, got {num_prompts}"):
            protos.select(num_prompts)

    @pytest.mark.parametrize("num_prompts", [2.0, True, None, "3"])
    def test_refuses_what_is_no_integer(self, protos: Prototypes, num_prompts: Any) -> None:
        with pytest.raises(TypeError, match="num_prompts must be an integer >= 1"):
            protos.select(num_prompts)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"strategy": "mean"}, "strategy='mean' makes none: build again"),
            ({"strategy": "random"}, "strategy='random' makes none: build again"),
            ({"mode": "exact"}, "mode='exact' makes none: build again"),
        ],
    )
    def test_says_why_there_is_no_summary(
        self, vit: VisionTransformer, loader: Loader, options: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            build(vit, loader, **options).select(3)

    def test_says_that_files_hold_no_summary(self, protos: Prototypes, tmp_path: Path) -> None:
        protos.save(tmp_path / "p")
        with pytest.raises(ValueError, match="which this file does not hold: save with with_sample=True"):
            Prototypes.load(tmp_path / "p").select(3)

    def test_says_that_it_comes_before_repeat_layer(self, protos: Prototypes) -> None:
        with pytest.raises(ValueError, match="call select before repeat_layer or repeat_last_output"):
            protos.repeat_layer(0).select(3)


class TestRepeat:
    @pytest.mark.parametrize("index", [0, 1])
    def test_gives_one_layer_to_all(self, protos: Prototypes, index: int) -> None:
        repeated = protos.repeat_layer(index)
        assert repeated.prompts.shape == protos.prompts.shape
        for i in range(2):
            assert torch.equal(repeated.prompts[i], protos.prompts[index])
            assert torch.equal(repeated.counts[i], protos.counts[index])
            assert repeated.inertia[i] == protos.inertia[index]
        assert repeated.metadata["layer"] == str(index)

    def test_gives_the_last_blocks_output_to_all(self, protos: Prototypes) -> None:
        assert protos.last_output is not None
        repeated = protos.repeat_last_output()
        assert torch.equal(repeated.prompts, protos.last_output.prompts.expand(2, -1, -1))
        assert not torch.equal(repeated.prompts[1], protos.prompts[1])
        assert repeated.metadata["layer"] == "last_output"

    def test_of_shallow_prototypes(self, vit: VisionTransformer, loader: Loader) -> None:
        protos = build(vit, loader, depth="shallow", last_output=True)
        assert torch.equal(protos.repeat_layer(0).prompts, protos.prompts)
        assert protos.repeat_last_output().prompts.shape == (1, 6, 32)
        assert not torch.equal(protos.repeat_last_output().prompts, protos.prompts)

    def test_last_output_has_to_be_built(self, vit: VisionTransformer, loader: Loader) -> None:
        with pytest.raises(ValueError, match="call build_prototypes with last_output=True"):
            build(vit, loader, strategy="mean").repeat_last_output()

    @pytest.mark.parametrize(
        ("index", "error", "reason"),
        [
            (2, ValueError, "index must be 0 to 1, got 2"),
            (-1, ValueError, "index must be an integer >= 0 .*repeat_last_output.*, got -1"),
            (1.0, TypeError, "index must be an integer"),
        ],
    )
    def test_refuses_other_indices(
        self, protos: Prototypes, index: Any, error: type[Exception], reason: str
    ) -> None:
        with pytest.raises(error, match=reason):
            protos.repeat_layer(index)

    def test_does_not_share_memory(self, protos: Prototypes) -> None:
        repeated = protos.repeat_layer(1)
        repeated.prompts[0].zero_()
        assert bool(protos.prompts[1].any())
        assert bool(repeated.prompts[1].any())


class TestFiles:
    @pytest.mark.parametrize("last_output", [False, True])
    def test_round_trip(self, protos: Prototypes, tmp_path: Path, last_output: bool) -> None:
        if not last_output:
            protos = dataclasses.replace(protos, last_output=None)
        protos.save(tmp_path / "p.safetensors")
        loaded = Prototypes.load(str(tmp_path / "p.safetensors"))
        assert_same(loaded, protos)
        assert repr(loaded) == repr(protos)

    def test_round_trip_of_a_repeated_layer(self, protos: Prototypes, tmp_path: Path) -> None:
        protos.repeat_last_output().save(tmp_path / "p")
        assert_same(Prototypes.load(tmp_path / "p"), protos.repeat_last_output())

    def test_same_prototypes_give_the_same_bytes(self, protos: Prototypes, tmp_path: Path) -> None:
        protos.save(tmp_path / "a")
        Prototypes.load(tmp_path / "a").save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_existing_file_and_missing_folder_are_refused(self, protos: Prototypes, tmp_path: Path) -> None:
        path = tmp_path / "p"
        path.write_text("precious")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            protos.save(path)
        assert path.read_text() == "precious"
        protos.save(path, overwrite=True)
        assert_same(Prototypes.load(path), protos)
        with pytest.raises(FileNotFoundError, match="folder"):
            protos.save(tmp_path / "nowhere" / "p")
        with pytest.raises(TypeError, match="overwrite must be True or False, got 'no'"):
            protos.save(path, overwrite="no")

    def test_truncated_and_foreign_files_are_refused(self, protos: Prototypes, tmp_path: Path) -> None:
        path = tmp_path / "p"
        protos.save(path)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            Prototypes.load(path)
        write_safetensors(path, {"prompts": protos.prompts}, {}, kind="prompted_vit", overwrite=True)
        with pytest.raises(ValueError, match="holds 'prompted_vit', expected 'prototypes'"):
            Prototypes.load(path)

    def test_file_with_the_mean_as_inertia_is_refused(self, tmp_path: Path) -> None:
        """As development versions wrote it: the mean must not be taken for the sum."""
        tensors = file_tensors()
        tensors["inertia"] = tensors.pop("inertia_sum")
        write_safetensors(tmp_path / "p", tensors, {}, kind="prototypes")
        with pytest.raises(
            ValueError, match=r"inertia was the mean per token and not the sum; build .* again"
        ):
            Prototypes.load(tmp_path / "p")

    def test_file_with_a_sum_and_a_mean_is_read_by_its_sum(self, tmp_path: Path) -> None:
        tensors = file_tensors()
        tensors["inertia"] = tensors["inertia_sum"] / 64
        write_safetensors(tmp_path / "p", tensors, {}, kind="prototypes")
        assert torch.equal(Prototypes.load(tmp_path / "p").inertia, tensors["inertia_sum"])

    @pytest.mark.parametrize("name", ["num_images", "num_tokens"])
    def test_file_with_a_broken_number_is_refused(self, name: str, tmp_path: Path) -> None:
        tensors = {**file_tensors(), name: torch.tensor(1.5)}
        write_safetensors(tmp_path / "p", tensors, {}, kind="prototypes")
        with pytest.raises(ValueError, match=rf"prototypes \({name} must be an integer >= 1, got 1\.5\)"):
            Prototypes.load(tmp_path / "p")

    @pytest.mark.parametrize("missing", ["prompts", "counts", "inertia_sum", "num_images", "num_tokens"])
    def test_file_without_a_tensor_is_refused(self, tmp_path: Path, missing: str) -> None:
        tensors = file_tensors()
        del tensors[missing]
        write_safetensors(tmp_path / "p", tensors, {}, kind="prototypes")
        with pytest.raises(ValueError, match=rf"p does not hold valid prototypes \('{missing}'\)"):
            Prototypes.load(tmp_path / "p")

    def test_file_with_misshapen_tensors_is_refused(self, tmp_path: Path) -> None:
        tensors = file_tensors()
        tensors["counts"] = tensors["counts"][:2]
        write_safetensors(tmp_path / "p", tensors, {}, kind="prototypes")
        with pytest.raises(ValueError, match=r"valid prototypes \(counts must be \[3, 6\]"):
            Prototypes.load(tmp_path / "p")


class TestFields:
    def test_are_frozen(self, protos: Prototypes) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            protos.prompts = torch.zeros(1)  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("changed", "error", "reason"),
        [
            ({"prompts": [[1.0]]}, TypeError, "prompts must be a tensor, got list"),
            (
                {"prompts": torch.zeros(3, 6, 32).half()},
                TypeError,
                r"prompts must be torch\.float32, got torch\.float16",
            ),
            (
                {"prompts": torch.zeros(3, 6, 32, device="meta")},
                ValueError,
                "prompts must be on cpu, got meta",
            ),
            ({"prompts": torch.zeros(6, 32)}, ValueError, r"prompts must be \[L, N_p, D\], got \[6, 32\]"),
            ({"prompts": torch.zeros(3, 0, 32)}, ValueError, r"prompts must be .*, got \[3, 0, 32\]"),
            ({"counts": torch.ones(3, 6)}, TypeError, r"counts must be torch\.float64"),
            ({"inertia": torch.ones(2).double()}, ValueError, r"inertia must be \[3\], got \[2\]"),
            (
                {"counts": torch.tensor([[1.0] * 6, [1.0] * 6, [-2.0] * 6]).double()},
                ValueError,
                r"counts must be >= 0, but counts\[2\] holds -2",
            ),
            (
                {"inertia": torch.tensor([1, -0.5, 0]).double()},
                ValueError,
                r"inertia must be >= 0, but inertia\[1\] holds -0\.5",
            ),
            ({"last_output": 5}, TypeError, "last_output must be Prototypes or None, got 5"),
            ({"num_images": 0}, ValueError, "num_images must be an integer >= 1, got 0"),
            ({"num_tokens": 2.5}, TypeError, "num_tokens must be an integer >= 1"),
            ({"metadata": None}, TypeError, "metadata must map strings to strings, got NoneType"),
            ({"metadata": {"seed": 0}}, TypeError, "metadata must map strings to strings, got 'seed': 0"),
            (
                {"last_output": Prototypes(**fields(2))},
                ValueError,
                r"last_output must hold prompts \[1, 6, 32\]",
            ),
        ],
    )
    def test_misfits_are_refused(self, changed: dict[str, Any], error: type[Exception], reason: str) -> None:
        with pytest.raises(error, match=reason):
            Prototypes(**{**fields(), **changed})

    @pytest.mark.parametrize(
        ("name", "shape", "at"),
        [("prompts", (3, 6, 32), (2, 5, 0)), ("counts", (3, 6), (2, 1)), ("inertia", (3,), 2)],
    )
    def test_values_that_are_not_finite_are_named(self, name: str, shape: tuple[int, ...], at: Any) -> None:
        values = torch.zeros(shape, dtype=torch.float32 if name == "prompts" else torch.float64)
        values[at] = torch.inf
        with pytest.raises(NonFiniteError, match=rf"{name} must be finite, but {name}\[2\] holds") as raised:
            Prototypes(**{**fields(), name: values})
        assert raised.value.layer == 2

    def test_mean_squared_distance_is_the_inertia_of_a_token(self) -> None:
        protos = Prototypes(**{**fields(), "inertia": torch.tensor([64.0, 32.0, 0.0]).double()})
        assert protos.mean_squared_distance.tolist() == [1.0, 0.5, 0.0]
        assert "mean_squared_distance=0..1," in repr(protos)

    def test_repr_tells_what_it_is(self, protos: Prototypes) -> None:
        text = repr(protos)
        for words in (
            "[2, 6, 32]",
            "kmeans",
            "stream",
            "num_images=40",
            "num_tokens=640",
            "with last_output",
        ):
            assert words in text
        assert len(text) < 200


def test_prompted_vit_takes_them(
    vit: VisionTransformer, make_vit: MakeViT, loader: Loader, protos: Prototypes
) -> None:
    from spt_fast.methods.prompted_vit import PromptedViT

    tuned = PromptedViT(vit, protos, num_classes=4)
    assert torch.equal(tuned.prompts.detach(), protos.prompts)
    assert tuned(loader[0][0]).shape == (8, 4)
    repeated = PromptedViT(make_vit(depth=2), protos.repeat_last_output(), num_classes=4)
    assert repeated.prompts.shape == (2, 6, 32)
