"""The node's GPUs through NVML, where there are any. Never fails: a machine without a GPU has none to show."""

import threading


class Gpus:
    """Looked for once, in the background: to ask a driver takes it seconds where no program has its GPUs open.

    `names` is empty until it has answered. The thread is never waited for: one that hangs ends with the process.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        threading.Thread(target=self._look, name="gpus", daemon=True).start()

    def _look(self) -> None:
        self.names = _gpus()


def _gpus() -> list[str]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, a driver that is being replaced: all mean "no GPU to show"
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
