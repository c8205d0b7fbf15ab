"""The labelling page at every size, by keyboard alone, by touch, and by people together, in a real headless Chromium."""
import os
import time

import pytest

from lesion.describe.prompts import NAMES, VOCABULARY
from lesion.web import label_folder
from lesion.web.label_pages import SWATCHES

pytest.importorskip("selenium.webdriver", reason="needs selenium")
from label_person import Person  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

# width, height in CSS pixels, device pixels a CSS pixel, least side of the tile; the last two are 1440x900 and 1366x640 at 200 %
SIZES = [(390, 844, 1, 270), (820, 1180, 1, 420), (1366, 640, 1, 390), (1440, 900, 1, 590), (3840, 2160, 1, 1400),
         (720, 450, 2, 240), (683, 320, 2, 150)]
ACTIONS = ("acceptAll", "acceptOne", "undo", "previous", "next")


def in_view(box, width, height):
    x, y, w, h = box
    return w > 0 and h > 0 and x >= -0.5 and y >= -0.5 and x + w <= width + 0.5 and y + h <= height + 0.5


def test_every_size(browser, serve):
    """On a phone, a tablet, a low laptop, a desk, a 4K screen and at 200 % zoom: nothing scrolls sideways; the tile is
    large, and with accept, undo and the moves it stays in view however far the page is scrolled; every answer can be
    brought into view between them, 44 px high; no button and no tile's edge moves from one tile to the next; the desk
    needs no scrolling at all; two pictures stand side by side or one can be switched to."""
    server = serve(color_norm="grey-world")
    person = Person(browser, server.url)
    person.at(0)
    first = person.state()["name"]
    for width, height, scale, least in SIZES:
        where = f"{width}x{height}"
        person.size(width, height, scale)
        browser.get(server.url + "?tile=" + first)
        person.at(0)
        boxes = []
        for tile in (0, 1):
            if tile:
                person.press(Keys.ARROW_RIGHT)
                person.at(1)
            browser.execute_script("window.scrollTo(0, 0)")
            boxes.append({name: person.box(f"[data-do={name}]") for name in ACTIONS}
                         | {n: person.box(f"#options button:nth-child({n})") for n in range(1, 8)}
                         | {"tile": person.box("figure:not([hidden]) .window")})
        assert boxes[0] == boxes[1], where
        if folder := os.environ.get("LESION_SCREENSHOTS"):
            browser.save_screenshot(f"{folder}/looks-{where}.png")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, where
        shown = browser.execute_script("return [...document.querySelectorAll('figure:not([hidden])')].length")
        assert boxes[0]["tile"][2] >= (least if shown == 1 else 0.75 * least), where
        if shown == 1:
            kind = browser.find_element(By.CSS_SELECTOR, "figure:not([hidden])").get_attribute("id")
            person.press("n")
            assert browser.find_element(By.CSS_SELECTOR, "figure:not([hidden])").get_attribute("id") != kind
            person.press("n")
        for bottom in ("0", "document.documentElement.scrollHeight"):
            browser.execute_script(f"window.scrollTo(0, {bottom})")
            for selector in ("figure:not([hidden]) .window", *(f"[data-do={name}]" for name in ACTIONS)):
                assert in_view(person.box(selector), width, height), (where, selector, bottom, person.box(selector))
        if width >= 1000 and height >= 560:
            assert browser.execute_script("return document.documentElement.scrollHeight") <= height, where
            for part in (".question", ".sheet"):
                assert browser.execute_script("const e = document.querySelector(arguments[0]);"
                                              "return e.scrollHeight - e.clientHeight", part) <= 1, (where, part)
        for n in range(1, 8):
            button = browser.find_element(By.CSS_SELECTOR, f"#options button:nth-child({n})")
            browser.execute_script("arguments[0].scrollIntoView({block: 'nearest'})", button)
            hit = browser.execute_script("""const r = arguments[0].getBoundingClientRect();
                return arguments[0].contains(document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2));""", button)
            assert hit, (where, n)
            assert button.size["height"] >= 43.5, (where, n)


def test_one_tile_alone_fills_the_height(browser, serve):
    """Without a normalised twin the tile takes nearly all of the height that bars and header leave."""
    server = serve()
    person = Person(browser, server.url)
    for width, height, _, least in SIZES[2:5]:
        person.size(width, height)
        person.at(0)
        assert person.box("figure:not([hidden]) .window")[2] >= least


def test_a_finished_tile_stays_as_it_is(browser, serve):
    """Shift with the numbers of the last attribute, then Space, as the page says: the next tile comes, and the numbers that
    follow answer that one. Back on the finished tile by the way forward, numbers change nothing and the page says why; an
    explicit step back, or a click, lets one answer be changed, and only that one."""
    server = serve()
    person = Person(browser, server.url)
    person.at(0)
    person.press(Keys.ENTER)
    person.at(0, "surface")
    for key in "12":
        person.shifted(key)
        person.wait(lambda: person.ready())
        person.at(0, "surface")
    assert person.state()["complete"]
    assert "Space" in person.text("hint") or "Finished" in person.text("hint")
    person.press(" ")
    person.at(1, "skin_tone")
    person.press("6")
    person.at(1, "size")
    name = label_folder.select(server.folder, "malignant")[0][0]["file_name"]
    first = label_folder.Labels(server.rows()).tiles[name]
    assert first.answers["surface"] == ["scale", "crust"]
    assert first.was["skin_tone"] == "accepted"
    before = dict(first.answers)
    browser.get(server.url + "?tile=" + person.state()["name"])  # tile 1; from there the long way round to tile 0
    person.at(1)
    browser.execute_script("go(0)")
    person.at(0)
    person.press("6", "5", "U")
    assert "finished" in person.text("status")
    assert label_folder.Labels(server.rows()).tiles[name].answers == before
    person.press(Keys.ARROW_UP)
    person.at(0, "surface")
    person.press(Keys.ARROW_UP)
    person.at(0, "edge")
    other = "1" if before["edge"] == "blurred" else "2"
    person.press(other)
    person.at(0, "edge")
    person.press("1", "2")
    assert "finished" in person.text("status")
    person.click("[data-name=border]")
    person.at(0, "border")
    person.press("1" if before["border"] == "irregular" else "2")
    person.at(0, "border")
    after = label_folder.Labels(server.rows()).tiles[name].answers
    assert {key for key in before if before[key] != after[key]} == {"edge", "border"}
    person.press(Keys.ENTER)
    person.at(1)
    person.press(Keys.ARROW_LEFT)  # an explicit step back
    person.at(0, "skin_tone")
    value = NAMES["skin_tone"][0 if before["skin_tone"] != NAMES["skin_tone"][0] else 1]
    person.press("1" if value == NAMES["skin_tone"][0] else "2")
    person.wait(lambda: label_folder.Labels(server.rows()).tiles[name].answers["skin_tone"] == value)


def active(browser):
    return browser.execute_script("""const e = document.activeElement;
        return [e.parentElement.id || e.parentElement.className, [...e.parentElement.children].indexOf(e)];""")


def test_focus_stays_where_it_was(browser, serve):
    """Tabbed to the third answer and pressed Enter: answer, next question and even the next tile come, the focus is still on
    the third place; the same on accept and undo; after editing the sentence the focus is back where it was; a mouse click
    leaves Enter to the page."""
    server = serve()
    person = Person(browser, server.url)
    person.at(0)
    browser.execute_script("document.querySelector('#options button:nth-child(3)').focus()")
    for name in list(VOCABULARY)[:3]:
        person.at(0, name)
        webdriver_press(browser, Keys.ENTER)
        assert active(browser) == ["options", 2]
    person.at(0, "other_colors")
    accept = browser.find_element(By.CSS_SELECTOR, "[data-do=acceptAll]")
    browser.execute_script("arguments[0].focus()", accept)
    where = active(browser)
    webdriver_press(browser, Keys.ENTER)
    person.at(0, "surface")
    assert active(browser) == where  # though nothing is left to accept
    webdriver_press(browser, "2")
    person.at(1)
    assert active(browser) == where
    webdriver_press(browser, "e")
    assert active(browser) != where
    webdriver_press(browser, Keys.ENTER)
    assert active(browser) == where
    person.click("[data-do=zoom]")
    webdriver_press(browser, Keys.ENTER)  # the page's Enter, not the zoom button's
    person.at(1, "surface")
    assert browser.execute_script("return view.zoomed")


def webdriver_press(browser, *keys):
    """To whatever has the focus."""
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def test_single_keys_can_be_switched_off(browser, serve):
    """? shows the keys; switched off there, letters and numbers do nothing, over a reload too, while Tab, Enter, Space and
    the arrows label a whole tile; switched on again they answer."""
    server = serve()
    person = Person(browser, server.url)
    person.at(0)
    person.press("?")
    assert browser.find_element(By.ID, "sheet-of-keys").is_displayed()
    webdriver_press(browser, "2")  # nothing is answered under the list
    person.click("#single-keys")
    webdriver_press(browser, Keys.ESCAPE)
    assert not browser.find_element(By.ID, "sheet-of-keys").is_displayed()
    for _ in range(2):
        person.press("2", "u", "f", "z", "?")
        assert server.rows() == []
        assert not browser.execute_script("return view.zoomed")
        browser.refresh()
        person.at(0)
    person.press(Keys.ENTER)
    person.at(0, "surface")
    for _ in range(80):
        webdriver_press(browser, Keys.TAB)
        if browser.execute_script("return document.activeElement.dataset.key") == "0":
            break
    webdriver_press(browser, Keys.ENTER)
    person.at(1)
    assert label_folder.Labels(server.rows()).complete
    person.click("#keys")
    person.click("#single-keys")
    person.click("#sheet-of-keys .primary")
    person.at(1)
    person.press("2")
    person.at(1, "size")


def test_by_touch_alone_on_a_phone(browser, serve):
    """A swipe to the right over the tile accepts every suggestion, a tap answers the surface: two gestures a tile. A swipe
    aslant or to the left, or a short one, accepts nothing; undo is one tap away."""
    server = serve()
    person = Person(browser, server.url)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        person.size(390, 844)
        for tile in range(2):
            person.at(tile)
            x, y, w, h = person.box("figure:not([hidden]) .window")
            person.finger((x + 60, y + h / 2), (x + 120, y + h / 2 + 5), (x + 200, y + h / 2 + 8))
            person.at(tile, "surface")
            tap(person, "#options button[data-key='0']")
        person.at(2)
        assert [row["by"] for row in server.rows()] == ["swipe", "button"] * 2
        tap(person, "[data-do=undo]")
        person.at(1, "surface")
        before = len(server.rows())
        person.click("[data-do=next]")
        person.at(2, "skin_tone")
        for way in ((-120, 0), (40, 0), (75, 60)):
            person.finger((x + w / 2, y + h / 2), (x + w / 2 + way[0], y + h / 2 + way[1]))
        time.sleep(0.3)
        person.at(2, "skin_tone")
        assert len(server.rows()) == before
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def tap(person, selector):
    time.sleep(0.4)  # a finger that is put down again sooner belongs to the gesture before
    person.driver.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'nearest'})", selector)
    x, y, w, h = person.box(selector)
    person.finger((x + w / 2, y + h / 2))


def test_a_blind_page_shows_no_suggestion(browser, serve):
    """--blind: no mark, no value, no sentence of the machine's anywhere; Enter accepts nothing and says so."""
    server = serve(flags=["--blind"])
    person = Person(browser, server.url)
    person.at(0)
    assert not browser.find_elements(By.CSS_SELECTOR, ".suggested, .proposed")
    assert "suggested" not in browser.find_element(By.TAG_NAME, "body").text.lower()
    assert browser.find_element(By.ID, "sentence").get_attribute("value") == "a clinical photograph of a malignant skin lesion"
    person.press(Keys.ENTER)
    person.wait(lambda: "no suggestion" in person.text("status"))
    assert server.rows() == []


def test_two_people_and_an_adjudicator(browser, serve):
    """Two windows of one server, by personal link: each goes their own way and the page of progress counts both. They differ
    in twelve answers: the adjudicator sees those only, decides each with one key, takes one back, and it is told when
    all are decided; a reload goes on."""
    server = serve(flags=["--people", "anna", "ben"], malignant=5)
    anna = Person(browser, server.links["anna"])
    one = browser.current_window_handle
    browser.switch_to.new_window("window")
    ben = Person(browser, server.links["ben"])
    two = browser.current_window_handle
    keys_of = {"anna": "111011110", "ben": "111011222"}
    for window, person, keys in ((one, anna, keys_of["anna"]), (two, ben, keys_of["ben"])):
        browser.switch_to.window(window)
        person.at(0, "skin_tone")
        for tile in range(5 if person is ben else 4):
            person.at(tile, "skin_tone")
            for name, key in zip(VOCABULARY, keys, strict=True):
                person.at(tile, name)
                person.press(key)
    browser.switch_to.window(one)
    anna.at(4, "skin_tone")
    browser.get(server.links["progress"])
    assert "4 of 5" in browser.find_element(By.TAG_NAME, "table").text
    assert "5 of 5" in browser.find_element(By.TAG_NAME, "table").text
    links = browser.find_elements(By.LINK_TEXT, "Decide them")
    counted = browser.find_element(By.XPATH, "//p[contains(., 'disagreement')]").text
    links[0].click()
    judge = Judge(browser)
    total = judge.state()["cases"]
    assert f"{total} disagreements" in counted
    assert total == 4 * sum(a != b for a, b in zip(*keys_of.values(), strict=True))
    for number in range(total):
        judge.at(number)
        judge.press("1" if number % 2 else "2")
        if number == 5:
            judge.at(6)
            judge.press(Keys.BACKSPACE)
            judge.at(5)
            judge.press("1")
        if number == 8:
            judge.at(9)
            browser.refresh()
    judge.wait(lambda: judge.state()["at"] is None)
    assert "Every disagreement is decided" in browser.find_element(By.ID, "done").text or "decided" in judge.text("status")
    rows = label_folder.Labels(server.rows("adjudicator")).history
    assert sum(row["by"] == "adjudicate" for row in rows) == total
    assert browser.get_log("browser") == []


class Judge(Person):
    """Someone at the adjudication page, open already."""

    def __init__(self, driver):
        self.driver, self.pressed = driver, 0

    def at(self, case):
        self.wait(lambda: self.driver.execute_script(
            "return typeof state !== 'undefined' && !busy && state.at === arguments[0] && performance.now() - shownAt >= SETTLE_MS", case))


def test_twenty_disagreements_one_key_each(browser, serve):
    """Twenty disagreements at a phone's and a desk's size: tile, answers and their people in view without scrolling
    sideways, one key each, twenty rows; ? shows the keys, and switched off there a number decides nothing."""
    server = serve(malignant=5, flags=["--people", "anna", "ben"])
    server.stop()
    rows = label_folder.select(server.folder, "malignant")[0]
    for name, place in (("anna", 0), ("ben", 1)):
        from lesion.web.journal import Journal
        with Journal(label_folder.journal_path(server.folder, name)) as journal:
            for row in rows:
                answers = {key: NAMES[key][place] for key in ("symmetry", "shape", "border", "edge")}
                journal.append({"event": "answer", "id": os.urandom(8).hex(), "tile": row["file_name"], "answers": answers,
                                "was": dict.fromkeys(answers, "given"), "time": label_folder.now()})
    server.flags = ["--adjudicate"]
    server.start()
    browser.get(server.url)
    judge = Judge(browser)
    for number in range(20):
        judge.at(number)
        if number in (0, 10):
            width, height = ((390, 844), (1366, 640))[number > 0]
            judge.size(width, height)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            for selector in ("#tile", "#options button:nth-child(1)", "#options button:nth-child(2)", "[data-do=undo]"):
                assert in_view(judge.box(selector), width, height), selector
            assert [b.text for b in browser.find_elements(By.CSS_SELECTOR, "#options span")] == ["anna", "ben"]
            if folder := os.environ.get("LESION_SCREENSHOTS"):
                browser.save_screenshot(f"{folder}/adjudicate-{width}.png")
        if number == 15:
            judge.press("?")
            webdriver_press(browser, "2")
            judge.click("#single-keys")
            webdriver_press(browser, Keys.ESCAPE)
            judge.press("2")
            time.sleep(0.3)
            assert judge.state()["at"] == number
            judge.click("#keys")
            judge.click("#single-keys")
            webdriver_press(browser, Keys.ESCAPE)
        judge.press("2")
    judge.wait(lambda: judge.state()["at"] is None)
    tiles = label_folder.Labels(server.rows("adjudicator")).tiles
    assert all(tiles[row["file_name"]].answers == {key: NAMES[key][1] for key in ("symmetry", "shape", "border", "edge")} for row in rows)


def test_find_open_and_filter(browser, serve):
    """The id is in view and links to the tile; / finds by a part of an id; ?tile=ID opens, and a reload after moving on goes
    on where the work is; filters by attribute and low confidence say how many; the CSV link answers."""
    server = serve()
    person = Person(browser, server.url)
    person.at(0)
    names = [row["file_name"] for row in label_folder.select(server.folder, "malignant")[0]]
    identity = browser.find_element(By.ID, "identity")
    assert identity.is_displayed()
    assert identity.text == person.state()["name"]
    identity.click()
    person.at(0)
    assert "tile=" in browser.current_url
    person.press("/")
    wanted = names[4].split("/")[-1].split(".")[0]
    webdriver_press(browser, wanted, Keys.ENTER)
    person.at(4)
    assert "tile=" not in browser.current_url
    webdriver_press(browser, Keys.ESCAPE)
    person.press("/")
    browser.switch_to.active_element.clear()
    webdriver_press(browser, "no such tile", Keys.ENTER)
    person.wait(lambda: "no tile here has" in person.text("status"))
    webdriver_press(browser, Keys.ESCAPE)
    browser.get(server.url + "?tile=" + wanted)
    person.at(4)
    browser.find_element(By.CSS_SELECTOR, "#filter option[value^='border=']").click()
    person.wait(lambda: (person.state()["filter"] or "").startswith("border="))
    person.at(person.state()["tile"])
    state = person.state()
    assert person.text("place") == f"Tile 1 of {state['members']} Border: {state['filter'].split('=')[1]}"
    reply = browser.execute_async_script("fetch('labels.csv').then((r) => r.text()).then(arguments[0])")
    assert len(reply.splitlines()) == 8


def test_looking_closer_changes_nothing_but_the_view(browser, serve):
    """Brightness and contrast act on the picture and are plain again on the next tile; a line dragged over a third of the
    tile reads 5.0 mm, also zoomed; rings stand about the measured centre; a swatch stands beside each skin tone and
    each colour."""
    server = serve()
    person = Person(browser, server.url)
    person.size(1440, 900)
    person.at(0)
    def swatches():
        found = browser.find_elements(By.CSS_SELECTOR, "#options .swatch")
        return [swatch.value_of_css_property("background-color") for swatch in found if swatch.is_displayed()]
    tones, colours = (["rgba({}, {}, {}, 1)".format(*bytes.fromhex(color[1:])) for color in SWATCHES[name].values()]
                      for name in ("skin_tone", "color"))
    assert swatches() == tones
    for name, wanted in (("size", []), ("color", colours), ("other_colors", colours)):
        browser.find_element(By.CSS_SELECTOR, f"[data-name={name}]").click()
        person.at(0, name)
        assert swatches() == wanted
        if folder := os.environ.get("LESION_SCREENSHOTS"):
            browser.save_screenshot(f"{folder}/swatches-{name}.png")
    browser.execute_script("""for (const [id, v] of [["brightness", 150], ["contrast", 80]]) {
        const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event("input", {bubbles: true})); }""")
    image = browser.find_element(By.CSS_SELECTOR, "#original img")
    assert image.value_of_css_property("filter") == "brightness(1.5) contrast(0.8)"
    person.press("m")
    x, y, w, h = person.box("#original .window")
    mouse(browser, (x + w / 3, y + h / 2), (x + 2 * w / 3, y + h / 2))
    assert browser.find_element(By.CSS_SELECTOR, "#original .length").text == "5.0 mm"
    person.press("m", "z", "m")
    mouse(browser, (x + w / 5, y + h / 2), (x + 4 * w / 5, y + h / 2))
    assert browser.find_element(By.CSS_SELECTOR, "#original .length").text == "3.0 mm"
    person.press("m", "z", "r")
    centre = browser.execute_async_script("const done = arguments[0]; fetch('centre/0').then((r) => r.json()).then(done)")
    person.wait(lambda: browser.execute_script("return view.centre[0]") == centre["x"])
    rx, ry, rw, rh = person.box("#original .rings i:nth-child(2)")
    assert rx + rw / 2 - x == pytest.approx(centre["x"] * w, abs=2)
    assert ry + rh / 2 - y == pytest.approx(centre["y"] * h, abs=2)
    assert rw == pytest.approx(6 / 15 * w, abs=3)
    person.press(Keys.ARROW_RIGHT)
    person.at(1)
    assert image.value_of_css_property("filter") == "brightness(1) contrast(1)"
    assert server.rows() == []


def mouse(browser, start, end):
    for kind, (x, y), buttons in (("mousePressed", start, 1), ("mouseMoved", end, 1), ("mouseReleased", end, 0)):
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "button": "left", "buttons": buttons,
                                                             "clickCount": 1})
