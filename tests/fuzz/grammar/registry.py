"""The table of templates: a template writes one statement, or says that it cannot here."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.writer import Writer

Template = Callable[[Writer], None]
TEMPLATES: dict[str, tuple[Template, int]] = {}


def template(weight: int = 2) -> Callable[[Template], Template]:
    """Enter a template; heavier ones are chosen more often."""

    def enter(function: Template) -> Template:
        TEMPLATES[function.__name__] = (function, weight)
        return function

    return enter
