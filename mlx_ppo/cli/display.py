"""What a person sees of a running job: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mlx_ppo.cli.work import Answers
from mlx_ppo.errors import harmless, printable
from mlx_ppo.runs.metrics import BY_KEY, show

_LIVE_KEYS = (
    ("score", "total_reward", "kl", "entropy"),
    ("clip_low", "clip_high", "kl_old", "explained_variance"),
    ("length", "finished", "policy_norm", "tokens_per_second"),
)
_LINE_KEYS = ("score", "kl", "entropy", "clip_high", "explained_variance", "finished", "tokens_per_second")
_SHOWN_ANSWERS = 6
_NARROWEST = 60  # columns of the table; a narrower terminal breaks its lines, which cuts no word


class Display:
    """Implements the reporters of all jobs."""

    def __init__(self) -> None:
        """Nothing is shown until something is reported."""
        self.console = Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._started = time.monotonic()
        self._first: int | None = None
        self._metrics: dict[str, float] = {}
        self._sample: tuple[str, str, float] | None = None
        self._phase = ""
        self._tokens = 0
        self._total = 0
        self._last_line = 0.0

    def __enter__(self) -> Self:
        """The display itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self.close()

    def close(self) -> None:
        """End the live panel."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def message(self, text: str) -> None:
        """One line of information or warning."""
        self.console.print(Text(printable(text)))

    def warn(self, text: str) -> None:
        """One line on standard error, beside a panel that is shown."""
        click.echo(text, err=True)

    def phase(self, name: str, iteration: int, iterations: int) -> None:
        """A phase begins."""
        self._phase, self._total, self._tokens = name, iterations, 0
        moves = self.console.file.isatty() and self.console.is_terminal and not self.console.is_dumb_terminal
        if moves and self._live is None:  # FORCE_COLOR alone makes no terminal of a pipe
            self._live = Live(console=self.console, refresh_per_second=4, transient=True, get_renderable=self._panel)
            self._live.start()

    def tokens(self, count: int) -> None:
        """Tokens have been sampled."""
        self._tokens += count

    def iteration(self, metrics: dict[str, float], iterations: int, sample: tuple[str, str, float]) -> None:
        """An iteration is done."""
        self._metrics, self._sample, self._total = metrics, sample, iterations
        done = int(metrics["step"])
        if self._first is None:
            self._first, self._started = done, time.monotonic()
        if self._live is None:
            shown = "  ".join(show(key, metrics[key]) for key in _LINE_KEYS if key in metrics)
            self.console.print(Text(f"iteration {done}/{iterations}  {self._left(done)}{shown}"))

    def step(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """An optimizer step of a supervised job is done; shown about every ten seconds."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started, self._total, self._last_line = done, now, total, now
        if now - self._last_line >= 10:
            self._last_line = now
            shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self.console.print(Text(f"step {done}/{total}  {self._left(done)}{shown}"))

    def _left(self, done: int) -> str:
        if self._first is None or done == self._first:
            return ""
        seconds = (time.monotonic() - self._started) / (done - self._first) * (self._total - done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left  "

    def _panel(self) -> Group:
        done = int(self._metrics.get("step", 0))
        lines = [Text(f"iteration {done}/{self._total}  {self._left(done)}{self._phase}", style="bold")]
        if self._phase == "rollout" and self._tokens:
            lines[0].append(f"  {self._tokens} tokens")
        grid = Table.grid(padding=(0, 3))
        for row in _LIVE_KEYS:
            cells = []
            for key in row:
                if key in self._metrics:
                    label, form = BY_KEY[key].label, BY_KEY[key].form
                    cells.append(f"{label} [bold]{self._metrics[key]:{form}}[/bold]")
            grid.add_row(*cells)
        parts: list[Text | Table] = [*lines, grid]
        if self._sample is not None:
            prompt, completion, score = self._sample
            text = Text(f"{score:+.2f}  ", style="dim")
            text.append(harmless(prompt), style="dim")
            text.append(harmless(completion), style="cyan")
            parts.append(text)
        return Group(*parts)

    def before_and_after(self, before: Answers, after: Answers, unhealthy: Sequence[str] = ()) -> None:
        """The table at the end of a run, on the same prompts with the same random draws, below what is wrong."""
        self.close()
        for line in unhealthy:
            self.console.print(Text(printable(line), style="bold red"))
        table = Table("held-out prompts", "before", "after", "change", title=f"{len(before.completions)} prompts")
        first, last = before.figures, after.figures
        names = {"kl": "KL, nats a sequence", "distinct_2": "distinct 2-grams"}
        for key in first:
            name = (
                f"rating points ({key.removeprefix('points/')})" if key.startswith("points/") else names.get(key, key)
            )
            table.add_row(
                Text(printable(name)), f"{first[key]:.3f}", f"{last[key]:.3f}", f"{last[key] - first[key]:+.3f}"
            )
        self.console.width = max(self.console.width, _NARROWEST)
        self.console.print(table)
        pairs = zip(before.completions, after.completions, strict=True)
        for (prompt, old, low), (_, new, high) in list(pairs)[:_SHOWN_ANSWERS]:
            self.console.print(Text(f"\n{harmless(prompt)}", style="bold"))
            self.console.print(Text(f"  before {low:+.2f}  {harmless(old.strip())}"))
            self.console.print(Text(f"  after  {high:+.2f}  {harmless(new.strip())}", style="cyan"))
        self.console.print()
