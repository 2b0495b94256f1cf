"""The built page: what its sources build, small, whole and without any address to fetch from."""

import gzip
import json
import re
import shutil
import subprocess

import pytest

from page_fixture import PAGE, WEB, page_script

LIMIT = 60 * 1024


def test_the_page_is_at_most_60_kilobytes_gzipped():
    assert len(gzip.compress((PAGE / "index.html").read_bytes(), 9)) <= LIMIT


def test_the_page_fetches_nothing_from_elsewhere():
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'`)<>]+", html))
    assert addresses <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1998/Math/MathML",
        "http://www.w3.org/1999/xhtml",
    }
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"'](?!data:)", html)
    assert "@import" not in html and "@font-face" not in html
    assert html.count('<script type="application/json" id="regard-payload">null</script>') == 1


def test_the_page_draws_in_an_engine_without_document_window_or_network():
    quickjs = pytest.importorskip("quickjs", reason="needs tool: quickjs-ng")
    context = quickjs.Context()
    for name in ("document", "window", "fetch", "TextDecoder", "setTimeout"):
        assert context.eval(f"typeof {name}") == "undefined"
    context.eval(page_script())
    assert context.eval("typeof regardDraw") == "function"


def test_versions_are_pinned_and_the_lock_names_no_host():
    package = json.loads((WEB / "package.json").read_text())
    for version in {**package["dependencies"], **package["devDependencies"]}.values():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    lock = json.loads((WEB / "package-lock.json").read_text())
    for name, entry in lock["packages"].items():
        assert name == "" or "integrity" in entry


def test_the_built_files_are_what_the_sources_build():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs tool: node")
    if not (WEB / "node_modules" / "esbuild").exists():
        pytest.skip("needs tool: esbuild (npm ci in web/)")
    done = subprocess.run([node, WEB / "build.mjs", "--check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
