"""The report in a real browser (headless Chromium): phone to desktop without sideways scroll, dark mode, paper, alternative texts."""
import base64

import numpy as np
import pytest
from made_runs import results_of, write_run
from PIL import Image

from lesion.report import classification, front, page, plots, plots_pictures
from lesion.run import sheets

SIZES = [(390, 844), (768, 1024), (820, 1180), (1366, 640), (1440, 900), (3840, 2160), (720, 450)]  # the last: 1440 x 900 at 200 % zoom


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The address of a report of six arms, tiles and a film, with folder names as long as they come."""
    root = tmp_path_factory.mktemp("report")
    write_run(root / "run", {"B0": -0.5, "A1": 0.0, "W1": 0.1, "S2": 0.2, "S2w": 0.2, "O1": 0.1})
    blocks, results, figures = classification.build(root / "run", None)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    name = "a-folder-with-a-name-that-does-not-fit-into-a-phone-" * 2
    rows = [(words, [{"images": [image]} for image in images]) for words in ("real malignant", "held-out real malignant", name)]
    pairs = [{"images": [one, two], "caption": "malignant-00001   0.93", "marked": True} for one, two in zip(images, images[1:])]
    sheets.save_gif(root / "out" / "figures" / "film.gif", list(images[:3]))
    figures["film-steps"] = plots_pictures.steps(images)
    tiles = [page.heading("Are the tiles faithful?"), page.tiles("tiles", "Tiles.", "tiles at random", rows),
             page.animation("film", "film-steps", "A film.", "tiles emerging from noise"),
             page.tiles("worst", "Pairs.", "pairs", [("", pairs)])]
    found = results_of(root / "run") | {"run": results["run"]}
    first, drawn = front.build({"classification": found}, {"classification": blocks}, [
        ("Made", "2026-01-31"), ("Command", f"python evaluate.py --synthetic samples/{name} --classify runs/classify --out report")])
    first.insert(2, [tiles[1:3]])
    for stem, figure in (figures | drawn).items():
        plots.save(figure, root / "out" / "figures", stem)
    page.write(root / "out", "Synthetic skin lesions: are they useful?", [*blocks, *tiles], {}, first)
    return (root / "out" / "report.html").as_uri()


def show(browser, report, width, height, scheme="light", media="screen"):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1,
                                                                   "mobile": width < 500})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(report)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_nothing_scrolls_sideways(browser, report, width, height):
    """The page is as wide as the window, and no text, figure or table reaches beyond it; charts fill a phone and their smallest
    type (8 points) is shown at 8 pixels or more."""
    show(browser, report, width, height)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('p, li, dd, th, td, img, h1, h2, h3, figcaption, caption, .title, .tiles')]"
        ".filter(e => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1"
        " && getComputedStyle(e.closest('thead') || e).position != 'absolute').map(e => e.outerHTML.slice(0, 80))")
    assert beyond == []
    shown = browser.execute_script(
        "return [...document.querySelectorAll('img.chart')].map(e => [e.currentSrc.length, e.clientWidth, e.naturalWidth])")
    assert min(wide / natural for _, wide, natural in shown) * 8 * 96 / 72 >= 8, shown


def contrast(one, two):
    """WCAG contrast ratio of two CSS colours rgb(r, g, b)."""
    def light(colour):
        parts = np.array([float(part) for part in colour[colour.index("(") + 1:-1].split(",")[:3]]) / 255
        return np.dot([0.2126, 0.7152, 0.0722], np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4))
    high, low = sorted((light(one), light(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(browser, report, scheme):
    """Every kind of text has a contrast of 4.5 or more with the page; in the dark the page is dark, charts turn with it and
    tiles keep their colours."""
    show(browser, report, 1440, 900, scheme)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (contrast(ground, "rgb(0, 0, 0)") < 2) == (scheme == "dark")
    for kind in ("p", "p.lead", "figcaption", "caption", "td", "th", "a", "dt", "li", "h2", ".tiles span"):
        colour = browser.execute_script("return getComputedStyle(document.querySelector(arguments[0])).color", kind)
        assert contrast(colour, ground) >= 4.5, kind
    style = "return getComputedStyle(document.querySelector(arguments[0])).filter"
    assert ("invert" in browser.execute_script(style, "img.chart")) == (scheme == "dark")
    assert browser.execute_script(style, ".tiles img") == "none"


def test_a_chart_has_no_ground_of_its_own(browser, report, tmp_path):
    """In the dark a chart's corner and the middle of its axes are the page's colour: no white or black box."""
    show(browser, report, 1440, 900, "dark")
    chart = browser.find_element("css selector", "img.chart")
    (tmp_path / "chart.png").write_bytes(base64.b64decode(chart.screenshot_as_base64))
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    assert values[counts.argmax()].tolist() == [0x15, 0x18, 0x1b]
    assert counts.max() > 0.8 * len(pixels)


def test_every_picture_is_said_in_words(browser, report):
    """Each image has an alternative text, or stands in a group that has one; headings go down step by step; tables keep their
    roles where a phone shows them as cards."""
    show(browser, report, 390, 844)
    silent = browser.execute_script("return [...document.images].filter(e => !e.alt && !(e.closest('[role=img]')"
                                    " && e.closest('[role=img]').getAttribute('aria-label'))).length")
    assert silent == 0
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3')].map(e => +e.tagName[1])")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    assert browser.execute_script("return document.querySelectorAll('table').length"
                                  " == document.querySelectorAll('[role=table]').length")
    links = browser.execute_script("return [...document.querySelectorAll('nav a')].map(e => !!document.querySelector(e.hash))")
    assert len(links) > 4
    assert all(links)


def test_the_first_sheet_holds_the_answer_and_its_limits(browser, report):
    """On A4 the first page, to its contents list, fits one sheet; headings and captions stay with what follows; a still stands
    for the film; the printed body is 9 points or more, tables 8."""
    show(browser, report, 703, 1013, media="print")  # 186 x 268 mm: A4 less its margins
    assert browser.execute_script("return document.querySelector('.front').getBoundingClientRect().height") <= 1013
    points = "return parseFloat(getComputedStyle(document.querySelector(arguments[0])).fontSize) * 72 / 96"
    assert browser.execute_script(points, "main > p") >= 9
    assert browser.execute_script(points, "td") >= 8
    for kind in ("h2", "h3", "caption", "thead"):
        assert browser.execute_script(f"return getComputedStyle(document.querySelector('{kind}')).breakAfter") == "avoid", kind
    assert browser.execute_script("return getComputedStyle(document.querySelector('caption')).breakInside") == "avoid"
    shows = "return [...document.querySelectorAll(arguments[0])].map(e => e.getClientRects().length)"
    assert set(browser.execute_script(shows, "img.motion")) == {0}
    assert set(browser.execute_script(shows, "img.still")) == {1}
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert 4 <= pdf.count(b"/Type /Page\n") <= 14
