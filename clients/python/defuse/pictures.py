"""Contact sheets of regions, animations, and data URIs of images."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from defuse.errors import InvalidInput
from defuse.values import Images, RealImage, RegionPictures

# In pixels: side of one image on a sheet, space between images, height of a text line.
_SIDE, _GAP, _LINE = 84, 6, 18
_COLUMNS = 8
_INK, _PAPER, _FAINT = (25, 25, 25), (255, 255, 255), (120, 120, 120)


def to_image(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Return pixels (h, w, c) with 1 or 3 channels as an image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def enlarge(pixels: npt.NDArray[np.uint8], side: int = _SIDE) -> Image.Image:
    """Return an RGB image, scaled to a longer side of `side` pixels."""
    image = to_image(pixels)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST).convert("RGB")


def read_picture(path: Path, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return the pixels (h, w, c) uint8 of an image file.

    Raises InvalidInput for other files, and for sizes other than `shape`.
    """
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("L" if shape[2] == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{path} is not a readable image: {error}") from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape != tuple(shape):
        raise InvalidInput(
            f"{path} has {pixels.shape[0]}x{pixels.shape[1]} pixels, the model takes {shape[0]}x{shape[1]}"
        )
    return pixels


def write_animation(path: Path, images: Images, labels: Sequence[str], *, frame_ms: int = 80) -> None:
    """Write images (n, h, w, c) as a GIF, forwards and backwards.

    Each frame shows its label below the image and lasts `frame_ms` milliseconds.
    """
    frames = [_labelled(pixels, label) for pixels, label in zip(images, labels, strict=True)]
    first, *others = [*frames, *frames[-2:0:-1]]
    first.save(path, save_all=True, append_images=others, duration=frame_ms, loop=0)


def _labelled(pixels: npt.NDArray[np.uint8], label: str) -> Image.Image:
    picture = enlarge(pixels, 2 * _SIDE)
    frame = Image.new("RGB", (picture.width, picture.height + _LINE + _GAP), _PAPER)
    frame.paste(picture)
    ImageDraw.Draw(frame).text((_GAP, picture.height + 2), label, _INK, font_size=14)
    return frame


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Return pixels (h, w, c) as the data URI of a PNG."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def contact_sheet(pictures: RegionPictures) -> Image.Image:
    """Return the contact sheet of a region, for annotation.

    Rows of failures alternate with rows of their source images; the nearest training
    images follow.
    """
    region = pictures.region
    rows = [
        row
        for begin in range(0, len(pictures.exemplars), _COLUMNS)
        for row in (
            (f"predicted {region.predicted_label}", pictures.exemplars[begin : begin + _COLUMNS]),
            (f"source images, labelled {region.true_label}", pictures.sources[begin : begin + _COLUMNS]),
        )
    ]
    rows += [
        (_title_with_labels("nearest training images", region.nearest), pictures.nearest),
        (
            _title_with_labels("nearest misclassified training images", region.nearest_misclassified),
            pictures.nearest_misclassified,
        ),
    ]
    rows = [(title, images) for title, images in rows if len(images)]
    width = _COLUMNS * (_SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, 4 * _LINE + len(rows) * (_SIDE + _LINE + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"{region.run} / {region.id}: {region.true_label} predicted as {region.predicted_label}"
    draw.text((_GAP, _GAP), title, _INK, font_size=14)
    inside, control = region.real_error_rate, region.control_error_rate.value
    details = [
        f"{region.size} failures, score {region.score:.3f}, error rate {region.error_rate}, controls {control:.3f}",
        f"real images inside: {inside.successes} of {inside.trials} misclassified, stability {region.stability:.2f}",
    ]
    for line, text in enumerate(details, start=1):
        draw.text((_GAP, _GAP + line * _LINE), text, _FAINT, font_size=12)
    top = 4 * _LINE
    for title, images in rows:
        top = _paste_row(sheet, draw, top, title, images[:_COLUMNS])
    return sheet


def _title_with_labels(title: str, near: Sequence[RealImage]) -> str:
    """Return a title with the labels of real images, and wrong predictions."""
    labels = [
        image.label if image.label == image.predicted_label else f"{image.label} as {image.predicted_label}"
        for image in near
    ]
    return f"{title}: {', '.join(labels)}"


def _paste_row(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, title: str, images: Images | Sequence[Images]
) -> int:
    """Paste a titled row of images, and return the next row's top."""
    draw.text((_GAP, top), title, _FAINT, font_size=11)
    for column, pixels in enumerate(images):
        sheet.paste(enlarge(pixels), (_GAP + column * (_SIDE + _GAP), top + _LINE - 2))
    return top + _LINE + _SIDE + _GAP
