"""After a run, a failure or an interrupt the process is as it was: limits, environment, patches, threads, signals."""

import os
import resource
import signal
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_ppo.compute.needs import is_traced

FAILS = """import os, signal
calls = 0
def rule(prompts, completions):
    global calls
    calls += 1
    if calls == 3:
        {what}
    return [0.0] * len(completions)
"""
RAISES, INTERRUPTS = 'raise ValueError("no")', "os.kill(os.getppid(), signal.SIGINT)"


def surroundings():
    """Whatever a run changes for its length."""
    limits = []
    for change in (mx.set_memory_limit, mx.set_cache_limit):
        limits.append(change(1 << 30))
        change(limits[-1])
    return {
        "limits": limits,
        "environment": dict(os.environ),
        "traced": is_traced(),
        "attention": mx.fast.scaled_dot_product_attention,
        "classes": [kind.__call__ for kind in (nn.Linear, nn.Embedding, nn.RoPE, nn.RMSNorm)],
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "threads": {thread.name for thread in threading.enumerate()},
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "folder": os.getcwd(),
    }


@pytest.mark.parametrize(("what", "code"), [("pass", 0), (RAISES, 4), (INTERRUPTS, 130)])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_nothing_is_left_behind(project, what, code, train):
    (project.folder / "fails.py").write_text(FAILS.format(what=what))
    config = project.config(
        model={"train": train},
        reward=[{"kind": "function", "function": "fails.py:rule"}],
        ppo={"gradient_checkpointing": "on"},
        memory={"budget_gb": 1.0, "residency": "evict"},
    )
    project.cli("train", config, "--dry-run")  # what is imported on first use stays
    before = surroundings()
    done = project.cli("train", config)
    assert done.exit_code == code, done.output
    assert surroundings() == before
