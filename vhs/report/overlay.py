"""Radiographs with their key points drawn on, singly and as contact sheets."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vhs.measure import View

AXIS_COLOURS = ((240, 170, 20), (86, 190, 245), (60, 205, 140), (225, 130, 190))  # apart for colour-blind readers too
GAP_PX = 4


def overlay(image: np.ndarray, points: np.ndarray, view: View, caption: str = "", scale: int = 1) -> np.ndarray:
    """`image` uint8 [H, W] with the view's axes and named `points` [K, 2] (px of the image) drawn on -> uint8 [H scale, W scale, 3].

    A `scale` above 1 enlarges the image first, so that names stay legible on small radiographs; `caption` goes along the lower edge.
    Raises ValueError unless there is one point for each of the view's names; points outside the image are simply not seen.
    """
    if np.shape(points) != (len(view.points), 2):
        names = ", ".join(view.points)
        raise ValueError(f"{view.name} draws {len(view.points)} points ({names}), got an array of shape {np.shape(points)}")
    height, width = (side * scale for side in image.shape)
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    draw, unit = ImageDraw.Draw(picture), max(1.0, min(height, width) / 256)
    spots = (np.asarray(points, dtype=float) + 0.5) * scale - 0.5  # pixel centres are integers before and after
    font, radius = _font(unit), 2.5 * unit
    colours = {point: AXIS_COLOURS[axis % len(AXIS_COLOURS)] for axis, ends in enumerate(view.axes) for point in ends}
    for i, j in view.axes:
        draw.line([tuple(spots[i]), tuple(spots[j])], fill=colours[i], width=round(1.5 * unit))
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in spots]
    for k, colour in colours.items():
        draw.ellipse(taken[k], fill=colour, outline="black")
    opposite: dict[int, int] = {}  # the other end of each point's first axis: a point of two axes is named once
    for i, j in view.axes:
        opposite.setdefault(i, j), opposite.setdefault(j, i)
    for k, other in opposite.items():
        name, outward = view.points[k].replace("_", " "), spots[k] - spots[other]
        box = _place(draw.textbbox((0, 0), name, font=font, stroke_width=1), spots[k], outward, radius, picture.size, taken)
        draw.text(box[:2], name, font=font, anchor="lt", fill=colours[k], stroke_width=1, stroke_fill="black")
        taken.append(box)
    return captioned(np.asarray(picture), caption)


def captioned(image: np.ndarray, caption: str) -> np.ndarray:
    """`image` uint8 [H, W] or [H, W, 3] with `caption` along its lower edge, cut to its width -> uint8 [H, W, 3]."""
    picture = Image.fromarray(image).convert("RGB")
    if caption:
        draw, (width, height) = ImageDraw.Draw(picture), picture.size
        font = _font(max(1.0, min(picture.size) / 256))
        while len(caption) > 1 and draw.textlength(caption, font=font) > width - 6:
            caption = caption[:-2] + "…"
        _, _, _, bottom = draw.textbbox((0, 0), "Ag", font=font)
        draw.rectangle((0, height - bottom - 5, width, height), fill=(0, 0, 0))
        draw.text((3, height - bottom - 3), caption, font=font, fill="white")
    return np.asarray(picture)


def fitted(image: np.ndarray, side_px: int) -> tuple[np.ndarray, float]:
    """`image` uint8 [H, W] resized so that its longer side is `side_px` -> it and the scale; a point p of it lies at (p + 0.5) scale - 0.5."""
    scale = side_px / max(image.shape)
    height, width = (max(1, round(side * scale)) for side in image.shape)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)), scale


def contact_sheet(images: list[np.ndarray], columns: int) -> bytes:
    """The images (uint8 [H, W] or [H, W, 3], sizes may differ) in rows of `columns` -> PNG, the same bytes every time."""
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    tiles = [Image.fromarray(image).convert("RGBA") for image in images]
    cell_w, cell_h = max(tile.width for tile in tiles) + GAP_PX, max(tile.height for tile in tiles) + GAP_PX
    columns = min(columns, len(tiles))
    sheet = Image.new("RGBA", (columns * cell_w - GAP_PX, math.ceil(len(tiles) / columns) * cell_h - GAP_PX))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * cell_w, i // columns * cell_h))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _place(text: tuple, spot: np.ndarray, outward: np.ndarray, radius: float, size: tuple[int, int], taken: list[tuple]) -> tuple:
    """Box (left, top, right, bottom) for a name beyond the end of its axis, or turned from there to cover least of `taken`."""
    half, corner, best, least = np.array([text[2] - text[0], text[3] - text[1]]) / 2, np.array(size) - 1, None, np.inf
    for turn in np.radians((0, 45, -45, 90, -90, 135, -135)):
        angle = np.arctan2(outward[1], outward[0]) + turn
        middle = spot + np.array([np.cos(angle), np.sin(angle)]) * (half + 1.5 * radius)
        middle = np.clip(middle, half, np.maximum(half, corner - half))
        box = (*(middle - half), *(middle + half))
        covered = sum(max(0, min(box[2], b[2]) - max(box[0], b[0])) * max(0, min(box[3], b[3]) - max(box[1], b[1])) for b in taken)
        if covered < least:
            best, least = box, covered
    return best


def _font(unit: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=max(9, round(13 * unit)))
