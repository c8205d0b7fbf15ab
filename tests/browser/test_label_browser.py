"""The labelling app in a real browser (headless Chromium): keys alone, undo, reload, a killed server, tabs, legibility."""
import os

import pytest

from lesion.describe.prompts import NAMES, VOCABULARY, from_sentence
from lesion.run import files
from lesion.web import label_folder

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from label_person import Person, key_of  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

ANSWERS = {"skin_tone": "tan", "size": "over 9 mm", "color": "black", "other_colors": ["red"], "symmetry": "asymmetric",
           "shape": "oval", "border": "irregular", "edge": "blurred", "surface": []}


def test_five_tiles_by_keyboard_alone(browser, serve):
    """Tile 1 by nine numbers, one key an attribute and none to advance; tiles 2 to 5 by accepting, two keys each. Two
    undos, a reload, a server killed before an answer and started again: the page and the journal go on at the right
    tile, nothing is lost, and the manifest says what was answered."""
    server = serve()
    person = Person(browser, server.url)
    person.at(0, "skin_tone")
    for name, value in ANSWERS.items():
        person.at(0, name)
        person.press(key_of(name, value))
    person.at(1, "skin_tone")
    assert person.pressed == len(VOCABULARY)
    person.press(Keys.ENTER, "0")
    person.at(2)
    assert person.pressed == len(VOCABULARY) + 2
    person.press(Keys.ENTER, "2")
    person.at(3)
    person.press(Keys.BACKSPACE)
    person.at(2, "surface")
    person.press(Keys.BACKSPACE)
    person.at(2, "skin_tone")
    browser.refresh()
    person.at(2, "skin_tone")
    person.press(Keys.ENTER, "1")
    person.at(3)
    person.press(Keys.ENTER)
    person.at(3, "surface")
    server.kill()
    person.press("3")
    person.wait(lambda: "Not saved yet" in person.text("status"))
    server.start()
    person.at(4)
    server.kill()
    server.start()
    browser.refresh()
    person.at(4, "skin_tone")
    person.press(Keys.ENTER, "0")
    person.at(5)
    errors = [entry for entry in browser.get_log("browser") if "ERR_CONNECTION" not in entry["message"]]
    assert errors == []
    server.stop()
    tiles = label_folder.Labels(server.rows()).tiles
    rows = [row for row in files.read_manifest(server.folder) if row["label"] == "malignant"]
    said = [tiles[row["file_name"]] for row in rows[:5]]
    assert all(tile.is_complete() for tile in said)
    assert said[0].answers == ANSWERS
    assert [tile.answers["surface"] for tile in said] == [[], [], ["scale"], ["ulcer"], []]
    assert sum(row["event"] == "undo" for row in server.rows()) == 2
    for row, tile in zip(rows, said):
        assert row["attributes"] == tile.answers
        assert from_sentence(row["text"]) == ("malignant", tile.answers)
    assert "suggested" not in rows[5]


def test_several_values_flag_comment_and_sentence(browser, serve):
    """Shift adds values and stays, Space goes on; taps do the same; F flags, C comments, E edits the sentence, which is
    live, refuses nonsense in words and keeps the keys to itself; arrows move without answering; filters show."""
    server = serve()
    person = Person(browser, server.url)
    person.at(0)
    row = files.read_manifest(server.folder)[0]
    main = row["attributes"]["color"]
    person.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    person.at(0, "other_colors")
    wanted = [name for name in NAMES["color"] if name != main][-2:]
    person.press("0")
    person.at(0, "symmetry")
    person.press(Keys.ARROW_UP)
    for name in wanted:
        person.at(0, "other_colors")
        person.shifted(next(v.key for v in VOCABULARY["color"].values if v.name == name))
        person.wait(lambda name=name: name in person.state()["sentence"])
    assert f"{main} with {' and '.join(wanted)}" in browser.find_element(By.ID, "sentence").get_attribute("value")
    person.at(0, "other_colors")
    person.press(" ")
    person.at(0, "symmetry")
    browser.find_element(By.CSS_SELECTOR, "[data-name=surface]").click()
    for key in ("1", "2"):
        person.at(0, "surface")
        browser.find_element(By.CSS_SELECTOR, f"#options [data-key='{key}']").click()
    person.wait(lambda: "with scale and crust" in person.state()["sentence"])
    person.at(0)
    person.press("f")
    person.wait(lambda: person.state()["flagged"])
    person.at(0)
    person.press("c")
    browser.switch_to.active_element.send_keys("unsure 3 f z", Keys.ENTER)
    person.wait(lambda: person.state()["comment"] == "unsure 3 f z")
    person.at(0)
    assert person.state()["flagged"]
    person.press("e")
    box = browser.switch_to.active_element
    assert box.get_attribute("id") == "sentence"
    box.send_keys(Keys.END, Keys.CONTROL, Keys.END)
    box.send_keys(Keys.NULL)
    box.send_keys(", <b>veil</b>", Keys.ENTER)
    person.wait(lambda: "is not in the vocabulary" in person.text("status"))
    box.send_keys(Keys.ESCAPE)
    assert box.get_attribute("value") == person.state()["sentence"]
    person.press("e")
    box = browser.switch_to.active_element
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.NULL)
    box.send_keys("a clinical photograph of a malignant skin lesion on dark skin, 3 to 4 mm across, with ulcer", Keys.ENTER)
    person.wait(lambda: person.state()["tile"] == 1)
    person.at(1)
    person.press(Keys.ARROW_RIGHT)
    person.at(2)
    person.press(Keys.ARROW_LEFT)
    person.at(1)
    person.press("z", "r")
    assert browser.find_element(By.CSS_SELECTOR, "#original .window.zoomed .rings").is_displayed()
    browser.find_element(By.CSS_SELECTOR, "#filter option[value=flagged]").click()
    person.at(0)
    assert person.text("place") == "Tile 1 of 1 flagged"
    browser.find_element(By.CSS_SELECTOR, "#filter option[value=changed]").click()
    person.at(0)
    assert [entry for entry in browser.get_log("browser") if "400" not in entry["message"]] == []
    said = label_folder.Labels(server.rows()).tiles[row["file_name"]]
    assert said.answers == {**dict.fromkeys(VOCABULARY), "skin_tone": "dark", "size": "3 to 4 mm", "surface": ["ulcer"]}


def test_two_tabs_and_quick_fingers(browser, serve):
    """Keys pressed faster than the server answers fill one tile in order and never spill into the next; a held key
    counts once; a tab that is behind is told, shows how the tile stands, and overwrites nothing."""
    server = serve()
    person = Person(browser, server.url)
    person.at(0)
    browser.execute_script("""const press = (key, more) => document.body.dispatchEvent(
            new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
        for (const key of "231212211" + "66") press(key);
        for (let n = 0; n < 9; n++) press("Enter", {repeat: true});""")
    person.at(1, "skin_tone")
    assert len(server.rows()) == 9
    browser.switch_to.new_window("tab")
    other = Person(browser, server.url)
    other.at(1)
    other.press("6")
    other.at(1, "size")
    browser.switch_to.window(browser.window_handles[0])
    person.press("1")
    person.wait(lambda: "another tab" in person.text("status"))
    person.at(1, "size")
    assert [row["answers"] for row in server.rows()[9:]] == [{"skin_tone": "dark"}]


def test_the_ruler_is_true_and_pixels_are_whole(browser, serve):
    """The scale below is as wide as the tile's 15 mm, a tick a millimetre; P shows each pixel of the tile as a whole number
    of screen pixels, unsmoothed; beside it the original, where the set is normalised."""
    server = serve(color_norm="grey-world")
    person = Person(browser, server.url)
    person.size(3840, 2160)
    person.at(0)
    side = browser.execute_script("return document.querySelector('#original img').naturalWidth")
    person.press("p")
    for kind in ("normalised", "original"):
        image = browser.find_element(By.CSS_SELECTOR, f"#{kind} img")
        assert image.value_of_css_property("image-rendering") == "pixelated"
        assert image.size["width"] >= 2 * side
        assert image.size["width"] % side == 0
        ruler = browser.find_element(By.CSS_SELECTOR, f"#{kind} .ruler")
        assert ruler.rect["width"] == pytest.approx(image.rect["width"], abs=0.5)
        assert ruler.rect["x"] == pytest.approx(image.rect["x"], abs=0.5)
        assert len(ruler.find_elements(By.TAG_NAME, "i")) == 16
        assert "15 mm" in ruler.text


CONTRAST = """
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (rgb) => { const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = (node) => { for (; node; node = node.parentElement) {
  const c = parts(getComputedStyle(node).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll(
  "h1,h2,p,button,button span,kbd,label,small,textarea,input:not([type=range],[type=checkbox]),figcaption,.ruler span")]
  .filter((node) => node.offsetParent && (node.textContent.trim() || node.value) && !node.closest(":disabled")).map((node) => {
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), node.tagName + " " + node.textContent.trim().slice(0, 30)]; });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_legible_and_fits(browser, serve, scheme):
    """Every text has a contrast of at least 4.5 (WCAG AA) in light and dark, and every control has a name."""
    server = serve(color_norm="shades-of-gray")
    person = Person(browser, server.url)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    person.at(0)
    person.press("2", "3", "3")
    person.at(0, "other_colors")
    for width, height in ((390, 844), (1280, 800)):
        person.size(width, height)
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 250))")  # colours fade over
        assert [pair for pair in browser.execute_script(CONTRAST) if pair[0] < 4.5] == []
        controls = browser.find_elements(By.CSS_SELECTOR, "button, input, textarea, select, img, progress")
        assert [node.tag_name for node in controls if node.is_displayed() and not node.accessible_name] == []
        if folder := os.environ.get("LESION_SCREENSHOTS"):
            browser.save_screenshot(f"{folder}/label-{width}-{scheme}.png")
