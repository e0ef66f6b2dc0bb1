"""What went wrong, and whose fault it is: shared by the engines."""

import re

import torch

from farm.errors import OutOfMemory, RenderFailed
from workers.engine import Pixels

NO_MEMORY = re.compile(r"out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|can't allocate memory")


def judge(image: torch.Tensor, *, frames: list[int] | None = None) -> Pixels | RenderFailed:
    """Turn one decoded image, (3, height, width) in 0 … 1, into the bytes that the stock 'pil' output has."""
    facts = {} if frames is None else {"frames": frames}
    if not bool(image.isfinite().all()):
        return RenderFailed("the image is not a number", **facts)
    if not bool(image.any()):
        return RenderFailed("the image is all black", **facts)
    pixels: Pixels = (image.permute(1, 2, 0).float() * 255).round().to(torch.uint8).cpu().numpy()
    return pixels


def failure(error: Exception, *, frames: list[int] | None = None) -> RenderFailed:
    """The same as an error of the farm; it keeps no traceback, which would hold the tensors of the call."""
    facts = {} if frames is None else {"frames": frames}
    if isinstance(error, RenderFailed):
        return error.with_traceback(None)
    if is_out_of_memory(error):
        return OutOfMemory(str(error).partition("\n")[0], **facts)
    return RenderFailed(f"{type(error).__name__}: {brief(error)}", **facts)


def brief(error: Exception) -> str:
    """What an error says first: torch goes on with a line for every tensor that does not fit."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller pack may go through."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def is_lost(error: Exception) -> bool:
    """After a device error every later call fails too: the process has to end."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
