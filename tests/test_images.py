"""Calibration images of every kind, as the inputs of a model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fxbasis import UsageError
from fxbasis.images import BATCH, OwnTransform, Preparation, images_in, preparation_of

PLAIN = Preparation(mean=(0.0,) * 3, std=(1.0,) * 3)
RAMP = np.linspace(0, 255, 40, dtype=np.uint8)[None].repeat(30, 0)


def test_modes_show_the_same_picture(tmp_path: Path) -> None:
    grey = Image.fromarray(RAMP)
    kinds = {
        **{f"{mode}.png": grey.convert(mode) for mode in ("L", "RGB", "RGBA", "LA", "P")},
        "cmyk.tif": grey.convert("RGB").convert("CMYK"),
        "sixteen.png": Image.fromarray(RAMP.astype(np.uint16) * 257),
        "thirty-two.tif": Image.fromarray(RAMP.astype(np.int32) * 257),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    expected = PLAIN(grey, (3, 20, 20))
    for name in kinds:
        with Image.open(tmp_path / name) as image:
            found = PLAIN(image, (3, 20, 20))
        assert found.shape == (3, 20, 20)
        assert (found - expected).abs().max() <= 2 / 255, name
    assert expected.max() - expected.min() > 0.3


@pytest.mark.parametrize("size", [(3, 64, 64), (3, 20, 48), (3, 48, 20), (1, 100, 80), (1, 7, 5)])
@pytest.mark.parametrize("image", [(10, 10), (300, 20), (20, 300), (64, 64)])
def test_any_image_fills_any_input(size: tuple[int, int, int], image: tuple[int, int]) -> None:
    found = PLAIN(Image.new("RGB", image, (255, 255, 255)), size)
    assert found.shape == size
    torch.testing.assert_close(found, torch.ones(size))  # no black border where the image was too small


def test_values_are_normalised_by_channel() -> None:
    prepare = Preparation(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    expected = torch.tensor([0.9 / 0.5, -0.2, -0.3 / 2.0])
    torch.testing.assert_close(prepare(red, (3, 8, 8)).mean((1, 2)), expected)
    grey = prepare(Image.new("L", (8, 8), 255), (1, 8, 8))
    torch.testing.assert_close(grey.mean(), torch.tensor((1 - 0.2) / (3.5 / 3)))


def test_the_centre_is_cut_out() -> None:
    values = np.zeros((100, 100), np.uint8)
    values[:20] = values[-20:] = 255
    found = Preparation(mean=(0.0,), std=(1.0,), crop=0.5)(Image.fromarray(values), (1, 64, 64))
    assert found.max() < 0.1


def test_a_folder_is_read_in_batches_always_the_same(tmp_path: Path) -> None:
    for number in range(BATCH + 3):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("L", (6, 6), number).save(folder / f"{number}.{'PNG' if number % 3 else 'bmp'}")
    (tmp_path / "readme.txt").write_text("no image")
    first, second = images_in(tmp_path, (1, 6, 6), PLAIN)
    assert (len(first), len(second)) == (BATCH, 3)
    few, again = (torch.cat(images_in(tmp_path, (1, 6, 6), PLAIN, most=7)) for _ in range(2))
    assert len(few) == 7
    assert torch.equal(few, again)
    assert len(few.flatten(1)[:, 0].unique()) == 7


def test_mistakes_end_with_the_remedy(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"holds no images .*; name a folder of images"):
            images_in(folder, (3, 8, 8), PLAIN)
    with pytest.raises(UsageError, match="1 or 3 channels, and --input has 4; pass batches"):
        images_in(tmp_path, (4, 8, 8), PLAIN)
    Image.new("L", (64, 64), 7).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for damage in (whole[: len(whole) // 2], b"no picture", whole[:20] + b"x" * 40):
        (tmp_path / "a.png").write_bytes(damage)
        with pytest.raises(UsageError, match=r"a.png is no image that can be read .*; take it out"):
            images_in(tmp_path, (3, 8, 8), PLAIN)


@pytest.mark.parametrize(
    "spec", ["collections:OrderedDict", "timm:hf-hub:somebody/net", "torchvision:raft_small"]
)
def test_a_model_that_names_no_preparation_gets_the_usual_one(spec: str) -> None:
    assert preparation_of(spec) == Preparation()
    assert "names none" in preparation_of(spec).source


def test_the_preparation_of_a_known_model_is_its_own() -> None:
    pytest.importorskip("timm")
    assert preparation_of("torchvision:efficientnet_b1").crop == pytest.approx(240 / 255)
    inception = preparation_of("timm:inception_v3.gluon_in1k")
    assert preparation_of("timm:mixer_b16_224").mean == (0.5, 0.5, 0.5)
    assert inception.source == "those of timm's weights"


def own(transform: Callable[[Image.Image], object]) -> OwnTransform:
    return OwnTransform(transform, "net.py")


def test_the_transform_beside_a_model_prepares_its_images(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n\n\ndef transform(image):\n    return torch.full((3, 4, 5), float(image.width))\n"
    )
    found = preparation_of(f"{tmp_path}/net.py:net")
    assert str(found) == f"by the transform of {tmp_path}/net.py"
    assert torch.equal(found(Image.new("L", (7, 6)), (3, 4, 5)), torch.full((3, 4, 5), 7.0))
    assert own(lambda image: torch.zeros(1, 2, 2))(Image.new("RGB", (2, 2)), (1, 2, 2)).shape == (1, 2, 2)


def test_a_transform_that_does_not_fit_ends_with_the_remedy() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(UsageError, match=r"net.py gave \(3, 9, 9\) for an input of \(3, 4, 4\); .* --input"):
        own(lambda image: torch.zeros(3, 9, 9))(image, (3, 4, 4))
    with pytest.raises(UsageError, match=r"net.py gave a Image for an input of"):
        own(lambda image: image)(image, (3, 4, 4))
    with pytest.raises(UsageError, match=r"net.py raised KeyError: 'x'; it must take a PIL image \(RGB\)"):
        own(lambda image: {}["x"])(image, (3, 4, 4))
