"""transformers without its own bars and notes, while a model is converted under our progress report.

Enters: nothing. Leaves: a `with` block in which transformers says errors only; what it was told before holds again
after it.
Floor 6. transformers loads when it is entered.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' loading bars and notes; what fails still raises."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The GGUF reader's bar has no switch: it goes to standard error as it finds it.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
