"""Someone at the labelling page: for the browser tests."""
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from lesion.describe.prompts import VOCABULARY


def key_of(name, value):
    return "0" if value == [] else next(v.key for v in VOCABULARY[name].values if v.name == (value[0] if value.__class__ is list
                                                                                              else value))


class Person:
    """Someone at the keyboard: sees tile and question, waits for the page to be ready, presses keys."""

    def __init__(self, driver, url):
        self.driver, self.pressed = driver, 0
        driver.get(url)

    def state(self):
        return self.driver.execute_script("return typeof state === 'undefined' ? null : state")

    def text(self, identity):
        return self.driver.execute_script("return document.getElementById(arguments[0])?.textContent ?? ''", identity)

    def wait(self, condition, seconds=20):
        return WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(lambda driver: condition())

    def ready(self):
        return self.driver.execute_script(
            "return typeof state !== 'undefined' && !busy && !waiting.length && performance.now() - shownAt >= SETTLE_MS")

    def at(self, tile, active=None):
        def there():
            now = self.state()
            return now and self.ready() and now["tile"] == tile and active in (None, now["active"])
        self.wait(there)

    def press(self, *keys):
        for key in keys:
            self.driver.find_element(By.TAG_NAME, "body").send_keys(key)
            self.pressed += 1

    def size(self, width, height, scale=1):
        """A screen of width x height CSS pixels; scale 2 is what a browser's 200 % zoom gives."""
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 1000 and scale == 1})
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def box(self, selector):
        """[x, y, width, height] on the screen."""
        return self.driver.execute_script("""const r = document.querySelector(arguments[0]).getBoundingClientRect();
            return [r.x, r.y, r.width, r.height].map((v) => Math.round(10 * v) / 10);""", selector)

    def click(self, selector):
        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def finger(self, start, *way):
        """A finger down at `start`, over the points of `way`, up."""
        points = [start, *way]
        for kind, at in (("touchStart", start), *(("touchMove", point) for point in points[1:]), ("touchEnd", None)):
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {
                "type": kind, "touchPoints": [] if at is None else [{"x": at[0], "y": at[1]}]})

    def shifted(self, key):
        webdriver.ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()
