"""What tests of JSONL files share: a question as a row, and a writer of lines."""

import json
from pathlib import Path

QUESTION = {"id": "q0", "question": "Who wrote Ulysses?", "golden_answers": ["James Joyce"]}


def write(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path
