"""Accuracy by class and the confusion matrix, against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from spt_fast.support.errors import NonFiniteError
from spt_fast.support.tables import read_csv
from spt_fast.training import evaluate, evaluate_classes

NAMES = ("ant", 'b, "c"', "cat", "dog")


class Logits(nn.Module):
    """Gives its inputs back; they are the logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def answers() -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Batches of logits with labels of three of four classes, some of them ignored; labels; predictions."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator)
    labels = torch.randint(3, (50,), generator=generator)
    labels[::7] = -100
    counted = labels != -100
    batches = list(zip(logits.split(8), labels.split(8), strict=True))
    return batches, labels[counted], logits.argmax(dim=1)[counted]


def test_the_matrix_is_scikit_learns(answers):
    batches, labels, predicted = answers
    found = evaluate_classes(Logits(), batches, NAMES)
    expected = confusion_matrix(labels, predicted, labels=range(4))
    assert np.array_equal(found.confusion_matrix().numpy(), expected)
    assert found.num_images == len(labels) == expected.sum()
    assert found.accuracy == evaluate(Logits(), batches) == float((labels == predicted).double().mean())
    per_class = [float((predicted[labels == label] == label).double().mean()) for label in range(3)]
    assert found.accuracy_per_class == [*map(pytest.approx, per_class), None]
    assert found.mean_class_accuracy == pytest.approx(sum(per_class) / 3)
    assert found.images_per_class == [*expected.sum(axis=1)]
    assert found.missing_classes == ["dog"]


def test_files_hold_what_was_counted(answers, tmp_path):
    found = evaluate_classes(Logits(), answers[0], NAMES)
    for name, content in found.files().items():
        (tmp_path / name).write_bytes(content)
    rows = read_csv(tmp_path / "classes.csv", ("images", "correct", "accuracy"), ("class",))
    assert tuple(names[0] for names, _ in rows) == NAMES
    diagonal = found.confusion_matrix().diagonal().tolist()
    columns = (found.images_per_class, diagonal, found.accuracy_per_class)
    assert [numbers for _, numbers in rows] == list(zip(*columns, strict=True))
    matrix = read_csv(tmp_path / "confusion.csv", NAMES, ("class",))
    assert tuple(names[0] for names, _ in matrix) == NAMES
    assert [list(numbers) for _, numbers in matrix] == found.confusion_matrix().tolist()


def test_classes_have_the_models_names_or_numbers(answers):
    model = Logits()
    assert evaluate_classes(model, answers[0]).class_names == ("0", "1", "2", "3")
    model.class_names = NAMES
    assert evaluate_classes(model, answers[0]).class_names == NAMES
    with pytest.raises(ValueError, match="class_names must be 4 names, one for each logit, got 2"):
        evaluate_classes(model, answers[0], NAMES[:2])


def test_nan_and_emptiness_are_errors_as_in_evaluate(answers):
    logits, labels = answers[0][0]
    for score in (evaluate, evaluate_classes):
        with pytest.raises(ValueError, match="at least one image with a label, got no images"):
            score(Logits(), [])
        with pytest.raises(ValueError, match="got no labels other than -100"):
            score(Logits(), [(logits, torch.full((8,), -100))])
        broken = logits.clone()
        broken[2, 1] = math.nan
        with pytest.raises(NonFiniteError, match="image 10"):
            score(Logits(), [(logits, labels), (broken, labels)])


def test_what_is_no_model_or_no_loader_is_refused() -> None:
    with pytest.raises(TypeError, match="tuned must be a PromptedViT or another module, got NoneType"):
        evaluate(None, [])
    with pytest.raises(TypeError, match="loader must be an iterable of batches, got NoneType"):
        evaluate(nn.Identity(), None)
