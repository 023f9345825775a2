"""Rounds: label what the last policy wrote, train a reward model on all labels, and a policy by it."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_ppo.config.file import read_config
from mlx_ppo.config.supervised import JOBS
from mlx_ppo.errors import ConfigError, RunError
from mlx_ppo.files import read_json
from mlx_ppo.rewards.verdicts import Rate, agreement, verdict, wilson
from mlx_ppo.runs import checkpoint
from mlx_ppo.runs.folder import replace_file
from mlx_ppo.runs.health import COLLAPSED
from mlx_ppo.runs.toml import sections_toml
from mlx_ppo.studio.feedback import feedback, write_rows
from mlx_ppo.studio.jobs import Job, Jobs
from mlx_ppo.studio.labels import Answers
from mlx_ppo.studio.lines import Lines, Row
from mlx_ppo.studio.order import margins_of
from mlx_ppo.studio.project import BOUNDS, Project
from mlx_ppo.studio.questions import verdict_on

SMALL = 50_000_000  # bytes of weights; smaller models take larger steps
_UPPER_LAYERS = 8


def set_of(number: int) -> str:
    """The name of a round's pairs."""
    return f"round-{number}"


def comparison_of(run: str) -> str:
    """The name of the pairs that compare a run with the start."""
    return f"compare-{Path(run).name}"


class Rounds:
    """The rounds of a project, numbered from 1."""

    def __init__(self, project: Project, jobs: Jobs, answers: Answers) -> None:
        """What was chosen, what was started, what was answered."""
        self._project = project
        self._jobs = jobs
        self._answers = answers

    def all(self) -> list[Row]:
        """Each round's policy, jobs, and what it brought."""
        jobs = {job.id: job for job in self._jobs.all()}
        standing = self._answers.standing()
        given = self._project.choices()["rounds"]
        return [self._round(number, each, jobs, standing) for number, each in enumerate(given, 1)]

    def _round(self, number: int, given: Row, jobs: Mapping[str, Job], standing: Mapping[str, Row]) -> Row:
        reward, policy = (self._result(jobs.get(str(given.get(kind)))) for kind in ("reward", "train"))
        labels = sum(row.get("set") == set_of(number) and row.get("verdict") != "skip" for row in standing.values())
        found: Row = {"number": number, "from": given["policy"], "set": set_of(number), "labels": labels}
        found |= {"reward": reward, "train": policy, **dict.fromkeys(("accuracy", "wins", "judged", "agree"))}
        if reward is not None and reward["run"] is not None:
            found["accuracy"] = _accuracy(self._project.folder / reward["run"], self._held_out(number))
        if policy is not None and policy["run"] is not None:
            found["compare"] = comparison_of(policy["run"])
            found["wins"] = wins(standing, found["compare"], policy["run"])
            file = margins_of(self._project.folder / "feedback" / f"{found['compare']}.jsonl")
            margins = Lines(file, lambda row: isinstance(row.get("margin"), float) and "id" in row)
            judged = {str(row["id"]): verdict(row["margin"]) for row in margins.read()}
            by_hand = _by_hand(standing, found["compare"], policy["run"])
            found["judged"] = _shown(Rate.of(list(judged.values())))
            found["agree"] = _shown(agreement(by_hand, judged))
        return found

    def _result(self, job: Job | None) -> Row | None:
        """A job and the run it works in, `done` once there is something to use, `collapsed` if nothing of use is."""
        if job is None:
            return None
        folder = self._project.folder / job.run if job.run is not None else None
        there = folder is not None and ((folder / "reward").is_dir() or bool(checkpoint.steps(folder)))
        lost = not job.running and COLLAPSED in self._jobs.log(job.id)
        return {"job": job.id, "state": job.state, "run": job.run, "done": there and not job.running, "collapsed": lost}

    def train_reward(self, *, kind: str, epochs: int, rate: float) -> str:
        """Train a reward model on the labels of all rounds; the job's id.

        Args:
            kind: "pairs" or "ratings".
            epochs: passes over them.
            rate: the learning rate.
        Raises:
            ConfigError: there are too few labels, or a number is out of range.
        """
        choices = self._project.choices()
        rounds = choices["rounds"]
        number, folder = len(rounds), self._project.folder
        found = feedback(self._answers.standing(), [set_of(one + 1) for one in range(number)])
        learn, held = (found.pairs, found.held_out) if kind == "pairs" else (found.ratings, found.held_out_ratings)
        if len(learn) < 2:
            raise ConfigError(f"there are {len(learn)} labels to learn from; give some more first")
        train = write_rows(folder / "feedback" / f"labels-{number}.jsonl", learn)
        validation = write_rows(self._held_out(number), held)
        objective = {"objective": "pairs"} if kind == "pairs" else {"objective": "both"}
        sections: Row = {
            "run": {"folder": "../runs", "name": f"reward-{number}", "save_every": 50},
            "model": {"path": f"../{choices['model']}"},
            "lora": self._lora(),
            "data": {
                "train": f"../feedback/{train.name}" if train else None,
                "validation": f"../feedback/{validation.name}" if validation else None,
            },
            "reward_training": {**objective, "epochs": epochs, "pooling": "mean", "batch_size": 16},
            "optimizer": {"learning_rate": rate, "schedule": "cosine", "warmup_steps": 5},
        }
        return self._start("reward", f"reward-{number}.toml", sections, rounds)

    def train_policy(self, *, iterations: int, kl: float, rate: float) -> str:
        """Train the policy by this round's reward model, from where the last round's ended; the job's id.

        Raises:
            ConfigError: there is no reward model yet, or a number is out of range.
        """
        choices = self._project.choices()
        rounds, now = choices["rounds"], self.all()
        reward = now[-1]["reward"] if now else None
        if reward is None or not reward["done"]:
            raise ConfigError("train this round's reward model first")
        number = len(rounds)
        name, prompts, _ = self._project.chosen_prompts()
        start = self._adapter(rounds[-1]["policy"])
        sections: Row = {
            "run": {"folder": "../runs", "name": f"policy-{number}", "iterations": iterations, "save_every": 5},
            "model": {"path": f"../{choices['model']}", "adapter": f"../{start}" if start else None},
            "lora": self._lora(),
            "data": {"prompts": f"../prompts/{name}/train.jsonl", "eval_prompts": f"../prompts/{name}/held-out.jsonl"},
            "rollout": {
                "prompts": min(32, prompts),
                "max_tokens": choices["max_tokens"],
                "temperature": choices["temperature"],
                **{name: choices[name] for name, off in BOUNDS.items() if choices[name] != off},
            },
            "reward": [{"kind": "model", "path": f"../{reward['run']}/reward"}],
            "score": {"truncated": "subtract", "truncated_value": 1.0},
            "critic": {"learning_rate": 1e-3, "warmup_iterations": min(2, iterations - 1)},
            "ppo": {"epochs": 2, "minibatches": min(4, prompts)},
            "kl": {"coef": kl},
            "optimizer": {"learning_rate": rate, "schedule": "linear"},
        }
        return self._start("train", f"policy-{number}.toml", sections, rounds)

    def last_accuracy(self) -> Row | None:
        """That of the newest reward model that was measured; see `_accuracy`."""
        jobs = {job.id: job for job in self._jobs.all()}
        for number, given in reversed([*enumerate(self._project.choices()["rounds"], 1)]):
            job = jobs.get(str(given.get("reward")))
            if job is not None and job.run is not None:
                found = _accuracy(self._project.folder / job.run, self._held_out(number))
                if found is not None:
                    return found
        return None

    def last_reward(self) -> str:
        """The folder of the newest reward model of any round; "" where there is none."""
        done = [each["reward"] for each in self.all() if each["reward"] is not None and each["reward"]["done"]]
        return f"{done[-1]['run']}/reward" if done else ""

    def next(self) -> None:
        """Begin a round with the policy that the last one trained; ConfigError where there is none."""
        rounds, now = self._project.choices()["rounds"], self.all()
        policy = now[-1]["train"] if now else None
        if policy is None or not policy["done"]:
            raise ConfigError("train this round's policy first")
        self._project.choose(rounds=[*rounds, {"policy": policy["run"]}])

    def resumed(self, old: str, new: str) -> None:
        """A job goes on under another number."""
        rounds = [{key: new if value == old else value for key, value in each.items()}
                  for each in self._project.choices()["rounds"]]  # fmt: skip
        self._project.choose(rounds=rounds)

    def _held_out(self, number: int) -> Path:
        return self._project.folder / "feedback" / f"labels-{number}-held-out.jsonl"

    def _adapter(self, policy: str) -> str | None:
        """The newest checkpoint of a run, as a path in the project; None for a model's folder."""
        steps = checkpoint.steps(self._project.folder / policy)
        if not steps:
            return None
        folder = checkpoint.folder_of(self._project.folder / policy, steps[-1])
        return str(folder.relative_to(self._project.folder))

    def small(self) -> bool:
        """Whether the chosen model is a small one."""
        model = self._project.choices()["model"]
        return bool(self._project.models().get(model, {"bytes": 0})["bytes"] < SMALL)

    def _lora(self) -> Row:
        return {"rank": 16, "scale": 2.0} if self.small() else {"rank": 8, "scale": 2.0, "layers": _UPPER_LAYERS}

    def _start(self, kind: str, name: str, sections: Row, rounds: list[Row]) -> str:
        """Write the configuration, see that it is one, and start the command that reads it."""
        folder = self._project.folder / "configs"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{folder}: can't be made ({error.strerror})") from None
        filled = {
            section: {key: item for key, item in value.items() if item is not None}
            if isinstance(value, dict)
            else value
            for section, value in sections.items()
        }
        replace_file(folder / name, sections_toml(filled))
        read_config(JOBS[kind], folder / name)
        job = self._jobs.start(kind, [kind, f"configs/{name}"])
        self._project.choose(rounds=[*rounds[:-1], {**rounds[-1], kind: job}])
        return job


def wins(standing: Mapping[str, Row], name: str, source: str) -> Row | None:
    """How often a source's completions were preferred in a comparison, ties counting half; None before any answer.

    With a 95 % interval.
    """
    return _shown(Rate.of(list(_by_hand(standing, name, source).values())))


def _by_hand(standing: Mapping[str, Row], name: str, source: str) -> dict[str, float]:
    """A person's verdicts on the pairs of a set, by their numbers; 1 where the source's completion was preferred."""
    rows = {
        question.rpartition("/")[2]: verdict_on(row, source)
        for question, row in standing.items()
        if row.get("set") == name and row["kind"] == "pair"
    }
    return {number: value for number, value in rows.items() if value is not None}


def _shown(rate: Rate) -> Row | None:
    return {"count": rate.pairs, "share": rate.share, "low": rate.low, "high": rate.high} if rate.pairs else None


def _accuracy(run: Path, held_out: Path) -> Row | None:
    """A reward model's accuracy on held-out labels, on how many, and its 95 % interval.

    None where none were held out or it isn't done.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        report: Any = read_json(run / "report.json")["validation"]
        share, count = float(report["accuracy"]), held_out.read_bytes().count(b"\n")
        if not 0 <= share <= 1:
            return None
        return _shown(Rate(share, *wilson(share, count), count))
    return None
