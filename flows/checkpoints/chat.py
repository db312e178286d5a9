"""The talk in the terminal: a line is read, each model answers it, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from evaluation.inference.dialogue import Dialogue

#: what forgets the talk so far
NEW = "/new"


class Screen(Protocol):
    """Where the talk is shown."""

    def write(self, text: str) -> None:
        """A piece, as it is."""

    def name(self, name: str) -> None:
        """Who answers now."""


def talk(dialogues: Mapping[str, Dialogue], lines: Iterable[str], screen: Screen) -> int:
    """Let every model answer every line; returns the number of lines. Somebody who interrupts an answer ends that
    answer and not the talk."""
    count = 0
    for line in lines:
        text = line.strip()
        if text == NEW:
            for dialogue in dialogues.values():
                dialogue.turns.clear()
        elif text:
            count += 1
            for name, dialogue in dialogues.items():
                screen.name(name)
                _answered(dialogue, text, screen.write)
    return count


def _answered(dialogue: Dialogue, text: str, write: Callable[[str], None]) -> None:
    try:
        dialogue.answer(text, write)
    except KeyboardInterrupt:
        write(" [interrupted]")
    write("\n")
