"""The report of an audit as a page: read in a browser, by keyboard, on a phone, without scripts."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmh_jax.memorization import dose_response
from mmh_jax.report.page import Exhibit, Page, data_uri, write_page, write_table

CHROMIUM = shutil.which("chromium") or os.environ.get("CHROMIUM", "")
TITLE = "Audit of <script>alert(1)</script>"


def columns(num=40):
    rng = np.random.default_rng(0)
    memorized = np.arange(num) < 3
    return {
        "index": np.arange(num),
        "copies": np.where(memorized, 33, 1),
        "verdict": np.where(memorized, "DD-Mem", "not memorized"),
        "sigma_mem": np.where(memorized, 0.6, 0.0),
        "separation": rng.uniform(0.2, 0.4, num),
        "p_value": np.where(np.arange(num) == 5, np.nan, 0.5),
        "lid_theta": np.where(memorized, 0.5, 5.0) + rng.normal(size=num) / 9,
        "score_png_bytes": -rng.integers(80, 130, num).astype(float),
        "reason": np.array(["</script><b>returns</b>"] * num),
    }


def example():
    table = columns()
    sigmas, num = np.geomspace(0.01, 1, 9), len(table["index"])
    star = 5 / (1 + sigmas) * np.ones((num, 1))
    theta = star * np.where(np.arange(num) < 3, 0.2, 1.0)[:, None]
    theta[4, 2] = np.nan
    picture = data_uri(np.eye(8))
    return Page(
        TITLE, "3 of 40 pictures are memorized.", ["They <i>return</i>."], ["Much."], "picture",
        {"DD-Mem": 3, "OD-Mem": 0, "not memorized": 37},
        {"DD-Mem": {"extracted": 2, "not extracted": 1}},
        dose_response(np.array([2, 2, 8, 8]), np.array([0, 1, 1, 1])), table, sigmas, theta, star,
        [Exhibit(0, picture, [picture], picture, "Row 0: there 33 times.")], "score_png_bytes",
        {"Settings": {"seed": 0}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, example())
    return path


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium on the path, nor named by CHROMIUM")
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as launched,
    ):
        yield launched


@pytest.fixture
def opened(browser, written):
    """A function that opens the page, and the requests and messages of all that it opened."""
    seen, contexts = [], []

    def opened(**options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: seen.append(dialog.message))
        page.goto(written.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in seen if not url.startswith(("data:", written.as_uri()))] == []


def test_it_says_the_verdict_first_and_nothing_of_the_data_is_run(opened):
    page = opened()
    assert page.locator("h1").inner_text() == "3 of 40 pictures are memorized."
    assert page.title() == TITLE
    assert page.locator("i").count() == 0  # markup of the data is text
    assert page.get_by_text("They <i>return</i>.").count() == 1
    assert page.locator("#points tbody b").count() == 0
    assert page.locator("#points tbody tr").count() == 40


def test_a_click_or_enter_on_a_row_shows_its_curves(opened):
    page = opened()
    assert page.locator("#plot polyline").count() == 0
    page.locator("#points tbody tr").nth(1).click()
    assert page.locator("#plot polyline").count() == 2
    assert "Row 1, DD-Mem" in page.locator("#which").inner_text()
    before = page.locator("#plot polyline").nth(1).get_attribute("points")
    page.locator("#points tbody tr").nth(4).focus()
    page.keyboard.press("Enter")
    assert "Row 4, not memorized" in page.locator("#which").inner_text()
    after = page.locator("#plot polyline").nth(1).get_attribute("points")
    assert after != before
    assert len(after.split()) == 8  # no point where the curve has no value


def test_the_table_is_sorted_and_filtered_by_keyboard(opened):
    page = opened()
    button = page.get_by_role("button", name="p_value")
    button.focus()
    page.keyboard.press("Enter")
    header = page.locator("th[aria-sort]")
    assert header.get_attribute("aria-sort") == "descending"
    assert page.locator("#points tbody tr").last.locator("td").nth(5).inner_text() == "\N{EN DASH}"
    page.get_by_role("button", name="lid_theta").click()
    shown = page.locator("#points tbody tr td:nth-child(7)").all_inner_texts()
    assert [float(v) for v in shown] == sorted([float(v) for v in shown], reverse=True)
    page.locator("#kind").select_option("DD-Mem")
    assert page.locator("#points tbody tr:visible").count() == 3
    assert page.locator("#shown").inner_text() == "3 of 40 rows"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_both_schemes(opened, scheme):
    page = opened(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    def luminance(color):
        channels = [int(c) / 255 for c in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    for selector in ("h1", ".soft", "td.kind", ".over", "svg text"):
        field = "fill" if "svg" in selector else "color"
        ink = luminance(
            page.locator(selector).first.evaluate(f"node => getComputedStyle(node).{field}")
        )
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector


def test_without_scripts_all_numbers_are_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator("#points tbody tr").count() == 40
    assert page.get_by_text("0.16 to 1.00").is_visible()
    assert not page.locator("#kind").is_visible()  # what does nothing is not shown


def test_both_tables_have_the_same_rows(tmp_path):
    table = columns()
    write_table(tmp_path, table)
    read = pq.read_table(tmp_path / "points.parquet")
    assert read.column_names == list(table)
    assert read["index"].to_pylist() == table["index"].tolist()
    np.testing.assert_array_equal(read["p_value"].to_numpy(), table["p_value"])
    lines = (tmp_path / "points.csv").read_text().splitlines()
    assert lines[0].split(",") == list(table)
    assert len(lines) == 41


def test_the_data_within_the_page_end_no_element(written):
    text = written.read_text()
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["theta"][4][2] is None
