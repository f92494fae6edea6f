"""Write the HTML report of a run to RUN_DIR/report.html: `python -m r3rag_jax.report RUN_DIR`.

Several runs become one page that compares them; with --watch a run's page is served while it goes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.config import FlagParser
from r3rag_jax.errors import main_guard
from r3rag_jax.reporting.comparison_page import comparison_html
from r3rag_jax.reporting.expected import expected_json
from r3rag_jax.reporting.report_page import publish_report
from r3rag_jax.reporting.run_files import load_run
from r3rag_jax.reporting.watch import HOST, WatchedRun, make_server
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.run.files import write_text


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="python -m r3rag_jax.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="e.g. runs/quickstart, or gs://BUCKET/…")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="page that compares several runs")
    parser.add_argument("--watch", action="store_true", help="serve the page on 127.0.0.1, renewed as the run goes")
    parser.add_argument("--port", type=int, default=8765, help="of --watch; 0: a free one")
    parser.add_argument("--record", type=Path, metavar="FILE", help="record RL of a recipe's runs as what to expect")
    options = parser.parse_args(argv)
    if options.watch and len(options.run_dirs) > 1:
        parser.error(f"--watch takes one RUN_DIR; got {len(options.run_dirs)}")
    runs = [RunDirectory.at(place) for place in options.run_dirs]
    if options.watch:
        watch(options.run_dirs[0], options.port)
    elif options.record is not None:
        title = f"{options.record.stem}, {len(runs)} run{'s' * (len(runs) > 1)}"
        write_text(options.record, expected_json(title, [load_run(run) for run in runs]))
        print(options.record)
    elif len(runs) > 1:
        write_text(options.out, comparison_html(runs))
        print(options.out)
    else:
        print(publish_report(runs[0]))
    return 0


def watch(place: str, port: int) -> None:
    """Serve the page of a run until Ctrl-C."""
    with make_server(WatchedRun(place), port) as server:
        print(f"http://{HOST}:{server.server_port}/  (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
