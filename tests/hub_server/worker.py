"""A user of the Hub, in a process of its own: runs the Python it is sent, one JSON line a piece, and says what came of it.

The environment (``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``) is set before anything is imported, as on a user's machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    names: dict = {}
    for line in sys.stdin:
        answer: dict = {"error": None}
        try:
            exec(json.loads(line), names)
            answer["result"] = names.pop("result", None)
        except BaseException as error:
            answer |= {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        with contextlib.redirect_stdout(io.StringIO()):
            answers.write(json.dumps(answer, default=str) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
