"""Messages of libraries that the program's own lines stand for."""

import logging as standard_logging
import re
import sys

from absl import logging


def quiet_orbax() -> None:
    """Leaves a failed save to the one line that `checkpoint` makes of it.

    Orbax reports every file that it touches, and one failure several times, also by
    asyncio; then TensorStore reports to an event loop that is closed.
    """
    logging.set_verbosity(logging.WARNING)
    loud = re.compile(r"\b(orbax|asyncio)\b")
    logging.get_absl_handler().addFilter(
        lambda record: not loud.search(record.pathname)
    )
    show = sys.unraisablehook

    def show_others(fault) -> None:
        if str(fault.exc_value) != "Event loop is closed":
            show(fault)

    sys.unraisablehook = show_others


def quiet_matplotlib() -> None:
    """Leaves a home that cannot be written to the one warning of `keep_programs`.

    Matplotlib goes on with a temporary folder, and warns of that twice.
    """
    logger = standard_logging.getLogger("matplotlib")
    logger.addFilter(lambda record: record.funcName != "_get_config_or_cache_dir")
