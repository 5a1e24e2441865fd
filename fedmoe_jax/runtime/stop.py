"""The wish to stop: signals that ask a run to save and end, noticed at any moment."""

import os
import signal
import threading
import time

ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
# A terminal that closes, `timeout` and service managers send their signal twice.
ECHO_SECONDS = 1.0
NOTICE = (
    b"stopping once the current rounds, or what compiles, are done; "
    b"again to stop at once\n"
)


class Stop:
    """False until somebody wishes to stop."""

    def __init__(self) -> None:
        self.wished = False

    def wish(self) -> None:
        """Asks to save and end after the current rounds."""
        self.wished = True

    def __call__(self) -> bool:
        return self.wished


def listen(stop: Stop, heard: int | None = None) -> None:
    """Makes the first ending signal a wish to stop, and the second an end at once.

    A thread hears them: Python's own handlers wait while XLA compiles or computes.

    Args:
      stop: the wish.
      heard: where the numbers of signals come from; None for those of this process,
        which otherwise ignores its own.
    """
    if heard is None:
        heard, told = os.pipe()
        listen_to_signals(told)
    else:
        for name in ENDINGS:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_hear, args=(heard, stop), daemon=True).start()


def listen_to_signals(told: int) -> None:
    """Writes the number of every ending signal to a pipe, at any moment.

    Signals that the process was started to ignore, SIGHUP under `nohup` say, stay so.
    """
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for name in ENDINGS:
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def _hear(heard: int, stop: Stop) -> None:
    endings = {getattr(signal, name) for name in ENDINGS}
    first = 0.0
    while read := os.read(heard, 1):
        number, now = read[0], time.monotonic()
        if number not in endings:  # a handler of another module
            continue
        if stop.wished and first and now - first < ECHO_SECONDS:
            continue
        first = first or now
        if stop.wished:
            os._exit(128 + number)
        stop.wish()
        try:
            os.write(1, NOTICE)
        except OSError:  # the terminal is gone
            pass
