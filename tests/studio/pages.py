"""What a person does on the pages, by clicks and keys, and raters with a known taste."""

import time
from collections.abc import Callable
from typing import Any

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

Taste = Callable[[str], float]
SECONDS = 120.0


def shorter(text: str) -> float:
    """A taste for few words."""
    return -len(text.split())


def until(true: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """What a question answers as soon as it answers with something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = true()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds:g} s")


class Page:
    """A browser on a studio's pages."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def open(self, url: str) -> None:
        self.browser.get(url)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str) -> str:
        """What is shown there; empty where nothing is."""
        script = "const found = document.querySelector(arguments[0]); return found ? found.innerText : ''"
        return str(self.browser.execute_script(script, selector))

    def press(self, key: str) -> None:
        ActionChains(self.browser).send_keys(key).perform()

    def click(self, selector: str) -> None:
        """As a mouse does, once it can be clicked."""

        def tried() -> bool:
            from selenium.common.exceptions import WebDriverException

            found = [element for element in self.all(selector) if element.is_enabled()]
            try:
                for element in found[:1]:
                    self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
                    element.click()
            except WebDriverException:  # drawn anew just now
                return False
            return bool(found)

        until(tried, f"a click on {selector}")

    def step(self, number: int) -> None:
        """Open one of the project's steps."""
        until(lambda: self.all(f"#summary-{number}"), f"step {number}")
        script = "return document.querySelector(arguments[0]).open"
        if not self.browser.execute_script(script, f"#step-{number} details"):
            self.click(f"#summary-{number}")

    def done(self, number: int, seconds: float = SECONDS) -> str:
        """Wait until a step is done; what its line says."""
        until(lambda: self.all(f"#step-{number}.done"), f"step {number} done", seconds)
        return self.text(f"#summary-{number}")

    def value(self, selector: str, text: str) -> None:
        """Type over a field."""
        script = "document.querySelector(arguments[0]).closest('details').open = true"
        self.browser.execute_script(script, selector)
        field = self.all(selector)[0]
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(text)

    def label(self, count: int, taste: Taste) -> None:
        """Answer so many questions by one key each."""
        for _ in range(count):
            until(lambda: self.all("#left"), "a question")
            before = self.text("#figures"), self.text(".question")
            left, right = taste(self.text("#left")), taste(self.text("#right"))
            self.press("1" if left > right else "2" if right > left else "t")
            until(lambda before=before: (self.text("#figures"), self.text(".question")) != before, "the next question")

    def violations(self) -> list[str]:
        """What axe-core finds wrong with the page as it stands."""
        from axe_core_python.selenium import Axe

        found = Axe().run(self.browser)["violations"]
        return [
            f"{each['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
            for each in found
            for node in each["nodes"]
        ]
