"""`predict`: classes and probabilities in the order of the files, against the model's own logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import spt_fast
from spt_fast.data import shipped
from spt_fast.data.images import open_files, open_labelled_images
from spt_fast.support.errors import NonFiniteError
from spt_fast.training import evaluate_classes, predict
from spt_fast.training.predictions import Prediction, write_predictions

NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def tuned() -> spt_fast.PromptedViT:
    torch.manual_seed(0)
    model = spt_fast.PromptedViT(shipped.load_backbone(), 2, num_classes=3)
    model.class_names = NAMES
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in nested folders, and beside them what is none."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("2.png", "10.png", "more/b.png", "more/deep/a.JPG", "one/c.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    (root / "notes.txt").write_text("none")
    return root


def predictions(tuned, data, **options):
    opened = {name: options.pop(name) for name in ("batch_size", "bad_images") if name in options}
    files = open_files(data, tuned.model, workers=0, **{"batch_size": 2, **opened})
    return list(predict(tuned, files, **options))


def test_predictions_are_the_softmax_of_the_logits(tuned, photos):
    found = predictions(tuned, [photos], top_k=3)
    assert [Path(item.file).relative_to(photos).as_posix() for item in found] == [
        "2.png",
        "10.png",
        "more/b.png",
        "more/deep/a.JPG",
        "one/c.png",
    ]
    files = open_files([photos], tuned.model, workers=0)
    images = torch.cat([images for images, _ in files.loader])
    tuned.eval()
    with torch.no_grad():
        expected = tuned(images).double().softmax(dim=1)
    for item, row in zip(found, expected, strict=True):
        assert list(item.labels) == row.argsort(descending=True).tolist()
        assert item.classes == tuple(NAMES[label] for label in item.labels)
        assert item.probabilities == pytest.approx(row[list(item.labels)].tolist(), rel=1e-5)
    best = predictions(tuned, [photos])
    assert [item.classes for item in best] == [item.classes[:1] for item in found]


def test_what_is_given_comes_in_its_order_and_as_often(tuned, photos):
    named = [photos / "one", photos / "2.png", photos / "more" / "deep", photos / "2.png"]
    found = predictions(tuned, named)
    assert [item.file for item in found] == [
        str(photos / name) for name in ("one/c.png", "2.png", "more/deep/a.JPG", "2.png")
    ]
    assert found[1] == found[3]


def test_any_name_is_an_image_if_it_is_given(tuned, photos, tmp_path):
    copy = tmp_path / "image.without.suffix"
    copy.write_bytes((photos / "2.png").read_bytes())
    (one,), (other,) = predictions(tuned, [copy]), predictions(tuned, [photos / "2.png"])
    assert one.probabilities == other.probabilities


def test_the_first_class_is_the_one_that_evaluate_counts(tuned, folders_of_classes):
    data = open_labelled_images(str(folders_of_classes), tuned.model, workers=0, class_names=NAMES)
    counted = evaluate_classes(tuned, data.loader)
    found = predictions(tuned, [folders_of_classes])
    right = sum(Path(item.file).parent.name == item.classes[0] for item in found)
    assert right / len(found) == counted.accuracy


@pytest.fixture
def folders_of_classes(photos: Path, tmp_path: Path) -> Path:
    for index, path in enumerate(sorted(photos.rglob("*.png"))):
        target = tmp_path / NAMES[index % 3]
        target.mkdir(exist_ok=True)
        (target / f"{index}.png").write_bytes(path.read_bytes())
    return tmp_path


def test_an_unreadable_image_is_an_error_or_left_out(tuned, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((photos / "2.png").read_bytes()[:70])
    data = [photos / "2.png", broken, photos / "10.png"]
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        predictions(tuned, data)
    rest = predictions(tuned, data, bad_images="skip")
    assert [item.file for item in rest] == [str(data[0]), str(data[2])]
    assert rest == predictions(tuned, [data[0], data[2]], batch_size=1)


def test_the_model_comes_back_as_it_was_between_predictions(tuned, photos):
    tuned.train()
    stream = predict(tuned, open_files([photos], tuned.model, workers=0, batch_size=1))
    for _ in range(2):
        next(stream)
        assert tuned.training
        assert torch.is_grad_enabled()
    tuned.eval()


def test_of_equal_logits_the_first_is_first(photos):
    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[1.0, 2.0, 2.0]]).expand(len(images), -1)

    files = open_files([photos / "2.png"], shipped.load_backbone(), workers=0)
    (item,) = predict(Constant(), files, top_k=2)
    assert item.labels == (1, 2)
    assert item.classes == ("1", "2")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_an_error_that_names_the_file(value, photos):
    class Broken(torch.nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 2)
            logits[1, 0] = value
            return logits

    files = open_files([photos], shipped.load_backbone(), workers=0)
    with pytest.raises(NonFiniteError, match=r"but .*10\.png gave NaN") as caught:
        list(predict(Broken(), files))
    assert caught.value.image == 1


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (["2.png"], {"top_k": 0}, ValueError, "top_k must be an integer >= 1"),
        (["2.png"], {"top_k": 4}, ValueError, "top_k must be at most 3, the number of classes, got 4"),
        (["gone.png"], {}, FileNotFoundError, "there is no file or folder .*gone.png"),
        ([], {}, ValueError, "data must name files or folders of images, got none"),
    ],
)
def test_bad_arguments(data, options, error, message, tuned, photos):
    with pytest.raises(error, match=message):
        predictions(tuned, [photos / name for name in data], **options)


def test_features_are_no_classes(photos):
    tuned = spt_fast.PromptedViT(shipped.load_backbone(), 2, num_classes=0)
    with pytest.raises(ValueError, match=r"tuned must give logits, but this PromptedViT has no head"):
        predictions(tuned, [photos])


def test_a_single_name_is_not_taken_for_a_list(tuned, photos):
    with pytest.raises(TypeError, match="data must be a list of files and folders"):
        open_files(str(photos), tuned.model)


ITEMS = [
    Prediction('a, "b".png', (1, 0), ("bee", "ant"), (2 / 3, 1 / 3)),
    Prediction("\udcff.png", (0, 1), ("ant", "bee"), (1.0, 1.25e-17)),
]


def test_lines_of_csv():
    lines = b"".join(write_predictions(ITEMS, "csv", 2)).split(b"\n")
    assert lines[0] == b"file,class,probability,class_2,probability_2"
    assert lines[1] == b'"a, ""b"".png",bee,0.666667,ant,0.333333'
    assert lines[2] == b"\xff.png,ant,1.0,bee,1.25e-17"
    assert lines[3:] == [b""]
    assert next(write_predictions(ITEMS, "csv", 1)) == b"file,class,probability\n"


def test_lines_of_json():
    first, second = map(json.loads, write_predictions(ITEMS, "jsonl", 2))
    assert first == {
        "file": 'a, "b".png',
        "class": "bee",
        "probability": 0.666667,
        "top": [{"class": "bee", "probability": 0.666667}, {"class": "ant", "probability": 0.333333}],
    }
    assert second["file"] == "\udcff.png"
    assert set(json.loads(next(write_predictions(ITEMS, "jsonl", 1)))) == {"file", "class", "probability"}
    with pytest.raises(ValueError, match="format must be one of 'csv', 'jsonl', got 'xml'"):
        write_predictions(ITEMS, "xml", 1)
