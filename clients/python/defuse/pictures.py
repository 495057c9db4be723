"""Pictures for people: contact sheets of regions, and images inside a page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from defuse.errors import InvalidInput
from defuse.values import Images, RealImage, RegionPictures

# Pixels: side of one image on a sheet, space between images, height of a line of text.
_SIDE, _GAP, _LINE = 84, 6, 18
_COLUMNS = 8
_INK, _PAPER, _FAINT = (25, 25, 25), (255, 255, 255), (120, 120, 120)


def to_image(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Return one picture (h, w, c) with 1 or 3 channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def enlarged(pixels: npt.NDArray[np.uint8], side: int = _SIDE) -> Image.Image:
    """Return a picture whose longer side has `side` pixels, each pixel kept a square."""
    image = to_image(pixels)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST).convert("RGB")


def read_picture(path: Path, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return a picture file as (h, w, c) uint8 of a shape; raise InvalidInput for any other file."""
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("L" if shape[2] == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{path} is no picture that can be read: {error}") from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape != tuple(shape):
        raise InvalidInput(
            f"{path} has {pixels.shape[0]}x{pixels.shape[1]} pixels, the model takes {shape[0]}x{shape[1]}"
        )
    return pixels


def write_animation(path: Path, images: Images, labels: Sequence[str], *, frame_ms: int = 80) -> None:
    """Write frames (n, h, w, c) as a GIF that goes there and back, each with its label below."""
    frames = [_labelled(pixels, label) for pixels, label in zip(images, labels, strict=True)]
    there_and_back = [*frames, *frames[-2:0:-1]]
    first, *others = there_and_back
    first.save(path, save_all=True, append_images=others, duration=frame_ms, loop=0)


def _labelled(pixels: npt.NDArray[np.uint8], label: str) -> Image.Image:
    picture = enlarged(pixels, 2 * _SIDE)
    frame = Image.new("RGB", (picture.width, picture.height + _LINE + _GAP), _PAPER)
    frame.paste(picture)
    ImageDraw.Draw(frame).text((_GAP, picture.height + 2), label, _INK, font_size=14)
    return frame


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Return a picture as a PNG inside a URL."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def contact_sheet(pictures: RegionPictures) -> Image.Image:
    """Return one sheet to annotate a region from: its failures, and below each row the real images they come from."""
    region = pictures.region
    rows = [
        row
        for begin in range(0, len(pictures.exemplars), _COLUMNS)
        for row in (
            (f"answered {region.predicted_label}", pictures.exemplars[begin : begin + _COLUMNS]),
            (f"their sources, real images labelled {region.true_label}", pictures.sources[begin : begin + _COLUMNS]),
        )
    ]
    rows += [
        (_labels("nearest training images", region.nearest), pictures.nearest),
        (
            _labels("nearest misclassified training images, and as what", region.nearest_misclassified),
            pictures.nearest_misclassified,
        ),
    ]
    rows = [(title, images) for title, images in rows if len(images)]
    width = _COLUMNS * (_SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, 4 * _LINE + len(rows) * (_SIDE + _LINE + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"{region.run} / {region.id}: {region.true_label} taken for {region.predicted_label}"
    draw.text((_GAP, _GAP), title, _INK, font_size=14)
    inside, control = region.real_error_rate, region.control_error_rate.value
    details = [
        f"{region.size} failures, score {region.score:.3f}, error rate {region.error_rate}, controls {control:.3f}",
        f"real images inside: {inside.successes} of {inside.trials} wrong, stability {region.stability:.2f}",
    ]
    for line, text in enumerate(details, start=1):
        draw.text((_GAP, _GAP + line * _LINE), text, _FAINT, font_size=12)
    top = 4 * _LINE
    for title, images in rows:
        top = _row(sheet, draw, top, title, images[:_COLUMNS])
    return sheet


def _labels(title: str, near: Sequence[RealImage]) -> str:
    """Return a title with the labels of real images, and what they are taken for where that is wrong."""
    labels = [
        image.label if image.label == image.predicted_label else f"{image.label} as {image.predicted_label}"
        for image in near
    ]
    return f"{title}: {', '.join(labels)}"


def _row(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, title: str, images: Images | Sequence[Images]) -> int:
    """Paste one row of pictures under a title; return where the next row begins."""
    draw.text((_GAP, top), title, _FAINT, font_size=11)
    for column, pixels in enumerate(images):
        sheet.paste(enlarged(pixels), (_GAP + column * (_SIDE + _GAP), top + _LINE - 2))
    return top + _LINE + _SIDE + _GAP
