"""Pictures of every view of the page, in light and dark, wide and narrow, for a look by eye.

Enters: a folder to write to (default docs/screens), perhaps a model. Leaves: one PNG a view, theme and width.
Runs the real server on a real model and drives it in headless Chromium: python docs/screenshots.py [FOLDER]
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from regard.lens.compare import Comparing
from regard.lens.links import find
from regard.lens.look import look
from regard.lens.models import Loaded, load
from regard.lens.payload import first_selection, payload
from regard.lens.server import View, bind, serve

SENTENCE = "The cat sat on the mat because it was tired"
OTHER = "The cat sat on the mat because it was soft"
STORY = "One morning the old king of the hills went down to the river, for nobody had told him where the boats were. "
VIEWS = {
    "sentence": "#l=5&h=11&w=0.8&pins=0.8",
    "how": "#l=5&h=11&w=0.8&how=1",
    "several-heads": "#l=5&h=11&w=0.8&heads=5.11,3.1",
    "two-pins": "#l=5&h=11&w=0.8&pins=0.8,0.2",
    "shaded": "#l=5&h=11&shade=received",
    "heads": "#l=5&h=11&w=0.8&view=heads",
    "heads-sorted": "#l=5&h=11&w=0.8&view=heads&sort=entropy",
    "map": "#l=5&h=11&w=0.8&view=map",
    "effects": "#l=5&h=11&w=0.8&view=effects",
    "compare": f"#l=5&h=11&w=0.8&view=compare&with={OTHER.replace(' ', '%20')}",
}
LONG = {
    "long-sentence": "#l=2&h=0&w=0.700",
    "long-map": "#l=2&h=0&view=map",
    "long-close": "#l=2&h=0&view=map&at=12_1000_980",
}


def served(loaded: Loaded, text: str, pair: tuple[str, str] | None) -> str:
    """Serve a look in a thread; the address."""
    from importlib import import_module
    from importlib.util import find_spec

    seen = look(loaded, text)
    found = None if pair is None else find(seen, 0, *pair)
    view = View(seen, payload(seen, first_selection(seen, None, None, found), found, live=True))
    listening, ready = bind(None), threading.Event()
    asks = {"compare": Comparing()}
    if find_spec("regard.lens.asking") is not None:
        asks |= import_module("regard.lens.asking").ASKS
    arguments = (listening, view, lambda _text: view, lambda _address: ready.set(), asks)
    threading.Thread(target=serve, args=arguments, daemon=True).start()
    ready.wait(60)
    return f"http://127.0.0.1:{listening.getsockname()[1]}/"


def main() -> None:
    """Take every picture."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/screens")
    folder.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("REGARD_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    pages = [(served(load("minilm"), SENTENCE, ("it", "cat")), VIEWS)]
    if "--short" not in sys.argv:
        pages.append((served(load("smollm2"), STORY * 60, None), LONG))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--use-angle=swiftshader"])
        for address, views in pages:
            for theme in ("light", "dark"):
                for width in (1280, 400):
                    for name, view in views.items():
                        context = browser.new_context(viewport={"width": width, "height": 860}, color_scheme=theme)
                        page = context.new_page()
                        page.goto(address + view)
                        page.locator("section.inspector .picture").wait_for()
                        if view.endswith("view=map") and address != pages[0][0]:
                            page.get_by_role("status").filter(has_text="exact").first.wait_for()
                        waiting = page.get_by_text(re.compile(r"^(Reading|Measuring|computing)\b.*…$"))
                        for _ in range(300):
                            if not waiting.count():
                                break
                            page.wait_for_timeout(100)
                        page.evaluate(
                            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
                        )
                        page.screenshot(path=folder / f"{name}-{theme}-{width}.png")
                        context.close()
        browser.close()
    print(f"{len(list(folder.glob('*.png')))} pictures in {folder}")


if __name__ == "__main__":
    main()
