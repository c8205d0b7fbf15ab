"""Contact sheets, PNG text, GIFs and the loss curve: what is in the files, read back by Pillow."""

import numpy as np
import pytest
from PIL import Image

from lesion.run import files, sheets
from lesion.train import watch

SIDE = 24


def tiles(count: int) -> np.ndarray:
    """uint8 [count,SIDE,SIDE,3], each of one colour of its own."""
    colors = np.random.default_rng(0).permutation(200)[:count, None] + np.array([0, 20, 50])
    return np.broadcast_to(colors[:, None, None], (count, SIDE, SIDE, 3)).astype(np.uint8)


# --- sheets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(1, 8, (1, 1)), (8, 8, (1, 8)), (9, 8, (2, 8)), (5, 2, (3, 2))]
)
def test_sheet(count, columns, shape):
    """Tiles stand row by row with white gaps of 6 pixels around each; the last row's rest is white."""
    images = tiles(count)
    sheet = sheets.as_array(sheets.contact_sheet(images, columns))
    rows, across = shape
    assert sheet.shape == (rows * (SIDE + 6) + 6, across * (SIDE + 6) + 6, 3)
    rest = np.ones(sheet.shape[:2], bool)
    for number, image in enumerate(images):
        row, column = divmod(number, across)
        place = np.s_[6 + row * 30 : 6 + row * 30 + SIDE, 6 + column * 30 : 6 + column * 30 + SIDE]
        assert (sheet[place] == image).all()
        rest[place] = False
    assert (sheet[rest] == 255).all()


def test_sheet_with_titles():
    """A line of text above each row moves the tiles down and nothing else."""
    images = tiles(4)
    sheet = sheets.as_array(sheets.contact_sheet(images, 2, ["real", "drawn"]))
    assert sheet.shape == (2 * (SIDE + 6 + 15) + 6, 2 * 30 + 6, 3)
    assert (sheet[21 : 21 + SIDE, 6:30] == images[0]).all()
    assert (sheet[66 : 66 + SIDE, 36:60] == images[3]).all()
    for top in (6, 51):
        assert sheet[top : top + 15].min() < 128  # ink


def test_stack():
    """Sheets of different widths one above the other, each under its title, none cut."""
    one, two = (Image.fromarray(np.full((10, width, 3), 90, np.uint8)) for width in (40, 70))
    picture = sheets.as_array(sheets.stack([one, two], ["step 0", "step 9"]))
    assert picture.shape == (2 * (10 + 15), 70, 3)
    assert (picture[15:25, :40] == 90).all()
    assert (picture[15:25, 40:] == 255).all()
    assert (picture[40:50] == 90).all()


# --- files -----------------------------------------------------------------------------------------------------------


def test_png(tmp_path):
    """Pixels are lossless, text chunks come back whole: non-Latin letters, line ends and a long prompt."""
    image = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    text = {
        "parameters": "a naevus, 6 mm\nSteps: 50",
        "lesion": '{"text": "\u03bc\u00e9\u6bcd\u6591 \U0001f642"}',
        "long": "x" * 20_000,
    }
    sheets.save_png(tmp_path / "a.png", image, text)
    with Image.open(tmp_path / "a.png") as back:
        assert back.format == "PNG"
        assert back.text == text
        assert (np.asarray(back) == image).all()
    sheets.save_png(tmp_path / "b.png", Image.fromarray(image))
    assert (sheets.open_images([tmp_path / "a.png", tmp_path / "b.png"]) == image).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_equal_pictures_are_equal_files(tmp_path):
    """Neither a time nor a library's name gets into the bytes between two writes."""
    for name in "ab":
        sheets.save_png(tmp_path / f"{name}.png", tiles(1)[0], {"k": "v"})
        sheets.save_gif(tmp_path / f"{name}.gif", list(tiles(3)))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_gif(tmp_path):
    """Every frame is there, 80 ms each, the last rests 1.5 s, it loops, and first and last keep their colours."""
    ramp = np.linspace(0, 1, 7)[:, None, None, None]
    noise = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3))
    end = np.full((SIDE, SIDE, 3), (200, 150, 130)) - 40 * (np.indices((SIDE, SIDE)).sum(0) % 2)[..., None]
    frames = ((1 - ramp) * noise + ramp * end).round().astype(np.uint8)
    sheets.save_gif(tmp_path / "a.gif", list(frames))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 7
        assert gif.info["loop"] == 0
        durations, shown = [], []
        for number in range(gif.n_frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
            shown.append(np.asarray(gif.convert("RGB")).astype(int))
    assert durations == [80] * 6 + [1500]
    assert np.abs(shown[-1] - end).mean() < 6
    assert np.abs(shown[0] - noise).mean() < 40  # 256 colours for pure noise
    assert np.abs(shown[0] - end).mean() > 50


def test_frames_of_a_gif_are_bounded(tmp_path, monkeypatch):
    """Six of many frames are kept, first and last among them, all of a few; frames of more pixels than fit, whatever the file's
    size, are refused before any is decoded, and damaged bytes in one line."""
    sheets.save_gif(tmp_path / "a.gif", list(np.random.default_rng(0).integers(256, size=(21, SIDE, SIDE, 3), dtype=np.uint8)))
    with Image.open(tmp_path / "a.gif") as gif:
        shown = []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append(sheets.as_array(gif))
    assert len(shown) == 21
    assert (sheets.open_frames(tmp_path / "a.gif") == np.stack([shown[i] for i in (0, 4, 8, 12, 16, 20)])).all()
    assert len(sheets.open_frames(tmp_path / "a.gif", most=50)) == 21
    monkeypatch.setattr(sheets, "LARGEST", 6 * SIDE * SIDE - 1)
    with monkeypatch.context() as patch:
        patch.setattr(sheets, "as_array", lambda _: pytest.fail("decoded"))
        with pytest.raises(ValueError, match="6 frames of 24x24 pixels are more than are read"):
            sheets.open_frames(tmp_path / "a.gif")
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="damaged"):
        sheets.open_frames(tmp_path / "a.gif")



# --- loss curve ------------------------------------------------------------------------------------------------------


def curve(path):
    """The drawn PNG as floats, after a check that it is one."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 800
        return np.asarray(image.convert("RGB")).astype(float)


def has(picture, color):
    return (np.abs(picture - np.array(color)).max(-1) < 12).any()


BLUE, ORANGE, GREEN, PINK = (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)


def test_loss_curve(tmp_path):
    """A log with empty quartiles (None), skipped norms and validations: every line that has points is drawn."""
    rows = []
    for step in range(1, 41):
        quartiles = {f"loss_q{q}": 0.1 * q + 0.01 * (step % 3) if (step + q) % 2 else None for q in (1, 2, 3)}
        rows.append({"step": step, "loss": 1 / step, **quartiles, "loss_q4": None, "grad_norm": None, "lr": 1e-4})
    files.append_jsonl(tmp_path / "metrics.jsonl", *rows)
    watch.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "train.png")
    training = curve(tmp_path / "train.png")
    assert has(training, BLUE)  # the running mean
    assert has(training, GREEN)  # the second quartile
    assert not has(training, ORANGE)  # no validation in this log
    assert not has(training, PINK)  # the fourth quartile has no point at all

    checks = [
        {"step": step, "val_loss": 0.5, **{f"val_loss_q{q}": 0.2 * q for q in (1, 2, 3, 4)}} for step in (0, 20, 40)
    ]
    files.append_jsonl(tmp_path / "metrics.jsonl", *checks)
    watch.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "both.png")
    both = curve(tmp_path / "both.png")
    assert has(both, ORANGE)
    assert has(both, PINK)


def test_loss_curve_of_the_shortest_run(tmp_path):
    """One step, and a log whose last line a crash tore."""
    files.append_jsonl(tmp_path / "metrics.jsonl", {"step": 1, "loss": 0.9, "loss_q1": 0.9, "loss_q2": None})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo')
    watch.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    curve(tmp_path / "loss.png")
