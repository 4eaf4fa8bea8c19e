"""The page in a real browser: its script runs, its sections are there, nothing overflows."""

import json
import os
import re
import shutil
import subprocess

import pytest
from plan_samples import PROGRAM, document

from autopar.plan.draw import SECTIONS, page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
PROBE = """<script>
const input = document.querySelector("input[data-filter='program']");
input.value = "linear_2";
input.dispatchEvent(new Event("input"));
const left = Array.from(document.querySelectorAll("#program .node[data-node]:not([hidden])"), (n) => n.dataset.node);
document.getElementById("theme").click();
const one = document.documentElement.dataset.theme;
document.getElementById("theme").click();
const box = document.querySelector("rect[data-m='1'][data-s='1'].b");
if (box) box.dispatchEvent(new MouseEvent("mousemove", {bubbles: true, clientX: 9, clientY: 9}));
const outside = (e) => e.getBoundingClientRect().right > innerWidth + 1;
const found = {left, themes: [one, document.documentElement.dataset.theme], tip: document.getElementById("tip").textContent,
  page: document.documentElement.scrollWidth, window: innerWidth,
  wide: Array.from(document.querySelectorAll("section, header, .tile, nav")).filter(outside).length,
  heights: Array.from(document.querySelectorAll("section"), (s) => s.getBoundingClientRect().height)};
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script></body>"""


@pytest.fixture(scope="module")
def browser():
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium here: the page was not opened in a browser (install chromium)")
    if found is None:
        pytest.skip("no Chromium here: the page is not opened in a browser (install chromium)")
    return found


def opened(browser, tmp_path, text, width=1200):
    """The page's document after its scripts ran, as HTML."""
    file = tmp_path / "plan.html"
    file.write_text(text, encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [
        browser,
        *FLAGS,
        profile,
        f"--window-size={width},900",
        "--virtual-time-budget=2000",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def probed(browser, tmp_path, doc, width=1200):
    dom = opened(browser, tmp_path, page(doc, PROGRAM).replace("</body>", PROBE), width)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom)
    assert found, "the probe did not run"
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


def test_the_script_runs_and_every_section_is_there(browser, tmp_path):
    dom = opened(browser, tmp_path, page(document(pp=4, dp=2), PROGRAM))
    assert re.search(r'<html[^>]* data-ready="true"', dom)
    assert [name for name, _ in SECTIONS if f'<section id="{name}">' in dom] == [name for name, _ in SECTIONS]
    assert 'id="tip" hidden=""' in dom and dom.count("data-m=") >= 4 * 32


@pytest.mark.parametrize(
    ("pp", "dp", "tp", "width"), [(4, 2, 4, 1200), (16, 128, 8, 800), (1, 1, 1, 800), (2, 1, 64, 500)]
)
def test_readers_can_search_change_the_theme_and_point_and_nothing_overflows(browser, tmp_path, pp, dp, tp, width):
    found = probed(browser, tmp_path, document(pp=pp, dp=dp, tp=tp), width)
    assert found["left"] == ["linear_2", "add"]
    assert sorted(found["themes"]) == ["dark", "light"]
    assert found["tip"] == ("backward of micro-batch 1 · stage 1 · 1 s" if pp > 1 else "")
    assert found["wide"] == 0 and found["page"] <= found["window"]
    assert all(height > 50 for height in found["heights"])
