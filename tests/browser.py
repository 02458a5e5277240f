"""A real browser without a window, driven by its own protocol."""

import json
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import SessionNotCreatedException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.wait import WebDriverWait

from tests.servers import required

FLAGS = [
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",  # which is small in a container
    "--disable-quic",
    "--no-first-run",
    # Nothing is asked for but what the pages ask for.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1600",
]


def _driver(options: webdriver.ChromeOptions) -> webdriver.Chrome:
    return webdriver.Chrome(options, webdriver.ChromeService(required("chromedriver")))


class Browser:
    """Chromium, and what its logs say of the pages since they were last asked."""

    def __init__(self, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = required("chromium")
        for flag in [*FLAGS, f"--user-data-dir={folder}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        try:
            self.driver = _driver(options)
        except SessionNotCreatedException:  # from a cold disk it can take longer to start than is waited for
            self.driver = _driver(options)

    def find(self, selector: str) -> WebElement:
        """The first element that a CSS selector matches, waited for until it can be seen."""
        wait = WebDriverWait(self.driver, 10, poll_frequency=0.05)
        return wait.until(expected_conditions.visibility_of_element_located((By.CSS_SELECTOR, selector)))

    def all(self, selector: str) -> list[WebElement]:
        """All elements that a CSS selector matches now."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def complaints(self) -> list[str]:
        """The errors in the console: everything that was refused, blocked or failed."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[tuple[str, str]]:
        """Method and address of every request of the pages, but for the browser's own and for data: in place."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [(each["method"], each["url"]) for each in sent if not each["url"].startswith(("chrome:", "data:"))]
