"""The result of one kind of fault: number of trials, number of kept promises, and the failures."""

from dataclasses import dataclass, field


@dataclass
class Row:
    """One line of the campaign's table. notes: facts to report with it, such as the longest time."""

    fault: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, wrong: str | None) -> None:
        """Add one trial. wrong: the broken promise, or None."""
        self.tried += 1
        if wrong is not None:
            self.failures.append(f"{name}: {wrong}")

    @property
    def held(self) -> int:
        return self.tried - len(self.failures)


def as_table(rows: list[Row]) -> str:
    """The rows in Markdown, with the failures below."""
    lines = ["| fault | tried | held | notes |", "|---|---|---|---|"]
    lines += [f"| {row.fault} | {row.tried} | {row.held} | {'; '.join(row.notes)} |" for row in rows]
    failures = [f"- {row.fault}: {failure}" for row in rows for failure in row.failures]
    return "\n".join([*lines, *([""] if failures else []), *failures])
