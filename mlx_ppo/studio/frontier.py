"""What `mlx_ppo.frontier` has found, as lines and as a picture."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_ppo.errors import UserError
from mlx_ppo.files import parse_json, read_regular
from mlx_ppo.runs.folder import FRONTIER

_LARGEST = 1 << 20  # bytes of a result

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 400, 60, 46, 16, 16
_STYLE = (
    ":root{color:#222}@media(prefers-color-scheme:dark){:root{color:#ddd}}"
    "text{font:12px system-ui,sans-serif;fill:currentColor}.axis{stroke:currentColor;stroke-opacity:.35}"
    ".best{stroke:#2a7f62;fill:#2a7f62}.tilted{stroke:#8a5cc7;fill:#8a5cc7}.run{stroke:#c2571a;fill:#c2571a}"
    "polyline{fill:none;stroke-width:2}.best text,.tilted text,.run text{stroke:none}"
)
Point = tuple[float, float]


def kept(folder: Path) -> dict[str, Any] | None:
    """The picture, as an address that holds it, and the lines of what was found of a run; None where nothing was."""
    try:
        found = parse_json(read_regular(folder / FRONTIER, largest=_LARGEST))
        picture = base64.b64encode(drawing(found).encode()).decode()
        return {"picture": f"data:image/svg+xml;base64,{picture}", "lines": table(found)}
    except (UserError, OSError, LookupError, TypeError, ValueError, ArithmeticError):  # none, or no such document
        return None


def drawing(found: Mapping[str, Any]) -> str:
    """The picture of a result of `mlx_ppo.frontier`, as a file by itself or inside a page."""
    best = [(one["kl"], one["gain"]) for one in found["best_of"]]
    tilted = sorted((one["kl"], one["gain"]) for one in found["tilted"])
    path = [(one["kl"], one["gain"]) for one in found["evaluations"] if one["step"] <= found["step"]]
    policy = found["policy"]["kl"][0], found["policy"]["gain"][0]
    everything = [*best, *tilted, *path, policy, (0.0, 0.0)]
    across, up = _Axis([x for x, _ in everything]), _Axis([y for _, y in everything])

    def place(point: Point) -> Point:
        x = _LEFT + across.share(point[0]) * (_WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(_HEIGHT - _BOTTOM - up.share(point[1]) * (_HEIGHT - _BOTTOM - _TOP), 1)

    parts = [_grid(across, up, place)]
    parts.append(_line("tilted", list(map(place, tilted)), "best possible (tilted reference)"))
    parts.append(_line("best", list(map(place, best)), "best of n"))
    for one in found["best_of"][1:]:
        x, y = place((one["kl"], one["gain"]))
        parts.append(f'<g class="best"><text x="{x + 5}" y="{y + 14}">{one["k"]}</text></g>')
    parts.append(_line("run", list(map(place, path)), ""))
    x, y = place(policy)
    parts.append(f'<g class="run"><circle cx="{x}" cy="{y}" r="5"/><text x="{x - 8}" y="{y - 10}">policy</text></g>')
    label = f"gain in score against KL: the policy gains {policy[1]:.2f} at {policy[0]:.1f} nats"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )


class _Axis:
    """A linear scale with round marks."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        raw = max(high - low, 1e-6) / 5
        size = 10.0 ** math.floor(math.log10(raw))
        self.step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
        self.low, self.high = math.floor(low / self.step) * self.step, math.ceil(high / self.step) * self.step

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        return (value - self.low) / max(self.high - self.low, 1e-9)

    def marks(self) -> list[float]:
        """Round values."""
        return [self.low + number * self.step for number in range(round((self.high - self.low) / self.step) + 1)]


def _grid(across: _Axis, up: _Axis, place: Any) -> str:
    parts = []
    for value in up.marks():
        x, y = place((across.low, value))
        parts.append(f'<line class="axis" x1="{x}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{value:.4g}</text>')
    for value in across.marks():
        x, y = place((value, up.low))
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{value:.4g}</text>')
    middle, side = _WIDTH / 2, f"rotate(-90 14 {_HEIGHT / 2})"
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">KL, nats a response</text>')
    parts.append(f'<text x="14" y="{_HEIGHT / 2}" text-anchor="middle" transform="{side}">gain in score</text>')
    return "".join(parts)


def _line(name: str, points: Sequence[Point], title: str) -> str:
    if not points:
        return ""
    line = " ".join(f"{x},{y}" for x, y in points)
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in points)
    x, y = points[-1]
    words = f'<text x="{x - 6}" y="{y - 8}" text-anchor="end">{title}</text>' if title else ""
    return f'<g class="{name}"><polyline points="{line}"/>{dots}{words}</g>'


def table(found: Mapping[str, Any]) -> list[str]:
    """The lines of a result."""
    policy, optimum, coef = found["policy"], found["optimum"], found["coef"]
    lines = [
        f"{found['prompts']} held-out prompts, {found['samples']} samples each of the reference (mean score "
        f"{found['reference']['score']:+.3f}) and of the policy {_which(found)}; penalty {coef:g}",
        f"{'':22}{'gain':>8}{'KL':>8}{f'gain - {coef:g} KL':>18}",
    ]
    for one in found["best_of"][1:]:
        lines.append(_row(f"best of {one['k']}", one["gain"], one["kl"], one["value"]))
    here = next(one for one in found["tilted"] if one["coef"] == coef)
    lines += [
        _row("policy", policy["gain"][0], policy["kl"][0], policy["value"][0]) + _interval(policy["value"], 2),
        _row("optimum, at least", here["gain"], here["kl"], optimum["value"][0]) + _interval(optimum["value"], 2),
    ]
    if found["share"] is None:
        lines.append("share of the optimum: none, as no policy gains by leaving the reference")
    else:
        share, low, high = (100 * number for number in found["share"])
        lines.append(f"share of the optimum: {share:z.0f} % ({low:z.0f} to {high:z.0f} %)")
    if found["equal_kl"] is not None:
        share, there = found["equal_kl"]["share"], found["equal_kl"]["best_of_gain"]
        lines.append(f"at its KL, best-of-n gains {there:+.3f}: the policy has {share * 100:z.0f} % of that")
    if optimum["few"]:
        lines.append(
            f"the optimum rests on {optimum['effective']:.1f} effective samples a prompt: the true one may lie well "
            "above, and the true share below this one; more --samples narrow that"
        )
    return lines


def _which(found: Mapping[str, Any]) -> str:
    return found["of"] if "of" in found else f"after iteration {found['step']}"


def _row(name: str, gain: float, kl: float, value: float) -> str:
    return f"{name:22}{gain:>+8.3f}{kl:>8.2f}{value:>+18.3f}"


def _interval(numbers: list[float], digits: int) -> str:
    return f"  ({numbers[1]:.{digits}f} to {numbers[2]:.{digits}f})"
