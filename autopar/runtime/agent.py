"""torchrun in a process of its own, which notes what became of the ranks: ``python -m autopar.runtime.agent``."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(note: str, arguments: list[str]) -> int:
    """Run torchrun with these arguments; ranks that failed are written to ``note`` as JSON. Returns an exit status."""
    logging.disable(logging.ERROR)  # torchrun's own account of a failure: `launch` says it in one line
    warnings.simplefilter("ignore")
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "exitcode": f.exitcode, "message": _text(f.message), "timestamp": f.timestamp}
            for rank, f in error.failures.items()
        ]
        Path(note).write_text(json.dumps(failures))
        return 1
    except SignalException as signalled:
        return 128 + int(signalled.sigval)
    return 0


def _text(message: Any) -> str:
    """What `record` noted: plain text, or a dict that holds it."""
    return str(message.get("message", "")) if isinstance(message, dict) else str(message)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
