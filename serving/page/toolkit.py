"""Gradio, imported without the files that it writes for editors.

At every import Gradio parses its own sources to bring the `.pyi` file beside each component up to date. That is half of
the time until the page starts, and it writes into the installed package.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["gr"]


@contextmanager
def _without_editor_files() -> Iterator[None]:
    original = inspect.getfile

    def getfile(thing: Any) -> str:
        # Gradio writes nothing for a component whose file is unknown, such as one that was typed into a shell.
        if type(thing).__name__ == "ComponentMeta":
            raise OSError("Gradio's editor files are left as they are")
        return original(thing)

    patched: Any = inspect  # its stubs allow no replacement
    patched.getfile = getfile
    try:
        yield
    finally:
        patched.getfile = original


with _without_editor_files():
    import gradio as gr
