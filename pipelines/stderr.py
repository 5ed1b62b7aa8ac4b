"""Keeps the start-up chatter of TensorFlow and of Beam's worker processes off the terminal."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO

from tracin_transforms.core.errors import InputError


@contextlib.contextmanager
def captured_stderr() -> Iterator[TextIO]:
    """Captures what this process and its children write to stderr while the block runs.

    C++ code writes there whatever TF_CPP_MIN_LOG_LEVEL says, and worker processes log each of
    their steps. Where the block fails for a reason that no `InputError` explains, everything
    captured is shown.

    Yields:
        A stream to the terminal's stderr, for what is meant to be seen.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as captured, os.fdopen(os.dup(2), "w", buffering=1) as stream:
        os.dup2(captured.fileno(), 2)
        try:
            yield stream
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException:
            sys.stderr.flush()
            captured.seek(0)
            stream.write(captured.read().decode(errors="replace"))
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
