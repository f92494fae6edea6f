"""Opens the cells of a table of evaluations."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from r3rag_jax.baselines.factory import BASELINES
from r3rag_jax.components import Components
from r3rag_jax.evaluation.checkpoint import Checkpoint
from r3rag_jax.evaluation.tables.cells import Cell, OpenedCell
from r3rag_jax.retrieval.manifest import has_index, read_manifest


class CellComponents:
    """Opens the cells of a table, or a single evaluation; neighbouring cells share what they can."""

    def __init__(self, corpus: Path | None, console: Console | None = None):
        """`corpus`: passages to search instead of those of a run's index."""
        self._corpus, self._console = corpus, console
        self._last: Components | None = None

    def open(self, cell: Cell) -> OpenedCell:
        """What measures a cell.

        Raises:
            UserError: its model, index or questions cannot be used.
        """
        components, before = self._components(cell.checkpoint), self._last
        self._last = components
        # A model that cannot be used is reported before an index is built.
        _ = components.policy.tokenizer if cell.system in BASELINES else components.codec
        if before is None or components.index_dir is not before.index_dir:
            components.open_corpus(self._corpus, builds_index=cell.checkpoint.builds_index)
            components.ensure_index()
        path = cell.questions.path or components.dataset.path_of("test")
        questions = components.read_questions(path, cell.system)
        questions = questions.take(range(len(questions))[: cell.questions.limit or None])
        has_own = components.config.retrieval.kind != "http" and has_index(components.index_dir)
        num_passages = read_manifest(components.index_dir).num_passages if has_own else None
        return OpenedCell(components.evaluator, questions, components.policy.decoder_config, num_passages)

    def _components(self, checkpoint: Checkpoint) -> Components:
        if self._last is not None and self._last.run == checkpoint.run:
            return self._last.variant(checkpoint.config)
        return Components(checkpoint.config, checkpoint.run, self._console)
