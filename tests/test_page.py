"""What a person sees and does on the page: lines, numbers, pins, heads, the keyboard, the address."""

import math
import re

import numpy as np
import pytest

from page_fixture import decoder_recording, encoder_recording, merged, saved_html, translation_recording

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

IT, CAT, TIRED = 8, 2, 10
LINES = "path[data-from][data-to][data-weight]"
READ_LINES = """paths => paths.map(p => ({from: +p.dataset.from, to: +p.dataset.to, weight: +p.dataset.weight,
    layer: +p.dataset.layer, head: +p.dataset.head, width: parseFloat(getComputedStyle(p).strokeWidth),
    opacity: +getComputedStyle(p).strokeOpacity, stroke: getComputedStyle(p).stroke,
    dash: getComputedStyle(p).strokeDasharray}))"""


@pytest.fixture
def encoder(open_page):
    page = open_page(saved_html(*encoder_recording()))
    page.locator("button.word").first.wait_for()
    return page


def lines(page):
    return page.locator(LINES).evaluate_all(READ_LINES)


def word(page, index, side=0):
    return page.locator(f'button.word[data-side="{side}"][data-word="{index}"]')


def inspector(page):
    return page.get_by_role("region", name="inspector")


def settle(page):
    page.evaluate(
        """async () => {
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
            await Promise.allSettled(document.getAnimations().map(a => a.finished));
        }"""
    )


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)
    settle(page)


def click_head(page, layer, head):
    page.get_by_role("button", name=f"layer {layer} head {head}", exact=True).first.click()
    page.mouse.move(5, 5)
    settle(page)


# --- lines ----------------------------------------------------------------------------------------------------------


def test_clicking_a_word_draws_its_thickest_line_to_the_word_it_attends_to_most(encoder):
    page = encoder
    page.get_by_role("button", name="it", exact=True).click()
    page.mouse.move(5, 5)
    settle(page)
    weights = merged(*encoder_recording(), 0, 5, 11)
    drawn = lines(page)
    assert {line["from"] for line in drawn} == {IT}
    thickest = max(drawn, key=lambda line: line["width"])
    assert thickest["to"] == int(np.argmax(weights[IT])) == CAT
    assert word(page, IT).get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("asked", [0, 3, IT, TIRED])
def test_width_and_brightness_of_a_line_are_its_weight_and_the_strongest_are_drawn(encoder, asked):
    page = encoder
    word(page, asked).click()
    settle(page)
    weights = merged(*encoder_recording(), 0, 5, 11)[asked]
    drawn = [line for line in lines(page) if line["from"] == asked]
    assert drawn
    for line in drawn:
        assert line["weight"] == pytest.approx(weights[line["to"]], abs=1e-6)
        assert line["width"] == pytest.approx(14 * line["weight"], rel=1e-3)
    order = sorted(drawn, key=lambda line: line["weight"])
    assert [line["opacity"] for line in order] == sorted(line["opacity"] for line in order)
    left_out = set(range(len(weights))) - {line["to"] for line in drawn}
    assert min(line["weight"] for line in drawn) >= max(weights[list(left_out)]) - 1e-9


def test_hovering_previews_and_leaving_forgets(encoder):
    page = encoder
    word(page, 3).hover()
    settle(page)
    assert {line["from"] for line in lines(page)} == {3}
    assert word(page, 3).get_attribute("aria-pressed") == "false"
    page.mouse.move(5, 5)
    settle(page)
    assert lines(page) == []


def test_several_pins_have_several_hues_and_escape_unpins(encoder):
    page = encoder
    word(page, IT).click()
    word(page, CAT).click()
    page.mouse.move(5, 5)
    settle(page)
    hues = {line["from"]: line["stroke"] for line in lines(page)}
    dashes = {line["from"]: line["dash"] for line in lines(page) if line["width"] >= 1}
    assert set(hues) == {IT, CAT} and hues[IT] != hues[CAT] and dashes[IT] != dashes[CAT]
    press(page, "Escape")
    assert page.locator('button.word[aria-pressed="true"]').count() == 0
    press(page, "Escape")
    assert lines(page) == []


def test_a_click_on_a_pinned_word_lets_it_go(encoder):
    word(encoder, IT).click()
    word(encoder, IT).click()
    assert word(encoder, IT).get_attribute("aria-pressed") == "false"


def test_who_looks_at_this_word_draws_the_column(encoder):
    page = encoder
    word(page, CAT).click()
    page.get_by_role("button", name="is looked at by").click()
    settle(page)
    weights = merged(*encoder_recording(), 0, 5, 11)[:, CAT]
    drawn = lines(page)
    assert {line["to"] for line in drawn} == {CAT}
    assert max(drawn, key=lambda line: line["width"])["from"] == int(np.argmax(weights))
    assert "no sum" in inspector(page).inner_text().replace("\n", " ")


def test_a_word_of_two_subwords_is_one_word_until_s_is_pressed(encoder):
    page = encoder
    assert page.locator("button.word").count() == 12
    word(page, TIRED).click()
    press(page, "s")
    assert page.locator("button.word").count() == 13
    assert [word(page, at).get_attribute("aria-label") for at in (10, 11)] == ["tir", "ed"]
    assert word(page, 10).get_attribute("aria-pressed") == "true"
    blobs = encoder_recording()[1]
    row = blobs["weights/0/5"][11, 10]
    for line in lines(page):
        assert line["weight"] == pytest.approx(float(row[line["to"]]), abs=1e-6)


# --- several heads --------------------------------------------------------------------------------------------------


def test_adding_heads_never_dims_the_others(encoder):
    page = encoder
    word(page, IT).click()
    press(page, "m")
    before = {(line["layer"], line["head"], line["to"]): line for line in lines(page)}
    click_head(page, 3, 1)
    click_head(page, 4, 3)
    after = {(line["layer"], line["head"], line["to"]): line for line in lines(page)}
    assert {key[:2] for key in after} == {(5, 11), (3, 1), (4, 3)}
    for key, line in before.items():
        assert {name: after[key][name] for name in ("width", "opacity", "stroke")} == {
            name: line[name] for name in ("width", "opacity", "stroke")
        }
    assert len({line["stroke"] for line in after.values()}) == 3
    thick = {key[:2]: line["dash"] for key, line in after.items() if line["width"] >= 1}
    assert len(set(thick.values())) == 3


# --- the inspector --------------------------------------------------------------------------------------------------


def test_the_inspector_says_the_numbers_and_they_add_up(encoder):
    page = encoder
    word(page, IT).click()
    settle(page)
    text = inspector(page).inner_text()
    shares = [int(value) for value in re.findall(r"(\d+) %", text.split("=")[0])]
    assert shares[0] == round(100 * merged(*encoder_recording(), 0, 5, 11)[IT, CAT])
    assert sum(shares) == 100
    assert "= 100 %" in text


def test_a_learned_sink_is_part_of_the_sum(open_page):
    payload, blobs = decoder_recording()
    page = open_page(saved_html(payload, blobs), view="#l=2&h=4&w=0.30")
    inspector(page).get_by_text("went to the sink").wait_for()
    total = merged(payload, blobs, 0, 2, 4)[30].sum()
    assert f"= {round(100 * total)} %, {round(100 * (1 - total))} % went to the sink" in inspector(page).inner_text()
    assert "9 words it cannot see" in inspector(page).inner_text()


def test_special_tokens_and_sinks_are_labelled(encoder):
    page = encoder
    word(page, 0).click()
    settle(page)
    rows = page.locator("section.inspector button.row").evaluate_all(
        "rows => rows.map(r => r.getAttribute('aria-label'))"
    )
    assert any(re.fullmatch(r"\[CLS\] (start|sink) \d+ %", row) for row in rows)


def test_how_a_number_came_about_goes_from_q_and_k_to_the_weight(encoder):
    page = encoder
    word(page, IT).click()
    page.get_by_role("button", name=re.compile(r"^how \d+ % came about$")).click()
    inspector(page).get_by_text("softmax →").first.wait_for()  # q and k are unpacked first
    text = inspector(page).inner_text()
    payload, blobs = encoder_recording()
    q, k = blobs["q/0/5"][11, IT].astype(float), blobs["k/0/5"][11, CAT].astype(float)
    dot = float(q @ k)
    score = dot * payload["attentions"][0]["scale"]
    weight = math.exp(score - float(blobs["lse/0/5"][11, IT]))
    norm = float(blobs["norms/0/5"][11, CAT])
    assert f"q · k = {dot:.2f}" in text
    assert f"× scale = {score:.3f}" in text
    assert f"softmax → {weight:.4f}" in text
    assert f"× value: {weight:.4f} × {norm:.3f} = {weight * norm:.3f}" in text
    assert weight == pytest.approx(float(blobs["weights/0/5"][11, IT, CAT]), abs=1e-5)


def test_the_explained_pair_follows_the_chosen_row(encoder):
    page = encoder
    word(page, IT).click()
    rows = page.locator("section.inspector button.row")
    name = rows.nth(1).get_attribute("aria-label")
    rows.nth(1).click()
    share = re.search(r"(\d+ %|\d\.\d %)", name)[1]
    assert page.get_by_role("button", name=f"how {share} came about").count() == 1
    assert rows.nth(1).get_attribute("aria-pressed") == "true"


def test_a_bias_is_a_step_of_its_own(open_page):
    page = open_page(saved_html(*decoder_recording()), view="#l=2&h=4&w=0.30&how=1")
    inspector(page).get_by_text("+ bias").wait_for()
    text = inspector(page).inner_text()
    assert "3 heads share this k: key group 1" in text.replace("\n", " ")
    assert "masked, they take no part" in text.replace("\n", " ")
    total = merged(*decoder_recording(), 0, 2, 4)[30].sum()
    assert f"The row adds up to {total:.2f}; the sink takes the rest." in text.replace("\n", " ")


def test_a_layer_that_is_not_in_the_file_is_said_to_be_missing(open_page):
    payload, blobs = encoder_recording()
    kept = {key: blob for key, blob in blobs.items() if not key.endswith("/2") or key.startswith("thumbs")}
    page = open_page(saved_html(payload, kept), view="#l=2&h=0&w=0.8")
    inspector(page).get_by_text("are not in this file").wait_for()
    assert lines(page) == []


# --- heads ----------------------------------------------------------------------------------------------------------


def test_the_grid_names_every_head_and_frames_the_chosen_one(encoder):
    page = encoder
    heads = page.locator("button.head")
    assert heads.count() == 72
    assert page.locator('button.head[aria-pressed="true"]').evaluate_all("b => b.map(x => x.ariaLabel)") == [
        "layer 5 head 11"
    ]
    click_head(page, 3, 1)
    assert page.locator('button.head[aria-pressed="true"]').evaluate_all("b => b.map(x => x.ariaLabel)") == [
        "layer 3 head 1"
    ]
    assert heads.first.evaluate("b => b.getBoundingClientRect().width") == 24


def test_heads_can_be_sorted_by_the_link_in_front(encoder):
    page = encoder
    word(page, IT).click()
    page.get_by_role("button", name="Heads", exact=True).click()
    page.get_by_label("sort by").select_option("link")
    settle(page)
    order = page.locator("button.head").evaluate_all("b => b.map(x => [+x.dataset.layer, +x.dataset.head])")
    weights = [merged(*encoder_recording(), 0, layer, head)[IT, CAT] for layer, head in order]
    assert len(order) == 72 and weights == sorted(weights, reverse=True)


# --- cross-attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 400])
def test_cross_attention_links_target_words_to_source_words(open_page, width):
    payload, blobs = translation_recording()
    page = open_page(saved_html(payload, blobs), width=width)
    word(page, 2, side=1).click()
    page.mouse.move(5, 5)
    settle(page)
    thickest = max(lines(page), key=lambda line: line["width"])
    assert (thickest["from"], thickest["to"]) == (2, int(np.argmax(merged(payload, blobs, 2, 1, 2)[2])))
    word(page, 6, side=0).click()
    settle(page)
    column = merged(payload, blobs, 2, 1, 2)[:, 6]
    mine = [line for line in lines(page) if line["to"] == 6 and line["from"] != 2]
    assert max(mine, key=lambda line: line["width"])["from"] == int(np.argmax(column))
    boxes = [word(page, 0, side=side).bounding_box() for side in (0, 1)]
    if width == 400:
        assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    else:
        assert boxes[0]["y"] + boxes[0]["height"] < boxes[1]["y"]


def test_each_attention_of_an_encoder_decoder_is_one_switch_away(open_page):
    page = open_page(saved_html(*translation_recording()))
    page.get_by_role("button", name="decoder self-attention", exact=True).click()
    assert page.locator("button.word").evaluate_all("b => [...new Set(b.map(x => x.dataset.side))]") == ["1"]
    word(page, 4, side=1).click()
    settle(page)
    assert all(line["to"] <= 4 for line in lines(page))


# --- the keyboard ---------------------------------------------------------------------------------------------------


def test_the_keyboard_alone_finds_a_word_pins_it_and_changes_the_head(encoder):
    page = encoder
    press(page, "/")
    page.keyboard.type("it")
    press(page, "Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "it"
    press(page, "Enter")
    assert word(page, IT).get_attribute("aria-pressed") == "true"
    assert max(lines(page), key=lambda line: line["width"])["to"] == CAT
    press(page, "ArrowUp", "ArrowUp", "Shift+ArrowLeft")
    assert page.locator('button.head[aria-pressed="true"]').get_attribute("aria-label") == "layer 3 head 10"
    press(page, "ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "because"
    press(page, "Escape")
    assert page.locator('button.word[aria-pressed="true"]').count() == 0


def test_arrows_stop_at_the_ends(encoder):
    page = encoder
    press(page, "Home", "ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.word") == "0"
    press(page, "End", "ArrowRight", *["ArrowDown"] * 9)
    assert page.evaluate("document.activeElement.dataset.word") == "11"
    assert page.locator('button.head[aria-pressed="true"]').get_attribute("data-layer") == "5"


def test_the_sentence_is_one_tab_stop(encoder):
    assert encoder.locator('button.word[tabindex="0"]').count() == 1
    assert encoder.locator('button.head[tabindex="0"]').count() == 1


def test_focus_by_tab_shows_the_lines_of_the_word(encoder):
    page = encoder
    page.get_by_text("what is shown").focus()
    press(page, "Tab")
    assert page.evaluate("document.activeElement.dataset.word") == "0"
    assert {line["from"] for line in lines(page)} == {0}


def test_question_mark_lists_the_keys_and_escape_closes_the_list(encoder):
    page = encoder
    press(page, "?")
    dialog = page.get_by_role("dialog")
    assert "find a word" in dialog.inner_text()
    press(page, "Escape")
    assert not dialog.is_visible()


def test_letters_in_the_text_field_are_letters(encoder):
    page = encoder
    page.get_by_label("text", exact=True).focus()
    press(page, "m", "s")
    assert page.locator("button.word").count() == 12


def test_the_live_region_reads_the_three_strongest_links(encoder):
    page = encoder
    word(page, IT).click()
    settle(page)
    row = merged(*encoder_recording(), 0, 5, 11)[IT]
    words = [one["text"] for one in encoder_recording()[0]["sides"][0]["words"]]
    top = np.argsort(-row)[:3]
    said = page.locator("#said").inner_text()
    assert said.startswith("layer 5 head 11: it looks at cat")
    for at in top:
        assert f"{words[at]} {round(100 * row[at])} %" in said


# --- the address ----------------------------------------------------------------------------------------------------


def test_back_undoes_a_selection_and_the_address_restores_it(encoder, open_page):
    page = encoder
    word(page, IT).click()
    page.mouse.move(5, 5)
    settle(page)
    address = page.url
    click_head(page, 3, 1)
    page.go_back()
    settle(page)
    assert page.url == address
    assert page.locator('button.head[aria-pressed="true"]').get_attribute("aria-label") == "layer 5 head 11"
    page.go_back()
    settle(page)
    assert page.locator('button.word[aria-pressed="true"]').count() == 0 and lines(page) == []
    again = open_page(saved_html(*encoder_recording()), view="#" + address.split("#")[1])
    again.locator(LINES).first.wait_for(state="attached")
    assert word(again, IT).get_attribute("aria-pressed") == "true"
    assert max(lines(again), key=lambda line: line["width"])["to"] == CAT


@pytest.mark.parametrize("view", ["#l=99&h=1", "#w=0.999&pins=7.7,x", "#%%%=&l=&a=9", "#heads=9.9,1.1&t=55&unit=cake"])
def test_an_address_that_does_not_fit_is_no_error(open_page, view):
    page = open_page(saved_html(*encoder_recording()), view=view)
    page.locator("button.word").first.wait_for()
    assert page.locator("button.word").count() == 12


def test_the_opening_selection_is_the_payloads(open_page):
    page = open_page(saved_html(*encoder_recording(IT)))
    page.locator(LINES).first.wait_for(state="attached")
    assert {line["from"] for line in lines(page)} == {IT}
    assert word(page, IT).get_attribute("aria-pressed") == "false"


# --- the map --------------------------------------------------------------------------------------------------------


def test_the_map_is_painted_from_the_weights_and_has_a_table_twin(encoder):
    page = encoder
    page.get_by_role("button", name="Map", exact=True).click()
    canvas = page.get_by_role("img", name=re.compile("map of layer 5 head 11"))
    pixels = np.array(
        canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"), dtype=float
    ).reshape(12, 12, 4)
    light = np.where(pixels[..., 3] == 0, 1e9, pixels[..., :3].sum(-1))
    weights = merged(*encoder_recording(), 0, 5, 11)
    assert np.unravel_index(light.argmin(), light.shape) == np.unravel_index(weights.argmax(), weights.shape)
    order = np.argsort(weights.ravel())
    assert np.corrcoef(np.arange(144), -light.ravel().clip(max=765)[order])[0, 1] > 0.6
    page.get_by_role("button", name="as a table").click()
    cells = page.locator("table tbody tr").nth(IT).locator("td").all_inner_texts()
    assert cells[CAT] == f"{round(100 * weights[IT, CAT])} %" and len(cells) == 12


def test_a_click_on_the_map_pins_the_row_and_explains_the_cell(encoder):
    page = encoder
    page.get_by_role("button", name="Map", exact=True).click()
    box = page.get_by_role("img", name=re.compile("map of")).bounding_box()
    page.mouse.click(box["x"] + box["width"] * (CAT + 0.5) / 12, box["y"] + box["height"] * (3 + 0.5) / 12)
    settle(page)
    assert word(page, 3).get_attribute("aria-pressed") == "true"
    value = merged(*encoder_recording(), 0, 5, 11)[3, CAT]
    shown = f"{100 * value:.1f} %" if value < 0.0095 else f"{round(100 * value)} %"
    assert page.get_by_role("button", name=f"how {shown} came about").count() == 1


def test_512_tokens_stay_smooth(open_page):
    page = open_page(saved_html(*decoder_recording(512, 1)), view="#l=0&h=4&w=0.300&view=map")
    page.get_by_role("img", name=re.compile("512 rows")).wait_for()
    assert page.locator(LINES).count() <= 6
    took = page.evaluate(
        """async () => {
            const times = [];
            for (let i = 0; i < 12; i++) {
                const start = performance.now();
                window.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
                document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
                await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
                times.push(performance.now() - start);
            }
            return times.sort((a, b) => a - b)[6];
        }"""
    )
    assert took < 400


# --- widths, themes, people who listen ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 400, 720, 1280, 2560])
@pytest.mark.parametrize("recording", [encoder_recording, decoder_recording, translation_recording])
def test_nothing_sticks_out_of_the_window(open_page, width, recording):
    page = open_page(saved_html(*recording()), width=width)
    for view in ("Sentence", "Heads", "Map"):
        page.get_by_role("button", name=view, exact=True).click()
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_system_chooses_the_theme_and_the_button_turns_it(open_page):
    page = open_page(saved_html(*encoder_recording()), theme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    page.locator("button.word").first.wait_for()
    assert page.evaluate(paper) == "rgb(21, 23, 26)"
    page.get_by_role("button", name="theme: dark").click()
    assert page.evaluate(paper) == "rgb(251, 250, 247)"


def test_nothing_moves_when_the_system_asks_for_no_motion(open_page):
    page = open_page(saved_html(*encoder_recording(IT)), motion="reduce")
    page.locator(LINES).first.wait_for(state="attached")
    moving = """[...document.querySelectorAll('*')].filter(n => {
        const s = getComputedStyle(n); return parseFloat(s.transitionDuration) > 0 ||
            s.animationName !== 'none'; }).length"""
    assert page.evaluate(moving) == 0


def test_a_cut_file_says_what_to_do(open_page):
    html = saved_html(*encoder_recording())
    at = html.index('"format"')
    page = open_page(html[: at + 200] + "</script>" + html[html.index("</script>", at) + 9 :])
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "could not be opened" in alert.inner_text() and "Write it again" in alert.inner_text()


def test_a_saved_page_says_that_it_is_a_recording(encoder):
    field = encoder.get_by_label("text", exact=True)
    assert field.get_attribute("readonly") is not None
    assert encoder.locator("#text-note").inner_text() == "a recording"


def test_markup_in_a_text_is_text(open_page):
    payload, blobs = encoder_recording(IT)
    side = dict(payload["sides"][0])
    words = [dict(one) for one in side["words"]]
    words[CAT]["text"] = "<img src=x onerror=alert(1)></script>"
    page = open_page(saved_html({**payload, "sides": [{**side, "words": words}]}, blobs))
    page.locator(LINES).first.wait_for(state="attached")
    assert word(page, CAT).get_attribute("aria-label") == words[CAT]["text"]
    assert page.locator("img").count() == 0
