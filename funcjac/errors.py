"""What funcjac raises and warns about."""


class BatchMixingError(ValueError):
    """The rows of ``func``'s output depend on other rows of its input.

    A batched Jacobian is then not defined. The usual causes are BatchNorm in training mode,
    statistics such as ``x.mean(0)``, a softmax over the batch, and recurrent or attention layers
    that take the batch second (``batch_first=False``). The message names suspects.
    """


class VerificationError(RuntimeError):
    """A computed Jacobian does not agree with a plain vector-Jacobian product.

    Either PyTorch differentiates one of ``func``'s operations wrongly in the requested engine and
    mode, or autograd cannot see all of ``func`` (a ``detach``, a trip through NumPy, a ``no_grad``
    block). The message says which; ``check_derivative`` compares all engines and modes.
    """


class EngineFallbackWarning(UserWarning):
    """``engine="auto"`` left an engine because it failed on ``func``.

    The result is right, by another engine. The warning names the engine that was left and why.
    Pass ``engine="sum"`` to choose yourself, or silence it with
    ``warnings.filterwarnings("ignore", category=funcjac.EngineFallbackWarning)``.
    """


for _public in (BatchMixingError, EngineFallbackWarning, VerificationError):
    _public.__module__ = "funcjac"


class RefusedError(ValueError):
    """An engine that is not even tried; part of a message, never raised by itself."""


class UntraceableError(RuntimeError):
    """Taylor propagation cannot follow a function; part of a message, never raised by itself."""


def refuse(
    name: str, kind: type[Exception], expected: str, got: object, remedy: str = ""
) -> Exception:
    """An error in the words of the house: what was expected, what came, what to do."""
    text = str(got)
    text = text if len(text) <= 200 else text[:200] + "..."
    return kind(f"{name}: expected {expected}, got {text}.{' ' if remedy else ''}{remedy}")


def brief(error: Exception) -> str:
    """An exception in one line."""
    line = (str(error).strip().splitlines() or [""])[0]
    if len(line) > 200:  # up to the end of a sentence, if one ends before
        line = line[:200].rpartition(". ")[0] or line[:200] + " …"
    name = "" if isinstance(error, RefusedError) else f"{type(error).__name__}: "
    return f"{name}{line}".rstrip(": .")
