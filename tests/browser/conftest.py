"""A headless Chromium for the tests of the web pages, and the labelling server; skipped, saying so, where there is none."""
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lesion.mini.phantoms import write_demo
from lesion.run import files
from lesion.web import label_folder
from lesion.web.journal import read_journal

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def _chromium():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1280,800",
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


class LabelServer:
    """`python -m lesion label` on a port of its own, which can be killed and started again."""

    def __init__(self, folder, *flags):
        self.folder, self.flags = folder, flags
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self):
        """Start, and note the links that are printed."""
        self.process = subprocess.Popen([sys.executable, "-m", "lesion", "label", str(self.folder), "--port", str(self.port),
                                         "--no-browser", *self.flags], cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
        self.links = {}
        for line in self.process.stdout:
            name, _, rest = line.partition(": ")
            if rest.startswith("http://"):
                self.links[name] = rest.split()[0]
            if line.startswith(("open ", "progress: ")):
                return
        raise AssertionError("the server ended")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=20)

    def rows(self, name="first"):
        return read_journal(self.folder / "labels" / f"{name}.jsonl", label_folder.check_row)[0]


def demo(folder, malignant, color_norm="none", benign=1):
    """The demo set, recorded as normalised where asked."""
    write_demo(folder, benign=benign, malignant=malignant)
    record = files.read_json(folder / "dataset.json")
    files.write_json(folder / "dataset.json", record | {"color_norm": color_norm})
    return folder


@pytest.fixture
def serve(tmp_path):
    """serve(...) starts a labelling server on a fresh demo set of seven malignant tiles."""
    servers = []

    def make(color_norm="none", benign=1, flags=(), malignant=7):
        servers.append(LabelServer(demo(tmp_path / "data", malignant, color_norm, benign), *flags))
        return servers[0]
    yield make
    for server in servers:
        server.stop()
