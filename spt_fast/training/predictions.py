"""What a tuned model says of images without labels: the most probable classes, and files of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from spt_fast.data.batches import labelled_batch
from spt_fast.data.images import ImageFiles
from spt_fast.data.listing import printable
from spt_fast.support.arguments import check_choice, check_int
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.progress import progress_bar
from spt_fast.training.evaluation import check_gives_logits, inference, logits_of, names_of_logits

FORMATS = ("csv", "jsonl")


class Prediction(NamedTuple):
    """The most probable classes of an image, the first of them first.

    Attributes:
        file: the path of the image.
        labels: the places of the classes in the logits.
        classes: their names.
        probabilities: softmax of the logits, in float64.
    """

    file: str
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    tuned: nn.Module, files: ImageFiles, *, top_k: int = 1, progress: bool = False
) -> Iterator[Prediction]:
    """Predictions for the images of `files`, in their order and batch by batch, without gradients.

    Between the predictions `tuned` is in the mode that it was in. The first class is the one that `evaluate`
    counts: that of the largest logit, and of equal logits the first. An image that cannot be read is an
    error, or missing, as `files` was opened.

    Args:
        tuned: gives logits [B, classes]; `tuned.class_names` names them, or else their numbers do.
        files: of `spt_fast.data.images.open_files`.
        top_k: the number of classes for each image.
        progress: show a bar on stderr.

    Raises:
        TypeError: `top_k` is not an integer.
        ValueError: `top_k` is below 1 or above the number of classes, `tuned` gives something else than
            logits, or an image cannot be read.
        NonFiniteError: a logit is NaN; `image` is the place in `files.paths`.
    """
    check_gives_logits(tuned)
    names: Sequence[str] | None = getattr(tuned, "class_names", None)
    _check_top_k(
        check_int("top_k", top_k, 1), getattr(tuned, "num_classes", None) if names is None else len(names)
    )
    return _predictions(tuned, files, top_k, progress)


def write_predictions(predictions: Iterable[Prediction], format: str, top_k: int) -> Iterator[bytes]:
    """The lines of a file of `predictions`, UTF-8; each image is one line.

    "csv": file, class, probability, and class_2, probability_2, ... up to `top_k`, below a header line.
    "jsonl": {"file", "class", "probability"}, and with `top_k` above 1 {"top": [{"class", "probability"}]}.
    Probabilities have six significant digits. A file name that is no UTF-8 keeps its bytes in CSV.

    Raises:
        ValueError: there is no such format.
    """
    check_choice("format", format, FORMATS)
    return _csv_lines(predictions, top_k) if format == "csv" else _json_lines(predictions, top_k)


def _predictions(tuned: nn.Module, files: ImageFiles, top_k: int, progress: bool) -> Iterator[Prediction]:
    names: tuple[str, ...] = ()
    for index, batch in enumerate(progress_bar(files.loader, show=progress, unit="batch")):
        images, places = labelled_batch(batch, f"batch {index} of files")
        with inference(tuned):
            logits = logits_of(tuned, images).double().cpu()
        names = names or names_of_logits(tuned, logits.shape[1])
        _check_top_k(top_k, len(names))
        paths = [str(files.paths[place]) for place in places.tolist()]
        _check_logits(logits, places, paths)
        # Not `topk`, which leaves the order of equals to chance.
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        probabilities = logits.softmax(dim=1).gather(1, order)
        for path, labels, values in zip(paths, order.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(path, tuple(labels), tuple(names[label] for label in labels), tuple(values))


def _check_top_k(top_k: int, num_classes: int | None) -> None:
    if num_classes is not None and top_k > num_classes:
        raise ValueError(f"top_k must be at most {num_classes}, the number of classes, got {top_k}")


def _check_logits(logits: Tensor, places: Tensor, paths: Sequence[str]) -> None:
    # Of an infinite logit the softmax is NaN.
    broken = (~logits.isfinite()).any(dim=1).nonzero()
    if len(broken):
        first = int(broken[0])
        raise NonFiniteError(
            f"tuned must give finite logits, but {printable(paths[first])} gave NaN or infinity",
            image=int(places[first]),
        )


def _csv_lines(predictions: Iterable[Prediction], top_k: int) -> Iterator[bytes]:
    more = [f"{name}_{place}" for place in range(2, top_k + 1) for name in ("class", "probability")]
    yield _csv_line(["file", "class", "probability", *more])
    for prediction in predictions:
        pairs = zip(prediction.classes, map(_rounded, prediction.probabilities), strict=True)
        yield _csv_line([prediction.file, *(cell for pair in pairs for cell in pair)])


def _csv_line(cells: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode(errors="surrogateescape")


def _json_lines(predictions: Iterable[Prediction], top_k: int) -> Iterator[bytes]:
    for prediction in predictions:
        top = [
            {"class": name, "probability": _rounded(probability)}
            for name, probability in zip(prediction.classes, prediction.probabilities, strict=True)
        ]
        line: Mapping[str, Any] = {"file": prediction.file, **top[0], **({"top": top} if top_k > 1 else {})}
        yield json.dumps(line).encode() + b"\n"


def _rounded(probability: float) -> float:
    return float(f"{probability:.6g}")
