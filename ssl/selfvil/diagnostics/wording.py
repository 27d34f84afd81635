"""Numbers and advice in readable sentences."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def number(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 4.5, 1,870, or "less than 0.000001"."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size < 1e-6:
        return "0" if value == 0 else "less than 0.000001" if value > 0 else "almost 0"
    if size >= 1e15:
        return "more than a quadrillion" if value > 0 else "less than minus a quadrillion"
    if size >= 999.5:
        return f"{float(f'{value:.3g}') if size < 1e4 else round(value):,.0f}"
    decimals = max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def share(value: float) -> str:
    """A share from 0, such as 12 %, 0.05 %, or 3.8 times."""
    if value < 0:
        raise ValueError(f"{value} is no share")
    if value >= 2:
        return f"{number(value)} times"
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 9.5 else f"{number(float(f'{percent:.2g}'))} %"


def count(value: float, noun: str, plural: str | None = None) -> str:
    """A number, possibly fractional, with its noun: 0.4 tokens, 1 token, 1,870 tokens."""
    text = number(float(f"{value:.2g}")) if value < 100 else number(value)
    return f"{text} {noun if text == '1' else plural or noun + 's'}"


def setting(value: Any) -> str:
    """The value of a setting as a recipe writes it."""
    if value is None:
        return "null"
    if not isinstance(value, float):
        return str(value)
    return f"{value:g}" if abs(value) < 1e6 else f"{value:.0f}"


def one_digit(value: float) -> float:
    """The nearest number with one significant digit."""
    return float(f"{value:.0e}")


@dataclass(frozen=True)
class Case:
    """The state of a run when a rule is broken.

    value: the number of the rule. settings: by section and key, such as optim.base_lr. numbers: the latest metrics.
    total_steps: of the run.
    """

    value: float
    settings: Mapping[str, Any]
    numbers: Mapping[str, float]
    total_steps: int

    def has(self, key: str) -> bool:
        """Whether the recipe has this setting with a value other than null."""
        return self.settings.get(key) is not None

    def now(self, key: str) -> str:
        """The setting and its value, for a sentence."""
        return f"{key} (now {setting(self.settings.get(key))})"

    def lower(self, key: str, target: float) -> str | None:
        """Advice to lower a setting to `target`; None if the setting is absent or not larger."""
        return self._change("lower", key, target) if self.has(key) and self.settings[key] > target else None

    def raised(self, key: str, target: float) -> str | None:
        """Advice to raise a setting to `target`; None if the setting is absent or not smaller."""
        return self._change("raise", key, target) if self.has(key) and self.settings[key] < target else None

    def _change(self, verb: str, key: str, target: float) -> str:
        return f"{verb} {self.now(key)} to {setting(target)}"

    def scale_lr(self, factor: float) -> str:
        """Advice to multiply the learning rate by about `factor`, which is not close to 1."""
        now = float(self.settings["optim.base_lr"])
        target = one_digit(now * factor)
        return self._change("lower" if factor < 1 else "raise", "optim.base_lr", target)


def first(*options: str | None) -> str:
    """The first advice that applies; the last option must not be None."""
    return next(option for option in options if option is not None)
