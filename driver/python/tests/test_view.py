"""`firn view` in a real browser, on a machine that runs."""

import os
import signal
import subprocess
import unittest
import urllib.error
import urllib.parse
import urllib.request
from typing import Literal

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from .support import BIN, RunTest

#: No wait here takes as long, even on a loaded machine without KVM.
PATIENCE = 300

TEST = r"""
name = "view"
test_script = '''
machine.wait_for_unit("getty@tty1.service")
machine.succeed("systemctl stop getty@tty1.service")
# What is typed on a terminal that nobody has open is lost.
machine.succeed(
    r"( printf '\033[2J\033[41m%2000s' ' ' >&0; read -r line; "
    'test "$line" = Hello-1 || { echo "read: $line" >&2; exit 1; }; ) <>/dev/tty1'
)
'''

[nodes.machine]
kit = "systemd"
vlans = []
screen = "plain"
keyboard = true
"""

#: Whether most of what 2000 blanks take on the console is red.
RED = """
const [canvas] = arguments;
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let red = 0;
for (let at = 0; at < pixels.length; at += 4) red += pixels[at] > 100 && pixels[at + 1] === 0;
return red > 100000;
"""


def browser() -> WebDriver:
    """Start a browser that nobody sees."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ):
        options.add_argument(argument)
    return webdriver.Chrome(options, Service("/usr/bin/chromedriver"))


class View(RunTest):
    """A test runs, and people watch it."""

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a command of firn's, which is ended in the end."""
        with (self.dir / arguments[0]).open("w") as log:
            process = subprocess.Popen(
                [BIN / "firn", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"TMPDIR": str(self.state)},
                cwd=self.dir,
            )

        def end() -> None:
            process.terminate()
            process.communicate(timeout=60)

        self.addCleanup(end)
        return process

    def view(self) -> tuple["subprocess.Popen[str]", str]:
        """Start the page, and give its address."""
        view = self.start("view", "--no-open")
        assert view.stdout is not None
        return view, view.stdout.readline().strip()

    def test_live(self) -> None:
        """A screen is seen to change in two browsers at once; what is typed there arrives."""
        (self.dir / "test.toml").write_text(TEST)
        run = self.start("test", "test.toml")
        view, address = self.view()
        windows = [browser(), browser()]
        for window in windows:
            self.addCleanup(window.quit)
            window.get(address)

        def canvas(window: WebDriver) -> WebElement | Literal[False]:
            self.assertIsNone(run.poll(), (self.dir / "test").read_text())
            found = window.find_elements(By.TAG_NAME, "canvas")
            return found[0] if found and window.execute_script(RED, found[0]) else False

        first, _ = (WebDriverWait(window, PATIENCE).until(canvas) for window in windows)
        self.assertIn("machine", windows[0].find_element(By.TAG_NAME, "figcaption").text)
        first.click()
        first.send_keys("Hello-1", Keys.ENTER)
        run.wait(PATIENCE)
        self.assertEqual(run.returncode, 0, (self.dir / "test").read_text())
        view.send_signal(signal.SIGINT)
        self.assertEqual(view.wait(10), 128 + signal.SIGINT)

    def test_strangers(self) -> None:
        """Who does not know the secret is told nothing, and nothing but the page is there."""
        view, address = self.view()
        url = urllib.parse.urlsplit(address)
        base = f"{url.scheme}://{url.netloc}"
        for path in (
            "/",
            "/machines",
            "/?token=",
            f"/?token={'0' * 32}",
            "/screen?machine=machine",
        ):
            with self.subTest(path), self.assertRaises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(base + path)
            self.assertEqual(raised.exception.code, 403)
            self.assertIn("open the address that `firn view`", raised.exception.read().decode())
        with urllib.request.urlopen(f"{base}/machines?{url.query}") as answer:
            self.assertEqual(answer.read(), b"[]")
        view.terminate()
        self.assertEqual(view.wait(10), 128 + signal.SIGTERM)
        self.assertIn("no machine with a screen runs yet", (self.dir / "view").read_text())

    def test_usage(self) -> None:
        """A directory that is not there, and a port that others have."""
        status = subprocess.run(
            [BIN / "firn", "view", "--no-open", "/not/there"],
            check=False,
            capture_output=True,
            text=True,
        )
        self.assertEqual(status.returncode, 1)
        self.assertIn("cannot look for machines in /not/there", status.stderr)
        _, address = self.view()
        port = str(urllib.parse.urlsplit(address).port)
        status = subprocess.run(
            [BIN / "firn", "view", "--no-open", "--port", port],
            check=False,
            capture_output=True,
            text=True,
        )
        self.assertEqual(status.returncode, 1)
        self.assertIn(f"cannot listen on port {port}", status.stderr)


if __name__ == "__main__":
    unittest.main()
