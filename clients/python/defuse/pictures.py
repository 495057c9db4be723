"""Pictures for people: contact sheets of regions, and images inside a page."""

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from defuse.values import Images, RegionPictures

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


def data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Return a picture as a PNG inside a URL."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def contact_sheet(pictures: RegionPictures) -> Image.Image:
    """Return one sheet to annotate a region from: its failures, and below each row the real images they come from."""
    region = pictures.region
    rows = math.ceil(len(pictures.exemplars) / _COLUMNS)
    width = _COLUMNS * (_SIDE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, 3 * _LINE + rows * (2 * (_SIDE + _LINE) + 2 * _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"{region.run} / {region.id}: {region.true_label} taken for {region.predicted_label}"
    draw.text((_GAP, _GAP), title, _INK, font_size=14)
    details = f"{region.size} failures, weight {region.weight:.3f}, error rate {region.error_rate}"
    draw.text((_GAP, _GAP + _LINE), details, _FAINT, font_size=12)
    top = 3 * _LINE
    for begin in range(0, len(pictures.exemplars), _COLUMNS):
        part = slice(begin, begin + _COLUMNS)
        top = _row(sheet, draw, top, f"answered {region.predicted_label}", pictures.exemplars[part])
        top = _row(sheet, draw, top, f"real images labelled {region.true_label}", pictures.sources[part])
    return sheet


def _row(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, title: str, images: Images | Sequence[Images]) -> int:
    """Paste one row of pictures under a title; return where the next row begins."""
    draw.text((_GAP, top), title, _FAINT, font_size=11)
    for column, pixels in enumerate(images):
        sheet.paste(enlarged(pixels), (_GAP + column * (_SIDE + _GAP), top + _LINE - 2))
    return top + _LINE + _SIDE + _GAP
