"""What is generated for the documentation is what the scripts make of today's source; the site builds."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts"))

from drawings import DRAWINGS  # noqa: E402
from json_page import json_page  # noqa: E402
from make_site import TABLES, tables  # noqa: E402

from regraft.rules.book import HEADS, heads_of_library  # noqa: E402


def test_page_of_json():
    assert (DOCS / "json.md").read_text(encoding="utf-8") == json_page(), "run `make pictures`"


def test_tables_of_the_inspector():
    assert TABLES.read_text(encoding="utf-8") == tables(), "run scripts/make_site.py"


def test_heads_of_rule_books():
    assert HEADS.read_text(encoding="utf-8") == heads_of_library(), "run scripts/make_site.py"


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings(name):
    made = DRAWINGS[name]()
    assert (DOCS / "images" / name).read_text(encoding="utf-8") == made, "run `make pictures`"
    assert made.count("<text") > 6


def test_images_are_small_and_used_and_load_nothing():
    pages = "".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *DOCS.rglob("*.md"))
    )
    for image in (DOCS / "images").iterdir():
        assert image.stat().st_size < 160_000, image
        assert f"images/{image.name})" in pages, image
        if image.suffix == ".svg":
            text = image.read_text(encoding="utf-8")
            assert "@font-face" not in text
            assert not re.search(r"(href|src|url\()\s*=?\s*[\"']?https?:", text), image


@pytest.mark.slow
def test_site(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    for name in ("regraft.convert", "regraft.errors.Finding", "regraft.views.model.Page"):
        assert f'id="{name}"' in reference, name
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link(?! rel=.canonical)|img)[^>]*(?:src|href)=\"(https?:[^\"]+)",
            page.read_text(),
        )
        assert not loaded, page
