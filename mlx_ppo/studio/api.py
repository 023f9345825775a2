"""What the pages ask the server for: every address under `/api` but those of runs."""

import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_ppo.config.sections import TrainConfig
from mlx_ppo.errors import ConfigError, DataError, RunError, printable
from mlx_ppo.runs.folder import RECORD, open_config, read_record
from mlx_ppo.studio.jobs import Job, Jobs
from mlx_ppo.studio.labels import Answers
from mlx_ppo.studio.lines import Row
from mlx_ppo.studio.order import NO_MORE, Order
from mlx_ppo.studio.project import BOUNDS, Project, are_bounds, is_text, named
from mlx_ppo.studio.questions import MODES, Set, agreement, pace
from mlx_ppo.studio.rounds import Rounds, comparison_of, set_of
from mlx_ppo.studio.selection import Teacher
from mlx_ppo.studio.server import Answer, body
from mlx_ppo.studio.texts import shown

AHEAD, FULL = 20, 100  # sampling begins where fewer pairs than that are open, and makes so many more
_TRIED_SECONDS = 5.0
_FEEDBACK = "feedback"
_LONGEST_TAB, _LONGEST_SECONDS = 64, 3600.0


class Studio:
    """A project with everything that the page can do to it."""

    def __init__(self, folder: Path) -> None:
        """A folder."""
        self.project = Project(folder)
        self.jobs = Jobs(folder)
        self.answers = Answers(folder / _FEEDBACK)
        self.rounds = Rounds(self.project, self.jobs, self.answers)
        self._teachers: dict[str, Teacher] = {}
        self._sets: dict[str, Set] = {}
        self._tried = 0.0
        self._lock = threading.Lock()

    def overview(self) -> Row:
        """All that the project's page shows."""
        choices = self.project.choices()
        rounds = self.rounds.all()
        prompts = {name: {"train": train, "held_out": out} for name, (train, out) in self.project.prompts().items()}
        return {
            "folder": printable(str(self.project.folder)),
            "model": choices["model"],
            "prompts": choices["prompts"],
            "max_tokens": choices["max_tokens"],
            "temperature": choices["temperature"],
            **{name: choices[name] for name in BOUNDS},
            "models": self.project.models(),
            "prompt_sets": prompts,
            "small": self.rounds.small() if choices["model"] else True,
            "rounds": rounds,
            "jobs": [_shown(job) for job in self.jobs.all() if job.kind != "sampling" or job.running][:30],
            "runs": self._runs(),
        }

    def _runs(self) -> list[Row]:
        found = []
        records = [file for file in self.project.folder.glob(f"runs/*/{RECORD}") if file.is_file()]
        for record in sorted(records, key=lambda file: -file.stat().st_mtime):
            path = str(record.parent.relative_to(self.project.folder))
            if not is_text(path):
                continue
            try:
                command = shown(read_record(record.parent).get("command"))
            except RunError as error:
                command = str(error)
            found.append({"path": path, "command": command})
        return found

    def next(self, mode: str, name: str | None, tab: str) -> Row:
        """The next question of a set (by default the present round's), and how far the set is."""
        if mode not in MODES:
            raise ConfigError(f"{mode!r} is no way to label")
        choices = self.project.choices()
        if not choices["rounds"] or choices["prompts"] is None:
            raise ConfigError("choose a model and prompts on the project's page first")
        chosen = name or set_of(len(choices["rounds"]))
        pairs = self._set(chosen)
        standing = self.answers.standing()
        waiting = self._sample(chosen, len(pairs.open(mode, standing)), len(pairs.pairs()), choices)
        teacher = self._teachers.setdefault(chosen, Teacher())
        choose = None if name else partial(teacher.choose, pairs=pairs.pairs(), standing=standing)
        question = pairs.next(mode, standing, tab, choices["seed"], choose)
        return {
            "question": question.shown() if question is not None else None,
            "waiting": waiting,
            "figures": self.figures(chosen, standing, choices["seed"]),
        }

    def _set(self, name: str) -> Set:
        with self._lock:
            if name not in self._sets:
                self._sets[name] = Set(self.project.folder / _FEEDBACK / f"{named(name)}.jsonl")
            return self._sets[name]

    def figures(self, name: str, standing: dict[str, Row], seed: int) -> Row:
        """Progress on a set."""
        own = {question: row for question, row in standing.items() if row.get("set") == name}
        twice, alike = agreement(own)
        counts = {kind: sum(row["kind"] == kind for row in own.values()) for kind in MODES}
        found: Row = {"set": name, "counts": counts, "twice": twice, "alike": alike, "pace": pace(own)}
        found["damaged"] = self.answers.damaged
        teacher = self._teachers.setdefault(name, Teacher())
        learned = teacher.measure(self._set(name).pairs(), own, seed)
        found["learned"] = learned._asdict() if learned is not None else None
        found["accuracy"] = self.rounds.last_accuracy()
        return found

    def _sample(self, name: str, free: int, have: int, choices: Row) -> str:
        """See to it that there are pairs to ask about; where there are none, what is being done about it."""
        running = next((job for job in self.jobs.all() if job.kind == "sampling"), None)
        if running is not None and running.running:
            return "" if free else "The model is writing the first answers…"
        with self._lock:
            if free >= AHEAD or time.monotonic() - self._tried < _TRIED_SECONDS:
                return "" if free else self._trouble(running)
            self._tried = time.monotonic()
            if running is not None and f"{name}.jsonl{NO_MORE}" in self.jobs.log(running.id):
                return "" if free else "These prompts give no more pairs."
            order = self._order(name, have, choices)
            if have >= order.total:
                return "" if free else "Every pair of this set has an answer."
            with self.project.alone():
                self.jobs.start("sampling", [json.dumps(order._asdict())], module="mlx_ppo.studio.sampling")
        return "" if free else "The model is being loaded…"

    def _trouble(self, job: Job | None) -> str:
        if job is None or job.state == "finished":
            return "The model is being loaded…"
        lines = self.jobs.log(job.id).strip().splitlines()
        return f"No answers could be sampled: {lines[-1] if lines else job.state}"

    def _order(self, name: str, have: int, choices: Row) -> Order:
        rounds = self.rounds.all()
        policy = next((each for each in rounds if each.get("compare") == name), None)
        current = next((each for each in rounds if each["set"] == name), None)
        if policy is not None:
            models: tuple[str, ...] = (choices["model"], policy["train"]["run"])
            prompts = self.project.prompt_file(held_out=True)
            total = min(2 * self.project.chosen_prompts()[2], FULL)
        elif current is not None:
            models, prompts, total = (current["from"],), self.project.prompt_file(held_out=False), have + FULL
        else:
            raise ConfigError("there is no such round")
        file = f"{_FEEDBACK}/{name}.jsonl"
        how = (choices["max_tokens"], choices["temperature"], choices["seed"])
        reward, bounds = self.rounds.last_reward() if current is not None else "", {n: choices[n] for n in BOUNDS}
        return Order(file, models, str(prompts), total, *how, reward, **bounds)

    def undo(self, tab: str) -> Row:
        """Take a tab's last answer back; its question comes next."""
        row = self.answers.undo(tab)
        if row is not None:
            self._set(str(row.get("set"))).ask_again(row["question"], tab)
        return {"undone": row is not None}

    def answer(self, given: Row) -> Row:
        """Keep an answer to a question that was asked."""
        name = str(given.get("question"))
        question = self._set(name.partition(":")[2].partition("/")[0]).find(name, self.project.choices()["seed"])
        if question is None:
            raise DataError("this question isn't one of this project; reload the page")
        allowed: Row = {key: given[key] for key in ("verdict", "rating", "better") if key in given}
        allowed["tab"] = _text(given, "tab")[:_LONGEST_TAB]
        seconds = given.get("seconds")
        if isinstance(seconds, int | float) and 0 <= seconds < _LONGEST_SECONDS:
            allowed["seconds"] = round(seconds, 3)
        return {"id": self.answers.add({**question.kept(), **allowed})["id"]}  # not who wrote what

    def compare(self) -> Row:
        """The name of the pairs that compare the last policy with the start."""
        last = [each for each in self.rounds.all() if each["train"] is not None and each["train"]["done"]]
        if not last:
            return {"set": None, "run": None}
        run = last[-1]["train"]["run"]
        return {"set": comparison_of(run), "run": run}

    def judge(self) -> str:
        """Let the newest reward model judge the last policy's comparison; the job's id."""
        name = self.compare()["set"]
        if name is None:
            raise ConfigError("train a policy first")
        order = self._order(name, 0, self.project.choices())._replace(reward=self.rounds.last_reward())
        return self.jobs.start("judging", [json.dumps(order._asdict())], module="mlx_ppo.studio.judging")

    def resume(self, name: str) -> str:
        """Go on with a job that was stopped or killed; the new job's id."""
        job = self.jobs.get(name)
        if job.running or job.run is None or job.kind not in ("train", "reward", "sft", "dpo"):
            raise ConfigError("this job can't go on")
        config = open_config(self.project.folder / job.run)
        if isinstance(config, TrainConfig) and any(source.kind == "function" for source in config.reward):
            # no job of the page has one: whoever made the folder would run their code by a click
            raise ConfigError(
                f"{job.run}: runs Python code of its own; go on with it in a terminal, by `mlx-ppo resume`"
            )
        new = self.jobs.start(job.kind, ["resume", job.run])
        self.rounds.resumed(name, new)
        return new

    def bring(self, path: str, name: str) -> str:
        """Import a model; the job's id."""
        if not path.strip():
            raise ConfigError("name a GGUF file or a folder")
        source = os.path.join(self.project.folder, os.path.expanduser(path))
        if not os.path.exists(source):
            raise ConfigError(f"{path[:200]}: no such file or folder on this machine")
        return self.jobs.start("import", ["import", source, f"models/{named(name)}"])


def _shown(job: Job) -> Row:
    return {**job._asdict(), "resumable": job.state in ("stopped", "killed", "failed") and job.run is not None}


def routes(studio: Studio) -> list[BaseRoute]:
    """The addresses; each gives JSON, and takes it where it changes something."""

    def get(path: str, answer: Callable[[Request], Any]) -> Route:
        async def handle(request: Request) -> Response:
            return Answer(await run_in_threadpool(answer, request))

        return Route(path, handle, methods=["GET"])

    def change(answer: Callable[[Row], Any], given: Row) -> Any:
        with studio.project.alone():
            return answer(given)

    def post(path: str, answer: Callable[[Row], Any]) -> Route:
        async def handle(request: Request) -> Response:
            given = {**await body(request), **request.path_params}
            return Answer(await run_in_threadpool(change, answer, given))

        return Route(path, handle, methods=["POST"])

    project, jobs, rounds = studio.project, studio.jobs, studio.rounds
    return [
        get("/api/project", lambda _: studio.overview()),
        post("/api/example", lambda _: project.add_example()),
        post("/api/import", lambda given: studio.bring(_text(given, "path"), _text(given, "name"))),
        post("/api/prompts", lambda given: _prompts(project, given)),
        post("/api/model", lambda given: project.choose_model(_text(given, "model"))),
        post("/api/choose", lambda given: _choose(project, given)),
        post("/api/reward", lambda given: rounds.train_reward(**_numbers(given, kind=str, epochs=int, rate=float))),
        post("/api/train", lambda given: rounds.train_policy(**_numbers(given, iterations=int, kl=float, rate=float))),
        post("/api/next-round", lambda _: rounds.next()),
        get("/api/compare", lambda _: studio.compare()),
        post("/api/judge", lambda _: studio.judge()),
        get("/api/jobs/{id}/log", lambda request: {"text": jobs.log(request.path_params["id"])}),
        post("/api/jobs/{id}/stop", lambda given: jobs.stop(given["id"])),
        post("/api/jobs/{id}/resume", lambda given: studio.resume(given["id"])),
        get("/api/label/next", lambda request: studio.next(*(request.query_params.get(key, "") for key in _ASKED))),
        post("/api/label/answer", studio.answer),
        post("/api/label/undo", lambda given: studio.undo(_text(given, "tab"))),
    ]


_HUGE = 10**15  # no number of the page is
_KINDS = {name: type(value) for name, value in BOUNDS.items()}
_ASKED = ("mode", "set", "tab")


def _prompts(project: Project, given: Row) -> None:
    text = project.read_prompts(_text(given, "path")) if given.get("path") else _text(given, "text")
    project.add_prompts(_text(given, "name"), text, chat=given.get("chat") is True)
    project.choose(prompts=given["name"])


def _choose(project: Project, given: Row) -> Row:
    values: Row = _numbers({**BOUNDS, **given}, prompts=str, max_tokens=int, temperature=float, **_KINDS)
    if values["prompts"] not in project.prompts():
        raise ConfigError("choose prompts that are there")
    if not 1 <= values["max_tokens"] <= 4096 or not 0 < values["temperature"] <= 5:
        raise ConfigError("lengths are from 1 to 4096 tokens, temperatures above 0 and up to 5")
    if not are_bounds(values):
        raise ConfigError(
            "top-k is 0 (off) or from 2 on, top-p above 0 and up to 1 (off), min-p from 0 (off) to below 1"
        )
    return project.choose(**values)


def _text(given: Row, key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"'{key}' is missing; reload the page")
    return value


def _numbers(given: Row, **kinds: type) -> Row:
    """Values by their types; a whole number does for a float."""
    found = {}
    for key, kind in kinds.items():
        value = given.get(key)
        value = float(value) if kind is float and type(value) is int and abs(value) < _HUGE else value
        if type(value) is not kind or (isinstance(value, int | float) and not abs(value) < _HUGE):
            raise ConfigError(f"'{key}' must be {'a number' if kind is not str else 'a text'}")
        found[key] = value
    return found
