"""The page in a real browser: filters, trees, keyboard, themes, narrow screens, and no network."""

import re
import time

import pytest

import regraft
from regraft.cli import main
from regraft.errors import Finding, RefusedError
from regraft.views.data import page_of_failure, page_of_report
from regraft.views.html import render_page
from regraft.views.model import Fact, Flow, Page, Rows

pytestmark = pytest.mark.slow


def lines(tab, side):
    """The lines of a tree that are shown, as names."""
    return tab.locator(f"#{side}-tree .path").all_inner_texts()


def focused(tab):
    return tab.evaluate("document.activeElement.querySelector('.path')?.textContent")


def press(tab, *keys):
    for key in keys:
        tab.keyboard.press(key)


def line(tab, side, name):
    path = tab.locator(".path", has_text=re.compile(f"^{re.escape(name)}$"))
    return tab.locator(f"#{side}-tree [role=treeitem]").filter(has=path)


def test_both_sides_and_what_was_done(look, converted):
    tab = look(page_of_report(converted))
    assert tab.title() == "mixtral: regraft convert"
    assert tab.locator("#verdict").inner_text().startswith("Can be converted: lossless")
    assert tab.locator("#left-title").inner_text() == "source: transformers-v4"
    assert "w1.weight" in lines(tab, "left")
    assert "gate_up_proj" in lines(tab, "right")
    assert tab.locator("#shown").inner_text() == "41 tensors on the left, 21 on the right"
    assert tab.locator("#flows path").count() > 5


def test_filters(look, converted):
    tab = look(page_of_report(converted))
    fused = tab.locator("[data-state=fused]")
    fused.click()
    assert fused.get_attribute("aria-pressed") == "true"
    assert tab.locator("#shown").inner_text() == "24 tensors on the left, 4 on the right"
    assert not any("norm" in name or "self_attn" in name for name in lines(tab, "left"))
    tab.locator("[data-state=renamed]").click()
    assert tab.locator("#shown").inner_text() == "26 tensors on the left, 6 on the right"
    fused.click()
    assert lines(tab, "left") == ["model", "layers.{0,1}", "block_sparse_moe", "gate.weight"]
    for state in ("dropped", "refused", "unmatched"):
        assert tab.locator(f"[data-state={state}]").is_disabled()


def test_find(look, converted):
    tab = look(page_of_report(converted))
    tab.keyboard.press("/")
    tab.keyboard.type("model.layers.1.block_sparse_moe.experts.3.w1")
    assert tab.locator("#shown").inner_text() == "8 tensors on the left, 2 on the right"
    assert "gate_up_proj" in " ".join(lines(tab, "right"))
    tab.locator("#search").fill("nothing like it")
    assert tab.locator("#shown").inner_text() == "0 tensors on the left, 0 on the right"
    tab.locator("#search").fill("")
    assert tab.locator("#shown").inner_text() == "41 tensors on the left, 21 on the right"


def test_details(look, rescaled):
    tab = look(page_of_report(rescaled))
    line(tab, "right", "gate_up_proj").click()
    detail = tab.locator("#detail")
    told = detail.inner_text()
    for word in ("rescaled", "rounding of B", "rank", "scale", "mixtral.toml:", "e (a + b) i"):
        assert word in told, word
    assert detail.locator("li").count() == 0
    detail.locator("summary").click()
    detail.locator("li").first.wait_for()
    assert detail.locator("li").all_inner_texts() == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    detail.locator(".links button").first.click()
    assert "w1.weight" in detail.locator("h2").inner_text()
    assert tab.locator("#left-tree [aria-selected=true]").count() == 1
    tab.keyboard.press("Escape")
    assert detail.is_hidden()


def test_keyboard_alone(look, converted):
    tab = look(page_of_report(converted))
    tab.locator("#collapse").focus()
    press(tab, "Enter")
    assert lines(tab, "left") == ["model", "lm_head.weight"]
    press(tab, "Tab")
    assert focused(tab) == "model"
    assert tab.locator("#left-tree [tabindex='0']").count() == 1
    press(tab, "ArrowRight", "ArrowRight")
    assert focused(tab) == lines(tab, "left")[1]
    press(tab, "ArrowLeft")
    assert focused(tab) == "model"
    press(tab, "ArrowLeft")
    assert lines(tab, "left") == ["model", "lm_head.weight"]
    press(tab, "End")
    assert focused(tab) == "lm_head.weight"
    press(tab, "Enter")
    assert tab.locator("#detail h2").inner_text() == "lm_head.weight"
    assert focused(tab) == "lm_head.weight"
    press(tab, "f")
    assert tab.evaluate("document.activeElement.closest('ul').id") == "right-tree"
    press(tab, "Escape", "Home")
    assert focused(tab) == "model"
    press(tab, "ArrowDown")
    assert focused(tab) == "lm_head.weight"


def contrast(tab, selector):
    """The contrast of an element's text with what is behind it, as WCAG counts it."""
    return tab.evaluate(
        """(selector) => {
      const parse = (color) => color.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const element = document.querySelector(selector);
      let behind = element;
      while (parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
      const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
        .map(parse).map(light).sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(look, converted, scheme):
    tab = look(page_of_report(converted), scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = tab.evaluate(ground)
    assert before == ("rgb(18, 22, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
    selectors = ("h1", "#verdict b", ".state.change", ".state.info", ".state.plain", ".count")
    for _ in range(2):
        for selector in selectors:
            assert contrast(tab, selector) >= 4.5, selector
        tab.locator("#theme").click()
    assert tab.evaluate(ground) == before
    tab.locator("#theme").click()
    assert tab.evaluate(ground) != before


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens(look, converted, width):
    tab = look(page_of_report(converted), width=width, height=700)
    wide = "document.documentElement.scrollWidth"
    assert tab.evaluate(wide) <= width
    tab.locator("#expand").click()
    assert tab.locator("#left").is_visible()
    assert tab.locator("#right").is_hidden()
    tab.locator("#sides button").nth(1).click()
    assert tab.locator("#left").is_hidden()
    line(tab, "right", "gate_up_proj").click()
    assert tab.evaluate(wide) <= width
    tab.locator("#detail .links button").first.click()
    assert tab.locator("#left").is_visible()
    for button in tab.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 32


def test_many_tensors_are_quick(look, many):
    start = time.process_time()
    page = page_of_report(many)
    assert len(render_page(page)) < 100_000
    assert time.process_time() - start < 3
    tab = look(page)
    tab.locator("#expand").click()
    assert tab.locator("#shown").inner_text() == "37155 tensors on the left, 387 on the right"
    assert tab.locator("[role=treeitem]").count() < 100
    line(tab, "left", "w1.weight").click()
    tab.locator("#detail summary").click()
    tab.locator("#detail li").first.wait_for()
    assert tab.locator("#detail li").count() == 100
    tab.locator("#detail li").last.scroll_into_view_if_needed()
    assert "12188 more" in tab.locator("#detail details button").inner_text()
    # Pressing a key draws everything anew.
    took = """() => { const start = performance.now();
      document.querySelector("#collapse").click(); document.querySelector("#expand").click();
      return performance.now() - start; }"""
    assert tab.evaluate(took) < 500


def irregular(count):
    """A page of names that share no pattern."""
    rows = Rows()
    numbers = [
        n for i in range(count) for n in rows.add([f"m.block{i}.weight"], "renamed", {"rank": 4})
    ]
    others = Rows()
    for i in range(count):
        others.add([f"n.part{i}.weight"], "renamed")
    flows = tuple(Flow((n,), (n,), "renamed", "a rule") for n in numbers)
    verdict = Fact("Converted", "all of it", "good")
    return Page(
        "many", "convert", verdict, left=rows.side("a"), right=others.side("b"), flows=flows
    )


def test_many_patterns_are_cut_into_steps(look):
    tab = look(irregular(3000))
    tab.locator("#expand").click()
    assert tab.locator("#left-tree [role=treeitem]").count() == 500
    tab.locator("#left-tree .more").click()
    assert tab.locator("#left-tree [role=treeitem]").count() == 1000
    tab.locator("#search").fill("block2999.")
    assert lines(tab, "left") == ["m", "block2999.weight"]
    assert lines(tab, "right") == ["n", "part2999.weight"]


def test_hostile_names_are_text(look):
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>&amp;\u2028\u202e\udc80"
    rows = Rows()
    rows.add([f"a.{evil}.b"], "refused", {"rank": float("inf")})
    finding = Finding("no-image", evil, where=evil, key=evil, rule=evil, fix=evil)
    page = Page(
        evil,
        "convert",
        Fact(evil, evil, "bad"),
        facts=(Fact(evil, evil),),
        left=rows.side(evil),
        findings=(finding,),
        notes=(evil,),
        next=(Fact(evil, evil),),
    )
    tab = look(page)
    tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
    assert tab.locator("img").count() == 0
    assert tab.locator("script").count() == 2
    assert tab.locator("h1").inner_text().endswith("&amp;\\u{2028}\\u{202e}\\u{dc80}")
    assert "<img src=x" in tab.locator("h1").inner_text()
    tab.locator("[role=treeitem]").first.click()
    tab.locator("#detail summary").click()
    tab.locator("#detail li").first.wait_for()
    assert "inf" in tab.locator("#detail").inner_text()


def test_findings_of_a_failure(look):
    case = "tests/golden/cases/mixtral__dora"
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    found = [Finding("no-image", f"number {i}", key=key, fix="merge it") for i in range(60)]
    tab = look(page_of_failure("convert", case, RefusedError(found)))
    assert tab.locator("#findings li").count() == 50
    tab.locator("#findings button").click()
    assert tab.locator("#findings li").count() == 60
    assert tab.locator("#verdict b").inner_text() == "Refused"
    tab.locator("[data-state=refused]").click()
    assert tab.locator("#shown").inner_text() == "8 tensors"
    assert tab.locator("#right").is_hidden()


def test_findings_are_counted_and_grouped_as_on_the_terminal(look, capsys, tmp_path):
    """The same numbers of problems and kinds, and the keys of a kind together."""
    case = "tests/golden/cases/mixtral__dora"
    page = tmp_path / "page.html"
    status = main(
        ["convert", case, str(tmp_path / "o"), *["--to", "transformers-v5", "--html"], str(page)]
    )
    told = capsys.readouterr().err
    count = re.search(r"(\d+) problems of (\d+) kinds", told)
    with pytest.raises(RefusedError) as caught:
        regraft.convert(case, tmp_path / "o", to="transformers-v5")
    tab = look(page_of_failure("convert", case, caught.value))
    assert status == 3
    assert tab.locator("#findings-title").inner_text() == count[0]
    assert tab.locator("#findings li").count() == int(count[2])


def test_layouts_and_verdict_come_first_and_a_search_is_marked(look, converted):
    tab = look(page_of_report(converted))
    assert tab.locator("#layouts").inner_text() == "transformers-v4 → transformers-v5"
    assert tab.locator("#layouts").bounding_box()["y"] < 250
    tab.locator("#search").fill("gate_up")
    assert tab.locator("mark").first.inner_text() == "gate_up"


def test_the_drawer_is_not_over_what_it_explains(look, converted):
    tab = look(page_of_report(converted), width=1000, height=500)
    tab.locator("#expand").click()
    chosen = line(tab, "right", "gate_up_proj")
    chosen.click()
    assert chosen.bounding_box()["y"] < tab.locator("#detail").bounding_box()["y"]


def test_commands_have_a_button_that_copies(look, tmp_path):
    finding = Finding(
        "unmatched", "no rule matches this key", key="a", fix="run `regraft diff A B -o fix.toml`"
    )
    tab = look(page_of_failure("convert", "nowhere", RefusedError([finding])))
    assert tab.locator(".command pre").inner_text() == "regraft diff A B -o fix.toml"
    tab.locator(".copy").click()
    tab.locator(".copy", has_text=re.compile("Copied|Press")).wait_for(timeout=1500)
