"""Run by a Python that has torch and transformers: scripts one after the other, as importing both takes many seconds.

A line of standard input is a JSON list of a script and its arguments; the answer is one of whether it came to its end,
and what it printed or how it failed.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import traceback

os.environ["HF_HUB_OFFLINE"] = "1"
import torch

torch.set_num_threads(1)  # the workers of the tests share the processors
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer
for line in sys.stdin:
    sys.argv, shown = json.loads(line), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_path(sys.argv[0], run_name="__main__")
        answer = [True, shown.getvalue()]
    except BaseException:
        answer = [False, traceback.format_exc()]
    print(json.dumps(answer), file=answers, flush=True)
