"""The node's GPUs through NVML, where there are any. Never fails: a machine without a GPU has none to show."""


def gpus() -> list[str]:
    """Names of the node's GPUs."""
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
