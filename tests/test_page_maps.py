"""A long text on the real page and the real server: its map, its rows, its excerpt, and what is taken away of it."""

import re
import threading

import numpy as np
import pytest

from test_lens_maps import blocks_of, dense, recording

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

LENGTH = 2600
HEAD = 1


@pytest.fixture(scope="module")
def served():
    from regard import masks
    from regard.lens.opened import look_at
    from regard.lens.payload import first_selection, payload
    from regard.lens.server import View, bind, serve

    held = recording(LENGTH, mask=masks.causal(), windows=2)

    def turn(index):
        look = look_at(held, index)
        return View(look, payload(look, first_selection(look, 0, HEAD, None), live=True))

    view, listening, ready = turn(0), bind(None), threading.Event()
    arguments = (listening, view, None, lambda _address: ready.set())
    threading.Thread(target=serve, args=arguments, kwargs={"turn": turn}, daemon=True).start()
    assert ready.wait(30)
    return f"http://127.0.0.1:{listening.getsockname()[1]}/", dense(view.look, 0, HEAD)


def opened(open_page, served, view="", **options):
    page = open_page(address=served[0], view=f"#l=0&h={HEAD}{view}", **options)
    page.locator("section.stage").wait_for()
    return page


def plane(page):
    page.locator(".plane canvas[data-painter]").wait_for()
    page.get_by_role("status").filter(has_text=re.compile("^exact$")).wait_for(timeout=30_000)
    return page.locator(".plane canvas").bounding_box()


def said(page):
    return page.locator(".said").inner_text()


def number_in(text):
    found = re.search(r"\(([\d.e−+-]+)\)$", text)
    return float(found[1].replace("−", "-")) if found else 0.0


def test_the_whole_map_is_there_and_a_point_reads_its_block(open_page, served):
    page = opened(open_page, served, "&view=map")
    box = plane(page)
    level = 3  # 2,600 tokens on some 630 pixels
    assert "One cell stands for 8 × 8 weights" in page.locator(".atlas").inner_text()
    expected = blocks_of(served[1], 1 << level, "max")
    scale = min(box["width"], box["height"]) / LENGTH
    for at in ((1004, 300), (2300, 1204), (2588, 20)):
        x, y = (box[start] + box[size] / 2 + (token - LENGTH / 2) * scale for start, size, token in
                (("x", "width", at[1]), ("y", "height", at[0])))  # fmt: skip
        page.mouse.move(x, y)
        page.locator(".said").filter(has_text=re.compile(rf"row {at[0] // 8 * 8}–.*largest weight .*\)$")).wait_for()
        text = said(page)
        row, col = (int(found) for found in re.search(r"row (\d+)–.*column (\d+)–", text).groups())
        assert abs(row - at[0]) <= 16 and abs(col - at[1]) <= 16
        assert number_in(text) == pytest.approx(expected[row >> level, col >> level], rel=2e-3)
    page.get_by_role("button", name="share", exact=True).click()
    plane(page)
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.8 * box["height"])
    page.locator(".said").filter(has_text=re.compile(r"these rows give .*\)$")).wait_for()
    row, col = (int(found) for found in re.search(r"row (\d+)–.*column (\d+)–", said(page)).groups())
    share = blocks_of(served[1], 1 << level, "mass")[row >> level, col >> level] / (1 << level)
    assert number_in(said(page)) == pytest.approx(share, rel=2e-3)
    assert "cell=mass" in page.url


def test_keys_move_and_zoom_to_single_weights_that_are_exact(open_page, served):
    page = opened(open_page, served, "&view=map")
    plane(page)
    page.get_by_role("application").focus()
    for key in [*["+"] * 5, *["ArrowLeft"] * 3, "ArrowDown"]:
        page.keyboard.press(key)
    page.get_by_text("One cell is one weight.").wait_for()
    plane(page)
    page.keyboard.press("ArrowUp")
    page.locator(".said").filter(has_text=re.compile(r"^row \d+ “\d+”, column \d+ “\d+”: [\d<]")).wait_for()
    row, col = (int(found) for found in re.search(r"row (\d+) .*column (\d+) ", said(page)).groups())
    assert number_in(said(page)) == pytest.approx(served[1][row, col], rel=2e-3, abs=1e-7)
    page.keyboard.press("0")
    page.get_by_text("One cell stands for 8 × 8 weights").wait_for()


def test_dragging_moves_the_map_the_address_keeps_it_and_back_undoes_it(open_page, served):
    page = opened(open_page, served, "&view=map&at=1_1300_600")
    box = plane(page)
    before = page.url
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 120, middle[1] - 80, steps=4)
    page.mouse.up()
    page.wait_for_url(lambda url: url != before)
    scale, row, col = (float(part) for part in re.search(r"at=([\d._]+)", page.url)[1].split("_"))
    assert (scale, row, col) == (1, pytest.approx(1380, abs=1), pytest.approx(480, abs=1))
    page.go_back()
    page.wait_for_url(before)
    again = opened(open_page, served, f"&view=map&at={scale}_{row}_{col}")
    box = plane(again)
    again.mouse.move(box["x"] + box["width"] / 2 + 0.5, box["y"] + box["height"] / 2 + 0.5)
    again.locator(".said").filter(has_text="row 1380 “1380”, column 480 “480”").wait_for()


def test_a_click_explains_the_pair(open_page, served):
    page = opened(open_page, served, "&view=map&at=16_1300_600&how=1")
    box = plane(page)
    page.mouse.click(box["x"] + box["width"] / 2 + 4, box["y"] + box["height"] / 2 + 4)
    inspector = page.get_by_role("region", name="inspector")
    inspector.get_by_text("softmax →").first.wait_for()
    text = inspector.inner_text().replace("\n", " ")
    assert "“1300” → “600”" in text
    shown = re.search(r"softmax → ([\d.e−-]+)", text)[1].replace("−", "-")
    assert float(shown) == pytest.approx(served[1][1300, 600], rel=6e-3, abs=6e-5)
    assert "1299 masked" in text


def test_the_map_has_a_table_twin(open_page, served):
    page = opened(open_page, served, "&view=map&at=1_1300_600")
    plane(page)
    page.get_by_role("button", name="as a table").click()
    page.locator("table tbody td").first.filter(has_text="%").wait_for()
    row = page.locator("table tbody tr").first
    first = int(row.locator("th").inner_text().split()[0])
    columns = [int(text.split()[0]) for text in page.locator("table thead th").all_inner_texts()]
    for col, text in zip(columns, row.locator("td").all_inner_texts(), strict=True):
        weight = 100 * served[1][first, col]
        if text == "< 0.1 %":
            assert weight < 0.1
        else:
            assert float(text.removesuffix(" %")) == pytest.approx(weight, abs=0.51 if weight >= 0.95 else 0.051)


COLOURS = """canvas => { const small = document.createElement("canvas"); [small.width, small.height] = [64, 64];
    const pen = small.getContext("2d"); pen.drawImage(canvas, 0, 0, 64, 64);
    return [...pen.getImageData(0, 0, 64, 64).data]; }"""


def test_without_webgl_a_plain_canvas_shows_the_same(open_page, served):
    seen = []
    for broken in (False, True):
        page = opened(open_page, served)
        if broken:
            page.evaluate(
                """() => { const old = HTMLCanvasElement.prototype.getContext;
                HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
                    return kind === "webgl2" ? null : old.call(this, kind, ...rest); }; }"""
            )
        page.get_by_role("button", name="Map", exact=True).click()
        plane(page)
        canvas = page.locator(".plane canvas")
        assert canvas.get_attribute("data-painter") == ("canvas" if broken else "webgl2")
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seen.append(np.array(canvas.evaluate(COLOURS), float).reshape(64, 64, 4))
    assert np.abs(seen[0] - seen[1]).mean() < 4
    lower, upper = np.tril_indices(64, -4), np.triu_indices(64, 4)
    assert seen[0][lower][:, :3].mean() < seen[0][upper][:, :3].mean() - 2  # the part that is seen is darker


def test_panning_spends_little_script_time_a_frame(open_page, served):
    page = opened(open_page, served, "&view=map&at=2_1300_600")
    box = plane(page)
    page.evaluate(
        """() => { window.spent = []; const old = window.requestAnimationFrame;
        window.requestAnimationFrame = (does) => old((time) => { const start = performance.now(); does(time);
            window.spent.push(performance.now() - start); }); }"""
    )
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    for step in range(40):
        page.mouse.move(middle[0] + 4 * step, middle[1] + 3 * step)
    page.mouse.up()
    spent = sorted(page.evaluate("window.spent"))
    assert len(spent) >= 10
    assert spent[int(0.9 * len(spent))] < 16


def test_a_long_text_is_turned_like_pages_and_never_all_in_the_document(open_page, served):
    page = opened(open_page, served)
    page.get_by_text("words 1 to 320 of 2,600").wait_for()
    assert page.locator("button.word").count() == 320
    page.get_by_role("button", name="later").click()
    page.get_by_text("words 321 to 640 of 2,600").wait_for()
    page.keyboard.press("/")
    page.keyboard.type("2345")
    page.keyboard.press("Enter")
    page.locator('button.word[data-word="2345"]:focus').wait_for()
    assert page.locator("button.word").count() == 320
    row = served[1][2345]
    inspector = page.get_by_role("region", name="inspector")
    best = int(np.argmax(row))
    inspector.get_by_role("button", name=re.compile(rf"^{best} ")).wait_for()
    shown = inspector.get_by_role("button", name=re.compile(rf"^{best} ")).get_attribute("aria-label")
    assert float(re.search(r"([\d.]+) %", shown)[1]) == pytest.approx(100 * row[best], abs=0.51)
    assert "= 100 %" in inspector.inner_text()
    assert "254 words it cannot see" in inspector.inner_text()
    page.get_by_role("button", name="is looked at by").click()
    column = served[1][:, 2345]
    inspector.get_by_role("button", name=re.compile(rf"^{int(np.argmax(column))} ")).wait_for()


def test_another_text_of_the_recording_is_one_button_away(open_page, served):
    page = opened(open_page, served)
    page.get_by_text("text 1 of 2").wait_for()
    page.get_by_role("button", name="text after").click()
    page.get_by_text("text 2 of 2").wait_for()
    page.get_by_role("button", name="text before").click()
    page.get_by_text("text 1 of 2").wait_for()


def test_a_saved_page_holds_the_tiles_that_were_looked_at(open_page, served, tmp_path):
    page = opened(open_page, served, "&view=map&w=0.1300&at=8_1300_600")
    plane(page)
    page.get_by_role("region", name="inspector").get_by_text("= 100 %").wait_for()
    page.get_by_role("button", name="save this view").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("^HTML")).click()
    download.value.save_as(tmp_path / "saved.html")
    assert (tmp_path / "saved.html").stat().st_size < 12_000_000
    again = open_page((tmp_path / "saved.html").read_text(encoding="utf-8"))
    box = plane(again)
    again.mouse.move(box["x"] + box["width"] / 2 + 2, box["y"] + box["height"] / 2 + 2)
    again.locator(".said").filter(has_text=re.compile(r"row 1300 .*column 600 .*\)$")).wait_for()
    assert number_in(said(again)) == pytest.approx(served[1][1300, 600], rel=2e-3)
    again.get_by_role("button", name="the whole map").click()
    again.get_by_text("not in this file").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_axe_finds_nothing_serious_on_the_large_map(open_page, served, theme, width):
    from test_page_access import WEB, serious

    source = WEB / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        pytest.skip("needs tool: axe-core (npm ci in web/)")
    page = opened(open_page, served, "&view=map&w=0.1300", theme=theme, width=width)
    plane(page)
    page.get_by_role("button", name="as a table").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert serious(page, source.read_text(encoding="utf-8")) == []
