"""Several gloo processes give what one gives, to every one of them, and fail together; nothing hangs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_fast.commands import main as cli
from spt_fast.prototypes.build import build_prototypes
from spt_fast.prototypes.result import Prototypes
from spt_fast.prototypes.side_stream import SideStream
from spt_fast.support.distributed import ALONE, Processes, device_of_this_process, find_processes
from spt_fast.support.errors import NonFiniteError

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

RANKS_SCRIPT = Path(__file__).with_name("distributed_ranks.py")


class Outcomes:
    """What the ranks of each scenario returned or raised."""

    def __init__(self, folder: Path, errors: str) -> None:
        self.folder, self.errors = folder, errors

    def of(self, scenario: str) -> list[Any]:
        paths = sorted(self.folder.glob(f"{scenario}.[0-9].pt"))
        assert paths, self.errors
        return [torch.load(path, weights_only=False) for path in paths]

    def same(self, scenario: str) -> Any:
        """The result of every rank, which must be the same to the bit."""
        first, *others = self.of(scenario)
        assert isinstance(first, dict), first
        for other in others:
            assert_same(first, other)
        return first


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, run_script: Callable[..., Any]) -> Outcomes:
    folder = tmp_path_factory.mktemp("ranks")
    done = run_script(RANKS_SCRIPT.read_text(), folder, str(folder))
    return Outcomes(folder, done.stderr)


def assert_same(first: dict[str, Any], other: dict[str, Any]) -> None:
    assert first.keys() == other.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To 1e-6 of the size of the prototypes, which are of the order of one."""
    for key in ("prompts", "mean_squared_distance"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-6)
    for key in ("counts", "images", "tokens"):
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key]))


@pytest.mark.parametrize(
    "scenario",
    [
        "exact_2",
        "exact_3",
        "exact_from_the_file",
        "exact_with_an_empty_rank",
        "exact_with_an_empty_first_rank",
    ],
)
def test_exact_is_what_one_process_gives(outcomes: Outcomes, scenario: str) -> None:
    alone = outcomes.same("exact_1")
    assert (alone["images"], alone["tokens"]) == (42, 42 * 16)
    assert_close(outcomes.same(scenario), alone)


@pytest.mark.parametrize("size", [2, 3])
def test_exact_relocates_empty_clusters_to_tokens_of_any_rank(outcomes: Outcomes, size: int) -> None:
    alone, ours = (
        outcomes.same("exact_with_empty_clusters_1"),
        outcomes.same(f"exact_with_empty_clusters_{size}"),
    )
    assert ours["n_iter"] == alone["n_iter"] > 1
    torch.testing.assert_close(ours["centers"], alone["centers"], rtol=1e-6, atol=1e-4)
    assert torch.equal(ours["counts"], alone["counts"])
    assert float(ours["counts"].min()) > 0
    assert ours["inertia"] == pytest.approx(alone["inertia"], rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_exact_with_pruning_is_exact_without(outcomes: Outcomes, size: int) -> None:
    alone = outcomes.same("exact_with_and_without_pruning_1")
    ours = outcomes.same(f"exact_with_and_without_pruning_{size}")
    for side in ("pruned", "plain"):
        assert ours[f"{side}_n_iter"] == alone["plain_n_iter"] > 20
        # The same labels, so the same sums but for the rounding of float64: one rounding of the means.
        torch.testing.assert_close(ours[f"{side}_centers"], alone["plain_centers"], rtol=2**-23, atol=2**-23)
        assert torch.equal(ours[f"{side}_counts"], alone["plain_counts"])
        assert ours[f"{side}_inertia"] == pytest.approx(alone["plain_inertia"], rel=1e-6)


@pytest.mark.parametrize("scenario", ["stream_2", "stream_3", "stream_with_an_empty_rank"])
def test_stream_is_what_one_process_gives_while_nothing_is_dropped(outcomes: Outcomes, scenario: str) -> None:
    alone, ours = outcomes.same("stream_1"), outcomes.same(scenario)
    assert (ours["images"], ours["tokens"]) == (alone["images"], alone["tokens"])
    torch.testing.assert_close(
        ours["mean_squared_distance"], alone["mean_squared_distance"], rtol=5e-3, atol=0
    )
    assert ours["counts"].sum(1).tolist() == pytest.approx([42 * 16] * 2)


@pytest.mark.parametrize("size", [2, 3])
def test_stream_is_as_good_as_one_process_on_sorted_tokens(outcomes: Outcomes, size: int) -> None:
    """Each rank has other clusters, spreads and outliers than the next, and keeps a few of its tokens."""
    alone, ours = (outcomes.same(f"stream_of_sorted_tokens_{n}") for n in (1, size))
    assert ours["inertia"] <= 1.005 * alone["inertia"]
    assert ours["kept"] == alone["kept"] == 8_000
    assert ours["estimate"] == pytest.approx(ours["inertia"], rel=0.03)
    assert ours["counts"] == pytest.approx(ours["n"])
    # An estimate of the number of tokens, unbiased; its standard error is below 1 / sqrt(8000).
    assert ours["total"] == pytest.approx(ours["n"], rel=0.045)


def test_stream_with_little_room_is_the_same_on_all_ranks(outcomes: Outcomes) -> None:
    built = outcomes.same("stream_with_little_room")
    assert built["counts"].sum(1).tolist() == pytest.approx([42 * 16] * 2)
    assert built["metadata"]["processes"] == "2"


def test_merged_reservoir_is_that_of_one_that_saw_everything(outcomes: Outcomes) -> None:
    ranks = outcomes.of("merged_reservoir")
    tokens, keys, importance = (torch.cat(values) for values in zip(*(r["mine"] for r in ranks), strict=True))
    smallest = keys.sort()
    threshold = smallest.values[100]
    kept = smallest.indices[:100].sort().values
    for rank in ranks:
        assert torch.equal(rank["tokens"], tokens[kept])
        expected = 1 / (importance[kept] * threshold).clamp_max(1)
        torch.testing.assert_close(rank["weights"], expected.float())


def test_strategies_take_one_batch_of_one_rank(outcomes: Outcomes) -> None:
    first, second = outcomes.of("strategies")
    seen = set()
    for key in first:
        assert_same(first[key], second[key])
        assert (first[key]["images"], first[key]["tokens"]) == (6, 96)
        if key[0] == "mean":
            seen.add(float(first[key]["prompts"].sum()))
    assert len(seen) > 2


def test_strategies_never_draw_a_rank_without_images(outcomes: Outcomes) -> None:
    for first, second in zip(*outcomes.of("strategy_with_an_empty_rank"), strict=True):
        assert_same(first, second)
        assert first["images"] == 6


def test_equal_parts_are_those_of_all_ranks(outcomes: Outcomes) -> None:
    one, two = outcomes.same("exact_from_equal_parts_1"), outcomes.same("exact_from_equal_parts_2")
    torch.testing.assert_close(two["prompts"], one["prompts"], rtol=1e-5, atol=1e-5)


def test_directions_have_the_mean_length_of_all_tokens(outcomes: Outcomes) -> None:
    one, three = outcomes.same("exact_directions_1"), outcomes.same("exact_directions_3")
    torch.testing.assert_close(three["prompts"], one["prompts"], rtol=1e-5, atol=1e-5)


def test_prompts_are_drawn_from_the_images_of_all_ranks(outcomes: Outcomes) -> None:
    for first, second, third in zip(*outcomes.of("drawn_from_all_with_an_empty_rank"), strict=True):
        assert_same(first, second)
        assert_same(first, third)
        assert first["images"] == 42
        assert float(first["counts"].sum(1).min()) == pytest.approx(42 * 16)


@pytest.mark.parametrize(("scenario", "images"), [("max_images", 8), ("max_images_for_fewer_than_all", 2)])
def test_max_images_is_shared(outcomes: Outcomes, scenario: str, images: int) -> None:
    assert outcomes.same(scenario)["images"] == images


@pytest.mark.parametrize(
    ("case", "image", "layer"), [("pixels", 8, None), ("stream", 8, 0), ("exact", 8, 0), ("mean", 2, 0)]
)
def test_bad_values_on_one_rank_are_the_same_error_on_all(
    outcomes: Outcomes, case: str, image: int, layer: int | None
) -> None:
    other, own = (rank[case] for rank in outcomes.of("nan_on_rank_1"))
    for error in (other, own):
        assert isinstance(error, NonFiniteError)
        assert (error.image, error.layer, error.row, error.step) == (image, layer, None, None)
    assert str(other) == f"rank 1: {own}"
    assert f"image {image} (counted from 0)" in str(own)


def test_failing_loader_on_one_rank_is_an_error_on_all(outcomes: Outcomes) -> None:
    *others, own = outcomes.of("loader_fails_on_rank_2")
    assert own == ("KeyError", "'no such image'")
    assert others == [("RuntimeError", "rank 2: 'no such image'")] * 2


def test_no_image_on_any_rank_is_an_error(outcomes: Outcomes) -> None:
    for rank in outcomes.of("no_image_anywhere"):
        for error in rank.values():
            assert error == ("ValueError", "loader must give at least one batch of images, got none")


def test_too_few_tokens_count_those_of_all_ranks(outcomes: Outcomes) -> None:
    for kind, message in outcomes.of("too_few_tokens"):
        assert kind == "ValueError"
        assert "gave 192 per layer (from 12 images) for 200 prompts" in message


def test_different_arguments_are_refused(outcomes: Outcomes) -> None:
    errors = outcomes.of("different_arguments")
    assert errors[0] == (
        "ValueError",
        "seed must be the same on all ranks, got '0' on rank 0 and '1' on rank 1",
    )
    assert errors[1][0] == "ValueError"


def test_bad_argument_on_one_rank_is_an_error_on_all(outcomes: Outcomes) -> None:
    own, other = outcomes.of("bad_argument_on_rank_0")
    assert own == ("ValueError", "num_prompts must be an integer >= 1, got 0")
    assert other == ("ValueError", f"rank 0: {own[1]}")


def test_what_keeps_process_0_from_writing_stops_all(outcomes: Outcomes) -> None:
    own, other = outcomes.of("nmi_file_is_there_already")
    assert own[0] == "FileExistsError"
    assert other == ("OSError", f"rank 0: {own[1]}")


@pytest.mark.parametrize(
    ("scenario", "alone"),
    [
        ("training_2", "training_1"),
        ("training_3", "training_1"),
        ("training_5", "training_1"),
        ("training_in_parts_2", "training_in_parts_1"),
    ],
)
def test_training_has_the_curve_of_one_process(outcomes: Outcomes, scenario: str, alone: str) -> None:
    """Also where ranks have different numbers of images of a batch, or none of the last."""
    ours, expected = outcomes.same(scenario), outcomes.same(alone)
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert ours["loss"][-1] < ours["loss"][0]
    assert sum(ours["counts"].values()) == 25
    for key in ("prompts", "head.weight", "head.bias"):
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-3, atol=1e-4)
    for key in ("val_accuracy", "ema_accuracy"):
        assert ours[key] == pytest.approx(expected[key], abs=1 / 25)


def test_a_loss_that_is_nan_on_one_rank_is_the_same_error_on_all(outcomes: Outcomes) -> None:
    first, second = outcomes.of("training_with_a_nan_on_one_rank")
    assert first == second
    assert first[0] == "FloatingPointError"
    assert "loss is nan at epoch 1, step 2" in first[1]


def test_a_group_may_be_part_of_the_processes(outcomes: Outcomes) -> None:
    first, outside, third = outcomes.of("part_of_the_processes")
    assert_same(first, third)
    assert first["images"] == 42
    assert outside[0] == "TypeError"
    assert (
        "process_group must be a torch.distributed process group that this process belongs to" in outside[1]
    )


@pytest.mark.parametrize(
    ("scenario", "ranks"),
    [("rank_dies_in_the_pass", 2), ("rank_dies_in_an_iteration", 1), ("rank_stays_silent", 1)],
)
def test_a_rank_that_dies_or_stays_silent_ends_the_others(
    outcomes: Outcomes, scenario: str, ranks: int
) -> None:
    errors = outcomes.of(scenario)
    assert len(errors) == ranks
    for kind, message in errors:
        assert kind == "RuntimeError"
        assert "another process of the group died, or did not answer within the group's timeout" in message


def test_command_line_fails_and_succeeds_on_all_ranks_and_prints_on_the_first(outcomes: Outcomes) -> None:
    ranks = outcomes.of("command_line")
    assert [rank["codes"] for rank in ranks] == [(0, 2, 2)] * 3
    assert "13 images in" in ranks[0]["printed"]
    assert [rank["printed"] for rank in ranks[1:]] == ["", ""]
    built = Prototypes.load(outcomes.folder / "prototypes.safetensors")
    assert built.num_images == 13
    assert not (outcomes.folder / "other").exists()


def test_command_line_under_torchrun(outcomes: Outcomes, tmp_path: Path) -> None:
    """The same images in one process and in two give the same prototypes."""
    options = "prototypes --model shipped --data digits --num-prompts 3 --device cpu --max-images 24"
    assert cli.main([*options.split(), "--mode", "exact", "--out", str(tmp_path / "one")]) == 0
    ranks = torch.load(outcomes.folder / "under_torchrun.pt")
    assert [code for code, _ in ranks] == [0, 0], outcomes.errors
    assert "24 images in" in ranks[0][1]
    assert ranks[1][1] == ""
    one, two = Prototypes.load(tmp_path / "one"), Prototypes.load(outcomes.folder / "two")
    torch.testing.assert_close(one.prompts, two.prompts, rtol=1e-6, atol=1e-6)
    assert torch.equal(one.counts, two.counts)
    assert (one.num_images, one.num_tokens) == (two.num_images, two.num_tokens)


def test_one_process_needs_no_group() -> None:
    assert find_processes(None) is ALONE
    assert (ALONE.rank, ALONE.size) == (0, 1)
    rows = torch.randn(3, 2)
    assert ALONE.sum(rows) is rows
    assert ALONE.concatenate(rows) is rows
    assert ALONE.split_work(3, lambda i: i * i) == [0, 1, 4]


def test_what_is_no_process_group_is_refused(vit: Any, loader: Any) -> None:
    with pytest.raises(
        TypeError, match=r"process_group must be a torch.distributed process group .* got 'all'"
    ):
        build_prototypes(vit, loader, process_group="all", progress=False)


@pytest.mark.parametrize(("total", "size"), [(0, 3), (1, 3), (7, 3), (9, 3), (8, 1)])
def test_shares_are_consecutive_and_complete(total: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(size):
        processes = type(ALONE)()
        monkeypatch.setattr(processes, "rank", rank)
        monkeypatch.setattr(processes, "size", size)
        shares.append(processes.share_of(total))
    assert list(itertools.chain(*shares)) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_local_rank_picks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of_this_process("cuda") == torch.device("cuda", 3)
    assert device_of_this_process("cuda:1") == torch.device("cuda", 1)
    assert device_of_this_process("cpu") == torch.device("cpu")


def test_side_stream_hands_on_everything_in_order_one_batch_late() -> None:
    side_stream, seen = SideStream(torch.device("cpu")), []
    for batch in range(3):
        tokens = torch.full((2,), float(batch))
        for layer in range(2):
            side_stream.add(
                lambda given, layer=layer: seen.append((layer, float(given[0]))), tokens, tokens.dtype
            )
        tokens.fill_(-1)  # the model may reuse its memory
        side_stream.advance()
        assert len(seen) == 2 * batch
    side_stream.finish()
    assert seen == [(layer, batch) for batch in (0.0, 1.0, 2.0) for layer in (0, 1)]


def test_a_setting_that_only_another_rank_has_is_seen_on_all() -> None:
    class Two(Processes):
        rank = 0

        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "metric": "cosine"}]

    with pytest.raises(
        ValueError, match="metric must be the same on all ranks, got None on rank 0 and 'cosine'"
    ):
        Two().check_same({"seed": 1})


def test_several_processes_do_not_share_a_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of_this_process("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_of_this_process("cuda") == torch.device("cuda:1")
    assert device_of_this_process("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device must be cuda or cpu for 2 processes, .* got cuda:0"):
        device_of_this_process("cuda:0")
