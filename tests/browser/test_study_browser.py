"""The study in a real browser (headless Chromium): keys, buttons, reload, killed server, double presses, two tabs."""
import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study_sets import real_set, synthetic_set

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from lesion.web import study_folder  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """`python -m lesion study` on a port of its own, which can be killed and started again."""

    def __init__(self, folder):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, "-m", "lesion", "study", str(self.folder), "--port",
                                         str(self.port)], cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
        self.links = {}
        while "organiser" not in self.links:
            line = self.process.stdout.readline()
            assert line, "the server ended"
            if found := re.match(r"(\S+): (http://\S+)$", line):
                self.links[found[1]] = found[2]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=20)


@pytest.fixture
def serve(tmp_path):
    servers = []

    def make(count, **settings):
        study_folder.create(tmp_path / "study", real_set(tmp_path / "real", count),
                            synthetic_set(tmp_path / "synthetic", count), count=count, seed=2, readers=2, **settings)
        servers.append(Server(tmp_path / "study"))
        return servers[0]
    yield make
    for server in servers:
        server.stop()


class Reader:
    """A reader at a browser window: sees the picture's number, waits for the page, presses keys or buttons."""

    def __init__(self, driver, window, link):
        self.driver, self.window, self.link = driver, window, link
        self.look()
        driver.get(link)

    def look(self):
        self.driver.switch_to.window(self.window)

    def wait(self, condition, seconds=20):
        return WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(lambda driver: condition())

    def text(self, selector):
        return self.driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def agree(self):
        self.driver.find_element(By.NAME, "agree").click()
        self.driver.find_element(By.CSS_SELECTOR, "button.primary").click()
        self.at(1)

    def is_at(self, number):
        """The page shows this picture, loaded, long enough to take an answer."""
        return self.text("#place").startswith(f"Picture {number} of ") and self.driver.execute_script(
            "return typeof ready !== 'undefined' && ready && performance.now() - shownAt >= SETTLE_MS")

    def at(self, number):
        self.look()
        self.wait(lambda: self.is_at(number))

    def press(self, keys):
        self.driver.find_element(By.TAG_NAME, "body").send_keys(keys)

    def click(self, rating):
        self.driver.find_element(By.CSS_SELECTOR, f"button[value='{rating}']").click()

    def done(self):
        self.look()
        self.wait(lambda: self.text("h1") == "Thank you")


def two_readers(driver, server):
    first = driver.current_window_handle
    driver.switch_to.new_window("window")
    second = driver.current_window_handle
    return (Reader(driver, first, server.links["reader-1"]), Reader(driver, second, server.links["reader-2"]))


def rating_of(reader, number):
    return 1 + (number * (3 if reader == 1 else 5)) % 6


def test_two_readers_side_by_side_finish_forty_tiles(browser, serve):
    """Reader 1 by keys, reader 2 by buttons, in turn, 40 tiles each. Reader 2 reloads at tile 12; at tile 20 the server
    is killed before reader 1's answer and comes back: both go on where they were, and every answer is the one given,
    with a plausible time."""
    server = serve(20)
    keys, buttons = two_readers(browser, server)
    for reader in (keys, buttons):
        reader.look()
        reader.agree()
    for number in range(1, 41):
        keys.at(number)
        if number == 20:
            server.kill()
        keys.press(str(rating_of(1, number)))
        if number == 20:
            keys.wait(lambda: "Not saved yet" in keys.text("#status"))
            server.start()
            keys.at(21)
        buttons.at(number)
        if number == 12:
            browser.refresh()
            buttons.at(12)
        buttons.click(rating_of(2, number))
    keys.done()
    buttons.done()
    errors = [entry for entry in browser.get_log("browser") if "ERR_CONNECTION" not in entry["message"]]
    assert errors == []
    server.stop()
    with open(server.folder / "answers.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 80
    for row in table:
        assert int(row["rating"]) == rating_of(int(row["reader"][-1]), int(row["position"]))
        assert row["by"] == ("key" if row["reader"] == "reader-1" else "button")
        assert row["changes"] == "0"
        assert 0.2 < float(row["client_s"]) < 60
    assert sum(row["server_s"] == "" for row in table) <= 2  # shown by the killed server, answered to the new one


def test_one_press_is_one_answer(browser, serve):
    """Two presses in a row, a held key, other keys and control combinations answer only the picture that was seen."""
    server = serve(4)
    reader = Reader(browser, browser.current_window_handle, server.links["reader-1"])
    reader.agree()
    browser.execute_async_script("""const done = arguments[0];
        const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
        press("3");
        press("3");
        const timer = setInterval(() => { if (state.position === 1 && ready) {
            clearInterval(timer);
            press("6"); // too soon to be meant for picture 2
            setTimeout(done, 400); } }, 5)""")
    reader.at(2)
    reader.press("0789xbm")
    browser.execute_script("""for (const more of [{repeat: true}, {ctrlKey: true}])
        document.dispatchEvent(new KeyboardEvent("keydown", {key: "5", ...more}))""")
    time.sleep(0.3)
    assert reader.is_at(2)
    reader.press("4")
    reader.at(3)
    rows = study_folder.read_answers(server.folder)[1]
    assert [(row["position"], row["rating"]) for row in rows] == [(1, 3), (2, 4)]


def test_two_tabs_of_one_reader(browser, serve):
    """Both tabs show picture 1; one answers it; the other's answer is refused in words and it moves on to picture 2."""
    server = serve(4)
    one = Reader(browser, browser.current_window_handle, server.links["reader-1"])
    one.agree()
    browser.switch_to.new_window("tab")
    two = Reader(browser, browser.current_window_handle, server.links["reader-1"])
    two.at(1)
    one.look()
    one.at(1)
    one.press("2")
    one.at(2)
    two.look()
    two.at(1)
    two.press("6")
    two.at(2)
    assert "answered already" in two.text("#status")
    assert [row["rating"] for row in study_folder.read_answers(server.folder)[1]] == [2]


def test_going_back_and_the_second_question(browser, serve):
    """With both options on: two keys an answer in either order, a way back that shows the old answer, and a change."""
    server = serve(4, allow_back=True, question_malignancy=True)
    reader = Reader(browser, browser.current_window_handle, server.links["reader-1"])
    reader.agree()
    reader.press("m")
    reader.wait(lambda: "Now:" in reader.text("#status"))
    reader.press("5")
    reader.at(2)
    reader.press("1")
    reader.wait(lambda: "Benign or malignant?" in reader.text("#status"))
    browser.find_element(By.XPATH, "//label[contains(., 'benign')]").click()
    reader.at(3)
    browser.find_element(By.ID, "back").click()
    reader.at(2)
    pressed = browser.find_elements(By.CSS_SELECTOR, "button[aria-pressed=true]")
    assert [button.get_attribute("value") for button in pressed] == ["1"]
    reader.press("6")
    reader.at(3)
    rows = study_folder.read_answers(server.folder)[1]
    assert [(row["rating"], row["malignant"], row["changes"]) for row in rows] == [(5, True, 0), (6, False, 1)]


def test_single_keys_can_be_switched_off(browser, serve):
    """? shows the keys, and the time under that list is not reading time; switched off there, numbers, letters and ? do
    nothing, over a reload too, while Tab and Enter answer; switched on again they answer."""
    server = serve(4, question_malignancy=True)
    reader = Reader(browser, browser.current_window_handle, server.links["reader-1"])
    reader.agree()

    def focused(*keys):
        for key in keys:
            browser.switch_to.active_element.send_keys(key)

    def sheet():
        return browser.find_element(By.ID, "sheet-of-keys").is_displayed()

    def answers():
        return study_folder.read_answers(server.folder)[1]
    reader.press("?")
    assert sheet()
    focused("m", "3")  # nothing is answered under the list
    time.sleep(2.5)
    focused(Keys.ESCAPE)
    assert not sheet()
    passed = browser.execute_script("return performance.now() - shownAt") / 1000
    reader.press("b")
    reader.press("4")
    reader.at(2)
    assert [(row["rating"], row["by"]) for row in answers()] == [(4, "key")]
    assert answers()[0]["client_s"] < passed - 1
    browser.find_element(By.ID, "keys").click()
    browser.find_element(By.ID, "single-keys").click()
    focused(Keys.ESCAPE)
    for _ in range(2):
        for key in ("m", "3", "?"):
            reader.press(key)
        assert not sheet()
        assert reader.is_at(2)
        assert not browser.find_elements(By.CSS_SELECTOR, "input:checked:not(#single-keys), [aria-pressed=true]")
        browser.refresh()
        reader.at(2)
    focused(Keys.TAB, " ")
    reader.wait(lambda: "Now:" in reader.text("#status"))
    for _ in range(8):
        focused(Keys.TAB)
        if browser.switch_to.active_element.get_attribute("value") == "5":
            break
    focused(Keys.ENTER)
    reader.at(3)
    assert [(row["rating"], row["malignant"], row["by"]) for row in answers()[1:]] == [(5, False, "button")]
    browser.find_element(By.ID, "keys").click()
    browser.find_element(By.ID, "single-keys").click()
    browser.find_element(By.CSS_SELECTOR, "#sheet-of-keys .primary").click()
    reader.press("m")
    reader.press("1")
    reader.at(4)
    assert (answers()[2]["rating"], answers()[2]["by"]) == (1, "key")


CONTRAST = """
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (rgb) => { const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = (node) => { for (; node; node = node.parentElement) {
  const c = parts(getComputedStyle(node).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll("h1,h2,p,li,a,button,button span,kbd,legend,label,th,td,small")]
  .filter((node) => node.offsetParent && node.textContent.trim()).map((node) => {
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), node.tagName + " " + node.textContent.trim().slice(0, 30)]; });
"""


# width and height in CSS pixels, side of the picture; the last two are 1440x900 and 1366x640 at 200 % zoom
SIZES = ((390, 844, 256), (360, 740, 256), (820, 1180, 384), (1366, 640, 256), (1440, 900, 384), (3840, 2160, 768), (720, 450, 256),
         (683, 320, 256))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_legible_and_fit(browser, serve, scheme):
    """Every text has a contrast of at least 4.5 (WCAG AA) in light and dark; no page scrolls sideways on a phone; every
    control has a name; the picture has one size a screen, is wholly in view, and at 200 % the answers stand beside it."""
    server = serve(4)
    reader = Reader(browser, browser.current_window_handle, server.links["reader-1"])
    reader.agree()
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for width, height, side in SIZES if scheme == "light" else SIZES[:1]:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700 and height > width})
        for link in (server.links["reader-2"], server.links["reader-1"], server.links["organiser"]):
            browser.get(link)
            low = [pair for pair in browser.execute_script(CONTRAST) if pair[0] < 4.5]
            assert low == []
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            controls = browser.find_elements(By.CSS_SELECTOR, "button, input, a, img, progress")
            assert [node.tag_name for node in controls if node.is_displayed() and not node.accessible_name] == []
            if link == server.links["reader-1"]:
                reader.at(1)
                tile = browser.find_element(By.ID, "tile").rect
                assert (tile["width"], tile["height"]) == (side, side)
                assert 0 <= tile["y"] <= height - side
                first = browser.find_element(By.CSS_SELECTOR, "button[name=rating]").rect
                assert first["y"] + first["height"] <= height
                shots = os.environ.get("LESION_SCREENSHOTS")
                if shots:
                    browser.save_screenshot(f"{shots}/tile-{width}-{scheme}.png")
                browser.find_element(By.ID, "keys").click()
                if shots:
                    browser.save_screenshot(f"{shots}/keys-{width}-{scheme}.png")
                rect = browser.find_element(By.ID, "sheet-of-keys").rect
                x, y, w, h = (rect[part] for part in ("x", "y", "width", "height"))
                assert min(x, y, width - x - w, height - y - h) >= 0
                assert [pair for pair in browser.execute_script(CONTRAST) if pair[0] < 4.5] == []
