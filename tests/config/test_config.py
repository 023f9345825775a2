import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_ppo.config.file import read_config
from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.config.supervised import JOBS, RewardConfig, SFTConfig
from mlx_ppo.errors import ConfigError
from mlx_ppo.runs.folder import to_toml

# Lines 1 to 10; what a test appends starts on line 11.
TRAIN = """\
[model]
path = "model"

[data]
prompts = "prompts.jsonl"

[[reward]]
kind = "model"
path = "reward"

"""
SFT = '[model]\npath = "model"\n[data]\ntrain = "train.jsonl"\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text, *overrides, job=TrainConfig, name="a.toml"):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(job, Path(name), overrides)


def problems(text, *overrides, job=TrainConfig):
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides, job=job)
    assert caught.value.exit_code == 2
    assert all("\n" not in problem for problem in caught.value.problems)
    return list(caught.value.problems)


ONE_MISTAKE = [
    ("[ppo]\nepocs = 4", "a.toml:12: unknown key 'epocs' in [ppo]. Did you mean 'epochs'?"),
    ("[run]\ndual_clip = 4.0", "a.toml:12: unknown key 'dual_clip' in [run]. It belongs in [ppo]."),
    ("[pppo]\nepochs = 4", "a.toml:11: unknown section [pppo]. Did you mean [ppo]?"),
    ('[[rewards]]\nkind = "model"', "a.toml:11: unknown section [rewards]. Did you mean [[reward]]?"),
    ('[[reward]]\nkind = "model"\npaht = "r"', "a.toml:13: unknown key 'paht' in [[reward]]. Did you mean 'path'?"),
    ("[[reward]]", "a.toml:11: missing key 'kind' in [[reward]]"),
    ("[ppo]\nepochs = 2.0", "a.toml:12: ppo.epochs: must be a whole number (got 2.0)"),
    ("[ppo]\nepochs = [2]", "a.toml:12: ppo.epochs: must be a whole number (got [2])"),
    ("[ppo]\nwhiten = 1", "a.toml:12: ppo.whiten: must be true or false (got 1)"),
    ("[run]\nname = 7", "a.toml:12: run.name: must be a text in quotes (got 7)"),
    ("[run]\nname = '../x'", "a.toml:12: run.name: must be letters, digits, '.', '_' or '-' (got '../x')"),
    ("[data]\neval_prompts = 7", "a.toml:12: data.eval_prompts: must be a path in quotes (got 7)"),
    ('[ppo]\nepochs = "4"', "a.toml:12: ppo.epochs: must be a whole number; remove the quotes (got '4')"),
    ('[kl]\ncoef = "1e-2"', "a.toml:12: kl.coef: must be a number; remove the quotes (got '1e-2')"),
    ('[kl]\ncoef = "low"', "a.toml:12: kl.coef: must be a number (got 'low')"),
    ("[ppo]\nepochs = true", "a.toml:12: ppo.epochs: must be a whole number (got True)"),
    ("[kl]\ncoef = false", "a.toml:12: kl.coef: must be a number (got False)"),
    ("[kl]\ncoef = nan", "a.toml:12: kl.coef: must be a finite number (got nan)"),
    ("[kl]\ncoef = -inf", "a.toml:12: kl.coef: must be a finite number (got -inf)"),
    ("[kl]\ncoef = -0.1", "a.toml:12: kl.coef: must be at least 0.0 (got -0.1)"),
    ("[kl]\ntarget = 0", "a.toml:12: kl.target: must be above 0.0 (got 0)"),
    ("[ppo]\ndiscount = 1.1", "a.toml:12: ppo.discount: must be at most 1.0 (got 1.1)"),
    ("[optimizer]\nbeta2 = 1", "a.toml:12: optimizer.beta2: must be below 1.0 (got 1)"),
    ("[ppo]\nadvantage = 'gea'", "must be one of 'gae', 'grpo', 'dr_grpo', 'rloo' (got 'gea'). Did you mean 'gae'?"),
    ("[kl]\ncontroller = 'x'", "a.toml:12: kl.controller: must be one of 'fixed', 'adaptive' (got 'x')"),
    ("[[ppo]]\nepochs = 4", "a.toml:11: ppo: must be a section, written [ppo] (got [{'epochs': 4}])"),
    ("[lora]\ntargets = 'q_proj'", "a.toml:12: lora.targets: must be a list in brackets (got 'q_proj')"),
    ("[lora]\ntargets = [1]", "a.toml:12: lora.targets.0: must be a text in quotes (got 1)"),
    # TOML itself
    ("[ppo]\nepochs = 1\nwhiten = true\nepochs = 2", "a.toml:14: 'epochs' is there twice; keep one"),
    ("[model]\ntrain = 'full'", "a.toml:11: [model] is there twice; keep one"),
    ("[ppo]\nepochs = ", "a.toml:12: not valid TOML: Invalid value"),
    ("[ppo]\nepochs = 4 5", "a.toml:12: not valid TOML: Expected newline or end of document after a statement"),
    ("[lora]\ntargets = [\n'x'\n\n", "a.toml:13: not valid TOML: Unclosed array (at end of document)"),
    ("[run]\nseed = " + "9" * 5000, "a.toml: not valid TOML: "),
    ("[lora]\ntargets = " + "[" * 5000, "a.toml: not valid TOML: "),
    # keys that are wrong together
    (
        "[ppo]\nadvantage = 'rloo'",
        "a.toml:12: ppo.advantage: 'rloo' compares a prompt's responses; set rollout.samples",
    ),
    ("[ppo]\nminibatches = 33", "a.toml:12: ppo.minibatches: more than the 32 responses of an iteration"),
    ("[ppo]\ndual_clip = 1.0", "a.toml:12: ppo.dual_clip: must be 0 (off) or above 1"),
    ("[kl]\nhorizon = 6.4\ncontroller = 'adaptive'", "a.toml:12: kl.horizon: must be above a fifth of the 32"),
    ("[kl]\ncoef = 0\ncontroller = 'adaptive'", "a.toml:12: kl.coef: the adaptive controller multiplies it"),
    ("[critic]\npath = 'x'", "a.toml:12: critic.path: is read only with critic.kind = 'model', not 'adapters'"),
    ("[critic]\nwarmup_iterations = 100", "a.toml:12: critic.warmup_iterations: leaves none of the 100 iterations"),
    (
        "[score]\noverlong_buffer = 65",
        "a.toml:12: score.overlong_buffer: more than the 64 tokens of rollout.max_tokens",
    ),
    ('[[reward]]\nkind = "model"', "a.toml:11: reward.1.path: missing: a reward of kind 'model' needs it"),
    ('[[reward]]\nkind = "function"', "a.toml:11: reward.1.function: missing"),
    ('[[reward]]\nkind = "function"\nfunction = "f.py"', "a.toml:13: reward.1.function: must be 'file.py:name'"),
]


@pytest.mark.parametrize(
    ("given", "section", "key", "value"),
    [
        ("run.name=42", "run", "name", "42"),
        ("run.name=2026-11-28", "run", "name", "2026-11-28"),
        ("run.name=1e5", "run", "name", "1e5"),
        ("run.name=true", "run", "name", "true"),
        ("run.name=007", "run", "name", "007"),
        ("run.name=0x1F", "run", "name", "0x1F"),
        ('run.name="x"', "run", "name", "x"),
        ("data.prompts=7", "data", "prompts", Path("7")),
        ("data.eval_prompts=1_0", "data", "eval_prompts", Path("1_0")),
        ("lora.targets=[self_attn.q_proj]", "lora", "targets", ("self_attn.q_proj",)),
        ("lora.targets=[mlp.up_proj, self_attn.q_proj]", "lora", "targets", ("mlp.up_proj", "self_attn.q_proj")),
    ],
)
def test_texts_need_no_quotes_on_the_command_line(folder, given, section, key, value):
    (folder / "a.toml").write_text(TRAIN)
    found = getattr(getattr(read_config(TrainConfig, folder / "a.toml", [given]), section), key)
    assert found == (Path.cwd() / value if section == "data" else value)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("example", ["reviews", "smollm2-reviews", "smollm2-question"])
def test_one_key_switches_the_estimator_of_the_examples(kind, example):
    path = Path(__file__).parents[2] / "configs" / f"{example}.toml"
    several = ("rollout.samples_per_prompt=4",)
    config = read_config(TrainConfig, path, (*several, f"ppo.advantage={kind}"))
    assert config.critic_warmup == 0 < read_config(TrainConfig, path, several).critic_warmup


@pytest.mark.parametrize(("more", "message"), ONE_MISTAKE)
def test_a_mistake_is_told_with_its_line_and_the_mend(folder, more, message):
    if more.startswith("[data]"):  # a key of a section that is there
        found = problems(TRAIN.replace("[data]\n", "").replace('prompts = "p', more + '\nprompts = "p'))
        message = message.replace(":12:", ":5:")
    else:
        found = problems(TRAIN + more)
    assert len(found) == 1 and message in found[0]
    assert message.startswith("must be one of") or found[0].startswith(message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TRAIN.replace("[[reward]]", "[reward]"), ["a.toml:7: reward: must be sections, written [[reward]] (got {"]),
        (TRAIN[: TRAIN.index("[[")], ["a.toml: missing section [[reward]]: it needs 'kind'"]),
        ("reward = []\n" + TRAIN[: TRAIN.index("[[")], ["a.toml:1: reward: needs at least one [[reward]] (got [])"]),
        ("ppo = 3\n" + TRAIN, ["a.toml:1: ppo: must be a section, written [ppo] (got 3)"]),
        (
            "# nothing yet",
            [
                "a.toml: missing key 'path' in [model]",
                "a.toml: missing key 'prompts' in [data]",
                "a.toml: missing section [[reward]]",
            ],
        ),
        (SFT.replace("[data]", 'initialise = "random"\n[data]'), ["a.toml:3: model.initialise: 'random' needs"]),
    ],
)
def test_mistakes_in_the_sections_themselves(folder, text, expected):
    found = problems(text, job=SFTConfig if text.startswith(SFT[:20]) and "train" in text else TrainConfig)
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)


def test_all_problems_come_at_once(folder):
    more = "[ppo]\nepocs = 1\nclip_low = 7\nwhiten = 'yes'\n[extra]\n[kl]\ncoef = nan\n"
    found = problems(TRAIN + more, "ppo.epochs", "run.seed=-1")
    assert [problem.split(": ")[0] for problem in found] == [
        "--set ppo.epochs", "--set run.seed=-1", "a.toml:13", "a.toml:14", "a.toml:12", "a.toml:17", "a.toml:15",
    ]  # fmt: skip
    found = problems(TRAIN + "[ppo]\ndual_clip = 1\nminibatches = 99\n[critic]\nwarmup_iterations = 100", "bad=1")
    assert [problem.split(": ")[0] for problem in found] == ["--set bad=1", "a.toml:13", "a.toml:12", "a.toml:15"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.epochs", "write it as section.key=value, for example --set ppo.epochs=4"),
        ("epochs=4", "write it as section.key=value"),
        ("ppo..epochs=4", "write it as section.key=value"),
        ("=4", "write it as section.key=value"),
        ("ppo.epocs=4", "unknown key 'epocs' in [ppo]. Did you mean 'epochs'?"),
        ("pppo.epochs=4", "unknown section [pppo]. Did you mean [ppo]?"),
        ("ppo.epochs.x=4", "ppo.epochs: must be a whole number (got {'x': 4})"),
        ("ppo.epochs=abc", "ppo.epochs: must be a whole number (got 'abc')"),
        ("ppo.epochs=", "ppo.epochs: must be a whole number (got '')"),
        ("ppo.epochs='4'", "ppo.epochs: must be a whole number; remove the quotes (got '4')"),
        ("run.seed=" + "9" * 5000, "run.seed: must be a whole number"),
        ("reward.weight=2", "reward is not a section; lists take an index, for example reward.0.weight=2"),
        ("reward.1.weight=2", "there is no reward.1 in the configuration"),
        ("reward.².weight=2", "there is no reward.² in the configuration"),
        ("model.path.x=2", "model.path is not a section"),
        ("reward.0.path.x.y=2", "there is no reward.0.path.x in the configuration"),
        ("critic.path=x", "critic.path: is read only with critic.kind = 'model'"),
    ],
)
def test_bad_overrides_are_named(folder, override, message):
    found = problems(TRAIN, override)
    shown = override if len(override) <= 100 else override[:100] + "…"
    assert len(found) == 1 and found[0].startswith(f"--set {shown}: {message}")


def test_an_override_of_a_list_that_is_missing_adds_no_second_problem(folder):
    found = problems(TRAIN[: TRAIN.index("[[")], "reward.0.weight=2")
    assert found == [
        "--set reward.0.weight=2: there is no reward.0 in the configuration",
        "a.toml: missing section [[reward]]: it needs 'kind'",
    ]


def test_overrides_win_and_the_later_one_over_the_earlier(folder):
    config = read(TRAIN, "ppo.epochs=3", "ppo.epochs=4", "reward.0.weight=2", 'lora.targets=["a"]', "run.name=x")
    assert (config.ppo.epochs, config.reward[0].weight, config.lora.targets, config.run.name) == (4, 2.0, ("a",), "x")


LINES = '''\
# don't stop at """ or [brackets] in a comment
model.path = "m"   # """
"ppo".'epochs' = "1"
data = { prompts = "p", eval_count = "1" }

[lora]
targets = [   # ]
  "rank = 1",
  ["x"],
]
scale = """
[kl]
rank = 1 \\"""
"""
rank = "1"
[ kl ]
"coef" = \'\'\'
[ppo]\'\'\'
[[reward]]
kind = "model"
path = "[x"
[[ reward ]]
kind = "x"
'''


def test_lines_survive_whatever_toml_allows(folder):
    found = {problem.split(":")[2].strip(): int(problem.split(":")[1]) for problem in problems(LINES)}
    assert found == {
        "ppo.epochs": 3, "data.eval_count": 4, "lora.targets.1": 7, "lora.scale": 11, "lora.rank": 15,
        "kl.coef": 17, "reward.1.kind": 23,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.toml: the file is empty; `mlx-ppo init DIR` writes one to start from"),
        (b"\xef\xbb\xbf \r\n", "a.toml: the file is empty"),
        (TRAIN.encode() + b"# caf\xe9", "a.toml:11: not UTF-8 at byte 106; save the file as UTF-8"),
        (TRAIN.encode("utf-16"), "a.toml:1: not UTF-8 at byte 0"),
        (TRAIN.encode() + b"\x00", "a.toml:11: not valid TOML: "),
    ],
)
def test_files_that_are_not_text(folder, data, message):
    (problem,) = problems(data)
    assert problem.startswith(message)


def test_byte_order_mark_and_crlf_are_accepted_and_lines_still_right(folder):
    data = b"\xef\xbb\xbf" + (TRAIN + '[lora]\nscale = """\n\n"""\nrank = 0').replace("\n", "\r\n").encode()
    assert [problem.split(" ")[0] for problem in problems(data)] == ["a.toml:15:", "a.toml:12:"]
    assert read(b"\xef\xbb\xbf" + TRAIN.replace("\n", "\r\n").encode()) == read(TRAIN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configs/reviws.toml", "configs/reviws.toml: no such configuration file. Did you mean 'reviews.toml'?"),
        ("configs/q.toml", "configs/q.toml: no such configuration file."),
        ("nowhere/q.toml", "nowhere/q.toml: no such configuration file."),
        ("configs", "configs: is a folder; name a TOML file in it"),
        ("configs/reviews.toml/x", "configs/reviews.toml/x: cannot be read (Not a directory)"),
    ],
)
def test_files_that_are_not_there(folder, name, message):
    Path("configs").mkdir()
    Path("configs/reviews.toml").write_text(TRAIN)
    with pytest.raises(ConfigError) as caught:
        read_config(TrainConfig, Path(name))
    assert caught.value.problems == (message,)


def test_paths_start_from_the_file_and_overrides_from_the_working_folder(folder, monkeypatch):
    Path("configs").mkdir()
    text = TRAIN + '[[reward]]\nkind = "function"\nfunction = "f.py:score"\n[critic]\nkind = "model"\npath = "/abs"\n'
    config = read(text, name="configs/a.toml")
    base = folder / "configs"
    assert (config.model.path, config.data.prompts) == (base / "model", base / "prompts.jsonl")
    assert (config.reward[0].path, config.reward[1].function) == (base / "reward", f"{base}/f.py:score")
    assert (config.critic.path, config.run.folder, config.model.adapter) == (Path("/abs"), base / "runs", None)
    monkeypatch.setenv("HOME", "/home/me")
    overrides = ["model.path=m", "reward.1.function=g.py:s", "run.folder=r", "model.adapter=~/x", "critic.path=~no one"]
    config = read_config(TrainConfig, base / "a.toml", overrides)
    assert (config.model.path, config.reward[1].function) == (folder / "m", f"{folder}/g.py:s")
    assert (config.run.folder, config.model.adapter) == (folder / "r", Path("/home/me/x"))
    assert (config.critic.path, config.reward[0].path) == (folder / "~no one", base / "reward")
    assert read_config(TrainConfig, base / "a.toml").run.folder == base / "runs"


@pytest.mark.parametrize("extra", ["", "[run]\nseed = 3\n"])
def test_a_run_is_named_after_its_job(folder, extra):
    assert read(TRAIN + extra).run.name == "ppo"
    assert read(SFT + extra, job=SFTConfig).run.name == "sft"
    assert read(SFT + extra, job=RewardConfig).run.name == "reward"
    assert read(SFT + extra, "run.name=x", job=SFTConfig).run.name == "x"


def test_defaults_are_those_of_the_design(folder):
    config = read(TRAIN)
    ppo, kl, optimizer, critic = config.ppo, config.kl, config.optimizer, config.critic
    assert (ppo.epochs, ppo.minibatches, ppo.clip_low, ppo.clip_high, ppo.dual_clip) == (2, 4, 0.2, 0.28, 3.0)
    assert (ppo.value_clip, ppo.discount, ppo.lambda_policy, ppo.lambda_critic) == (0.2, 1.0, 0.95, 1.0)
    assert (kl.coef, kl.controller, kl.target, kl.horizon) == (0.05, "fixed", 6.0, 0.0)
    assert (optimizer.eps, optimizer.gradient_clip, config.rollout.temperature) == (1e-5, 1.0, 1.0)
    assert (critic.initialise, ppo.advantage, ppo.whiten, ppo.aggregate) == ("reward", "gae", True, "token-mean")
    assert (config.score.truncated, ppo.entropy_coef, ppo.stop_at_kl, ppo.length_adaptive) == ("none", 0, 0, 0)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
RATE = st.floats(1e-300, 1e300)


@pytest.mark.parametrize("command", JOBS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=TEXT, targets=st.lists(TEXT, max_size=3), rate=RATE, seed=st.integers(0, 2**70), flag=st.booleans())
def test_a_written_configuration_reads_back_equal(folder, command, path, targets, rate, seed, flag):
    where = Path(os.path.abspath(path.strip("~") or "x"))
    sections = {
        "run": {"folder": where, "seed": seed},
        "model": {"path": where, "adapter": where if flag else None},
        "lora": {"targets": tuple(targets), "scale": rate},
        "optimizer": {"learning_rate": rate, "eps": rate},
        "data": {"train": where},
    }
    if command == "train":
        source = {"kind": "function", "function": f"{where}:f", "weight": -rate} if flag else {"kind": "model"}
        sections |= {"data": {"prompts": where}, "ppo": {"whiten": flag}, "kl": {"coef": rate}}
        sections |= {"reward": ({"kind": "model", "path": where}, {"path": None if flag else where, **source})}
    config = JOBS[command].model_validate(sections)
    assert read(to_toml(config), job=JOBS[command]) == config
