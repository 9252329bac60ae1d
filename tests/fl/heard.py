"""A progress display that keeps what it hears."""

from __future__ import annotations

from fedms.fl.journal.progress import Progress


class Heard(Progress):
    """Shows nothing and keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)
