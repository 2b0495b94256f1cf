"""axe-core finds nothing serious on any view of the page, in either theme, wide or narrow, open or closed."""

import pytest

from page_fixture import WEB, decoder_recording, encoder_recording, saved_html, translation_recording

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

VIEWS = {
    "nothing chosen": "#l=5&h=11",
    "pinned, explained": "#l=5&h=11&w=0.8&pins=0.8,0.2&how=1",
    "several heads": "#l=5&h=11&w=0.8&heads=5.11,3.1",
    "heads": "#l=5&h=11&w=0.8&view=heads&sort=link",
    "map": "#l=5&h=11&w=0.8&view=map",
    "subwords, who looks": "#l=5&h=11&w=0.10&unit=token&mode=from",
}


@pytest.fixture(scope="session")
def axe():
    source = WEB / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        pytest.skip("needs tool: axe-core (npm ci in web/)")
    return source.read_text(encoding="utf-8")


def serious(page, axe):
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical", "moderate")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(open_page, axe, theme, width, view):
    page = open_page(saved_html(*encoder_recording()), theme=theme, width=width, view=VIEWS[view])
    page.locator("button.head").first.wait_for()
    page.wait_for_function("document.querySelector('section.inspector .picture')")
    assert serious(page, axe) == []


@pytest.mark.parametrize("recording", [decoder_recording, translation_recording])
def test_axe_finds_nothing_serious_in_other_models(open_page, axe, recording):
    page = open_page(saved_html(*recording()))
    page.locator("button.word").nth(3).click()
    assert serious(page, axe) == []


def test_axe_finds_nothing_serious_in_the_list_of_keys_the_menu_and_the_table(open_page, axe):
    page = open_page(saved_html(*encoder_recording()), view="#l=5&h=11&view=map")
    page.get_by_role("button", name="as a table").click()
    page.get_by_role("button", name="save this view").click()
    assert serious(page, axe) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="keys", exact=True).click()
    assert serious(page, axe) == []


def test_axe_finds_nothing_serious_in_a_failed_page(open_page, axe):
    page = open_page(saved_html({**encoder_recording()[0], "format": "regard-page/9"}, {}))
    page.get_by_role("alert").wait_for()
    assert "regard-page/9" in page.get_by_role("alert").inner_text()
    assert serious(page, axe) == []
