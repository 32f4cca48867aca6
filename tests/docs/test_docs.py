"""What the documents state, the code says."""

import re
from pathlib import Path

import pytest

from agent.errors import Reason
from agent.hook.decisions import EXPLAINED
from agent.sources import INSTEAD, SCHEMES
from docs import generate

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_up_to_date() -> None:
    assert generate.stale() == [], "run `make docs`"


def test_a_stale_page_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, page in generate.PAGES.items():
        (tmp_path / name).write_text(page())
    (tmp_path / "reasons.md").write_text("something else")
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.stale() == ["reasons.md"]


def test_every_reason_is_documented() -> None:
    page = generate.reasons()
    assert all(f"`{reason}`" in page for reason in Reason)


def test_a_page_of_ours_keeps_what_people_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = generate.hook()
    assert all(f"| `{why}` | {said.means} |" in page for why, said in EXPLAINED.items())
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    edited = page.replace("# The admission hook", "# Another title")
    (tmp_path / "hook.md").write_text(edited)
    assert generate.hook() == edited
    (tmp_path / "hook.md").write_text(edited.replace("| `Done` |", "| `Dome` |"))
    assert generate.hook() == edited
    (tmp_path / "hook.md").write_text("# No table")
    with pytest.raises(ValueError):
        generate.hook()


def test_every_scheme_is_documented_and_no_other() -> None:
    page = (ROOT / "docs" / "sources.md").read_text()
    named = set(re.findall(r"`([a-z0-9+]+)://", page.partition("## Archives")[0]))
    assert named == {*SCHEMES, *INSTEAD}
    for scheme, advice in INSTEAD.items():
        (row,) = [
            line for line in page.splitlines() if line.startswith("|") and f"`{scheme}://" in line
        ]
        assert advice in row, scheme


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"(?m)^make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= commands
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in commands)


def test_every_must_of_kserves_contract_has_a_test_with_its_number() -> None:
    """kserve.md 9.1, 1 to 15: `test_9_1_3_...`, or `test_9_1_11_and_12_...`."""
    names = [
        name
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for name in re.findall(r"(?m)^ *(?:async )?def test_9_1_(\w+)\(", path.read_text())
    ]
    first = {int(name.split("_")[0]) for name in names}
    assert first == set(range(1, 16))
