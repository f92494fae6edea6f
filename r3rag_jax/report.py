"""Write the HTML report of a run to RUN_DIR/report.html: `python -m r3rag_jax.report RUN_DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from r3rag_jax.config import FlagParser
from r3rag_jax.errors import main_guard
from r3rag_jax.reporting.report_page import publish_report
from r3rag_jax.run.directory import RunDirectory


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="e.g. runs/quickstart, or gs://BUCKET/…")
    print(publish_report(RunDirectory.at(parser.parse_args(argv).run_dir)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
