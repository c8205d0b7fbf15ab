"""A headless Chromium for the tests of the web pages; skipped, saying so, where there is none."""
import shutil

import pytest


@pytest.fixture(scope="session")
def _chromium():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                 "--disable-background-timer-throttling", "--disable-renderer-backgrounding"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(_chromium):
    """The session's browser with one fresh window, no emulation, and an empty log."""
    old = _chromium.window_handles
    _chromium.switch_to.window(old[0])
    _chromium.switch_to.new_window("window")
    fresh = _chromium.current_window_handle
    for handle in old:
        _chromium.switch_to.window(handle)
        _chromium.close()
    _chromium.switch_to.window(fresh)
    _chromium.get_log("browser")
    return _chromium
